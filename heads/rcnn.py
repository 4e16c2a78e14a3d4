"""Faster R-CNN (arXiv 1506.01497) and Mask R-CNN (arXiv 1703.06870) with a feature pyramid: two stages.

torchvision's models with `Pyramid` under them. Different from torchvision: exact strides, aligned RoIs with adaptive
sampling, masks pasted without rounding (`heads/fpn.py`), 1000 proposals in training, and a choice of the box loss: the
papers' detectors use L1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection import faster_rcnn, mask_rcnn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from zoo.heads.detection import Detector, Target, at_least_float32
from zoo.heads.fpn import Anchors, FpnBackbone, ImageTransform, RoiAlign
from zoo.heads.pyramid import Pyramid

BoxLoss = Literal["l1", "smooth_l1"]


def box_loss(name: BoxLoss, deltas: Tensor, wanted: Tensor) -> Tensor:
    """Sum of absolute differences, or with a quadratic bottom below 1/9."""
    if name == "l1":
        return (deltas - wanted).abs().sum()
    return F.smooth_l1_loss(deltas, wanted, beta=1 / 9, reduction="sum")


class _ProposalHead(RPNHead):
    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return tuple([at_least_float32(out) for out in kind] for kind in super().forward(x))


class _BoxPredictor(faster_rcnn.FastRCNNPredictor):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(at_least_float32(out) for out in super().forward(x))


class _Proposals(RegionProposalNetwork):
    box_loss: BoxLoss = "l1"

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        positive, negative = (torch.cat(kind).nonzero()[:, 0] for kind in self.fg_bg_sampler(labels))
        sampled = torch.cat([positive, negative])
        boxes = box_loss(self.box_loss, pred_bbox_deltas[positive], torch.cat(regression_targets)[positive])
        wanted = torch.cat(labels)[sampled].to(objectness.dtype)
        scores = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], wanted)
        return scores, boxes / sampled.numel()


class _RoiHeads(RoIHeads):
    box_loss: BoxLoss = "l1"

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if not self.training:
            return super().forward(features, proposals, image_shapes)
        proposals, matched, labels, wanted = self.select_training_samples(proposals, targets)
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals)))
        label = torch.cat(labels)
        positive = (label > 0).nonzero()[:, 0]
        own = deltas.unflatten(1, (-1, 4))[positive, label[positive]]
        losses = {
            "loss_classifier": F.cross_entropy(logits, label),
            "loss_box_reg": box_loss(self.box_loss, own, torch.cat(wanted)[positive]) / label.numel(),
        }
        if self.has_mask():
            kept = [(chosen > 0).nonzero()[:, 0] for chosen in labels]
            boxes = [p[k] for p, k in zip(proposals, kept)]
            objects = [m[k] for m, k in zip(matched, kept)]
            mask_logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes)))
            losses["loss_mask"] = maskrcnn_loss(
                mask_logits, boxes, [t["masks"] for t in targets], [t["labels"] for t in targets], objects
            )
        return [], losses


class FasterRcnn(Detector, GeneralizedRCNN):
    """Faster R-CNN: proposals, then a class and a box for each.

    Args:
        pyramid: the backbone's maps at strides 4, 8, 16, 32.
        num_classes: classes besides the background.
        class_names: their names.
        freeze_norm: keep the backbone's batch statistics.
        min_size, max_size: sides that images are resized to.
        resize_in_training: off where the data set resizes already.
        image_mean, image_std: in 0..1; the backbone's own by default.
        out_channels: width of the pyramid.
        anchor_sizes: for each of five levels; 8 strides by default.
        aspect_ratios: height / width of anchors.
        rpn_pre_nms_top_n_train, rpn_pre_nms_top_n_test: proposals of each level before suppression.
        rpn_post_nms_top_n_train, rpn_post_nms_top_n_test: proposals of an image after it.
        rpn_nms_thresh: overlap from which a weaker proposal is dropped.
        box_score_thresh: detections below it are dropped.
        box_nms_thresh: of two detections of a class that overlap more, the weaker one is dropped.
        box_detections_per_img: kept of each image.
        box_batch_size_per_image: proposals that are trained on, a quarter of them objects.
        box_loss: "l1" or "smooth_l1" of the deltas, in both stages.
        sampling_ratio: points of a cell's side in RoIs; 0 adapts to the size of the box.
    """

    head_name = "faster_rcnn"
    class_entries = ("roi_heads.box_predictor",)
    strides = (4, 8, 16, 32)
    _first_label = 1

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
        anchor_sizes: Sequence[Sequence[float]] | None = None,
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        rpn_pre_nms_top_n_train: int = 2000,
        rpn_pre_nms_top_n_test: int = 1000,
        rpn_post_nms_top_n_train: int = 1000,
        rpn_post_nms_top_n_test: int = 1000,
        rpn_nms_thresh: float = 0.7,
        box_score_thresh: float = 0.05,
        box_nms_thresh: float = 0.5,
        box_detections_per_img: int = 100,
        box_batch_size_per_image: int = 512,
        box_loss: BoxLoss = "l1",
        sampling_ratio: int = 0,
    ):
        if box_loss not in ("l1", "smooth_l1"):
            raise ValueError(f"box_loss={box_loss!r}, expected 'l1' or 'smooth_l1'")
        backbone = FpnBackbone(pyramid, out_channels, coarse="pool")
        anchors = Anchors(anchor_sizes or [[8 * s] for s in backbone.strides], aspect_ratios, backbone.strides)
        rpn = _Proposals(
            anchors,
            _ProposalHead(out_channels, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n=dict(training=rpn_pre_nms_top_n_train, testing=rpn_pre_nms_top_n_test),
            post_nms_top_n=dict(training=rpn_post_nms_top_n_train, testing=rpn_post_nms_top_n_test),
            nms_thresh=rpn_nms_thresh,
        )
        width = 1024
        roi_heads = _RoiHeads(
            RoiAlign(7, pyramid.strides, sampling_ratio=sampling_ratio),
            faster_rcnn.TwoMLPHead(out_channels * 7 * 7, width),
            _BoxPredictor(width, num_classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=box_batch_size_per_image,
            positive_fraction=0.25,
            bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
            score_thresh=box_score_thresh,
            nms_thresh=box_nms_thresh,
            detections_per_img=box_detections_per_img,
        )
        rpn.box_loss = roi_heads.box_loss = box_loss
        transform = ImageTransform(
            min_size,
            max_size,
            image_mean or pyramid.mean,
            image_std or pyramid.std,
            pyramid.divisor,
            resize_in_training,
        )
        super().__init__(backbone, rpn, roi_heads, transform)
        self._add_masks(out_channels, num_classes, sampling_ratio)
        self._describe(num_classes, class_names, freeze_norm)

    def _add_masks(self, out_channels: int, num_classes: int, sampling_ratio: int) -> None:
        """Nothing here: a hook for `MaskRcnn`, which takes the same arguments."""

    def _run(self, images: list[Tensor], targets: list[Target] | None) -> Any:
        return GeneralizedRCNN.forward(self, images, targets)


class MaskRcnn(FasterRcnn):
    """Mask R-CNN: Faster R-CNN, and a 28 x 28 mask for each detection. Arguments as there."""

    head_name = "mask_rcnn"
    class_entries = ("roi_heads.box_predictor", "roi_heads.mask_predictor.mask_fcn_logits")
    has_masks = True

    def _add_masks(self, out_channels: int, num_classes: int, sampling_ratio: int) -> None:
        width = 256
        heads = self.roi_heads
        heads.mask_roi_pool = RoiAlign(14, self.strides, sampling_ratio=sampling_ratio)
        heads.mask_head = mask_rcnn.MaskRCNNHeads(out_channels, (width,) * 4, dilation=1)
        heads.mask_predictor = mask_rcnn.MaskRCNNPredictor(width, width, num_classes + 1)
