"""Parts of RT-DETR: convolutions with folds, self-attention, deformable attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval


class ConvNorm(nn.Module):
    """Convolution, BatchNorm and SiLU.

    Args:
        in_channels, out_channels, kernel_size, stride: of the convolution.
        act: False leaves the SiLU out.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, act: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.act = nn.SiLU(inplace=True) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        return self.act(self.norm(self.conv(x)))

    def reparameterize(self) -> None:
        """Fold the norm into the convolution."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv = fuse_conv_bn_eval(self.conv.eval(), self.norm.eval())
            self.norm = nn.Identity()


class RepBlock(nn.Module):
    """Parallel 3x3 and 1x1 convolutions (RepVGG without its identity), one convolution once folded."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = ConvNorm(channels, channels, 3, act=False)
        self.conv2 = ConvNorm(channels, channels, 1, act=False)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        y = self.conv1(x)
        return self.act(y if self.conv2 is None else y + self.conv2(x))

    def reparameterize(self) -> None:
        """Add the 1x1 convolution to the middle of the 3x3 one."""
        if self.conv2 is None:
            return
        for branch in (self.conv1, self.conv2):
            branch.reparameterize()
        wide, narrow = self.conv1.conv, self.conv2.conv
        with torch.no_grad():
            wide.weight[:, :, 1:2, 1:2] += narrow.weight
            wide.bias += narrow.bias
        self.conv2 = None


class CspLayer(nn.Module):
    """Half of the channels through `RepBlock`s, half past them (CSPNet); (B, C, H, W) -> (B, out_channels, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, depth: int, expansion: float):
        super().__init__()
        hidden = int(out_channels * expansion)
        self.conv1 = ConvNorm(in_channels, hidden, 1)
        self.conv2 = ConvNorm(in_channels, hidden, 1)
        self.blocks = nn.Sequential(*(RepBlock(hidden) for _ in range(depth)))
        self.conv3 = ConvNorm(hidden, out_channels, 1) if hidden != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Both ways, and their sum."""
        return self.conv3(self.blocks(self.conv1(x)) + self.conv2(x))


class SelfAttention(nn.Module):
    """Softmax attention; positions are added to queries and keys, not to values."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"hidden_dim={dim} is no multiple of num_heads={num_heads}")
        self.num_heads = num_heads
        self.qk = nn.Linear(dim, 2 * dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        for weight in (*self.qk.weight.chunk(2), self.v.weight):
            nn.init.xavier_uniform_(weight)
        for layer in (self.qk, self.v, self.proj):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, position: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, C), positions to add, and where to look (N, N), True for yes -> (B, N, C)."""
        B, N, C = x.shape
        q, k = self.qk(x + position).view(B, N, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        v = self.v(x).view(B, N, self.num_heads, -1).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).reshape(B, N, C))


class DeformableAttention(nn.Module):
    """Each query reads a few points of each map, around its box (Deformable DETR, arXiv 2010.04159, section 4.1).

    Plain torch: a `grid_sample` for each level.
    """

    def __init__(self, dim: int, num_heads: int, num_levels: int, num_points: int):
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.sampling_offsets = nn.Linear(dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self._start()

    def _start(self) -> None:
        # every head looks in another direction, every point a step farther
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions = directions / directions.abs().max(-1, keepdim=True).values
        steps = torch.arange(1, self.num_points + 1)
        offsets = directions[:, None, None] * steps[:, None]
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, boxes: Tensor, memory: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Read `memory` around boxes.

        Args:
            x: (B, Q, C) queries, positions added.
            boxes: (B, Q, 4) centres and sides in 0..1.
            memory: (B, N, C), the cells of all maps, finest map first, rows first.
            sizes: height and width of each map.

        Returns:
            (B, Q, C).
        """
        B, Q, _ = x.shape
        H, L, P = self.num_heads, self.num_levels, self.num_points
        offsets = self.sampling_offsets(x).view(B, Q, H, L, P, 2)
        weights = self.attention_weights(x).view(B, Q, H, L * P).softmax(-1)
        centre, side = boxes[:, :, None, None, None].split(2, dim=-1)
        points = 2 * (centre + offsets * (side * (0.5 / P))) - 1  # -1..1 over the map
        points = points.permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, B * H, Q, P, 2)
        # in the precision of the boxes: half of it would move a point by several pixels
        value = self.value_proj(memory).to(points.dtype).transpose(1, 2).unflatten(1, (H, -1)).contiguous()
        read = []
        for (h, w), level, grid in zip(sizes, value.split([h * w for h, w in sizes], dim=-1), points):
            level = level.reshape(B * H, -1, h, w)
            read.append(F.grid_sample(level, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
        weights = weights.transpose(1, 2).reshape(B * H, 1, Q, L * P)
        out = (torch.cat(read, dim=-1) * weights).sum(-1)  # (B * H, C / H, Q)
        return self.output_proj(out.view(B, -1, Q).transpose(1, 2).to(x.dtype))


class Mlp(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int):
        super().__init__()
        sides = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
        self.layers = nn.ModuleList(nn.Linear(n, k) for n, k in pairwise(sides))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_dim) -> (..., out_dim)."""
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        return last(x)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """log(x / (1 - x)) for x in 0..1, both sides kept above `eps`."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
