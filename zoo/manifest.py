"""The list of known checkpoints (`weights/manifest.json`): what each is, how it can be had, what its paper claims.

    zoo.manifest.known_weights()                        # all of them
    zoo.manifest.find_weights("crate_alpha_base_p16")   # one, by name or by name and tag

Files are looked for in the folder `$ZOO_WEIGHTS`, else in zoo's cache folder (`~/.cache/zoo/weights`, or that of
`$XDG_CACHE_HOME`), which is also where downloads go.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from timm.models import is_model
from torch import nn

from zoo.checkpoint import StateDict, read_checkpoint, unwrap_state_dict

Access = Literal["url", "hub", "drive", "dead", "unreleased", "packaged"]
Task = Literal["classification", "detection", "segmentation", "superresolution", "backbone"]

METRICS = frozenset(
    {"top1", "real_top1", "zero_shot_top1", "box_ap", "mask_ap", "miou", "pq", "pq_things", "pq_stuff"}
    | {f"{metric}_{data}" for metric in ("psnr", "ssim") for data in ("set5", "set14", "b100", "urban100", "manga109")}
)
_COMMON = {"dataset", "split", "input_size", "mean", "std"}
_DENSE = {"short_side", "max_side", "pad_multiple", "stretch_multiple", "keep_aspect", "mode", "crop_size", "stride"}
_DENSE |= {"scales", "score_threshold", "nms_threshold", "max_detections", "object_threshold", "overlap_threshold"}
_CLASSIFICATION = {"crop_pct", "interpolation", "protocol"}
# what `evaluation` may say for each task
EVALUATION_KEYS: Mapping[str, frozenset[str]] = {
    "classification": frozenset(_COMMON | _CLASSIFICATION),
    "detection": frozenset(_COMMON | _DENSE),
    "segmentation": frozenset(_COMMON | _DENSE),
    "superresolution": frozenset({"dataset", "scale", "border", "colour", "padding", "self_ensemble"}),
    "backbone": frozenset(_COMMON | _CLASSIFICATION | _DENSE),
}
_UPSCALER = re.compile(r"craft_x[234]")


@dataclass(frozen=True)
class Weights:
    """One released (or promised) checkpoint of a paper.

    Attributes:
        model: a registered name; for detectors and segmenters the name that the door takes ("mask_rcnn", "pem"); for
            super-resolution "craft_x2", "craft_x3" or "craft_x4". `spartan_small` alone is neither: its size stands in
            the file only.
        tag: timm's tag of the weights; with the model's name it is unique.
        task: what the claim is measured on. "backbone": the file, or the part of it that zoo's model takes, only
            extracts features; the claim is then of the paper's whole model.
        access: how the file can be had. "url": directly; "hub": from huggingface; "drive": by hand, through a browser
            (Google Drive, Baidu, a page of links); "dead": the link is gone; "unreleased": never released;
            "packaged": inside zoo.
        file: its released name.
        url, hub_id: where it is; for "drive" the link or the page that has it.
        size, sha256: of the file, where they are known.
        license: SPDX identifier in lower case, where the authors state one.
        source: repository or page of the authors.
        options: arguments of `timm.create_model` or of the door besides the name.
        evaluation: what the claim was measured with: `dataset`, `split` and, for classification, `input_size`,
            `crop_pct`, `interpolation` (`mean` and `std` where they are not ImageNet's); for dense tasks `short_side`,
            `max_side`, `pad_multiple` and thresholds; for super-resolution `scale`, `border`, `colour`, `padding`.
        claimed: metric -> value that the authors state (`METRICS`; percentages, decibels, SSIM of 0..1).
        measured: metric -> value that zoo measured with these weights; empty until then.
        note: what else one should know.

    Raises:
        ValueError: the fields contradict each other; the sentence names the entry and the field.
    """

    model: str
    tag: str
    task: Task
    access: Access
    file: str | None = None
    url: str | None = None
    hub_id: str | None = None
    size: int | None = None
    sha256: str | None = None
    license: str | None = None
    source: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    claimed: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    note: str | None = None

    def __post_init__(self):
        for name in ("model", "tag"):
            value = getattr(self, name)
            if not isinstance(value, str) or not re.fullmatch(r"\w[\w-]*", value):
                raise ValueError(f"manifest: {name}={value!r}, expected letters, digits, - and _")
        for name, allowed in (("task", get_args(Task)), ("access", get_args(Access))):
            if getattr(self, name) not in allowed:
                raise self._wrong(name, f"expected one of {', '.join(allowed)}")
        for name in ("file", "url", "hub_id", "license", "source", "note"):
            if not isinstance(getattr(self, name), str | None):
                raise self._wrong(name, "expected text or nothing")
        needs = {"url": ("url", "file"), "hub": ("hub_id", "file"), "drive": ("url",), "packaged": ("file",)}
        for name in needs.get(self.access, ()):
            if not getattr(self, name):
                raise self._wrong(name, f"access {self.access!r} needs it")
        if self.url is not None and not self.url.startswith("https://"):
            raise self._wrong("url", "expected an address that begins with https://")
        if self.size is not None and (type(self.size) is not int or self.size <= 0):
            raise self._wrong("size", "expected a number of bytes")
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", str(self.sha256)):
            raise self._wrong("sha256", "expected 64 lower-case hexadecimal digits")
        for name in ("claimed", "measured"):
            wrong = [k for k, v in getattr(self, name).items() if k not in METRICS or type(v) not in (int, float)]
            if wrong:
                raise self._wrong(name, f"{wrong[0]!r} is no metric with a number")
        wrong = sorted(set(self.evaluation) - EVALUATION_KEYS[self.task])
        if wrong:
            raise self._wrong("evaluation", f"{wrong[0]!r} says nothing about {self.task}")

    def _wrong(self, name: str, expected: str) -> ValueError:
        return ValueError(f"manifest entry {self.name}: {name}={getattr(self, name)!r}, {expected}")

    @property
    def name(self) -> str:
        """`model.tag`."""
        return f"{self.model}.{self.tag}"

    @property
    def door(self) -> str | None:
        """The function of `zoo` that builds the model; None where `timm.create_model` does."""
        if _UPSCALER.fullmatch(self.model):
            return "create_upscaler"
        doors = {"detection": "create_detector", "segmentation": "create_segmenter"}
        return None if is_model(self.model) else doors.get(self.task)

    def build(self, **overrides: Any) -> nn.Module:
        """The model that these weights belong to, without them.

        Args:
            overrides: arguments that replace `options`.

        Raises:
            ValueError: the size of the model stands in the file only.
        """
        import timm

        import zoo

        arguments = {**self.options, **overrides}
        if self.door is None and not is_model(self.model):
            raise ValueError(f"{self.name} can be built from its file only: {self.note}")
        if self.door is None:
            return timm.create_model(self.model, **arguments)
        return getattr(zoo, self.door)("craft" if self.door == "create_upscaler" else self.model, **arguments)


@functools.cache
def known_weights() -> tuple[Weights, ...]:
    """Every entry of the manifest."""
    return read_manifest(files("zoo.weights").joinpath("manifest.json").read_text())


def read_manifest(text: str) -> tuple[Weights, ...]:
    """The entries of a manifest's text.

    Raises:
        ValueError: an entry that is not what `Weights` describes, or listed twice.
    """
    known = {f.name for f in fields(Weights)}
    entries, seen = [], set()
    for number, entry in enumerate(json.loads(text)["weights"]):
        name = f"{entry.get('model')}.{entry.get('tag')}"
        unknown, missing = sorted(set(entry) - known), sorted({"model", "tag", "task", "access"} - set(entry))
        if unknown or missing:
            problem = f"unknown field {unknown[0]!r}" if unknown else f"no {missing[0]!r}"
            raise ValueError(f"manifest entry {number} ({name}): {problem}")
        if name in seen:
            raise ValueError(f"manifest entry {number}: {name} is listed twice")
        seen.add(name)
        entries.append(Weights(**entry))
    return tuple(entries)


def find_weights(model: str, tag: str | None = None) -> Weights | None:
    """The manifest's entry for a name and tag (or `model` as "name.tag"); the first one of the name without a tag."""
    if not tag:
        model, _, tag = model.partition(".")
    return next((w for w in known_weights() if w.model == model and tag in (None, "", w.tag)), None)


def local_weights_folder() -> Path | None:
    """The user's folder of checkpoints, `$ZOO_WEIGHTS`, if it is set."""
    value = os.environ.get("ZOO_WEIGHTS")
    return Path(value).expanduser() if value else None


def weights_folder() -> Path:
    """Where weights are looked for and downloaded to: `$ZOO_WEIGHTS`, else zoo's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return local_weights_folder() or cache / "zoo" / "weights"


def local_file_names(model: str, weights: Weights | None) -> list[str]:
    """Names under which a file in the folder of weights is found, in this order."""
    stem = f"{model}.{weights.tag}" if weights else model
    released = []
    if weights and weights.file:
        released = [weights.file, *([Path(weights.file).name] if "/" in weights.file else [])]
    return [f"{stem}.safetensors", *released, f"{stem}.pth"]


def local_file(model: str, weights: Weights | None) -> Path | None:
    """The file on this machine: in the folder of weights, inside zoo, or in the hub's cache; None if there is none."""
    for name in local_file_names(model, weights):
        if (weights_folder() / name).is_file():
            return weights_folder() / name
    if weights is not None and weights.access == "packaged":
        return Path(str(files("zoo.weights").joinpath(weights.file)))
    if weights is not None and weights.access == "hub":
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(weights.hub_id, weights.file)
        return Path(path) if isinstance(path, str) else None
    return None


def obtain(model: str, weights: Weights | None, *, progress: bool = True) -> Path:
    """The file of an entry, downloaded if it is not on this machine.

    Raises:
        RuntimeError: it cannot be had, or its download failed; the sentence says what to do.
    """
    from zoo import downloads

    found = local_file(model, weights)
    if found is not None:
        return found
    if weights is not None and weights.access == "hub":
        return downloads.from_hub(weights.hub_id, weights.file, size=weights.size, sha256=weights.sha256)
    if weights is not None and weights.access == "url":
        target = weights_folder() / weights.file
        return downloads.download(
            weights.url, target, size=weights.size, sha256=weights.sha256, progress=progress, name=weights.name
        )
    raise RuntimeError(explain_unavailable(model, weights))


def pretrained_state_dict(variant: str, cfg: Mapping[str, Any]) -> StateDict:
    """The official weights behind `pretrained=True`, unwrapped, still under their official names.

    A file of the manifest's name, or `<model>.<tag>.safetensors` or `.pth`, in the folder of weights is used before
    any download.

    Raises:
        RuntimeError: there is no such file and none that can be downloaded; says where the weights are.
        CheckpointError: the file cannot be used.
    """
    model, _, tag = variant.partition(".")
    weights = find_weights(model, tag or cfg.get("tag"))
    return unwrap_state_dict(read_checkpoint(obtain(model, weights)))


_REASONS = {
    "drive": "can be had through a browser only ({where})",
    "dead": "are gone: the authors' link is dead ({where})",
    "unreleased": "were never released by the authors",
}


def explain_unavailable(model: str, weights: Weights | None) -> str:
    """One sentence: why the weights of an entry cannot be downloaded, and what to do about it."""
    reason = "are not known" if weights is None else _REASONS[weights.access].format(where=weights.url or "no address")
    door = weights.door if weights else ("create_upscaler" if _UPSCALER.fullmatch(model) else None)
    if door == "create_upscaler":
        call = f"zoo.create_upscaler('craft', scale={model[-1]}, checkpoint=path)"
    elif door is not None:
        call = f"zoo.load_checkpoint(model, path) after zoo.{door}({model!r}, ...)"
    else:
        call = f"zoo.load_checkpoint(model, path) after create_model({model!r})"
    name = weights.name if weights else model
    return (
        f"pretrained weights of {model} {reason}: pass a file of your own with {call}, or add it with "
        f"`zoo weights add FILE --model {name}`, which puts it as {local_file_names(model, weights)[0]} into the "
        f"folder of weights (ZOO_WEIGHTS, else {weights_folder()})"
    )
