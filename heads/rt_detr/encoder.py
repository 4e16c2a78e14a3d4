"""The hybrid encoder: attention within the coarsest map, convolutions between maps (arXiv 2304.08069, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.heads.rt_detr.layers import ConvNorm, CspLayer, SelfAttention


def sine_positions(h: int, w: int, dim: int, like: Tensor, temperature: float = 10000.0) -> Tensor:
    """(1, h * w, dim): sines and cosines of the row, then of the column."""
    omega = torch.arange(dim // 4, dtype=torch.float64, device=like.device) / (dim // 4)
    omega = temperature**-omega
    rows = torch.arange(h, dtype=torch.float64, device=like.device)[:, None] * omega
    columns = torch.arange(w, dtype=torch.float64, device=like.device)[:, None] * omega
    rows = torch.cat([rows.sin(), rows.cos()], dim=1)[:, None].expand(h, w, -1)
    columns = torch.cat([columns.sin(), columns.cos()], dim=1)[None].expand(h, w, -1)
    return torch.cat([rows, columns], dim=-1).reshape(1, h * w, -1).to(like.dtype)


class EncoderLayer(nn.Module):
    """Attention and an MLP, norms after the sums; (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int, num_heads: int, ffn_dim: int):
        super().__init__()
        self.attn = SelfAttention(dim, num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """(B, N, C), and positions to add to queries and keys."""
        x = self.norm1(x + self.attn(x, position))
        return self.norm2(x + self.fc2(F.gelu(self.fc1(x))))


class HybridEncoder(nn.Module):
    """Maps of any width at three strides to maps of `dim` channels that know of each other.

    Args:
        in_channels: of the backbone's maps, finest first.
        dim: channels inside and of the result.
        num_heads, ffn_dim, num_layers: of the attention within the coarsest map.
        expansion: width of the convolution blocks.
        depth: blocks in each fusion.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        dim: int,
        num_heads: int,
        ffn_dim: int,
        num_layers: int,
        expansion: float,
        depth: int,
    ):
        super().__init__()
        if dim % 4:
            raise ValueError(f"hidden_dim={dim}, expected a multiple of 4")
        self.input_proj = nn.ModuleList(ConvNorm(c, dim, 1, act=False) for c in in_channels)
        self.layers = nn.ModuleList(EncoderLayer(dim, num_heads, ffn_dim) for _ in range(num_layers))
        steps = len(in_channels) - 1
        self.lateral_convs = nn.ModuleList(ConvNorm(dim, dim, 1) for _ in range(steps))
        self.fpn_blocks = nn.ModuleList(CspLayer(2 * dim, dim, depth, expansion) for _ in range(steps))
        self.downsample_convs = nn.ModuleList(ConvNorm(dim, dim, 3, stride=2) for _ in range(steps))
        self.pan_blocks = nn.ModuleList(CspLayer(2 * dim, dim, depth, expansion) for _ in range(steps))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, in_channels, h, w), finest first -> (B, dim, h, w) each."""
        maps = [project(m) for project, m in zip(self.input_proj, maps, strict=True)]
        if len(self.layers):
            B, C, h, w = maps[-1].shape
            x = maps[-1].flatten(2).transpose(1, 2)
            position = sine_positions(h, w, C, x)
            for layer in self.layers:
                x = layer(x, position)
            maps[-1] = x.transpose(1, 2).reshape(B, C, h, w)

        down = [maps[-1]]  # coarse to fine
        for lateral, block, m in zip(self.lateral_convs, self.fpn_blocks, reversed(maps[:-1])):
            down[-1] = lateral(down[-1])
            # to the size of the map, which is twice this one's or a cell less
            up = F.interpolate(down[-1], size=m.shape[-2:], mode="nearest")
            down.append(block(torch.cat([up, m], dim=1)))
        down.reverse()

        out = [down[0]]  # fine to coarse
        for shrink, block, m in zip(self.downsample_convs, self.pan_blocks, down[1:]):
            out.append(block(torch.cat([shrink(out[-1]), m], dim=1)))
        return out
