"""The blocks of FcaFormer: patch merging, ConvNeXt blocks, cross attention, windows and stages.

Maps between blocks are channels-last, (B, H, W, C): the linear layers and norms take them as they are, the
depthwise convolutions through a permuted view, so that nothing is copied.
"""

from collections import OrderedDict

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, Mlp, register_notrace_function, trunc_normal_, use_fused_attn
from timm.models import checkpoint, checkpoint_seq
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from zoo.kernels.attention import (
    attention,
    mirror_offsets,
    reference,
    relative_bias,
    resize_maps,
    resize_relative_table,
)

MERGE = 4  # stride of the convolution that makes cross tokens
LN_EPS = 1e-5  # of the transformer stages and the head; ConvNeXt blocks and dense outputs use 1e-6


class ConvNorm(nn.Module):
    """Convolution without bias, then batch norm: (B, C, H, W) -> (B, out, H / stride, W / stride), rounded up."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        eps: float = 1e-5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        pad = kernel_size // 2
        self.conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, pad, groups=groups, bias=False, **dd)
        self.bn = nn.BatchNorm2d(out_chs, eps=eps, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out, H', W')."""
        return self.bn(self.conv(x))

    def fuse(self) -> nn.Conv2d:
        """One convolution with bias that computes the same in eval mode."""
        fused = fuse_conv_bn_eval(self.conv.eval(), self.bn.eval())
        # maps are channels-last: weights of another layout would be converted in each call
        return fused.to(memory_format=torch.channels_last)


class PatchMerging(nn.Sequential):
    """1x1, depthwise 3x3 of stride 2, 1x1: (B, C, H, W) -> (B, out, ceil(H/2), ceil(W/2))."""

    def __init__(self, in_chs: int, out_chs: int, device=None, dtype=None):
        dd = {"device": device, "dtype": dtype}
        layers = OrderedDict(
            conv1=ConvNorm(in_chs, out_chs, 1, **dd),
            act1=nn.GELU(),
            conv2=ConvNorm(out_chs, out_chs, 3, stride=2, groups=out_chs, **dd),
            act2=nn.GELU(),
            conv3=ConvNorm(out_chs, out_chs, 1, **dd),
        )
        super().__init__(layers)


class CxBlock(nn.Module):
    """ConvNeXt block on channels-last maps: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, mlp_ratio: float, init_values: float, drop_path: float, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv_dw = nn.Conv2d(dim, dim, 7, padding=3, groups=dim, **dd)
        self.norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.ls = LayerScale(dim, init_values, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        y = self.conv_dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.drop_path(self.ls(self.mlp(self.norm(y))))

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold the layer scale into the MLP."""
        self.ls = _fold_scale(self.ls, self.mlp.fc2)


class CrossAttention(nn.Module):
    """Attention over the tokens of a map and over cross tokens of earlier blocks, in one softmax.

    The logits of a pair of tokens get a learned bias that depends on the absolute offsets of their rows and
    columns, those of a cross token one that depends on this token alone.

    Args:
        dim: width C.
        num_heads: number of heads.
        grid_size: (h, w) of the map that the position tables are made for; other sizes resample them.
        num_sources: earlier blocks whose cross tokens are read.
    """

    fused_attn: torch.jit.Final[bool]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid_size: tuple[int, int],
        num_sources: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(f"dim={dim} cannot be split into num_heads={num_heads}: pass a divisor of dim")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.offset_bias = nn.Parameter(torch.empty(num_heads, *grid_size, **dd))
        if num_sources:
            merged = merged_size(*grid_size)
            self.cross_scale = nn.Parameter(torch.empty(num_sources, *merged, **dd))
            self.cross_bias = nn.Parameter(torch.empty(num_heads, num_sources, *merged, **dd))
            self.cross_norm = nn.LayerNorm(dim, eps=LN_EPS, **dd)
        else:
            self.register_parameter("cross_scale", None)
            self.register_parameter("cross_bias", None)
            self.cross_norm = None
        self.register_buffer("bias", None, persistent=False)  # the dense bias of the inference form
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Position tables and biases 0, scale factors 1."""
        nn.init.zeros_(self.offset_bias)
        if self.cross_scale is not None:
            nn.init.ones_(self.cross_scale)
            nn.init.zeros_(self.cross_bias)

    def forward(self, x: Tensor, cross: Tensor | None = None) -> Tensor:
        """(B, H, W, C) and cross tokens (B, sources * ceil(H/4) * ceil(W/4), C) -> (B, H, W, C)."""
        B, H, W, C = x.shape
        qkv = self.qkv(x).reshape(B, H * W, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, N, head_dim)
        k2: Tensor | None = None
        v2: Tensor | None = None
        key_bias2: Tensor | None = None
        if cross is not None and self.cross_norm is not None:
            scale = resized_cross(self.cross_scale.unsqueeze(0), H, W).transpose(0, 1)
            cross = self.cross_norm(cross * scale)  # the scale comes first: mostly its sign survives
            kv = F.linear(cross, self.qkv.weight[C:], self.qkv.bias[C:])  # the queries would not be used
            kv = kv.reshape(B, -1, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
            if self.bias is None:
                k2, v2 = kv[0], kv[1]
                key_bias2 = resized_cross(self.cross_bias, H, W)
            else:
                k, v = torch.cat([k, kv[0]], dim=2), torch.cat([v, kv[1]], dim=2)
        bias: Tensor | None = None
        table: Tensor | None = None
        if self.bias is None:
            table = offset_table(self.offset_bias, H, W)
        else:
            bias = kept_bias(self.bias, self.offset_bias, self.cross_bias, H, W)
        if self.fused_attn:
            x = attention(q, k, v, bias=bias, scale=self.scale, k2=k2, v2=v2, key_bias2=key_bias2, table=table)
        else:
            x = reference(q, k, v, bias=bias, scale=self.scale, k2=k2, v2=v2, key_bias2=key_bias2, table=table)
        return self.proj(x.transpose(1, 2).reshape(B, H, W, C))

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold the scale of the logits into the queries and keep the dense bias, (heads, N, N + K)."""
        queries = self.qkv.weight.shape[1]
        self.qkv.weight[:queries] *= self.scale
        self.qkv.bias[:queries] *= self.scale
        self.scale = 1.0
        self.bias = whole_bias(self.offset_bias, self.cross_bias, *self.offset_bias.shape[1:])

    @torch.no_grad()
    def set_grid_size(self, h: int, w: int) -> None:
        """Resample the position tables in place for maps of h x w."""
        for name, table in list(self.named_parameters(recurse=False)):
            resized = resize_table(name, table, h, w)
            setattr(self, name, nn.Parameter(resized, requires_grad=table.requires_grad))
        if self.bias is not None:
            self.bias = whole_bias(self.offset_bias, self.cross_bias, h, w)


