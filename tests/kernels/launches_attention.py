"""The launches of the attention family that are compiled for GPUs that are not there."""

import torch

from tests.kernels.compile_only import launches
from zoo.kernels import attention, linear_attention, tied_attention
from zoo.kernels.prototype_select import launch_index, launch_scatter

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


@launches("prototype_select")
def _prototype_select():
    for dtype, heads in ((torch.float32, 8), (torch.float16, 8), (torch.float16, 2)):
        queries, keys = empty(1, 100, 256, dtype=dtype), empty(1, 4096, 256, dtype=dtype)
        allowed, index = empty(1, 100, 4096, dtype=torch.bool), empty(1, 100, heads, dtype=torch.int64)
        label = f"{NAMES[dtype]}, head size {256 // heads}"
        yield label, lambda a=(queries, keys, allowed, heads): launch_index(*a)
        yield label, lambda a=(queries, index, 4096): launch_scatter(*a)


def _attend(dtype, D, N=196, second=False, **addends):
    """Forward and every gradient of `attention` for one kind of arguments."""
    q, k, v = (empty(4, 6, N, D, dtype=dtype) for _ in range(3))
    k2, v2 = (empty(4, 6, 96, D, dtype=dtype), empty(4, 6, 96, D, dtype=dtype)) if second else (None, None)
    bias, key_bias, mask, key_bias2, table = (
        addends.get(name) for name in ("bias", "key_bias", "mask", "key_bias2", "table")
    )
    arguments = (q, k, v, bias, key_bias, mask, D**-0.5, k2, v2, key_bias2, table)
    out, lse = attention.launch_forward(*arguments)
    tensors = (q, k, v, bias, key_bias, k2, v2, key_bias2, table)
    attention.launch_backward(out, *arguments, out, lse, [x is not None for x in tensors])


@launches("attention")
def _attention():
    for dtype, D in ((torch.float16, 32), (torch.float16, 64), (torch.float16, 128), (torch.float32, 32)):
        yield f"{NAMES[dtype]}, head size {D}", lambda a=(dtype, D): _attend(*a)
    half = torch.bfloat16
    bias, table = empty(6, 196, 196, dtype=half), empty(6, 27, 27, dtype=half)
    yield "bf16, head size 48, dense bias", lambda: _attend(half, 48, bias=bias)
    yield (
        "bf16, head size 32, table, two segments",
        lambda: _attend(half, 32, table=table, second=True, key_bias2=empty(6, 96, dtype=half)),
    )
    yield (
        "bf16, head size 96, key bias, mask",
        lambda: _attend(half, 96, key_bias=empty(6, 196), mask=empty(196, 196, dtype=torch.bool)),
    )
    windows = empty(4, 6, 64, 64, dtype=half), empty(4, 1, 64, 64, dtype=torch.bool)
    yield "bf16, head size 8, windows of 64", lambda: _attend(half, 8, 64, bias=windows[0], mask=windows[1])
    yield "fp32, head size 64, table", lambda: _attend(torch.float32, 64, table=empty(6, 27, 27))


def _tie(dtype, D):
    w = empty(4, 6, 197, D, dtype=dtype)
    out, lse = tied_attention.launch_forward(w, None)
    tied_attention.launch_backward(out, w, out, lse, None)


@launches("tied_attention")
def _tied_attention():
    for dtype, D in (
        (torch.float16, 32),
        (torch.bfloat16, 48),
        (torch.bfloat16, 64),
        (torch.float16, 128),
        (torch.float32, 64),
    ):
        yield f"{NAMES[dtype]}, head size {D}", lambda a=(dtype, D): _tie(*a)


def _linear(dtype, D):
    q, k, v = (empty(4, 3, 784, D, dtype=dtype) for _ in range(3))
    y, A, a = linear_attention.launch_forward(q, k, v, 1e-6)
    linear_attention.launch_backward(y, q, k, v, A, a, 1e-6)


@launches("linear_attention")
def _linear_attention():
    for dtype, D in ((torch.bfloat16, 32), (torch.float16, 64), (torch.float32, 32)):
        yield f"{NAMES[dtype]}, head size {D}", lambda a=(dtype, D): _linear(*a)
