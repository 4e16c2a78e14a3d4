"""Pictures for people: a prediction beside its picture, and labelled sheets of many pictures. Pillow only."""

from __future__ import annotations

import functools
import importlib.util
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from zoo.images import ImageSource, read_image

_PAPER = (255, 255, 255)
_INK = (28, 30, 33)
_MUTED = (110, 116, 125)
_TRACK = (237, 239, 242)
_BAR = (92, 148, 214)
_BAR_REST = (170, 198, 232)
_RIGHT = (38, 140, 76)
_WRONG = (206, 56, 48)
_NEUTRAL = (214, 218, 223)
_SUPERSAMPLE = 4  # marks are drawn this much larger and reduced, for smooth edges

# Pillow's built-in font holds ASCII only; these are tried for everything else.
_WIDER_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "Arial Unicode.ttf",
    "arialuni.ttf",
    "msyh.ttc",
    "PingFang.ttc",
    "arial.ttf",
)


def draw_scores(image: Image.Image, names: Sequence[str], scores: Sequence[float], *, title: str = "") -> Image.Image:
    """`image` with a panel of names, bars and scores: below wide pictures, beside tall ones.

    Pictures with a longer side below 240 px are enlarged and ones above 1600 px reduced, so that picture and
    text suit each other on a screen.

    Args:
        image: RGB.
        names: one a row, best first; long ones are cut with an ellipsis.
        scores: in 0..1.
        title: a line above the rows.
    """
    image = _for_screen(image)
    long_side = max(image.size)
    size = max(15, min(32, round(long_side / 32)))
    below = image.width >= 1.2 * image.height
    width = max(image.width, 20 * size) if below else 20 * size
    panel = _score_panel(names, scores, title, width, size)
    if below:
        canvas = Image.new("RGB", (width, image.height + panel.height), _PAPER)
        canvas.paste(image, ((width - image.width) // 2, 0))
        canvas.paste(panel, (0, image.height))
    else:
        height = max(image.height, panel.height)
        canvas = Image.new("RGB", (image.width + width, height), _PAPER)
        canvas.paste(image, (0, (height - image.height) // 2))
        canvas.paste(panel, (image.width, (height - panel.height) // 2))
    return canvas


def contact_sheet(
    images: Sequence[ImageSource],
    captions: Sequence[str],
    correct: Sequence[bool | None] | None = None,
    *,
    columns: int | None = None,
    cell: int = 208,
    title: str = "",
    max_lines: int = 2,
) -> Image.Image:
    """Labelled pictures in a grid: predictions on a batch, or a model's worst mistakes.

    Args:
        images: anything `zoo.read_image` takes; each is fitted whole into a square.
        captions: one a picture; wrapped, also at line breaks; cut with an ellipsis after `max_lines` lines.
        correct: True for a green frame and a check mark, False for a red one and a cross, None for grey.
        columns: pictures in a row; default: about as many as make a 4:3 sheet.
        cell: side of each square in pixels.
        title: a line above the grid.
        max_lines: lines kept for each caption.

    Raises:
        ValueError: there are no pictures, or lists of different lengths.
        ImageError: a picture cannot be read.
    """
    count = len(images)
    if count == 0:
        raise ValueError("contact_sheet got no pictures")
    for what, values in (("captions", captions), ("correct", correct)):
        if values is not None and len(values) != count:
            raise ValueError(f"contact_sheet got {count} pictures but {len(values)} {what}: pass one for each picture")
    if columns is not None and columns < 1:
        raise ValueError(f"columns is {columns}, expected at least 1")
    columns = min(count, columns or max(1, round(math.sqrt(count * 4 / 3))))
    rows = -(-count // columns)
    size = max(13, round(cell / 13))
    line = round(size * 1.3)
    gap, margin, frame = round(cell / 13), round(cell / 10), max(3, round(cell / 45))
    font = _font(size, "".join(captions) + title)
    lines = [_wrap(caption, font, cell, max_lines) for caption in captions]
    kept = max(1, max(len(text) for text in lines))
    title_font = _font(round(size * 1.35), title)
    heading = round(size * 2.7) if title else 0
    cell_height = cell + round(size * 0.5) + kept * line
    sheet = Image.new(
        "RGB",
        (
            2 * margin + columns * cell + (columns - 1) * gap,
            2 * margin + heading + rows * cell_height + (rows - 1) * gap,
        ),
        _PAPER,
    )
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((margin, margin), _cut(title, title_font, sheet.width - 2 * margin), _INK, title_font)
    for index, source in enumerate(images):
        left = margin + index % columns * (cell + gap)
        top = margin + heading + index // columns * (cell_height + gap)
        verdict = None if correct is None or correct[index] is None else bool(correct[index])
        colour = {True: _RIGHT, False: _WRONG, None: _NEUTRAL}[verdict]
        width = frame if verdict is not None else 1
        pen.rectangle((left, top, left + cell - 1, top + cell - 1), colour)
        inner = cell - 2 * width
        pen.rectangle((left + width, top + width, left + width + inner - 1, top + width + inner - 1), _TRACK)
        picture = _fit(read_image(source), inner)
        corner = (left + width + (inner - picture.width) // 2, top + width + (inner - picture.height) // 2)
        sheet.paste(picture, corner)
        if verdict is not None:
            badge = _badge(verdict, round(cell / 8))
            sheet.paste(badge, (left + cell - badge.width - width - 3, top + width + 3), badge)
        for number, (text, is_first) in enumerate(lines[index]):
            colour = _INK if is_first else _MUTED
            pen.text((left, top + cell + round(size * 0.4) + number * line), text, colour, font)
    return sheet


def _score_panel(names: Sequence[str], scores: Sequence[float], title: str, width: int, size: int) -> Image.Image:
    font, pad = _font(size, "".join(names) + title), round(size * 0.9)
    row, bar = round(size * 2.55), max(4, round(size * 0.4))
    rows = list(zip(names, scores, strict=True))
    heading = round(size * 1.8) if title else 0
    panel = Image.new("RGB", (width, 2 * pad + heading + row * max(1, len(rows)) - round(size * 0.7)), _PAPER)
    pen = ImageDraw.Draw(panel)
    if title:
        pen.text((pad, pad), _cut(title, font, width - 2 * pad), _MUTED, font)
    if not rows:
        pen.text((pad, pad + heading), _cut("nothing above the threshold", font, width - 2 * pad), _MUTED, font)
    inner = width - 2 * pad
    for index, (name, score) in enumerate(rows):
        top = pad + heading + index * row
        percent = f"{score:.1%}"
        room = font.getlength("100.0%")
        pen.text((pad, top), _cut(name, font, inner - room - size), _INK, font)
        pen.text((width - pad, top), percent, _INK if index == 0 else _MUTED, font, anchor="ra")
        bar_top = top + round(size * 1.45)
        radius = bar / 2
        pen.rounded_rectangle((pad, bar_top, width - pad, bar_top + bar), radius, _TRACK)
        filled = inner * min(1.0, max(0.0, score))
        if filled >= 1:
            colour = _BAR if index == 0 else _BAR_REST
            pen.rounded_rectangle((pad, bar_top, pad + max(filled, bar), bar_top + bar), radius, colour)
    return panel


def _for_screen(image: Image.Image) -> Image.Image:
    long_side = max(image.size)
    scale = 240 / long_side if long_side < 240 else min(1.0, 1600 / long_side)
    if scale == 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale >= 8 else Image.Resampling.LANCZOS)


def _fit(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale >= 8 else Image.Resampling.LANCZOS)


def _badge(right: bool, side: int) -> Image.Image:
    """A round mark, check or cross, so that right and wrong differ by more than a colour."""
    big = side * _SUPERSAMPLE
    badge = Image.new("RGBA", (big, big), (0, 0, 0, 0))
    pen = ImageDraw.Draw(badge)
    pen.ellipse((0, 0, big - 1, big - 1), (*(_RIGHT if right else _WRONG), 255), (255, 255, 255, 255), big // 14)
    strokes = [((0.28, 0.53), (0.44, 0.68), (0.73, 0.35))] if right else _CROSS
    for stroke in strokes:
        points = [(x * big, y * big) for x, y in stroke]
        pen.line(points, (255, 255, 255, 255), max(1, big // 9), joint="curve")
        for x, y in points:
            radius = big / 18
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), (255, 255, 255, 255))
    return badge.resize((side, side), Image.Resampling.LANCZOS)


_CROSS = [((0.32, 0.32), (0.68, 0.68)), ((0.68, 0.32), (0.32, 0.68))]


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: float, max_lines: int) -> list[tuple[str, bool]]:
    """`text` in at most `max_lines` lines of at most `width` pixels; for each, whether it begins `text`.

    Every paragraph (between line breaks) keeps at least one line; what does not fit ends in an ellipsis.
    """
    paragraphs = _drawable(text).split("\n")
    if len(paragraphs) > max_lines:
        paragraphs = [*paragraphs[: max_lines - 1], " ".join(paragraphs[max_lines - 1 :])]
    spare = max_lines - len(paragraphs)
    lines: list[tuple[str, bool]] = []
    for number, paragraph in enumerate(paragraphs):
        wrapped = [""]
        for word in paragraph.split():
            longer = f"{wrapped[-1]} {word}".strip()
            if wrapped[-1] and len(wrapped) <= spare and font.getlength(longer) > width:
                wrapped.append(word)
            else:
                wrapped[-1] = longer
        spare -= len(wrapped) - 1
        lines += [(_cut(line, font, width), number == 0) for line in wrapped]
    return lines


def _cut(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    text = _drawable(text).replace("\n", " ")
    if font.getlength(text) <= width:
        return text
    low, high = 0, len(text)
    while low < high:  # the longest beginning that fits together with the ellipsis
        middle = (low + high + 1) // 2
        if font.getlength(text[:middle].rstrip() + "...") <= width:
            low = middle
        else:
            high = middle - 1
    return text[:low].rstrip() + "..."


def _font(size: int, text: str) -> ImageFont.FreeTypeFont:
    """Pillow's own font where it has every letter of `text`, else the font that has most of them."""
    needed = {letter for letter in _drawable(text) if not letter.isascii()}
    if not needed:
        return _builtin_font(size)
    fonts = [font for name in _WIDER_FONTS if (font := _system_font(name, size)) is not None]
    return max(fonts, key=lambda font: sum(_has_glyph(font, c) for c in needed), default=_builtin_font(size))


@functools.cache
def _builtin_font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


@functools.cache
def _system_font(name: str, size: int) -> ImageFont.FreeTypeFont | None:
    places = [name]
    matplotlib = importlib.util.find_spec("matplotlib")  # found, not imported: it carries DejaVu
    if matplotlib is not None and matplotlib.origin:
        places.append(str(Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" / name))
    for place in places:
        try:
            return ImageFont.truetype(place, size)
        except OSError:
            continue
    return None


def _has_glyph(font: ImageFont.FreeTypeFont, letter: str) -> bool:
    return bytes(font.getmask(letter)) != bytes(font.getmask("\U0010ffff"))


@functools.lru_cache(4096)
def _drawable(text: str) -> str:
    """`text` without control characters; accents that no font at hand can draw are dropped, not boxed."""
    text = "".join(c if c == "\n" or unicodedata.category(c)[0] != "C" else " " for c in str(text))
    if text.isascii() or any(_system_font(name, 16) for name in _WIDER_FONTS):
        return text
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
