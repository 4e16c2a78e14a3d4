"""Which query answers for which object, and the losses: varifocal for classes, L1 and GIoU for boxes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from zoo.heads.detection import batch_mean_count
from zoo.heads.pem.matcher import assign
from zoo.heads.rt_detr.decoder import Predictions
from zoo.heads.rt_detr.denoising import Denoising

Pairs = list[tuple[Tensor, Tensor]]


@torch.no_grad()
def match(
    logits: Tensor,
    boxes: Tensor,
    labels: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    cost_class: float = 2.0,
    cost_bbox: float = 5.0,
    cost_giou: float = 2.0,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Pairs:
    """The assignment of least total cost, for each image (queries, objects).

    Args:
        logits: (B, Q, classes).
        boxes: (B, Q, 4), centres and sides in 0..1.
        labels: for each image (N,).
        targets: for each image (N, 4), as `boxes`.
        cost_class, cost_bbox, cost_giou: weights of the focal, L1 and GIoU costs.
        alpha, gamma: of the focal cost.
    """
    costs = []
    for logit, box, label, target in zip(logits, boxes, labels, targets):
        p = logit.float().sigmoid()[:, label] if logit.dtype != torch.float64 else logit.sigmoid()[:, label]
        negative = (1 - alpha) * p**gamma * -(1 - p + 1e-8).log()
        positive = alpha * (1 - p) ** gamma * -(p + 1e-8).log()
        distance = torch.cdist(box.to(p.dtype), target.to(p.dtype), p=1)
        overlap = generalized_box_iou(
            box_convert(box.to(p.dtype), "cxcywh", "xyxy"), box_convert(target.to(p.dtype), "cxcywh", "xyxy")
        )
        costs.append(cost_bbox * distance + cost_class * (positive - negative) - cost_giou * overlap)
    return assign(costs)


def paired_ious(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and GIoU of the i-th box of `a` with the i-th of `b`, both (N, 4) as centres and sides."""
    a, b = box_convert(a, "cxcywh", "xyxy"), box_convert(b, "cxcywh", "xyxy")
    inner = (torch.min(a[:, 2:], b[:, 2:]) - torch.max(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    outer = (torch.max(a[:, 2:], b[:, 2:]) - torch.min(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - inner
    iou = inner / union
    return iou, iou - (outer - union) / outer


def layer_losses(
    logits: Tensor, boxes: Tensor, labels: Sequence[Tensor], targets: Sequence[Tensor], pairs: Pairs, share: Tensor
) -> dict[str, Tensor]:
    """Losses of one layer's predictions for a given assignment.

    Args:
        logits, boxes, labels, targets: as for `match`.
        pairs: for each image the queries and their objects.
        share: what sums are divided by, usually the number of objects.
    """
    image = torch.cat([torch.full_like(q, i) for i, (q, _) in enumerate(pairs)])
    query = torch.cat([q for q, _ in pairs])
    label = torch.cat([own[o] for own, (_, o) in zip(labels, pairs)])
    target = torch.cat([own[o] for own, (_, o) in zip(targets, pairs)]).to(boxes)
    found = boxes[image, query]
    iou, giou = paired_ious(found, target)

    # a matched query's class is wanted with the quality of its box; all else is wanted absent, more so if it is sure
    wanted = torch.zeros_like(logits)
    wanted[image, query, label] = iou.detach().to(wanted)
    absent = torch.ones_like(logits)
    absent[image, query, label] = 0
    weight = 0.75 * logits.detach().sigmoid() ** 2 * absent + wanted
    vfl = F.binary_cross_entropy_with_logits(logits, wanted, weight=weight, reduction="sum")
    return {
        "vfl": vfl / share,
        "bbox": 5 * (found - target).abs().sum() / share,
        "giou": 2 * (1 - giou).sum() / share,
    }


def criterion(
    predictions: Predictions,
    labels: Sequence[Tensor],
    targets: Sequence[Tensor],
    denoising: Denoising | None,
) -> dict[str, dict[str, Tensor]]:
    """Losses of every layer: "layer0", ..., "start" (the cells that became queries), "denoising0", ...

    Weights: varifocal 1, L1 5, GIoU 2; sums are divided by the objects of the batch over all processes.
    """
    share = batch_mean_count(torch.tensor(float(sum(map(len, labels))), device=predictions.logits.device))
    extra = denoising.count if denoising is not None else 0
    losses = {}
    for i, (logits, boxes) in enumerate(zip(predictions.logits, predictions.boxes)):
        logits, boxes = logits[:, extra:], boxes[:, extra:]
        pairs = match(logits, boxes, labels, targets)
        losses[f"layer{i}"] = layer_losses(logits, boxes, labels, targets, pairs, share)
    logits, boxes = predictions.start_logits, predictions.start_boxes
    losses["start"] = layer_losses(logits, boxes, labels, targets, match(logits, boxes, labels, targets), share)
    if denoising is not None:
        pairs = denoising.pairs(labels)
        for i, (logits, boxes) in enumerate(zip(predictions.logits, predictions.boxes)):
            losses[f"denoising{i}"] = layer_losses(
                logits[:, :extra], boxes[:, :extra], labels, targets, pairs, share * denoising.groups
            )
    return losses
