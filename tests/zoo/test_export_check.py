"""Which differences between a file and its model count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from zoo.export_check import check
from zoo.export_report import ExportError, ExportReport, SizeRule
from zoo.preprocess import EvalTransform

TRANSFORM = EvalTransform((3, 16, 16))
RULE = SizeRule("any", (16, 16))


class Choosing(nn.Module):
    """Logits that jump by `jump` where the first value of an image passes that of the first image ever seen."""

    def __init__(self, jump=1.0):
        super().__init__()
        self.jump, self.tie = jump, None

    def forward(self, x, including=True):
        first = x[:, 0, 0, 0]
        if self.tie is None:
            self.tie = first[0].clone()
        above = first >= self.tie if including else first > self.tie
        return torch.cat([x.mean((2, 3)), (self.jump * above)[:, None]], 1)


def _check(network, run, rule=RULE, tolerance=1e-4, **options):
    report = ExportReport(Path("x.onnx"), 0, rule)
    check(report, network, run, TRANSFORM, tolerance=tolerance, **options)
    return report


def test_an_image_at_a_tie_is_left_out_and_replaced():
    network = Choosing()
    report = _check(network, lambda x: network(x, including=False))
    assert report.undecided == 1
    assert report.difference < 1e-4
    # one image of the nominal size that is decided, besides the tie
    assert [size for size in report.checked if size[1:] == (16, 16)] == [(1, 16, 16)] * 2
    assert "1 image left out" in str(report)


def test_where_model_and_file_agree_nothing_is_left_out():
    network = Choosing()
    report = _check(network, network)
    assert report.undecided == 0
    assert report.difference == 0
    assert report.agreement == 1
    assert len(report.checked) == 4
    assert "left out" not in str(report)


@pytest.mark.parametrize("batch_size", [None, 3])
def test_other_images_are_judged_beside_a_tie(batch_size):
    network = Choosing()

    def run(x):
        wrong = x.shape[2] != 16  # at untraced sizes
        return network(x, including=False) + 0.01 * wrong

    with pytest.raises(ExportError, match=r"differ from the model's by .* more than the tolerance of 1e-04"):
        _check(network, run, batch_size=batch_size)


def test_a_tie_explains_a_jump_and_no_more():
    network = Choosing(jump=0.01)

    def run(x):
        return network(x) + torch.where(x[:, 0, 0, 0] == network.tie, 1.0, 0.0)[:, None]

    with pytest.raises(ExportError, match="differ from the model's"):
        _check(network, run)


def test_results_that_are_no_numbers_fail():
    network = Choosing()
    with pytest.raises(ExportError, match="differ from the model's by inf"):
        _check(network, lambda x: network(x) * float("nan"))


def test_a_model_that_decides_nothing_is_told_apart_from_a_wrong_file():
    def chaotic(x):
        return (1e9 * x.mean((2, 3))).sin()

    with pytest.raises(ExportError, match=r"at 16x16 the model's own outputs move .* pass a larger tolerance"):
        _check(chaotic, lambda x: -chaotic(x))


def test_an_infinite_tolerance_measures():
    network = Choosing()
    report = _check(network, lambda x: network(x) + 5, tolerance=float("inf"))
    assert report.difference > 1
    assert report.undecided == 0


def test_wrong_shapes_are_named():
    network = Choosing()
    with pytest.raises(ExportError, match=r"gives \(1, 3\) where the model gives \(1, 4\)"):
        _check(network, lambda x: network(x)[:, 1:])
