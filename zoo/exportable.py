"""Equal forms of what `torch.export` or ONNX cannot follow for images of any size; used while a graph is made.

Four things are replaced inside `exportable()`, outputs stay the same:

- Swin's windows, whose side, number and shift depend on the map. Splitting is one gather of rows and one of columns,
  which pads, rolls and cuts at once, so that nothing branches on a size.
- The selective scans of ViM2, for ONNX: one `Scan` over the steps instead of zoo's operator.
- The Fourier transform of NiNformer's gates, for ONNX: products with tables of cosines and sines. ONNX Runtime's own
  transform loses two digits where a side is no power of two.
- The position table of CRATE-MAE, whose scale factors the exporter would write down as numbers of the traced size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from timm.models import swin_transformer
from torch import Tensor, nn

from zoo import crate, ninformer_blocks, slab_blocks, slab_windows, vim2_blocks
from zoo.kernels.attention import relative_bias, resize_relative_table
from zoo.kernels.channel_scan import channel_orders
from zoo.kernels.scan2d import scan_orders
from zoo.slab_attention import shared_kernel, simplified_attention


@contextmanager
def exportable(onnx: bool) -> Iterator[None]:
    """Inside the block, zoo's models have forms that can be traced for any size.

    Args:
        onnx: replace zoo's own operators, too; a program for PyTorch keeps them.
    """
    replaced = [
        (slab_blocks, "pad_to_multiple", pad_to_multiple),
        (slab_blocks.PatchMerging, "forward", merge_patches),
        (swin_transformer.PatchMerging, "forward", timm_merge_patches),
        (slab_windows.Stripe, "forward", stripe_attention),
        (slab_windows.WindowAttention, "forward", window_attention),
        (slab_windows.WindowLinearAttention, "forward", window_linear_attention),
        (crate, "resample_pos_embed", resample_pos_embed),
    ]
    if onnx:
        replaced += [
            (vim2_blocks, "scan2d", scan2d),
            (vim2_blocks, "channel_scan", channel_scan),
            (ninformer_blocks, "fourier_real", fourier_real),
        ]
    with ExitStack() as stack:
        for owner, name, function in replaced:
            stack.enter_context(patch.object(owner, name, function))
        yield


# Padding. `2 * ((H + 1) // 2)` where the models have `H + H % 2`: of the latter, four stages make an expression that
# takes minutes to solve, of the former a short one.


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """`slab_blocks.pad_to_multiple`, which always pads."""
    H, W = (multiple * ((side + multiple - 1) // multiple) for side in x.shape[2:])
    return F.pad(x, [0, W - x.shape[3], 0, H - x.shape[2]])


def _patches(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), 2, 2, C), column of the patch before row."""
    B, H, W, C = x.shape
    rows, columns = (H + 1) // 2, (W + 1) // 2
    x = F.pad(x, [0, 0, 0, 2 * columns - W, 0, 2 * rows - H])
    return x.view(B, rows, 2, columns, 2, C).permute(0, 1, 3, 4, 2, 5)


def merge_patches(self: slab_blocks.PatchMerging, x: Tensor) -> Tensor:
    """`PatchMerging.forward` of SLAB."""
    return self.reduction(self.norm(_patches(x.permute(0, 2, 3, 1)).flatten(3))).permute(0, 3, 1, 2)


def timm_merge_patches(self: nn.Module, x: Tensor) -> Tensor:
    """`PatchMerging.forward` of timm's Swin."""
    return self.reduction(self.norm(_patches(x).flatten(3)))


# Swin's windows


class _Axis:
    """Windows along one axis of a map: their number and side, where each place comes from and goes to.

    Args:
        length: of the map; place `length` holds the fill.
        side: of a window.
        count: of windows.
        whole: their product, as a tensor.
        shift: by which the padded map is rolled, as a tensor.
    """

    def __init__(self, length: int, side: int, count: int, whole: Tensor, shift: Tensor):
        self.length, self.side, self.count, self.shift = length, side, count, shift
        self.padded = count * side
        places = torch.arange(self.padded, device=shift.device)
        self.source = ((places + shift) % whole).clamp(max=length)
        self.target = (torch.arange(length, device=shift.device) + (whole - shift)) % whole


