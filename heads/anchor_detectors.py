"""RetinaNet (arXiv 1708.02002) and FCOS (arXiv 1904.01355): one stage, a prediction for each cell of P3 to P7.

torchvision's models with `Pyramid` under them. Different from torchvision: exact strides (`heads/fpn.py`), 100
detections an image, and losses that are divided by the positives of the whole batch, over all processes, as the papers'
detectors do: an image with few objects does not weigh as much as one with many, and two processes train as one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.models.detection import fcos, retinanet
from torchvision.ops import sigmoid_focal_loss

from zoo.heads.detection import Detector, Target, at_least_float32, batch_mean_count
from zoo.heads.fpn import Anchors, FpnBackbone, ImageTransform
from zoo.heads.pyramid import Pyramid


class _RetinaNetHead(retinanet.RetinaNetHead):
    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        return {name: at_least_float32(out) for name, out in super().forward(x).items()}

    def compute_loss(
        self,
        targets: list[Target],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        logits, regression = head_outputs["cls_logits"], head_outputs["bbox_regression"]
        matched = torch.stack(matched_idxs)  # (B, A): an object, or -1 background, -2 too close to an object
        positive = matched >= 0
        share = batch_mean_count(positive.sum())
        wanted = torch.zeros_like(logits)
        boxes = []
        for i, target in enumerate(targets):
            cells = positive[i].nonzero()[:, 0]
            objects = matched[i, cells]
            wanted[i, cells, target["labels"][objects]] = 1
            boxes.append(target["boxes"][objects])
        counted = matched != self.classification_head.BETWEEN_THRESHOLDS
        focal = sigmoid_focal_loss(logits[counted], wanted[counted], alpha=0.25, gamma=2.0, reduction="sum")
        priors = torch.stack(anchors)[positive]
        deltas = self.regression_head.box_coder.encode_single(torch.cat(boxes).to(priors), priors)
        l1 = (regression[positive] - deltas).abs().sum()
        return {"classification": focal / share, "bbox_regression": l1 / share}


class RetinaNet(Detector, retinanet.RetinaNet):
    """RetinaNet: focal loss over nine anchors a cell.

    Args:
        pyramid: the backbone's maps at strides 8, 16, 32.
        num_classes: classes.
        class_names: their names.
        freeze_norm: keep the backbone's batch statistics.
        min_size, max_size: sides that images are resized to.
        resize_in_training: off where the data set resizes already.
        image_mean, image_std: in 0..1; the backbone's own by default.
        out_channels: width of the pyramid.
        relu_before_p7: torchvision's habit; the papers with PoolFormer and its kin have none.
        anchor_sizes: for each of five levels; 4, 5 and 6.3 strides by default.
        aspect_ratios: height / width of anchors.
        score_thresh: detections below it are dropped.
        nms_thresh: of two detections of a class that overlap more, the weaker one is dropped.
        detections_per_img: kept of each image.
        topk_candidates: kept of each level before suppression.
        fg_iou_thresh: overlap with an object from which an anchor stands for it.
        bg_iou_thresh: overlap below which it is background.
    """

    head_name = "retinanet"
    class_entries = ("head.classification_head.cls_logits",)
    strides = (8, 16, 32)

    def __init__(
        self,
        pyramid: Pyramid,
        num_classes: int,
        *,
        class_names: Sequence[str] | None = None,
        freeze_norm: bool = False,
        min_size: int | Sequence[int] = 800,
        max_size: int = 1333,
        resize_in_training: bool = True,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        out_channels: int = 256,
        relu_before_p7: bool = False,
        anchor_sizes: Sequence[Sequence[float]] | None = None,
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        detections_per_img: int = 100,
        topk_candidates: int = 1000,
        fg_iou_thresh: float = 0.5,
        bg_iou_thresh: float = 0.4,
    ):
        backbone = FpnBackbone(pyramid, out_channels, coarse="c5", relu=relu_before_p7)
        if anchor_sizes is None:
            anchor_sizes = [[4 * s * 2 ** (i / 3) for i in range(3)] for s in backbone.strides]
        anchors = Anchors(anchor_sizes, aspect_ratios, backbone.strides)
        super().__init__(
            backbone,
            num_classes,
            anchor_generator=anchors,
            head=_RetinaNetHead(out_channels, anchors.num_anchors_per_location()[0], num_classes),
            score_thresh=score_thresh,
            nms_thresh=nms_thresh,
            detections_per_img=detections_per_img,
            topk_candidates=topk_candidates,
            fg_iou_thresh=fg_iou_thresh,
            bg_iou_thresh=bg_iou_thresh,
        )
        self.transform = ImageTransform(
            min_size,
            max_size,
            image_mean or pyramid.mean,
            image_std or pyramid.std,
            pyramid.divisor,
            resize_in_training,
        )
        self._describe(num_classes, class_names, freeze_norm)

    def _run(self, images: list[Tensor], targets: list[Target] | None) -> Any:
        return retinanet.RetinaNet.forward(self, images, targets)


class _FcosHead(fcos.FCOSHead):
    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        return {name: at_least_float32(out) for name, out in super().forward(x).items()}

    def compute_loss(
        self,
        targets: list[Target],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        losses = super().compute_loss(targets, head_outputs, anchors, matched_idxs)
        # torchvision divides by the positives of this process
        own = torch.stack(matched_idxs).ge(0).sum()
        rescale = own.clamp(min=1) / batch_mean_count(own)
        return {name: loss * rescale for name, loss in losses.items()}


class Fcos(Detector, fcos.FCOS):
    """FCOS: no anchors; each cell near an object's centre gives the distances to its sides.

    Args:
        pyramid: the backbone's maps at strides 8, 16, 32.
        num_classes: classes.
        class_names: their names.
        freeze_norm: keep the backbone's batch statistics.
        min_size, max_size: sides that images are resized to.
        resize_in_training: off where the data set resizes already.
        image_mean, image_std: in 0..1; the backbone's own by default.
        out_channels: width of the pyramid.
        coarse: what P6 is made from.
        center_sampling_radius: cells this near to an object's centre stand for it, in strides.
        score_thresh: detections below it are dropped.
        nms_thresh: of two detections of a class that overlap more, the weaker one is dropped.
        detections_per_img: kept of each image.
        topk_candidates: kept of each level before suppression.
    """

    head_name = "fcos"
    class_entries = ("head.classification_head.cls_logits",)
    strides = (8, 16, 32)

    def __init__(
        self,
        pyramid: Pyramid,
        num_classes: int,
        *,
        class_names: Sequence[str] | None = None,
        freeze_norm: bool = False,
        min_size: int | Sequence[int] = 800,
        max_size: int = 1333,
        resize_in_training: bool = True,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        out_channels: int = 256,
        coarse: Literal["c5", "p5"] = "p5",
        center_sampling_radius: float = 1.5,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.6,
        detections_per_img: int = 100,
        topk_candidates: int = 1000,
    ):
        backbone = FpnBackbone(pyramid, out_channels, coarse=coarse, relu=True)
        super().__init__(
            backbone,
            num_classes,
            # one box a level, as large as its stride: only its centre and its size are read
            anchor_generator=Anchors([[float(s)] for s in backbone.strides], (1.0,), backbone.strides),
            head=_FcosHead(out_channels, 1, num_classes),
            center_sampling_radius=center_sampling_radius,
            score_thresh=score_thresh,
            nms_thresh=nms_thresh,
            detections_per_img=detections_per_img,
            topk_candidates=topk_candidates,
        )
        self.transform = ImageTransform(
            min_size,
            max_size,
            image_mean or pyramid.mean,
            image_std or pyramid.std,
            pyramid.divisor,
            resize_in_training,
        )
        self._describe(num_classes, class_names, freeze_norm)

    def _run(self, images: list[Tensor], targets: list[Target] | None) -> Any:
        return fcos.FCOS.forward(self, images, targets)
