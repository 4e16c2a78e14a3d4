"""`zoo eval` for detectors and segmenters."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from zoo.tools.comparison import Outcome
from zoo.tools.subject import Subject


def evaluate_detection(subject: Subject, args: argparse.Namespace) -> list[Outcome]:
    """AP of a detector on a COCO, YOLO or VOC data set."""
    from zoo.train.data.detection import check_detection
    from zoo.train.data.detection_layouts import open_detection
    from zoo.train.detection_reports import evaluate_detector, write_report
    from zoo.train.engine import pick_device

    model = subject.model
    data = open_detection(args.data, args.split, masks=model.has_masks, classes=model.class_names)
    _check_classes(args.data, data.classes, model)
    data, report = check_detection(data, on_bad=args.on_bad)
    print(report)
    stated = subject.weights.evaluation if subject.weights else {}
    settings = apply_detector_settings(model, stated, args.img_size)
    evaluation = evaluate_detector(
        model, data, device=pick_device(args.device), precision=args.precision, workers=args.workers
    )
    print(write_report(evaluation, Path(args.out), f"{subject.title} on {args.data}"))
    names = {"bbox": "box_ap", "segm": "mask_ap"}
    metrics = {
        names[score.iou_type] + ("" if name == "AP" else name.removeprefix("AP")): 100 * score.stats[name]
        for score in evaluation.scores
        for name in ("AP", "AP50", "AP75")
        if score.stats[name] >= 0
    }
    # 80 classes with the ids 1 to 90
    is_coco = len(data.classes) == 80 and sorted(data.category_ids)[-1] == 90
    dataset = args.dataset or ("coco" if is_coco else Path(args.data).resolve().name)
    return [Outcome(dataset, args.split, len(data), metrics, settings | {"precision": args.precision})]


def apply_detector_settings(model: nn.Module, stated: Mapping[str, Any], img_size: int | None) -> dict[str, Any]:
    """Give a detector the sizes and thresholds of `stated`, the manifest's `evaluation`; returns all in use."""
    transform = getattr(model, "transform", None)
    if transform is None:  # RT-DETR: one size for every image
        if img_size or "input_size" in stated:
            model.size = (img_size,) * 2 if img_size else tuple(stated["input_size"][1:])
        settings: dict[str, Any] = {"input_size": [3, *model.size], "keep_aspect": False}
    else:
        short = img_size or stated.get("short_side")
        if short:
            transform.min_size = (short,)
        transform.max_size = stated.get("max_side", transform.max_size)
        transform.size_divisible = stated.get("pad_multiple", transform.size_divisible)
        settings = {
            "short_side": transform.min_size[-1],
            "max_side": transform.max_size,
            "pad_multiple": transform.size_divisible,
        }
    head = getattr(model, "roi_heads", model)
    attributes = {
        "score_threshold": "score_thresh",
        "nms_threshold": "nms_thresh",
        "max_detections": "detections_per_img",
    }
    for name, attribute in attributes.items():
        if hasattr(head, attribute):
            if name in stated:
                setattr(head, attribute, stated[name])
            settings[name] = getattr(head, attribute)
    return settings


def evaluate_segmentation(subject: Subject, args: argparse.Namespace) -> list[Outcome]:
    """Mean IoU, panoptic quality or mask AP of a segmenter."""
    from zoo.train.data.segmentation import check_segmentation
    from zoo.train.data.segmentation_layouts import open_segmentation
    from zoo.train.engine import pick_device
    from zoo.train.segmentation_reports import evaluate_segmenter, write_report

    model = subject.model
    described = getattr(model, "zoo_metadata", {})
    data = open_segmentation(args.data, args.split, described.get("kind", model.task), classes=model.class_names)
    _check_classes(args.data, data.classes, model)
    report = check_segmentation(data, on_bad=args.on_bad)
    for line in (*data.notes, *report.warnings):
        print(line)
    if not described and data.things:  # an official file does not say which classes are objects
        model.thing_classes = tuple(data.things)
    stated = subject.weights.evaluation if subject.weights else {}
    short, long = described.get("test_size", (512, 2048))
    short, long = args.img_size or stated.get("short_side", short), stated.get("max_side", long)
    thresholds = dict(described.get("thresholds") or {})
    thresholds |= {k: stated[k] for k in ("object_threshold", "overlap_threshold") if k in stated}
    evaluation = evaluate_segmenter(
        model,
        data,
        test_size=(short, long),
        thresholds=thresholds,
        device=pick_device(args.device),
        precision=args.precision,
        workers=args.workers,
        results=Path(args.out) / "results",
    )
    print(write_report(evaluation, Path(args.out), f"{subject.title} on {args.data}"))
    settings = {"short_side": short, "max_side": long, **thresholds, "kind": data.kind, "precision": args.precision}
    wanted = ("miou", "pq", "pq_things", "pq_stuff", "mask_ap")
    metrics = {name: float(evaluation.scores[name]) for name in wanted if name in evaluation.scores}
    metrics = {name: value for name, value in metrics.items() if value == value}  # no things: no quality of things
    dataset = args.dataset or segmentation_dataset(data) or Path(args.data).resolve().name
    return [Outcome(dataset, args.split, len(data), metrics, settings)]


def segmentation_dataset(data) -> str | None:
    """ade20k, cityscapes or coco, where the annotations are theirs."""
    name = data.annotation_file.name if data.annotation_file else ""
    if name.startswith("ade20k_panoptic") or any(note.startswith("ADE20K") for note in data.notes):
        return "ade20k"
    if name.startswith("cityscapes_panoptic") or any(note.startswith("Cityscapes") for note in data.notes):
        return "cityscapes"
    if name.startswith(("panoptic_", "instances_")) and len(data.classes) in (80, 133):
        return "coco"
    return None


def _check_classes(where: str, classes: list[str], model: nn.Module) -> None:
    if len(classes) != model.num_classes:
        raise ValueError(f"{where} has {len(classes)} classes, the model has {model.num_classes}")
