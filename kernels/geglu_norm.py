"""The gate of Activator: both factors of a gated linear unit pass one LayerNorm (arXiv 2405.15953).

    out = LN(gelu(a)) * LN(b)        LN over the last axis, one weight and bias for both factors

a and b (..., f) are two projections of the tokens; GELU is the exact erf form and comes before the norm, so
the gate is not bounded below. SwiGLU and ReGLU have silu and relu in its place.

Cost a row of f elements: about 20 f FLOPs; 9 f elements moved here (activation 2 f, two norms 4 f, product 3 f),
3 f in a fused kernel. The norm's affine part cannot move into the projection behind: the product is not
linear in it. With p = dout * LN(b), q = dout * LN(gelu(a)) and hats for normalised factors, the gradients of weight
and bias are the sums of p * a^ + q * b^ and of p + q over rows.

On CPU plain calls were the fastest formulation: one LayerNorm over both factors stacked took 1.3 to 1.6 times the
time (the copy), normalising without weights and applying them afterwards 1.5 to 1.9 times
(tests/bench/activator.py).

On a GPU the unit is bound by memory, so that one kernel with 3 f elements a row for 9 f pays, and more so backward: it
reads a, b and the gradient and writes two gradients, 5 f, where the gradients of the four calls move about 18 f and
keep gelu(a) and both normalised factors, 3 f a row, which are recomputed here. Rows are shared by a few hundred
programs with their own sums for the gradients of weight and bias, which torch adds up in a fixed order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.dispatch import use_triton
from zoo.kernels.jit import cdiv, next_power_of_2, triton_jit

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["ACTIVATIONS", "geglu_norm", "reference"]

ACTIVATIONS = ("gelu", "silu", "relu")
_MAX_FEATURES = 4096  # a row stays in the registers of a program
_PROGRAMS = 512  # of the backward pass


def geglu_norm(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, act: str = "gelu") -> Tensor:
    """LN(act(a)) * LN(b) over the last axis, differentiable.

    Args:
        a: gate projection, (..., f), any float dtype; statistics are taken in float32 or wider.
        b: value projection, of the same shape.
        weight: scale of the LayerNorm, (f,), used for both factors.
        bias: shift of the LayerNorm, (f,), used for both factors.
        eps: epsilon of the LayerNorm.
        act: one of `ACTIVATIONS`.

    Returns:
        (..., f).

    Raises:
        ValueError: an unknown activation.
    """
    return _geglu_norm_on_device(a, b, weight, bias, eps, act)


@torch.fx.wrap
def _geglu_norm_on_device(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor, eps: float, act: str) -> Tensor:
    if not torch.jit.is_scripting():
        unsupported = _unsupported(a, b, act)
        if use_triton("geglu_norm", a, b, weight, bias, unsupported=unsupported):
            return torch.ops.zoo.geglu_norm(a, b, weight, bias, eps, act)
    f = weight.shape[0]
    return F.layer_norm(activate(a, act), [f], weight, bias, eps) * F.layer_norm(b, [f], weight, bias, eps)


def _unsupported(a: Tensor, b: Tensor, act: str) -> str | None:
    if act not in ACTIVATIONS:
        return f"an activation {act}"
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"a is {a.dtype} {tuple(a.shape)}, b {b.dtype} {tuple(b.shape)}"
    return f"{a.shape[-1]} features (at most {_MAX_FEATURES})" if a.shape[-1] > _MAX_FEATURES else None


def activate(a: Tensor, act: str) -> Tensor:
    """The gate's activation by its name."""
    if act == "gelu":
        return F.gelu(a)
    if act == "silu":
        return F.silu(a)
    if act == "relu":
        return F.relu(a)
    raise ValueError(f"activation {act} is unknown to the gate: pass 'gelu', 'silu' or 'relu'")


def reference(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, act: str = "gelu") -> Tensor:
    """The definition of `geglu_norm`, written out."""

    def norm(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight + bias

    return norm(activate(a, act)) * norm(b)


# The operator on a GPU -----------------------------------------------------------------------------------------


@torch.library.custom_op("zoo::geglu_norm", mutates_args=())
def _geglu_norm(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor, eps: float, act: str) -> Tensor:
    return launch_forward(a, b, weight, bias, eps, act)


@_geglu_norm.register_fake
def _(a, b, weight, bias, eps, act):
    return torch.empty_like(a, memory_format=torch.contiguous_format)


@torch.library.custom_op("zoo::geglu_norm_backward", mutates_args=())
def _geglu_norm_backward(
    dout: Tensor, a: Tensor, b: Tensor, weight: Tensor, bias: Tensor, eps: float, act: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return launch_backward(dout, a, b, weight, bias, eps, act)


@_geglu_norm_backward.register_fake
def _(dout, a, b, weight, bias, eps, act):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (a, b, weight, bias))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps, ctx.act = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dout):
    return *_geglu_norm_backward(dout, *ctx.saved_tensors, ctx.eps, ctx.act), None, None


_geglu_norm.register_autograd(_backward, setup_context=_setup_context)


def launch_forward(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor, eps: float, act: str) -> Tensor:
    """`geglu_norm` in one kernel."""
    a, b = a.contiguous(), b.contiguous()
    out = torch.empty_like(a)
    rows, constants = _rows(a, act)
    _geglu_norm_forward[(cdiv(rows, constants["ROWS"]),)](
        a, b, weight.contiguous(), bias.contiguous(), out, rows, eps, **constants
    )
    return out


