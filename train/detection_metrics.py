"""COCO average precision: the official evaluator's numbers, as tables, by class and by size.

The evaluator is pycocotools, or faster-coco-eval where it is installed, which gives the same numbers sooner (to 1e-15:
it leaves out a guard against dividing by zero). It reads the annotations as they are: crowds are neither found nor
missed, sizes are the annotations' `area`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from zoo.extras import require

IouType = Literal["bbox", "segm"]
STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass(frozen=True)
class ClassScore:
    """One class: average precision over IoU 0.5 to 0.95 and at 0.5, and its objects (crowds not counted)."""

    name: str
    ap: float
    ap50: float
    objects: int


@dataclass(frozen=True)
class CocoScores:
    """What the evaluator found, in 0..1; -1 where there is no object to be found.

    Attributes:
        iou_type: "bbox" or "segm".
        stats: the twelve official numbers by name.
        classes: one entry for each category, in the order of the ids.
        images: evaluated images.
        detections: evaluated detections.
        evaluator: which package counted.
    """

    iou_type: IouType
    stats: dict[str, float]
    classes: tuple[ClassScore, ...]
    images: int
    detections: int
    evaluator: str


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """A bool mask (H, W) as COCO's run lengths, with text that JSON can hold."""
    coder = require("pycocotools.mask", extra="train")
    rle = coder.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(map(int, rle["size"])), "counts": rle["counts"].decode("ascii")}


