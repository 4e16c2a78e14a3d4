"""`zoo.create_segmenter`: a segmentation head on any backbone.

model = zoo.create_segmenter("pem", backbone="caformer_s18", num_classes=150, task="panoptic")
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from zoo.heads.pem.model import Pem, PemHead, Task
from zoo.heads.pyramid import Pyramid

SEGMENTERS = ("pem",)


def create_segmenter(
    name: str = "pem",
    backbone: str | nn.Module = "resnet50",
    num_classes: int = 150,
    task: Task = "semantic",
    *,
    pretrained_backbone: bool = False,
    backbone_args: dict[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    **kwargs: Any,
) -> Pem:
    """Build a segmenter.

    Args:
        name: "pem".
        backbone: name of any zoo or timm model, or a built one.
        num_classes: classes without "no object" and without an ignored one.
        task: "semantic", "instance" or "panoptic"; one network serves all three.
        pretrained_backbone: load the backbone's released weights.
        backbone_args: arguments of the backbone's constructor.
        class_names: what the classes stand for, in order.
        kwargs: arguments of `Pem` and `PemHead` (`thing_classes`, `num_queries`, `freeze_norm`, ...).

    Raises:
        ValueError: an unknown name, task or backbone, an argument that the head does not have, or numbers that do
            not fit each other.
    """
    if name not in SEGMENTERS:
        raise ValueError(f"no segmenter is called {name!r}: choose one of {', '.join(SEGMENTERS)}")
    known = {p for cls in (Pem, PemHead) for p in inspect.signature(cls).parameters} - {"kwargs", "in_channels"}
    unknown = [key for key in kwargs if key not in known]
    if unknown:
        raise ValueError(f"{name} has no argument {unknown[0]!r}: it has {', '.join(sorted(known))}")
    arguments = dict(name=name, backbone=backbone, num_classes=num_classes, task=task, backbone_args=backbone_args)
    pyramid = Pyramid(backbone, pretrained=pretrained_backbone, **(backbone_args or {}))
    model = Pem(pyramid, num_classes, task, **kwargs)
    if class_names is not None and len(class_names) != num_classes:
        raise ValueError(f"{len(class_names)} class names for {num_classes} classes: pass one for each class")
    model.class_names = None if class_names is None else list(class_names)
    if isinstance(backbone, str):  # a built one cannot be described in a file
        model.zoo_door = ("create_segmenter", arguments | kwargs)
    return model
