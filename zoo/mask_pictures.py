"""Pictures of segmentations: the photograph under coloured regions, their outlines, and a legend. Pillow and numpy."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from zoo.pictures import _INK, _MUTED, _PAPER, _cut, _font, _for_screen

Colour = tuple[int, int, int]
_MAX_ROWS = 40  # of a legend


class Region(NamedTuple):
    """One coloured region: its value in the map, its colour, and what the legend says of it."""

    id: int
    name: str
    colour: Colour
    detail: str = ""


def class_colour(label: int, shade: int = 0) -> Colour:
    """A colour for a class that differs from those of the classes beside it; `shade` varies it for single objects."""
    hue = (0.61 + label * 0.61803398875) % 1  # steps of the golden ratio never come close to an earlier colour soon
    lightness = (0.52, 0.38, 0.66)[(label // 7) % 3]
    lightness += (0, 0.1, -0.1, 0.17, -0.17)[shade % 5]
    hue += (0, 0.025, -0.025, 0.05, -0.05)[(shade // 5 + shade) % 5]
    red, green, blue = colorsys.hls_to_rgb(hue % 1, min(0.85, max(0.2, lightness)), 0.62)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_regions(
    image: Image.Image, ids: np.ndarray, regions: Sequence[Region], *, opacity: float = 0.55, outlines: bool = True
) -> Image.Image:
    """The picture with its regions in colour, white outlines between them, and a legend beside or below.

    Small pictures are enlarged and very large ones reduced, as by `zoo.pictures.draw_scores`.

    Args:
        image: RGB.
        ids: (H, W), of the picture's size; pixels whose value no region has stay as they are.
        regions: in the legend's order; regions of equal name and colour share a row, with a count.
        opacity: of the colours, 0..1.
        outlines: draw lines where neighbouring pixels have different values.

    Raises:
        ValueError: map and picture have different sizes.
    """
    if ids.shape != (image.height, image.width):
        raise ValueError(
            f"the map is {ids.shape[1]} x {ids.shape[0]} pixels and the picture {image.width} x {image.height}: pass "
            "the picture that was segmented"
        )
    shown = _for_screen(image)
    ids = _resize_nearest(ids, shown.height, shown.width)
    pixels = np.asarray(shown, dtype=np.float32)
    values = np.array([region.id for region in regions], dtype=np.int64)
    colours = np.array([region.colour for region in regions], dtype=np.float32).reshape(-1, 3)
    order = values.argsort()
    place = np.searchsorted(values[order], ids).clip(max=max(0, len(values) - 1))
    if len(values):
        found = values[order][place] == ids
        blend = np.where(found[..., None], (1 - opacity) * pixels + opacity * colours[order][place], pixels)
    else:
        blend = pixels
    if outlines:
        blend[_edges(ids, max(1, round(max(shown.size) / 700)))] = 255
    canvas = Image.fromarray(blend.round().astype(np.uint8))
    return _with_legend(canvas, regions) if regions else canvas


def _resize_nearest(ids: np.ndarray, height: int, width: int) -> np.ndarray:
    rows = ((np.arange(height) + 0.5) * ids.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * ids.shape[1] / width).astype(int)
    return ids[rows[:, None], columns]


def _edges(ids: np.ndarray, thickness: int) -> np.ndarray:
    edges = np.zeros(ids.shape, bool)
    edges[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    edges[1:] |= ids[1:] != ids[:-1]
    thick = edges.copy()
    for step in range(1, thickness):
        thick[:, step:] |= edges[:, :-step]
        thick[step:] |= edges[:-step]
    return thick


def _with_legend(image: Image.Image, regions: Sequence[Region]) -> Image.Image:
    rows: dict[tuple[str, Colour], list[str]] = {}
    for region in regions:
        rows.setdefault((region.name, region.colour), []).append(region.detail)
    entries = [
        (name, colour, details[0] if len(details) == 1 else f"x {len(details)}")
        for (name, colour), details in rows.items()
    ]
    left_out = len(entries) - _MAX_ROWS
    size = max(13, min(28, round(max(image.size) / 42)))
    font = _font(size, "".join(name for name, *_ in entries))
    pad, row = round(size * 0.9), round(size * 1.7)
    beside = image.width < 1.6 * image.height
    columns = 1 if beside else max(1, image.width // (15 * size))
    shown = entries[:_MAX_ROWS]
    lines = -(-(len(shown) + (left_out > 0)) // columns)
    width = 16 * size if beside else image.width
    height = 2 * pad + lines * row
    if beside:
        canvas = Image.new("RGB", (image.width + width, max(image.height, height)), _PAPER)
        left, top = image.width, 0
    else:
        canvas = Image.new("RGB", (max(image.width, width), image.height + height), _PAPER)
        left, top = 0, image.height
    canvas.paste(image, (0, 0))
    pen = ImageDraw.Draw(canvas)
    room = width // columns
    for index, (name, colour, detail) in enumerate(shown):
        x, y = left + pad + index // lines * room, top + pad + index % lines * row
        pen.rounded_rectangle((x, y + size * 0.1, x + size * 1.1, y + size * 1.2), size * 0.2, colour)
        taken = font.getlength(detail) + size * 0.6 if detail else 0
        inner = room - 2 * pad - size * 1.6 - taken
        pen.text((x + size * 1.6, y), _cut(name, font, max(size, inner)), _INK, font)
        if detail:
            pen.text((x + room - 2 * pad, y), detail, _MUTED, font, anchor="ra")
    if left_out > 0:
        x, y = left + pad + len(shown) // lines * room, top + pad + len(shown) % lines * row
        pen.text((x, y), f"and {left_out} more", _MUTED, font)
    return canvas
