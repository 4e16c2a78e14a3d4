"""One door for weights: any file, any wrapper, any known layout, into any model, without running code.

`load_checkpoint` reads a file, peels off what training frameworks wrap around a state dict, lets the
model's family translate the official key names, and loads. What does not fit is reported once, in full.

A family joins by decorating its translation:

    @checkpoint_converter(Crate, layouts={"CRATE": ("transformer.layers.*.0.fn.qkv.weight",)})
    def convert_checkpoint(state_dict, model) -> Conversion: ...
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file as load_safetensors
from torch import Tensor, nn

StateDict = dict[str, Tensor]

# Under these names training scripts store the weights, in order of preference: averaged weights are
# what their authors evaluate. mmengine needs no entry: it stores the averaged weights as `state_dict` and
# the raw ones as `ema_state_dict`.
_EMA_KEYS = ("state_dict_ema", "model_ema", "params_ema", "ema")
_WEIGHT_KEYS = ("state_dict", "model", "model_state", "model_state_dict", "params", "net")
_WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
_COUNTER = "num_batches_tracked"
_LISTED = 12  # names shown of each kind in an error; the report object holds all of them


class CheckpointError(ValueError):
    """A file that cannot be used: unreadable, or of another model. The message says which and what to do."""


class Checkpoint(dict):
    """The content of a file; `replaced` names the classes of objects in it that were read as plain data."""

    replaced: tuple[str, ...] = ()


class Conversion(NamedTuple):
    """A state dict under the model's own names, the layout it came in, and remarks for the user."""

    state_dict: StateDict
    layout: str = "zoo"
    notes: tuple[str, ...] = ()


Converter = Callable[[StateDict, nn.Module], Conversion]

_converters: dict[type[nn.Module], Converter] = {}
_layouts: dict[str, tuple[str, ...]] = {}
_owners: dict[str, Converter] = {}  # of the layouts
# official entries that a converted file keeps beside the model's own: not part of any model, see zoo.conversion
ASIDE = "official entry "


def checkpoint_converter(
    *model_classes: type[nn.Module], layouts: Mapping[str, Iterable[str]]
) -> Callable[[Converter], Converter]:
    """Register the decorated function as the translation into `model_classes` (and their subclasses).

    Args:
        model_classes: classes whose checkpoints the function translates.
        layouts: for each official layout, name patterns that all occur in such a file; they let an error
            message say what a wrong file is.
    """

    def register(function: Converter) -> Converter:
        _converters.update(dict.fromkeys(model_classes, function))
        _layouts.update({name: tuple(patterns) for name, patterns in layouts.items()})
        _owners.update(dict.fromkeys(layouts, function))
        return function

    return register


def find_converter(model: nn.Module | type[nn.Module]) -> Converter | None:
    """The registered translation for `model`: that of the nearest class among its bases."""
    cls = model if isinstance(model, type) else type(model)
    return next((_converters[base] for base in cls.__mro__ if base in _converters), None)


def layout_family(layout: str) -> str:
    """The family ("crate", "slab", "detection", ...) whose translation knows a layout."""
    return _owners[layout].__module__.removeprefix("zoo.").removeprefix("heads.").split(".")[0].split("_")[0]


def identify_layout(names: Iterable[str]) -> str | None:
    """Which known official layout entry names belong to; None if none of them."""
    names = list(names)
    matches = [
        (len(patterns), layout)
        for layout, patterns in _layouts.items()
        if all(fnmatch.filter(names, pattern) for pattern in patterns)
    ]
    return max(matches)[1] if matches else None


