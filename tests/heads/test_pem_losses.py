"""PEM's matching and losses."""

import pytest
import torch

from zoo.heads.pem.criterion import PemCriterion, Segments
from zoo.heads.pem.matcher import assign, sample_points
from zoo.heads.pem.model import PemOutput


def _output(batch=2, queries=6, classes=3, auxiliary=1, size=(8, 12)):
    def prediction():
        return torch.randn(batch, queries, classes + 1, requires_grad=True), torch.randn(
            batch, queries, *size, requires_grad=True
        )

    return PemOutput(*prediction(), [prediction() for _ in range(auxiliary)])


def _segments(labels, size=(32, 48)):
    masks = torch.zeros(len(labels), *size, dtype=torch.bool)
    for i in range(len(labels)):
        masks[i, 4 * i : 4 * i + 10, 3 * i : 3 * i + 20] = True
    return Segments(torch.tensor(labels, dtype=torch.long), masks)


def test_every_prediction_has_its_losses_and_gradients():
    output = _output(auxiliary=2)
    losses = PemCriterion(3, num_points=50)(output, [_segments([0, 2]), _segments([1])])
    kinds = ("loss_ce", "loss_mask", "loss_dice")
    assert set(losses) == {f"{kind}{suffix}" for kind in kinds for suffix in ("", "_0", "_1")}
    sum(losses.values()).backward()
    for logits, masks in [output[:2], *output.auxiliary]:
        assert logits.grad.abs().sum() > 0
        assert masks.grad.abs().sum() > 0


def test_a_perfect_prediction_is_matched_and_costs_little():
    target = _segments([2, 0])
    classes = torch.full((1, 4, 4), -10.0)
    classes[0, :, 3] = 10
    masks = torch.full((1, 4, 32, 48), -20.0)
    for query, (label, mask) in {1: (2, target.masks[0]), 3: (0, target.masks[1])}.items():
        classes[0, query, 3], classes[0, query, label] = -10, 10
        masks[0, query][mask] = 20
    losses = PemCriterion(3, num_points=400)(PemOutput(classes, masks, []), [target])
    assert losses["loss_ce"] < 1e-3
    # points between pixels see a mask's soft edge
    assert losses["loss_mask"] < 3
    assert losses["loss_dice"] < 1


def test_images_without_segments_give_zero_mask_losses_with_a_gradient():
    output = _output()
    losses = PemCriterion(3, num_points=50)(output, [_segments([]), _segments([])])
    assert losses["loss_mask"] == losses["loss_dice"] == 0
    sum(losses.values()).backward()
    assert output.mask_logits.grad is not None
    assert output.mask_logits.grad.abs().sum() == 0


def test_more_segments_than_queries_match_as_many_as_there_are():
    pairs = assign([torch.rand(3, 7), torch.rand(5, 0)])
    assert len(pairs[0][0]) == 3
    assert len(pairs[1][0]) == 0
    losses = PemCriterion(3, num_points=30)(_output(1, 2, auxiliary=0), [_segments([0, 1, 2, 0])])
    assert all(value.isfinite() for value in losses.values())


def test_costs_that_are_not_finite_do_not_end_the_training():
    cost = torch.tensor([[float("nan"), 1.0], [0.5, float("inf")], [float("-inf"), 3.0]])
    queries, segments = assign([cost])[0]
    assert sorted(segments.tolist()) == [0, 1]
    assert 1 not in [q for q, s in zip(queries.tolist(), segments.tolist(), strict=True) if s == 1]


def test_points_outside_of_a_map_are_zero_and_inside_bilinear():
    maps = torch.tensor([[[1.0, 3.0]]])
    points = torch.tensor([[0.25, 0.5], [0.5, 0.5], [0.75, 0.5], [2.0, 0.5]])
    assert sample_points(maps, points)[0].tolist() == [1.0, 2.0, 3.0, 0.0]
    assert sample_points(maps, points[None])[0].tolist() == [1.0, 2.0, 3.0, 0.0]


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ([_segments([0])], "1 targets for a batch of 2"),
        ([_segments([0]), _segments([3])], r"target 1 has labels 3\.\.3, expected 0\.\.2"),
        ([_segments([0]), Segments(torch.tensor([1]), torch.zeros(4, 4))], "target 1 has 1 labels and masks of shape"),
    ],
)
def test_targets_that_do_not_fit_are_named(targets, said):
    with pytest.raises(ValueError, match=said):
        PemCriterion(3, num_points=10)(_output(), targets)
