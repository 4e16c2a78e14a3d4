"""Launches of the fused pointwise operators for the shapes of their models."""

import torch

from tests.kernels.compile_only import launches
from zoo.kernels import geglu_norm, wave_gate


def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


@launches("geglu_norm")
def _geglu_norm():
    for rows, features, dtype in ((12544, 1536, torch.bfloat16), (2048, 512, torch.float32)):
        a, weight = empty(rows, features, dtype=dtype), empty(features)

        def call(a=a, weight=weight):
            geglu_norm.launch_forward(a, a, weight, weight, 1e-5, "gelu")
            geglu_norm.launch_backward(a, a, a, weight, weight, 1e-5, "gelu")

        yield f"({rows}, {features}), {str(dtype).removeprefix('torch.')}", call


@launches("wave_gate")
def _wave_gate():
    for channels, side, dtype in ((32, 56, torch.bfloat16), (160, 14, torch.float32)):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = empty(8, channels, side, side, dtype=dtype).contiguous(memory_format=layout)
            a = empty(8, 4 * channels, side, side, dtype=dtype).contiguous(memory_format=layout)
            rotation = empty(2 * channels, 2)

            def call(x=x, a=a, rotation=rotation):
                y, index = wave_gate.launch_forward(x, a, a, rotation)
                wave_gate.launch_backward(y, a, a, rotation, index)

            name = "last" if layout is torch.channels_last else "first"
            yield f"{4 * channels} of {channels} channels {name}, {str(dtype).removeprefix('torch.')}", call
