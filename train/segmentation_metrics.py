"""Scores of segmentations over a whole set: mean IoU from one confusion matrix, and panoptic quality.

Mean IoU (detectron2's convention): pixels whose label is ignored do not count, and the mean runs over the classes
that occur in the ground truth. Others average over classes with a non-empty union, or over all; `semantic_scores`
gives each under its name.

Panoptic quality (arXiv 1801.00868, equation 1) with the rules of COCO's panoptic API: a predicted and a true segment
of one class match if their IoU exceeds 0.5, void pixels of the ground truth leave the union, crowd segments neither
match nor are missed, and an unmatched prediction is forgiven where more than half of it is void or crowd of its class.
torchmetrics' `PanopticQuality` forgives predicted void, too, and knows no crowds: its figures are not comparable.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

VOID = 0  # id of pixels without a segment, in both maps


class ConfusionMatrix:
    """Counts of (true, predicted) class over the pixels of a set.

    Args:
        num_classes: classes 0..n-1; every other label of the ground truth is ignored, every other prediction counts as
            wrong.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        # the last column: predictions that are no class, which count in the pixels of the truth alone
        self.counts = np.zeros((num_classes, num_classes + 1), dtype=np.int64)

    def add(self, prediction: np.ndarray, truth: np.ndarray) -> None:
        """Count an image.

        Args:
            prediction: (H, W) classes.
            truth: (H, W) classes.

        Raises:
            ValueError: the maps differ in size.
        """
        if prediction.shape != truth.shape:
            raise ValueError(f"the prediction has {prediction.shape} pixels, the ground truth {truth.shape}")
        n = self.num_classes
        counted = (truth >= 0) & (truth < n)
        true, predicted = truth[counted].astype(np.int64), prediction[counted].astype(np.int64)
        predicted = np.where((predicted >= 0) & (predicted < n), predicted, n)
        self.counts += np.bincount(true * (n + 1) + predicted, minlength=n * (n + 1)).reshape(n, n + 1)

    def merge(self, counts: np.ndarray) -> None:
        """Add the counts of another process."""
        self.counts += counts


def class_ious(counts: np.ndarray) -> np.ndarray:
    """IoU of each class, NaN where neither the truth nor a prediction has it: (n, n + 1) -> (n,)."""
    hits = np.diagonal(counts).astype(np.float64)
    union = counts.sum(axis=1) + counts[:, :-1].sum(axis=0) - hits
    with np.errstate(invalid="ignore"):
        return np.where(union > 0, hits / np.maximum(union, 1), np.nan)


def semantic_scores(counts: np.ndarray) -> dict[str, float]:
    """Scores in percent of a confusion matrix (n, n + 1).

    `miou` is the mean over classes in the ground truth; `miou_union` over classes in either; `miou_all` over all, an
    absent one counting as 0; `pixel_accuracy`; `mean_accuracy`; `fwiou`, the mean by frequency in the truth.
    """
    truth = counts.sum(axis=1).astype(np.float64)
    present = truth > 0
    ious = class_ious(counts)
    filled = np.nan_to_num(ious)
    hits = np.diagonal(counts)
    total = max(truth.sum(), 1)
    mean = lambda values: 100 * float(values.mean()) if values.size else 0.0  # noqa: E731
    return {
        "miou": mean(ious[present]),
        "miou_union": mean(ious[~np.isnan(ious)]),
        "miou_all": mean(filled),
        "pixel_accuracy": 100 * float(hits.sum() / total),
        "mean_accuracy": mean(hits[present] / truth[present]),
        "fwiou": 100 * float((filled * truth).sum() / total),
    }


@dataclass(frozen=True)
class Segment:
    """One segment of an image: its class and, in the ground truth, whether it is a crowd."""

    category: int
    crowd: bool = False


@dataclass
class ClassTally:
    """Matches and mistakes of one class."""

    iou: float = 0.0
    tp: int = 0
    fp: int = 0
    fn: int = 0

    def add(self, other: ClassTally) -> None:
        """Add the counts of another image or process."""
        self.iou += other.iou
        self.tp += other.tp
        self.fp += other.fp
        self.fn += other.fn


