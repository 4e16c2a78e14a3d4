"""zoo's own weight files: safetensors with everything that is needed to rebuild the model beside the tensors."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from zoo.checkpoint import CheckpointError, load_checkpoint

_METADATA_KEY = "zoo"


def save_model(
    model: nn.Module,
    path: str | PathLike,
    *,
    model_args: Mapping[str, Any] | None = None,
    class_names: list[str] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    input_config: Mapping[str, Any] | None = None,
    **metadata: Any,
) -> Path:
    """Write the weights of a model to a safetensors file that `load_model` can rebuild it from.

    Classifiers are rebuilt by `timm.create_model`. What one of zoo's doors built (`create_detector`, ...) carries
    `model.zoo_door`, the door's name and the arguments of plain types that it was called with.

    The file appears under its name only when it is complete: it is written beside it, synced and renamed.

    Args:
        model: a model that `timm.create_model` or one of zoo's doors built.
        path: file to write.
        model_args: keyword arguments that the model was created with, besides `num_classes` and `in_chans`.
        class_names: what the outputs stand for, in order.
        state_dict: other weights for the same model (averaged ones, say); the model's own by default.
        input_config: how images were prepared, where that differs from the model's pretrained cfg
            (`input_size`, `crop_pct`, `interpolation`, ...).
        metadata: anything else of JSON type, such as the task or the metrics.
    """
    path = Path(path)
    cfg = dict(getattr(model, "pretrained_cfg", None) or {})
    described = {
        "model": cfg.get("architecture"),
        "num_classes": getattr(model, "num_classes", None),
        "in_chans": getattr(model, "in_chans", 3),
        "model_args": dict(model_args or {}),
        "class_names": class_names,
        "input": {k: cfg[k] for k in ("input_size", "mean", "std", "interpolation", "crop_pct") if k in cfg}
        | dict(input_config or {}),
        **metadata,
    }
    door = getattr(model, "zoo_door", None)
    if door is not None:
        described["door"], described["door_args"] = door
    tensors = {
        name: value.detach().to("cpu", copy=True).contiguous()
        for name, value in (state_dict or model.state_dict()).items()
    }
    temporary = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, temporary, metadata={_METADATA_KEY: json.dumps(described)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_metadata(path: str | PathLike) -> dict[str, Any]:
    """What `save_model` wrote beside the weights; an empty dict for other safetensors files.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a readable safetensors file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    return json.loads(text) if text else {}


def load_model(path: str | PathLike, **overrides: Any) -> nn.Module:
    """Rebuild a model from a file that zoo wrote, in eval mode, with its class names as `model.class_names`.

    Args:
        path: a `.safetensors` file written by `zoo train` or `save_model`.
        overrides: arguments for `timm.create_model` or the door that replace the recorded ones.

    Raises:
        CheckpointError: the file does not say which model it belongs to.
    """
    if Path(path).suffix != ".safetensors" and Path(path).is_file():
        raise CheckpointError(
            f"{path} does not say which model it belongs to: create the model and call zoo.load_checkpoint(model, path)"
        )
    described = read_metadata(path)
    if described.get("door"):
        return _through_door(path, described, overrides)
    if not described.get("model"):
        raise CheckpointError(
            f"{path} was not written by zoo and does not say which model it belongs to: "
            "create the model and call zoo.load_checkpoint(model, path)"
        )
    arguments = {
        "num_classes": described["num_classes"],
        "in_chans": described["in_chans"],
        **described["model_args"],
        **overrides,
    }
    model = timm.create_model(described["model"], **arguments)
    recorded = described.get("input") or {}
    model.pretrained_cfg = {**model.pretrained_cfg, **{k: v for k, v in recorded.items() if v is not None}}
    model.default_cfg = model.pretrained_cfg
    with torch.no_grad():
        load_checkpoint(model, path)
    restore_official_numerics(model, described)
    model.class_names = described.get("class_names")
    model.zoo_metadata = described
    return model.eval()


def restore_official_numerics(model: nn.Module, described: Mapping[str, Any]) -> None:
    """What loading the official file changes in a model of timm's own class, for a file converted from it."""
    layout = (described.get("official") or {}).get("layout")
    if layout is not None and isinstance(model, timm.models.metaformer.MetaFormer):
        from zoo.metaformer import become_official

        become_official(model, layout)


# doors that a file may name, and where they are: nothing else is called on a file's word
DOORS = {
    "create_detector": "zoo",
    "create_segmenter": "zoo",
    "create_upscaler": "zoo",
    "fcaformer_dense": "zoo.fcaformer",
    "slab_swin_dense": "zoo.slab",
}


def _through_door(path: str | PathLike, described: Mapping[str, Any], overrides: Mapping[str, Any]) -> nn.Module:
    if described["door"] not in DOORS:
        raise CheckpointError(f"{path} wants to be built by {described['door']!r}, which zoo does not have")
    module = DOORS[described["door"]]
    # weights come from the file: none are downloaded for the backbone
    arguments = {**described["door_args"], **({"pretrained_backbone": False} if module == "zoo" else {}), **overrides}
    model = getattr(importlib.import_module(module), described["door"])(**arguments)
    with torch.no_grad():
        load_checkpoint(model, path)
    model.class_names = described.get("class_names")
    model.zoo_metadata = dict(described)
    return model.eval()
