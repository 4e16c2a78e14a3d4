"""Scores of segmentations against the official evaluators, for predictions made from the labels by a rule."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests.parity.golden import Case, data_folder, relative_error
from tests.parity.runner import Check, NoSuchForm
from zoo.train.segmentation_metrics import (
    ConfusionMatrix,
    PanopticQuality,
    Segment,
    class_ious,
    semantic_scores,
)

BAR = 1e-9


def claims(case: Case) -> bool:
    """Mean IoU and panoptic quality."""
    return case.path.stem.startswith(("miou_", "pq_"))


def run(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    """Evaluate the recorded prediction; scores are counted in integers and float64 whatever the form."""
    if folded or dtype is not torch.float64:
        raise NoSuchForm
    name, part = (text.strip() for text in case["data"].split(":"))
    folder = data_folder(case, name)
    yield from (_mean_iou if case.path.stem.startswith("miou_") else _panoptic)(case, folder, part)


def _mean_iou(case: Case, folder: Path, part: str) -> Iterator[Check]:
    matrix = ConfusionMatrix(150)
    for path in sorted((folder / part).glob("*.png")):
        label = np.asarray(Image.open(path)).astype(np.int64)
        predicted = np.roll(label, (case["dy"], case["dx"]), (0, 1))
        for old, new in re.findall(r"(\d+) -> (\d+)", case["prediction"]):
            predicted[predicted == int(old)] = int(new)
        matrix.add(predicted - 1, label - 1)
    scores = semantic_scores(matrix.counts)
    ious = class_ious(matrix.counts)
    present = matrix.counts.sum(axis=1) > 0
    for field, ours in {
        "aAcc": "pixel_accuracy",
        "mAcc": "mean_accuracy",
        "mIoU_classes_with_union": "miou_union",
        "mIoU_classes_in_ground_truth": "miou",
        "mIoU_zero_filled_150": "miou_all",
        "fwIoU": "fwiou",
    }.items():
        yield Check(field, relative_error(scores[ours] / 100, case[field]), BAR)
    yield Check("pixels", abs(int(matrix.counts.sum()) - case["pixels"]), 0)
    yield Check("n_union", abs(int((~np.isnan(ious)).sum()) - case["n_union"]), 0)
    yield Check("n_gt", abs(int(present.sum()) - case["n_gt"]), 0)
    recorded = {int(k) - 1: v for k, v in case["iou"].items()}
    yield Check("iou: classes", len(recorded.keys() ^ set(np.flatnonzero(~np.isnan(ious)).tolist())), 0)
    yield Check("iou", max(relative_error(ious[k], v) for k, v in recorded.items()), BAR)


def _moved(ids: np.ndarray, dx: int, dy: int) -> np.ndarray:
    moved = np.zeros_like(ids)
    H, W = ids.shape
    moved[max(dy, 0) : H + min(dy, 0), max(dx, 0) : W + min(dx, 0)] = ids[
        max(-dy, 0) : H + min(-dy, 0), max(-dx, 0) : W + min(-dx, 0)
    ]
    return moved


def _panoptic(case: Case, folder: Path, part: str) -> Iterator[Check]:
    described = json.loads((folder / "annotations" / f"{part}.json").read_text())
    pngs = next(p for p in (folder / part, folder / "annotations" / part) if p.is_dir())
    quality = PanopticQuality()
    for annotation in described["annotations"]:
        rgb = np.asarray(Image.open(pngs / annotation["file_name"]).convert("RGB")).astype(np.int64)
        ids = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
        infos = annotation["segments_info"]
        true = {s["id"]: Segment(s["category_id"], bool(s["iscrowd"])) for s in infos}
        moved = _moved(ids, case["dx"], case["dy"])
        predicted = {}
        for n, info in enumerate(infos):
            if info["iscrowd"]:
                moved[moved == info["id"]] = 0
                continue
            wrong = n % case["every"] == case["every"] - 1
            source = infos[(n + 1) % len(infos)] if wrong else info
            if (moved == info["id"]).any():
                predicted[info["id"]] = Segment(source["category_id"])
        quality.add(moved, predicted, ids, true)
    kinds = {c["id"]: c["isthing"] for c in described["categories"]}
    for group, wanted in {
        "All": list(kinds),
        "Things": [k for k, thing in kinds.items() if thing],
        "Stuff": [k for k, thing in kinds.items() if not thing],
    }.items():
        scores, recorded = quality.scores(wanted), case["result"][group]
        yield Check(f"{group}: n", abs(scores["n"] - recorded["n"]), 0)
        for key in ("pq", "sq", "rq"):
            yield Check(f"{group}: {key}", relative_error(scores[key] / 100, recorded[key]), BAR)
    tallies = {k: t for k, t in quality.tallies.items() if t.tp + t.fp + t.fn}
    for key, recorded in case["totals"].items():
        yield Check(f"totals: {key}", relative_error(sum(getattr(t, key) for t in tallies.values()), recorded), BAR)
    per_category = {int(k): v for k, v in case["per_category"].items() if v["tp"] + v["fp"] + v["fn"]}
    yield Check("per_category: classes", len(per_category.keys() ^ tallies.keys()), 0)
    for key in ("tp", "fp", "fn", "iou"):
        worst = max(relative_error(getattr(tallies[c], key), v[key]) for c, v in per_category.items() if c in tallies)
        yield Check(f"per_category: {key}", worst, BAR if key == "iou" else 0)
