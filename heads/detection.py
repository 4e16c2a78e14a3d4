"""Detectors over any timm or zoo backbone: the door, and what all heads share.

    model = zoo.create_detector("mask_rcnn", backbone="poolformerv1_s12", num_classes=80)
    losses = model.train()(images, targets)      # a dict of scalars
    found = model.eval()(images)                 # for each image a dict of boxes, labels, scores (and masks)

Images are a list of (3, H, W), uint8 or float in 0..1, each of its own size; boxes are (N, 4) in pixels as
x0, y0, x1, y1; labels are 0..num_classes - 1 everywhere outside the heads, whatever a head does with the background.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.heads.pyramid import Pyramid

Target = dict[str, Tensor]


class Detector(nn.Module):
    """What every detector does around its head: checks, labels, frozen statistics, prediction.

    Attributes:
        head_name: the name that `create_detector` knows it under.
        num_classes: classes besides the background.
        class_names: their names, or None.
        category_ids: what the training data call them, for results in COCO's format; or None.
        has_masks: whether it finds masks beside boxes.
        pyramid: its backbone's maps; `pyramid.backbone` is the timm model.
    """

    head_name: str
    has_masks = False
    class_entries: tuple[str, ...]  # modules whose shape depends on the number of classes
    _first_label = 0  # the head's own number of class 0: 1 where 0 is the background

    def _describe(self, num_classes: int, class_names: Sequence[str] | None, freeze_norm: bool) -> None:
        """To be called at the end of a constructor, when the parts exist."""
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}, expected at least 1: the background is not counted")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"{len(class_names)} class names for {num_classes} classes: pass one for each")
        self.num_classes = num_classes
        self.class_names = list(class_names) if class_names is not None else None
        self.category_ids: list[int] | None = None
        # as timm's models say it: `zoo.load_checkpoint(model, path, head="fit")` leaves these out for other classes
        self.pretrained_cfg = {"classifier": self.class_entries}
        self._freezes = freeze_norm
        if freeze_norm:
            for module in self._batch_norms():
                module.requires_grad_(False)
            self.train(self.training)

    @property
    def pyramid(self) -> Pyramid:
        """The backbone's maps."""
        return self.backbone.body

    def _batch_norms(self) -> list[nn.Module]:
        return [m for m in self.pyramid.modules() if isinstance(m, _BatchNorm)]

    def train(self, mode: bool = True) -> Detector:
        """As nn.Module's, except that frozen statistics stay frozen."""
        super().train(mode)
        if getattr(self, "_freezes", False):
            for module in self._batch_norms():
                module.eval()
        return self

    def forward(self, images: Sequence[Tensor] | Tensor, targets: Sequence[Target] | None = None) -> Any:
        """Losses in training mode, detections in evaluation mode.

        Args:
            images: (3, H, W) each, of any sizes; uint8, or float in 0..1.
            targets: for each image `boxes` (N, 4), `labels` (N,), and `masks` (N, H, W) for a head with masks;
                N may be 0. In training only.

        Returns:
            In training a dict of scalar losses, to be summed. In evaluation for each image a dict of `boxes` (N, 4) in
            its pixels, `labels` (N,), `scores` (N,) descending, and bool `masks` (N, H, W).

        Raises:
            ValueError: targets that cannot be trained on; the message says which.
        """
        images = [_as_float(image, index) for index, image in enumerate(images)]
        if self.training:
            if targets is None:
                raise ValueError("targets are needed in training mode: pass them, or call model.eval() to detect")
            check_targets(targets, images, self.num_classes, masks=self.has_masks)
            shifted = [{**t, "labels": t["labels"] + self._first_label} for t in targets]
            return self._run(images, shifted)
        found = self._run(images, None)
        for detections in found:
            detections["labels"] = detections["labels"] - self._first_label
        return found

    def _run(self, images: list[Tensor], targets: list[Target] | None) -> Any:
        """Losses by name with targets, detections of each image without; labels count from `_first_label`."""
        raise NotImplementedError(f"{type(self).__name__} is a detector without a `_run`: a subclass says how it runs")

    def predict(self, image: Any, **options: Any) -> Any:
        """Objects in a picture, or in each of several; see `zoo.heads.detection_prediction.predict` for the options.

        Returns:
            A `DetectionPrediction`, or a list of them.
        """
        from zoo.heads.detection_prediction import predict

        return predict(self, image, **options)

    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's grouping of parameters by depth: the backbone's, then everything else as its last group."""
        prefix = next(name for name, module in self.named_modules() if module is self.pyramid)
        matcher = self.pyramid.group_matcher(coarse=coarse)
        return {k: _prefixed(v, prefix) for k, v in matcher.items()}

    def no_weight_decay(self) -> set[str]:
        """The backbone's parameters that weight decay leaves alone."""
        prefix = next(name for name, module in self.named_modules() if module is self.pyramid)
        return {f"{prefix}.{name}" for name in self.pyramid.no_weight_decay()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's activations in the backward pass."""
        self.pyramid.set_grad_checkpointing(enable)


def _prefixed(pattern: Any, prefix: str) -> Any:
    if isinstance(pattern, str):
        return pattern.replace("^", "^" + prefix.replace(".", r"\.") + r"\.", 1)
    return [(_prefixed(p, prefix), *rest) for p, *rest in pattern] if isinstance(pattern, list | tuple) else pattern


def _as_float(image: Tensor, index: int) -> Tensor:
    if not isinstance(image, Tensor) or image.ndim != 3:
        shape = tuple(image.shape) if hasattr(image, "shape") else type(image).__name__
        raise ValueError(f"image {index} is {shape}, expected a tensor (channels, H, W): model.predict takes pictures")
    return image.float().div_(255) if image.dtype == torch.uint8 else image


def check_targets(targets: Sequence[Target], images: Sequence[Tensor], num_classes: int, *, masks: bool) -> None:
    """Say in one sentence what is wrong with the first target that cannot be trained on.

    Raises:
        ValueError: count, shapes, labels out of range, boxes without area or not finite, missing masks.
    """
    if len(targets) != len(images):
        raise ValueError(f"{len(targets)} targets for {len(images)} images: pass one for each image")
    needed = ("boxes", "labels", "masks") if masks else ("boxes", "labels")
    for i, (target, image) in enumerate(zip(targets, images)):
        missing = [key for key in needed if key not in target]
        if missing:
            raise ValueError(f"target {i} has no {', '.join(missing)}: it has {', '.join(target) or 'nothing'}")
        boxes, labels = target["boxes"], target["labels"]
        if boxes.ndim != 2 or boxes.shape[-1] != 4 or not boxes.is_floating_point():
            raise ValueError(f"boxes of target {i} are {boxes.dtype} {tuple(boxes.shape)}, expected float (N, 4)")
        if labels.dtype != torch.int64 or labels.shape != boxes.shape[:1]:
            raise ValueError(
                f"labels of target {i} are {labels.dtype} {tuple(labels.shape)}, expected int64 ({len(boxes)},)"
            )
        if masks and tuple(target["masks"].shape) != (len(boxes), *image.shape[-2:]):
            raise ValueError(
                f"masks of target {i} are {tuple(target['masks'].shape)}, expected one of the image's size for each "
                f"box: {(len(boxes), *image.shape[-2:])}"
            )
    # everything that must be looked at travels to the CPU at once
    boxes = torch.cat([t["boxes"].detach() for t in targets]).cpu()
    labels = torch.cat([t["labels"] for t in targets]).cpu()
    owners = torch.repeat_interleave(torch.arange(len(targets)), torch.tensor([len(t["labels"]) for t in targets]))
    for wrong, what in (
        (
            ~(torch.isfinite(boxes).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)),
            "without area: drop such boxes, as COCO's tools do",
        ),
        ((labels < 0) | (labels >= num_classes), f"of a class outside 0..{num_classes - 1}: check num_classes"),
    ):
        if wrong.any():
            k = int(wrong.nonzero()[0])
            i = int(owners[k])
            number = k - int((owners < i).sum())
            box = [round(v, 2) for v in boxes[k].tolist()]
            raise ValueError(f"target {i} has box {number} {box} with label {int(labels[k])} {what}")


