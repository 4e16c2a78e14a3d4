"""Attention within parts of a map: Swin's windows and CSwin's stripes, linear and softmax.

Maps are (B, H, W, C). Linear attention in one window as large as the map is also that of SLAB-DeiT.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import use_fused_attn
from timm.models import register_notrace_module
from torch import Tensor, nn

from zoo.kernels.attention import attention, reference, relative_bias
from zoo.prepbn import fold_into_linear
from zoo.slab_attention import (
    depthwise,
    heads_first,
    replace_parameter,
    resample_position,
    resample_relative,
    shared_kernel,
    simplified_attention,
)


def split_windows(x: Tensor, h: int, w: int) -> Tensor:
    """(B, H, W, C) -> (B * windows, h w, C); a view if there is one window."""
    B, H, W, C = x.shape
    if h == H and w == W:
        return x.reshape(B, h * w, C)
    return x.view(B, H // h, h, W // w, w, C).transpose(2, 3).reshape(-1, h * w, C)


def join_windows(x: Tensor, h: int, w: int, H: int, W: int) -> Tensor:
    """(B * windows, h w, C) -> (B, H, W, C), the inverse of `split_windows`."""
    if h == H and w == W:
        return x.view(-1, H, W, x.shape[-1])
    return x.view(-1, H // h, W // w, h, w, x.shape[-1]).transpose(2, 3).reshape(-1, H, W, x.shape[-1])


def pad_map(x: Tensor, H: int, W: int, fill: Tensor | None) -> Tensor:
    """(B, h, w, C) with rows and columns of the vector `fill` (zeros if None) added below and to the right."""
    bottom, right = H - x.shape[1], W - x.shape[2]
    if fill is None:
        return F.pad(x, [0, 0, 0, right, 0, bottom])
    B, h, _, C = x.shape
    x = torch.cat([x, fill.to(x.dtype).expand(B, h, right, C)], dim=2)
    return torch.cat([x, fill.to(x.dtype).expand(B, bottom, W, C)], dim=1)


# Swin (and, with one window, DeiT)


class _Windows(nn.Module):
    """What Swin's two kinds of attention share: query, key and value in windows of a map.

    A window never exceeds the shorter side of the map; on a map of its size or less nothing is shifted. Where
    the map does not fill whole windows, it is padded below and to the right with tokens that are zero after the
    norm, so their query, key and value are the bias of `qkv`, and that is what is filled in.

    Args:
        dim: width.
        num_heads: heads.
        grid: the map that tables are made for.
        window_size: largest side of a window; 0: the window is the map.
        shifted: move the windows by half their size.
        fixed: the authors' dense backbones: windows are always `window_size`, and always shifted if `shifted`.
        balanced: choose the side that covers the map with as many windows and the least padding.
        qkv_bias: bias in `qkv`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        window_size: int,
        shifted: bool = False,
        fixed: bool = False,
        balanced: bool = False,
        qkv_bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % num_heads:
            raise ValueError(f"width {dim} cannot be split into {num_heads} heads: pass a divisor of it as num_heads")
        self.num_heads = num_heads
        self.window_size = window_size
        self.shifted = shifted
        self.fixed = fixed
        self.balanced = balanced
        h, w, _, _ = self.geometry(grid[0], grid[1])
        self.window = (h, w)  # of the table
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.register_buffer("pad_qkv", None)  # the bias of `qkv` as trained, once a norm is folded into it

    def geometry(self, H: int, W: int) -> tuple[int, int, int, int]:
        """Height and width of the windows of an H x W map, and their shift."""
        if self.window_size == 0:
            return H, W, 0, 0
        h = w = self.window_size
        shifted = self.shifted
        if not self.fixed:
            h = w = min(self.window_size, min(H, W))
            shifted = shifted and min(H, W) > self.window_size
            if self.balanced:
                rows, columns = (H + h - 1) // h, (W + w - 1) // w
                h, w = (H + rows - 1) // rows, (W + columns - 1) // columns
        return h, w, h // 2 if shifted else 0, w // 2 if shifted else 0

    def windowed_qkv(self, x: Tensor, h: int, w: int, shift_h: int, shift_w: int) -> Tensor:
        """(B, H, W, C) -> (B, H', W', 3 C), padded to whole windows and rolled."""
        H, W = x.shape[1] + (-x.shape[1]) % h, x.shape[2] + (-x.shape[2]) % w
        if x.shape[1] == H and x.shape[2] == W:
            if shift_h > 0 or shift_w > 0:
                x = torch.roll(x, [-shift_h, -shift_w], [1, 2])  # a third of what rolling the result would move
            return self.qkv(x)
        qkv = pad_map(self.qkv(x), H, W, self.qkv.bias if self.pad_qkv is None else self.pad_qkv)
        return torch.roll(qkv, [-shift_h, -shift_w], [1, 2]) if shift_h > 0 or shift_w > 0 else qkv

    def project(self, y: Tensor, x: Tensor) -> Tensor:
        """Rolls the (B, H', W', C) result back, cuts it to the size of the input `x` and projects it."""
        _, _, shift_h, shift_w = self.geometry(x.shape[1], x.shape[2])
        if shift_h > 0 or shift_w > 0:
            y = torch.roll(y, [shift_h, shift_w], [1, 2])
        return self.proj(y[:, : x.shape[1], : x.shape[2]])

    @torch.jit.ignore
    def absorb(self, norm: nn.Module) -> nn.Module:
        """Merge the norm before `qkv` into it."""
        bias = None if self.qkv.bias is None else self.qkv.bias.detach().clone()
        folded = fold_into_linear(norm, self.qkv)
        if folded is not norm:
            self.pad_qkv = torch.zeros_like(self.qkv.bias).detach() if bias is None else bias
        return folded


