"""What an evaluation leaves behind: a table, per-class results, and pictures of confusion and mistakes."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zoo.extras import require
from zoo.train.metrics import classification_scores, target_ranks


@dataclass(frozen=True)
class Evaluation:
    """Logits of every image of a data set beside the truth.

    `logits` (N, classes) float32; `targets` (N,) labels or (N, classes) multi-label; `paths` the N files;
    `left_out` files that could not be read, with the reason.
    """

    logits: Tensor
    targets: Tensor
    paths: list[str]
    classes: list[str]
    left_out: list[tuple[str, str]]
    seconds: float = 0.0

    @property
    def multilabel(self) -> bool:
        """Several classes an image."""
        return self.targets.ndim == 2

    @property
    def scores(self) -> dict[str, float]:
        """Metrics in percent."""
        return classification_scores(self.logits, self.targets)

    def confusion(self) -> Tensor:
        """(classes, classes) counts: true class by row, predicted class by column."""
        n = len(self.classes)
        pairs = self.targets * n + self.logits.argmax(1)
        return torch.bincount(pairs, minlength=n * n).reshape(n, n)

    def per_class(self) -> list[dict[str, object]]:
        """One row a class that occurs: support and, single-label, recall and precision; multi-label, AP."""
        if self.multilabel:
            return self._per_class_average_precision()
        matrix = self.confusion().double()
        support, predicted, hits = matrix.sum(1), matrix.sum(0), matrix.diag()
        return [
            {
                "class": name,
                "images": int(support[i]),
                "accuracy": round(100 * float(hits[i] / support[i]), 2),
                "precision": round(100 * float(hits[i] / predicted[i]), 2) if predicted[i] else 0.0,
            }
            for i, name in enumerate(self.classes)
            if support[i]
        ]

    def _per_class_average_precision(self) -> list[dict[str, object]]:
        require("torchmetrics", extra="train")
        from torchmetrics.functional.classification import binary_average_precision

        probabilities = torch.sigmoid(self.logits.double())
        return [
            {
                "class": name,
                "images": int(self.targets[:, i].sum()),
                "AP": round(100 * float(binary_average_precision(probabilities[:, i], self.targets[:, i].long())), 2),
            }
            for i, name in enumerate(self.classes)
            if self.targets[:, i].any()
        ]


def format_table(rows: list[tuple[str, str]]) -> str:
    """Two aligned columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def write_report(evaluation: Evaluation, folder: Path, title: str) -> str:
    """Write the report of an evaluation and return its table.

    Files: `results.json`, `results.md`, `per_class.csv`, and for single-label data `confusion.png`,
    `worst_mistakes.png` and `predictions.png`; `left_out.txt` if files could not be read.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scores = evaluation.scores
    rows = [("images", str(len(evaluation.paths)))]
    rows += [(name, f"{value:.2f} %") for name, value in scores.items()]
    if evaluation.seconds:
        rows.append(("images per second", f"{len(evaluation.paths) / evaluation.seconds:.1f}"))
    if evaluation.left_out:
        rows.append(("left out (unreadable)", str(len(evaluation.left_out))))
        lines = [f"{path}: {reason}" for path, reason in evaluation.left_out]
        (folder / "left_out.txt").write_text("\n".join(lines) + "\n")
    table = format_table(rows)
    per_class = evaluation.per_class()
    (folder / "results.json").write_text(
        json.dumps({"title": title, "images": len(evaluation.paths), "scores": scores}, indent=2) + "\n"
    )
    with (folder / "per_class.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(per_class[0]))
        writer.writeheader()
        writer.writerows(per_class)
    markdown = [
        f"# {title}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
    ]
    (folder / "results.md").write_text("\n".join(markdown))
    if not evaluation.multilabel:
        draw_confusion(evaluation, folder / "confusion.png")
        draw_mistakes(evaluation, folder / "worst_mistakes.png")
    draw_predictions(evaluation, folder / "predictions.png")
    return table


def draw_confusion(evaluation: Evaluation, path: Path, limit: int = 40) -> None:
    """The confusion matrix as a picture; above `limit` classes, of those that are confused most."""
    require("matplotlib", extra="train")
    from matplotlib.figure import Figure

    matrix = evaluation.confusion()
    names = list(evaluation.classes)
    if len(names) > limit:
        errors = matrix.sum(1) - matrix.diag() + matrix.sum(0) - matrix.diag()
        chosen = errors.topk(limit).indices.sort().values
        matrix, names = matrix[chosen][:, chosen], [names[i] for i in chosen]
    n = len(names)
    share = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    figure = Figure(figsize=(2.5 + 0.42 * n, 2.2 + 0.42 * n), layout="constrained")
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(n), names, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(n), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    for i in range(n):
        for j in range(n):
            if matrix[i, j]:
                colour = "white" if share[i, j] > 0.5 else "black"
                axes.text(j, i, int(matrix[i, j]), ha="center", va="center", fontsize=8, color=colour)
    figure.savefig(path, dpi=110)


def _sheet(evaluation: Evaluation, indices: list[int], path: Path) -> None:
    from zoo.images import read_image
    from zoo.pictures import contact_sheet

    if not indices:
        return
    images, captions, correct = [], [], []
    for i in indices:
        images.append(read_image(evaluation.paths[i]))
        if evaluation.multilabel:
            found = [n for n, z in zip(evaluation.classes, evaluation.logits[i]) if z > 0]
            truth = [n for n, t in zip(evaluation.classes, evaluation.targets[i]) if t > 0]
            captions.append(f"{', '.join(found) or 'nothing'}\n(true: {', '.join(truth) or 'nothing'})")
            correct.append(found == truth)
            continue
        probability, predicted = evaluation.logits[i].softmax(0).max(0)
        truth = int(evaluation.targets[i])
        caption = f"{evaluation.classes[predicted]} {100 * probability:.0f}%"
        captions.append(caption if predicted == truth else f"{caption}\n(true: {evaluation.classes[truth]})")
        correct.append(bool(predicted == truth))
    contact_sheet(images, captions, correct=correct).save(path)


def draw_mistakes(evaluation: Evaluation, path: Path, count: int = 10) -> None:
    """The `count` wrong predictions that the model was surest of. No file where there is no mistake."""
    confidence = evaluation.logits.softmax(1).max(1).values
    wrong = target_ranks(evaluation.logits, evaluation.targets) > 0
    order = (confidence * wrong).argsort(descending=True)[: min(count, int(wrong.sum()))]
    _sheet(evaluation, order.tolist(), path)


def draw_predictions(evaluation: Evaluation, path: Path, count: int = 20) -> None:
    """Predictions for `count` images spread evenly over the data set, right and wrong ones as they come."""
    count = min(count, len(evaluation.paths))
    spread = torch.linspace(0, len(evaluation.paths) - 1, count).long().tolist()
    _sheet(evaluation, sorted(set(spread)), path)


def draw_curves(history: Path, path: Path, metric: str) -> None:
    """Loss and metric over the epochs, from `history.jsonl`."""
    require("matplotlib", extra="train")
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in history.read_text().splitlines()]
    losses = [(r["epoch"], r["loss"]) for r in records if "loss" in r]
    scores = [(r["epoch"], r[metric]) for r in records if metric in r]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, points, label in ((left, losses, "training loss"), (right, scores, f"validation {metric} (%)")):
        if points:
            axes.plot(*zip(*points), marker="o" if len(points) < 40 else None, markersize=3)
        axes.set_xlabel("epoch")
        axes.set_title(label)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
