"""Which model a weight file belongs to: by what zoo wrote into it, by the manifest, or by its entries.

A candidate is a model that zoo can build. It is built on the meta device, the file's entries are translated into its
names by its family's own translation, and it fits if names and shapes agree. The number of classes, of input channels,
of blocks and the image size come from the file where it tells them.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models import get_pretrained_cfg, is_model, model_entrypoint
from torch import nn

import zoo
import zoo.heads.detection_checkpoint  # registers its layouts
import zoo.heads.pem.checkpoint
from zoo.activator import constructor_arguments
from zoo.checkpoint import (
    CheckpointError,
    Conversion,
    StateDict,
    classifier_names,
    identify_layout,
    layout_family,
    translate,
    unwrap_state_dict,
)
from zoo.heads.craft import read_options
from zoo.manifest import Weights, find_weights, known_weights
from zoo.saving import DOORS, read_metadata
from zoo.spartan import model_arguments

# arguments that the file may tell, the less usual ones first
_ADJUSTED = ("depth", "in_chans", "img_size", "num_classes")
_LOSSY = ("resampled", "left out", "merged", "gamma is 0")  # in the notes of translations
_SIZES = (28, 32, 64, 128, 192, 256, 288, 320, 384, 448, 512)
_FAILURES = (CheckpointError, RuntimeError, ValueError, TypeError, KeyError, IndexError, NotImplementedError)
# kinds of models that share a family's file and not its official layouts
_KINDS = {
    "PoolFormer": ("poolformerv1_", "metaformer_"),
    "MetaFormer baselines": ("identityformer_", "randformer_", "poolformerv2_", "convformer_", "caformer_"),
}
_DENSE_DOORS = {"fcaformer_dense": ("fcaformer_l1", "fcaformer_l2", "fcaformer_l3", "fcaformer_l4")}
_DENSE_DOORS |= {"slab_swin_dense": ("slab_swin_t", "slab_swin_s", "swin_t_prepbn", "swin_s_prepbn")}


class Recognised(NamedTuple):
    """A model that zoo can build.

    Attributes:
        model: registered name, or the name that the door takes.
        door: a key of `zoo.saving.DOORS`; None for `timm.create_model`.
        arguments: besides the name.
        weights: the manifest's entry of the file, if it is one.
        how: how the file was recognised, for people.
    """

    model: str
    door: str | None = None
    arguments: Mapping[str, Any] = {}
    weights: Weights | None = None
    how: str = "entries"

    @property
    def name(self) -> str:
        """The model with its arguments, for people."""
        told = {k: v for k, v in self.arguments.items() if k not in ("pretrained_backbone",)}
        shown = ", ".join(f"{k}={v!r}" for k, v in told.items())
        return f"{self.model} ({shown})" if shown else self.model

    def build(self) -> nn.Module:
        """The model, with random weights, in eval mode.

        Raises:
            ValueError: no such model, or arguments that it does not take.
        """
        try:
            if self.door is None:
                tag = self.weights.tag if self.weights else ""
                tagged = f"{self.model}.{tag}" if tag and has_tag(self.model, tag) else self.model
                return timm.create_model(tagged, **self.arguments).eval()
            function = getattr(importlib.import_module(DOORS[self.door]), self.door)
            name = "craft" if self.door == "create_upscaler" else self.model
            model = function(name, **self.arguments).eval()
        except TypeError as error:
            raise ValueError(f"{self.name} cannot be built: {error}") from error
        if DOORS[self.door] != "zoo":
            model.zoo_door = (self.door, {"variant": self.model, **self.arguments})
        return model

    def replace(self, **arguments: Any) -> Recognised:
        """The same with other arguments added."""
        return self._replace(arguments={**self.arguments, **arguments})


def has_tag(model: str, tag: str) -> bool:
    """Whether timm's registry has the model with this tag."""
    try:
        cfg = get_pretrained_cfg(f"{model}.{tag}")
    except (RuntimeError, KeyError):
        return False
    return cfg is not None and cfg.tag == tag


