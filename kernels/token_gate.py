"""Token gate: a residual whose branch is a value times a gate (NiNformer).

    out = z + u * g        element by element, all (..., d)

Cost: 2 FLOPs an element, 4 elements moved (3 read, 1 written) against 6 for a product and a sum.

On CPU `addcmul` was 1.4 to 1.6 times as fast as z + u * g (tests/bench/ninformer.py). A fused kernel would compute
it behind the matrix product that makes u or g.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["reference", "token_gate"]


def token_gate(z: Tensor, u: Tensor, g: Tensor) -> Tensor:
    """z + u * g in one pass, differentiable.

    Args:
        z: residual stream, (..., d). The result has its memory layout.
        u: value, of the same shape.
        g: gate, of the same shape. No activation is applied.

    Returns:
        (..., d), in the promoted dtype of the three.
    """
    return torch.addcmul(z, u, g)


def reference(z: Tensor, u: Tensor, g: Tensor) -> Tensor:
    """The definition of `token_gate`."""
    return z + u * g
