"""COCO average precision against the official evaluator, for detections made from the labels by a rule."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import torch

from tests.parity.golden import Case, data_folder
from tests.parity.runner import Check, NoSuchForm
from zoo.train.data.detection import draw_mask
from zoo.train.detection_metrics import encode_mask, evaluate_results


def claims(case: Case) -> bool:
    """COCO average precision of boxes and masks."""
    return case.path.stem.startswith("coco_ap_")


def run(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    """Evaluate the recorded detections; the evaluator counts in float64 whatever the form."""
    if folded or dtype is not torch.float64:
        raise NoSuchForm
    name, part = (text.strip() for text in case["data"].split(":"))
    coco = json.loads((data_folder(case, name) / "annotations" / f"{part}.json").read_text())
    results = detections(coco, case["offset"])
    yield Check("n_detections", abs(len(results) - case["n_detections"]), 0)
    for iou_type in ("bbox", "segm"):
        for evaluator in ("pycocotools", "faster-coco-eval"):
            if evaluator == "faster-coco-eval" and not _installed("faster_coco_eval"):
                continue
            stats = evaluate_results(coco, results, iou_type, evaluator=evaluator).stats
            for field, expected in zip(case["stats_order"], case[iou_type], strict=True):
                bar = 0 if evaluator == "pycocotools" else 1e-14
                yield Check(f"{iou_type} {field} {evaluator}", abs(stats[field] - expected), bar)


def _installed(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def detections(coco: dict, offset: int) -> list[dict]:
    """The rule of the golden files: moved and scaled labels, some left out, some also under the next category."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in coco["images"]}
    categories = sorted(category["id"] for category in coco["categories"])
    results = []
    for index, annotation in enumerate(a for a in coco["annotations"] if not a["iscrowd"]):
        k = index + offset
        if k % 9 == 8:
            continue
        x, y, w, h = annotation["bbox"]
        box = [
            x + w * ((7 * k) % 11 - 5) / 50,
            y + h * ((5 * k) % 13 - 6) / 60,
            w * (1 + ((3 * k) % 7 - 3) / 25),
            h * (1 + ((11 * k) % 9 - 4) / 30),
        ]
        mask = draw_mask(annotation, *sizes[annotation["image_id"]])
        shift = k % 5
        moved = np.zeros_like(mask)
        moved[:, shift:] = mask[:, : mask.shape[1] - shift]
        result = {
            "image_id": annotation["image_id"],
            "category_id": annotation["category_id"],
            "bbox": box,
            "score": ((37 * k) % 101 + 1) / 102,
            "segmentation": encode_mask(moved),
        }
        results.append(result)
        if k % 6 == 5:
            after = categories[(categories.index(annotation["category_id"]) + 1) % len(categories)]
            results.append({**result, "category_id": after, "score": result["score"] / 2})
    return results
