"""Softmax attention over keys in one or two segments, with dense, per-key and relative-position biases.

    out = softmax([scale q k^T + bias + key_bias,  scale q k2^T + key_bias2]) [v; v2]

One softmax runs over the keys of both segments. `bias` has an entry for each pair of a query and a key of
the first segment, `key_bias` and `key_bias2` one for each key, the same for all queries (FcaFormer's cross
tokens, arXiv 2211.07198); `table` one for each offset between two positions of a map (Swin Transformer). Keys
where `mask` is False do not take part; a query without any key gets zeros.

Backward, with P the probabilities, dO the gradient of the output and d_i = <dO_i, out_i>:

    dS = P * (dO v^T - d),   dq = scale dS k,   dk = scale dS^T q,   dv = P^T dO,   dbias = dS,
    dkey_bias = column sums of dS,   dtable = sums of dS over equal offsets

Cost for N queries, M keys and head width D, for each head: 4 N M D FLOPs forward, 14 N M D backward (18 N M D with
a gradient of `bias` or `table`); (2 N + 2 M) D elements are moved, N M more when there is a dense bias.

The Triton kernels store neither logits nor probabilities: forward keeps one number a query, backward computes P
again. They read both segments where they are and look offsets up in the table. Each gradient is written once,
without atomics, so that results are the same in every run: one kernel owns tiles of queries, one tiles of keys, and
one tiles of the bias, over all images that share it (which then is a tensor of the bias' size, in float32; that of
`table` goes through one of heads N M elements).

On a CPU, PyTorch's fused kernel over concatenated keys beats two products over separate segments
(tests/bench/fcaformer.py measures both): copying M D elements is cheap beside writing N M logits several times. It
stores a dense bias, of the size that broadcasting gives it, and no logits.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.dispatch import interpreted, use_triton
from zoo.kernels.jit import cdiv, dot, dot_precision, next_power_of_2, on_amd, triton_jit

if TYPE_CHECKING:
    import triton.language as tl


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
    table: Tensor | None = None,
) -> Tensor:
    """Softmax attention: (B, H, N, D) -> (B, H, N, Dv); differentiable in every tensor but the mask.

    It can be scripted, traced (it is one node of an fx graph) and exported. Where the first axis of `bias`,
    `key_bias` or `mask` has W entries and W divides B, they are W windows, and image b takes entry b modulo W.

    Args:
        q: queries (B, H, N, D).
        k: keys (B, H, M, D); any strides with a contiguous last axis.
        v: values (B, H, M, Dv).
        bias: added to the logits, broadcastable to (B, H, N, M).
        key_bias: added to the logits of each key, broadcastable to (B, H, M).
        mask: bool, broadcastable to (B, H, N, M), True where a key takes part.
        scale: factor of the products, D ** -0.5 if None.
        k2: keys of a second segment (B, H, M2, D), together with `v2`; `bias`, `key_bias`, `mask` and `table` do
            not concern them.
        v2: values of the second segment (B, H, M2, Dv).
        key_bias2: added to the logits of each key of the second segment, broadcastable to (B, H, M2).
        table: (H, 2h-1, 2w-1), added to the logits by the offset of a query from a key, both of which are the
            positions of a map of N = M = h w, row by row, as `relative_bias` says.

    Raises:
        ValueError: one of `k2` and `v2` without the other; a table of another map.
    """
    if (k2 is None) != (v2 is None):
        raise ValueError("k2 and v2 are the keys and values of one segment: pass both or neither")
    return _attention(q, k, v, bias, key_bias, mask, scale, k2, v2, key_bias2, table)


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
    table: Tensor | None = None,
) -> Tensor:
    """The definition of `attention`, in plain torch: also what models run with fused attention turned off."""
    logits = attention_logits(q, k, bias, key_bias, mask, scale, k2, key_bias2, table)
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
    table: Tensor | None = None,
) -> Tensor:
    """What the softmax of `attention` sees: (B, H, N, M + M2), -inf where `mask` is False."""
    if scale is None:
        scale = q.shape[-1] ** -0.5
    q = q * scale
    logits = q @ k.transpose(-2, -1)
    if table is not None:
        logits = logits + relative_bias(table)
    if bias is not None:
        logits = logits + _each_image(bias, 4, q.shape[0])
    if key_bias is not None:
        logits = logits + _each_image(key_bias, 3, q.shape[0]).unsqueeze(-2)
    if mask is not None:
        logits = logits.masked_fill(_each_image(mask, 4, q.shape[0]).logical_not(), float("-inf"))
    if k2 is not None:
        logits2 = q @ k2.transpose(-2, -1)
        if key_bias2 is not None:
            logits2 = logits2 + key_bias2.unsqueeze(-2)
        logits = torch.cat([logits, logits2], dim=-1)
    return logits


def _each_image(x: Tensor, axes: int, batch: int) -> Tensor:
    """`x` with its windows repeated for every image, if its first of `axes` axes counts windows."""
    if x.dim() < axes or x.shape[0] == 1 or x.shape[0] == batch:
        return x
    return x.repeat([batch // x.shape[0]] + [1] * (axes - 1))


@torch.fx.wrap
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_bias: Tensor | None,
    mask: Tensor | None,
    scale: float | None,
    k2: Tensor | None,
    v2: Tensor | None,
    key_bias2: Tensor | None,
    table: Tensor | None,
) -> Tensor:
    if not torch.jit.is_scripting():
        tensors = (q, k, v, bias, key_bias, mask, k2, v2, key_bias2, table)
        if use_triton("attention", *tensors, unsupported=_unsupported(q, k, v, k2, v2)):
            q, k, v, k2, v2 = under_autocast(q, k, v, k2, v2)
            return torch.ops.zoo.attention(q, k, v, bias, key_bias, mask, scale, k2, v2, key_bias2, table)[0]
    return _by_torch(q, k, v, bias, key_bias, mask, scale, k2, v2, key_bias2, table)


def _by_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_bias: Tensor | None,
    mask: Tensor | None,
    scale: float | None,
    k2: Tensor | None,
    v2: Tensor | None,
    key_bias2: Tensor | None,
    table: Tensor | None,
) -> Tensor:
    """PyTorch's fused kernel over the keys of both segments."""
    if table is not None:
        dense = relative_bias(table)
        bias = dense if bias is None else bias + dense
    added = _added_to_logits(q, bias, key_bias, mask, k, k2, key_bias2)
    if k2 is not None and v2 is not None:
        k = torch.cat([k, k2], dim=2)
        v = torch.cat([v, v2], dim=2)
    if added is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    B, H, N = q.shape[0], q.shape[1], q.shape[2]
    if added.dim() == 4 and added.shape[0] > 1 and added.shape[0] != B:
        # windows count as heads: their biases differ, those of the images do not
        W = added.shape[0]
        added = added.expand(W, H, N, -1).reshape(1, W * H, N, -1).expand(B // W, -1, -1, -1)
        q, k, v = [x.reshape(B // W, W * H, x.shape[2], x.shape[3]) for x in (q, k, v)]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale).reshape(B, H, N, -1)
    # the fused kernel wants four axes; an expanded axis costs nothing
    added = added.expand(B, H, N, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale)


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
    return table.flatten(1).index_select(1, index.flatten()).reshape(table.shape[0], h * w, h * w)


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


# The operator ------------------------------------------------------------------------------------------------------


def _unsupported(q: Tensor, k: Tensor, v: Tensor, k2: Tensor | None, v2: Tensor | None) -> str | None:
    if any(x is not None and x.dtype != q.dtype for x in (k, v, k2, v2)):
        return "queries, keys and values of different types"
    width, limit = max(q.shape[-1], v.shape[-1]), widest_head(q.dtype)
    return f"a head size of {width} in {q.dtype} (at most {limit})" if width > limit else None


def widest_head(dtype: torch.dtype) -> int:
    """The largest head size whose tiles fit into registers (which the interpreter does not have)."""
    return 64 if dtype == torch.float32 and not interpreted() else 128


def under_autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors in the type that autocast asks for, as torch's own attention would take them."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [x if x is None else x.to(dtype) for x in tensors]


@torch.library.custom_op("zoo::attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_bias: Tensor | None,
    mask: Tensor | None,
    scale: float | None,
    k2: Tensor | None,
    v2: Tensor | None,
    key_bias2: Tensor | None,
    table: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return launch_forward(q, k, v, bias, key_bias, mask, scale, k2, v2, key_bias2, table)


@_forward.register_fake
def _(q, k, v, bias, key_bias, mask, scale, k2, v2, key_bias2, table):
    return _outputs(q, v)


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output (B, H, N, Dv), heads beside each other in memory, and the logarithm of each query's softmax sum."""
    B, H, N, _ = q.shape
    return q.new_empty(B, N, H, v.shape[-1]).transpose(1, 2), q.new_empty(B, H, N, dtype=accumulation_type(q))


def accumulation_type(x: Tensor) -> torch.dtype:
    """float32, or float64 for such tensors."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.custom_op("zoo::attention_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_bias: Tensor | None,
    mask: Tensor | None,
    scale: float | None,
    k2: Tensor | None,
    v2: Tensor | None,
    key_bias2: Tensor | None,
    table: Tensor | None,
    out: Tensor,
    lse: Tensor,
    needed: list[bool],
) -> list[Tensor]:
    return launch_backward(grad, q, k, v, bias, key_bias, mask, scale, k2, v2, key_bias2, table, out, lse, needed)


@_backward_op.register_fake
def _(grad, q, k, v, bias, key_bias, mask, scale, k2, v2, key_bias2, table, out, lse, needed):
    tensors = (q, k, v, bias, key_bias, k2, v2, key_bias2, table)
    return [x.new_empty(x.shape) for x, wanted in zip(tensors, needed) if wanted]


def _setup_context(ctx, inputs, output):
    q, k, v, bias, key_bias, mask, scale, k2, v2, key_bias2, table = inputs
    ctx.save_for_backward(q, k, v, bias, key_bias, mask, k2, v2, key_bias2, table, *output)
    ctx.scale = scale


def _backward(ctx, grad, _):
    q, k, v, bias, key_bias, mask, k2, v2, key_bias2, table, out, lse = ctx.saved_tensors
    needs = ctx.needs_input_grad
    needed = [*needs[:5], *needs[7:]]  # without mask and scale
    arguments = (q, k, v, bias, key_bias, mask, ctx.scale, k2, v2, key_bias2, table)
    grads = iter(torch.ops.zoo.attention_backward(grad, *arguments, out, lse, needed))
    dq, dk, dv, dbias, dkey_bias, dk2, dv2, dkey_bias2, dtable = (next(grads) if wanted else None for wanted in needed)
    return dq, dk, dv, dbias, dkey_bias, None, None, dk2, dv2, dkey_bias2, dtable


_forward.register_autograd(_backward, setup_context=_setup_context)


# Triton ------------------------------------------------------------------------------------------------------------
#
# Names in the kernels: strides are tuples (batch, head, token); `bias` and `mask` are None or (pointer, windows,
# strides of window, head, query, key), `key_bias` likewise without queries, `table` is None or (pointer, h, w).


@triton_jit
def load_tile(X, rows, size, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of a matrix with `size` rows and `WIDTH` columns, padded with zeros to BLOCK columns."""
    columns = tl.arange(0, BLOCK)
    if WIDTH == BLOCK:
        return tl.load(X + rows[:, None] * stride + columns[None, :], mask=(rows < size)[:, None], other=0.0)
    else:
        mask = (rows < size)[:, None] & (columns < WIDTH)[None, :]
        return tl.load(X + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton_jit
def store_tile(X, value, rows, size, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The counterpart of `load_tile`."""
    columns = tl.arange(0, BLOCK)
    mask = (rows < size)[:, None] & (columns < WIDTH)[None, :]
    tl.store(X + rows[:, None] * stride + columns[None, :], value.to(X.dtype.element_ty), mask=mask)


@triton_jit
def _logits(q, k, b, h, rows, keys, N, M, bias, key_bias, mask, table, SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """What the softmax sees of a tile of queries and keys; -inf where a key does not take part."""
    s = dot(q, tl.trans(k), PRECISION) * SCALE
    inside = (rows < N)[:, None] & (keys < M)[None, :]
    if bias is not None:
        here = bias[0] + (b % bias[1]) * bias[2] + h * bias[3]
        s += tl.load(here + rows[:, None] * bias[4] + keys[None, :] * bias[5], mask=inside, other=0.0).to(s.dtype)
    if table is not None:
        height, width = table[1], table[2]
        row_offset = (rows // width)[:, None] - (keys // width)[None, :] + height - 1
        column_offset = (rows % width)[:, None] - (keys % width)[None, :] + width - 1
        here = table[0] + h * (2 * height - 1) * (2 * width - 1)
        s += tl.load(here + row_offset * (2 * width - 1) + column_offset, mask=inside, other=0.0).to(s.dtype)
    if key_bias is not None:
        here = key_bias[0] + (b % key_bias[1]) * key_bias[2] + h * key_bias[3]
        s += tl.load(here + keys * key_bias[4], mask=keys < M, other=0.0).to(s.dtype)[None, :]
    if mask is not None:
        here = mask[0] + (b % mask[1]) * mask[2] + h * mask[3]
        inside = inside & (tl.load(here + rows[:, None] * mask[4] + keys[None, :] * mask[5], mask=inside, other=0) != 0)
    return tl.where(inside, s, float("-inf"))


@triton_jit
def _attend(
    acc, top, total, q, K, V, stride_k, stride_v, b, h, rows, N, M, bias, key_bias, mask, table,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The online softmax over one segment: running maximum, sum and weighted values of a tile of queries."""
    K += b * stride_k[0] + h * stride_k[1]
    V += b * stride_v[0] + h * stride_v[1]
    for start in range(0, M, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        k = load_tile(K, keys, M, stride_k[2], D, BLOCK_D)
        s = _logits(q, k, b, h, rows, keys, N, M, bias, key_bias, mask, table, SCALE, PRECISION)
        new_top = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key yet: exp(-inf) instead of NaN
        p = tl.exp(s - base[:, None])
        shrink = tl.exp(top - base)
        total = total * shrink + tl.sum(p, 1)
        v = load_tile(V, keys, M, stride_v[2], DV, BLOCK_DV)
        acc = acc * shrink[:, None] + dot(p.to(v.dtype), v, PRECISION)
        top = new_top
    return acc, top, total


@triton_jit
def _forward_kernel(
    Q, K, V, K2, V2, Out, Lse, stride_q, stride_k, stride_v, stride_k2, stride_v2, stride_o,
    bias, key_bias, mask, table, key_bias2, H, N, M, M2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile of queries of one image and head, against the keys of both segments."""
    tiles = tl.cdiv(N, BLOCK_Q)
    pid = tl.program_id(0)
    h = pid // tiles % H
    b = (pid // tiles // H).to(tl.int64)
    rows = pid % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    wide: tl.constexpr = Lse.dtype.element_ty
    q = load_tile(Q + b * stride_q[0] + h * stride_q[1], rows, N, stride_q[2], D, BLOCK_D)
    acc = tl.zeros([BLOCK_Q, BLOCK_DV], wide)
    top = tl.full([BLOCK_Q], float("-inf"), wide)
    total = tl.zeros([BLOCK_Q], wide)
    acc, top, total = _attend(
        acc, top, total, q, K, V, stride_k, stride_v, b, h, rows, N, M, bias, key_bias, mask, table,
        D, DV, BLOCK_K, BLOCK_D, BLOCK_DV, SCALE, PRECISION,
    )  # fmt: skip
    if K2 is not None:
        acc, top, total = _attend(
            acc, top, total, q, K2, V2, stride_k2, stride_v2, b, h, rows, N, M2, None, key_bias2, None, None,
            D, DV, BLOCK_K, BLOCK_D, BLOCK_DV, SCALE, PRECISION,
        )  # fmt: skip
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    store_tile(Out + b * stride_o[0] + h * stride_o[1], acc, rows, N, stride_o[2], DV, BLOCK_DV)
    # +inf where there is no key: backward's exp(s - lse) is zero then
    lse = tl.where(empty, float("inf"), top + tl.log(tl.where(empty, 1.0, total)))
    tl.store(Lse + (b * H + h) * N + rows, lse, mask=rows < N)


@triton_jit
def _probabilities_and_gradient(
    q, k, v, grad, lse, delta, b, h, rows, keys, N, M, bias, key_bias, mask, table,
    SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P and dS of a tile, computed again."""
    s = _logits(q, k, b, h, rows, keys, N, M, bias, key_bias, mask, table, SCALE, PRECISION)
    p = tl.exp(s - lse[:, None])
    return p, p * (dot(grad, tl.trans(v), PRECISION) - delta[:, None])


@triton_jit
def _pull_queries(
    dq, q, grad, lse, delta, K, V, stride_k, stride_v, b, h, rows, N, M, bias, key_bias, mask, table,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dS k of a tile of queries over one segment."""
    K += b * stride_k[0] + h * stride_k[1]
    V += b * stride_v[0] + h * stride_v[1]
    for start in range(0, M, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        k = load_tile(K, keys, M, stride_k[2], D, BLOCK_D)
        v = load_tile(V, keys, M, stride_v[2], DV, BLOCK_DV)
        _, ds = _probabilities_and_gradient(
            q, k, v, grad, lse, delta, b, h, rows, keys, N, M, bias, key_bias, mask, table, SCALE, PRECISION
        )
        dq += dot(ds.to(k.dtype), k, PRECISION)
    return dq


@triton_jit
def _backward_queries_kernel(
    Q, K, V, K2, V2, Out, Grad, Lse, Delta, DQ, stride_q, stride_k, stride_v, stride_k2, stride_v2, stride_o, stride_g,
    stride_dq, bias, key_bias, mask, table, key_bias2, H, N, M, M2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dq and <dO, out> of a tile of queries."""
    tiles = tl.cdiv(N, BLOCK_Q)
    pid = tl.program_id(0)
    h = pid // tiles % H
    b = (pid // tiles // H).to(tl.int64)
    rows = pid % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    wide: tl.constexpr = Lse.dtype.element_ty
    q = load_tile(Q + b * stride_q[0] + h * stride_q[1], rows, N, stride_q[2], D, BLOCK_D)
    grad = load_tile(Grad + b * stride_g[0] + h * stride_g[1], rows, N, stride_g[2], DV, BLOCK_DV)
    out = load_tile(Out + b * stride_o[0] + h * stride_o[1], rows, N, stride_o[2], DV, BLOCK_DV)
    delta = tl.sum(grad.to(wide) * out.to(wide), 1)
    lse = tl.load(Lse + (b * H + h) * N + rows, mask=rows < N, other=float("inf"))
    tl.store(Delta + (b * H + h) * N + rows, delta, mask=rows < N)
    dq = tl.zeros([BLOCK_Q, BLOCK_D], wide)
    dq = _pull_queries(
        dq, q, grad, lse, delta, K, V, stride_k, stride_v, b, h, rows, N, M, bias, key_bias, mask, table,
        D, DV, BLOCK_K, BLOCK_D, BLOCK_DV, SCALE, PRECISION,
    )  # fmt: skip
    if K2 is not None:
        dq = _pull_queries(
            dq, q, grad, lse, delta, K2, V2, stride_k2, stride_v2, b, h, rows, N, M2, None, key_bias2, None, None,
            D, DV, BLOCK_K, BLOCK_D, BLOCK_DV, SCALE, PRECISION,
        )  # fmt: skip
    store_tile(DQ + b * stride_dq[0] + h * stride_dq[1], dq * SCALE, rows, N, stride_dq[2], D, BLOCK_D)


@triton_jit
def _backward_keys_kernel(
    Q, K, V, Grad, Lse, Delta, DK, DV_, DKeyBias, stride_q, stride_k, stride_v, stride_g, stride_dk, stride_dv,
    bias, key_bias, mask, table, H, N, M,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dk, dv and the gradient of the key bias for a tile of one segment's keys."""
    tiles = tl.cdiv(M, BLOCK_K)
    pid = tl.program_id(0)
    h = pid // tiles % H
    b = (pid // tiles // H).to(tl.int64)
    keys = pid % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    wide: tl.constexpr = Lse.dtype.element_ty
    k = load_tile(K + b * stride_k[0] + h * stride_k[1], keys, M, stride_k[2], D, BLOCK_D)
    v = load_tile(V + b * stride_v[0] + h * stride_v[1], keys, M, stride_v[2], DV, BLOCK_DV)
    dk = tl.zeros([BLOCK_K, BLOCK_D], wide)
    dv = tl.zeros([BLOCK_K, BLOCK_DV], wide)
    dkey = tl.zeros([BLOCK_K], wide)
    Q += b * stride_q[0] + h * stride_q[1]
    Grad += b * stride_g[0] + h * stride_g[1]
    for start in range(0, N, BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q)
        q = load_tile(Q, rows, N, stride_q[2], D, BLOCK_D)
        grad = load_tile(Grad, rows, N, stride_g[2], DV, BLOCK_DV)
        lse = tl.load(Lse + (b * H + h) * N + rows, mask=rows < N, other=float("inf"))
        delta = tl.load(Delta + (b * H + h) * N + rows, mask=rows < N, other=0.0)
        p, ds = _probabilities_and_gradient(
            q, k, v, grad, lse, delta, b, h, rows, keys, N, M, bias, key_bias, mask, table, SCALE, PRECISION
        )
        dv += dot(tl.trans(p.to(grad.dtype)), grad, PRECISION)
        dk += dot(tl.trans(ds.to(q.dtype)), q, PRECISION)
        if DKeyBias is not None:
            dkey += tl.sum(ds, 0)
    store_tile(DK + b * stride_dk[0] + h * stride_dk[1], dk * SCALE, keys, M, stride_dk[2], D, BLOCK_D)
    store_tile(DV_ + b * stride_dv[0] + h * stride_dv[1], dv, keys, M, stride_dv[2], DV, BLOCK_DV)
    if DKeyBias is not None:
        tl.store(DKeyBias + (b * H + h) * M + keys, dkey, mask=keys < M)


@triton_jit
def _backward_bias_kernel(
    Q, K, V, Grad, Lse, Delta, DBias, stride_q, stride_k, stride_v, stride_g,
    bias, key_bias, mask, table, B, H, N, M, windows,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dS of a tile of queries and keys of one head, summed over the images of one window."""
    row_tiles, key_tiles = tl.cdiv(N, BLOCK_Q), tl.cdiv(M, BLOCK_K)
    pid = tl.program_id(0)
    keys = pid % key_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = pid // key_tiles % row_tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    h = pid // key_tiles // row_tiles % H
    window = (pid // key_tiles // row_tiles // H).to(tl.int64)
    total = tl.zeros([BLOCK_Q, BLOCK_K], Lse.dtype.element_ty)
    for image in range(0, B // windows):
        b = image * windows + window
        q = load_tile(Q + b * stride_q[0] + h * stride_q[1], rows, N, stride_q[2], D, BLOCK_D)
        k = load_tile(K + b * stride_k[0] + h * stride_k[1], keys, M, stride_k[2], D, BLOCK_D)
        v = load_tile(V + b * stride_v[0] + h * stride_v[1], keys, M, stride_v[2], DV, BLOCK_DV)
        grad = load_tile(Grad + b * stride_g[0] + h * stride_g[1], rows, N, stride_g[2], DV, BLOCK_DV)
        lse = tl.load(Lse + (b * H + h) * N + rows, mask=rows < N, other=float("inf"))
        delta = tl.load(Delta + (b * H + h) * N + rows, mask=rows < N, other=0.0)
        _, ds = _probabilities_and_gradient(
            q, k, v, grad, lse, delta, b, h, rows, keys, N, M, bias, key_bias, mask, table, SCALE, PRECISION
        )
        total += ds
    here = DBias + ((window * H + h) * N + rows[:, None]) * M + keys[None, :]
    tl.store(here, total, mask=(rows < N)[:, None] & (keys < M)[None, :])


# Launches ----------------------------------------------------------------------------------------------------------


def launch_forward(q, k, v, bias, key_bias, mask, scale, k2, v2, key_bias2, table):
    """The output (B, H, N, Dv), and the logarithm of each query's softmax sum (B, H, N)."""
    q, k, v, k2, v2 = (rows_contiguous(x) for x in (q, k, v, k2, v2))
    B, H, N, _ = q.shape
    out, lse = _outputs(q, v)
    settings = _settings(q, v, scale, _pairwise(bias, mask, table), backward=False)
    _forward_kernel[(cdiv(N, settings["BLOCK_Q"]) * H * B,)](
        *(q, k, v, k2, v2, out, lse),
        *(strides(x) for x in (q, k, v, k2, v2, out)),
        *_addends(q, k, bias, key_bias, mask, table),
        _key_addend(key_bias2, k2, H),
        *(H, N, k.shape[2], 0 if k2 is None else k2.shape[2]),
        **settings,
    )
    return out, lse


def launch_backward(grad, q, k, v, bias, key_bias, mask, scale, k2, v2, key_bias2, table, out, lse, needed):
    """The gradients that `needed` asks for, of q, k, v, bias, key_bias, k2, v2, key_bias2 and table."""
    grad, q, k, v, k2, v2 = (rows_contiguous(x) for x in (grad, q, k, v, k2, v2))
    B, H, N, _ = q.shape
    M = k.shape[2]
    grads = [x.new_empty(x.shape) if x is not None else None for x in (q, k, v, k2, v2)]
    dq, dk, dv, dk2, dv2 = grads
    delta = torch.empty_like(lse)
    addends = _addends(q, k, bias, key_bias, mask, table)
    key_addend2 = _key_addend(key_bias2, k2, H)
    settings = _settings(q, v, scale, _pairwise(bias, mask, table), backward=True)
    block_q, block_k = settings["BLOCK_Q"], settings["BLOCK_K"]

    _backward_queries_kernel[(cdiv(N, block_q) * H * B,)](
        *(q, k, v, k2, v2, out, grad, lse, delta, dq),
        *(strides(x) for x in (q, k, v, k2, v2, out, grad, dq)),
        *(*addends, key_addend2, H, N, M, 0 if k2 is None else k2.shape[2]),
        **settings,
    )
    wanted = dict(zip(("q", "k", "v", "bias", "key_bias", "k2", "v2", "key_bias2", "table"), needed))
    dkey = lse.new_empty(B, H, M) if wanted["key_bias"] else None
    if wanted["k"] or wanted["v"] or wanted["key_bias"]:
        _backward_keys_kernel[(cdiv(M, block_k) * H * B,)](
            *(q, k, v, grad, lse, delta, dk, dv, dkey),
            *(strides(x) for x in (q, k, v, grad, dk, dv)),
            *(*addends, H, N, M),
            **settings,
        )
    dkey2 = None
    if k2 is not None and (wanted["k2"] or wanted["v2"] or wanted["key_bias2"]):
        dkey2 = lse.new_empty(B, H, k2.shape[2]) if wanted["key_bias2"] else None
        _backward_keys_kernel[(cdiv(k2.shape[2], block_k) * H * B,)](
            *(q, k2, v2, grad, lse, delta, dk2, dv2, dkey2),
            *(strides(x) for x in (q, k2, v2, grad, dk2, dv2)),
            *(None, key_addend2, None, None, H, N, k2.shape[2]),
            **settings,
        )
    dbias = dtable = None
    if wanted["bias"] or wanted["table"]:
        windows = bias.shape[0] if wanted["bias"] and bias.dim() == 4 else 1
        dense = lse.new_empty(windows, H, N, M) if B else lse.new_zeros(windows, H, N, M)
        _backward_bias_kernel[(cdiv(N, block_q) * cdiv(M, block_k) * H * windows if B else 0,)](
            *(q, k, v, grad, lse, delta, dense),
            *(strides(x) for x in (q, k, v, grad)),
            *(*addends, B, H, N, M, windows),
            **settings,
        )
        dbias = dense.sum_to_size(bias.shape) if wanted["bias"] else None
        dtable = sum_over_offsets(dense.sum(0), table) if wanted["table"] else None
    if dkey is not None:
        dkey = _sum_windows(dkey, key_bias)
    if dkey2 is not None:
        dkey2 = _sum_windows(dkey2, key_bias2)
    results = (dq, dk, dv, dbias, dkey, dk2, dv2, dkey2, dtable)
    tensors = (q, k, v, bias, key_bias, k2, v2, key_bias2, table)
    # a sum over nothing gives the tensor itself: results must not share memory with inputs, and do not
    return [r.to(x.dtype).contiguous() for r, x, want in zip(results, tensors, needed) if want]


def sum_over_offsets(dense: Tensor, table: Tensor) -> Tensor:
    """The gradient of a table from that of its dense bias, (H, h w, h w) -> (H, 2h-1, 2w-1): sums along diagonals.

    A row that is one element longer than the number of offsets moves every next row by one, so that equal offsets
    come to stand in one column; no element is added twice in another order.
    """
    heads, h, w = table.shape[0], (table.shape[1] + 1) // 2, (table.shape[2] + 1) // 2
    by_columns = dense.reshape(heads, h, w, h, w).transpose(2, 3).reshape(heads * h * h, w, w)
    columns = _diagonals(by_columns).reshape(heads, h, h, 2 * w - 1)  # query row, key row, column offset
    rows = _diagonals(columns.permute(0, 3, 1, 2).reshape(heads * (2 * w - 1), h, h))
    return rows.reshape(heads, 2 * w - 1, 2 * h - 1).transpose(1, 2)


def _diagonals(x: Tensor) -> Tensor:
    """(n, s, s) -> (n, 2s-1): entry d + s - 1 is the sum of x[i, j] over i - j = d."""
    n, s, _ = x.shape
    padded = F.pad(x.flip(2), (0, s))  # (n, s, 2s): row i begins i places further left in rows of 2s - 1
    return padded.reshape(n, -1)[:, : s * (2 * s - 1)].reshape(n, s, 2 * s - 1).sum(1)


def _sum_windows(grad: Tensor, key_bias: Tensor) -> Tensor:
    """The gradient (B, H, M) of a key bias that windows, heads or images share."""
    if key_bias.dim() == 3 and 1 < key_bias.shape[0] < grad.shape[0]:
        grad = grad.reshape(-1, key_bias.shape[0], *grad.shape[1:]).sum(0)
    return grad.sum_to_size(key_bias.shape)


def rows_contiguous(x: Tensor | None) -> Tensor | None:
    """`x`, copied if its last axis is strided."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def strides(x: Tensor | None) -> tuple[int, ...] | None:
    """Strides of all axes but the last, which is contiguous."""
    return None if x is None else x.stride()[:-1]


def _addends(q, k, bias, key_bias, mask, table):
    """`bias`, `key_bias`, `mask` and `table` as the kernels take them."""
    B, H, N = q.shape[:3]
    M = k.shape[2]

    def pairs(x):
        if x is None:
            return None
        x = x.reshape((1,) * (4 - x.dim()) + x.shape)
        _check_windows(x.shape[0], B)
        x = x.expand(-1, H, N, M)
        return (x, x.shape[0], *x.stride())

    if table is not None:
        h, w = (table.shape[1] + 1) // 2, (table.shape[2] + 1) // 2
        if h * w != N or N != M:
            raise ValueError(
                f"the table is for a map of {h} x {w}, with {N} queries and {M} keys: pass one for their map"
            )
        table = (table.contiguous(), h, w)
    return pairs(bias), _key_addend(key_bias, k, H), pairs(mask if mask is None else mask.view(torch.uint8)), table


def _key_addend(key_bias, k, heads):
    if key_bias is None:
        return None
    x = key_bias.reshape((1,) * (3 - key_bias.dim()) + key_bias.shape)
    _check_windows(x.shape[0], k.shape[0])
    x = x.expand(-1, heads, k.shape[2])
    return (x, x.shape[0], *x.stride())


def _pairwise(bias, mask, table):
    return bias is not None or mask is not None or table is not None


def _check_windows(windows, batch):
    if batch % max(1, windows):
        raise ValueError(f"a bias or mask for {windows} windows does not fit a batch of {batch}: pass a divisor of it")


def _settings(q: Tensor, v: Tensor, scale: float | None, pairwise: bool, backward: bool) -> dict:
    """Block sizes and warps: the largest that `python -m tests.kernels.compile_only attention` finds without spills.

    `pairwise` says that the logits get something for each pair of query and key, whose addresses take registers.
    """
    N, D, DV = q.shape[2], q.shape[3], v.shape[3]
    block_d, block_dv = (max(16, next_power_of_2(d)) for d in (D, DV))
    width = max(block_d, block_dv)
    single = on_amd() or q.element_size() > 2 or (pairwise and backward)  # no room for a second stage
    if q.element_size() > 2 and backward:
        block_q, block_k, warps = 32 if width <= 32 else 16, 16, 4
    elif q.element_size() > 2:
        block_q, block_k, warps = 32, 32, 4 if width <= 32 else 8
    elif pairwise:
        block_q, block_k = 32 if backward and width > 16 else 64, 32
        warps = 4 if width <= (64 if backward else 32) else 8
        if on_amd() and backward and width > 64:
            block_k = 16
    elif backward:
        block_q, block_k, warps = (64, 64, 4) if width <= 64 else (64, 32, 8)
    else:
        block_q, block_k, warps = 128, 64, 4 if width <= 64 else 8
    return dict(
        D=D,
        DV=DV,
        BLOCK_Q=max(16, min(block_q, next_power_of_2(N))),
        BLOCK_K=block_k,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        SCALE=D**-0.5 if scale is None else float(scale),
        PRECISION=dot_precision(q.dtype),
        num_warps=warps,
        num_stages=1 if single else 2,
    )
