"""Four-direction selective scan of a map (VMamba, arXiv 2401.10166; the token mixer of ViM2, arXiv 2403.19888).

A map is read in K = 4 orders of its pixels. In order k, with u_t the pixel (D channels) at step t,

    [r, B, C] = P_k u,   d = softplus(W_k r + b_k),
    h_t = exp(d A_k) h_{t-1} + d u_t B,   y_k[pixel of t] = C . h_t + S_k u_t,

and the output of a pixel is the sum of its four y_k. R = dim r is small (D / 32).

Cost for L pixels and N states: K L D (R + 2N) multiply-adds in the projection, K L D R in the steps and about
9 K L D N FLOPs in the scan. Elements moved: reading x and writing y, 2 L D, plus K L (R + 2N) for the
projection. To stay near that
- the projection, pointwise, is one product with the four P_k stacked, before any reordering;
- the step sizes are expanded from r where they are used, K L D of them never exist;
- x is read through the orders, and outputs are added to two maps (one row-major, one column-major), so that
  no reordered copy of x and no separate y_k exists;
- the state is kept at segment borders only (`scan_steps.py`), which takes less room than x.

On a GPU (`scan_tiles.py`) the projection is a product of torch's, everything after it one kernel. Opposite directions
are added by the program that runs both, so that two maps of float32 are written and added, 5 L D elements for the
output in place of the 9 of four; each block of 16 channels reads r, B and C, from the second-level cache. The backward
pass adds up gradients of r, B and C over the channels in the program, in at most four slots, which would otherwise be
D / 16 times as large. Exponentials, N for each of the K L D steps, take about as long as all that memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import scan_tiles
from zoo.kernels.dispatch import use_triton
from zoo.kernels.scan_steps import num_segments, scan_steps, scan_steps_backward, softplus, working_dtype

__all__ = ["cross_merge", "cross_scan", "reference", "scan2d", "scan_orders"]

# (column-major, reversed) of each direction
MODES: dict[str, tuple[tuple[bool, bool], ...]] = {
    "cross": ((False, False), (True, False), (False, True), (True, True)),
    "bidirectional": ((False, False), (False, False), (False, True), (False, True)),
    "unidirectional": ((False, False),) * 4,
}


def scan2d(
    x: Tensor,
    proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    mode: str = "cross",
) -> Tensor:
    """Scan a channels-last map in four orders and add the results; differentiable in every tensor.

    Args:
        x: (B, H, W, D).
        proj_weight: (4, R + 2N, D), the projections to r, B and C.
        dt_weight: (4, D, R).
        dt_bias: (4, D).
        A: (4 D, N), not positive.
        D: skip weights (4 D).
        mode: "cross": row-major, column-major, and both reversed; "bidirectional": twice row-major, twice
            reversed; "unidirectional": four times row-major.

    Returns:
        (B, H, W, D) in the wider type of `x` and `D`; computed in float32 or float64, also under autocast.
    """
    return _scan2d_on_device(x, proj_weight, dt_weight, dt_bias, A, D, mode)


def reference(
    x: Tensor,
    proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    mode: str = "cross",
) -> Tensor:
    """The definition of `scan2d` with explicit scans; every state is materialised."""
    from zoo.kernels.selective_scan import reference as scan

    batch, height, width, dim = x.shape
    rank = dt_weight.shape[-1]
    xs = cross_scan(x.permute(0, 3, 1, 2), mode)  # (B, 4, D, L)
    r, B, C = torch.einsum("bkdl,kcd->bkcl", xs, proj_weight).split([rank, A.shape[1], A.shape[1]], dim=2)
    dt = torch.einsum("bkrl,kdr->bkdl", r, dt_weight)
    y = scan(xs.flatten(1, 2), dt.flatten(1, 2), A, B, C, D, dt_bias=dt_bias.flatten(), softplus=True)
    return cross_merge(y.view(batch, 4, dim, -1), height, width, mode).permute(0, 2, 3, 1)


@torch.fx.wrap
def _scan2d_on_device(
    x: Tensor, proj_weight: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, mode: str
) -> Tensor:
    if not torch.jit.is_scripting():
        weights = (proj_weight, dt_weight, dt_bias, A, D)
        if use_triton("scan2d", x, *weights, unsupported=scan_tiles.unsupported(A.shape[1], dt_weight.shape[2])):
            return torch.ops.zoo.scan2d_triton(x, *weights, mode)[0]
    return torch.ops.zoo.scan2d(x, proj_weight, dt_weight, dt_bias, A, D, mode)[0]


def scan_orders(height: int, width: int, mode: str = "cross", device: torch.device | None = None) -> Tensor:
    """The pixel y * width + x that each direction visits at each step: (L, 4) integers.

    Raises:
        ValueError: an unknown mode.
    """
    _check_mode(mode)
    rows = torch.arange(height * width, device=device)
    columns = rows.view(height, width).t().flatten()
    orders = [columns if by_column else rows for by_column, _ in MODES[mode]]
    return torch.stack([o.flip(0) if back else o for o, (_, back) in zip(orders, MODES[mode])], dim=1)


def cross_scan(x: Tensor, mode: str = "cross") -> Tensor:
    """Maps (B, C, H, W) -> the sequences of the four directions (B, 4, C, H W)."""
    orders = scan_orders(x.shape[2], x.shape[3], mode, x.device)
    return x.flatten(2)[:, :, orders.t()].transpose(1, 2)


def cross_merge(y: Tensor, height: int, width: int, mode: str = "cross") -> Tensor:
    """Sequences of the four directions (B, 4, C, H W) -> the sum of their maps (B, C, H, W)."""
    orders = scan_orders(height, width, mode, y.device)
    maps = [y[:, k][..., orders[:, k].argsort()] for k in range(4)]
    return (maps[0] + maps[1] + maps[2] + maps[3]).unflatten(-1, (height, width))


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown: pass {', '.join(map(repr, MODES))}")


# The operator --------------------------------------------------------------------------------------------------


class _Scan:
    """One image of `scan2d`: what forward and backward have in common. Attributes with _k are by direction."""

    def __init__(self, x: Tensor, size, weights: tuple[Tensor, ...], mode: str):
        proj_weight, dt_weight, self.bias_k, A, skip = weights
        self.dim, self.rank, self.N = x.shape[1], dt_weight.shape[2], A.shape[1]
        self.length = x.shape[0]
        self.directions = MODES[mode]
        orders = scan_orders(*size, mode, x.device)  # (L, 4)
        self.pixels = orders.flatten()
        self.slots = (orders * 4 + torch.arange(4, device=x.device)).flatten()  # rows of (L, 4) in scan order
        self.size = size
        self.x = x
        self.stacked = proj_weight.flatten(0, 1)
        self.expand_k = dt_weight.transpose(1, 2)  # (4, R, D)
        self.A_k = A.view(4, self.dim, self.N).transpose(1, 2).contiguous()
        self.skip_k = skip.view(4, self.dim)
        projected = (x @ self.stacked.t()).view(self.length * 4, -1)
        self.projected = projected.index_select(0, self.slots).view(self.length, 4, -1)

    def gather(self, tensor: Tensor, s: int, e: int) -> Tensor:
        """Pixels (L, D) in the order of steps s to e: (T, 4, D)."""
        return tensor.index_select(0, self.pixels[4 * s : 4 * e]).view(e - s, 4, -1)

    def parts(self, s: int, e: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """u (T, 4, D), r by direction (4, T, R), raw step sizes (T, 4, D), B and C (T, 4, N) of some steps."""
        r, B, C = self.projected[s:e].split([self.rank, self.N, self.N], dim=2)
        r = r.transpose(0, 1)
        raw = self.x.new_empty(e - s, 4, self.dim)  # step-first in memory
        torch.add(torch.bmm(r, self.expand_k).transpose(0, 1), self.bias_k, out=raw)
        return self.gather(self.x, s, e), r, raw, B, C

    def add_to_maps(self, maps: Tensor, s: int, e: int, values: Tensor) -> None:
        """Add values (T, 4, D) of steps s to e to the row-major and the column-major map, (2, L, D)."""
        for k, (by_column, back) in enumerate(self.directions):
            if back:
                maps[int(by_column), self.length - e : self.length - s] += values[:, k].flip(0)
            else:
                maps[int(by_column), s:e] += values[:, k]

    def new_maps(self) -> Tensor:
        return self.x.new_zeros(1 + any(by_column for by_column, _ in self.directions), self.length, self.dim)

    def joined(self, maps: Tensor) -> Tensor:
        """The sum of both maps, row-major: (H, W, D)."""
        height, width = self.size
        rows = maps[0].view(height, width, self.dim)
        return rows + maps[1].view(width, height, self.dim).transpose(0, 1) if len(maps) > 1 else rows


def _working(*tensors: Tensor) -> list[Tensor]:
    dtype = working_dtype(*tensors)
    return [t.to(dtype).contiguous() for t in tensors]


@torch.library.custom_op("zoo::scan2d", mutates_args=())
def _scan2d(
    x: Tensor, proj_weight: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, mode: str
) -> tuple[Tensor, Tensor]:
    _check(x, proj_weight, dt_weight, dt_bias, A, D)
    _check_mode(mode)
    batch, height, width, dim = x.shape
    y = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, D.dtype))
    with torch.autocast(x.device.type, enabled=False):
        images, *weights = _working(x, proj_weight, dt_weight, dt_bias, A, D)
        borders = images.new_empty(batch, num_segments(height * width, A.numel()), 4, A.shape[1], dim)
        for i in range(batch):
            scan = _Scan(images[i].flatten(0, 1), (height, width), tuple(weights), mode)
            maps = scan.new_maps()
            current: list[Tensor] = []

            def inputs(s: int, e: int, scan=scan, current=current):
                u, _, raw, B, C = scan.parts(s, e)
                delta = softplus(raw)
                current[:] = [u]
                return delta, delta * u, B, C

            def emit(s: int, e: int, out: Tensor, scan=scan, maps=maps, current=current) -> None:
                scan.add_to_maps(maps, s, e, out.addcmul_(current[0], scan.skip_k))

            borders[i], _ = scan_steps(scan.length, scan.A_k, dim, inputs, emit)
            y[i] = scan.joined(maps)
    return y, borders


@_scan2d.register_fake
def _(x, proj_weight, dt_weight, dt_bias, A, D, mode):
    batch, height, width, dim = x.shape
    segments = num_segments(height * width, A.numel())
    borders = x.new_empty(batch, segments, 4, A.shape[1], dim, dtype=working_dtype(x, D))
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, D.dtype)), borders


@torch.library.custom_op("zoo::scan2d_backward", mutates_args=())
def _scan2d_backward(
    dy: Tensor,
    x: Tensor,
    proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    borders: Tensor,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, height, width, dim = x.shape
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    with torch.autocast(x.device.type, enabled=False):
        images, *weights = _working(x, proj_weight, dt_weight, dt_bias, A, D)
        d_proj, d_weight, d_bias, dA, d_skip = (torch.zeros_like(w) for w in weights)
        dA_k, d_skip_k = (images.new_zeros(4, n, dim) for n in (A.shape[1], 1))
        for i in range(batch):
            scan = _Scan(images[i].flatten(0, 1), (height, width), tuple(weights), mode)
            grad = dy[i].to(images.dtype).reshape(-1, dim)
            maps = scan.new_maps()
            d_projected = torch.empty_like(scan.projected)
            current: list[Tensor] = []

            def inputs(s: int, e: int, scan=scan, current=current):
                u, r, raw, B, C = scan.parts(s, e)
                delta = softplus(raw)
                current[:] = [u, r, raw, delta]
                return delta, delta * u, B, C

            def output_grad(s: int, e: int, scan=scan, current=current, grad=grad) -> Tensor:
                current.append(scan.gather(grad, s, e))
                return current[-1]

            def emit(s, e, dd, dv, dB, dC, scan=scan, maps=maps, current=current, d_projected=d_projected) -> None:
                u, r, raw, delta, dout = current
                d_skip_k.add_((u * dout).sum(0).unsqueeze(1))
                d_raw = torch.ops.aten.softplus_backward(dd.addcmul_(dv, u), raw, 1, 20).transpose(0, 1)  # (4, T, D)
                du = dv.mul_(delta).addcmul_(dout, scan.skip_k)
                scan.add_to_maps(maps, s, e, du)
                d_bias.add_(d_raw.sum(1))
                d_weight.add_(torch.bmm(d_raw.transpose(1, 2), r))
                torch.cat([torch.bmm(d_raw, scan.expand_k.mT).transpose(0, 1), dB, dC], 2, out=d_projected[s:e])

            dA_k += scan_steps_backward(scan.length, scan.A_k, dim, borders[i], inputs, output_grad, emit)
            unordered = torch.empty_like(d_projected).view(scan.length * 4, -1)
            unordered.index_copy_(0, scan.slots, d_projected.view(scan.length * 4, -1))
            unordered = unordered.view(scan.length, -1)
            d_proj.view(-1, dim).addmm_(unordered.t(), scan.x)
            dx[i] = scan.joined(maps) + (unordered @ scan.stacked).view(height, width, dim)
        dA.copy_(dA_k.transpose(1, 2).reshape(dA.shape))
        d_skip.copy_(d_skip_k.flatten())
    sources = (proj_weight, dt_weight, dt_bias, A, D)
    grads = (d_proj, d_weight, d_bias, dA, d_skip)
    d_proj, d_weight, d_bias, dA, d_skip = (g.to(s.dtype) for g, s in zip(grads, sources))
    return dx, d_proj, d_weight, d_bias, dA, d_skip


@_scan2d_backward.register_fake
def _(dy, x, proj_weight, dt_weight, dt_bias, A, D, borders, mode):
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, proj_weight, dt_weight, dt_bias, A, D)
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.mode = inputs
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx, dy, dborders):
    return *_scan2d_backward(dy, *ctx.saved_tensors, ctx.mode), None


_scan2d.register_autograd(_backward, setup_context=_setup_context)


# The operator on a GPU -----------------------------------------------------------------------------------------


def _tiled(x, proj_weight, dt_weight, dt_bias, A, D, mode) -> tuple[scan_tiles.Shape, scan_tiles.Inputs, Tensor]:
    """Sizes and inputs of the kernels, and x (b L, D) in the working type, which the projection reads."""
    _check(x, proj_weight, dt_weight, dt_bias, A, D)
    _check_mode(mode)
    batch, height, width, dim = x.shape
    directions = MODES[mode]
    shape = scan_tiles.Shape(
        batch,
        4,
        dim,
        height * width,
        A.shape[1],
        dt_weight.shape[2],
        height,
        width,
        pixels=True,
        column=directions[1][0],
        back=directions[2][1],
    )
    wide, proj_weight, dt_weight, dt_bias, A, D = _working(x, proj_weight, dt_weight, dt_bias, A, D)
    wide = wide.view(-1, dim)
    projected = (wide @ proj_weight.flatten(0, 1).t()).view(batch, height * width, 4, proj_weight.shape[1])
    given = scan_tiles.Inputs(
        x.contiguous(), projected, projected, projected, dt_weight, dt_bias, A, D, None, softplus=True
    )
    return shape, given, wide


@torch.library.custom_op("zoo::scan2d_triton", mutates_args=())
def _scan2d_triton(
    x: Tensor, proj_weight: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, mode: str
) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        return launch_forward(x, proj_weight, dt_weight, dt_bias, A, D, mode)


def launch_forward(x, proj_weight, dt_weight, dt_bias, A, D, mode) -> tuple[Tensor, Tensor]:
    """Output and borders, through `scan_tiles`."""
    shape, given, _ = _tiled(x, proj_weight, dt_weight, dt_bias, A, D, mode)
    maps = given.A.new_empty(2, *x.shape)
    borders, _ = scan_tiles.forward(shape, given, maps)
    return (maps[0] + maps[1]).to(torch.promote_types(x.dtype, D.dtype)), borders


@_scan2d_triton.register_fake
def _(x, proj_weight, dt_weight, dt_bias, A, D, mode):
    batch, height, width, _ = x.shape
    borders = x.new_empty(batch, -(-height * width // scan_tiles.SEGMENT), *A.shape, dtype=working_dtype(x, D))
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, D.dtype)), borders


@torch.library.custom_op("zoo::scan2d_triton_backward", mutates_args=())
def _scan2d_triton_backward(
    dy: Tensor,
    x: Tensor,
    proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    borders: Tensor,
    mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        return launch_backward(dy, x, proj_weight, dt_weight, dt_bias, A, D, borders, mode)


def launch_backward(dy, x, proj_weight, dt_weight, dt_bias, A, D, borders, mode) -> tuple[Tensor, ...]:
    """Gradients of x and the weights, through `scan_tiles`."""
    shape, given, wide = _tiled(x, proj_weight, dt_weight, dt_bias, A, D, mode)
    grads = scan_tiles.backward(shape, given, borders, dy.contiguous(), None)
    d_projected = grads.step.sum(0).flatten(0, 1).flatten(1)
    du = (grads.u[0] + grads.u[1]).view(wide.shape)
    dx = du.addmm_(d_projected, proj_weight.to(du.dtype).flatten(0, 1))
    weights = (d_projected.t() @ wide, *(g.sum(0) for g in (grads.w, grads.bias, grads.A, grads.skip)))
    sources = (proj_weight, dt_weight, dt_bias, A, D)
    return dx.view(x.shape).to(x.dtype), *(g.view(t.shape).to(t.dtype) for g, t in zip(weights, sources))


@_scan2d_triton_backward.register_fake
def _(dy, x, proj_weight, dt_weight, dt_bias, A, D, borders, mode):
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, proj_weight, dt_weight, dt_bias, A, D)
    )


def _backward_triton(ctx, dy, dborders):
    return *_scan2d_triton_backward(dy, *ctx.saved_tensors, ctx.mode), None


_scan2d_triton.register_autograd(_backward_triton, setup_context=_setup_context)


def _check(x: Tensor, proj_weight: Tensor, dt_weight: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor) -> None:
    dim, rank, N = x.shape[-1], dt_weight.shape[-1], A.shape[-1]
    expected = {
        "proj_weight": (proj_weight, (4, rank + 2 * N, dim)),
        "dt_weight": (dt_weight, (4, dim, rank)),
        "dt_bias": (dt_bias, (4, dim)),
        "A": (A, (4 * dim, N)),
        "D": (D, (4 * dim,)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: a map of {dim} channels, rank {rank} and "
                f"{N} states needs {shape}"
            )
