"""Linear attention with relu features: the attention of SLAB (arXiv 2405.11582, "simplified linear attention").

    y_i = phi(q_i) (sum_j phi(k_j)^T v_j) / (phi(q_i) . sum_j phi(k_j) + eps),    phi = relu, no scale

A query whose features are all zero gets zeros. There is no softmax, so keys and values are summed once, before
any query is looked at.

Cost for N queries, M keys and head widths D, Dv, for each head: 2 (N + M) D Dv + 2 N D FLOPs, and (N + M) D +
(N + M) Dv elements moved: a few FLOPs a byte, bandwidth-bound on every machine. Computing (q k^T) v first, as
the authors do where N <= D, gives the same values; at those sizes either order takes no time. On a CPU the
products of contiguous heads are fastest (tests/bench/slab.py), the copies included.

The Triton kernels read q, k, v once by their strides and write y once. With A = sum_j phi(k_j)^T v_j / M,
a = sum_j phi(k_j) / M and n_i = phi(q_i) . a + eps / M (means, so that half precision cannot overflow),

    y_i = phi(q_i) A / n_i

Backward reads q, k, v and the gradient g of y once more, with A and a kept from the forward pass (D Dv + D numbers a
head), for 10 N D Dv FLOPs; y is not needed:

    dn_i = g_i / n_i,   dd_i = -<g_i, y_i> / n_i,   dphi(q_i) = dn_i A^T + dd_i a,   dA = sum phi(q_i)^T dn_i,
    da = sum dd_i phi(q_i),   dphi(k_j) = (v_j dA^T + da) / M,   dv_j = phi(k_j) dA / M

Few heads of many tokens are cut into splits, whose partial sums are added in a fixed order.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.attention import accumulation_type, load_tile, rows_contiguous, store_tile, strides
from zoo.kernels.dispatch import interpreted, use_triton
from zoo.kernels.jit import cdiv, dot, dot_precision, next_power_of_2, on_amd, triton_jit

if TYPE_CHECKING:
    import triton.language as tl


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
    if not torch.jit.is_scripting():  # noqa: SIM102 - scripting leaves the block out only for this very condition
        if use_triton("linear_attention", q, k, v, unsupported=_unsupported(q, k, v)):
            return torch.ops.zoo.linear_attention(q, k, v, eps)[0]
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


# The operator ------------------------------------------------------------------------------------------------------


def _unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return "queries, keys and values of different types"
    # the backward pass holds A, dA and products with both in registers
    limit = 128 if interpreted() else 32 if q.dtype == torch.float32 else 64
    width = max(q.shape[-1], v.shape[-1])
    return f"a head size of {width} in {q.dtype} (at most {limit})" if width > limit else None


@torch.library.custom_op("zoo::linear_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return launch_forward(q, k, v, eps)


@_forward.register_fake
def _(q, k, v, eps):
    return _outputs(q, v)


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, H, N, Dv), heads beside each other in memory; A (B, H, D, Dv) and a (B, H, D)."""
    B, H, N, D = q.shape
    wide = accumulation_type(q)
    y = q.new_empty(B, N, H, v.shape[-1]).transpose(1, 2)
    return y, q.new_empty(B, H, D, v.shape[-1], dtype=wide), q.new_empty(B, H, D, dtype=wide)


@torch.library.custom_op("zoo::linear_attention_backward", mutates_args=())
def _backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, A: Tensor, a: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_backward(grad, q, k, v, A, a, eps)


@_backward_op.register_fake
def _(grad, q, k, v, A, a, eps):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output[1:])
    ctx.eps = inputs[3]


def _backward(ctx, grad, dA, da):
    return (*torch.ops.zoo.linear_attention_backward(grad, *ctx.saved_tensors, ctx.eps), None)


_forward.register_autograd(_backward, setup_context=_setup_context)


# Triton: strides are tuples (batch, head, token); a program has one split of the tokens of one image and head -------


