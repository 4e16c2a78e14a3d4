"""Measure segmentations of a whole set, in one process or many, each image counted once."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zoo.extras import require
from zoo.train.data.segmentation import SegmentationData
from zoo.train.segmentation_metrics import (
    ClassTally,
    ConfusionMatrix,
    PanopticQuality,
    Segment,
    class_ious,
    class_quality,
    semantic_scores,
)

require("mmengine", extra="train")

from mmengine.dist import all_gather_object  # noqa: E402
from mmengine.evaluator import BaseMetric  # noqa: E402

MAIN_METRIC = {"semantic": "miou", "panoptic": "pq", "instance": "mask_ap"}


class Tally:
    """What is remembered of a set while it is evaluated: counts, and the detections of instances."""

    def __init__(self, data: SegmentationData):
        self.data = data
        self.confusion = ConfusionMatrix(len(data.classes))
        self.quality = PanopticQuality()
        self.detections: list[dict[str, Any]] = []
        self.seen: set[int] = set()

    def add(self, index: int, result: dict[str, Any]) -> None:
        """Compare one result with the annotation of its image."""
        if index in self.seen:
            return
        self.seen.add(index)
        if self.data.kind == "instance":
            self.detections += coco_detections(self.data, index, result["instances"])
            return
        annotation = self.data.annotation(index)
        ids = annotation.layers[0]
        if self.data.kind == "semantic":
            self.confusion.add(result["labels"], ids.astype(np.int64) - 1)
            return
        true = {s.id: Segment(s.label, s.crowd) for s in annotation.segments}
        predicted = {s.id: Segment(s.label) for s in result["segments"]}
        self.quality.add(result["ids"], predicted, ids, true)

    def state(self) -> tuple:
        """What another process needs to add these counts to its own."""
        tallies = {k: vars(t) for k, t in self.quality.tallies.items()}
        return self.confusion.counts, tallies, self.detections, self.seen

    def merge(self, state: tuple) -> None:
        """Add another process's counts."""
        counts, tallies, detections, seen = state
        self.confusion.merge(counts)
        self.quality.merge({k: ClassTally(**t) for k, t in tallies.items()})
        self.detections += detections
        self.seen |= seen

    def scores(self) -> dict[str, float]:
        """All scores in percent."""
        if self.data.kind == "semantic":
            return semantic_scores(self.confusion.counts)
        if self.data.kind == "panoptic":
            things = set(self.data.things)
            stuff = set(range(len(self.data.classes))) - things
            scores = {}
            for suffix, wanted in (("", None), ("_things", things), ("_stuff", stuff)):
                group = self.quality.scores(wanted)
                scores |= {f"{key}{suffix}": group[key] for key in ("pq", "sq", "rq")}
            return scores
        return instance_scores(self.data, self.detections)

    def per_class(self) -> list[dict[str, Any]]:
        """One row a class that occurs (semantic and panoptic)."""
        rows = []
        if self.data.kind == "semantic":
            ious, truth = class_ious(self.confusion.counts), self.confusion.counts.sum(axis=1)
            for label in np.flatnonzero(~np.isnan(ious)):
                rows.append(
                    {
                        "class": self.data.classes[label],
                        "iou": round(100 * float(ious[label]), 2),
                        "pixels": int(truth[label]),
                    }
                )
        elif self.data.kind == "panoptic":
            for label, tally in sorted(self.quality.tallies.items()):
                pq, sq, rq = (round(100 * value, 2) for value in class_quality(tally))
                row = {"class": self.data.classes[label], "thing": label in self.data.things, "pq": pq, "sq": sq}
                rows.append(row | {"rq": rq, "tp": tally.tp, "fp": tally.fp, "fn": tally.fn})
        return rows