class FcaBlock(nn.Module):
    """Cross attention, token merging and enhancement, MLP: (B, H, W, C) -> (B, H, W, C) and cross tokens.

    Args:
        dim: width C.
        num_heads: number of heads.
        grid_size: map size that the position tables are made for.
        num_sources: earlier blocks whose cross tokens are read.
        merge: make cross tokens for later blocks.
        mlp_ratio: hidden width of the MLP in units of `dim`.
        init_values: initial layer scale.
        drop_path: stochastic depth rate.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid_size: tuple[int, int],
        num_sources: int = 0,
        merge: bool = True,
        mlp_ratio: float = 4.0,
        init_values: float = 1e-6,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, eps=LN_EPS, **dd)
        self.attn = CrossAttention(dim, num_heads, grid_size, num_sources, **dd)
        self.ls1 = LayerScale(dim, init_values, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.merge_conv = nn.Conv2d(dim, dim, 7, MERGE, 3, groups=dim, bias=False, **dd) if merge else None
        self.local_conv = ConvNorm(dim, dim, 3, groups=dim, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=LN_EPS, **dd)
        self.norm3 = nn.LayerNorm(dim, eps=LN_EPS, **dd)  # the official MLP begins with a norm of its own
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.ls2 = LayerScale(dim, init_values, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, cross: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The new map and, unless this is a stage's last block, its cross tokens (B, H/4 * W/4, C)."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), cross)))
        x = x.permute(0, 3, 1, 2)
        merged = self.merge_conv(x).flatten(2).transpose(1, 2) if self.merge_conv is not None else None
        x = self.local_conv(x).permute(0, 2, 3, 1)  # no residual around it
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm3(self.norm2(x)))))
        return x, merged

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold the layer scales into the projections before them."""
        self.ls1 = _fold_scale(self.ls1, self.attn.proj)
        self.ls2 = _fold_scale(self.ls2, self.mlp.fc2)


def _fold_scale(scale: nn.Module, linear: nn.Linear) -> nn.Module:
    if isinstance(scale, LayerScale):
        linear.weight *= scale.gamma.unsqueeze(1)
        linear.bias *= scale.gamma
    return nn.Identity()


def merged_size(h: int, w: int, stride: int = MERGE) -> tuple[int, int]:
    """Size of the map of cross tokens that a block makes of a map of h x w."""
    return (h + stride - 1) // stride, (w + stride - 1) // stride


# What branches on a map's size lies in functions that tracers take as they are (their names have no underscore
# because torch.fx looks for public names only).


@torch.fx.wrap
@register_notrace_function
def resized_cross(maps: Tensor, h: int, w: int) -> Tensor:
    """(C, sources, h0, w0) -> (C, sources * ceil(h/4) * ceil(w/4))."""
    h, w = merged_size(h, w)
    if maps.shape[2] != h or maps.shape[3] != w:
        maps = resize_maps(maps.flatten(0, 1), h, w).reshape(maps.shape[0], maps.shape[1], h, w)
    return maps.flatten(1)