@triton_jit
def _sum_kernel(
    K, V, A, Sum, stride_k, stride_v, BATCH, H, M, tokens,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Partial A and a of a split: (splits, B, H, D, Dv) and (splits, B, H, D)."""
    h = tl.program_id(0) % H
    b = (tl.program_id(0) // H).to(tl.int64)
    split = tl.program_id(1)
    K += b * stride_k[0] + h * stride_k[1]
    V += b * stride_v[0] + h * stride_v[1]
    total = tl.zeros([BLOCK_D, BLOCK_DV], Sum.dtype.element_ty)
    features = tl.zeros([BLOCK_D], Sum.dtype.element_ty)
    for start in range(split * tokens, min(M, (split + 1) * tokens), BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        k = load_tile(K, rows, M, stride_k[2], D, BLOCK_D)
        v = load_tile(V, rows, M, stride_v[2], DV, BLOCK_DV)
        k = tl.where(k.to(Sum.dtype.element_ty) > 0.0, k, 0.0).to(k.dtype)
        total += dot(tl.trans(k), v, PRECISION)
        features += tl.sum(k.to(Sum.dtype.element_ty), 0)
    d = tl.arange(0, BLOCK_D)
    here = (split * BATCH + b) * H + h
    store_tile(A + here * D * DV, total / M, d, D, DV, DV, BLOCK_DV)
    tl.store(Sum + here * D + d, features / M, mask=d < D)


@triton_jit
def _apply_kernel(
    Q, A, Sum, Y, stride_q, stride_y, H, N, M, tokens,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    EPS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y of the queries of a split."""
    h = tl.program_id(0) % H
    b = (tl.program_id(0) // H).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    here = b * H + h
    context = load_tile(A + here * D * DV, d, D, DV, DV, BLOCK_DV)
    features = tl.load(Sum + here * D + d, mask=d < D, other=0.0)
    Q += b * stride_q[0] + h * stride_q[1]
    Y += b * stride_y[0] + h * stride_y[1]
    for start in range(tl.program_id(1) * tokens, min(N, (tl.program_id(1) + 1) * tokens), BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        q = tl.maximum(load_tile(Q, rows, N, stride_q[2], D, BLOCK_D).to(Sum.dtype.element_ty), 0.0)
        normaliser = tl.sum(q * features[None, :], 1) + tl.full([1], EPS, Sum.dtype.element_ty) / M
        y = dot(q, context, WIDE) / normaliser[:, None]
        store_tile(Y, y, rows, N, stride_y[2], DV, BLOCK_DV)


@triton_jit
def _backward_queries_kernel(
    Q, Grad, A, Sum, DQ, DA, DSum, stride_q, stride_g, stride_dq, BATCH, H, N, M, tokens,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    EPS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dq of a split, and its parts of dA and da."""
    h = tl.program_id(0) % H
    b = (tl.program_id(0) // H).to(tl.int64)
    split = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    context = load_tile(A + (b * H + h) * D * DV, d, D, DV, DV, BLOCK_DV)
    features = tl.load(Sum + (b * H + h) * D + d, mask=d < D, other=0.0)
    Q += b * stride_q[0] + h * stride_q[1]
    Grad += b * stride_g[0] + h * stride_g[1]
    DQ += b * stride_dq[0] + h * stride_dq[1]
    dcontext = tl.zeros([BLOCK_D, BLOCK_DV], Sum.dtype.element_ty)
    dfeatures = tl.zeros([BLOCK_D], Sum.dtype.element_ty)
    for start in range(split * tokens, min(N, (split + 1) * tokens), BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        q = tl.maximum(load_tile(Q, rows, N, stride_q[2], D, BLOCK_D).to(Sum.dtype.element_ty), 0.0)
        grad = load_tile(Grad, rows, N, stride_g[2], DV, BLOCK_DV).to(Sum.dtype.element_ty)
        normaliser = tl.sum(q * features[None, :], 1) + tl.full([1], EPS, Sum.dtype.element_ty) / M
        dn = grad / normaliser[:, None]
        dd = -tl.sum(dn * dot(q, context, WIDE), 1) / normaliser
        dq = dot(dn, tl.trans(context), WIDE) + dd[:, None] * features[None, :]
        store_tile(DQ, tl.where(q > 0.0, dq, 0.0), rows, N, stride_dq[2], D, BLOCK_D)
        # a query without features has a normaliser of eps / M only; it adds nothing
        dcontext += dot(tl.trans(q), dn, WIDE)
        dfeatures += tl.sum(q * dd[:, None], 0)
    here = (split * BATCH + b) * H + h
    store_tile(DA + here * D * DV, dcontext, d, D, DV, DV, BLOCK_DV)
    tl.store(DSum + here * D + d, dfeatures, mask=d < D)


@triton_jit
def _backward_keys_kernel(
    K, V, DA, DSum, DK, DV_, stride_k, stride_v, stride_dk, stride_dv, H, M, tokens,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dk and dv of a split."""
    h = tl.program_id(0) % H
    b = (tl.program_id(0) // H).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    dcontext = load_tile(DA + (b * H + h) * D * DV, d, D, DV, DV, BLOCK_DV) / M
    dfeatures = tl.load(DSum + (b * H + h) * D + d, mask=d < D, other=0.0) / M
    K += b * stride_k[0] + h * stride_k[1]
    V += b * stride_v[0] + h * stride_v[1]
    DK += b * stride_dk[0] + h * stride_dk[1]
    DV_ += b * stride_dv[0] + h * stride_dv[1]
    for start in range(tl.program_id(1) * tokens, min(M, (tl.program_id(1) + 1) * tokens), BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        k = tl.maximum(load_tile(K, rows, M, stride_k[2], D, BLOCK_D).to(DSum.dtype.element_ty), 0.0)
        v = load_tile(V, rows, M, stride_v[2], DV, BLOCK_DV).to(DSum.dtype.element_ty)
        dk = dot(v, tl.trans(dcontext), WIDE) + dfeatures[None, :]
        store_tile(DK, tl.where(k > 0.0, dk, 0.0), rows, M, stride_dk[2], D, BLOCK_D)
        store_tile(DV_, dot(k, dcontext, WIDE), rows, M, stride_dv[2], DV, BLOCK_DV)


# Launches ----------------------------------------------------------------------------------------------------------


def launch_forward(q: Tensor, k: Tensor, v: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, H, N, Dv), A (B, H, D, Dv) and a (B, H, D)."""
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    (B, H, N, D), M, DV = q.shape, k.shape[2], v.shape[3]
    y, A, a = _outputs(q, v)
    settings = _settings(q, v)
    splits, tokens = _splits(B * H, M, max(D, DV), settings["BLOCK_N"])
    parts, sums = A.new_empty(splits, B, H, D, DV), A.new_empty(splits, B, H, D)
    _sum_kernel[(B * H, splits)](k, v, parts, sums, strides(k), strides(v), B, H, M, tokens, **settings)
    A, a = (x[0] if splits == 1 else x.sum(0) for x in (parts, sums))
    splits, tokens = _splits(B * H, N, max(D, DV), settings["BLOCK_N"])
    _apply_kernel[(B * H, splits)](q, A, a, y, strides(q), strides(y), H, N, M, tokens, EPS=eps, **settings)
    return y, A, a


def launch_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, A: Tensor, a: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    grad, q, k, v = (rows_contiguous(x) for x in (grad, q, k, v))
    (B, H, N, D), M, DV = q.shape, k.shape[2], v.shape[3]
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    settings = _settings(q, v, backward=True)
    splits, tokens = _splits(B * H, N, max(D, DV), settings["BLOCK_N"])
    parts, sums = A.new_empty(splits, B, H, D, DV), A.new_empty(splits, B, H, D)
    _backward_queries_kernel[(B * H, splits)](
        *(q, grad, A, a, dq, parts, sums),
        *(strides(x) for x in (q, grad, dq)),
        *(B, H, N, M, tokens),
        EPS=eps,
        **settings,
    )
    dA, da = (x[0] if splits == 1 else x.sum(0) for x in (parts, sums))
    splits, tokens = _splits(B * H, M, max(D, DV), settings["BLOCK_N"])
    _backward_keys_kernel[(B * H, splits)](
        *(k, v, dA, da, dk, dv),
        *(strides(x) for x in (k, v, dk, dv)),
        *(H, M, tokens),
        **settings,
    )
    return dq, dk, dv


def _splits(heads: int, tokens: int, width: int, block: int) -> tuple[int, int]:
    """(splits, tokens of each): enough programs for the card, but parts of A that stay small beside the tokens."""
    programs = 264  # two for each multiprocessor of the largest cards
    splits = max(1, min(cdiv(programs, max(1, heads)), tokens // max(128, 4 * width)))
    return splits, cdiv(cdiv(tokens, splits), block) * block


def _settings(q: Tensor, v: Tensor, backward: bool = False) -> dict:
    """Block sizes and warps: what `python -m tests.kernels.compile_only linear_attention` finds without spills."""
    D, DV = q.shape[3], v.shape[3]
    block_d, block_dv = (max(16, next_power_of_2(d)) for d in (D, DV))
    width = max(block_d, block_dv)
    half = q.element_size() == 2
    block_n, warps = 64 if half else 32, 4 if width <= 32 else 8
    if backward and width > 32:
        block_n, warps = (16, 4) if on_amd() else (32, 8)
    return dict(
        D=D,
        DV=DV,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        BLOCK_N=block_n,
        PRECISION=dot_precision(q.dtype),
        # products of float32 sums: with half-precision inputs TF32 has as many digits as they have
        WIDE="tf32" if half and not on_amd() else dot_precision(accumulation_type(q)),
        num_warps=warps,
        num_stages=1 if on_amd() or backward or not half else 2,
    )
