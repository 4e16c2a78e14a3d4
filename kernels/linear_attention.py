"""Linear attention with relu features: the attention of SLAB (arXiv 2405.11582, "simplified linear attention").

    y_i = phi(q_i) (sum_j phi(k_j)^T v_j) / (phi(q_i) . sum_j phi(k_j) + eps),    phi = relu, no scale

A query whose features are all zero gets zeros. There is no softmax, so keys and values are summed once, before
any query is looked at.

Cost for N queries, M keys and head widths D, Dv, for each head: 2 (N + M) D Dv + 2 N D FLOPs, and (N + M) D +
(N + M) Dv elements moved: a few FLOPs a byte, bandwidth-bound on every machine. Computing (q k^T) v first, as
the authors do where N <= D, gives the same values; at those sizes either order takes no time. On a CPU the
products of contiguous heads are fastest (tests/bench/slab.py), the copies included.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-6) -> Tensor:
    """relu(q) (relu(k)^T v) / (relu(q) sum relu(k) + eps): (B, H, N, D) -> (B, H, N, Dv).

    float16 and bfloat16 are computed in float32, also under autocast, with the mean over the keys in place of
    the sum (and eps / M), which cannot overflow. The function can be scripted, traced (it is one node of an fx
    graph) and exported.

    Args:
        q: queries (B, H, N, D) before the feature map, any strides.
        k: keys (B, H, M, D) before the feature map.
        v: values (B, H, M, Dv), used as they are.
        eps: added to the normaliser.

    Returns:
        In the type of `q`.
    """
    return _linear_attention(q, k, v, eps)


def reference(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-6) -> Tensor:
    """The definition of `linear_attention`, key by query as written: N M D FLOPs."""
    weights = F.relu(q) @ F.relu(k).transpose(-2, -1)
    return (weights @ v) / (weights.sum(dim=-1, keepdim=True) + eps)


@torch.fx.wrap
def _linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    if q.dtype != torch.float16 and q.dtype != torch.bfloat16:
        return _keys_first(q, k, v, eps)
    keys = max(1, k.shape[2])
    q32, k32, v32 = q.float(), k.float() / keys, v.float()
    if torch.jit.is_scripting():
        y = _keys_first(q32, k32, v32, eps / keys)
    else:
        y = _without_autocast(q32, k32, v32, eps / keys)
    return y.to(q.dtype)


@torch.jit.unused
def _without_autocast(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    device = q.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        return _keys_first(q, k, v, eps)


def _keys_first(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    # a batched product copies strided heads anyway, once in each of its two uses
    q = F.relu(q).contiguous()
    k = F.relu(k).contiguous()
    context = k.transpose(-2, -1) @ v.contiguous()
    normaliser = q @ k.sum(dim=-2).unsqueeze(-1)
    return (q @ context) / (normaliser + eps)


def linear_attention_flops(batch: int, heads: int, queries: int, keys: int, head_dim: int, value_dim: int) -> int:
    """FLOPs of the three products (a multiply-add counts as two); features, sums and the division are left out."""
    return 2 * batch * heads * head_dim * (queries * (value_dim + 1) + keys * value_dim)
