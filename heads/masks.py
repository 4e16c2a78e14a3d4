"""COCO's run-length coding of binary masks, in numpy: what `pycocotools` reads as an uncompressed code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """A bool mask (H, W) as `{"size": [H, W], "counts": [...]}`: runs down the columns, of zeros first."""
    flat = np.asarray(mask, dtype=bool).ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    bounds = np.concatenate(([0], changes, [flat.size]))
    counts = np.diff(bounds).tolist()
    if flat.size and flat[0]:
        counts.insert(0, 0)
    return {"size": list(mask.shape), "counts": counts}


def decode_rle(code: Mapping[str, Any]) -> np.ndarray:
    """The mask of an uncompressed code, bool (H, W).

    Raises:
        ValueError: the runs do not add up to the size.
    """
    height, width = code["size"]
    counts = np.asarray(code["counts"], dtype=np.int64)
    if counts.sum() != height * width or (counts < 0).any():
        raise ValueError(f"runs add up to {counts.sum()} pixels, expected {height} x {width}")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape((height, width), order="F")


def mask_box(mask: np.ndarray) -> list[int]:
    """COCO's box [x, y, width, height] of a mask; zeros for an empty one."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return [0, 0, 0, 0]
    return [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]
