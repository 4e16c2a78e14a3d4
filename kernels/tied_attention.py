"""Tied attention: softmax attention whose query, key and value are one tensor (arXiv 2306.01129, eq. 11).

    out = softmax(s w w^T) w        with w (B, H, N, D), s = 1 / sqrt(D) unless given

The scores are symmetric before the softmax, and one gradient is returned instead of three:
with P the softmax, dS = P * (dO w^T - <dO, out>), the gradient is dw = P^T dO + s (dS + dS^T) w.

Cost a head: 4 N^2 D FLOPs forward, 10 N^2 D backward; N D elements read and N D written forward.

The Triton kernels read each tile of w once for both products, and keep one number a row (lse) for the backward
pass. There a program owns a tile i of rows and loops over tiles j: S_ij = S_ji^T is computed once and gives
P_ij = exp(S_ij - lse_i) and P_ji^T = exp(S_ij - lse_j), so that five products make the whole gradient, written once
and without atomics: the same in every run. Three separate gradients take seven products and two additions.

On CPU, torch's fused attention of (w, w, w) was faster than explicit products and softmax, forward (by 1.1
to 3 times) and backward, and faster than the gradient above written with explicit products, at every shape
of the CRATE models (tests/bench/crate.py prints the comparison). It also keeps no N x N matrix. It is
therefore what runs there; `reference` is the definition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.attention import (
    accumulation_type,
    load_tile,
    rows_contiguous,
    store_tile,
    strides,
    under_autocast,
    widest_head,
)
from zoo.kernels.dispatch import use_triton
from zoo.kernels.jit import cdiv, dot, dot_precision, next_power_of_2, on_amd, triton_jit

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["reference", "tied_attention"]


def tied_attention(w: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale w w^T) w, differentiable, without the N x N scores in memory.

    Args:
        w: (B, H, N, D), any float dtype, contiguous in the last axis.
        scale: factor of the scores, 1 / sqrt(D) by default.

    Returns:
        (B, H, N, D) in the dtype of `w`.
    """
    return _tied_attention(w, scale)


def reference(w: Tensor, scale: float | None = None) -> Tensor:
    """The definition of `tied_attention` in plain torch; the scores are materialised."""
    if scale is None:
        scale = w.shape[-1] ** -0.5
    return torch.softmax((w * scale) @ w.transpose(-2, -1), dim=-1) @ w


@torch.fx.wrap
def _tied_attention(w: Tensor, scale: float | None) -> Tensor:
    if not torch.jit.is_scripting():
        width, limit = w.shape[-1], widest_head(w.dtype)
        unsupported = f"a head size of {width} in {w.dtype} (at most {limit})" if width > limit else None
        if use_triton("tied_attention", w, unsupported=unsupported):
            return torch.ops.zoo.tied_attention(under_autocast(w)[0], scale)[0]
    return F.scaled_dot_product_attention(w, w, w, scale=scale)


# The operator ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("zoo::tied_attention", mutates_args=())
def _forward(w: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    return launch_forward(w, scale)


@_forward.register_fake
def _(w, scale):
    return _outputs(w)


def _outputs(w: Tensor) -> tuple[Tensor, Tensor]:
    """Output (B, H, N, D), heads beside each other in memory, and the logarithm of each row's softmax sum."""
    B, H, N, D = w.shape
    return w.new_empty(B, N, H, D).transpose(1, 2), w.new_empty(B, H, N, dtype=accumulation_type(w))


@torch.library.custom_op("zoo::tied_attention_backward", mutates_args=())
def _backward_op(grad: Tensor, w: Tensor, out: Tensor, lse: Tensor, scale: float | None) -> Tensor:
    return launch_backward(grad, w, out, lse, scale)


@_backward_op.register_fake
def _(grad, w, out, lse, scale):
    return _outputs(w)[0]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], *output)
    ctx.scale = inputs[1]


def _backward(ctx, grad, _):
    return torch.ops.zoo.tied_attention_backward(grad, *ctx.saved_tensors, ctx.scale), None


_forward.register_autograd(_backward, setup_context=_setup_context)


# Triton: strides are tuples (batch, head, row) ---------------------------------------------------------------------


