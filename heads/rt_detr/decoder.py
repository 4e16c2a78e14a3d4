"""The decoder: the best cells of the maps become queries, which refine their boxes layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.heads.rt_detr.denoising import Denoising
from zoo.heads.rt_detr.layers import DeformableAttention, Mlp, SelfAttention, inverse_sigmoid


class Predictions(NamedTuple):
    """What the decoder says; boxes are centres and sides in 0..1.

    Attributes:
        logits: (layers, B, Q, classes), of denoising queries first where there are any.
        boxes: (layers, B, Q, 4).
        start_logits: (B, num_queries, classes) of the cells that became queries.
        start_boxes: (B, num_queries, 4).
    """

    logits: Tensor
    boxes: Tensor
    start_logits: Tensor
    start_boxes: Tensor


class DecoderLayer(nn.Module):
    """Attention between queries, deformable attention to the maps, an MLP; norms after the sums."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, num_levels: int, num_points: int):
        super().__init__()
        self.attn = SelfAttention(dim, num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn = DeformableAttention(dim, num_heads, num_levels, num_points)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        boxes: Tensor,
        memory: Tensor,
        sizes: Sequence[tuple[int, int]],
        mask: Tensor | None,
    ) -> Tensor:
        """(B, Q, C) -> (B, Q, C)."""
        x = self.norm1(x + self.attn(x, position, mask))
        x = self.norm2(x + self.cross_attn(x + position, boxes, memory, sizes))
        return self.norm3(x + self.fc2(F.relu(self.fc1(x))))


class Decoder(nn.Module):
    """Query selection and refinement.

    Args:
        dim: channels of the maps and of everything inside.
        num_classes: classes.
        num_queries: detections that the decoder can make.
        num_layers, num_heads, ffn_dim, num_points: of the layers.
        num_levels: maps.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        num_queries: int,
        num_layers: int,
        num_heads: int,
        ffn_dim: int,
        num_levels: int,
        num_points: int,
    ):
        super().__init__()
        self.num_queries = num_queries
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, dim, 1, bias=False), nn.BatchNorm2d(dim)) for _ in range(num_levels)
        )
        self.enc_output = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim))
        self.enc_score_head = nn.Linear(dim, num_classes)
        self.enc_bbox_head = Mlp(dim, dim, 4, 3)
        self.query_pos_head = Mlp(4, 2 * dim, dim, 2)
        self.layers = nn.ModuleList(
            DecoderLayer(dim, num_heads, ffn_dim, num_levels, num_points) for _ in range(num_layers)
        )
        self.score_heads = nn.ModuleList(nn.Linear(dim, num_classes) for _ in range(num_layers))
        self.bbox_heads = nn.ModuleList(Mlp(dim, dim, 4, 3) for _ in range(num_layers))

        for head in (self.enc_score_head, *self.score_heads):
            nn.init.constant_(head.bias, -math.log(99))  # a score of 0.01
        for head in (self.enc_bbox_head, *self.bbox_heads):
            nn.init.zeros_(head.layers[-1].weight)
            nn.init.zeros_(head.layers[-1].bias)
        for layer in (self.enc_output[0], *self.query_pos_head.layers):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, maps: Sequence[Tensor], denoising: Denoising | None = None) -> Predictions:
        """Maps (B, dim, h, w), finest first; in evaluation mode only the last layer's predictions are made."""
        maps = [project(m) for project, m in zip(self.input_proj, maps, strict=True)]
        sizes = [(m.shape[-2], m.shape[-1]) for m in maps]
        memory = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)  # (B, N, C)

        anchors, inside = anchor_logits(sizes, memory.float() if memory.dtype != torch.float64 else memory)
        cells = self.enc_output(memory * inside.to(memory.dtype))
        scores = self.enc_score_head(cells)
        count = self.num_queries
        if not torch.compiler.is_exporting():
            count = min(count, memory.shape[1])
        best = scores.amax(-1).topk(count, dim=1).indices[..., None]
        # only the chosen cells need boxes
        x = cells.gather(1, best.expand(-1, -1, cells.shape[-1]))
        start_logits = scores.gather(1, best.expand(-1, -1, scores.shape[-1]))
        place = self.enc_bbox_head(x) + anchors.expand(x.shape[0], -1, -1).gather(1, best.expand(-1, -1, 4))
        start_boxes = place.sigmoid()
        x, place = x.detach(), place.detach()

        mask = None
        if denoising is not None:
            x = torch.cat([denoising.queries, x], dim=1)
            place = torch.cat([denoising.places, place], dim=1)
            mask = denoising.mask
        boxes = place.sigmoid()
        all_logits, all_boxes = [], []
        for i, (layer, score_head, bbox_head) in enumerate(zip(self.layers, self.score_heads, self.bbox_heads)):
            x = layer(x, self.query_pos_head(boxes.to(x.dtype)), boxes, memory, sizes, mask)
            refined = (bbox_head(x) + inverse_sigmoid(boxes)).sigmoid()
            if self.training or i == len(self.layers) - 1:
                all_logits.append(score_head(x))
                all_boxes.append(refined)
            boxes = refined.detach()
        return Predictions(torch.stack(all_logits), torch.stack(all_boxes), start_logits, start_boxes)


def anchor_logits(sizes: Sequence[tuple[int, int]], like: Tensor, side: float = 0.05) -> tuple[Tensor, Tensor]:
    """Boxes of all cells before the sigmoid (1, N, 4), and which lie well inside the image (1, N, 1).

    A cell's box is at its centre; its side is 0.05 of the image, doubled from map to map. Boxes too close to the
    border are put so far out that no cell moves them.
    """
    levels = []
    for i, (h, w) in enumerate(sizes):
        x = ((torch.arange(w, device=like.device, dtype=like.dtype) + 0.5) / w).expand(h, w)
        y = ((torch.arange(h, device=like.device, dtype=like.dtype) + 0.5) / h)[:, None].expand(h, w)
        s = torch.full_like(x, side * 2**i)
        levels.append(torch.stack([x, y, s, s], dim=-1).reshape(1, -1, 4))
    anchors = torch.cat(levels, dim=1)
    inside = ((anchors > 0.01) & (anchors < 0.99)).all(-1, keepdim=True)
    logits = torch.log(anchors / (1 - anchors))
    return logits.masked_fill(~inside, torch.finfo(like.dtype).max), inside
