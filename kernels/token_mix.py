"""Token mixing: an MLP along the token axis, the same for every channel (MLP-Mixer, NiNformer's gate).

    out[b] = W2 gelu(W1 x[b] + b1) + b2        x (B, n, d), W1 (f, n), W2 (m, f), exact-erf GELU

b1 belongs to hidden units and b2 to tokens. Written as products from the left no transpose is needed, which
the equal form Linear(x^T)^T pays with two copies of the tensor.

Cost an image: 2 f d (n + m) FLOPs; (n + m + 4 f) d elements moved with the hidden units in memory (two products
and a GELU), (n + m) d if they stay on the chip.

On CPU a batched product with the bias as its base (`baddbmm`) was the fastest formulation at the shapes of the
models: against Linear on transposed tokens 1.05 to 1.15 times forward and equal with gradients, against
`matmul(W, x)` with a broadcast left operand 1.3 to 2 times (tests/bench/ninformer.py prints the comparison). The
backward pass holds the gradients of W1 and W2 once for every image, (f, n) each, which is less than one hidden
activation, (f, d), as long as there are fewer tokens than channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["reference", "token_linear", "token_mix"]


def token_mix(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """W2 gelu(W1 x + b1) + b2 along the tokens of (B, n, d), differentiable.

    Args:
        x: (B, n, d), any float dtype.
        weight1: (f, n).
        bias1: (f,).
        weight2: (m, f), usually m = n.
        bias2: (m,).

    Returns:
        (B, m, d) in the dtype of `x`.
    """
    return token_linear(F.gelu(token_linear(x, weight1, bias1)), weight2, bias2)


def token_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """W x + b along the tokens: (B, n, d), (m, n), (m,) -> (B, m, d)."""
    return torch.baddbmm(bias.unsqueeze(1), weight.expand(x.shape[0], -1, -1), x)


def reference(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """The definition of `token_mix`, with the token axis last, as the papers' code writes it."""
    return F.linear(F.gelu(F.linear(x.transpose(1, 2), weight1, bias1)), weight2, bias2).transpose(1, 2)