def name_candidate(model: str, arguments: Mapping[str, Any] | None = None) -> Recognised:
    """The candidate that a user names: "NAME", "NAME.TAG" of the manifest, or a head's name with its arguments.

    Raises:
        ValueError: no such model.
    """
    weights = find_weights(model) if "." in model else None
    base = model.partition(".")[0]
    if weights is None and "." in model and not (is_model(base) and has_tag(base, model.partition(".")[2])):
        raise ValueError(f"--model {model}: the manifest has no such name and tag; `zoo weights list` names them")
    options = {**(weights.options if weights else {}), **(arguments or {})}
    doors = {**dict.fromkeys(zoo.list_heads("detection"), "create_detector"), "pem": "create_segmenter"}
    door = "create_upscaler" if re.fullmatch(r"craft(_x[234])?", base) else doors.get(base)
    if door == "create_upscaler":
        options = {"scale": int(base[-1]) if base != "craft" else 4, **options}
    if door is None and not is_model(base):
        if base in DOORS:
            raise ValueError(f"--model {base}: pass the name of the variant, and --model-args '{{\"dense\": true}}'")
        raise ValueError(f"--model {model}: no model is called so; `zoo list` and timm.list_models() name them")
    if options.pop("dense", False):
        door = next((door for door, names in _DENSE_DOORS.items() if base in names), None)
        if door is None:
            options["dense"] = True
    return Recognised(base, door, options, weights, "--model")


def recognise(
    path: Path,
    content: Mapping,
    *,
    model: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    sha256: str | None = None,
) -> Recognised:
    """The model that a file belongs to.

    Args:
        path: the file, for its name and metadata.
        content: what `read_checkpoint` gave for it.
        model: what the user says that it is.
        arguments: arguments of the model that the file does not tell.
        sha256: of the file.

    Raises:
        CheckpointError: no candidate fits, or several do; one sentence that names them.
        ValueError: no model of this name.
    """
    described = read_metadata(path) if path.suffix == ".safetensors" else {}
    if model is None and (described.get("model") or described.get("door")):
        return _described(described)
    state = unwrap_state_dict(content)
    if model is not None:
        named = name_candidate(model, arguments)
        named = named._replace(weights=named.weights or _listed_as(path, sha256, named.model))
        fitted, problem, _ = _fit(named, state, fixed=arguments or {})
        if fitted is None:
            raise CheckpointError(f"{path} does not fit {named.name}: {problem}")
        return fitted
    listed = [w for w in known_weights() if _is_listed(w, path, sha256)]
    for weights in listed:
        named = _from_manifest(weights, arguments)
        fitted = _fit(named, state, fixed=arguments or {})[0] if named else None
        if fitted is not None:
            return fitted
    return _by_entries(path, state, arguments or {})


def _described(described: Mapping[str, Any]) -> Recognised:
    if described.get("door"):
        arguments = dict(described["door_args"])
        name = arguments.pop({"create_detector": "head"}.get(described["door"], "name"), None)
        if DOORS.get(described["door"]) != "zoo":
            name = arguments.pop("variant", None)
        return Recognised(str(name), described["door"], arguments, None, "its metadata")
    arguments = {"num_classes": described["num_classes"], "in_chans": described["in_chans"], **described["model_args"]}
    return Recognised(described["model"], None, arguments, find_weights(described.get("weights") or ""), "its metadata")


def _is_listed(weights: Weights, path: Path, sha256: str | None) -> bool:
    names = {f"{weights.name}.safetensors", f"{weights.name}.pth"}
    if weights.file:
        names.add(Path(weights.file).name)
    return path.name in names or (sha256 is not None and weights.sha256 == sha256)


def _listed_as(path: Path, sha256: str | None, model: str) -> Weights | None:
    return next((w for w in known_weights() if w.model == model and _is_listed(w, path, sha256)), None)


def _from_manifest(weights: Weights, arguments: Mapping[str, Any] | None) -> Recognised | None:
    if weights.door is None and not is_model(weights.model):
        return None
    named = name_candidate(weights.name, arguments)
    return named._replace(how="the manifest")


