"""What an evaluation of a segmenter leaves behind: a table, per-class results, official result files, pictures."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from zoo.images import read_image
from zoo.mask_pictures import Region, class_colour, draw_regions
from zoo.train.data.segmentation import SegmentationData
from zoo.train.loading import make_loader
from zoo.train.reports import format_table
from zoo.train.segmentation import EvaluationImages, PemSegmentation, SegmentationPreprocessor, collate_one
from zoo.train.segmentation_evaluation import ResultFiles, Tally, write_per_class

_MAIN = ("miou", "pixel_accuracy", "mean_accuracy", "pq", "sq", "rq", "pq_things", "pq_stuff", "mask_ap", "mask_ap50")


@dataclass
class SegmentationEvaluation:
    """Scores of a set.

    Attributes:
        tally: the counts behind the scores.
        scores: in percent.
        worst: (score of the image alone, index), worst first.
        seconds: of the whole evaluation.
    """

    tally: Tally
    scores: dict[str, float]
    worst: list[tuple[float, int]]
    seconds: float
    model: nn.Module
    test_size: tuple[int, int]
    thresholds: dict[str, float]


@torch.inference_mode()
def evaluate_segmenter(
    model: nn.Module,
    data: SegmentationData,
    *,
    test_size: tuple[int, int],
    thresholds: dict[str, float] | None = None,
    device: str = "cpu",
    precision: str = "float32",
    workers: int = 2,
    results: Path | None = None,
    progress: bool = True,
) -> SegmentationEvaluation:
    """Segment every image of `data` at its own size and compare.

    Args:
        model: segmenter; it is put into eval mode.
        data: annotated images.
        test_size: the shorter side of the network's input, and the limit of the longer one.
        thresholds: of panoptic maps.
        device: where to compute.
        precision: float32 or bf16 autocast.
        workers: decoding processes.
        results: folder for result files in the data set's official format, or None.
        progress: show a bar on a terminal.

    Raises:
        ImageError: a file could not be decoded; it is named.
    """
    model = model.eval().to(device)
    task = PemSegmentation(
        model,
        SegmentationPreprocessor(model.backbone.mean, model.backbone.std),
        kind=data.kind,
        thresholds=thresholds,
    ).to(device)
    loader = make_loader(EvaluationImages(data, *test_size), batch_size=1, workers=workers, collate_fn=collate_one)
    tally = Tally(data)
    files = ResultFiles(data, results) if results is not None else None
    single: list[tuple[float, int]] = []
    start = time.perf_counter()
    for batch in tqdm(loader, unit="image", disable=None if progress else True, leave=False, dynamic_ncols=True):
        with torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=precision == "bf16"):
            prepared = task.data_preprocessor(batch)
            found = task(**prepared, mode="predict")
        for result in found:
            tally.add(result["index"], result)
            if files is not None:
                files.add(result["index"], result)
            single.append((_score_alone(data, result), result["index"]))
    if files is not None:
        files.close()
    seconds = time.perf_counter() - start
    return SegmentationEvaluation(
        tally, tally.scores(), sorted(single), seconds, model, tuple(test_size), thresholds or {}
    )


def _score_alone(data: SegmentationData, result: dict) -> float:
    if data.kind == "instance":
        return float(result["instances"].scores.max()) if len(result["instances"].scores) else 0.0
    alone = Tally(data)
    alone.add(result["index"], result)
    return alone.scores()["miou" if data.kind == "semantic" else "pq"]


def write_report(evaluation: SegmentationEvaluation, folder: Path, title: str) -> str:
    """Write `results.json`, `results.md`, `per_class.csv` and pictures, and return the table."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data, scores = evaluation.tally.data, evaluation.scores
    rows = [("images", str(len(data)))]
    rows += [(name, f"{scores[name]:.2f} %") for name in _MAIN if name in scores]
    rows.append(("images per second", f"{len(data) / max(evaluation.seconds, 1e-9):.2f}"))
    (folder / "results.json").write_text(
        json.dumps({"title": title, "images": len(data), "scores": scores}, indent=2) + "\n"
    )
    lines = [f"# {title}", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]
    (folder / "results.md").write_text("\n".join(lines))
    draw_pictures(evaluation, folder)
    per_class = evaluation.tally.per_class()
    if per_class:
        write_per_class(per_class, folder / "per_class.csv")
    return format_table(rows)


def draw_pictures(evaluation: SegmentationEvaluation, folder: Path, count: int = 4) -> None:
    """`predictions.png`, images spread over the set, and `worst.png`, those with the lowest scores of their own.

    Three columns: labels, prediction, and in red the pixels whose class is wrong.
    """
    data = evaluation.tally.data
    spread = sorted({round(i) for i in np.linspace(0, len(data) - 1, min(count, len(data)))})
    for name, indices in (("predictions.png", spread), ("worst.png", [i for _, i in evaluation.worst[:count]])):
        rows = [_compare(evaluation, index) for index in indices]
        canvas = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), "white")
        top = 0
        for row in rows:
            canvas.paste(row, (0, top))
            top += row.height
        canvas.save(folder / name)


def _compare(evaluation: SegmentationEvaluation, index: int) -> Image.Image:
    data = evaluation.tally.data
    short, long = evaluation.test_size
    image = read_image(data.records[index].image)
    prediction = evaluation.model.predict(
        image, task=data.kind, size=short, max_size=long, class_names=data.classes, **evaluation.thresholds
    )
    annotation = data.annotation(index)
    truth = np.zeros(annotation.layers.shape[1:], dtype=np.int32)
    for layer in annotation.layers[::-1]:
        truth = np.where(layer > 0, layer, truth)
    seen: dict[int, int] = {}
    regions = []
    for segment in annotation.segments:
        shade = seen[segment.label] = seen.get(segment.label, -1) + 1
        colour = class_colour(segment.label, shade if segment.label in data.things else 0)
        regions.append(Region(segment.id, data.classes[segment.label], colour, "crowd" if segment.crowd else ""))
    true_class = _class_map(truth, {s.id: s.label for s in annotation.segments})
    if data.kind == "semantic":
        found = prediction.map
    else:
        found = _class_map(prediction.map, dict(zip(prediction.ids, prediction.labels)))
    counted = true_class >= 0 if data.kind != "instance" else np.ones_like(true_class, dtype=bool)
    wrong = ((found != true_class) & counted).astype(np.int32)
    share = wrong.sum() / max(1, counted.sum())
    panels = [
        draw_regions(image, truth, regions),
        prediction.draw(image),
        draw_regions(image, wrong, [Region(1, "wrong class", (206, 56, 48), f"{share:.0%}")], outlines=False),
    ]
    row = Image.new("RGB", (sum(p.width for p in panels), max(p.height for p in panels)), "white")
    left = 0
    for panel in panels:
        row.paste(panel, (left, 0))
        left += panel.width
    return row


def _class_map(ids: np.ndarray, labels: dict[int, int]) -> np.ndarray:
    lookup = np.full(int(max(ids.max(initial=0), *labels, 0)) + 1 if labels else int(ids.max(initial=0)) + 1, -1)
    for i, label in labels.items():
        lookup[i] = label
    return lookup[ids]
