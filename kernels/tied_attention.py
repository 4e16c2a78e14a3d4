"""Tied attention: softmax attention whose query, key and value are one tensor (arXiv 2306.01129, eq. 11).

    out = softmax(s w w^T) w        with w (B, H, N, D), s = 1 / sqrt(D) unless given

The scores are symmetric before the softmax, and one gradient is returned instead of three:
with P the softmax, dS = P * (dO w^T - <dO, out>), the gradient is dw = P^T dO + s (dS + dS^T) w.

Cost a head: 4 N^2 D FLOPs forward, 10 N^2 D backward; N D elements read and N D written forward.

On CPU, torch's fused attention of (w, w, w) was faster than explicit products and softmax, forward (by 1.1
to 3 times) and backward, and faster than the gradient above written with explicit products, at every shape
of the CRATE models (tests/bench/crate.py prints the comparison). It also keeps no N x N matrix. It is
therefore the only path; `reference` is the definition.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["reference", "tied_attention"]


def tied_attention(w: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale w w^T) w, differentiable, without the N x N scores in memory.

    Args:
        w: (B, H, N, D), any float dtype, contiguous in the last axis.
        scale: factor of the scores, 1 / sqrt(D) by default.

    Returns:
        (B, H, N, D) in the dtype of `w`.
    """
    return F.scaled_dot_product_attention(w, w, w, scale=scale)


def reference(w: Tensor, scale: float | None = None) -> Tensor:
    """The definition of `tied_attention` in plain torch; the scores are materialised."""
    if scale is None:
        scale = w.shape[-1] ** -0.5
    return torch.softmax((w * scale) @ w.transpose(-2, -1), dim=-1) @ w