@triton_jit
def _forward_kernel(
    W, Out, Lse, stride_w, stride_o, H, N,
    D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile of rows of one image and head."""
    tiles = tl.cdiv(N, BLOCK_I)
    pid = tl.program_id(0)
    h = pid // tiles % H
    b = (pid // tiles // H).to(tl.int64)
    rows = pid % tiles * BLOCK_I + tl.arange(0, BLOCK_I)
    wide: tl.constexpr = Lse.dtype.element_ty
    W += b * stride_w[0] + h * stride_w[1]
    wi = load_tile(W, rows, N, stride_w[2], D, BLOCK_D)
    acc = tl.zeros([BLOCK_I, BLOCK_D], wide)
    top = tl.full([BLOCK_I], float("-inf"), wide)
    total = tl.zeros([BLOCK_I], wide)
    for start in range(0, N, BLOCK_J):
        columns = start + tl.arange(0, BLOCK_J)
        wj = load_tile(W, columns, N, stride_w[2], D, BLOCK_D)
        s = tl.where((columns < N)[None, :], dot(wi, tl.trans(wj), PRECISION) * SCALE, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp(s - new_top[:, None])
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + dot(p.to(wj.dtype), wj, PRECISION)
        top = new_top
    store_tile(Out + b * stride_o[0] + h * stride_o[1], acc / total[:, None], rows, N, stride_o[2], D, BLOCK_D)
    tl.store(Lse + (b * H + h) * N + rows, top + tl.log(total), mask=rows < N)


@triton_jit
def _delta_kernel(
    Out, Grad, Delta, stride_o, stride_g, H, N, D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_D: tl.constexpr
):
    """delta_i = <dO_i, out_i> of a tile of rows."""
    tiles = tl.cdiv(N, BLOCK_I)
    pid = tl.program_id(0)
    h = pid // tiles % H
    b = (pid // tiles // H).to(tl.int64)
    rows = pid % tiles * BLOCK_I + tl.arange(0, BLOCK_I)
    out = load_tile(Out + b * stride_o[0] + h * stride_o[1], rows, N, stride_o[2], D, BLOCK_D)
    grad = load_tile(Grad + b * stride_g[0] + h * stride_g[1], rows, N, stride_g[2], D, BLOCK_D)
    delta = tl.sum(out.to(Delta.dtype.element_ty) * grad.to(Delta.dtype.element_ty), 1)
    tl.store(Delta + (b * H + h) * N + rows, delta, mask=rows < N)


@triton_jit
def _backward_kernel(
    W, Grad, Lse, Delta, DW, stride_w, stride_g, stride_dw, H, N,
    D: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dw of a tile of rows, from the products of the module's docstring."""
    tiles = tl.cdiv(N, BLOCK_I)
    pid = tl.program_id(0)
    h = pid // tiles % H
    b = (pid // tiles // H).to(tl.int64)
    rows = pid % tiles * BLOCK_I + tl.arange(0, BLOCK_I)
    W += b * stride_w[0] + h * stride_w[1]
    Grad += b * stride_g[0] + h * stride_g[1]
    Lse += (b * H + h) * N
    Delta += (b * H + h) * N
    wi = load_tile(W, rows, N, stride_w[2], D, BLOCK_D)
    gi = load_tile(Grad, rows, N, stride_g[2], D, BLOCK_D)
    lse_i = tl.load(Lse + rows, mask=rows < N, other=float("inf"))
    delta_i = tl.load(Delta + rows, mask=rows < N, other=0.0)
    dw = tl.zeros([BLOCK_I, BLOCK_D], Lse.dtype.element_ty)
    for start in range(0, N, BLOCK_J):
        columns = start + tl.arange(0, BLOCK_J)
        wj = load_tile(W, columns, N, stride_w[2], D, BLOCK_D)
        gj = load_tile(Grad, columns, N, stride_g[2], D, BLOCK_D)
        lse_j = tl.load(Lse + columns, mask=columns < N, other=float("inf"))
        delta_j = tl.load(Delta + columns, mask=columns < N, other=0.0)
        s = tl.where((columns < N)[None, :], dot(wi, tl.trans(wj), PRECISION) * SCALE, float("-inf"))
        p_ij = tl.exp(s - lse_i[:, None])
        p_ji = tl.exp(s - lse_j[None, :])  # transposed, as everything here: rows i, columns j
        ds = p_ij * (dot(gi, tl.trans(wj), PRECISION) - delta_i[:, None])
        ds += p_ji * (dot(wi, tl.trans(gj), PRECISION) - delta_j[None, :])
        dw += dot(p_ji.to(gj.dtype), gj, PRECISION)
        dw += dot((ds * SCALE).to(wj.dtype), wj, PRECISION)
    store_tile(DW + b * stride_dw[0] + h * stride_dw[1], dw, rows, N, stride_dw[2], D, BLOCK_D)


# Launches ----------------------------------------------------------------------------------------------------------


def launch_forward(w: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """The output (B, H, N, D), and the logarithm of each row's softmax sum (B, H, N)."""
    w = rows_contiguous(w)
    B, H, N, _ = w.shape
    out, lse = _outputs(w)
    settings = _settings(w, scale, backward=False)
    grid = (cdiv(N, settings["BLOCK_I"]) * H * B,)
    _forward_kernel[grid](w, out, lse, strides(w), strides(out), H, N, **settings)
    return out, lse


def launch_backward(grad: Tensor, w: Tensor, out: Tensor, lse: Tensor, scale: float | None) -> Tensor:
    """The gradient of w, laid out as the output."""
    grad, w = rows_contiguous(grad), rows_contiguous(w)
    B, H, N, _ = w.shape
    dw = _outputs(w)[0]
    delta = torch.empty_like(lse)
    settings = _settings(w, scale, backward=True)
    grid = (cdiv(N, settings["BLOCK_I"]) * H * B,)
    sizes = {name: settings[name] for name in ("D", "BLOCK_I", "BLOCK_D", "num_warps")}
    _delta_kernel[grid](out, grad, delta, strides(out), strides(grad), H, N, **sizes)
    _backward_kernel[grid](w, grad, lse, delta, dw, strides(w), strides(grad), strides(dw), H, N, **settings)
    return dw


def _settings(w: Tensor, scale: float | None, backward: bool) -> dict:
    """Block sizes and warps: what `python -m tests.kernels.compile_only tied_attention` finds without spills."""
    N, D = w.shape[2:]
    block_d = max(16, next_power_of_2(D))
    if w.element_size() > 2:
        block_i, block_j, warps = (16, 16, 4) if backward else (32, 32, 4 if block_d <= 32 else 8)
    elif backward:
        block_i, block_j, warps = (64, 32, 4) if block_d <= 64 else (64, 32, 8)
    else:
        block_i, block_j, warps = 128, 64, 4 if block_d <= 32 else 8
    return dict(
        D=D,
        BLOCK_I=max(16, min(block_i, next_power_of_2(N))),
        BLOCK_J=block_j,
        BLOCK_D=block_d,
        SCALE=D**-0.5 if scale is None else float(scale),
        PRECISION=dot_precision(w.dtype),
        num_warps=warps,
        num_stages=1 if on_amd() or w.element_size() > 2 else 2,
    )
