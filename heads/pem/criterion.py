"""PEM's training loss: classes and masks of matched queries, for the last prediction and every one before it.

Mask losses are computed at points, not pixels: most of them where the prediction is least certain. Ignored pixels
and padding are background of every mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.heads.pem.matcher import assign, matching_costs, sample_points
from zoo.heads.pem.model import PemOutput


class Segments(NamedTuple):
    """The annotated segments of one image, at the size of the batch's (padded) images.

    Attributes:
        labels: (N,) class indices.
        masks: (N, H, W), bool or in 0..1. For semantic segmentation one for each class that occurs, for
            panoptic one for each segment that is not a crowd.
    """

    labels: Tensor
    masks: Tensor


class _Draws(NamedTuple):
    """The random points of one prediction: of the matcher (one set an image), candidates, and uniform ones."""

    matcher: list[Tensor]
    candidates: Tensor
    uniform: Tensor


class PemCriterion(nn.Module):
    """Weighted losses of a batch, to be summed: `loss_ce`, `loss_mask`, `loss_dice`, and `..._0`, `..._1`, ...

    Args:
        num_classes: classes without "no object".
        cost_class, cost_mask, cost_dice: weights in the matching.
        weight_class, weight_mask, weight_dice: weights in the loss.
        no_object_weight: weight of "no object" in the class loss.
        num_points: points at which masks are compared.
        oversample_ratio: candidates a point, of which the least certain are kept.
        importance_sample_ratio: share of points that are such; the others are uniform.
        draw: makes uniform numbers in 0..1 of a shape on a device; `torch.rand` by default. The order of calls is
            that of the official code.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        cost_class: float = 2.0,
        cost_mask: float = 5.0,
        cost_dice: float = 5.0,
        weight_class: float = 2.0,
        weight_mask: float = 5.0,
        weight_dice: float = 5.0,
        no_object_weight: float = 0.1,
        num_points: int = 112 * 112,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
        draw: Callable[..., Tensor] = torch.rand,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.costs = dict(cost_class=cost_class, cost_mask=cost_mask, cost_dice=cost_dice)
        self.weights = dict(loss_ce=weight_class, loss_mask=weight_mask, loss_dice=weight_dice)
        self.no_object_weight = no_object_weight
        self.num_points = num_points
        self.num_candidates = int(num_points * oversample_ratio)
        self.num_certain = int(num_points * importance_sample_ratio)
        self.draw = draw

    def forward(
        self, output: PemOutput, targets: Sequence[Segments], draws: Sequence[Callable[..., Tensor]] | None = None
    ) -> dict[str, Tensor]:
        """The weighted losses of a batch.

        Args:
            output: of the network.
            targets: one for each image.
            draws: instead of `draw`, one for each image: its points are then the same in any batch.

        Raises:
            ValueError: targets that do not fit the batch or the classes.
        """
        losses = self.losses(output, targets, draws)
        return {name: self.weights["_".join(name.split("_")[:2])] * value for name, value in losses.items()}

    def losses(
        self, output: PemOutput, targets: Sequence[Segments], draws: Sequence[Callable[..., Tensor]] | None = None
    ) -> dict[str, Tensor]:
        """The losses without their weights."""
        self._check(output, targets)
        predictions = [(output.class_logits, output.mask_logits), *output.auxiliary]
        # losses overflow in half precision
        predictions = [tuple(x if x.dtype is torch.float64 else x.float() for x in pair) for pair in predictions]
        dtype, device = predictions[0][1].dtype, predictions[0][1].device
        labels = [target.labels.to(device) for target in targets]
        masks = [target.masks.to(device, dtype) for target in targets]
        points = self._draw_points(predictions, labels, draws, device, dtype)
        pairs = self.match(predictions, labels, masks, points)
        count = self._count_segments(labels, device, dtype)
        losses: dict[str, Tensor] = {}
        for i, (prediction, pair, drawn) in enumerate(zip(predictions, pairs, points, strict=True)):
            suffix = f"_{i - 1}" if i else ""
            losses[f"loss_ce{suffix}"] = self._class_loss(prediction[0], labels, pair)
            losses[f"loss_mask{suffix}"], losses[f"loss_dice{suffix}"] = self._mask_losses(
                prediction[1], masks, pair, drawn, count
            )
        return losses

    @torch.no_grad()
    def match(
        self,
        predictions: Sequence[tuple[Tensor, Tensor]],
        labels: Sequence[Tensor],
        masks: Sequence[Tensor],
        draws: Sequence[_Draws],
    ) -> list[list[tuple[Tensor, Tensor]]]:
        """For each prediction and image the matched queries and segments."""
        costs = [
            matching_costs(classes[b], logits[b], labels[b], masks[b], drawn.matcher[b], **self.costs)
            for (classes, logits), drawn in zip(predictions, draws, strict=True)
            for b in range(len(labels))
        ]
        pairs = assign(costs)
        return [pairs[i : i + len(labels)] for i in range(0, len(pairs), len(labels))]

    def _draw_points(self, predictions, labels, draws, device, dtype) -> list[_Draws]:
        queries = predictions[0][0].shape[1]
        matched = [min(len(each), queries) for each in labels]
        rest = self.num_points - self.num_certain
        result = []
        for _ in predictions:
            if draws is None:
                shapes = [(1, self.num_points, 2)] * len(labels)
                shapes += [(sum(matched), self.num_candidates, 2), (sum(matched), rest, 2)]
                *matcher, candidates, uniform = (self.draw(shape, device=device).to(dtype) for shape in shapes)
            else:
                own = []
                for draw, count in zip(draws, matched, strict=True):
                    shapes = (1, self.num_points, 2), (count, self.num_candidates, 2), (count, rest, 2)
                    own.append([draw(shape, device=device).to(dtype) for shape in shapes])
                matcher = [points for points, _, _ in own]
                candidates, uniform = (torch.cat([points[i] for points in own]) for i in (1, 2))
            result.append(_Draws([each[0] for each in matcher], candidates, uniform))
        return result

    def _class_loss(self, logits: Tensor, labels: Sequence[Tensor], pairs) -> Tensor:
        expected = torch.full(logits.shape[:2], self.num_classes, dtype=torch.long, device=logits.device)
        for b, (queries, segments) in enumerate(pairs):
            expected[b, queries] = labels[b][segments]
        weight = logits.new_ones(self.num_classes + 1)
        weight[-1] = self.no_object_weight
        loss = F.cross_entropy(logits.transpose(1, 2), expected, weight, reduction="sum")
        return loss / _over_processes(weight[expected].sum())

    def _mask_losses(self, logits: Tensor, masks: Sequence[Tensor], pairs, drawn: _Draws, count: Tensor):
        x = torch.cat([logits[b, queries] for b, (queries, _) in enumerate(pairs)])
        if len(x) == 0:  # zero, but part of the graph: every process needs a gradient
            return x.sum(), x.sum()
        with torch.no_grad():
            certainty = sample_points(x, drawn.candidates).abs()
            kept = certainty.topk(self.num_certain, largest=False, sorted=False).indices
            kept = drawn.candidates.gather(1, kept[..., None].expand(-1, -1, 2))
            points = torch.cat((kept, drawn.uniform), 1)
            sizes = [len(queries) for queries, _ in pairs]
            target = torch.cat(
                [
                    sample_points(masks[b][segments], each)
                    for b, ((_, segments), each) in enumerate(zip(pairs, points.split(sizes), strict=True))
                ]
            )
        x = sample_points(x, points)
        bce = F.binary_cross_entropy_with_logits(x, target, reduction="none").mean(1).sum() / count
        inside = x.sigmoid()
        dice = 1 - (2 * (inside * target).sum(-1) + 1) / (inside.sum(-1) + target.sum(-1) + 1)
        return bce, dice.sum() / count

    def _count_segments(self, labels: Sequence[Tensor], device, dtype) -> Tensor:
        """Segments of a process's batch, averaged over the processes, at least 1."""
        count = torch.tensor(float(sum(len(each) for each in labels)), device=device, dtype=dtype)
        return _over_processes(count).clamp(min=1)

    def _check(self, output: PemOutput, targets: Sequence[Segments]) -> None:
        if len(targets) != len(output.class_logits):
            raise ValueError(
                f"{len(targets)} targets for a batch of {len(output.class_logits)}: pass one for each image"
            )
        for i, (labels, masks) in enumerate(targets):
            if masks.ndim != 3 or len(labels) != len(masks):
                raise ValueError(
                    f"target {i} has {len(labels)} labels and masks of shape {tuple(masks.shape)}: masks are "
                    "(segments, height, width), one for each label"
                )
            low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
            if low < 0 or high >= self.num_classes:
                raise ValueError(f"target {i} has labels {low}..{high}, expected 0..{self.num_classes - 1}")


def _over_processes(count: Tensor) -> Tensor:
    """The mean over all processes, so that a step's loss does not depend on how many share its images."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
        count = count / torch.distributed.get_world_size()
    return count