@register_notrace_module
class WindowLinearAttention(_Windows):
    """SLA in windows: (B, H, W, C) -> (B, H, W, C). Windows of a shifted map are not masked.

    Args:
        dim: width.
        num_heads: heads.
        grid: the map that the position table is made for; other maps resample it in each call.
        window_size: largest side of a window; None: the window is the map.
        shifted: move the windows by half their size, if there are several.
        fixed: windows are always `window_size`, and always shifted if `shifted`.
        qkv_bias: bias of query, key and value.
        kernel_size: of the depthwise convolution.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        window_size: int | None = None,
        shifted: bool = False,
        fixed: bool = False,
        qkv_bias: bool = True,
        kernel_size: int = 5,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, grid, window_size or 0, shifted, fixed, True, qkv_bias, **dd)
        self.positional_encoding = nn.Parameter(torch.zeros(1, self.window[0] * self.window[1], dim, **dd))
        channels = dim // num_heads
        self.dwc = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, **dd)

    @torch.jit.ignore
    def reset_tables(self) -> None:
        """The position table as new."""
        nn.init.zeros_(self.positional_encoding)

    @torch.jit.ignore
    def set_grid(self, h: int, w: int) -> None:
        """Make the position table for another map."""
        window = self.geometry(h, w)[:2]
        table = resample_position(self.positional_encoding, self.window, window[0], window[1])
        replace_parameter(self, "positional_encoding", table)
        self.window = window

    def attend(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H', W', C): the padded and rolled map, before the projection."""
        h, w, shift_h, shift_w = self.geometry(x.shape[1], x.shape[2])
        qkv = self.windowed_qkv(x, h, w, shift_h, shift_w)
        q, k, v = split_windows(qkv, h, w).chunk(3, dim=-1)
        k = k + resample_position(self.positional_encoding, self.window, h, w)
        weight, bias = shared_kernel(self.dwc.weight, self.dwc.bias, self.num_heads)
        y = simplified_attention(q, k, v, self.num_heads, h, w, weight, bias)
        return join_windows(y, h, w, qkv.shape[1], qkv.shape[2])

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        return self.project(self.attend(x), x)


