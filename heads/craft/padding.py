"""Padding to whole windows, at the right and at the bottom, as the official scripts do it."""

from typing import Literal

import torch
from torch import Tensor

from zoo.heads.craft.windows import modulo

Padding = Literal["reflect", "official"]
PADDINGS: tuple[Padding, ...] = ("reflect", "official")


def padded_size(length: int, multiple: int, padding: Padding) -> int:
    """The length after padding. "official" adds a whole `multiple` to a length that is one already."""
    if padding == "official":
        return (length // multiple + 1) * multiple
    return (length + multiple - 1) // multiple * multiple


def pad_image(x: Tensor, multiple: int, padding: Padding) -> Tensor:
    """Pad (B, C, H, W) at the bottom and at the right to multiples of `multiple`.

    Args:
        x: images of any size of at least one pixel.
        multiple: what rows and columns become multiples of.
        padding: "reflect" mirrors about the last pixel (training-time validation of the official repository);
            "official" repeats the last pixel in the mirrored part and adds a whole `multiple` where none is needed
            (its inference script, which gave the published numbers). Small images are mirrored again and again.

    Raises:
        ValueError: an unknown padding.
    """
    if padding not in PADDINGS:
        raise ValueError(f"padding is {padding!r}: expected one of {', '.join(PADDINGS)}")
    for axis in (2, 3):
        length = x.shape[axis]
        size = padded_size(length, multiple, padding)
        if padding == "official" or isinstance(length, torch.SymInt) or size != length:
            x = x.index_select(axis, _mirrored(length, size, padding == "official", x.device))
    return x


def _mirrored(length: int, size: int, repeat: bool, device: torch.device) -> Tensor:
    """Indices 0, 1, ..., length - 1 and back again, `size` of them; `repeat`: the ends appear twice in a row."""
    position = torch.arange(size, device=device)
    if repeat:
        position = modulo(position, 2 * length)
        return torch.minimum(position, 2 * length - 1 - position)
    period = 2 * length - 2 if isinstance(length, torch.SymInt) else max(2 * length - 2, 1)
    position = modulo(position, period)
    mirrored = torch.minimum(position, period - position)
    return mirrored if isinstance(length, torch.SymInt) else mirrored.clamp_max(length - 1)
