"""What an evaluation of a detector leaves behind: AP tables, COCO's result file, pictures of objects and of misses."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.ops import box_iou
from tqdm import tqdm

from zoo.box_pictures import Mark, draw_marks, object_colour
from zoo.images import read_image
from zoo.train.data.detection import DetectionData, EvaluationImages, collate_detection
from zoo.train.detection import DetectorObjective
from zoo.train.detection_metrics import (
    CocoScores,
    class_table,
    evaluate_results,
    score_table,
    to_results,
    write_results,
)
from zoo.train.loading import make_loader
from zoo.train.reports import format_table

_FOUND_IOU = 0.5  # an object is missed where no detection of its class overlaps it this much
_SHOWN_SCORE = 0.3


@dataclass
class DetectionEvaluation:
    """Scores of a set.

    Attributes:
        data: the annotated images.
        model: the detector.
        scores: COCO's, of boxes and of masks.
        results: rows of COCO's result format.
        missed: for each image the objects that no detection above the shown score covers.
        seconds: of the whole evaluation.
    """

    data: DetectionData
    model: nn.Module
    scores: tuple[CocoScores, ...]
    results: list[dict[str, Any]]
    missed: list[list[int]]
    seconds: float


@torch.inference_mode()
def evaluate_detector(
    model: nn.Module,
    data: DetectionData,
    *,
    device: str = "cpu",
    precision: str = "float32",
    workers: int = 2,
    progress: bool = True,
) -> DetectionEvaluation:
    """Detect in every image of `data` and score with COCO's evaluator.

    Args:
        model: detector; it is put into eval mode.
        data: annotated images.
        device: where to compute.
        precision: float32 or bf16 autocast.
        workers: decoding processes.
        progress: show a bar on a terminal.

    Raises:
        ImageError: a file could not be decoded; it is named.
    """
    task = DetectorObjective(model.eval()).to(device).eval()
    loader = make_loader(EvaluationImages(data), batch_size=1, workers=workers, collate_fn=collate_detection)
    image_ids = [image["id"] for image in data.coco["images"]]
    results: list[dict[str, Any]] = []
    missed: list[list[int]] = [[] for _ in range(len(data))]
    start = time.perf_counter()
    for batch in tqdm(loader, unit="image", disable=None if progress else True, leave=False, dynamic_ncols=True):
        with torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=precision == "bf16"):
            found = task(**task.data_preprocessor(batch), mode="predict")
        for sample in found:
            index = int(sample["index"])
            results += to_results(sample, image_ids[index], data.category_ids)
            missed[index] = _missed(data, index, sample)
    kinds = ("bbox", "segm") if model.has_masks and data.masks else ("bbox",)
    scores = tuple(evaluate_results(data.coco, results, kind) for kind in kinds)
    return DetectionEvaluation(data, model, scores, results, missed, time.perf_counter() - start)


def _missed(data: DetectionData, index: int, found: dict[str, torch.Tensor]) -> list[int]:
    objects = data.objects(index, masks=False)
    if not len(objects.boxes):
        return []
    shown = found["scores"] >= _SHOWN_SCORE
    boxes, labels = found["boxes"][shown].float().cpu(), found["labels"][shown].cpu()
    truth, true_labels = torch.as_tensor(objects.boxes).float(), torch.as_tensor(objects.labels)
    if not len(boxes):
        return list(range(len(truth)))
    overlap = box_iou(truth, boxes) * (true_labels[:, None] == labels[None])
    return (overlap.amax(dim=1) < _FOUND_IOU).nonzero()[:, 0].tolist()


def write_report(evaluation: DetectionEvaluation, folder: Path, title: str) -> str:
    """Write `results.json`, `results.md`, `detections.json` and pictures, and return the table."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scores = {
        f"{ {'bbox': '', 'segm': 'mask_'}[score.iou_type] }{name}": 100 * value if value >= 0 else None
        for score in evaluation.scores
        for name, value in score.stats.items()
    }
    images = len(evaluation.data)
    rows = [("images", str(images))]
    rows += [(name, "-" if value is None else f"{value:.2f} %") for name, value in scores.items()]
    rows.append(("images per second", f"{images / max(evaluation.seconds, 1e-9):.2f}"))
    (folder / "results.json").write_text(
        json.dumps({"title": title, "images": images, "scores": scores}, indent=2) + "\n"
    )
    text = [f"# {title}", "", score_table(evaluation.scores), "", class_table(evaluation.scores), ""]
    (folder / "results.md").write_text("\n".join(text))
    write_results(folder / "detections.json", evaluation.results)
    draw_pictures(evaluation, folder)
    return format_table(rows)


def draw_pictures(evaluation: DetectionEvaluation, folder: Path, count: int = 4) -> None:
    """`predictions.png`, images spread over the set, and `worst_misses.png`, those with most objects not found.

    Left: what was found. Right: the annotations, with the missed ones in colour.
    """
    images = len(evaluation.data)
    spread = sorted({round(i) for i in np.linspace(0, images - 1, min(count, images))})
    worst = sorted(range(images), key=lambda i: -len(evaluation.missed[i]))[:count]
    for name, indices in (("predictions.png", spread), ("worst_misses.png", worst)):
        rows = [_compare(evaluation, index) for index in indices]
        canvas = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), "white")
        top = 0
        for row in rows:
            canvas.paste(row, (0, top))
            top += row.height
        canvas.save(folder / name)


def _compare(evaluation: DetectionEvaluation, index: int) -> Image.Image:
    data = evaluation.data
    image = read_image(data.paths[index])
    prediction = evaluation.model.predict(image, class_names=data.classes)
    objects = data.objects(index, masks=False)
    missed = set(evaluation.missed[index])
    marks = [
        Mark(
            tuple(map(float, box)),
            f"{data.classes[label]}{': missed' if i in missed else ''}",
            object_colour(int(label)) if i in missed else (150, 150, 150),
            None,
        )
        for i, (box, label) in enumerate(zip(objects.boxes, objects.labels))
    ]
    panels = [prediction.draw(image), draw_marks(image, marks)]
    row = Image.new("RGB", (sum(p.width for p in panels), max(p.height for p in panels)), "white")
    row.paste(panels[0], (0, 0))
    row.paste(panels[1], (panels[0].width, 0))
    return row
