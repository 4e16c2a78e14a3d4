"""Softmax attention over keys in one or two segments, with dense, per-key and relative-position biases.

    out = softmax([scale q k^T + bias + key_bias,  scale q k2^T + key_bias2]) [v; v2]

One softmax runs over the keys of both segments. `bias` has an entry for each pair of a query and a key of
the first segment, `key_bias` and `key_bias2` one for each key, the same for all queries (FcaFormer's cross
tokens, arXiv 2211.07198). Keys where `mask` is False do not take part; a query without any key gets zeros.

Cost for N queries, M keys and head width D, for each head: 4 N M D FLOPs; (2 N + 2 M) D elements are moved,
N M more when there is a dense bias. The logits (N M) are never stored where PyTorch's fused kernel runs. On a
CPU that kernel over concatenated keys beats two products over separate segments (tests/bench/fcaformer.py
measures both): copying M D elements is cheap beside writing N M logits several times.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    k2: Tensor | None = None,
    v2: Tensor | None = None,
    key_bias2: Tensor | None = None,
) -> Tensor:
    """Softmax attention by PyTorch's fused kernel: (B, H, N, D) -> (B, H, N, Dv).

    The function has no branch on a shape or a device, so it can be scripted, traced and exported.

    Args:
        q: queries (B, H, N, D).
        k: keys (B, H, M, D); any strides with a contiguous last axis.
        v: values (B, H, M, Dv).
        bias: added to the logits, broadcastable to (B, H, N, M).
        key_bias: added to the logits of each key, broadcastable to (B, H, M).
        mask: bool, broadcastable to (B, H, N, M), True where a key takes part.
        scale: factor of the products, D ** -0.5 if None.
        k2: keys of a second segment (B, H, M2, D), together with `v2`; `bias`, `key_bias` and `mask` do not
            concern them.
        v2: values of the second segment (B, H, M2, Dv).
        key_bias2: added to the logits of each key of the second segment, broadcastable to (B, H, M2).

    Raises:
        ValueError: one of `k2` and `v2` without the other.
    """
    if (k2 is None) != (v2 is None):
        raise ValueError("k2 and v2 are the keys and values of one segment: pass both or neither")
    added = _added_to_logits(q, bias, key_bias, mask, k, k2, key_bias2)
    if k2 is not None and v2 is not None:
        k = torch.cat([k, k2], dim=2)
        v = torch.cat([v, v2], dim=2)
    if added is not None:
        # the fused kernel wants four axes; an expanded axis costs nothing
        added = added.expand(q.shape[0], q.shape[1], q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    k2: Tensor | None = None,
    v2: Tensor | None = None,
    key_bias2: Tensor | None = None,
) -> Tensor:
    """The definition of `attention`, in plain torch: also what models run with fused attention turned off."""
    logits = attention_logits(q, k, bias, key_bias, mask, scale, k2, key_bias2)
    # -inf in a whole row would give NaN; its probabilities are zero
    empty = (logits == float("-inf")).all(dim=-1, keepdim=True)
    weights = logits.masked_fill(empty, 0.0).softmax(dim=-1).masked_fill(empty, 0.0)
    if v2 is not None:
        v = torch.cat([v, v2], dim=2)
    return weights @ v


def attention_logits(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    k2: Tensor | None = None,
    key_bias2: Tensor | None = None,
) -> Tensor:
    """What the softmax of `attention` sees: (B, H, N, M + M2), -inf where `mask` is False."""
    if scale is None:
        scale = q.shape[-1] ** -0.5
    q = q * scale
    logits = q @ k.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias
    if key_bias is not None:
        logits = logits + key_bias.unsqueeze(-2)
    if mask is not None:
        logits = logits.masked_fill(mask.logical_not(), float("-inf"))
    if k2 is not None:
        logits2 = q @ k2.transpose(-2, -1)
        if key_bias2 is not None:
            logits2 = logits2 + key_bias2.unsqueeze(-2)
        logits = torch.cat([logits, logits2], dim=-1)
    return logits


def _added_to_logits(
    q: Tensor,
    bias: Tensor | None,
    key_bias: Tensor | None,
    mask: Tensor | None,
    k: Tensor,
    k2: Tensor | None,
    key_bias2: Tensor | None,
) -> Tensor | None:
    """All biases and masks of `attention` in one tensor, as small as broadcasting allows; None if none."""
    added = bias
    if key_bias is not None:
        per_key = key_bias.unsqueeze(-2)
        added = per_key if added is None else added + per_key
    if mask is not None:
        added = mask if added is None and k2 is None else _masked(added, mask, q)
    if k2 is None or (added is None and key_bias2 is None):
        return added
    first = q.new_zeros(1, k.shape[2]) if added is None else added
    second = q.new_zeros(1, k2.shape[2]) if key_bias2 is None else key_bias2.unsqueeze(-2)
    # adding zeros broadcasts the two against each other in every axis but the last
    first = first + torch.zeros_like(second[..., :1])
    second = second + torch.zeros_like(first[..., :1])
    return torch.cat([first, second], dim=-1)


def _masked(added: Tensor | None, mask: Tensor, q: Tensor) -> Tensor:
    if added is None:
        added = q.new_zeros(1)
    return torch.where(mask, added, torch.full_like(added, float("-inf")))


def relative_bias(table: Tensor) -> Tensor:
    """The dense bias of a table of relative positions: (H, 2h-1, 2w-1) -> (H, h*w, h*w).

    Entry [p, p'] is table[r - r' + h - 1, c - c' + w - 1] for row-major positions p = (r, c) of a query and
    p' = (r', c') of a key, as in Swin Transformer (arXiv 2103.14030, equation 4). One gather of H (h w)^2
    elements.
    """
    h = (table.shape[1] + 1) // 2
    w = (table.shape[2] + 1) // 2
    r = torch.arange(h, device=table.device)
    c = torch.arange(w, device=table.device)
    rows = (r.unsqueeze(1) - r + (h - 1)) * (2 * w - 1)
    columns = c.unsqueeze(1) - c + (w - 1)
    index = rows.reshape(h, 1, h, 1) + columns.reshape(1, w, 1, w)
    return table.flatten(1).index_select(1, index.flatten()).reshape(-1, h * w, h * w)


def mirror_offsets(table: Tensor) -> Tensor:
    """A table over absolute offsets as one over signed offsets: (H, h, w) -> (H, 2h-1, 2w-1)."""
    table = torch.cat([table[:, 1:].flip(1), table], dim=1)
    return torch.cat([table[:, :, 1:].flip(2), table], dim=2)


def resize_relative_table(table: Tensor, h: int, w: int) -> Tensor:
    """Resample a table of signed offsets for a map of h x w: (H, 2h0-1, 2w0-1) -> (H, 2h-1, 2w-1).

    Bicubic with the outer edges aligned, which keeps offset zero where it is. Differentiable; computed in
    float32 for half-precision tables.
    """
    return resize_maps(table, 2 * h - 1, 2 * w - 1)


def resize_maps(maps: Tensor, h: int, w: int) -> Tensor:
    """Bicubic resampling of (C, h0, w0) to (C, h, w), in float32 for half-precision maps."""
    dtype = maps.dtype
    wide = maps.float() if dtype == torch.float16 or dtype == torch.bfloat16 else maps
    wide = F.interpolate(wide.unsqueeze(0), size=[h, w], mode="bicubic", align_corners=False)
    return wide.squeeze(0).to(dtype)


def attention_flops(batch: int, heads: int, queries: int, keys: int, head_dim: int) -> int:
    """FLOPs of the two products (a multiply-add counts as two); the softmax is left out."""
    return 4 * math.prod((batch, heads, queries, keys, head_dim))