def _read(value: Tensor, most: int | None) -> int:
    """A number that the tracer does not know, at least 1."""
    number = value.item()
    torch._check(number >= 1)
    if most is not None:
        torch._check(number <= most)
    return number


def _axes(attn: slab_windows._Windows, x: Tensor) -> tuple[_Axis, _Axis]:
    """Both axes of the map (B, H, W, C); `geometry` without branches.

    The numbers are computed as tensors and read: the tracer then has one new symbol for each, where expressions of the
    image's size would grow from stage to stage until solving them takes minutes.
    """
    sides = x.shape[1], x.shape[2]
    size = torch.stack([torch.scalar_tensor(side, dtype=torch.int64, device=x.device) for side in sides])
    window = torch.full_like(size, attn.window_size)
    several = torch.full_like(size, int(attn.shifted))
    if not attn.fixed:
        shorter = size.amin(0)
        window = torch.minimum(window, shorter)
        several = several * (shorter > window).long()
        if attn.balanced:
            count = (size + window - 1) // window
            window = (size + count - 1) // count
    count, shift = (size + window - 1) // window, window // 2 * several
    whole = window * count
    axes = [
        _Axis(side, _read(window[i], attn.window_size), _read(count[i], None), whole[i], shift[i])
        for i, side in enumerate(sides)
    ]
    return axes[0], axes[1]


def _cut(x: Tensor, fill: Tensor | None, row: _Axis, column: _Axis) -> Tensor:
    """(B, H, W, C) -> (B, rows, h, columns, w, C), padded and rolled."""
    B, C = x.shape[0], x.shape[3]
    fill = x.new_zeros(C) if fill is None else fill.to(x.dtype)
    x = torch.cat([x, fill.expand(B, row.length, 1, C)], dim=2).index_select(2, column.source)
    x = torch.cat([x, fill.expand(B, 1, column.padded, C)], dim=1).index_select(1, row.source)
    return x.view(B, row.count, row.side, column.count, column.side, C)


def _join(x: Tensor, row: _Axis, column: _Axis) -> Tensor:
    """(B, rows, h, columns, w, C) -> (B, H, W, C), the inverse."""
    x = x.reshape(x.shape[0], row.padded, column.padded, x.shape[5])
    return x.index_select(1, row.target).index_select(2, column.target)


def _fill(attn: slab_windows._Windows) -> Tensor | None:
    return attn.qkv.bias if attn.pad_qkv is None else attn.pad_qkv


