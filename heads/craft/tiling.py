"""Approximate tiles, and the average of eight views.

A tile changes CRAFT's channel attention, whose statistics are those of the image that it sees: tiled and untiled
results differ at every pixel, a little. `zoo.heads.craft.strips` is exact in bounded memory and preferred; tiles are
what other tools do, and they need no space on a disk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Enlarge = Callable[[Tensor], Tensor]


def tile_origins(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along an axis: every tile - overlap pixels, the last one at the end."""
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def enlarge_tiled(
    enlarge: Enlarge,
    image: Tensor,
    scale: int,
    tile: int = 256,
    overlap: int = 32,
    blend: bool = False,
    step: Callable[[float], None] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Enlarge tile by tile; where tiles overlap, their results are averaged.

    Args:
        enlarge: (B, C, H, W) -> (B, C, scale*H, scale*W).
        image: (B, C, H, W).
        scale: its factor.
        tile: rows and columns of a tile (fewer where the image has fewer).
        overlap: pixels that neighbouring tiles share.
        blend: weights that fall linearly across the overlap, which hide seams better than uniform ones.
        step: called after each tile with the share of the work that it was.
        out: where to put the result.

    Raises:
        ValueError: an overlap that is not smaller than the tile.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap is {overlap}: expected from 0 to tile - 1 = {tile - 1}")
    batch, channels, height, width = image.shape
    rows, columns = tile_origins(height, tile, overlap), tile_origins(width, tile, overlap)
    if out is None:
        out = image.new_zeros(batch, channels, height * scale, width * scale)
    else:
        out.zero_()
    row_weights = _weights(rows, tile, overlap, height, scale, blend, image)
    column_weights = _weights(columns, tile, overlap, width, scale, blend, image)
    for i, top in enumerate(rows):
        for j, left in enumerate(columns):
            part = image[:, :, top : top + tile, left : left + tile]
            h, w = part.shape[2] * scale, part.shape[3] * scale
            y = enlarge(part) * row_weights[i].reshape(-1, 1) * column_weights[j]
            out[:, :, top * scale : top * scale + h, left * scale : left * scale + w] += y
            if step is not None:
                step(1 / (len(rows) * len(columns)))
    return out


def _weights(
    origins: list[int], tile: int, overlap: int, length: int, scale: int, blend: bool, like: Tensor
) -> list[Tensor]:
    """For each tile along an axis, the weight of each of its output pixels: they add up to 1 everywhere."""
    size = min(tile, length)
    shapes = []
    for origin in origins:
        shape = torch.ones(size * scale, dtype=torch.float64)
        if blend and overlap:
            ramp = (torch.arange(overlap * scale, dtype=torch.float64) + 0.5) / (overlap * scale)
            if origin > 0:
                shape[: len(ramp)] *= ramp
            if origin + size < length:
                shape[-len(ramp) :] *= ramp.flip(0)
        shapes.append(shape)
    total = torch.zeros(length * scale, dtype=torch.float64)
    for origin, shape in zip(origins, shapes):
        total[origin * scale : (origin + size) * scale] += shape
    return [
        (shape / total[origin * scale : (origin + size) * scale]).to(like.device, like.dtype)
        for origin, shape in zip(origins, shapes)
    ]


def self_ensemble(enlarge: Enlarge, image: Tensor) -> Tensor:
    """The mean of an upscaler's outputs for the eight flips and transposes of the image, each undone.

    CRAFT's two window shapes have weights of their own, so it is not equivariant and its views differ.

    Args:
        enlarge: (B, C, H, W) -> (B, C, s*H, s*W).
        image: (B, C, H, W).
    """
    total = None
    for view in range(8):
        flips = [axis for bit, axis in ((1, 2), (2, 3)) if view & bit]
        x = image.flip(flips)
        y = enlarge(x.transpose(2, 3) if view & 4 else x)
        y = (y.transpose(2, 3) if view & 4 else y).flip(flips)
        total = y if total is None else total.add_(y)
    return total.div_(8)
