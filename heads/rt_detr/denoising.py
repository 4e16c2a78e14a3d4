"""Contrastive denoising (DINO, arXiv 2203.03605, section 3.3): spoilt copies of the objects as further queries.

Of each object come pairs of queries: one with a box moved a little, which must find back, and one moved farther, which
must say that there is nothing. Groups of copies do not see each other, and the model's own queries see none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from zoo.heads.rt_detr.layers import inverse_sigmoid


class Denoising(NamedTuple):
    """Queries beside the model's own.

    Attributes:
        queries: (B, D, C).
        places: (B, D, 4), boxes before the sigmoid.
        mask: (D + num_queries, D + num_queries), True where a query (row) may look.
        positives: for each image the queries that must find an object back, group after group.
        groups: copies of each object.
    """

    queries: Tensor
    places: Tensor
    mask: Tensor
    positives: list[Tensor]
    groups: int

    @property
    def count(self) -> int:
        """D."""
        return self.queries.shape[1]

    def pairs(self, labels: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """For each image the positive queries and the objects that they stand for."""
        return [
            (chosen, torch.arange(len(own), device=own.device).repeat(self.groups))
            for chosen, own in zip(self.positives, labels)
        ]


def denoising_queries(
    labels: Sequence[Tensor],
    boxes: Sequence[Tensor],
    embedding: nn.Embedding,
    num_queries: int,
    *,
    num_denoising: int = 100,
    label_noise_ratio: float = 0.5,
    box_noise_scale: float = 1.0,
) -> Denoising | None:
    """Spoilt copies of all objects; None where the batch has none.

    Args:
        labels: for each image (N,).
        boxes: for each image (N, 4), centres and sides in 0..1.
        embedding: of the classes, and of "no class" in its last row.
        num_queries: the model's own.
        num_denoising: roughly how many queries to make, for each kind.
        label_noise_ratio: twice the share of labels that are replaced by a random one.
        box_noise_scale: corners move by up to this share of half the sides, those of negatives by one to two.
    """
    counts = [len(own) for own in labels]
    most = max(counts)
    if most == 0 or num_denoising <= 0:
        return None
    groups = max(num_denoising // most, 1)
    like, device, B = boxes[0], boxes[0].device, len(counts)
    num_classes = embedding.num_embeddings - 1

    # objects padded to the largest number, then [positives, negatives] of each group in a row
    label = torch.full((B, most), num_classes, dtype=torch.int32, device=device)
    box = like.new_zeros(B, most, 4)
    real = torch.zeros(B, most, dtype=torch.bool, device=device)
    for i, count in enumerate(counts):
        label[i, :count] = labels[i].to(torch.int32)
        box[i, :count] = boxes[i]
        real[i, :count] = True
    label, box, real = (t.repeat(1, 2 * groups, *[1] * (t.ndim - 2)) for t in (label, box, real))
    negative = torch.zeros(2 * groups, most, dtype=torch.bool, device=device)
    negative[1::2] = True
    negative = negative.flatten()
    positives = [own.nonzero()[:, 0] for own in real & ~negative]

    if label_noise_ratio > 0:
        replaced = torch.rand(label.shape, dtype=torch.float32, device=device) < 0.5 * label_noise_ratio
        random = torch.randint(0, num_classes, label.shape, dtype=label.dtype, device=device)
        label = torch.where(replaced & real, random, label)
    if box_noise_scale > 0:
        corners = box_convert(box, "cxcywh", "xyxy")
        reach = box[..., 2:].repeat(1, 1, 2) * (0.5 * box_noise_scale)
        sign = torch.randint_like(box, 0, 2) * 2 - 1
        size = torch.rand_like(box) + negative[:, None]
        box = box_convert((corners + sign * size * reach).clamp(0, 1), "xyxy", "cxcywh")
    place = inverse_sigmoid(box)

    D = label.shape[1]
    group = torch.cat([torch.arange(D, device=device) // (2 * most), torch.full((num_queries,), -1, device=device)])
    # a group sees itself and the model's own queries, which see only themselves
    mask = (group[:, None] == group) | (group == -1)
    return Denoising(embedding(label), place, mask, positives, groups)
