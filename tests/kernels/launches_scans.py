"""Launches of the scans for the shapes of ViM2 at 224 pixels, with and without parts of a sequence."""

import torch

from tests.kernels.compile_only import launches
from zoo.kernels import channel_scan, scan2d, selective_scan


def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


@launches("scan2d")
def _scan2d():
    for batch, side, dim, rank, dtype in (
        (1, 56, 192, 6, torch.bfloat16),
        (64, 7, 1536, 48, torch.float32),
    ):
        x = empty(batch, side, side, dim, dtype=dtype)
        weights = [
            empty(*shape) for shape in ((4, rank + 32, dim), (4, dim, rank), (4, dim), (4 * dim, 16), (4 * dim,))
        ]

        def call(x=x, weights=weights):
            _, borders = scan2d.launch_forward(x, *weights, "cross")
            scan2d.launch_backward(x.float(), x, *weights, borders, "cross")

        yield f"({batch}, {side}, {side}, {dim}), rank {rank}, {str(dtype).removeprefix('torch.')}", call


@launches("selective_scan")
def _selective_scan():
    for batch, dim, groups, states, length, dtype, gate in (
        (16, 768, 1, 16, 1024, torch.bfloat16, True),
        (2, 64, 1, 64, 200, torch.float16, True),
    ):
        u = empty(batch, dim, length, dtype=dtype)
        maps = [empty(batch, groups, states, length, dtype=dtype) for _ in range(2)]
        tensors = (u, u, empty(dim, states), *maps, empty(dim), u if gate else None, empty(dim))

        def call(u=u, tensors=tensors):
            _, last, borders = selective_scan.launch_forward(*tensors, True)
            selective_scan.launch_backward(u, last, *tensors, borders, True)

        name = str(dtype).removeprefix("torch.")
        yield f"({batch}, {dim}, {length}), {groups} groups, {states} states, {name}", call


@launches("channel_scan")
def _channel_scan():
    for batch, side, dim, expand, dtype in ((64, 28, 192, 2, torch.float32), (1, 7, 768, 1, torch.bfloat16)):
        width = expand * dim
        x = empty(batch, side, side, width, dtype=dtype)
        kinds = ((4, 3), (1, 4), (4, width), (4, width), (4, 16), (4, 16, width), (4, 16, width), (4, width))
        weights = [empty(*shape) for shape in kinds]

        def call(x=x, expand=expand, weights=weights):
            channel_scan.launch_forward(x, expand, *weights)
            channel_scan.launch_backward(x.float(), x, expand, *weights)

        yield f"({batch}, {side}, {side}, {width}), expand {expand}, {str(dtype).removeprefix('torch.')}", call
