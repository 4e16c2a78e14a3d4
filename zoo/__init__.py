"""zoo: efficient vision backbones behind timm's front door, with heads, kernels and recipes.

    import timm, zoo
    model = timm.create_model("crate_tiny", num_classes=10)

Importing zoo registers every model with timm and needs torch, torchvision and timm only. Everything else
(heads, training, tools) is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from zoo import (  # importing a family registers its models
    activator,
    ascan,
    crate,
    crate_mae,
    fcaformer,
    metaformer,
    ninformer,
    slab,
    spartan,
    stdc,
    vim2,
)
from zoo.checkpoint import CheckpointError, LoadReport, load_checkpoint
from zoo.folding import fold
from zoo.registry import list_models

__version__ = "0.1.0"

# name -> module that defines it; resolved on first access, so that `import zoo` stays as light as timm
_LAZY = {
    "create_detector": "zoo.heads.detection",
    "export_onnx": "zoo.exporting",
    "export_program": "zoo.exporting",
    "create_upscaler": "zoo.heads.craft",
    "list_heads": "zoo.heads",
    "predict": "zoo.prediction",
    "Prediction": "zoo.prediction",
    "read_image": "zoo.images",
    "ImageError": "zoo.images",
    "create_segmenter": "zoo.heads.segmentation",
    "load_model": "zoo.saving",
    "save_model": "zoo.saving",
}
_SUBPACKAGES = ("heads", "kernels", "tools", "train")

__all__ = [
    "CheckpointError",
    "ImageError",
    "LoadReport",
    "Prediction",
    "activator",
    "ascan",
    "crate",
    "crate_mae",
    "create_detector",
    "create_segmenter",
    "create_upscaler",
    "export_onnx",
    "export_program",
    "fcaformer",
    "fold",
    "list_heads",
    "list_models",
    "load_checkpoint",
    "load_model",
    "metaformer",
    "ninformer",
    "predict",
    "read_image",
    "save_model",
    "slab",
    "spartan",
    "stdc",
    "vim2",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"zoo.{name}")
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_SUBPACKAGES})
