"""Task heads over the backbones: detection, segmentation, super-resolution."""

from __future__ import annotations

# task -> names for the door of that task
_HEADS = {
    "detection": ("faster_rcnn", "fcos", "mask_rcnn", "retinanet", "rt_detr"),
    "segmentation": ("pem",),
    "super-resolution": ("craft",),
}


def list_heads(task: str | None = None) -> list[str]:
    """Names that `create_detector`, `create_segmenter` and `create_upscaler` take, sorted; of one task, or of all.

    Raises:
        ValueError: no such task.
    """
    if task is not None and task not in _HEADS:
        raise ValueError(f"task={task!r}, expected one of {', '.join(_HEADS)}")
    return sorted(name for key, names in _HEADS.items() for name in names if task in (None, key))