class SegmentationMetric(BaseMetric):
    """Scores of the validation set from counts, which are small whatever the set's size."""

    default_prefix = ""

    def __init__(self, data: SegmentationData):
        super().__init__()
        self.data = data
        self.tally = Tally(data)

    def process(self, data_batch, data_samples) -> None:
        """Count a batch."""
        for sample in data_samples:
            self.tally.add(sample["index"], sample)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Not used: `evaluate` has the counts."""
        raise NotImplementedError("scores come from the counts of all processes: call `evaluate`")

    def evaluate(self, size: int) -> dict[str, float]:
        """Scores of all processes' images in percent.

        Raises:
            RuntimeError: images were left out.
        """
        states = all_gather_object(self.tally.state())
        whole = Tally(self.data)
        for state in states:
            whole.merge(state)
        self.tally = Tally(self.data)
        if len(whole.seen) != size:
            raise RuntimeError(f"{len(whole.seen)} of {size} images were evaluated")
        return whole.scores()


# ---- instances, in COCO's terms


def coco_detections(data: SegmentationData, index: int, instances) -> list[dict[str, Any]]:
    """Rows of a COCO result file for one image; `instances` is `zoo.heads.pem.postprocess.Instances`."""
    from pycocotools import mask as coco_mask

    rows = []
    boxes = instances.boxes.tolist()
    for i, (score, label) in enumerate(zip(instances.scores.tolist(), instances.labels.tolist())):
        mask = instances.mask(i)
        if not mask.any():
            continue
        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        x0, y0, x1, y1 = boxes[i]
        rows.append(
            {
                "image_id": data.records[index].image_id,
                "category_id": data.category_ids[label],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode()},
                "score": score,
            }
        )
    return rows


def coco_ground_truth(data: SegmentationData):
    """A pycocotools `COCO` of the set's own images, from its file, or from panoptic segments of things."""
    import contextlib

    from pycocotools import mask as coco_mask
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        if data.source == "instances":
            coco = COCO(str(data.annotation_file))
            return coco
        images, annotations = [], []
        for index, record in enumerate(data.records):
            annotation = data.annotation(index)
            H, W = annotation.layers.shape[1:]
            images.append({"id": record.image_id, "height": H, "width": W, "file_name": record.image.name})
            for segment in annotation.segments:
                mask = (annotation.layers == segment.id).any(axis=0)
                rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": record.image_id,
                        "category_id": data.category_ids[segment.label],
                        "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode()},
                        "area": float(mask.sum()),
                        "bbox": coco_mask.toBbox(rle).tolist(),
                        "iscrowd": int(segment.crowd),
                    }
                )
        coco = COCO()
        categories = [{"id": c, "name": n} for c, n in zip(data.category_ids, data.classes)]
        coco.dataset = {"images": images, "annotations": annotations, "categories": categories, "info": {}}
        coco.createIndex()
        return coco


def instance_scores(data: SegmentationData, detections: list[dict[str, Any]]) -> dict[str, float]:
    """COCO's mask AP in percent."""
    import contextlib

    from pycocotools.cocoeval import COCOeval

    if not detections:
        return {"mask_ap": 0.0, "mask_ap50": 0.0, "mask_ap75": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco_ground_truth(data)
        evaluation = COCOeval(truth, truth.loadRes(detections), "segm")
        evaluation.params.imgIds = [record.image_id for record in data.records]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = ("mask_ap", "mask_ap50", "mask_ap75", "mask_ap_small", "mask_ap_medium", "mask_ap_large")
    return {name: 100 * float(value) for name, value in zip(names, evaluation.stats) if value >= 0}


# ---- official result files


class ResultFiles:
    """Writes results as the data sets' own evaluators read them.

    Semantic: a PNG of category ids an image. Panoptic: PNGs and `panoptic.json` in COCO's coding. Instances:
    `instances.json`, a COCO result file.
    """

    def __init__(self, data: SegmentationData, folder: Path):
        self.data, self.folder = data, folder
        self.annotations: list[dict[str, Any]] = []
        self.detections: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, index: int, result: dict[str, Any]) -> None:
        """Write the result of one image."""
        record = self.data.records[index]
        name = f"{record.image.stem}.png"
        if self.data.kind == "semantic":
            ids = np.asarray(self.data.category_ids)[result["labels"]]
            Image.fromarray(ids.astype(np.uint8 if ids.max(initial=0) < 256 else np.uint16)).save(self.folder / name)
        elif self.data.kind == "panoptic":
            ids = result["ids"].astype(np.int64)
            rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1)
            Image.fromarray(rgb.astype(np.uint8)).save(self.folder / name)
            infos = [
                {"id": s.id, "category_id": self.data.category_ids[s.label], "area": s.area, "iscrowd": 0}
                for s in result["segments"]
            ]
            self.annotations.append({"image_id": record.image_id, "file_name": name, "segments_info": infos})
        else:
            self.detections += coco_detections(self.data, index, result["instances"])

    def close(self) -> None:
        """Write the JSON file."""
        if self.data.kind == "panoptic":
            (self.folder / "panoptic.json").write_text(json.dumps({"annotations": self.annotations}))
        elif self.data.kind == "instance":
            (self.folder / "instances.json").write_text(json.dumps(self.detections))


def write_per_class(rows: list[dict[str, Any]], path: Path) -> None:
    """A CSV of the rows of `Tally.per_class`."""
    columns: dict[str, None] = defaultdict(lambda: None)
    for row in rows:
        columns.update(dict.fromkeys(row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(columns))
        writer.writeheader()
        writer.writerows(rows)
