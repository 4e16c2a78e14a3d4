"""What surrounds attention in SLAB's hosts: blocks, MLPs, downsampling and position tables."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from timm.models import register_notrace_function
from torch import Tensor, nn

from zoo.prepbn import PRepBN, RepBN, fold_into_linear, fold_out_of_conv


def resample_map_position(table: Tensor, grid: tuple[int, int], h: int, w: int, first: bool) -> Tensor:
    """PVT's position table (1, N, C) of a grid of N tokens for h x w tokens: bilinear, as in the authors' code.

    Which keeps the first stage's table as it is where another grid has as many tokens.
    """
    if (grid[0] == h and grid[1] == w) or (first and grid[0] * grid[1] == h * w):
        return table
    maps = table.reshape(1, grid[0], grid[1], -1).permute(0, 3, 1, 2)
    wide = maps.float() if maps.dtype == torch.float16 or maps.dtype == torch.bfloat16 else maps
    wide = F.interpolate(wide, size=[h, w], mode="bilinear", align_corners=False)
    return wide.to(table.dtype).flatten(2).transpose(1, 2)


@register_notrace_function
def add_map_position(x: Tensor, table: Tensor, grid: tuple[int, int], first: bool) -> Tensor:
    """(B, H, W, C) plus a position table (1, N, C) of another grid or the same."""
    table = resample_map_position(table, grid, x.shape[1], x.shape[2], first)
    return x + table.view(1, x.shape[1], x.shape[2], x.shape[3])


@register_notrace_function
def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """(B, C, H, W) with zeros below and to the right, up to multiples of a size."""
    bottom, right = (-x.shape[2]) % multiple, (-x.shape[3]) % multiple
    return F.pad(x, [0, right, 0, bottom]) if bottom > 0 or right > 0 else x


class ConvMlp(nn.Module):
    """PVTv2's MLP, with a depthwise 3x3 convolution before the activation: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        x = self.dwconv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.drop(self.fc2(self.drop(self.act(x))))


class Block(nn.Module):
    """x + attn(norm(x)), then x + mlp(norm(x)), with stochastic depth; any axes before the channels.

    Args:
        dim: width.
        attn: the attention.
        mlp_ratio: hidden width of the MLP, relative.
        conv_mlp: PVTv2's MLP, for maps.
        drop: dropout in the MLP.
        drop_path: stochastic depth.
        norm_layer: PRepBN, RepBN or another norm over the last axis.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        conv_mlp: bool = False,
        drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer=PRepBN,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.dim = dim
        hidden = int(dim * mlp_ratio)
        self.norm1 = norm_layer(dim, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim, **dd)
        self.mlp = ConvMlp(dim, hidden, drop, **dd) if conv_mlp else Mlp(dim, hidden, drop=drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Merge both norms into the layers that read them."""
        if isinstance(self.norm1, PRepBN | RepBN):
            self.norm1 = self.attn.absorb(self.norm1)
        self.norm2 = fold_into_linear(self.norm2, self.mlp.fc1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class ConvNorm(nn.Module):
    """A convolution and a norm: NCHW maps, channels-last in memory.

    Args:
        in_chans: channels in.
        dim: channels out.
        kernel_size: of the convolution.
        stride: of the convolution.
        padding: of the convolution.
        whole_patches: pad the map below and to the right to a multiple of the stride.
        norm_layer: norm over the channels; None: no norm.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        kernel_size: int,
        stride: int,
        padding: int = 0,
        whole_patches: bool = False,
        norm_layer=PRepBN,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_chans, dim, kernel_size, stride=stride, padding=padding, **dd)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(dim, **dd)
        self.multiple = stride if whole_patches else 1

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Merge the norm into the convolution."""
        self.norm = fold_out_of_conv(self.conv, self.norm)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C, H', W')."""
        x = pad_to_multiple(x, self.multiple)
        return self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PatchMerging(nn.Module):
    """Swin's downsampling: the four tokens of a 2x2 patch, a norm, a linear layer; NCHW maps."""

    def __init__(self, dim: int, norm_layer=PRepBN, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = norm_layer(4 * dim, **dd)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False, **dd)

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Merge the norm into the linear layer, which gains a bias."""
        self.norm = fold_into_linear(self.norm, self.reduction)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 2 C, ceil(H / 2), ceil(W / 2))."""
        x = pad_to_multiple(x, 2).permute(0, 2, 3, 1)
        x = x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x)).permute(0, 3, 1, 2)


def init_weights(module: nn.Module) -> None:
    """Initialise a module of its own as the authors do: for `model.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, PRepBN | RepBN | nn.LayerNorm | nn.Conv2d):
        module.reset_parameters()
    elif hasattr(module, "reset_tables"):
        module.reset_tables()
