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
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.scan_steps import scan_steps, scan_steps_backward, softplus, working_dtype

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
    return torch.ops.zoo.channel_scan(x, expand, conv_weight, conv_bias, dt_weight, dt_bias, A, B, C, D)


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
def _(x, expand, conv_weight, conv_bias, dt_weight, dt_bias, A, B, C, D):
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
def _(dy, x, expand, conv_weight, conv_bias, dt_weight, dt_bias, A, B, C, D):
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
