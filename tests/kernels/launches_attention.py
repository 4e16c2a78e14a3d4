"""The launches of the attention family that are compiled for GPUs that are not there."""

import torch

from tests.kernels.compile_only import launches
from zoo.kernels.prototype_select import launch_index, launch_scatter

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


@launches("prototype_select")
def _prototype_select():
    for dtype in (torch.float32, torch.float16):
        for heads in (8, 2):
            queries, keys = empty(1, 100, 256, dtype=dtype), empty(1, 4096, 256, dtype=dtype)
            allowed, index = empty(1, 100, 4096, dtype=torch.bool), empty(1, 100, heads, dtype=torch.int64)
            label = f"{NAMES[dtype]}, head size {256 // heads}"
            yield label, lambda a=(queries, keys, allowed, heads): launch_index(*a)
            yield label, lambda a=(queries, index, 4096): launch_scatter(*a)