def at_least_float32(x: Tensor) -> Tensor:
    """`x`, in float32 where autocast made it a half: coordinates in half precision are several pixels off."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def batch_mean_count(count: Tensor) -> Tensor:
    """`count` of the whole batch over all processes, at least 1, as each process's share of it.

    Losses that are divided by it average over processes to what one process with the whole batch computes.
    """
    count = count.detach().float()
    world = 1
    if dist.is_available() and dist.is_initialized():
        world = dist.get_world_size()
        count = count.clone()
        dist.all_reduce(count)
    return count.clamp(min=1) / world


def detector_classes() -> dict[str, type[Detector]]:
    """Name -> class of every detector."""
    import zoo.heads.detection_checkpoint  # noqa: F401 - registers the layouts
    from zoo.heads.anchor_detectors import Fcos, RetinaNet
    from zoo.heads.rcnn import FasterRcnn, MaskRcnn
    from zoo.heads.rt_detr import RtDetr

    return {cls.head_name: cls for cls in (RetinaNet, Fcos, FasterRcnn, MaskRcnn, RtDetr)}


def create_detector(
    head: str,
    backbone: str | nn.Module,
    num_classes: int = 80,
    *,
    pretrained_backbone: bool = False,
    norm: str | None = None,
    backbone_args: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Detector:
    """A detector with any timm or zoo backbone.

    Args:
        head: "retinanet", "fcos", "faster_rcnn", "mask_rcnn" or "rt_detr".
        backbone: name of a model, or a built one.
        num_classes: classes besides the background.
        pretrained_backbone: load the backbone's released classification weights. For a file of them, build without and
            call `zoo.load_checkpoint(model.pyramid.backbone, path, head="keep")`.
        norm: "layer" or "group" puts a norm behind each of the backbone's maps, see `Pyramid`.
        backbone_args: arguments of the backbone, such as `dict(drop_path_rate=0.1)`.
        arguments: of the head: `class_names`, `freeze_norm`, `min_size`, `max_size`, `image_mean`, `image_std`,
            thresholds, anchors: see the class of the head (`zoo.heads.detection.detector_classes()`).

    Raises:
        ValueError: no such head or backbone, or an argument that it does not take.
    """
    classes = detector_classes()
    if head not in classes:
        raise ValueError(f"head={head!r}, expected one of {', '.join(sorted(classes))}")
    cls = classes[head]
    known = inspect.signature(cls).parameters
    unknown = [name for name in arguments if name not in known]
    if unknown:
        takes = ", ".join(name for name in known if name not in ("pyramid", "num_classes"))
        raise ValueError(f"{head} does not take {', '.join(unknown)}: it takes {takes}")
    own = dict(backbone_args or {})
    pyramid = Pyramid(backbone, cls.strides, pretrained=pretrained_backbone, norm=norm, **own)
    model = cls(pyramid, num_classes, **arguments)
    if isinstance(backbone, str):  # a built one cannot be described in a file
        described = dict(head=head, backbone=backbone, num_classes=num_classes, norm=norm, backbone_args=own)
        model.zoo_door = ("create_detector", described | {k: v for k, v in arguments.items() if k != "class_names"})
    return model