@dataclass
class LoadReport:
    """What `load_checkpoint` did. Empty lists mean that every entry of both sides was used."""

    layout: str
    loaded: int = 0
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every entry of the model was filled and every entry of the file was used."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        lines = [f"{self.loaded} entries loaded, layout: {self.layout}"]
        lines += [f"note: {note}" for note in self.notes]
        if self.missing:
            lines.append(_listing("missing in the file", self.missing))
        if self.unexpected:
            lines.append(_listing("not in the model", self.unexpected))
        if self.mismatched:
            shapes = [f"{name} (file {list(there)}, model {list(here)})" for name, there, here in self.mismatched]
            lines.append(_listing("of another shape", shapes))
        return "\n".join(lines)


def _listing(title: str, names: list[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    rest = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{title} ({len(names)}): {shown}{rest}"


def read_checkpoint(path: str | PathLike) -> Checkpoint:
    """The content of a checkpoint file, read without executing anything that it contains.

    Objects of a training script's own classes beside the weights (configurations, schedules, ...) are read as inert
    data, see `zoo.unpickling`; their classes are in the result's `replaced`.

    Args:
        path: `.safetensors`, or any file that `torch.save` wrote (`.pth`, `.pt`, `.bin`, `.pth.tar`, ...), or a pickle
            of numpy arrays (`.pkl`).

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is empty, truncated, a web page, not a checkpoint, or a whole pickled model.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: pass a checkpoint file (.safetensors, .pth, .pt, .bin)")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    with path.open("rb") as file:
        head = file.read(64).lstrip()
    if not head:
        raise CheckpointError(f"{path} is an empty file: download it again")
    if head[:1] == b"<":
        raise CheckpointError(
            f"{path} is a web page, not a checkpoint: the download was redirected; open the link in a browser"
        )
    if path.suffix == ".safetensors":
        try:
            return Checkpoint((n, v) for n, v in load_safetensors(path).items() if not n.startswith(ASIDE))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is not a readable safetensors file (truncated?): {error}; download it again"
            ) from error
    try:
        content, replaced = torch.load(path, map_location="cpu", weights_only=True), ()
    except Exception:  # of many kinds, whether the file is damaged or holds objects
        content, replaced = _read_as_data(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a dict of tensors")
    checkpoint = Checkpoint(content)
    checkpoint.replaced = replaced
    return checkpoint


def _read_as_data(path: Path) -> tuple[Any, tuple[str, ...]]:
    """A file with pickled objects, as plain data."""
    from zoo import unpickling

    try:
        content, replaced = unpickling.read(path)
    except unpickling.UnpicklingRefused as error:
        raise CheckpointError(f"{path} is truncated or not a checkpoint: {error}; nothing in it was run") from error
    models = list(unpickling.named_modules(content))
    if models:
        raise CheckpointError(
            f"{path} holds a whole pickled model ({models[0]}) instead of its weights, and using it would run code "
            "from the file: save its state_dict() where that code is at hand, and load that"
        )
    if not isinstance(content, Mapping):
        what = replaced[0] if replaced else type(content).__name__
        raise CheckpointError(f"{path} holds a {what}, expected a dict of tensors; nothing in it was run")
    return content, replaced


def unwrap_state_dict(content: Mapping, *, prefer_ema: bool = True) -> StateDict:
    """The tensors in what a training script saved, under names without the script's prefixes.

    Known wrappers: a state dict under `state_dict`, `model`, `model_state`, `params`, `ema`, ... (averaged
    weights first where there are both, unless `prefer_ema` is off); names that all begin with `module.`
    (DataParallel, EMA), `_orig_mod.` (torch.compile) or `model.` (lightning, mmengine).

    Raises:
        CheckpointError: there are no tensors in `content`.
    """
    keys = (_EMA_KEYS if prefer_ema else ()) + _WEIGHT_KEYS + (() if prefer_ema else _EMA_KEYS)
    outer: list[Mapping] = []
    while not any(isinstance(value, Tensor) and value.ndim for value in content.values()):
        inner = next((content[key] for key in keys if isinstance(content.get(key), Mapping) and content[key]), None)
        if inner is None or any(inner is mapping for mapping in outer):
            raise CheckpointError(
                f"no tensors in this checkpoint; its entries are: {', '.join(map(str, content)) or 'none'}"
            )
        outer.append(content)
        content = inner
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if "steps" in state and any(name.startswith("module.") for name in state):
        del state["steps"]  # the counter of an averaged model, not a weight of it
    return _strip_prefixes(state)


def _strip_prefixes(state: StateDict) -> StateDict:
    stripped = True
    while stripped:
        stripped = False
        for prefix in _WRAPPER_PREFIXES:
            if state and all(name.startswith(prefix) for name in state):
                state = {name[len(prefix) :]: value for name, value in state.items()}
                stripped = True
    return state


def _dense_backbone_part(state: StateDict, model: nn.Module) -> tuple[StateDict, str | None]:
    """The backbone's entries of a detector's or segmenter's file, when the model is only a backbone."""
    prefix = "backbone."
    own = model.state_dict().keys()
    if not any(name.startswith(prefix) for name in state) or any(name.startswith(prefix) for name in own):
        return state, None
    part = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    return (
        part,
        f"only the backbone of the file was used, {len(state) - len(part)} other entries were left out",
    )


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Prefixes ("head.fc.", ...) of the entries that depend on the number of classes."""
    cfg = getattr(model, "pretrained_cfg", None) or {}
    names = cfg.get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def load_checkpoint(
    model: nn.Module,
    checkpoint: str | PathLike | Mapping,
    strict: bool = True,
    *,
    head: Literal["match", "fit", "keep", "file"] = "match",
    prefer_ema: bool = True,
) -> LoadReport:
    """Load weights into `model`, whatever wrapper and official layout they come in.

    Args:
        model: any model that zoo builds, or any timm model with timm's own files.
        checkpoint: a file (`.pth`, `.pt`, `.bin`, `.safetensors`, ...) or a state dict.
        strict: every entry of both sides must be used. If False, what does not fit is only reported.
        head: what to do when the file was trained for another number of classes. "match": an error;
            "fit": leave the model's classifier as it is if the file's has another size; "keep": leave it as it
            is in any case; "file": give the model a classifier of the file's size first.
        prefer_ema: take averaged weights where the file has both.

    Returns:
        What was loaded, and with `strict=False` what was not.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: unreadable file, pickled code, or entries that do not fit (all of them are listed);
            the model is unchanged then.
    """
    source = "the state dict" if isinstance(checkpoint, Mapping) else str(checkpoint)
    content = checkpoint if isinstance(checkpoint, Mapping) else read_checkpoint(checkpoint)
    conversion = translate(model, content, prefer_ema=prefer_ema)
    state = dict(conversion.state_dict)
    report = LoadReport(conversion.layout, notes=list(conversion.notes))
    replaced = getattr(content, "replaced", ())
    if replaced:
        more = f" and {len(replaced) - 3} more" if len(replaced) > 3 else ""
        report.notes.append(f"read as plain data, without their code: {', '.join(replaced[:3])}{more}")

    classifier = classifier_names(model)
    if head == "file":
        _resize_classifier(model, state, classifier, report)
    elif head == "keep" or (head == "fit" and _classifier_differs(model, state, classifier)):
        head = "keep"
        dropped = [name for name in state if classifier and name.startswith(classifier)]
        for name in dropped:
            del state[name]
        report.notes.append(f"the classifier of the file was left out ({len(dropped)} entries)")

    own = model.state_dict()
    pruned = [name for name in state if name in getattr(model, "pruned_entries", ()) and name not in own]
    if pruned:
        for name in pruned:
            del state[name]
        report.notes.append(f"{len(pruned)} entries of the file were left out: they follow the last map of the pyramid")
    counters = [
        n for n in state if n.endswith(_COUNTER) and n not in own and f"{n.removesuffix(_COUNTER)}running_mean" in own
    ]
    if counters:  # a batch norm whose statistics are frozen counts nothing
        for name in counters:
            del state[name]
        report.notes.append(f"{len(counters)} counters of the file were left out: these batch norms are frozen")
    kept = {name for name in own if head == "keep" and name.startswith(classifier)}
    report.missing = [name for name in own if name not in state and name not in kept]
    report.unexpected = [name for name in state if name not in own]
    report.mismatched = [
        (name, tuple(value.shape), tuple(own[name].shape))
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]
    fitting = {n: v for n, v in state.items() if n in own and v.shape == own[n].shape}
    report.loaded = len(fitting)
    if strict and not report.complete:
        raise CheckpointError(_explain(model, source, state, report, classifier))
    model.load_state_dict(fitting, strict=False)
    return report


def translate(model: nn.Module, content: Mapping, *, prefer_ema: bool = True) -> Conversion:
    """The weights in what a training script saved, under the names of `model`; whether they fit is not checked."""
    if _is_own_state(model, content):
        return Conversion(dict(content))
    state = unwrap_state_dict(content, prefer_ema=prefer_ema)
    state, note = _dense_backbone_part(state, model)
    converter = find_converter(model)
    conversion = converter(state, model) if converter else Conversion(state, "native")
    return conversion._replace(notes=(note, *conversion.notes)) if note else conversion


def _is_own_state(model: nn.Module, content: Mapping) -> bool:
    """Whether `content` is a state dict of this very model; another image size needs the family's translation."""
    own = model.state_dict()
    return content.keys() == own.keys() and all(getattr(content[n], "shape", None) == v.shape for n, v in own.items())


def _classifier_differs(model: nn.Module, state: StateDict, classifier: tuple[str, ...]) -> bool:
    own = model.state_dict()
    return any(
        name.startswith(classifier) and (name not in state or state[name].shape != own[name].shape)
        for name in own
        if classifier
    )


def _resize_classifier(model: nn.Module, state: StateDict, classifier: tuple[str, ...], report: LoadReport) -> None:
    if not hasattr(model, "reset_classifier"):
        raise CheckpointError(
            f"head='file' is for classifiers: build this {type(model).__name__} with the file's classes"
        )
    weights = [value for name, value in state.items() if name.startswith(classifier) and value.ndim == 2]
    if not classifier or not weights:
        raise CheckpointError("head='file' needs a classifier in the file, and it has none: use head='keep'")
    num_classes = weights[-1].shape[0]
    if num_classes != model.num_classes:
        report.notes.append(f"the model's classifier was rebuilt for {num_classes} classes")
        model.reset_classifier(num_classes)


def _explain(model: nn.Module, source: str, state: StateDict, report: LoadReport, classifier: tuple[str, ...]) -> str:
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__
    own = model.state_dict()
    shared = sum(n in own for n in state)
    if shared < 0.2 * max(1, min(len(own), len(state))):
        layout = identify_layout(state)
        what = f"it looks like a checkpoint of {layout}" if layout else "it is a checkpoint of another model"
        return (
            f"{source} does not fit {name}: {what}. The file has {len(state)} entries such as {_examples(state)}; "
            f"the model has {len(own)} such as {_examples(own)}"
        )
    only_head = (
        classifier
        and not report.missing
        and not report.unexpected
        and all(n.startswith(classifier) for n, _, _ in report.mismatched)
    )
    if only_head and not hasattr(model, "reset_classifier"):
        return (
            f"{source} was trained for another number of classes than the {model.num_classes} of this {name}: pass "
            "head='keep' to load all but the classifier, or build the model with the file's classes"
        )
    if only_head:
        there, here = report.mismatched[-1][1][0], report.mismatched[-1][2][0]
        return (
            f"{source} was trained for {there} classes and {name} has {here}: pass head='keep' to load all but the "
            f"classifier, or head='file' to give the model the file's {there} classes"
        )
    return f"{source} does not fit {name} (strict=False loads what fits):\n{report}"


def _examples(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:3]) or "none"
