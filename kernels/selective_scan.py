"""Selective scan: a linear recurrence whose step size, input and output maps depend on the input.

    h_t = exp(D_t A) h_{t-1} + D_t u_t B_t,   y_t = C_t . h_t + D u_t,   y_t <- y_t SiLU(z_t)

with D_t = softplus(dt_t + dt_bias) and h_0 = 0 (Mamba, arXiv 2312.00752, as ViM2, arXiv 2403.19888, uses it;
exact discretisation of A, Euler step for B, as every public implementation has it).

Cost for a batch of b sequences of length L with d channels, G groups and N states: about 9 b d N L FLOPs
forward; (3 d + 2 G N) L elements moved (4 d with the gate), a few FLOPs a byte. Materialising the states would
move 2 d N L more and more; here only the state at every border of a segment is kept (`scan_steps.py`).

On a GPU one kernel does all of it, step sizes, skip and gate included, and its backward pass recomputes the states
(`scan_tiles.py`): nothing but the (3 d + 2 G N) L elements above (4 d with the gate), and N / 128 states a channel and
step; the backward pass moves twice as much, and (d / (16 G)) / 4 or fewer slots of gradients of B and C. Exponentials,
N for each channel and step, are as much of its time as memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import scan_tiles
from zoo.kernels.dispatch import use_triton
from zoo.kernels.scan_steps import num_segments, scan_steps, scan_steps_backward, working_dtype

__all__ = ["reference", "selective_scan"]


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan (b, d, L) sequences; differentiable in every tensor.

    Args:
        u: input (b, d, L).
        dt: raw step sizes (b, d, L); not negative unless `softplus`.
        A: (d, N), not positive.
        B: (b, G, N, L), or (b, N, L) for one group; channel c uses group c // (d / G).
        C: as B.
        D: skip weights (d).
        z: gate (b, d, L).
        dt_bias: (d), added to `dt`.
        softplus: step sizes are softplus(dt + dt_bias).
        return_last_state: also return h after the last step.

    Returns:
        y (b, d, L) in the type of `u`, and with `return_last_state` h (b, d, N) in float32 or float64, in which
        everything is computed.

    Raises:
        ValueError: shapes that do not fit together.
    """
    B, C = (m.unsqueeze(1) if m.ndim == 3 else m for m in (B, C))
    _check(u, dt, A, B, C)
    tensors = (u, dt, A, B, C, D, z, dt_bias)
    if use_triton("selective_scan", *tensors, unsupported=scan_tiles.unsupported(A.shape[1])):
        y, last, _ = torch.ops.zoo.selective_scan_triton(*tensors, softplus)
        return (y, last) if return_last_state else y
    dtype = working_dtype(u, A)
    delta = dt.to(dtype)
    if dt_bias is not None:
        delta = delta + dt_bias.to(dtype)[:, None]
    if softplus:
        delta = F.softplus(delta)
    x = u.to(dtype)
    y, last, _ = torch.ops.zoo.selective_scan(x, delta, A.to(dtype), B.to(dtype), C.to(dtype))
    if D is not None:
        y = y + D.to(dtype)[:, None] * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    y = y.to(u.dtype)
    return (y, last) if return_last_state else y


