"""Classification metrics from logits: top-1, top-5, mean per-class accuracy; mean average precision."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.extras import require


def target_ranks(logits: Tensor, targets: Tensor) -> Tensor:
    """How many classes score higher than the right one: (N,) int64, 0 where the prediction is right.

    Equal scores count against the prediction in class order, as argmax would decide them; a NaN score of the
    right class ranks last.
    """
    own = logits.gather(1, targets[:, None])
    classes = torch.arange(logits.shape[1], device=logits.device)
    higher = (logits > own) | ((logits == own) & (classes < targets[:, None]))
    ranks = higher.sum(1)
    return torch.where(own[:, 0].isnan(), logits.shape[1], ranks)


def single_label_scores(ranks: Tensor, targets: Tensor, num_classes: int) -> dict[str, float]:
    """top1, top5 and mean per-class accuracy in percent, over the classes that occur in `targets`."""
    right = (ranks == 0).double()
    support = torch.zeros(num_classes, dtype=torch.double).index_add_(0, targets, torch.ones_like(right))
    hits = torch.zeros(num_classes, dtype=torch.double).index_add_(0, targets, right)
    occurring = support > 0
    scores = {"top1": 100 * right.mean().item()}
    if num_classes > 5:
        scores["top5"] = 100 * (ranks < 5).double().mean().item()
    scores["mean_class"] = 100 * (hits[occurring] / support[occurring]).mean().item()
    return scores


def multilabel_scores(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """Mean average precision over classes with a positive, and F1 at probability 0.5 (micro), in percent.

    Args:
        logits: (N, classes).
        targets: (N, classes) of 0 and 1.
    """
    require("torchmetrics", extra="train")
    from torchmetrics.functional.classification import multilabel_average_precision, multilabel_f1_score

    labels = targets.long()
    occurring = labels.sum(0) > 0
    probabilities = torch.sigmoid(logits.double())
    average = multilabel_average_precision(
        probabilities[:, occurring], labels[:, occurring], int(occurring.sum()), average="none"
    )
    f1 = multilabel_f1_score(probabilities, labels, labels.shape[1], average="micro")
    return {"mAP": 100 * float(average.mean()), "f1": 100 * float(f1)}


def classification_scores(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """Scores of (N, classes) logits against (N,) labels or (N, classes) multi-label targets, in percent."""
    if targets.ndim == 2:
        return multilabel_scores(logits, targets)
    return single_label_scores(target_ranks(logits, targets), targets, logits.shape[1])


def main_metric(multilabel: bool) -> str:
    """The score that decides which weights are best."""
    return "mAP" if multilabel else "top1"
