"""Pictures of detections: boxes, masks and labelled scores over a photograph, and what was missed. Pillow and numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from zoo.mask_pictures import Colour, class_colour
from zoo.pictures import _RIGHT, _WRONG, _drawable, _font, _for_screen

MISSED, FALSE, FOUND = _WRONG, (230, 150, 30), _RIGHT


class Mark(NamedTuple):
    """One box to be drawn.

    Attributes:
        box: x0, y0, x1, y1 in pixels of the picture.
        text: on a tag at the box; "" for none.
        colour: of the box, the tag and the mask.
        mask: bool (H, W) of the picture's size, or None.
        dashed: draw the box in dashes.
    """

    box: tuple[float, float, float, float]
    text: str
    colour: Colour
    mask: np.ndarray | None = None
    dashed: bool = False


def object_colour(label: int, number: int = 0) -> Colour:
    """A colour for the `number`-th object of a class."""
    return class_colour(label, number)


def draw_marks(image: Image.Image, marks: Sequence[Mark], *, opacity: float = 0.45) -> Image.Image:
    """The picture with boxes, masks and tags; the first marks are drawn last, on top.

    Small pictures are enlarged and very large ones reduced, as by `zoo.pictures.draw_scores`.

    Args:
        image: RGB.
        marks: best first.
        opacity: of masks.

    Raises:
        ValueError: a mask of another size than the picture's.
    """
    shown = _for_screen(image)
    scale = shown.width / image.width
    canvas = _blend_masks(image, shown, marks, opacity)
    pen = ImageDraw.Draw(canvas)
    long_side = max(canvas.size)
    width, size = max(2, round(long_side / 320)), max(12, min(26, round(long_side / 50)))
    font = _font(size, "".join(mark.text for mark in marks))
    for mark in reversed(marks):
        corners = [round(v * scale) for v in mark.box]
        x0, y0, x1, y1 = corners[0], corners[1], max(corners[2], corners[0] + 1), max(corners[3], corners[1] + 1)
        if mark.dashed:
            _dashed(pen, (x0, y0, x1, y1), mark.colour, width)
        else:
            pen.rectangle((x0, y0, x1, y1), outline=mark.colour, width=width)
    for mark in reversed(marks):
        text = _drawable(mark.text).replace("\n", " ")
        if not text:
            continue
        x0, y0 = round(mark.box[0] * scale), round(mark.box[1] * scale)
        w, h = font.getlength(text) + 0.6 * size, round(1.35 * size)
        # above the box, or inside it where there is no room; never outside of the picture
        top = y0 - h if y0 >= h else min(y0, canvas.height - h)
        left = max(0, min(x0, canvas.width - w))
        pen.rectangle((left, top, left + w, top + h), fill=mark.colour)
        light = 0.299 * mark.colour[0] + 0.587 * mark.colour[1] + 0.114 * mark.colour[2]
        ink = (255, 255, 255) if light < 150 else (20, 20, 20)
        pen.text((left + 0.3 * size, top + 0.1 * size), text, ink, font)
    return canvas


def _blend_masks(image: Image.Image, shown: Image.Image, marks: Sequence[Mark], opacity: float) -> Image.Image:
    pixels = None
    for mark in reversed(marks):
        if mark.mask is None:
            continue
        if mark.mask.shape != (image.height, image.width):
            raise ValueError(
                f"a mask is {mark.mask.shape[1]} x {mark.mask.shape[0]} pixels and the picture {image.width} x "
                f"{image.height}: pass the picture that the masks belong to"
            )
        if pixels is None:
            pixels = np.asarray(image, dtype=np.float32).copy()
        pixels[mark.mask] = (1 - opacity) * pixels[mark.mask] + opacity * np.array(mark.colour, np.float32)
    if pixels is None:
        return shown.copy()
    blended = Image.fromarray(pixels.round().astype(np.uint8))
    return blended if shown.size == image.size else blended.resize(shown.size, Image.Resampling.LANCZOS)


def _dashed(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colour: Colour, width: int) -> None:
    x0, y0, x1, y1 = box
    dash = 5 * width
    for start in range(x0, x1, 2 * dash):
        stop = min(start + dash, x1)
        for y in (y0, y1):
            pen.line((start, y, stop, y), colour, width)
    for start in range(y0, y1, 2 * dash):
        stop = min(start + dash, y1)
        for x in (x0, x1):
            pen.line((x, start, x, stop), colour, width)
