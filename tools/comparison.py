"""What was measured beside what authors claim: a table, and everything that must be known to read the difference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zoo.manifest import Weights, known_weights
from zoo.tools.records import Record
from zoo.tools.subject import Subject

# images of the official splits on which papers report
OFFICIAL_SIZES: Mapping[str, Mapping[str, int]] = {
    "imagenet-1k": {"val": 50_000},
    "coco": {"val": 5_000},
    "ade20k": {"val": 2_000},
    "cityscapes": {"val": 500},
    "cifar10": {"test": 10_000, "val": 10_000},
    "cifar100": {"test": 10_000, "val": 10_000},
    "set5": {"test": 5},
    "set14": {"test": 14},
    "b100": {"test": 100},
    "urban100": {"test": 100},
    "manga109": {"test": 109},
}
REAL_IMAGES = 46_837  # of ImageNet's validation images, those with a ReaL label
SHARES = ("top1", "top5", "real_top1")  # of images: metrics with a binomial standard error


@dataclass
class Outcome:
    """A model measured on one data set.

    Attributes:
        dataset, split: what it is.
        images: how many were evaluated.
        metrics: name -> value, by the manifest's names where it has them.
        settings: as they were, by the manifest's names of `evaluation`.
        counts: images behind a metric, where these are not all.
    """

    dataset: str
    split: str
    images: int
    metrics: dict[str, float]
    settings: dict[str, Any]
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int | None:
        """Images of the official split; None where that is not known."""
        return OFFICIAL_SIZES.get(self.dataset, {}).get(self.split)

    @property
    def complete(self) -> bool:
        """As many images as the official split has."""
        return self.total == self.images

    @property
    def errors(self) -> dict[str, float]:
        """Binomial standard errors in percent: of shares, unless the split is complete and the share fixed by it."""
        found = {}
        for name in SHARES:
            count = self.counts.get(name, self.images)
            if name not in self.metrics or self.complete:
                continue
            error = standard_error(self.metrics[name], count)
            if error is not None:
                found[name] = error
        return found


def standard_error(percent: float, count: int) -> float | None:
    """Of a share of `count` independent images, in percent; None where all or none are right, which shows no spread."""
    share = percent / 100
    return 100 * math.sqrt(share * (1 - share) / count) if 0 < share < 1 else None


@dataclass
class Comparison:
    """An outcome beside the claims that are made for its data set.

    Attributes:
        claims: metric -> claim, of the metrics that were measured.
        differing: settings that are not the claim's, each a sentence.
        remarks: what else one should know before reading a difference, each a sentence.
    """

    outcome: Outcome
    claims: dict[str, float]
    differing: list[str]
    remarks: list[str]

    def table(self) -> str:
        """metric | claim | measured | difference."""
        rows = [("metric", "claim", "measured", "difference")]
        errors = self.outcome.errors
        for name, value in self.outcome.metrics.items():
            spread = f" ± {errors[name]:.2f}" if name in errors else ""
            claim = self.claims.get(name)
            shown = "-" if claim is None else show(name, claim)
            difference = "-" if claim is None else f"{show(name, value - claim, sign=True)}{spread}"
            rows.append((name, shown, f"{show(name, value)}{spread}", difference))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)

    def lines(self) -> list[str]:
        """The table and the sentences, to print."""
        differing = [f"these settings differ from the claim's: {'; '.join(self.differing)}"] if self.differing else []
        return [*self.table().splitlines(), *differing, *self.remarks]


def show(metric: str, value: float, *, sign: bool = False) -> str:
    """A value with the digits that tables of its metric have."""
    digits = 4 if metric.startswith("ssim") else 2
    return f"{value:{'+' if sign else ''}.{digits}f}"


def compare(subject: Subject, outcome: Outcome) -> Comparison:
    """Claims that the manifest has for these weights on this data set, and what stands between them and the outcome."""
    weights = subject.weights
    remarks = _size_remarks(outcome)
    if weights is None:
        missing = f"no claim is known for {subject.title}: the manifest does not list this file"
        listed = [w.name for w in known_weights() if w.model == subject.name and w.claimed and w.task == subject.task]
        hint = f"; if it is {' or '.join(listed)}, say so with --model" if listed else ""
        return Comparison(outcome, {}, [], [missing + hint, *remarks])
    before = {name: weights.measured[name] for name in outcome.metrics if name in weights.measured}
    if before:
        listed = ", ".join(f"{name} {show(name, value)}" for name, value in before.items())
        remarks.insert(0, f"the manifest has as measured with {weights.name}: {listed}")
    claims, reason = _claims_for(weights, subject.task, outcome)
    if reason:
        return Comparison(outcome, {}, [], [reason, *remarks])
    common = {name: value for name, value in claims.items() if name in outcome.metrics}
    rest = {name: value for name, value in claims.items() if name not in outcome.metrics}
    if rest:
        listed = ", ".join(f"{name} {show(name, value)}" for name, value in rest.items())
        remarks.append(f"claimed and not measured here: {listed}")
    if common:
        source = f" ({weights.source})" if weights.source else ""
        remarks.insert(0, f"claims: the authors' figures for {weights.name}{source}")
    return Comparison(outcome, common, differences(weights.evaluation, outcome.settings), remarks)


def _claims_for(weights: Weights, task: str, outcome: Outcome) -> tuple[dict[str, float], str]:
    """The claims, or why there are none."""
    if not weights.claimed:
        return {}, f"no claim is known for {weights.name}: the manifest has none"
    if weights.task != task:
        return {}, f"the claim of {weights.name} is of the paper's whole model ({weights.task}): not compared"
    stated = weights.evaluation.get("dataset")
    stated = [stated] if isinstance(stated, str) else (stated or [])
    if stated and outcome.dataset not in stated:
        there = " and ".join(stated)
        return {}, f"the claim of {weights.name} is for {there}, and these images are {outcome.dataset}: not compared"
    split = weights.evaluation.get("split")
    if split and not split.startswith(outcome.split) and not outcome.split.startswith(split):
        return {}, f"the claim of {weights.name} is for the split {split}, this is {outcome.split}: not compared"
    if len(stated) > 1:  # one figure for each set
        return {name: value for name, value in weights.claimed.items() if name.endswith(f"_{outcome.dataset}")}, ""
    return dict(weights.claimed), ""


def _size_remarks(outcome: Outcome) -> list[str]:
    if outcome.total is None or outcome.complete:
        return []
    whole = f"{outcome.dataset}{'' if outcome.split == 'test' else f' {outcome.split}'}"
    if outcome.images > outcome.total:
        return [f"{outcome.images:,} images, and {whole} has {outcome.total:,}: this is another selection"]
    share = 100 * outcome.images / outcome.total
    lines = [f"a subset: {outcome.images:,} of the {outcome.total:,} images of {whole} ({share:.2g} %)"]
    if outcome.errors:
        lines[0] += "; ± is its binomial standard error, and how the images were chosen may matter more"
    else:
        lines[0] += ", so that a difference says little"
    return lines


def differences(stated: Mapping[str, Any], actual: Mapping[str, Any]) -> list[str]:
    """Settings that both know and that are not equal: "crop_pct 0.9 (claim: 0.875)"."""
    return [
        f"{name} {_plain(actual[name])} (claim: {_plain(value)})"
        for name, value in stated.items()
        if name in actual and name not in ("dataset", "split") and not _equal(value, actual[name])
    ]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b))
    if isinstance(a, float) or isinstance(b, float):
        return isinstance(a, int | float) and isinstance(b, int | float) and math.isclose(a, b, rel_tol=1e-3)
    return a == b


def _plain(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def to_record(subject: Subject, comparison: Comparison, device: str) -> Record:
    """The line of the results file."""
    from zoo.tools.records import device_name

    outcome, weights = comparison.outcome, subject.weights
    return Record(
        model=subject.name,
        tag=weights.tag if weights else None,
        task=subject.task,
        file=subject.file.name if subject.file else None,
        sha256=subject.sha256,
        dataset=outcome.dataset,
        split=outcome.split,
        images=outcome.images,
        total=outcome.total,
        settings=outcome.settings,
        metrics=outcome.metrics,
        errors=outcome.errors,
        claims=comparison.claims,
        differing=comparison.differing,
        device=device_name(device),
    )