def launch_backward(
    dout: Tensor, a: Tensor, b: Tensor, weight: Tensor, bias: Tensor, eps: float, act: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a, b, weight and bias in one kernel and a sum."""
    a, b = a.contiguous(), b.contiguous()
    rows, constants = _rows(a, act)
    da, db = torch.empty_like(a), torch.empty_like(b)
    programs = min(_PROGRAMS, cdiv(rows, constants["ROWS"]))
    dtype = torch.promote_types(a.dtype, torch.float32)
    sums = torch.empty(2, programs, a.shape[-1], dtype=dtype, device=a.device)
    _geglu_norm_gradients[(programs,)](
        dout.contiguous(), a, b, weight.contiguous(), bias.contiguous(), da, db, sums, rows, eps, **constants
    )
    dweight, dbias = sums.sum(1)
    return da, db, dweight.to(weight.dtype, copy=True), dbias.to(bias.dtype, copy=True)


def _rows(a: Tensor, act: str) -> tuple[int, dict]:
    """Number of rows, and the kernels' constants: about 2048 elements a program, a warp for each 512."""
    features = a.shape[-1]
    padded = next_power_of_2(features)
    constants = dict(FEATURES=features, PADDED=padded, ROWS=max(1, 2048 // padded), ACT=act)
    return a.numel() // max(1, features), constants | dict(num_warps=max(4, padded // 512))


# Triton --------------------------------------------------------------------------------------------------------


@triton_jit
def _activate(x, ACT: tl.constexpr):
    """The activation and its slope."""
    if ACT == "gelu":
        below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * below, below + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACT == "silu":
        gate = 1.0 / (1.0 + tl.exp(-x))
        return x * gate, gate * (1.0 + x * (1.0 - gate))
    else:
        return tl.maximum(x, 0.0), tl.where(x > 0.0, 1.0, 0.0)


@triton_jit
def _normalise(x, mask, eps, FEATURES: tl.constexpr):
    """(x - mean) / std of each row, and 1 / std."""
    centred = tl.where(mask, x - tl.sum(x, 1)[:, None] / FEATURES, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / FEATURES + eps)
    return centred * scale[:, None], scale[:, None]


@triton_jit
def _geglu_norm_forward(
    A,
    B,
    WEIGHT,
    BIAS,
    OUT,
    rows,
    eps,
    FEATURES: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    ACT: tl.constexpr,
):
    wide: tl.constexpr = tl.float64 if A.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    feature = tl.arange(0, PADDED)
    inside = feature < FEATURES
    at = row[:, None] * FEATURES + feature[None, :]
    mask = (row < rows)[:, None] & inside[None, :]
    gate, _ = _activate(tl.load(A + at, mask, 0.0).to(wide), ACT)
    gate, _ = _normalise(gate, mask, eps, FEATURES)
    value, _ = _normalise(tl.load(B + at, mask, 0.0).to(wide), mask, eps, FEATURES)
    weight = tl.load(WEIGHT + feature, inside, 0.0).to(wide)[None, :]
    bias = tl.load(BIAS + feature, inside, 0.0).to(wide)[None, :]
    out = (gate * weight + bias) * (value * weight + bias)
    tl.store(OUT + at, out.to(OUT.dtype.element_ty), mask)


@triton_jit
def _norm_gradient(grad, x, scale, FEATURES: tl.constexpr):
    """Gradient through `_normalise`, from that of its result `x`."""
    mean = tl.sum(grad, 1)[:, None] / FEATURES
    along = tl.sum(grad * x, 1)[:, None] / FEATURES
    return scale * (grad - mean - x * along)


@triton_jit
def _geglu_norm_gradients(
    DOUT,
    A,
    B,
    WEIGHT,
    BIAS,
    DA,
    DB,
    SUMS,
    rows,
    eps,
    FEATURES: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    ACT: tl.constexpr,
):
    wide: tl.constexpr = tl.float64 if A.dtype.element_ty == tl.float64 else tl.float32
    feature = tl.arange(0, PADDED)
    inside = feature < FEATURES
    weight = tl.load(WEIGHT + feature, inside, 0.0).to(wide)[None, :]
    bias = tl.load(BIAS + feature, inside, 0.0).to(wide)[None, :]
    dweight = tl.zeros([PADDED], wide)
    dbias = tl.zeros([PADDED], wide)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        at = row[:, None] * FEATURES + feature[None, :]
        mask = (row < rows)[:, None] & inside[None, :]
        gate, slope = _activate(tl.load(A + at, mask, 0.0).to(wide), ACT)
        gate, gate_scale = _normalise(gate, mask, eps, FEATURES)
        value, value_scale = _normalise(tl.load(B + at, mask, 0.0).to(wide), mask, eps, FEATURES)
        dout = tl.load(DOUT + at, mask, 0.0).to(wide)
        p = dout * (value * weight + bias)
        q = dout * (gate * weight + bias)
        dweight += tl.sum(p * gate + q * value, 0)
        dbias += tl.sum(p + q, 0)
        da = _norm_gradient(p * weight, gate, gate_scale, FEATURES) * slope
        tl.store(DA + at, da.to(DA.dtype.element_ty), mask)
        tl.store(DB + at, _norm_gradient(q * weight, value, value_scale, FEATURES).to(DB.dtype.element_ty), mask)
    place = SUMS + tl.program_id(0) * FEATURES + feature
    tl.store(place, dweight, inside)
    tl.store(place + tl.num_programs(0) * FEATURES, dbias, inside)
