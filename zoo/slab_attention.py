"""Simplified linear attention, and the attention of DeiT and PVT; that of Swin and CSwin is in `slab_windows.py`.

Maps are (B, H, W, C) throughout. Simplified linear attention (SLA) adds a position table P to the keys and a
depthwise convolution of the values, whose kernel all heads share, to the result:

    y = relu(q) (relu(k + P)^T v) / (relu(q) . sum relu(k + P) + 1e-6) + conv(v),    out = proj(y)

P belongs to a grid of tokens and is resampled for any other (bicubic). Attention that folds has
`absorb(norm)`: it merges the norm before it into its own layers and returns what takes the norm's place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import use_fused_attn
from timm.models import register_notrace_module
from torch import Tensor, nn

from zoo.kernels.attention import attention, reference, resize_relative_table
from zoo.kernels.linear_attention import linear_attention
from zoo.prepbn import PRepBN, RepBN, fold_into_conv, fold_into_linear


def resample_position(table: Tensor, grid: tuple[int, int], h: int, w: int) -> Tensor:
    """A position table (1, N, C) of a grid of N tokens for h x w tokens: bicubic, as the authors' loader does."""
    if grid[0] == h and grid[1] == w:
        return table
    maps = table.reshape(1, grid[0], grid[1], -1).permute(0, 3, 1, 2)
    wide = maps.float() if maps.dtype == torch.float16 or maps.dtype == torch.bfloat16 else maps
    wide = F.interpolate(wide, size=[h, w], mode="bicubic", align_corners=False)
    return wide.to(table.dtype).flatten(2).transpose(1, 2)


def resample_relative(table: Tensor, grid: tuple[int, int], h: int, w: int) -> Tensor:
    """A table of relative positions ((2h-1)(2w-1), heads) of one window for another: bicubic, likewise."""
    if grid[0] == h and grid[1] == w:
        return table
    maps = table.t().reshape(-1, 2 * grid[0] - 1, 2 * grid[1] - 1)
    return resize_relative_table(maps, h, w).flatten(1).t()


