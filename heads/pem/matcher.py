"""Which query answers for which segment: the assignment of least total cost (Mask2Former, arXiv 2112.01527, 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps at points; zero outside.

    Args:
        maps: (N, H, W).
        points: (P, 2), the same for every map, or (N, P, 2): (x, y) in 0..1 over the whole map.

    Returns:
        (N, P).
    """
    grid = 2 * points - 1
    if points.ndim == 2:
        return F.grid_sample(maps[None], grid[None, :, None], align_corners=False)[0, :, :, 0]
    if len(maps) == 0:
        return maps.new_zeros(points.shape[:2])
    return F.grid_sample(maps[:, None], grid[:, :, None], align_corners=False)[:, 0, :, 0]


def matching_costs(
    class_logits: Tensor,
    mask_logits: Tensor,
    labels: Tensor,
    masks: Tensor,
    points: Tensor,
    *,
    cost_class: float = 2.0,
    cost_mask: float = 5.0,
    cost_dice: float = 5.0,
) -> Tensor:
    """The cost of each pair of query and segment of one image, (Q, N).

    Args:
        class_logits: (Q, K + 1).
        mask_logits: (Q, h, w).
        labels: (N,).
        masks: (N, H, W), of a floating type.
        points: (P, 2), where masks are compared; see `sample_points`.
    """
    probability = class_logits.softmax(-1)[:, labels]
    x = sample_points(mask_logits, points)
    target = sample_points(masks, points)
    positive, negative = F.softplus(-x), F.softplus(x)  # cross-entropy where the target is 1, and where it is 0
    bce = (positive @ target.T + negative @ (1 - target).T) / points.shape[0]
    inside = x.sigmoid()
    dice = 1 - (2 * inside @ target.T + 1) / (inside.sum(-1)[:, None] + target.sum(-1)[None] + 1)
    return cost_mask * bce - cost_class * probability + cost_dice * dice


def assign(costs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """For each cost matrix (Q, N) the chosen queries and their segments, as index tensors of length min(Q, N).

    All matrices come to the host in one copy. Costs that are not finite count as very high: an overflow in one
    prediction must not end the training.
    """
    from zoo.extras import require

    linear_sum_assignment = require("scipy.optimize", "train").linear_sum_assignment
    if not costs:
        return []
    flat = torch.cat([cost.flatten() for cost in costs]).double().cpu().nan_to_num_(1e9, 1e9, -1e9)
    pairs = []
    for cost, values in zip(costs, flat.split([cost.numel() for cost in costs]), strict=True):
        queries, segments = linear_sum_assignment(values.view(cost.shape).numpy())
        pairs.append((torch.as_tensor(queries, device=cost.device), torch.as_tensor(segments, device=cost.device)))
    return pairs
