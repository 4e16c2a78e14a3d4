"""Sizes that images are resized to."""

from __future__ import annotations


def short_side_size(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """(height, width) with the shorter side `short`, or with the longer one `long` if it would exceed that, in pixels.

    The aspect ratio is kept up to rounding to whole pixels, halves upwards as detectron2 does.
    """
    scale = min(short / min(height, width), long / max(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
