"""What is evaluated: a weight file (the authors' or zoo's) or released weights, as a built model with its place in the
manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, is_model
from torch import nn

import zoo
from zoo.manifest import Weights, find_weights, known_weights, obtain
from zoo.saving import load_model, read_metadata, restore_official_numerics

_DOOR_TASKS = {
    "create_detector": "detection",
    "create_segmenter": "segmentation",
    "create_upscaler": "superresolution",
    "fcaformer_dense": "backbone",
    "slab_swin_dense": "backbone",
}


@dataclass
class Subject:
    """A model with its weights.

    Attributes:
        model: in eval mode.
        name: registered name, or the name that the door takes; "craft_x2" for upscalers.
        task: classification, detection, segmentation, superresolution or backbone.
        title: how it was named on the command line.
        weights: the manifest's entry.
        file, sha256: the weight file; None where timm fetched the weights.
        notes: what loading remarked.
    """

    model: nn.Module
    name: str
    task: str
    title: str
    weights: Weights | None = None
    file: Path | None = None
    sha256: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def is_onnx(self) -> bool:
        """ONNX Runtime runs it, on the CPU."""
        return self.file is not None and self.file.suffix == ".onnx"


def task_of(weights: str | None) -> str:
    """What a weight file of zoo does; "classification" for others."""
    if not weights or not str(weights).endswith(".safetensors") or not Path(weights).is_file():
        return "classification"
    described = read_metadata(weights)
    return _DOOR_TASKS.get(described.get("door")) or described.get("task") or "classification"


def load_subject(
    weights: str | None = None,
    *,
    model: str | None = None,
    checkpoint: str | None = None,
    pretrained: bool = False,
    arguments: Mapping[str, Any] | None = None,
    img_size: int | None = None,
) -> Subject:
    """The model that the arguments describe, with its weights.

    Args:
        weights: a weight file, official or zoo's, a classifier that zoo export wrote as ONNX, or a name, which then is
            `model`.
        model: NAME or NAME.TAG: what the file is, or whose weights are wanted.
        checkpoint: weights for `model`, in any layout.
        pretrained: released weights for `model`.
        arguments: of the model, where the file does not tell them.
        img_size: for classifiers that are built for one size.

    Raises:
        ValueError: neither weights nor a model, or no such model.
        FileNotFoundError: no such file.
        CheckpointError: the file cannot be used.
        ImportError: an ONNX file without the packages of the extra `export`.
    """
    if weights and not Path(weights).exists() and _is_name(weights):
        if model:
            raise ValueError(f"{weights} and --model {model} are two models: give one")
        weights, model = None, weights
    if weights and not Path(weights).exists():
        raise FileNotFoundError(f"no checkpoint at {weights}, and no model is called so: `zoo list` names them")
    if weights:
        if checkpoint or pretrained:
            raise ValueError(f"{weights} has its weights: leave --checkpoint and --pretrained out")
        if Path(weights).suffix == ".onnx":
            return _from_onnx(Path(weights), model, arguments)
        return _from_file(Path(weights), model, arguments, img_size)
    if not model:
        raise ValueError("give a weight file of zoo, or --model with --checkpoint or --pretrained")
    if not _is_name(model):
        raise ValueError(f"no model is called {model!r}: `zoo list` names them")
    if checkpoint:
        subject = _from_file(Path(checkpoint), model, arguments, img_size)
        subject.title = f"{model} ({checkpoint})"
        return subject
    if not pretrained:
        raise ValueError(f"--model {model} has random weights: give --checkpoint or --pretrained")
    return _released(model, arguments, img_size)


def _is_name(text: str) -> bool:
    base = text.partition(".")[0]
    return "/" not in text and (is_model(base) or base == "craft" or base in {w.model for w in known_weights()})


def _released(model: str, arguments: Mapping[str, Any] | None, img_size: int | None) -> Subject:
    if model == "craft":
        model = f"craft_x{(arguments or {}).get('scale', 2)}"
    from zoo.tools.recognition import has_tag

    base, _, tag = model.partition(".")
    if not tag and is_model(base):  # timm's choice of weights is its default
        tag = (get_pretrained_cfg(base).tag if get_pretrained_cfg(base) else "") or ""
    entry = find_weights(base, tag or None)
    if entry is None and zoo.registry.is_zoo_model(base):
        entry = find_weights(base) if "." not in model else None
    if entry is not None:
        subject = _from_file(obtain(entry.model, entry), entry.name, arguments, img_size)
        subject.weights = entry
    else:
        if not is_model(base) or ("." in model and not has_tag(base, tag)):
            raise ValueError(f"no released weights are called {model}: `zoo weights list` names those of zoo's models")
        network = _sized(
            lambda **size: timm.create_model(model, pretrained=True, **(arguments or {}), **size), img_size
        )
        subject = Subject(network.eval(), base, "classification", model)
    subject.title = f"{model} (released weights)"
    return subject


def _from_file(path: Path, model: str | None, arguments: Mapping[str, Any] | None, img_size: int | None) -> Subject:
    from zoo.checkpoint import load_checkpoint, read_checkpoint
    from zoo.downloads import file_sha256
    from zoo.tools.recognition import recognise

    model = None if model == "craft" else model  # of any scale: the file tells
    described = read_metadata(path) if path.suffix == ".safetensors" else {}
    own = bool(described.get("model") or described.get("door"))
    if own:
        content, sha256 = {}, file_sha256(path)
        found = recognise(path, content, sha256=sha256)
        task = task_of(str(path))
        overrides = dict(arguments or {})
        network = (
            _sized(lambda **size: load_model(path, **overrides, **size), img_size)
            if task == "classification"
            else load_model(path, **overrides)
        )
        notes = []
    else:
        content = read_checkpoint(path)
        sha256 = file_sha256(path)
        found = recognise(path, content, model=model, arguments=arguments, sha256=sha256)
        task = _DOOR_TASKS.get(found.door or "", "classification")
        network = _sized(lambda **size: found.replace(**size).build(), img_size if found.door is None else None)
        with torch.no_grad():
            report = load_checkpoint(network, content)
        restore_official_numerics(network, described)
        notes = [f"{path}: {found.name}, known by {found.how}", *str(report).splitlines()]
    if found.door is None and (not own or described.get("official")):
        _remember_size(network, found.arguments.get("img_size"))
    name = f"craft_x{network.scale}" if task == "superresolution" else found.model
    entry = found.weights or find_weights(described.get("weights") or "") or _entry_of_hash(sha256)
    if own and model:
        entry = _named_entry(path, name, model)
    if entry is not None and entry.model != name:
        entry = None  # a file of another model by the same name
    if entry is not None and not own and entry.sha256 not in (None, sha256):
        notes.append(f"{path} has another SHA-256 than {entry.name} of the manifest: it is not the authors' file")
    return Subject(network.eval(), name, task, str(path), entry, path, sha256, notes)


def _from_onnx(path: Path, model: str | None, arguments: Mapping[str, Any] | None) -> Subject:
    """A classifier that zoo export wrote; the file it came from tells its place in the manifest."""
    from zoo.downloads import file_sha256
    from zoo.onnx_model import OnnxClassifier, OnnxModel

    if model or arguments:
        raise ValueError(f"{path} holds its model whole: leave --model, --model-args and --num-classes out")
    file = OnnxModel(path)
    network, described = OnnxClassifier(file).eval(), file.metadata
    entry = _entry_of_hash(described["source_sha256"]) if described.get("source_sha256") else None
    note = f"{path}: {described['model']}, {described['precision']}, {described['size_rule']['text']}, by ONNX Runtime"
    return Subject(network, described["model"], "classification", str(path), entry, path, file_sha256(path), [note])


def _remember_size(network: nn.Module, size: int | Sequence[int] | None) -> None:
    """An official file of another image size than the registered one: pictures are prepared for the file's."""
    cfg = getattr(network, "pretrained_cfg", None)
    if size is None or cfg is None:
        return
    height, width = (size, size) if isinstance(size, int) else size
    cfg = dict(cfg)
    network.pretrained_cfg = network.default_cfg = {**cfg, "input_size": (cfg["input_size"][0], height, width)}


def _sized(build, img_size: int | None) -> nn.Module:
    """`build(img_size=...)`, or without it where the model takes any size."""
    if img_size is None:
        return build()
    try:
        return build(img_size=img_size)
    except (TypeError, ValueError) as error:
        if "img_size" not in str(error):
            raise
        return build()


def _entry_of_hash(sha256: str) -> Weights | None:
    return next((w for w in known_weights() if w.sha256 == sha256), None)


def _named_entry(path: Path, name: str, model: str) -> Weights | None:
    """The entry that a user names for a file which says itself which model it is."""
    if model.partition(".")[0] != name:
        raise ValueError(f"{path} is a model of {name}, and --model is {model}: leave --model out")
    entry = find_weights(model) if "." in model else None
    if "." in model and entry is None:
        raise ValueError(f"--model {model}: the manifest has no such name and tag; `zoo weights list` names them")
    return entry
