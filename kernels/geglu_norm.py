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
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "geglu_norm", "reference"]

ACTIVATIONS = ("gelu", "silu", "relu")


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
    f = weight.shape[0]
    return F.layer_norm(activate(a, act), [f], weight, bias, eps) * F.layer_norm(b, [f], weight, bias, eps)


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
