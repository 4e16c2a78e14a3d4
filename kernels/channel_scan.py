"""Selective scan along the channels of each pixel: the channel mixer of ViM2 (arXiv 2403.19888), as zoo reads it.

A pixel's W = C e values are a C x e grid, read in K = 4 orders (rows first, columns first, both reversed). In
order k, with a_t the value at step t and u = SiLU(conv_k(a)), a short convolution along the sequence,

    d_t = softplus(p_kt u_t + q_kt),   h_t = exp(d_t A_k) h_{t-1} + d_t u_t (B_kt u_t),
    y_t = (C_kt u_t) . h_t + D_kt u_t,

and the four y are added where they belong on the grid. B_kt and C_kt are N weights for each step, the same for
all pixels, so that

    h_t = exp(d_t A_k) h_{t-1} + B_kt (d_t u_t^2),   y_t = u_t (C_kt . h_t + D_kt)

is a scan with M pixels as rows of a group: nothing of size M N W exists, where a general selective scan would
need B and C of that size.

Cost for M pixels: about K M W (9 N + 2 N + 8) FLOPs; 2 M W elements moved if all four orders are taken at once,
and K W (3 + 2N) weights. Pixels are taken in tiles that fit into the cache. The backward pass keeps only the
input and runs each tile again.

On a GPU a program has a block of pixels and walks along the channels, two opposite directions after each other, so
that two maps of float32 are written and added: 6 M W elements moved forward, 10 M W backward, which recomputes the
states and keeps those before each 16 steps of its block only. A few hundred programs share all blocks; each has its
own sums of the gradients of B and C, of at most twice the input's size together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.dispatch import use_triton
from zoo.kernels.jit import cdiv, next_power_of_2, triton_jit
from zoo.kernels.scan_steps import scan_steps, scan_steps_backward, softplus, working_dtype
from zoo.kernels.scan_tiles import (
    T,
    position,
    quicken_interpreter,
    scan_tile,
    scan_tile_with_previous,
    sigmoid,
    softplus_slope,
    softplus_tile,
    unsupported,
    warps_for,
)

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["channel_orders", "channel_scan", "reference"]

_TILE_ELEMENTS = 2**14  # of a state (K, N, pixels)


def channel_scan(
    x: Tensor,
    expand: int,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
) -> Tensor:
    """Scan the channels of each pixel in four orders and add the results; differentiable in every tensor.

    Args:
        x: (..., W), a grid of (W / expand, expand) for each pixel.
        expand: columns of the grid.
        conv_weight: (4, taps), one filter a direction, an odd number of taps, padded with zeros.
        conv_bias: (4,) or (1, 4).
        dt_weight: (4, W), by step of the direction, as all that follow.
        dt_bias: (4, W).
        A: (4, N), not positive.
        B: (4, N, W).
        C: (4, N, W).
        D: skip weights (4, W).

    Returns:
        (..., W) in the wider type of `x` and `D`; computed in float32 or float64, also under autocast.
    """
    return _channel_scan_on_device(x, expand, conv_weight, conv_bias, dt_weight, dt_bias, A, B, C, D)


def reference(
    x: Tensor,
    expand: int,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
) -> Tensor:
    """The definition of `channel_scan`, with B and C of each pixel materialised."""
    from zoo.kernels.selective_scan import reference as scan

    width = x.shape[-1]
    flat = x.reshape(-1, width)
    orders = channel_orders(width, expand, x.device)
    y = torch.zeros_like(flat)
    for k in range(4):
        taps = conv_weight.shape[1]
        a = F.conv1d(
            flat[:, None, orders[:, k]], conv_weight[k].view(1, 1, -1), conv_bias.view(4)[k : k + 1], 1, taps // 2
        )
        u = F.silu(a)  # (M, 1, W)
        out = scan(u, dt_weight[k] * u + dt_bias[k], A[k : k + 1], B[k] * u, C[k] * u, softplus=True) + D[k] * u
        y = y + out[:, 0, orders[:, k].argsort()]
    return y.view(x.shape)


@torch.fx.wrap
def _channel_scan_on_device(
    x: Tensor,
    expand: int,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
) -> Tensor:
    if not torch.jit.is_scripting():
        weights = (conv_weight, conv_bias, dt_weight, dt_bias, A, B, C, D)
        if use_triton("channel_scan", x, *weights, unsupported=unsupported(A.shape[1])):
            return torch.ops.zoo.channel_scan_triton(x, expand, *weights)
    return torch.ops.zoo.channel_scan(x, expand, conv_weight, conv_bias, dt_weight, dt_bias, A, B, C, D)


def channel_orders(width: int, expand: int, device: torch.device | None = None) -> Tensor:
    """The grid position c * expand + j that each direction visits at each step: (W, 4) integers.

    Raises:
        ValueError: the grid has no whole number of rows.
    """
    if width % expand:
        raise ValueError(f"a width of {width} has no grid of {expand} columns: pass an expand that divides it")
    rows = torch.arange(width, device=device)
    columns = rows.view(-1, expand).t().flatten()
    return torch.stack([rows, columns, rows.flip(0), columns.flip(0)], dim=1)


# The operator --------------------------------------------------------------------------------------------------


class _Tile:
    """What forward and backward of `channel_scan` have in common, for tiles of its pixels; steps come first."""

    def __init__(self, width: int, expand: int, weights: tuple[Tensor, ...]):
        self.filters, bias, self.dt_weight, self.dt_bias, A, B, C, D = weights
        self.taps = self.filters.shape[1]
        self.bias = bias.view(4, 1)
        self.width = width
        orders = channel_orders(width, expand, A.device)
        self.order = orders.flatten()
        self.slots = (orders.argsort(dim=0) * 4 + torch.arange(4, device=A.device)).flatten()  # (W, 4), by position
        self.A = A.unsqueeze(2)
        self.B, self.C = (m.permute(2, 0, 1).contiguous() for m in (B, C))  # (W, 4, N)
        self.p, self.q, self.skip = (m.t().unsqueeze(2) for m in (self.dt_weight, self.dt_bias, D))  # (W, 4, 1)

    def load(self, x: Tensor) -> None:
        """Compute the inputs of all steps for a tile of pixels (M, W)."""
        self.rows = x.shape[0]
        self.ordered = self.reorder(x, self.order)
        self.conv = self.convolve(self.ordered, self.filters, 1) + self.bias
        self.u = F.silu(self.conv)
        self.raw = torch.addcmul(self.q, self.p, self.u)
        self.d = softplus(self.raw)
        self.v = self.u.square().mul_(self.d)

    def reorder(self, x: Tensor, order: Tensor) -> Tensor:
        """(M, W) -> (W, 4, M) in the orders of the directions."""
        return x.t().contiguous().index_select(0, order).view(self.width, 4, -1)

    def merge(self, values: Tensor) -> Tensor:
        """(W, 4, M) by step -> (M, W), the sum over the directions."""
        return values.view(self.width * 4, -1).index_select(0, self.slots).view(values.shape).sum(1).t()

    def convolve(self, x: Tensor, filters: Tensor, sign: int) -> Tensor:
        """Filters (4, taps) along the steps of (W, 4, M), reflected for sign -1; zeros outside."""
        middle = self.taps // 2
        y = x * filters[:, middle, None]
        for tap in range(self.taps):
            shift = sign * (tap - middle)
            if 0 < shift < self.width:
                y[:-shift].addcmul_(x[shift:], filters[:, tap, None])
            elif -self.width < shift < 0:
                y[-shift:].addcmul_(x[:shift], filters[:, tap, None])
        return y

    def filter_grad(self, grad: Tensor) -> Tensor:
        """Gradient of the filters (4, taps) for the gradient (W, 4, M) of the convolution."""
        columns = []
        for tap in range(self.taps):
            shift = tap - self.taps // 2
            here = grad[max(0, -shift) : self.width - max(0, shift)]
            there = self.ordered[max(0, shift) : self.width + min(0, shift)]
            columns.append((here * there).sum((0, 2)) if abs(shift) < self.width else grad.new_zeros(4))
        return torch.stack(columns, dim=1)

    def inputs(self, s: int, e: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.d[s:e], self.v[s:e], self.B[s:e], self.C[s:e]

    def run(self) -> tuple[Tensor, Tensor]:
        """C . h of all steps (W, 4, M), and the states at the borders."""
        out = torch.empty_like(self.u)
        borders, _ = scan_steps(self.width, self.A, self.rows, self.inputs, lambda s, e, y: out[s:e].copy_(y))
        return out, borders

    def gradients(self, grad: Tensor) -> list[Tensor]:
        """Gradients of x (M, W) and of the weights, for the gradient (M, W) of the output."""
        dy = self.reorder(grad, self.order)
        out, borders = self.run()
        dout = dy * self.u
        d_skip = dout.sum(2).t()
        du = dy * (out + self.skip)
        d_delta, dv = torch.empty_like(du), torch.empty_like(du)
        dB, dC = torch.empty_like(self.B), torch.empty_like(self.C)

        def emit(s: int, e: int, dd: Tensor, dvalue: Tensor, db: Tensor, dc: Tensor) -> None:
            d_delta[s:e], dv[s:e], dB[s:e], dC[s:e] = dd, dvalue, db, dc

        dA = scan_steps_backward(self.width, self.A, self.rows, borders, self.inputs, lambda s, e: dout[s:e], emit)
        # v = d u^2
        d_delta.addcmul_(dv, self.u.square())
        du.addcmul_(dv.mul_(self.u), self.d, value=2)
        d_raw = torch.ops.aten.softplus_backward(d_delta, self.raw, 1, 20)
        du.addcmul_(d_raw, self.p)
        d_conv = torch.ops.aten.silu_backward(du, self.conv)
        dx = self.merge(self.convolve(d_conv, self.filters, -1))
        weights = [self.filter_grad(d_conv), d_conv.sum((0, 2)), (d_raw * self.u).sum(2).t(), d_raw.sum(2).t()]
        return [dx, *weights, dA.sum(2), dB.permute(1, 2, 0), dC.permute(1, 2, 0), d_skip]


def _tiles(x: Tensor, A: Tensor) -> list[slice]:
    size = max(16, _TILE_ELEMENTS // A.numel())
    return [slice(s, s + size) for s in range(0, x.shape[0], size)]


def _working(*tensors: Tensor) -> list[Tensor]:
    dtype = working_dtype(*tensors)
    return [t.to(dtype).contiguous() for t in tensors]


@torch.library.custom_op("zoo::channel_scan", mutates_args=())
def _channel_scan(
    x: Tensor,
    expand: int,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
) -> Tensor:
    _check(x, conv_weight, dt_weight, dt_bias, A, B, C, D)
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, D.dtype))
    with torch.autocast(x.device.type, enabled=False):
        pixels, *weights = _working(x.flatten(0, -2), conv_weight, conv_bias, dt_weight, dt_bias, A, B, C, D)
        tile = _Tile(x.shape[-1], expand, tuple(weights))
        for part in _tiles(pixels, A):
            tile.load(pixels[part])
            out, _ = tile.run()
            y.view(pixels.shape)[part] = tile.merge(out.add_(tile.skip).mul_(tile.u))
    return y


@_channel_scan.register_fake
def _fake(x, expand, conv_weight, conv_bias, dt_weight, dt_bias, A, B, C, D):
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, D.dtype))


@torch.library.custom_op("zoo::channel_scan_backward", mutates_args=())
def _channel_scan_backward(
    dy: Tensor,
    x: Tensor,
    expand: int,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    sources = (conv_weight, conv_bias, dt_weight, dt_bias, A, B, C, D)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    with torch.autocast(x.device.type, enabled=False):
        pixels, *weights = _working(x.flatten(0, -2), *sources)
        grad = dy.reshape(pixels.shape).to(pixels.dtype)
        tile = _Tile(x.shape[-1], expand, tuple(weights))
        totals = [torch.zeros_like(w) for w in weights]
        for part in _tiles(pixels, A):
            tile.load(pixels[part])
            dx.view(pixels.shape)[part], *grads = tile.gradients(grad[part])
            for total, partial in zip(totals, grads):
                total += partial.reshape(total.shape)
    return dx, *(t.to(s.dtype) for t, s in zip(totals, sources))


@_channel_scan_backward.register_fake
def _fake_backward(dy, x, expand, conv_weight, conv_bias, dt_weight, dt_bias, A, B, C, D):
    tensors = (x, conv_weight, conv_bias, dt_weight, dt_bias, A, B, C, D)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)


def _setup_context(ctx, inputs, output):
    x, ctx.expand, *weights = inputs
    ctx.save_for_backward(x, *weights)


def _backward(ctx, dy):
    x, *weights = ctx.saved_tensors
    dx, *grads = _channel_scan_backward(dy, x, ctx.expand, *weights)
    return dx, None, *grads


_channel_scan.register_autograd(_backward, setup_context=_setup_context)


# The operator on a GPU -----------------------------------------------------------------------------------------


@torch.library.custom_op("zoo::channel_scan_triton", mutates_args=())
def _channel_scan_triton(
    x: Tensor,
    expand: int,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
) -> Tensor:
    return launch_forward(x, expand, conv_weight, conv_bias, dt_weight, dt_bias, A, B, C, D)


_channel_scan_triton.register_fake(_fake)


@torch.library.custom_op("zoo::channel_scan_triton_backward", mutates_args=())
def _channel_scan_triton_backward(
    dy: Tensor,
    x: Tensor,
    expand: int,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return launch_backward(dy, x, expand, conv_weight, conv_bias, dt_weight, dt_bias, A, B, C, D)


_channel_scan_triton_backward.register_fake(_fake_backward)


def _backward_triton(ctx, dy):
    x, *weights = ctx.saved_tensors
    dx, *grads = _channel_scan_triton_backward(dy, x, ctx.expand, *weights)
    return dx, None, *grads


_channel_scan_triton.register_autograd(_backward_triton, setup_context=_setup_context)


def launch_forward(x: Tensor, expand: int, *sources: Tensor) -> Tensor:
    """`channel_scan` through the kernels."""
    pixels, weights, constants = _arguments(x, expand, sources)
    y = pixels.new_empty(2, *pixels.shape, dtype=weights[0].dtype)
    rows = pixels.shape[0]
    _channel_forward[(cdiv(rows, constants["BLOCK"]), 2)](
        pixels,
        *weights,
        y,
        rows,
        x.shape[-1],
        x.shape[-1] // expand,
        expand,
        **constants,
        num_warps=warps_for(4, constants["BLOCK"] * constants["NP"]),
    )
    return (y[0] + y[1]).view(x.shape).to(torch.promote_types(x.dtype, sources[-1].dtype))


def launch_backward(dy: Tensor, x: Tensor, expand: int, *sources: Tensor) -> tuple[Tensor, ...]:
    """Gradients of x and the weights through the kernels."""
    pixels, weights, constants = _arguments(x, expand, sources)
    rows, width = pixels.shape
    states = weights[4].shape[1]
    blocks = cdiv(rows, constants["BLOCK"])
    slots = max(1, min(blocks, max(32, blocks // 2), PROGRAMS // 2))
    new = weights[0].new_zeros
    dx = torch.empty(2, rows, width, dtype=weights[0].dtype, device=x.device)
    # of a pixel block: the states before each tile, and the gradient behind the convolution
    starts = weights[0].new_empty(2 * slots, cdiv(width, T), constants["BLOCK"], constants["NP"])
    behind = weights[0].new_empty(2 * slots, width, constants["BLOCK"])
    d_filters, d_bias = new(slots, 4, weights[0].shape[1]), new(slots, 4)
    d_steps = new(slots, 3, 4, width)  # of dt_weight, dt_bias and D
    dA, dB, dC = new(slots, 4, states), new(slots, *weights[5].shape), new(slots, *weights[6].shape)
    _channel_backward[(slots, 2)](
        pixels,
        *weights,
        dy.reshape(pixels.shape).contiguous(),
        starts,
        behind,
        dx,
        d_filters,
        d_bias,
        d_steps,
        dA,
        dB,
        dC,
        rows,
        width,
        width // expand,
        expand,
        slots,
        **constants,
        num_warps=warps_for(8, constants["BLOCK"] * constants["NP"]),
    )
    d_dt_weight, d_dt_bias, d_skip = d_steps.sum(0)
    sums = (d_filters.sum(0), d_bias.sum(0), d_dt_weight, d_dt_bias, dA.sum(0), dB.sum(0), dC.sum(0), d_skip)
    grads = (g.view(s.shape).to(s.dtype, copy=True) for g, s in zip(sums, sources))
    return (dx[0] + dx[1]).view(x.shape).to(x.dtype), *grads


PROGRAMS = 512


def _arguments(x: Tensor, expand: int, weights: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor], dict]:
    """Pixels (M, W), weights in the working type, and the constants of the kernels."""
    quicken_interpreter()
    conv_weight, _, dt_weight, dt_bias, A, B, C, D = weights
    _check(x, conv_weight, dt_weight, dt_bias, A, B, C, D)
    if x.shape[-1] % expand:
        channel_orders(x.shape[-1], expand)  # raises
    dtype = working_dtype(x, *weights)
    padded = max(2, next_power_of_2(A.shape[1]))
    taps = conv_weight.shape[1]
    constants = dict(
        N=A.shape[1], TAPS=taps, NP=padded, TAPS_PADDED=next_power_of_2(taps), BLOCK=min(16, 256 // padded), STEPS=T
    )
    return x.flatten(0, -2).contiguous(), [w.to(dtype).contiguous() for w in weights], constants


# Kernels: rows are pixels, steps are channels. A direction `g` reads the grid by columns if g is odd, and from its
# end if g is 2 or 3; q is a place in the order of reading from the beginning, and `step` = q or W - 1 - q.


@triton_jit
def _load(X, m, m_live, q, column, width, height, columns, dtype: tl.constexpr):
    """Values (T, pixels) at places q, zero outside."""
    inside = ((q >= 0) & (q < width))[:, None] & m_live[None, :]
    return tl.load(X + m[None, :] * width + position(q, column, height, columns)[:, None], inside, 0.0).to(dtype)


@triton_jit
def _tile(
    X,
    FILTERS,
    BIAS,
    DT_WEIGHT,
    DT_BIAS,
    B,
    C,
    D,
    g,
    m,
    m_live,
    q,
    n,
    column,
    width,
    height,
    columns,
    REVERSE: tl.constexpr,
    N: tl.constexpr,
    TAPS: tl.constexpr,
):
    """Convolution, u, raw step, step size (T, pixels), B and C (T, N), dt_weight and skip (T) of some steps."""
    live = q < width
    step = (width - 1 - q) if REVERSE else q
    dtype: tl.constexpr = BIAS.dtype.element_ty
    conv = tl.zeros([q.shape[0], m.shape[0]], dtype) + tl.load(BIAS + g)
    for tap in tl.static_range(TAPS):
        there = (q - (tap - TAPS // 2)) if REVERSE else (q + (tap - TAPS // 2))
        x = _load(X, m, m_live, there, column, width, height, columns, dtype)
        conv += tl.load(FILTERS + g * TAPS + tap) * x
    u = conv * sigmoid(conv)
    p = tl.load(DT_WEIGHT + g * width + step, live, 0.0)
    raw = p[:, None] * u + tl.load(DT_BIAS + g * width + step, live, 0.0)[:, None]
    d = tl.where(live[:, None] & m_live[None, :], softplus_tile(raw), 0.0)
    at = (g * N + n)[None, :] * width + step[:, None]
    mask = live[:, None] & (n < N)[None, :]
    b = tl.load(B + at, mask, 0.0)
    c = tl.load(C + at, mask, 0.0)
    return conv, u, raw, d, b, c, p, tl.load(D + g * width + step, live, 0.0)


@triton_jit
def _channel_forward(
    X,
    FILTERS,
    BIAS,
    DT_WEIGHT,
    DT_BIAS,
    A,
    B,
    C,
    D,
    Y,
    rows,
    width,
    height,
    columns,
    N: tl.constexpr,
    TAPS: tl.constexpr,
    NP: tl.constexpr,
    TAPS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    pair = tl.program_id(1)
    column = pair == 1
    m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_live = m < rows
    n = tl.arange(0, NP)
    tiles = tl.cdiv(width, STEPS)
    for direction in tl.static_range(2):
        g = pair + 2 * direction
        a = tl.load(A + g * N + n, n < N, 0.0)
        h = tl.zeros([BLOCK, NP], Y.dtype.element_ty)
        for j in range(tiles):
            q = ((tiles - 1 - j) if direction == 1 else j) * STEPS + tl.arange(0, STEPS)
            _, u, _, d, b, c, _, skip = _tile(
                X, FILTERS, BIAS, DT_WEIGHT, DT_BIAS, B, C, D, g, m, m_live, q, n, column, width, height, columns,
                direction == 1, N, TAPS,
            )  # fmt: skip
            inner = (d * u * u)[:, :, None] * b[:, None, :]
            states, h = scan_tile(tl.exp(d[:, :, None] * a[None, None, :]), inner, h, STEPS, direction == 1)
            y = u * (tl.sum(states * c[:, None, :], 2) + skip[:, None])
            at = (pair.to(tl.int64) * rows + m)[None, :] * width + position(q, column, height, columns)[:, None]
            mask = (q < width)[:, None] & m_live[None, :]
            if direction == 1:
                y += tl.load(Y + at, mask, 0.0)
            tl.store(Y + at, y, mask)
        tl.debug_barrier()  # the opposite direction adds to what this one wrote


@triton_jit
def _add(POINTER, at, value, mask):
    tl.store(POINTER + at, tl.load(POINTER + at, mask, 0.0) + value, mask)


@triton_jit
def _channel_backward(
    X,
    FILTERS,
    BIAS,
    DT_WEIGHT,
    DT_BIAS,
    A,
    B,
    C,
    D,
    DY,
    STARTS,
    BEHIND,
    DX,
    DFILTERS,
    DBIAS,
    DSTEPS,
    DA,
    DB,
    DC,
    rows,
    width,
    height,
    columns,
    slots,
    N: tl.constexpr,
    TAPS: tl.constexpr,
    NP: tl.constexpr,
    TAPS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    slot = tl.program_id(0)
    pair = tl.program_id(1)
    column = pair == 1
    n = tl.arange(0, NP)
    local = tl.arange(0, BLOCK)
    taps = tl.arange(0, TAPS_PADDED)
    tiles = tl.cdiv(width, STEPS)
    dtype: tl.constexpr = BIAS.dtype.element_ty
    program = (pair * slots + slot).to(tl.int64)
    starts = STARTS + program * tiles * BLOCK * NP + local[:, None] * NP + n[None, :]
    behind = BEHIND + program * width * BLOCK + local[None, :]
    for block in range(slot, tl.cdiv(rows, BLOCK), slots):
        m = tl.cast(block, tl.int64) * BLOCK + local
        m_live = m < rows
        for direction in tl.static_range(2):
            g = pair + 2 * direction
            kind = slot * 4 + g
            a = tl.load(A + g * N + n, n < N, 0.0)
            h = tl.zeros([BLOCK, NP], dtype)
            for j in range(tiles):  # the state before each tile
                tile = (tiles - 1 - j) if direction == 1 else j
                tl.store(starts + tile * (BLOCK * NP), h)
                q = tile * STEPS + tl.arange(0, STEPS)
                _, u, _, d, b, _, _, _ = _tile(
                    X, FILTERS, BIAS, DT_WEIGHT, DT_BIAS, B, C, D, g, m, m_live, q, n, column, width, height, columns,
                    direction == 1, N, TAPS,
                )  # fmt: skip
                inner = (d * u * u)[:, :, None] * b[:, None, :]
                _, h = scan_tile(tl.exp(d[:, :, None] * a[None, None, :]), inner, h, STEPS, direction == 1)
            tl.debug_barrier()
            carry = tl.zeros([BLOCK, NP], dtype)
            da = tl.zeros([NP], dtype)
            dbias = tl.zeros([BLOCK], dtype)
            dfilters = tl.zeros([TAPS_PADDED], dtype)
            for j in range(tiles):
                tile = j if direction == 1 else (tiles - 1 - j)
                q = tile * STEPS + tl.arange(0, STEPS)
                live = q < width
                mask = live[:, None] & m_live[None, :]
                conv, u, raw, d, b, c, p, skip = _tile(
                    X, FILTERS, BIAS, DT_WEIGHT, DT_BIAS, B, C, D, g, m, m_live, q, n, column, width, height, columns,
                    direction == 1, N, TAPS,
                )  # fmt: skip
                dy = _load(DY, m, m_live, q, column, width, height, columns, dtype)
                decay = tl.exp(d[:, :, None] * a[None, None, :])
                inner = (d * u * u)[:, :, None] * b[:, None, :]
                h = tl.load(starts + tile * (BLOCK * NP))
                states, previous, _ = scan_tile_with_previous(decay, inner, h, STEPS, direction == 1)
                dout = dy * u
                direct = dout[:, :, None] * c[:, None, :]
                carries, after, carry = scan_tile_with_previous(decay, decay * direct, carry, STEPS, direction == 0)
                grad = direct + after
                through = carries * previous  # gradient of d A
                dv = tl.sum(grad * b[:, None, :], 2)
                draw = (dv * u * u + tl.sum(through * a[None, None, :], 2)) * softplus_slope(raw)
                draw = tl.where(mask, draw, 0.0)
                du = dy * (tl.sum(states * c[:, None, :], 2) + skip[:, None]) + 2.0 * dv * d * u + draw * p[:, None]
                gate = sigmoid(conv)
                dconv = tl.where(mask, du * gate * (1.0 + conv * (1.0 - gate)), 0.0)
                tl.store(behind + q[:, None] * BLOCK, dconv, live[:, None] & (local < BLOCK)[None, :])
                dbias += tl.sum(dconv, 0)
                da += tl.sum(tl.sum(through * d[:, :, None], 0), 0)
                for tap in tl.static_range(TAPS):
                    there = (q - (tap - TAPS // 2)) if direction == 1 else (q + (tap - TAPS // 2))
                    x = _load(X, m, m_live, there, column, width, height, columns, dtype)
                    dfilters += tl.where(taps == tap, tl.sum(tl.sum(dconv * x, 0), 0), 0.0)
                # sums over the pixels that this program has had
                step = (width - 1 - q) if direction == 1 else q
                step_at = g * width + step
                plane = (slot * 3 * 4).to(tl.int64) * width
                _add(DSTEPS, plane + step_at, tl.sum(draw * u, 1), live)
                _add(DSTEPS, plane + 4 * width + step_at, tl.sum(draw, 1), live)
                _add(DSTEPS, plane + 8 * width + step_at, tl.sum(dout, 1), live)
                at = ((kind * N).to(tl.int64) + n)[None, :] * width + step[:, None]
                n_mask = live[:, None] & (n < N)[None, :]
                _add(DB, at, tl.sum(grad * (d * u * u)[:, :, None], 1), n_mask)
                _add(DC, at, tl.sum(states * dout[:, :, None], 1), n_mask)
            _add(DA, kind * N + n, da, n < N)
            _add(DFILTERS, kind * TAPS + taps, dfilters, taps < TAPS)
            tl.store(DBIAS + kind, tl.load(DBIAS + kind) + tl.sum(dbias, 0))
            tl.debug_barrier()
            for tile in range(tiles):  # through the convolution
                q = tile * STEPS + tl.arange(0, STEPS)
                dx = tl.zeros([STEPS, BLOCK], dtype)
                for tap in tl.static_range(TAPS):
                    there = (q + (tap - TAPS // 2)) if direction == 1 else (q - (tap - TAPS // 2))
                    inside = (there >= 0) & (there < width)
                    dconv = tl.load(behind + there[:, None] * BLOCK, inside[:, None] & (local < BLOCK)[None, :], 0.0)
                    dx += tl.load(FILTERS + g * TAPS + tap) * dconv
                at = (pair.to(tl.int64) * rows + m)[None, :] * width + position(q, column, height, columns)[:, None]
                mask = (q < width)[:, None] & m_live[None, :]
                if direction == 1:
                    dx += tl.load(DX + at, mask, 0.0)
                tl.store(DX + at, dx, mask)
            tl.debug_barrier()


def _check(x, conv_weight, dt_weight, dt_bias, A, B, C, D) -> None:
    width, N = x.shape[-1], A.shape[-1]
    expected = {
        "dt_weight": (dt_weight, (4, width)),
        "dt_bias": (dt_bias, (4, width)),
        "A": (A, (4, N)),
        "B": (B, (4, N, width)),
        "C": (C, (4, N, width)),
        "D": (D, (4, width)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: {width} channels and {N} states need {shape}")
    if conv_weight.shape[0] != 4 or conv_weight.shape[1] % 2 == 0:
        raise ValueError(f"conv_weight has shape {tuple(conv_weight.shape)}: pass (4, taps) with an odd number of taps")
