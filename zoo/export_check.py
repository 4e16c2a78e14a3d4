"""Does a file give what the model gives? Judged image by image, at the nominal size and at others.

A model that chooses (an argmax over channels, a top-k) jumps where two candidates tie: inputs that differ by rounding
then give outputs that differ by far more, whichever program computes them. Such an image shows nothing about the file.
Where the two differ by more than the tolerance, the model is therefore asked again with inputs moved by about 1e-6; if
its own output moves by more than the tolerance, the image is left out, and another one takes its place if no image of
that size remains. A difference of more than ten of the model's own jumps is no tie and counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.export_report import ExportError, ExportReport, SizeRule
from zoo.images import ImageSource, read_image
from zoo.preprocess import EvalTransform

_MOVED = 1e-6  # of normalised images, whose values are near 1: a few units of float32's last place
_DRAWS = 8
_JUMPS = 10  # largest difference that a tie explains, in largest jumps seen
_TRIES = 6  # batches of a size, until one of its images is decided


def check(
    report: ExportReport,
    network: nn.Module,
    run: Callable[[Tensor], Tensor],
    transform: EvalTransform,
    *,
    tolerance: float,
    batch_size: int | None = None,
    images: Sequence[ImageSource] = (),
) -> None:
    """Compare the file with the model and fill in the report.

    Args:
        report: says what the file takes (`rule`).
        network: normalised images (B, C, H, W) -> logits (B, classes), in float32.
        run: the same by the file.
        transform: how a picture becomes an input.
        tolerance: largest difference, in units of the outputs' standard deviation; `inf` measures and does not judge.
        batch_size: what the file takes, if it takes one number only.
        images: pictures that take part besides the made-up ones.

    Raises:
        ExportError: shapes or results differ, or no image of a size could be decided.
    """
    checker = _Checker(report, network, run, tolerance)
    channels = transform.input_size[0]
    generator = torch.Generator().manual_seed(0)
    for number, (height, width) in enumerate(_sizes(report.rule, transform)):
        count = batch_size or (1, 2, 3, 2)[number]
        for _ in range(_TRIES):
            if checker.add(_made_up((count, channels, height, width), number % 2 == 1, generator)):
                break
        else:
            raise ExportError(
                f"{report.path} was not written: at {height}x{width} the model's own outputs move by more than the "
                f"tolerance of {tolerance:.0e} when inputs move by {_MOVED:.0e}, so that nothing can be compared; "
                "pass a larger tolerance"
            )
    if images:
        pictures = torch.stack([transform(read_image(image)) for image in images])
        if batch_size:
            pictures = pictures.repeat(-(-batch_size // len(pictures)), 1, 1, 1)[:batch_size]
        checker.add(pictures)
    checker.finish()


def _sizes(rule: SizeRule, transform: EvalTransform) -> Iterator[tuple[int, int]]:
    height, width = transform.input_size[1:]
    yield height, width
    if rule.kind != "static":
        yield height + 32, max(8, width * 3 // 4)
        yield height * 5 // 4 + 5, width + 3
        yield height // 2 + 16, width


def _made_up(shape: tuple[int, int, int, int], noise: bool, generator: torch.Generator) -> Tensor:
    """Noise, or smooth pictures."""
    fine = torch.randn(shape, generator=generator)
    coarse = torch.randn(*shape[:2], 5, 7, generator=generator)
    return fine if noise else F.interpolate(coarse, size=shape[2:], mode="bicubic")


class _Checker:
    """Adds up what batches show."""

    def __init__(self, report: ExportReport, network: nn.Module, run: Callable[[Tensor], Tensor], tolerance: float):
        self.report, self.network, self.run, self.tolerance = report, network, run, tolerance
        self.largest: list[float] = []  # of each image
        self.means: list[float] = []
        self.same = 0

    def add(self, batch: Tensor) -> bool:
        """Compare these images. False: none of them could be decided."""
        report = self.report
        with torch.no_grad():
            expected, given = self.network(batch), self.run(batch)
        if given.shape != expected.shape:
            raise ExportError(f"{report.path} gives {tuple(given.shape)} where the model gives {tuple(expected.shape)}")
        scale = max(float(expected.std()), 1e-6 * float(expected.abs().max()), 1e-12) if expected.numel() > 1 else 1.0
        error = (given - expected).abs().flatten(1) / scale
        largest = error.amax(1).nan_to_num(nan=math.inf)
        counts = torch.ones(len(batch), dtype=torch.bool)
        for i in (largest > self.tolerance).nonzero().flatten().tolist():
            jump = self._jump(batch, expected, i) / scale
            counts[i] = not (jump > self.tolerance and largest[i] <= _JUMPS * jump)
        report.undecided += int((~counts).sum())
        report.checked.append((len(batch), *batch.shape[2:]))
        self.largest += largest[counts].tolist()
        self.means += error.mean(1)[counts].tolist()
        self.same += int((given.argmax(1) == expected.argmax(1))[counts].sum())
        return bool(counts.any())

    def _jump(self, batch: Tensor, expected: Tensor, i: int) -> float:
        """By how much the model's own output for image i moves, at most, when its input moves by rounding."""
        generator = torch.Generator().manual_seed(i)
        moved = batch.clone()  # the whole batch, whose size may be fixed
        jump = 0.0
        for _ in range(_DRAWS):
            moved[i] = batch[i] + _MOVED * torch.randn(batch[i].shape, generator=generator)
            with torch.no_grad():
                jump = max(jump, float((self.network(moved)[i] - expected[i]).abs().max()))
        return jump

    def finish(self) -> None:
        """Fill in the report and judge."""
        report, count = self.report, len(self.largest)
        report.difference, report.mean_difference = max(self.largest), sum(self.means) / count
        report.agreement = self.same / count
        if not report.difference <= self.tolerance:
            raise ExportError(
                f"{report.path} was not written: its results differ from the model's by {report.difference:.1e} of "
                f"their standard deviation, more than the tolerance of {self.tolerance:.0e}"
            )