def reference(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition of `selective_scan`, step by step; autograd keeps every state."""
    B, C = (m.unsqueeze(1) if m.ndim == 3 else m for m in (B, C))
    b, d, length = u.shape
    delta = dt if dt_bias is None else dt + dt_bias[:, None]
    if softplus:
        delta = F.softplus(delta)
    B, C = (m.repeat_interleave(d // m.shape[1], dim=1) for m in (B, C))  # (b, d, N, L)
    h = u.new_zeros(b, d, A.shape[1])
    outputs = []
    for t in range(length):
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta[:, :, t] * u[:, :, t])[..., None] * B[..., t]
        outputs.append((h * C[..., t]).sum(-1))
    y = torch.stack(outputs, dim=-1) if outputs else torch.zeros_like(u)
    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * F.silu(z)
    return (y, h) if return_last_state else y


def _check(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> None:
    b, d, length = u.shape
    if dt.shape != u.shape:
        raise ValueError(f"dt has shape {tuple(dt.shape)}, u {tuple(u.shape)}: pass one step size for each element")
    if A.ndim != 2 or A.shape[0] != d:
        raise ValueError(f"A has shape {tuple(A.shape)}: pass ({d}, N) for the {d} channels of u")
    if B.shape != C.shape or B.shape[0] != b or tuple(B.shape[2:]) != (A.shape[1], length):
        raise ValueError(
            f"B and C have shapes {tuple(B.shape)} and {tuple(C.shape)}: pass ({b}, groups, {A.shape[1]}, {length})"
        )
    if d % B.shape[1]:
        raise ValueError(f"{B.shape[1]} groups do not divide the {d} channels of u: pass a divisor")


# The operator: everything after the step sizes and before skip and gate ----------------------------------------


@torch.library.custom_op("zoo::selective_scan", mutates_args=())
def _scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b, d, length = u.shape
    G, N = B.shape[1:3]
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    last = u.new_empty(b, d, N)
    borders = u.new_empty(b, num_segments(length, d * N), G, N, d // G)
    rows_A = _by_group(A, G)
    for image in range(b):
        step_y = _steps(y[image], G)
        borders[image], h = scan_steps(
            length,
            rows_A,
            d // G,
            _inputs(u[image], delta[image], B[image], C[image]),
            lambda s, e, out, step_y=step_y: step_y[s:e].copy_(out),
        )
        last[image] = h.transpose(1, 2).reshape(d, N)
    return y, last, borders


@_scan.register_fake
def _(u, delta, A, B, C):
    b, d, length = u.shape
    G, N = B.shape[1:3]
    borders = u.new_empty(b, num_segments(length, d * N), G, N, d // G)
    return torch.empty_like(u, memory_format=torch.contiguous_format), u.new_empty(b, d, N), borders


@torch.library.custom_op("zoo::selective_scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor, dlast: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, borders: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    b, d, length = u.shape
    G, N = B.shape[1:3]
    du, ddelta, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (u, delta, B, C))
    rows_A = _by_group(A, G)
    dA = torch.zeros_like(rows_A)
    for image in range(b):
        step_u, step_delta, step_dy = (_steps(t[image], G) for t in (u, delta, dy))
        step_du, step_ddelta = _steps(du[image], G), _steps(ddelta[image], G)
        step_dB, step_dC = dB[image].permute(2, 0, 1), dC[image].permute(2, 0, 1)

        def emit(s, e, dd, dv, db, dc, views=(step_u, step_delta, step_du, step_ddelta, step_dB, step_dC)):
            x, steps, out_u, out_delta, out_B, out_C = views
            out_u[s:e] = dv * steps[s:e]
            out_delta[s:e] = dd.addcmul_(dv, x[s:e])
            out_B[s:e] = db
            out_C[s:e] = dc

        dA += scan_steps_backward(
            length,
            rows_A,
            d // G,
            borders[image],
            _inputs(u[image], delta[image], B[image], C[image]),
            lambda s, e, grad=step_dy: grad[s:e].contiguous(),
            emit,
            dlast[image].reshape(G, d // G, N).transpose(1, 2),
        )
    return du, ddelta, dA.transpose(1, 2).reshape(A.shape).contiguous(), dB, dC


@_scan_backward.register_fake
def _(dy, dlast, u, delta, A, B, C, borders):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (u, delta, A, B, C))


def _by_group(A: Tensor, groups: int) -> Tensor:
    """(d, N) -> (G, N, d / G)."""
    return A.reshape(groups, -1, A.shape[1]).transpose(1, 2).contiguous()


def _steps(x: Tensor, groups: int) -> Tensor:
    """A view (L, G, d / G) of one sequence (d, L)."""
    return x.view(groups, -1, x.shape[-1]).permute(2, 0, 1) if x.is_contiguous() else _steps(x.contiguous(), groups)


def _inputs(u: Tensor, delta: Tensor, B: Tensor, C: Tensor):
    """The chunks of one sequence that `scan_steps` asks for."""
    groups = B.shape[0]
    step_u, step_delta = _steps(u, groups), _steps(delta, groups)
    step_B, step_C = B.permute(2, 0, 1), C.permute(2, 0, 1)

    def chunk(s: int, e: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d = step_delta[s:e].contiguous()
        return d, d * step_u[s:e], step_B[s:e].contiguous(), step_C[s:e].contiguous()

    return chunk


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[2])
    ctx.set_materialize_grads(True)


def _backward(ctx, dy, dlast, dborders):
    return _scan_backward(dy, dlast, *ctx.saved_tensors)


_scan.register_autograd(_backward, setup_context=_setup_context)


# The operator on a GPU, with everything in it ------------------------------------------------------------------


@torch.library.custom_op("zoo::selective_scan_triton", mutates_args=())
def _scan_triton(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_forward(u, dt, A, B, C, D, z, dt_bias, softplus)


def launch_forward(u, dt, A, B, C, D, z, dt_bias, softplus) -> tuple[Tensor, Tensor, Tensor]:
    """Output, last states and borders, through `scan_tiles`."""
    shape, given = _tiled(u, dt, A, B, C, D, z, dt_bias, softplus)
    y = torch.empty_like(given.u)
    borders, last = scan_tiles.forward(shape, given, y)
    return y, last, borders


@_scan_triton.register_fake
def _(u, dt, A, B, C, D, z, dt_bias, softplus):
    b, d, length = u.shape
    dtype = working_dtype(u, A)
    borders = u.new_empty(b, -(-length // scan_tiles.SEGMENT), d, A.shape[1], dtype=dtype)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    return y, u.new_empty(b, d, A.shape[1], dtype=dtype), borders


@torch.library.custom_op("zoo::selective_scan_triton_backward", mutates_args=())
def _scan_triton_backward(
    dy: Tensor,
    dlast: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    borders: Tensor,
    softplus: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return launch_backward(dy, dlast, u, dt, A, B, C, D, z, dt_bias, borders, softplus)


def launch_backward(dy, dlast, u, dt, A, B, C, D, z, dt_bias, borders, softplus) -> tuple[Tensor, ...]:
    """Gradients in the order of the arguments, through `scan_tiles`; an empty tensor for each that is absent."""
    shape, given = _tiled(u, dt, A, B, C, D, z, dt_bias, softplus)
    grads = scan_tiles.backward(shape, given, borders, dy.contiguous(), dlast.to(borders.dtype).contiguous())
    dA, dB, dC = (g.sum(0).to(t.dtype) for g, t in ((grads.A, A), (grads.B, B), (grads.C, C)))
    dD, d_bias = (
        u.new_empty(0) if t is None else g.sum(0).to(t.dtype) for g, t in ((grads.skip, D), (grads.bias, dt_bias))
    )
    return grads.u, grads.step, dA, dB, dC, dD, u.new_empty(0) if z is None else grads.z, d_bias


@_scan_triton_backward.register_fake
def _(dy, dlast, u, dt, A, B, C, D, z, dt_bias, borders, softplus):
    return tuple(
        u.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (u, dt, A, B, C, D, z, dt_bias)
    )


def _tiled(u, dt, A, B, C, D, z, dt_bias, softplus) -> tuple[scan_tiles.Shape, scan_tiles.Inputs]:
    b, d, length = u.shape
    G, N = B.shape[1:3]
    dtype = working_dtype(u, A)
    A, bias, skip = (A.new_zeros(d, dtype=dtype) if w is None else w.to(dtype).contiguous() for w in (A, dt_bias, D))
    u, dt, B, C = (t.contiguous() for t in (u, dt, B, C))
    z = None if z is None else z.contiguous()
    return (
        scan_tiles.Shape(b, G, d // G, length, N),
        scan_tiles.Inputs(u, dt, B, C, A, bias, A, skip, z, softplus),
    )


def _setup_triton(ctx, inputs, output):
    *tensors, ctx.softplus = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(True)


def _backward_triton(ctx, dy, dlast, dborders):
    *tensors, borders = ctx.saved_tensors
    grads = _scan_triton_backward(dy, dlast, *tensors, borders, ctx.softplus)
    return *(None if t is None else g for g, t in zip(grads, tensors)), None


_scan_triton.register_autograd(_backward_triton, setup_context=_setup_triton)
