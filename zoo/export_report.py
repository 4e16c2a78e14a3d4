"""What exporting says: which images a file takes, what was written and how it compares, or why there is no file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


class ExportError(RuntimeError):
    """A model that could not be exported, or whose file does not give the model's results."""


@dataclass(frozen=True)
class SizeRule:
    """Which images a graph takes.

    Attributes:
        kind: "any" (as they are), "multiple" (stretched to the next multiple of `multiple` in the graph), "resized"
            (stretched to `size` in the graph), "static" (this `size` and no other).
        size: height and width that the model is built for.
        multiple: see `kind`.
    """

    kind: Literal["any", "multiple", "resized", "static"]
    size: tuple[int, int]
    multiple: int = 1

    def __str__(self) -> str:
        side = f"{self.size[0]}x{self.size[1]}"
        return {
            "any": "any size",
            "multiple": f"any size, stretched to the next multiple of {self.multiple} in the graph",
            "resized": f"any size, stretched to {side} in the graph",
            "static": f"{side} only",
        }[self.kind]


@dataclass
class ExportReport:
    """What was written.

    Attributes:
        path: the file.
        bytes: its size.
        rule: which images it takes.
        difference: largest difference from the model in the check, in units of the outputs' standard deviation; None
            if nothing was checked.
        mean_difference: likewise, the mean.
        agreement: share of the compared images with the same best class.
        checked: (batch, height, width) of the check.
        undecided: images of the check that were left out, since the model itself jumps there (`export_check`).
        note: why the images are stretched to one size, where the model itself would take any.
        metadata: what the file carries.
    """

    path: Path
    bytes: int
    rule: SizeRule
    difference: float | None = None
    mean_difference: float | None = None
    agreement: float | None = None
    checked: list[tuple[int, int, int]] = field(default_factory=list)
    undecided: int = 0
    note: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"{self.path}: {self.bytes / 1e6:.1f} MB, {self.rule}"
        if self.note:
            text += f" (since {self.note})"
        if self.difference is None:
            return f"{text}; not checked"
        sizes = ", ".join(f"{b}x{h}x{w}" for b, h, w in self.checked)
        text += (
            f"; against the model at {sizes}: largest difference {self.difference:.1e} of the std, mean "
            f"{self.mean_difference:.1e}, same best class for {self.agreement:.0%}"
        )
        if self.undecided:
            images = "1 image" if self.undecided == 1 else f"{self.undecided} images"
            text += f"; {images} left out, where the model's own output jumps within the inputs' rounding"
        return text