@dataclass
class PanopticQuality:
    """Accumulates panoptic quality over a set.

    Attributes:
        tallies: counts by class.
    """

    tallies: dict[int, ClassTally] = field(default_factory=lambda: defaultdict(ClassTally))

    def add(
        self,
        predicted_ids: np.ndarray,
        predicted: Mapping[int, Segment],
        true_ids: np.ndarray,
        true: Mapping[int, Segment],
    ) -> None:
        """Count an image.

        Args:
            predicted_ids: (H, W) ids of segments, 0 for none.
            predicted: what each predicted id is.
            true_ids: (H, W) ids, 0 for void.
            true: what each true id is.

        Raises:
            ValueError: the maps differ in size, or one holds an id that is not described.
        """
        for category, tally in match_segments(predicted_ids, predicted, true_ids, true).items():
            self.tallies[category].add(tally)

    def merge(self, tallies: Mapping[int, ClassTally]) -> None:
        """Add the counts of another process."""
        for category, tally in tallies.items():
            self.tallies[category].add(tally)

    def scores(self, categories: Iterable[int] | None = None) -> dict[str, float]:
        """PQ, SQ and RQ in percent over the classes with any segment, and how many those are (`n`).

        Args:
            categories: only these classes (things, or stuff); all by default.
        """
        wanted = set(self.tallies) if categories is None else set(categories)
        rows = [
            class_quality(tally)
            for category, tally in self.tallies.items()
            if category in wanted and tally.tp + tally.fp + tally.fn
        ]
        means = np.mean(rows, axis=0) * 100 if rows else np.zeros(3)
        return {"pq": float(means[0]), "sq": float(means[1]), "rq": float(means[2]), "n": len(rows)}


def class_quality(tally: ClassTally) -> tuple[float, float, float]:
    """(PQ, SQ, RQ) of a class, in 0..1."""
    weight = tally.tp + 0.5 * tally.fp + 0.5 * tally.fn
    if not weight:
        return 0.0, 0.0, 0.0
    return tally.iou / weight, tally.iou / tally.tp if tally.tp else 0.0, tally.tp / weight


def match_segments(
    predicted_ids: np.ndarray, predicted: Mapping[int, Segment], true_ids: np.ndarray, true: Mapping[int, Segment]
) -> dict[int, ClassTally]:
    """Counts of one image by class; the arguments are those of `PanopticQuality.add`."""
    if predicted_ids.shape != true_ids.shape:
        raise ValueError(f"the prediction has {predicted_ids.shape} pixels, the ground truth {true_ids.shape}")
    # one sort over pairs of ids gives every intersection
    pairs, counts = np.unique(
        true_ids.astype(np.uint64) << np.uint64(32) | predicted_ids.astype(np.uint64), return_counts=True
    )
    overlap = {(int(p) >> 32, int(p) & 0xFFFFFFFF): int(c) for p, c in zip(pairs, counts)}
    true_area, predicted_area = defaultdict(int), defaultdict(int)
    for (t, p), count in overlap.items():
        true_area[t] += count
        predicted_area[p] += count
    _described("ground truth", true_area, true)
    _described("prediction", predicted_area, predicted)

    tallies: dict[int, ClassTally] = defaultdict(ClassTally)
    matched_true, matched_predicted = set(), set()
    for (t, p), intersection in overlap.items():
        if t == VOID or p == VOID or true[t].crowd or true[t].category != predicted[p].category:
            continue
        union = true_area[t] + predicted_area[p] - intersection - overlap.get((VOID, p), 0)
        if intersection / union > 0.5:
            tally = tallies[true[t].category]
            tally.tp += 1
            tally.iou += intersection / union
            matched_true.add(t)
            matched_predicted.add(p)

    crowds = {}  # the panoptic API remembers one crowd a class, the last one described
    for t, segment in true.items():
        if t in matched_true:
            continue
        if segment.crowd:
            crowds[segment.category] = t
        else:
            tallies[segment.category].fn += 1
    for p, segment in predicted.items():
        if p in matched_predicted or not predicted_area.get(p):
            continue
        forgiven = overlap.get((VOID, p), 0) + overlap.get((crowds.get(segment.category, -1), p), 0)
        if forgiven / predicted_area[p] <= 0.5:
            tallies[segment.category].fp += 1
    return dict(tallies)


def _described(where: str, areas: Mapping[int, int], segments: Mapping[int, Segment]) -> None:
    unknown = [i for i in areas if i != VOID and i not in segments]
    if unknown:
        raise ValueError(f"the {where} has pixels of segment {unknown[0]}, which is not in its list of segments")