# ---- by the entries


def _by_entries(path: Path, state: StateDict, arguments: Mapping[str, Any]) -> Recognised:
    layout = identify_layout(state)
    fits: list[tuple[Recognised, tuple]] = []
    tried: list[str] = []
    for candidate in (*_candidates(layout, state), None):
        if candidate is None:  # the end: a size that is not registered, of a family that builds any size
            candidate = None if fits else _any_size(layout, state)
            if candidate is None:
                break
        tried.append(candidate.model)
        fitted, _, lossy = _fit(candidate.replace(**arguments), state, fixed=arguments)
        if fitted is not None:  # the less had to be changed, the better
            new = [fitted.arguments.get(name) != candidate.arguments.get(name) for name in _ADJUSTED]
            fits.append((fitted, (lossy, *new)))
    best = min((cost for _, cost in fits), default=None)
    found = [candidate for candidate, cost in fits if cost == best]
    names = list(dict.fromkeys(candidate.model for candidate in found))
    if len(found) == 1 or len(names) == 1:
        return found[0]
    if names:
        raise CheckpointError(f"{path} fits several models, {' and '.join(names)}: say which with --model")
    examples = ", ".join(list(state)[:3])
    kind = f"a file of {layout} in a size that no registered model has" if layout else "a file of no known layout"
    near = f"; the nearest are {', '.join(dict.fromkeys(tried))}"[:300] if layout and tried else ""
    raise CheckpointError(
        f"{path} is {kind} (entries such as {examples}){near}: say what it is with --model and --model-args"
    )


def _candidates(layout: str | None, state: StateDict) -> Iterator[Recognised]:
    family = layout_family(layout) if layout else None
    if family == "craft":
        options = _craft_options(state)
        yield Recognised(f"craft_x{options['scale']}", "create_upscaler", options)
    elif family == "detection":
        yield from _detectors(layout, state)
    elif family == "pem":
        yield from _segmenters(state)
    else:
        kinds = _KINDS.get(layout, ("",))
        yield from (candidate for candidate in _backbones(family, state) if candidate.model.startswith(kinds))


def _craft_options(state: StateDict) -> dict[str, Any]:
    try:
        return read_options(state)
    except CheckpointError:  # the tables of indices, which are built anyway, may be of no use
        return read_options({name: value for name, value in state.items() if not name.startswith("relative_")})


def _backbones(family: str | None, state: StateDict) -> Iterator[Recognised]:
    if family == "spartan":
        arguments = model_arguments(state)
        known = {timm.create_model(name, num_classes=0, device="meta"): name for name in zoo.list_models("spartan_*")}
        names = [n for m, n in known.items() if _spartan_size(m.state_dict()) == _spartan_size(state)]
        yield Recognised(names[0]) if names else Recognised("spartan_tiny", None, arguments)
        return
    for name in _family_names(family) if family else _native_names(state):
        yield Recognised(name)
        if name.startswith("poolformerv1_") and "norm0.weight" in state:
            yield Recognised(name, None, {"dense": True})
    for door, variants in _DENSE_DOORS.items():
        if family is not None and door.startswith(family):
            yield from (Recognised(v, door) for v in variants if is_model(v))


def _any_size(layout: str | None, state: StateDict) -> Recognised | None:
    if not layout or layout_family(layout) != "activator":
        return None
    made = constructor_arguments(state)
    base = "activator_patch4_32" if made["mlp"] else "activator_geglu_patch4_32"
    base = base if made["gate_norm"] else "uniform_activator_patch4_32"
    return Recognised(base, None, {k: v for k, v in made.items() if k not in ("mlp", "gate_norm")})


def _spartan_size(state: StateDict) -> tuple:
    made = model_arguments(state)
    return tuple(made[name] for name in ("embed_dims", "depths", "expand_ratios"))


