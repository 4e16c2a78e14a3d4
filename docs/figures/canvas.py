"""A small canvas for block diagrams: boxes, arrows and sums as an SVG that follows the reader's colour scheme.

The figure brings its own background, so that it is legible on any page. Colours say what a box works on and are
explained in the figure.
"""

from __future__ import annotations

from html import escape
from typing import NamedTuple

STYLE = """
  .panel { fill: #ffffff; stroke: #d0d7de }
  .frame { fill: none; stroke: #8c959f; stroke-dasharray: 5 4 }
  text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #1f2328 }
  .title { font-size: 15px; font-weight: 600 }
  .note { fill: #57606a; font-size: 12px }
  .line { fill: none; stroke: #57606a; stroke-width: 1.5 }
  .tip { fill: #57606a }
  .sum { fill: #ffffff; stroke: #57606a; stroke-width: 1.5 }
  .tokens { fill: #ddf0ff; stroke: #2f81c7 }
  .channels { fill: #fff1d6; stroke: #b7791f }
  .norm { fill: #eef0f3; stroke: #8c959f }
  .gate { fill: #f0e6ff; stroke: #8250df }
  .data { fill: #e3f6e8; stroke: #2da44e }
  @media (prefers-color-scheme: dark) {
    .panel { fill: #1b1f27; stroke: #3a4150 }
    .frame { stroke: #768390 }
    text { fill: #e6edf3 }
    .note { fill: #9aa4b2 }
    .line { stroke: #9aa4b2 }
    .tip { fill: #9aa4b2 }
    .sum { fill: #1b1f27; stroke: #9aa4b2 }
    .tokens { fill: #12324d; stroke: #58a6ff }
    .channels { fill: #3d2f12; stroke: #e3b341 }
    .norm { fill: #2a303b; stroke: #768390 }
    .gate { fill: #2f2250; stroke: #a98bf0 }
    .data { fill: #12351f; stroke: #4ac26b }
  }
"""
MEANING = {
    "tokens": "mixes positions",
    "channels": "mixes channels",
    "norm": "norm, scale or activation",
    "gate": "product of two paths",
    "data": "tokens, maps or pictures",
}


class Box(NamedTuple):
    """Where a box stands: its centre and the middles of its sides."""

    x: float
    y: float
    w: float
    h: float

    @property
    def left(self) -> tuple[float, float]:
        """Middle of the left side."""
        return self.x - self.w / 2, self.y

    @property
    def right(self) -> tuple[float, float]:
        """Middle of the right side."""
        return self.x + self.w / 2, self.y

    @property
    def top(self) -> tuple[float, float]:
        """Middle of the upper side."""
        return self.x, self.y - self.h / 2

    @property
    def bottom(self) -> tuple[float, float]:
        """Middle of the lower side."""
        return self.x, self.y + self.h / 2


class Canvas:
    """A figure of a given size, with a title and a description for those who cannot see it."""

    def __init__(self, width: int, height: int, title: str, description: str):
        self.width, self.height, self.title, self.description = width, height, title, description
        self.shapes: list[str] = []
        self.kinds: list[str] = []
        self.text(20, 28, title, "title", anchor="start")

    def text(self, x: float, y: float, content: str, style: str = "", anchor: str = "middle") -> None:
        """A line of text; y is its baseline."""
        style = f' class="{style}"' if style else ""
        self.shapes.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{style}>{escape(content)}</text>')

    def box(self, x: float, y: float, content: str, kind: str, w: float | None = None, h: float | None = None) -> Box:
        """A box around its centre; lines of the content are separated by a newline."""
        lines = content.split("\n")
        w = w or max(44, 7.2 * max(map(len, lines)) + 18)
        h = h or 17 * len(lines) + 15
        self.shapes.append(
            f'<rect class="{kind}" x="{x - w / 2:g}" y="{y - h / 2:g}" width="{w:g}" height="{h:g}" rx="6"/>'
        )
        for i, line in enumerate(lines):
            self.text(x, y + 4.5 + 17 * (i - (len(lines) - 1) / 2), line)
        if kind not in self.kinds:
            self.kinds.append(kind)
        return Box(x, y, w, h)

    def sum(self, x: float, y: float, sign: str = "+") -> Box:
        """A circle with a sign: where paths meet."""
        self.shapes.append(f'<circle class="sum" cx="{x:g}" cy="{y:g}" r="11"/>')
        self.text(x, y + 5, sign)
        return Box(x, y, 22, 22)

    def frame(self, x0: float, y0: float, x1: float, y1: float, label: str = "") -> None:
        """A dashed frame, with a label above its upper left corner."""
        self.shapes.append(
            f'<rect class="frame" x="{x0:g}" y="{y0:g}" width="{x1 - x0:g}" height="{y1 - y0:g}" rx="8"/>'
        )
        if label:
            self.text(x0 + 4, y0 - 6, label, "note", anchor="start")

    def arrow(self, *points: tuple[float, float], tip: bool = True) -> None:
        """A line through points, with a tip at its end."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        marker = ' marker-end="url(#tip)"' if tip else ""
        self.shapes.append(f'<polyline class="line" points="{path}"{marker}/>')

    def chain(self, y: float, start: float, parts: list[tuple[str, str]], gap: float = 24) -> list[Box]:
        """Boxes from left to right at a height, joined by arrows; `start` is the left side of the first one."""
        boxes: list[Box] = []
        for content, kind in parts:
            w = max(44, 7.2 * max(len(line) for line in content.split("\n")) + 18)
            boxes.append(self.box(start + w / 2, y, content, kind))
            if len(boxes) > 1:
                self.arrow(boxes[-2].right, boxes[-1].left)
            start += w + gap
        return boxes

    def skip(self, start: tuple[float, float], end: Box, y: float) -> None:
        """A residual path: up from a point on a line, along height y, down into a sum."""
        self.arrow(start, (start[0], y), (end.x, y), end.top if y < end.y else end.bottom)

    def svg(self) -> str:
        """The figure as text."""
        kinds = [k for k in MEANING if k in self.kinds]
        x = 20.0
        for kind in kinds:
            self.shapes.append(f'<rect class="{kind}" x="{x:g}" y="{self.height - 29}" width="14" height="14" rx="3"/>')
            self.text(x + 20, self.height - 17.5, MEANING[kind], "note", anchor="start")
            x += 48 + 6.3 * len(MEANING[kind])
        body = "\n".join(self.shapes)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img" aria-labelledby="title desc">\n'
            f'<title id="title">{escape(self.title)}</title>\n<desc id="desc">{escape(self.description)}</desc>\n'
            f"<style>{STYLE}</style>\n"
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path class="tip" d="M0 0 L8 4 L0 8 z"/></marker></defs>\n'
            f'<rect class="panel" x="0.5" y="0.5" width="{self.width - 1}" height="{self.height - 1}" rx="10"/>\n'
            f"{body}\n</svg>\n"
        )
