"""Classification metrics against independent computations."""

import pytest
import torch

from zoo.train.metrics import classification_scores, single_label_scores, target_ranks
from zoo.train.reports import Evaluation


def test_top1_and_top5_equal_torchmetrics():
    from torchmetrics.functional.classification import multiclass_accuracy

    logits, targets = torch.randn(200, 12), torch.randint(0, 12, (200,))
    scores = classification_scores(logits, targets)
    for k, name in ((1, "top1"), (5, "top5")):
        expected = multiclass_accuracy(logits, targets, 12, average="micro", top_k=k)
        assert scores[name] == pytest.approx(100 * float(expected), abs=1e-4)
    expected = multiclass_accuracy(logits, targets, 12, average="macro")
    assert scores["mean_class"] == pytest.approx(100 * float(expected), abs=1e-4)


def test_classes_without_images_do_not_count_in_the_mean():
    logits = torch.tensor([[9.0, 0, 0], [9.0, 0, 0], [0, 9.0, 0], [9.0, 0, 0]])
    targets = torch.tensor([0, 0, 1, 1])
    scores = single_label_scores(target_ranks(logits, targets), targets, 3)
    assert scores["mean_class"] == pytest.approx(75.0)
    assert "top5" not in scores, "with five classes or fewer it says nothing"


def test_a_constant_output_is_not_counted_as_right_for_every_class():
    ranks = target_ranks(torch.zeros(4, 10), torch.tensor([0, 1, 5, 9]))
    assert ranks.tolist() == [0, 1, 5, 9], "ties are decided as argmax decides them"


def test_nan_scores_are_wrong():
    logits = torch.full((2, 3), float("nan"))
    assert (target_ranks(logits, torch.tensor([0, 2])) > 0).all()


def test_mean_average_precision_by_hand():
    # class 0 ranks its two positives first and third: (1/1 + 2/3) / 2; class 1 is perfect; class 2 has none
    logits = torch.tensor([[4.0, 3.0, 0.0], [3.0, -2.0, 0.0], [2.0, -3.0, 0.0], [1.0, 2.0, 0.0]])
    targets = torch.tensor([[1.0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0]])
    assert classification_scores(logits, targets)["mAP"] == pytest.approx(100 * ((1 + 2 / 3) / 2 + 1) / 2, abs=1e-4)


def test_confusion_counts_true_classes_by_row():
    evaluation = Evaluation(
        torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0]]), torch.tensor([0, 1, 1]), ["a", "b", "c"], ["x", "y"], []
    )
    assert evaluation.confusion().tolist() == [[1, 0], [1, 1]]
    rows = evaluation.per_class()
    assert [(r["class"], r["images"], r["accuracy"], r["precision"]) for r in rows] == [
        ("x", 1, 100.0, 50.0),
        ("y", 2, 50.0, 100.0),
    ]