def _family_names(family: str | None) -> list[str]:
    def base(name: str) -> str:
        return model_entrypoint(name).__module__.removeprefix("zoo.").split("_")[0]

    names = [name for name in zoo.list_models() if family in (None, base(name))]
    # timm's own models with official weights in the manifest
    theirs = {w.model for w in known_weights() if is_model(w.model)} - set(zoo.list_models())
    # zoo's poolformerv1_* are the same networks with the official head
    theirs = {name for name in theirs if not name.startswith(("poolformer_", "resnet"))}
    return [*names, *(sorted(theirs) if family in (None, "metaformer") else ())]


def _native_names(state: StateDict) -> Iterator[str]:
    """Models of the families whose own names the entries have."""
    for family in sorted({model_entrypoint(name).__module__ for name in zoo.list_models()}):
        names = _family_names(family.removeprefix("zoo.").split("_")[0])
        with torch.device("meta"):
            own = timm.create_model(names[0]).state_dict()
        if sum(name in own for name in state) > 0.2 * min(len(own), len(state)):
            yield from names


def _detectors(layout: str, state: StateDict) -> Iterator[Recognised]:
    if "RetinaNet" in layout:
        head, classes = "retinanet", state["bbox_head.retina_cls.weight"].shape[0] // 9
    else:
        head = "mask_rcnn" if any(n.startswith("roi_head.mask_head.") for n in state) else "faster_rcnn"
        classes = state["roi_head.bbox_head.fc_cls.weight"].shape[0] - 1
    inner = {n.removeprefix("backbone."): v for n, v in state.items() if n.startswith("backbone.")}
    normed = any(re.fullmatch(r"norm\d\.weight", n) for n in inner)
    body = identify_layout(inner)
    resnets = ["resnet18", "resnet34", "resnet50", "resnet101"]
    names = _family_names(layout_family(body)) if body else [*_native_names(inner), *resnets]
    width = state["neck.lateral_convs.0.conv.weight"].shape[0]
    made = dict(num_classes=classes) | ({} if width == 256 else dict(out_channels=width))
    for name in names:
        norm = ("group" if "poolformer" in name else "layer") if normed else None
        yield Recognised(head, "create_detector", dict(backbone=name, norm=norm, **made))


def _segmenters(state: StateDict) -> Iterator[Recognised]:
    predictor = "sem_seg_head.predictor."
    made: dict[str, Any] = dict(num_classes=state[f"{predictor}class_embed.weight"].shape[0] - 1)
    queries = next((n for n in state if re.search(r"predictor\.(query_feat|static_query)\.weight$", n)), None)
    if queries is not None and state[queries].shape[0] != 100:
        made["num_queries"] = state[queries].shape[0]
    depth = len({n.split(".")[3] for n in state if n.startswith(f"{predictor}transformer_ffn_layers.")})
    if depth != 6:
        made["depth"] = depth
    # detectron2 stores frozen norms without the counter of batches
    for name in ("stdc1", "stdc2", "resnet50", "resnet101", "resnet18", "resnet34"):
        yield Recognised("pem", "create_segmenter", dict(backbone=name, **made))


# ---- whether a candidate fits


def _fit(candidate: Recognised, state: StateDict, fixed: Mapping[str, Any]) -> tuple[Recognised | None, str, bool]:
    """The candidate with the arguments that the file tells, or None and why it does not fit.

    The last value says whether numbers of the file are resampled, merged or left out in it.
    """
    meta = {name: value.to("meta") for name, value in state.items()}
    if candidate.door == "create_upscaler":  # its shapes tell all that is not in the arguments
        try:
            read = _craft_options(state)
        except CheckpointError as error:
            return None, str(error), False
        wanted = candidate.arguments.get("scale", read["scale"])
        if wanted != read["scale"]:
            return None, f"the file is of a model for scale {read['scale']}", False
        candidate = candidate._replace(arguments={**read, **candidate.arguments})
    problem = ""
    for _ in range(4):
        try:
            with torch.device("meta"):
                model = candidate.build()
            conversion = translate(model, meta)
        except _FAILURES as error:
            text = str(error).strip().splitlines() or [type(error).__name__]
            return None, text[0], False
        adjusted, problem = _adjust(candidate, model, conversion, fixed)
        if adjusted is None:
            return None, problem, False
        if adjusted is candidate:
            sized, conversion = _sized(candidate, conversion, meta, fixed)
            return sized, "", any(word in note for note in conversion.notes for word in _LOSSY)
        candidate = adjusted
    return None, problem, False