@register_notrace_module
class WindowAttention(_Windows):
    """Swin's attention: softmax in windows with a relative position bias: (B, H, W, C) -> (B, H, W, C).

    Tokens that come from opposite ends of a shifted map do not attend to each other.

    Args:
        dim: width.
        num_heads: heads.
        grid: the map that the position table is made for.
        window_size: largest side of a window.
        shifted: move the windows by half their size, if there are several.
        fixed: windows are always `window_size`, and always shifted if `shifted`.
        qkv_bias: bias of query, key and value.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        window_size: int = 7,
        shifted: bool = False,
        fixed: bool = False,
        qkv_bias: bool = True,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, grid, window_size, shifted, fixed, False, qkv_bias, **dd)
        self.fused_attn = use_fused_attn()
        entries = (2 * self.window[0] - 1) * (2 * self.window[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(entries, num_heads, **dd))

    @torch.jit.ignore
    def reset_tables(self) -> None:
        """The table of relative positions as new: truncated normal."""
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    @torch.jit.ignore
    def set_grid(self, h: int, w: int) -> None:
        """Make the table of relative positions for another map."""
        window = self.geometry(h, w)[:2]
        table = resample_relative(self.relative_position_bias_table, self.window, window[0], window[1])
        replace_parameter(self, "relative_position_bias_table", table)
        self.window = window

    def attend(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H', W', C): the padded and rolled map, before the projection."""
        h, w, shift_h, shift_w = self.geometry(x.shape[1], x.shape[2])
        qkv = self.windowed_qkv(x, h, w, shift_h, shift_w)
        B, H, W, C = qkv.shape[0], qkv.shape[1], qkv.shape[2], x.shape[3]
        rows, columns, heads = H // h, W // w, self.num_heads
        # one copy: (3, B, rows, columns, heads, h, w, d)
        qkv = qkv.view(B, rows, h, columns, w, 3, heads, C // heads).permute(5, 0, 1, 3, 6, 2, 4, 7).contiguous()
        table = resample_relative(self.relative_position_bias_table, self.window, h, w)
        bias = relative_bias(table.t().reshape(heads, 2 * h - 1, 2 * w - 1))
        if shift_h > 0 or shift_w > 0:
            # windows count as heads: their biases differ, those of the images in a batch do not
            mask = shift_mask(H, W, h, w, shift_h, shift_w, x.device)
            bias = torch.where(mask.unsqueeze(1), bias, torch.full_like(bias, float("-inf"))).flatten(0, 1)
            q, k, v = qkv.view(3, B, rows * columns * heads, h * w, C // heads).unbind(0)
        else:
            q, k, v = qkv.view(3, B * rows * columns, heads, h * w, C // heads).unbind(0)
        y = attention(q, k, v, bias=bias) if self.fused_attn else reference(q, k, v, bias=bias)
        y = y.reshape(B, rows, columns, heads, h, w, C // heads).permute(0, 1, 4, 2, 5, 3, 6)
        return y.reshape(B, H, W, C)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        return self.project(self.attend(x), x)


def shift_mask(
    H: int, W: int, h: int, w: int, shift_h: int, shift_w: int, device: torch.device | None = None
) -> Tensor:
    """Which tokens of each window of a rolled H x W map were neighbours before: (windows, h w, h w), bool."""
    row, column = torch.arange(H, device=device), torch.arange(W, device=device)
    row = (row >= H - h).long() + (row >= H - shift_h).long()
    column = (column >= W - w).long() + (column >= W - shift_w).long()
    region = split_windows((3 * row.unsqueeze(1) + column).view(1, H, W, 1), h, w).squeeze(-1)
    return region.unsqueeze(1) == region.unsqueeze(2)


# CSwin


@register_notrace_module
class Stripe(nn.Module):
    """Attention of some heads within stripes of a map: q, k, v (B, H, W, C) -> (B, H, W, C).

    A depthwise 3x3 convolution of the values (LePE) is added; zeros surround each stripe. Where stripes do not
    fit the map, tokens are added below or to the right that no token sees. A linear branch adds SLA's
    convolution to the same kernel, so both are one.

    Args:
        dim: channels of these heads.
        num_heads: heads.
        grid: the map that the position table is made for.
        rows: height of a stripe; 0: that of the map.
        columns: width of a stripe; 0: that of the map.
        linear: SLA instead of softmax attention.
        kernel_size: of SLA's depthwise convolution, odd, at least 3.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        rows: int = 0,
        columns: int = 0,
        linear: bool = False,
        kernel_size: int = 5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd and at least 3, the size of the other kernel")
        self.num_heads = num_heads
        self.rows, self.columns = rows, columns
        self.linear = linear
        self.fused_attn = use_fused_attn()
        self.grid = (rows or grid[0], columns or grid[1])  # of the position table
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        if linear:
            channels = dim // num_heads
            self.positional_encoding = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], dim, **dd))
            self.dwc = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, **dd)
        else:
            self.positional_encoding = None
            self.dwc = None

    @torch.jit.ignore
    def reset_tables(self) -> None:
        """The position table as new."""
        if self.positional_encoding is not None:
            nn.init.zeros_(self.positional_encoding)

    @torch.jit.ignore
    def set_grid(self, h: int, w: int) -> None:
        """Make the position table for another map."""
        grid = (self.rows or h, self.columns or w)
        if self.positional_encoding is not None:
            table = resample_position(self.positional_encoding, self.grid, grid[0], grid[1])
            replace_parameter(self, "positional_encoding", table)
        self.grid = grid

    def kernel(self) -> tuple[Tensor, Tensor | None]:
        """The depthwise convolution of the values: LePE, with SLA's shared kernel added."""
        weight, bias = self.get_v.weight, self.get_v.bias
        if self.dwc is not None:
            shared, shared_bias = shared_kernel(self.dwc.weight, self.dwc.bias, self.num_heads)
            weight = shared + F.pad(weight, [(shared.shape[-1] - 3) // 2] * 4)
            if bias is not None and shared_bias is not None:
                bias = bias + shared_bias
        return weight, bias

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, W, C) each, views of a wider tensor allowed -> (B, H, W, C)."""
        B, H, W, _ = q.shape
        h = self.rows if self.rows > 0 else H
        w = self.columns if self.columns > 0 else W
        padded_h, padded_w = H + (-H) % h, W + (-W) % w
        padded = padded_h != H or padded_w != W
        valid = torch.ones(0, device=q.device, dtype=torch.bool)
        if padded:
            q, k = pad_map(q, padded_h, padded_w, None), pad_map(k, padded_h, padded_w, None)
            v = pad_map(v, padded_h, padded_w, None)
            valid = pad_map(torch.ones(1, H, W, 1, device=q.device, dtype=q.dtype), padded_h, padded_w, None)
            valid = split_windows(valid, h, w).repeat(B, 1, 1)  # (B * stripes, h w, 1)
        q, k, v = split_windows(q, h, w), split_windows(k, h, w), split_windows(v, h, w)
        weight, bias = self.kernel()
        if self.positional_encoding is not None:
            k = k + resample_position(self.positional_encoding, self.grid, h, w)
            if padded:
                k = k * valid  # features of zero
            y = simplified_attention(q, k, v, self.num_heads, h, w, weight, bias)
        else:
            y = self.softmax(q, k, v, valid if padded else None) + depthwise(v, h, w, weight, bias)
        y = join_windows(y, h, w, padded_h, padded_w)
        return y[:, :H, :W] if padded else y

    def softmax(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Softmax attention of (B, N, C) tokens over the keys that are `valid`."""
        q, k, v = heads_first(q, self.num_heads), heads_first(k, self.num_heads), heads_first(v, self.num_heads)
        mask = None if valid is None else (valid > 0).unsqueeze(1).transpose(2, 3)
        y = attention(q, k, v, mask=mask) if self.fused_attn else reference(q, k, v, mask=mask)
        return y.transpose(1, 2).flatten(2)


class StripeAttention(nn.Module):
    """CSwin's attention: half of the heads in horizontal, half in vertical stripes, or all in the whole map.

    (B, H, W, C) -> (B, H, W, C).

    Args:
        dim: width.
        num_heads: heads.
        grid: the map that position tables are made for.
        split_size: width of the stripes; None: the whole map.
        linear: SLA instead of softmax attention.
        qkv_bias: bias of query, key and value.
        kernel_size: of SLA's depthwise convolution.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        split_size: int | None = None,
        linear: bool = False,
        qkv_bias: bool = True,
        kernel_size: int = 5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        branches = 1 if split_size is None else 2
        if dim % num_heads or num_heads % branches:
            raise ValueError(
                f"width {dim} and {num_heads} heads cannot be split into {branches} branches of whole heads: pass "
                f"num_heads that divide the width and are divisible by {branches}"
            )
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        common = dict(linear=linear, kernel_size=kernel_size, **dd)
        if split_size is None:
            stripes = [Stripe(dim, num_heads, grid, **common)]
        else:
            half = (dim // 2, num_heads // 2, grid)
            stripes = [Stripe(*half, columns=split_size, **common), Stripe(*half, rows=split_size, **common)]
        self.branches = nn.ModuleList(stripes)
        self.proj = nn.Linear(dim, dim, **dd)

    @torch.jit.ignore
    def set_grid(self, h: int, w: int) -> None:
        """Make the position tables for another map."""
        for stripe in self.branches:
            stripe.set_grid(h, w)

    @torch.jit.ignore
    def absorb(self, norm: nn.Module) -> nn.Module:
        """Merge the norm before `qkv` into it."""
        return fold_into_linear(norm, self.qkv)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        parts = self.qkv(x).chunk(3 * len(self.branches), dim=-1)
        count = len(self.branches)
        out = [stripe(parts[i], parts[count + i], parts[2 * count + i]) for i, stripe in enumerate(self.branches)]
        return self.proj(out[0] if count == 1 else torch.cat(out, dim=-1))