def window_attention(self: slab_windows.WindowAttention, x: Tensor) -> Tensor:
    """`WindowAttention.forward` for a map whose size is not known."""
    row, column = _axes(self, x)
    B, C, heads = x.shape[0], x.shape[3], self.num_heads
    h, w, windows = row.side, column.side, row.count * column.count
    qkv = _cut(self.qkv(x), _fill(self), row, column).unflatten(5, (3, heads, C // heads))
    q, k, v = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, B, windows * heads, h * w, C // heads).unbind(0)
    table = self.relative_position_bias_table.t().reshape(heads, 2 * self.window[0] - 1, 2 * self.window[1] - 1)
    bias = relative_bias(resize_relative_table(table, h, w)).unsqueeze(0)
    if self.shifted:
        mask = _shift_mask(row, column).unsqueeze(1)
        bias = torch.where(mask, bias, torch.full_like(bias, float("-inf")))
    else:
        bias = bias.expand(windows, -1, -1, -1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.reshape(windows * heads, h * w, h * w))
    y = y.view(B, row.count, column.count, heads, h, w, C // heads).permute(0, 1, 4, 2, 5, 3, 6).flatten(5)
    return self.proj(_join(y, row, column))


def _shift_mask(row: _Axis, column: _Axis) -> Tensor:
    """`slab_windows.shift_mask`: (windows, h w, h w)."""
    parts = []
    for axis in (row, column):
        place = torch.arange(axis.padded, device=axis.shift.device)
        part = (place >= axis.padded - axis.side).long() + (place >= axis.padded - axis.shift).long()
        parts.append(part.view(axis.count, axis.side))
    rows, columns = parts
    region = 3 * rows[:, None, :, None] + columns[None, :, None, :]
    region = region.reshape(row.count * column.count, row.side * column.side)
    return region.unsqueeze(1) == region.unsqueeze(2)


def window_linear_attention(self: slab_windows.WindowLinearAttention, x: Tensor) -> Tensor:
    """`WindowLinearAttention.forward` for a map whose size is not known."""
    if self.window_size == 0:  # one window, nothing to decide
        return self.project(self.attend(x), x)
    row, column = _axes(self, x)
    B, C, h, w = x.shape[0], x.shape[3], row.side, column.side
    qkv = _cut(self.qkv(x), _fill(self), row, column).transpose(2, 3)
    q, k, v = qkv.reshape(B * row.count * column.count, h * w, 3 * C).chunk(3, dim=-1)
    table = self.positional_encoding.reshape(1, self.window[0], self.window[1], C).permute(0, 3, 1, 2)
    table = F.interpolate(table, size=[h, w], mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    weight, bias = shared_kernel(self.dwc.weight, self.dwc.bias, self.num_heads)
    y = simplified_attention(q, k + table, v, self.num_heads, h, w, weight, bias)
    y = y.view(B, row.count, column.count, h, w, C).transpose(2, 3)
    return self.proj(_join(y, row, column))


def stripe_attention(self: slab_windows.Stripe, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`Stripe.forward`, which always pads."""
    B, H, W, C = q.shape
    h, w = self.rows or H, self.columns or W
    rows, columns = (1 if h is H else (H + h - 1) // h), (1 if w is W else (W + w - 1) // w)

    def split(x: Tensor) -> Tensor:
        x = F.pad(x, [0, 0, 0, columns * w - W, 0, rows * h - H])
        x = x.reshape(x.shape[0], rows, h, columns, w, x.shape[3]).transpose(2, 3)
        return x.reshape(x.shape[0] * rows * columns, h * w, x.shape[5])

    valid = split(torch.ones_like(q[..., :1]))
    q, k, v = split(q), split(k), split(v)
    weight, bias = self.kernel()
    if self.positional_encoding is not None:
        table = self.positional_encoding.reshape(1, self.grid[0], self.grid[1], C).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=[h, w], mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
        y = simplified_attention(q, (k + table) * valid, v, self.num_heads, h, w, weight, bias)
    else:
        y = self.softmax(q, k, v, valid) + slab_windows.depthwise(v, h, w, weight, bias)
    y = y.view(B, rows, columns, h, w, C).transpose(2, 3).reshape(B, rows * h, columns * w, C)
    return y[:, :H, :W]


# CRATE-MAE's position table


def resample_pos_embed(table: Tensor, new: list[int], old: list[int], mode: str) -> Tensor:
    """`crate_blocks.resample_pos_embed`, "offset" as a product with two matrices of the cubic filter's weights."""
    if mode != "offset":
        return _resample_pos_embed(table, new, old, mode)
    rows, columns = (_cubic_matrix(n, o, table) for n, o in zip(new, old))
    # at the table's own size nothing is resampled
    sizes = [torch.scalar_tensor(n, dtype=torch.int64, device=table.device) for n in new]
    same = (sizes[0] == old[0]) & (sizes[1] == old[1])
    rows, columns = (torch.where(same, _eye(n, o, table), m) for n, o, m in zip(new, old, (rows, columns)))
    grid = table[:, 1:].reshape(old[0], old[1], -1)
    grid = torch.einsum("ro,ouc->ruc", rows, grid)
    grid = torch.einsum("vu,ruc->rvc", columns, grid)
    return torch.cat([table[:, :1], grid.flatten(0, 1).unsqueeze(0)], dim=1)


_resample_pos_embed = crate.resample_pos_embed


def _eye(new: int, old: int, like: Tensor) -> Tensor:
    rows, columns = (torch.arange(n, device=like.device) for n in (new, old))
    return (rows.unsqueeze(1) == columns).to(like.dtype)


def _cubic_matrix(new: int, old: int, like: Tensor) -> Tensor:
    """Row i has the weights (old,) of the new place i, for torch's bicubic filter and the factor (new + 0.1) / old."""
    a = -0.75
    place = (torch.arange(new, device=like.device, dtype=like.dtype) + 0.5) * (old / (new + 0.1)) - 0.5
    first = place.floor()
    matrix = like.new_zeros(1)
    columns = torch.arange(old, device=like.device)
    for tap in (-1, 0, 1, 2):
        distance = (place - first - tap).abs()
        if tap in (0, 1):
            weight = ((a + 2) * distance - (a + 3)) * distance * distance + 1
        else:
            weight = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        at = (first + tap).long().clamp(0, old - 1)
        matrix = matrix + weight.unsqueeze(1) * (at.unsqueeze(1) == columns).to(like.dtype)
    return matrix


# NiNformer's Fourier gate


def fourier_real(x: Tensor) -> Tensor:
    """`ninformer_blocks.fourier_real`: Re(F_N X F_C) = cos_N X cos_C - sin_N X sin_C, both tables being symmetric."""
    tokens, channels = (_waves(side, x) for side in x.shape[-2:])
    return tokens[0] @ x @ channels[0] - tokens[1] @ x @ channels[1]


def _waves(side: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 2 pi j k / side, each (side, side)."""
    steps = torch.arange(side, device=like.device)
    whole = torch.scalar_tensor(side, dtype=torch.int64, device=like.device)  # the exporter has no number here
    parts = steps.unsqueeze(1) * steps % whole  # full turns go before the angle is rounded
    angles = parts.to(like.dtype) * (2 * math.pi) / whole
    return angles.cos(), angles.sin()


# ViM2's scans


def _scan(d: Tensor, u: Tensor, B: Tensor, C: Tensor, A: Tensor) -> Tensor:
    """h_t = exp(d_t A) h_{t-1} + B_t d_t u_t, y_t = C_t . h_t.

    Args:
        d, u: (L, M, G, D), step sizes and inputs.
        B, C: (L, M, G, N) or broadcast along M.
        A: (G, D, N) or (G, 1, N).

    Returns:
        y (L, M, G, D).
    """
    from torch._higher_order_ops.scan import scan

    def step(h, inputs):
        d, v, B, C = inputs
        h = torch.exp(d.unsqueeze(-1) * A) * h + v.unsqueeze(-1) * B.unsqueeze(-2)
        return h, (h * C.unsqueeze(-2)).sum(-1)

    start = d.new_zeros(*d.shape[1:], A.shape[-1])
    return scan(step, start, (d, d * u, B, C))[1]


def scan2d(x, proj_weight, dt_weight, dt_bias, A, D, mode="cross") -> Tensor:
    """`zoo.kernels.scan2d`."""
    batch, height, width, dim = x.shape
    N, rank = A.shape[1], dt_weight.shape[-1]
    orders = scan_orders(height, width, mode, x.device)  # (L, 4)
    u = x.flatten(1, 2).transpose(0, 1)[orders]  # (L, 4, b, D)
    r, B, C = torch.einsum("lkbd,kcd->lbkc", u, proj_weight).split([rank, N, N], dim=-1)
    u = u.transpose(1, 2)
    d = F.softplus(torch.einsum("lbkr,kdr->lbkd", r, dt_weight) + dt_bias)
    y = _scan(d, u, B, C, A.view(4, dim, N)) + D.view(4, dim) * u
    back = orders.argsort(dim=0)
    merged = sum(y[:, :, k].index_select(0, back[:, k]) for k in range(4))
    return merged.transpose(0, 1).reshape(batch, height, width, dim)


def channel_scan(x, expand, conv_weight, conv_bias, dt_weight, dt_bias, A, B, C, D) -> Tensor:
    """`zoo.kernels.channel_scan`."""
    width = x.shape[-1]
    orders = channel_orders(width, expand, x.device)  # (W, 4), constants
    flat = x.reshape(-1, width)
    taps = conv_weight.shape[1]
    a = flat[:, orders.t()]  # (M, 4, W)
    a = F.conv1d(a, conv_weight.unsqueeze(1), conv_bias.view(4), padding=taps // 2, groups=4)
    u = F.silu(a).permute(2, 0, 1)  # (W, M, 4)
    d = F.softplus(dt_weight.t().unsqueeze(1) * u + dt_bias.t().unsqueeze(1))
    inputs = [m.permute(2, 0, 1).unsqueeze(1) * u.unsqueeze(-1) for m in (B, C)]  # (W, M, 4, N)
    y = _scan(d.unsqueeze(-1), u.unsqueeze(-1), *inputs, A.unsqueeze(1)).squeeze(-1) + D.t().unsqueeze(1) * u
    back = orders.argsort(dim=0)
    merged = sum(y[:, :, k].index_select(0, back[:, k]) for k in range(4))
    return merged.t().reshape(x.shape)