def _adjust(
    candidate: Recognised, model: nn.Module, conversion: Conversion, fixed: Mapping[str, Any]
) -> tuple[Recognised | None, str]:
    """Another number of classes, channels or blocks, as the file has them; the same candidate if nothing changes."""
    own, state = model.state_dict(), conversion.state_dict
    dropped = getattr(model, "pruned_entries", ())
    state = {n: v for n, v in state.items() if n in own or n not in dropped}
    missing = [n for n in own if n not in state]
    unexpected = [n for n in state if n not in own]
    wrong = [n for n, v in state.items() if n in own and v.shape != own[n].shape]
    if not (missing or unexpected or wrong):
        return candidate, ""
    head = classifier_names(model)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    new: dict[str, Any] = {}
    if candidate.door is None and head:
        rows = [state[n].shape[0] for n in state if n.startswith(head) and n.endswith("weight") and state[n].ndim == 2]
        has = [n for n in own if n.startswith(head)]
        if has and all(n in missing for n in has) and not rows:
            new["num_classes"] = 0
        elif rows and rows[-1] != getattr(model, "num_classes", None):
            new["num_classes"] = rows[-1]
    first = cfg.get("first_conv")
    first = f"{first}.weight" if isinstance(first, str) else None
    if candidate.door is None and first in wrong and state[first].ndim == 4:
        channels = state[first].shape[1]
        if channels != own[first].shape[1]:
            new["in_chans"] = channels
    depths = [int(m[1]) for n in state if (m := re.match(r"blocks\.(\d+)\.", n))]
    if candidate.door is None and depths and 1 + max(depths) != len(getattr(model, "blocks", ())):
        entry = inspect.signature(type(model)).parameters
        if "depth" in entry:
            new["depth"] = 1 + max(depths)
    in_question = {k for k, v in new.items() if k in fixed and fixed[k] != v}
    new = {k: v for k, v in new.items() if candidate.arguments.get(k, object()) != v}
    if in_question:
        what = in_question.pop()
        return None, f"{what} is {fixed[what]} in --model-args and {new[what]} in the file"
    if new:
        return candidate.replace(**new), _differences(missing, unexpected, wrong, own, state)
    return None, _differences(missing, unexpected, wrong, own, state)


def _differences(missing: list[str], unexpected: list[str], wrong: list[str], own: StateDict, state: StateDict) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} entries of the model are not in the file, such as {missing[0]}")
    if unexpected:
        parts.append(f"{len(unexpected)} of the file are not in the model, such as {unexpected[0]}")
    if wrong:
        name = wrong[0]
        there, here = list(state[name].shape), list(own[name].shape)
        parts.append(f"{len(wrong)} have another shape, such as {name} ({there}, model {here})")
    return "; ".join(parts)


def _sized(
    candidate: Recognised, conversion: Conversion, meta: StateDict, fixed: Mapping[str, Any]
) -> tuple[Recognised, Conversion]:
    """The candidate at the image size of the file, where another one was only reached by resampling tables."""
    if not _resampled(conversion) or "img_size" in fixed or candidate.door is not None:
        return candidate, conversion
    for size in _SIZES:
        other = candidate.replace(img_size=size)
        try:
            with torch.device("meta"):
                model = other.build()
            found = translate(model, meta)
        except _FAILURES:
            continue
        own = model.state_dict()
        same = all(n in own and own[n].shape == v.shape for n, v in found.state_dict.items())
        if same and not _resampled(found):
            return other, found
    return candidate, conversion


def _resampled(conversion: Conversion) -> bool:
    return any("resampled" in note for note in conversion.notes)
