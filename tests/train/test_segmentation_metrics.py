import numpy as np
import pytest

from zoo.train.segmentation_metrics import ConfusionMatrix, PanopticQuality, Segment, class_ious, semantic_scores


def test_classes_that_are_only_predicted_do_not_enter_the_mean():
    matrix = ConfusionMatrix(3)
    matrix.add(np.array([[0, 0, 2, 1]]), np.array([[0, 0, 0, 255]]))
    scores = semantic_scores(matrix.counts)
    assert scores["miou"] == pytest.approx(100 * 2 / 3)
    assert scores["miou_union"] == pytest.approx(100 / 3)
    assert np.isnan(class_ious(matrix.counts)[1])  # predicted where the truth does not count


def test_a_prediction_that_is_no_class_counts_as_wrong():
    matrix = ConfusionMatrix(2)
    matrix.add(np.array([[0, -1, 7]]), np.array([[0, 0, 1]]))
    assert semantic_scores(matrix.counts)["pixel_accuracy"] == pytest.approx(100 / 3)


def _quality(predicted, described, true, truth):
    quality = PanopticQuality()
    quality.add(np.array([predicted]), described, np.array([true]), truth)
    return quality


def test_a_match_needs_more_than_half():
    truth = {1: Segment(0)}
    half = _quality([1, 1, 0, 0], {1: Segment(0)}, [1, 1, 1, 1], truth)
    assert half.scores() == {"pq": 0, "sq": 0, "rq": 0, "n": 1}
    more = _quality([1, 1, 1, 0], {1: Segment(0)}, [1, 1, 1, 1], truth)
    assert more.scores()["pq"] == pytest.approx(75)


def test_void_of_the_truth_leaves_the_union_and_forgives():
    quality = _quality([1, 1, 1, 2, 2], {1: Segment(0), 2: Segment(0)}, [1, 1, 0, 0, 0], {1: Segment(0)})
    assert quality.scores() == {"pq": 100, "sq": 100, "rq": 100, "n": 1}


def test_void_of_the_prediction_does_not():
    quality = _quality([0, 0, 0], {}, [1, 1, 1], {1: Segment(0)})
    assert quality.tallies[0].fn == 1


def test_crowds_neither_match_nor_are_missed_and_forgive_their_class():
    truth = {1: Segment(0, crowd=True)}
    assert not _quality([5, 5, 5], {5: Segment(0)}, [1, 1, 1], truth).scores()["n"]
    assert _quality([5, 5, 5], {5: Segment(1)}, [1, 1, 1], truth).tallies[1].fp == 1
    assert not _quality([0, 0, 0], {}, [1, 1, 1], truth).scores()["n"]


def test_two_processes_count_as_one():
    one, two, both = PanopticQuality(), PanopticQuality(), PanopticQuality()
    rng = np.random.default_rng(0)
    for i in range(6):
        maps = [rng.integers(0, 4, (8, 8)).repeat(4, 0).repeat(4, 1) for _ in range(2)]
        maps[1] = np.where(rng.random((32, 32)) < 0.8, maps[0], maps[1])
        kinds = {k: Segment(k % 2) for k in range(1, 4)}
        for quality in (both, one if i % 2 else two):
            quality.add(maps[0], kinds, maps[1], kinds)
    one.merge(two.tallies)
    assert one.scores() == pytest.approx(both.scores())


def test_undescribed_segments_and_other_sizes_are_errors():
    with pytest.raises(ValueError, match="pixels of segment 3"):
        _quality([3], {}, [1], {1: Segment(0)})
    with pytest.raises(ValueError, match="ground truth"):
        ConfusionMatrix(2).add(np.zeros((2, 2), int), np.zeros((2, 3), int))