@torch.fx.wrap
@register_notrace_function
def offset_table(offset_bias: Tensor, h: int, w: int) -> Tensor:
    """(heads, h0, w0) over absolute offsets -> (heads, 2h-1, 2w-1) over signed ones."""
    table = mirror_offsets(offset_bias)
    if offset_bias.shape[1] != h or offset_bias.shape[2] != w:
        table = resize_relative_table(table, h, w)
    return table


def whole_bias(offset_bias: Tensor, cross_bias: Tensor | None, h: int, w: int) -> Tensor:
    """Bias of all keys, (heads, N, N + K)."""
    bias = relative_bias(offset_table(offset_bias, h, w))
    if cross_bias is not None:
        per_key = resized_cross(cross_bias, h, w).unsqueeze(1).expand(-1, bias.shape[1], -1)
        bias = torch.cat([bias, per_key], dim=2)
    return bias


@torch.fx.wrap
@register_notrace_function
def kept_bias(bias: Tensor, offset_bias: Tensor, cross_bias: Tensor | None, h: int, w: int) -> Tensor:
    """The inference form's dense bias, computed anew for a map of another size."""
    if offset_bias.shape[1] == h and offset_bias.shape[2] == w:
        return bias
    return whole_bias(offset_bias, cross_bias, h, w)


def resize_table(name: str, table: Tensor, h: int, w: int) -> Tensor:
    """The position table called `name` of a block, for a map of h x w."""
    if name == "offset_bias":
        return resize_relative_table(mirror_offsets(table), h, w)[:, h - 1 :, w - 1 :].contiguous()
    maps = table.reshape(-1, *table.shape[-2:])
    return resize_maps(maps, *merged_size(h, w)).reshape(*table.shape[:-2], *merged_size(h, w))


@torch.fx.wrap
@register_notrace_function
def to_windows(x: Tensor, size: int, index: int) -> Tensor:
    """(B, H, W, C) -> (B * windows, size, size, C), zeros at the top left for even blocks, else below."""
    h, w = (size - x.shape[1] % size) % size, (size - x.shape[2] % size) % size
    if h + w > 0:
        x = F.pad(x, [0, 0, w, 0, h, 0] if index % 2 == 0 else [0, 0, 0, w, 0, h])
    B, H, W, C = x.shape
    x = x.reshape(B, H // size, size, W // size, size, C).transpose(2, 3)
    return x.reshape(-1, size, size, C)


@torch.fx.wrap
@register_notrace_function
def from_windows(x: Tensor, size: int, index: int, h: int, w: int) -> Tensor:
    """The inverse of `to_windows`: (B * windows, size, size, C) -> (B, h, w, C)."""
    rows, columns, C = (h + size - 1) // size, (w + size - 1) // size, x.shape[3]
    x = x.reshape(-1, rows, columns, size, size, C).transpose(2, 3).reshape(-1, rows * size, columns * size, C)
    top, left = (rows * size - h, columns * size - w) if index % 2 == 0 else (0, 0)
    return x[:, top : top + h, left : left + w]


@torch.fx.wrap
@register_notrace_function
def shift_windows(x: Tensor, size: int, index: int, h: int, w: int) -> Tensor:
    """Windows as block `index - 1` left them -> windows as block `index` wants them."""
    if h % size == 0 and w % size == 0:
        return x
    return to_windows(from_windows(x, size, index - 1, h, w), size, index)


class ConvStage(nn.Module):
    """Downsampling, then ConvNeXt blocks: (B, C, H, W) -> (B, dim, H', W')."""

    def __init__(self, downsample: nn.Module, blocks: list[CxBlock]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, dim, H', W')."""
        x = self.downsample(x).permute(0, 2, 3, 1)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x.permute(0, 3, 1, 2)


class CrossStage(nn.Module):
    """Downsampling, then Fca blocks that read the cross tokens of up to `max_sources` earlier ones.

    With `window` the blocks see square windows of this size alone; where the map is not a multiple of it, the
    padding alternates between the top left and the bottom right, which moves the windows.
    """

    def __init__(self, downsample: nn.Module, blocks: list[FcaBlock], max_sources: int, window: int = 0):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.max_sources = max_sources
        self.window = window
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, dim, H', W')."""
        x = self.downsample(x).permute(0, 2, 3, 1)
        h, w = x.shape[1], x.shape[2]
        if self.window > 0:
            x = to_windows(x, self.window, 0)
        cross: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if self.window > 0 and i > 0:
                x = shift_windows(x, self.window, i, h, w)
            sources: Tensor | None = None
            if len(cross) > 0 and self.max_sources > 0:
                sources = torch.cat(cross[-self.max_sources :], dim=1)  # the oldest first
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x, merged = checkpoint(block, x, sources)
            else:
                x, merged = block(x, sources)
            if merged is not None:
                cross.append(merged)
        if self.window > 0:
            x = from_windows(x, self.window, len(self.blocks) - 1, h, w)
        return x.permute(0, 3, 1, 2)


def init_weights(module: nn.Module) -> None:
    """Truncated normal (std 0.02) for convolutions and linear layers, and each table's own start."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d | LayerScale | CrossAttention):
        module.reset_parameters()
