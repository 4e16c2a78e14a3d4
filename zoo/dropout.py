"""Dropout for CPUs that draws 16 random bits for an element, where PyTorch's draws a double.

PyTorch's takes about half of a training step of NiNformer, whose official settings drop half of every activation
(`python -m tests.bench.ninformer` compares). Elsewhere
(other devices, compiled and scripted models) PyTorch's own is used, which those fuse.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor, nn

_LEVELS = 1 << 16


@torch.fx.wrap
@register_notrace_function
def dropout(x: Tensor, p: float) -> Tensor:
    """Zero each element with probability p, rounded to a multiple of 2^-16, and scale the others to the same mean
    ("inverted" dropout; Srivastava et al., JMLR 2014, section 10).

    Args:
        x: floating, any shape.
        p: in [0, 1].

    Returns:
        Shape and dtype of x.

    Raises:
        ValueError: p is out of range.
    """
    dropped = round(p * _LEVELS)
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not 0 < dropped < _LEVELS:
        return F.dropout(x, p)
    count = x.numel()
    # the whole range of int64: every bit of it is random
    bits = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    keep = bits.view(torch.int16)[:count].view(x.shape) >= dropped - _LEVELS // 2
    # a product, since masked_fill and where are slow on CPUs; the scale apart, since x's dtype may not hold it
    return (x * keep.to(x.dtype)).mul_(_LEVELS / (_LEVELS - dropped))


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` by `dropout`."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape; the same in evaluation."""
        if torch.jit.is_scripting() or self.inplace:
            return F.dropout(x, self.p, self.training, self.inplace)
        return dropout(x, self.p) if self.training and self.p > 0 else x


def replace_dropout(model: nn.Module) -> None:
    """Put `Dropout` wherever the model has torch's, in place."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p, child.inplace))
