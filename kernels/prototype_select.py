"""Prototype selection: each query and head takes the one key that is most similar to it (PEM, arXiv 2402.19422, 3.2).

    index[q, h] = argmax_n <query_q^h, key_n^h>  over the tokens n that query q allows,    p_q^h = key_{index[q, h]}^h

A head is a block of consecutive channels; there is no scale and no softmax. The first of equal maxima wins. Two rules
of the authors: a query that allows no token takes token 0; an image in which no query allows any token is treated as
if all were allowed. The gradient goes to the chosen keys; none goes through the argmax to the queries.

Cost for Q queries, N tokens, C channels, H heads: 2 Q N C FLOPs; (Q + N) C elements and twice Q N bytes of the mask
are read, Q C elements written. The similarities, H Q N, are never in memory: on a CPU they exist for a tile of tokens
(H Q 1024), on a GPU in registers. Backward: 2 Q N C FLOPs, N C elements written once, without atomics.

On a CPU the mask is added as 0 and -inf: `masked_fill` and `where` broadcast over heads took 2.5 times as long. Tiles
of 1024 tokens were the fastest from 1024 tokens on (`zoo bench kernels prototype_select`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoo.kernels.attention import widest_head
from zoo.kernels.dispatch import use_triton
from zoo.kernels.jit import cdiv, dot, dot_precision, next_power_of_2, on_amd, triton_jit

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["gather_tokens", "prototype_select", "reference", "select_tokens"]

_TILE = 1024


def prototype_select(queries: Tensor, keys: Tensor, allowed: Tensor, num_heads: int) -> Tensor:
    """The most similar allowed key for each query, head by head; differentiable in the keys.

    Args:
        queries: (B, Q, C).
        keys: (B, N, C).
        allowed: (B, Q, N), bool.
        num_heads: heads, consecutive blocks of C / num_heads channels.

    Returns:
        (B, Q, C) in the type of `keys`.
    """
    return gather_tokens(keys, select_tokens(queries, keys, allowed, num_heads))


def select_tokens(queries: Tensor, keys: Tensor, allowed: Tensor, num_heads: int) -> Tensor:
    """The index of the most similar allowed token: (B, Q, num_heads), int64. Arguments as `prototype_select`.

    With the indices a caller can also compute the chosen keys anew, with gradients for these alone.
    """
    return _select_tokens(queries, keys, allowed, num_heads)


def gather_tokens(keys: Tensor, index: Tensor) -> Tensor:
    """The chosen tokens, head by head: keys (B, N, C), index (B, Q, heads) -> (B, Q, C)."""
    return _gather_tokens(keys, index)


def reference(queries: Tensor, keys: Tensor, allowed: Tensor, num_heads: int) -> Tensor:
    """The definition of `prototype_select`, with all similarities in memory."""
    q, k = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (queries, keys))
    similarity = q @ k.transpose(-2, -1)  # (B, H, Q, N)
    none_at_all = ~allowed.flatten(1).any(1)
    blocked = ~(allowed | none_at_all[:, None, None])
    index = similarity.masked_fill(blocked.unsqueeze(1), float("-inf")).argmax(-1, keepdim=True)
    return k.gather(2, index.expand(-1, -1, -1, k.shape[-1])).transpose(1, 2).flatten(2)


@torch.fx.wrap
def _select_tokens(queries: Tensor, keys: Tensor, allowed: Tensor, num_heads: int) -> Tensor:
    with torch.no_grad():
        if not torch.jit.is_scripting():
            unsupported = _unsupported(queries, keys, num_heads)
            if use_triton("prototype_select", queries, keys, allowed, unsupported=unsupported):
                return torch.ops.zoo.prototype_index(queries, keys, allowed, num_heads)
        return _select_in_tiles(queries, keys, allowed, num_heads)


@torch.fx.wrap
def _gather_tokens(keys: Tensor, index: Tensor) -> Tensor:
    if not torch.jit.is_scripting():  # noqa: SIM102 - scripting leaves the block out only for this very condition
        if use_triton("prototype_select", keys, index):
            return torch.ops.zoo.prototype_gather(keys, index)
    return _gather(keys, index)


def _unsupported(queries: Tensor, keys: Tensor, num_heads: int) -> str | None:
    if queries.dtype != keys.dtype:
        return f"queries are {queries.dtype}, keys {keys.dtype}"
    head_dim, limit = queries.shape[-1] // num_heads, widest_head(queries.dtype)
    return f"a head size of {head_dim} in {queries.dtype} (at most {limit})" if head_dim > limit else None


def _gather(keys: Tensor, index: Tensor) -> Tensor:
    B, N, C = keys.shape
    Q, heads = index.shape[1], index.shape[2]
    k = keys.reshape(B, N, heads, C // heads)
    return k.gather(1, index.unsqueeze(-1).expand(B, Q, heads, C // heads)).flatten(2)


def _select_in_tiles(queries: Tensor, keys: Tensor, allowed: Tensor, num_heads: int) -> Tensor:
    B, Q, N = queries.shape[0], queries.shape[1], keys.shape[1]
    head_dim = queries.shape[2] // num_heads
    q = queries.reshape(B, Q, num_heads, head_dim).permute(0, 2, 1, 3)
    k = keys.reshape(B, N, num_heads, head_dim).permute(0, 2, 3, 1)
    blocked = allowed.logical_not() & allowed.flatten(1).any(1).view(B, 1, 1)
    minus_infinity = torch.full_like(q[:1, :1, :1, :1], float("-inf")).view(1, 1, 1)
    if N <= _TILE or torch.jit.is_scripting() or torch.compiler.is_compiling():
        added = torch.where(blocked, minus_infinity, torch.zeros_like(minus_infinity))
        return (q @ k).add_(added.unsqueeze(1)).max(-1)[1].transpose(1, 2)
    best = torch.full_like(q[..., 0], float("-inf"))
    index = torch.zeros_like(best, dtype=torch.long)
    for start in range(0, N, _TILE):
        added = torch.zeros_like(minus_infinity).where(~blocked[..., start : start + _TILE], minus_infinity)
        value, place = (q @ k[..., start : start + _TILE]).add_(added.unsqueeze(1)).max(-1)
        better = value > best
        best = torch.where(better, value, best)
        index = torch.where(better, place + start, index)
    return index.transpose(1, 2)


# The operators -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("zoo::prototype_index", mutates_args=())
def _index(queries: Tensor, keys: Tensor, allowed: Tensor, num_heads: int) -> Tensor:
    return launch_index(queries, keys, allowed, num_heads)


@_index.register_fake
def _(queries, keys, allowed, num_heads):
    return queries.new_empty(queries.shape[0], queries.shape[1], num_heads, dtype=torch.int64)


@torch.library.custom_op("zoo::prototype_gather", mutates_args=())
def _gather_op(keys: Tensor, index: Tensor) -> Tensor:
    return _gather(keys, index)


@_gather_op.register_fake
def _(keys, index):
    return keys.new_empty(keys.shape[0], index.shape[1], keys.shape[2])


@torch.library.custom_op("zoo::prototype_gather_backward", mutates_args=())
def _gather_backward(grad: Tensor, index: Tensor, tokens: int) -> Tensor:
    return launch_scatter(grad, index, tokens)


@_gather_backward.register_fake
def _(grad, index, tokens):
    return grad.new_empty(grad.shape[0], tokens, grad.shape[2])


def _setup_context(ctx, inputs, output):
    keys, index = inputs
    ctx.save_for_backward(index)
    ctx.tokens = keys.shape[1]


def _backward(ctx, grad):
    return torch.ops.zoo.prototype_gather_backward(grad, ctx.saved_tensors[0], ctx.tokens), None


_gather_op.register_autograd(_backward, setup_context=_setup_context)


# Triton ------------------------------------------------------------------------------------------------------------


@triton_jit
def _index_kernel(
    Query,  # (B, Q, H D)
    Key,  # (B, N, H D)
    Allowed,  # (B, Q, N), 0 or 1
    Some,  # (B), whether any query of the image allows any token
    Value,  # (splits, B, H, Q): the largest similarity in a split of the tokens
    Index,  # (splits, B, H, Q): where it is
    stride_qb,
    stride_qn,
    stride_kb,
    stride_kn,
    stride_ab,
    stride_aq,
    B,
    H,
    Q,
    N,
    tokens,  # of a split
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: a tile of queries of one image and head, against one split of its tokens, in ascending order."""
    tile = tl.program_id(0)
    h = tile % H
    b = (tile // H % B).to(tl.int64)
    first = tile // (H * B) * BLOCK_Q
    split = tl.program_id(1)
    rows = first + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    q = tl.load(
        Query + b * stride_qb + rows[:, None] * stride_qn + h * D + d[None, :],
        mask=(rows < Q)[:, None] & (d < D)[None, :],
        other=0.0,
    )
    everything = tl.load(Some + b) == 0
    best = tl.full([BLOCK_Q], float("-inf"), tl.float64 if Value.dtype.element_ty == tl.float64 else tl.float32)
    index = tl.zeros([BLOCK_Q], tl.int32)
    for start in range(split * tokens, min(N, (split + 1) * tokens), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k = tl.load(
            Key + b * stride_kb + n[:, None] * stride_kn + h * D + d[None, :],
            mask=(n < N)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        inside = (rows < Q)[:, None] & (n < N)[None, :]
        allowed = tl.load(Allowed + b * stride_ab + rows[:, None] * stride_aq + n[None, :], mask=inside, other=0)
        similarity = dot(q, tl.trans(k), PRECISION)
        similarity = tl.where(inside & ((allowed != 0) | everything), similarity, float("-inf"))
        value, place = tl.max(similarity, axis=1, return_indices=True, return_indices_tie_break_left=True)
        better = value > best  # strictly: the first of equal maxima stays
        best = tl.where(better, value, best)
        index = tl.where(better, place + start, index)
    out = ((split * B + b) * H + h) * Q + rows
    tl.store(Value + out, best, mask=rows < Q)
    tl.store(Index + out, index, mask=rows < Q)


@triton_jit
def _scatter_kernel(
    Grad,  # (B, Q, H D)
    Index,  # (B, Q, H)
    Out,  # (B, N, H D)
    H,
    Q,
    N,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the gradient of a tile of tokens of one image and head, [index = token]^T grad as a product."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = tl.program_id(1) % H
    b = (tl.program_id(1) // H).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float64 if Grad.dtype.element_ty == tl.float64 else tl.float32)
    for start in range(0, Q, BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q)
        index = tl.load(Index + (b * Q + rows) * H + h, mask=rows < Q, other=-1)
        g = tl.load(
            Grad + ((b * Q + rows[:, None]) * H + h) * D + d[None, :],
            mask=(rows < Q)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        chosen = (index[None, :] == n[:, None]).to(g.dtype)
        acc += dot(chosen, g, PRECISION)
    out = ((b * N + n[:, None]) * H + h) * D + d[None, :]
    tl.store(Out + out, acc.to(Out.dtype.element_ty), mask=(n < N)[:, None] & (d < D)[None, :])


# Launches ----------------------------------------------------------------------------------------------------------


def launch_index(queries: Tensor, keys: Tensor, allowed: Tensor, num_heads: int) -> Tensor:
    """(B, Q, heads): a maximum for each split of the tokens, then the first largest of them."""
    queries, keys, allowed = (x if x.stride(-1) == 1 else x.contiguous() for x in (queries, keys, allowed))
    B, Q, C = queries.shape
    N = keys.shape[1]
    head_dim = C // num_heads
    block_q = max(16, min(128, next_power_of_2(Q)))
    # programs for every multiprocessor, and at least 256 tokens for each
    splits = max(1, min(cdiv(256, max(1, B * num_heads * cdiv(Q, block_q))), N // 256))
    value = queries.new_empty(
        splits, B, num_heads, Q, dtype=torch.float64 if queries.dtype == torch.float64 else torch.float32
    )
    index = queries.new_empty(splits, B, num_heads, Q, dtype=torch.int32)
    _index_kernel[(B * num_heads * cdiv(Q, block_q), splits)](
        queries,
        keys,
        allowed.view(torch.uint8),
        allowed.flatten(1).any(1).view(torch.uint8),
        value,
        index,
        queries.stride(0),
        queries.stride(1),
        keys.stride(0),
        keys.stride(1),
        allowed.stride(0),
        allowed.stride(1),
        B,
        num_heads,
        Q,
        N,
        cdiv(cdiv(N, splits), 64) * 64,
        D=head_dim,
        BLOCK_D=max(16, next_power_of_2(head_dim)),
        BLOCK_Q=block_q,
        BLOCK_N=32 if head_dim > 64 else 64,
        PRECISION=dot_precision(queries.dtype),
        num_warps=8 if block_q > 64 else 4,
        num_stages=1 if on_amd() else 2,
    )
    if splits == 1:
        index = index[0]
    else:
        index = index.gather(0, value.max(0, keepdim=True)[1]).squeeze(0)
    return index.transpose(1, 2).to(torch.int64).contiguous()


def launch_scatter(grad: Tensor, index: Tensor, tokens: int) -> Tensor:
    """(B, tokens, C): the sum of the gradients of each token's queries, head by head."""
    grad, index = grad.contiguous(), index.contiguous()
    B, Q, C = grad.shape
    heads = index.shape[2]
    head_dim = C // heads
    out = torch.empty(B, tokens, C, dtype=grad.dtype, device=grad.device)
    _scatter_kernel[(cdiv(tokens, 64), B * heads)](
        grad,
        index,
        out,
        heads,
        Q,
        tokens,
        D=head_dim,
        BLOCK_D=max(16, next_power_of_2(head_dim)),
        BLOCK_Q=max(16, min(64, next_power_of_2(Q))),
        BLOCK_N=64,
        PRECISION=dot_precision(grad.dtype),
        num_warps=4,
        num_stages=1 if on_amd() else 2,
    )
    return out
