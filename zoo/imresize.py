"""Resizing as MATLAB's imresize computes it: the cubic kernel with a = -0.5, widened when shrinking.

Super-resolution sets are made and baselines are measured with it, and other libraries' "bicubic" differ: Pillow's
rounds otherwise, OpenCV's does not widen, PyTorch's has a = -0.75. Two flavours are in use, and both are here:

- `shrink`: uint8, rows first, rounded to uint8 after each pass, border pixels repeated. It reproduces the published
  low-resolution files of Set5 and Set14 bit for bit.
- `imresize`: floating point, rounded at no place, borders mirrored (the first pixel repeated), as the toolboxes of the
  papers (BasicSR) enlarge for the bicubic baseline.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

Border = Literal["mirror", "repeat"]


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = -0.5 (IEEE TASSP 1981)."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


def contributions(length: int, size: int, scale: float, border: Border) -> tuple[np.ndarray, np.ndarray]:
    """Indices and weights, each (size, taps), of the input pixels that make each output pixel.

    Args:
        length: pixels of the input along this axis.
        size: pixels of the output.
        scale: output pixels for each input pixel.
        border: what lies outside: "mirror" or "repeat" the pixels at the border.
    """
    shrink = min(scale, 1.0)
    width = 4 / shrink
    center = (np.arange(size) + 1) / scale + 0.5 * (1 - 1 / scale) - 1  # in input pixels, from 0
    first = np.floor(center - width / 2).astype(np.int64)
    index = first[:, None] + np.arange(math.ceil(width) + 2)
    weight = shrink * cubic(shrink * (center[:, None] - index))
    weight /= weight.sum(axis=1, keepdims=True)
    used = (weight != 0).any(axis=0)
    index, weight = index[:, used], weight[:, used]
    if border == "repeat":
        return index.clip(0, length - 1), weight
    index = index % (2 * length)
    return np.minimum(index, 2 * length - 1 - index), weight


def _along(values: np.ndarray, axis: int, index: np.ndarray, weight: np.ndarray) -> np.ndarray:
    shape = [1] * values.ndim
    shape[axis] = -1
    out = None
    for tap in range(index.shape[1]):
        part = np.take(values, index[:, tap], axis=axis) * weight[:, tap].reshape(shape)
        out = part if out is None else np.add(out, part, out=out)
    return out


def imresize(
    image: np.ndarray,
    scale: float | None = None,
    size: tuple[int, int] | None = None,
    border: Border = "mirror",
) -> np.ndarray:
    """Resize in floating point.

    Args:
        image: (H, W) or (H, W, C), any type; integers become float64.
        scale: factor; the size is rounded up, as in MATLAB.
        size: rows and columns of the result, instead of a factor.
        border: see `contributions`.

    Raises:
        ValueError: neither or both of `scale` and `size`.
    """
    if (scale is None) == (size is None):
        raise ValueError("imresize takes either a scale or a size")
    values = image if image.dtype.kind == "f" else image.astype(np.float64)
    for axis in (0, 1):
        length = image.shape[axis]
        out = math.ceil(length * scale) if size is None else size[axis]
        index, weight = contributions(length, out, scale or out / length, border)
        values = _along(values, axis, index, weight.astype(values.dtype))
    return values


def shrink(image: np.ndarray, factor: int) -> np.ndarray:
    """The low-resolution version of a picture, as the published test sets were made.

    Args:
        image: uint8 (H, W) or (H, W, C); what does not fill a multiple of `factor` at the right and bottom is cut off.
        factor: whole number.

    Raises:
        ValueError: another type, or a picture smaller than `factor`.
    """
    if image.dtype != np.uint8:
        raise ValueError(f"shrink takes uint8 pictures, got {image.dtype}")
    if min(image.shape[:2]) < factor:
        raise ValueError(f"a picture of {image.shape[1]}x{image.shape[0]} cannot be made {factor} times smaller")
    for axis in (0, 1):
        size = image.shape[axis] // factor
        index, weight = contributions(size * factor, size, 1 / factor, "repeat")
        image = to_uint8(_along(image.astype(np.float64), axis, index, weight))
    return image


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Round halves up and clip to 0..255."""
    return np.floor(values + 0.5).clip(0, 255).astype(np.uint8)