def replace_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Give `module` another tensor as its parameter `name`; frozen stays frozen."""
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value.detach().clone(), requires_grad=old.requires_grad))


def heads_first(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) -> (B, heads, N, C / heads), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def depthwise(v: Tensor, h: int, w: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise convolution with zero padding of (B, h w, C) tokens as maps; channels-last, without copies."""
    maps = v.contiguous().view(v.shape[0], h, w, v.shape[2]).permute(0, 3, 1, 2)
    y = F.conv2d(maps, weight, bias, padding=weight.shape[-1] // 2, groups=v.shape[2])
    return y.permute(0, 2, 3, 1).flatten(1, 2)


def simplified_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, h: int, w: int, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Linear attention and depthwise convolution of (B, N, C) tokens; `k` has the position table added."""
    y = linear_attention(heads_first(q, heads), heads_first(k, heads), heads_first(v, heads))
    return y.transpose(1, 2).flatten(2) + depthwise(v, h, w, weight, bias)


def shared_kernel(weight: Tensor, bias: Tensor | None, heads: int) -> tuple[Tensor, Tensor | None]:
    """The kernel of one head's channels, repeated for every head."""
    return weight.repeat(heads, 1, 1, 1), None if bias is None else bias.repeat(heads)


# DeiT's softmax attention


@register_notrace_module
class Attention(nn.Module):
    """Softmax attention of all tokens: (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(f"width {dim} cannot be split into {num_heads} heads: pass a divisor of it as num_heads")
        self.num_heads = num_heads
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    @torch.jit.ignore
    def absorb(self, norm: nn.Module) -> nn.Module:
        """Merge the norm before `qkv` into it."""
        return fold_into_linear(norm, self.qkv)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = attention(q, k, v) if self.fused_attn else reference(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


# PVT


class _SpatialReduction(nn.Module):
    """What PVT's two kinds of attention share: keys and values from a map that a strided convolution reduces.

    Args:
        dim: width.
        num_heads: heads.
        sr_ratio: stride of the reduction; 1: none.
        qkv_bias: bias of query, key and value.
        norm_layer: the norm after the reduction.
    """

    def __init__(self, dim: int, num_heads: int, sr_ratio: int, qkv_bias: bool, norm_layer, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(f"width {dim} cannot be split into {num_heads} heads: pass a divisor of it as num_heads")
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio, **dd) if sr_ratio > 1 else nn.Identity()
        self.norm = norm_layer(dim, **dd) if sr_ratio > 1 else nn.Identity()
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W, C) -> keys and values (B, N, C) of the reduced map."""
        if self.sr_ratio > 1:
            if min(x.shape[1], x.shape[2]) < self.sr_ratio:
                raise ValueError(
                    f"a map of {x.shape[1]}x{x.shape[2]} tokens is smaller than the {self.sr_ratio}x{self.sr_ratio} "
                    "kernel that reduces it: pass a larger image (from 32 px on) or smaller sr_ratios"
                )
            x = self.norm(self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        k, v = self.kv(x).flatten(1, 2).chunk(2, dim=-1)
        return k, v

    @torch.jit.ignore
    def absorb(self, norm: nn.Module) -> nn.Module:
        """Merge the norm before the layer into `q` and whatever else reads it."""
        if self.sr_ratio == 1:
            return fold_into_linear(norm, self.q, self.kv)
        folded = fold_into_linear(norm, self.q)
        if folded is not norm:
            fold_into_conv(norm, self.sr)
        return folded

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Merge the norm after the reduction into `kv`."""
        if isinstance(self.norm, PRepBN | RepBN):
            self.norm = fold_into_linear(self.norm, self.kv)


@register_notrace_module
class SpatialReductionAttention(_SpatialReduction):
    """PVT's attention, softmax over the keys of a reduced map: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, num_heads: int, sr_ratio: int, qkv_bias: bool, norm_layer, device=None, dtype=None):
        super().__init__(dim, num_heads, sr_ratio, qkv_bias, norm_layer, device=device, dtype=dtype)
        self.fused_attn = use_fused_attn()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        q = heads_first(self.q(x).flatten(1, 2), self.num_heads)
        k, v = self.key_value(x)
        k, v = heads_first(k, self.num_heads), heads_first(v, self.num_heads)
        y = attention(q, k, v) if self.fused_attn else reference(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(x.shape))


@register_notrace_module
class SpatialReductionLinearAttention(_SpatialReduction):
    """SLA over the keys of a map, reduced if `sr_ratio` > 1: (B, H, W, C) -> (B, H, W, C).

    Values of a reduced map are stretched along the token axis before the depthwise convolution, as in the
    authors' code.

    Args:
        dim: width.
        num_heads: heads.
        sr_ratio: stride of the reduction; 1: none.
        qkv_bias: bias of query, key and value.
        norm_layer: the norm after the reduction.
        grid: the map that the position table is made for; other maps resample it in each call.
        kernel_size: of the depthwise convolution.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int,
        qkv_bias: bool,
        norm_layer,
        grid: tuple[int, int],
        kernel_size: int = 5,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, sr_ratio, qkv_bias, norm_layer, **dd)
        self.grid = (grid[0] // sr_ratio, grid[1] // sr_ratio)  # of the keys
        self.positional_encoding = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], dim, **dd))
        channels = dim // num_heads
        self.dwc = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, **dd)

    @torch.jit.ignore
    def reset_tables(self) -> None:
        """The position table as new."""
        nn.init.zeros_(self.positional_encoding)

    @torch.jit.ignore
    def set_grid(self, h: int, w: int) -> None:
        """Make the position table for another map."""
        grid = (h // self.sr_ratio, w // self.sr_ratio)
        table = resample_position(self.positional_encoding, self.grid, grid[0], grid[1])
        replace_parameter(self, "positional_encoding", table)
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        H, W, heads = x.shape[1], x.shape[2], self.num_heads
        q = self.q(x).flatten(1, 2)
        k, v = self.key_value(x)
        k = k + resample_position(self.positional_encoding, self.grid, H // self.sr_ratio, W // self.sr_ratio)
        weight, bias = shared_kernel(self.dwc.weight, self.dwc.bias, heads)
        if self.sr_ratio == 1:
            y = simplified_attention(q, k, v, heads, H, W, weight, bias)
        else:
            y = linear_attention(heads_first(q, heads), heads_first(k, heads), heads_first(v, heads))
            stretched = F.interpolate(v.transpose(1, 2), size=H * W, mode="linear").transpose(1, 2)
            y = y.transpose(1, 2).flatten(2) + depthwise(stretched, H, W, weight, bias)
        return self.proj(y.view(x.shape))