def to_results(found: Mapping[str, Tensor], image_id: Any, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """A detector's output for one image in COCO's result format.

    Args:
        found: `boxes` (N, 4), `labels`, `scores`, and perhaps `masks` (N, H, W).
        image_id: COCO's.
        category_ids: COCO's category of each label.
    """
    boxes = found["boxes"].double().cpu().numpy()
    corners = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()
    results = [
        {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score}
        for box, label, score in zip(corners, found["labels"].tolist(), found["scores"].double().tolist())
    ]
    if "masks" in found:
        for result, mask in zip(results, found["masks"].cpu().numpy()):
            result["segmentation"] = encode_mask(mask)
    return results


def evaluate_results(
    coco: Mapping[str, Any],
    results: Iterable[Mapping[str, Any]],
    iou_type: IouType = "bbox",
    *,
    evaluator: Literal["auto", "pycocotools", "faster-coco-eval"] = "auto",
) -> CocoScores:
    """Score detections against annotations.

    Args:
        coco: annotations in COCO's format (`DetectionData.coco`).
        results: detections in COCO's result format, of any number of images.
        iou_type: compare boxes or masks.
        evaluator: "auto" takes faster-coco-eval where it is installed.

    Raises:
        ValueError: a detection of an image or category that the annotations do not have.
    """
    if evaluator == "auto":
        evaluator = "faster-coco-eval" if importlib.util.find_spec("faster_coco_eval") else "pycocotools"
    if evaluator == "faster-coco-eval":
        module = require("faster_coco_eval", extra="train")
        coco_class, evaluator_class = module.COCO, module.COCOeval_faster
    else:
        coco_class = require("pycocotools.coco", extra="train").COCO
        evaluator_class = require("pycocotools.cocoeval", extra="train").COCOeval
    results = list(results)
    images = {image["id"] for image in coco["images"]}
    categories = {category["id"] for category in coco["categories"]}
    for result in results:
        if result["image_id"] not in images or result["category_id"] not in categories:
            raise ValueError(
                f"a detection of image {result['image_id']!r} and category {result['category_id']!r}, which the "
                "annotations do not both have"
            )
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _index(coco_class, coco, [_complete(a) for a in coco["annotations"]])
        found = _index(coco_class, coco, [_as_annotation(r, i, iou_type) for i, r in enumerate(results, 1)])
        counter = evaluator_class(truth, found, iou_type)
        counter.evaluate()
        counter.accumulate()
    precision = counter.eval["precision"]  # (IoU, recall, class, area, limit)
    names = {category["id"]: category["name"] for category in coco["categories"]}
    objects = dict.fromkeys(names, 0)
    for annotation in coco["annotations"]:
        if not annotation.get("iscrowd") and annotation["image_id"] in images:
            objects[annotation["category_id"]] += 1
    classes = [
        ClassScore(
            names[category], _mean(precision[:, :, k, 0, -1]), _mean(precision[0, :, k, 0, -1]), objects[category]
        )
        for k, category in enumerate(counter.params.catIds)
    ]
    return CocoScores(iou_type, _summary(counter.eval), tuple(classes), len(images), len(results), evaluator)


def _summary(counted: Mapping[str, Any]) -> dict[str, float]:
    """The twelve numbers, as pycocotools' `summarize` takes their means."""
    precision, recall = counted["precision"], counted["recall"]  # (IoU, recall, class, area, limit), (IoU, class, ...)
    stats = {"AP": precision[..., 0, -1], "AP50": precision[:1, ..., 0, -1], "AP75": precision[5:6, ..., 0, -1]}
    stats |= {name: precision[..., area, -1] for name, area in (("APs", 1), ("APm", 2), ("APl", 3))}
    stats |= {name: recall[..., 0, limit] for name, limit in (("AR1", 0), ("AR10", 1), ("AR100", 2))}
    stats |= {name: recall[..., area, -1] for name, area in (("ARs", 1), ("ARm", 2), ("ARl", 3))}
    return {name: _mean(stats[name]) for name in STATS}


def _index(coco_class: type, coco: Mapping[str, Any], annotations: list[dict]) -> Any:
    index = coco_class()
    index.dataset = {"images": list(coco["images"]), "categories": list(coco["categories"]), "annotations": annotations}
    index.createIndex()
    return index


def _complete(annotation: Mapping[str, Any]) -> dict[str, Any]:
    w, h = annotation["bbox"][2:]
    return {"iscrowd": 0, "area": w * h, **annotation}


def _as_annotation(result: Mapping[str, Any], number: int, iou_type: IouType) -> dict[str, Any]:
    """What COCO's `loadRes` makes of a result; of one with boxes and masks, what it makes of the part in question."""
    annotation = {**result, "id": number, "iscrowd": 0}
    if iou_type == "segm":
        coder = require("pycocotools.mask", extra="train")
        if "segmentation" not in result:
            raise ValueError("masks are to be evaluated, and a detection has no segmentation")
        annotation["area"] = float(coder.area(result["segmentation"]))
        annotation["bbox"] = coder.toBbox(result["segmentation"]).tolist()
    else:
        x, y, w, h = result["bbox"]
        annotation["area"] = w * h
        annotation["segmentation"] = [[x, y, x, y + h, x + w, y + h, x + w, y]]
    return annotation


def _mean(values: np.ndarray) -> float:
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0


def score_table(scores: Sequence[CocoScores]) -> str:
    """Markdown: overall, by size and recall, boxes beside masks. In percent; "-" where nothing is to be found."""
    lines = ["| | " + " | ".join(STATS) + " |", "|---" * (len(STATS) + 1) + "|"]
    for score in scores:
        title = {"bbox": "boxes", "segm": "masks"}[score.iou_type]
        lines.append(f"| {title} | " + " | ".join(_percent(score.stats[name]) for name in STATS) + " |")
    return "\n".join(lines)


def class_table(scores: Sequence[CocoScores]) -> str:
    """Markdown: AP of every class that has objects, best first; classes without objects are listed below."""
    titles = [{"bbox": "box", "segm": "mask"}[score.iou_type] for score in scores]
    columns = [f"{title} {kind}" for title in titles for kind in ("AP", "AP50")]
    lines = ["| class | objects | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    order = sorted(range(len(scores[0].classes)), key=lambda k: (-scores[0].classes[k].ap, scores[0].classes[k].name))
    absent = []
    for k in order:
        first = scores[0].classes[k]
        if not first.objects:
            absent.append(first.name)
            continue
        values = [_percent(value) for score in scores for value in (score.classes[k].ap, score.classes[k].ap50)]
        lines.append(f"| {first.name} | {first.objects} | " + " | ".join(values) + " |")
    if absent:
        lines += ["", f"No objects of {len(absent)} classes: {', '.join(sorted(absent))}."]
    return "\n".join(lines)


def _percent(value: float) -> str:
    return "-" if value < 0 else f"{100 * value:.1f}"


def write_results(path: str | Path, results: Sequence[Mapping[str, Any]]) -> Path:
    """COCO's result file, which COCO's server and other tools read."""
    path = Path(path)
    path.write_text(json.dumps(list(results)))
    return path


class Collected:
    """Detections of every image, each counted once however often a sampler hands it out."""

    def __init__(self) -> None:
        self._of: dict[Any, list[dict[str, Any]]] = {}

    def add(self, image: Any, results: list[dict[str, Any]]) -> None:
        """What was found in an image; a second time is ignored."""
        self._of.setdefault(image, results)

    def __len__(self) -> int:
        return len(self._of)

    @property
    def results(self) -> list[dict[str, Any]]:
        """All detections, image by image in a fixed order."""
        return [result for image in sorted(self._of, key=repr) for result in self._of[image]]


def coco_metric(coco: Mapping[str, Any], category_ids: Sequence[int], iou_types: Sequence[IouType]):
    """An mmengine metric with the keys `AP`, `AP50`, ... of boxes and `mask_AP`, ... of masks, in percent.

    It takes the list of one dict for each image that the detection task gives in `predict` mode, `index` among its
    entries. Processes send each other what they found; an image that several have seen counts once, and one that none
    has seen is an error.

    Args:
        coco: annotations of the validation set.
        category_ids: COCO's category of each label.
        iou_types: "bbox", "segm".
    """
    require("mmengine", extra="train")
    from mmengine.evaluator import BaseMetric

    image_ids = [image["id"] for image in coco["images"]]

    class CocoMetric(BaseMetric):
        """COCO average precision."""

        default_prefix = ""
        scores: tuple[CocoScores, ...] = ()
        collected: Sequence[dict[str, Any]] = ()

        def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
            """Keep one batch in COCO's format, masks as run lengths."""
            for sample in data_samples:
                index = int(sample["index"])
                self.results.append((index, to_results(sample, image_ids[index], category_ids)))

        def compute_metrics(self, results: list) -> dict[str, float]:
            """Score what all processes found."""
            collected = Collected()
            for index, own in results:
                collected.add(index, own)
            if len(collected) != len(image_ids):
                raise ValueError(f"{len(collected)} of {len(image_ids)} images of the validation set were evaluated")
            self.collected = collected.results
            self.scores = tuple(evaluate_results(coco, self.collected, kind) for kind in iou_types)
            prefix = {"bbox": "", "segm": "mask_"}
            return {
                f"{prefix[score.iou_type]}{name}": 100 * value if value >= 0 else value
                for score in self.scores
                for name, value in score.stats.items()
            }

    return CocoMetric()
