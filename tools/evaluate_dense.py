"""`zoo eval` for detectors and segmenters."""

from __future__ import annotations

import argparse
from pathlib import Path


def evaluate_detection(args: argparse.Namespace) -> int:
    """AP of a detector on a COCO, YOLO or VOC data set."""
    from zoo.saving import load_model
    from zoo.train.data.detection import check_detection
    from zoo.train.data.detection_layouts import open_detection
    from zoo.train.detection_reports import evaluate_detector, write_report
    from zoo.train.engine import pick_device

    model = load_model(args.weights)
    data = open_detection(args.data, args.split, masks=model.has_masks, classes=model.class_names)
    data, report = check_detection(data, on_bad=args.on_bad)
    print(report)
    evaluation = evaluate_detector(
        model, data, device=pick_device(args.device), precision=args.precision, workers=args.workers
    )
    return _finish(write_report(evaluation, Path(args.out), f"{args.weights} on {args.data}"), args)


def evaluate_segmentation(args: argparse.Namespace) -> int:
    """Mean IoU, panoptic quality or mask AP of a segmenter."""
    from zoo.saving import load_model
    from zoo.train.data.segmentation import check_segmentation
    from zoo.train.data.segmentation_layouts import open_segmentation
    from zoo.train.engine import pick_device
    from zoo.train.segmentation_reports import evaluate_segmenter, write_report

    model = load_model(args.weights)
    described = model.zoo_metadata
    data = open_segmentation(args.data, args.split, described.get("kind", model.task), classes=model.class_names)
    report = check_segmentation(data, on_bad=args.on_bad)
    for line in (*data.notes, *report.warnings):
        print(line)
    short, long = described.get("test_size", (512, 2048))
    evaluation = evaluate_segmenter(
        model,
        data,
        test_size=(args.img_size or short, long),
        thresholds=described.get("thresholds"),
        device=pick_device(args.device),
        precision=args.precision,
        workers=args.workers,
        results=Path(args.out) / "results",
    )
    return _finish(write_report(evaluation, Path(args.out), f"{args.weights} on {args.data}"), args)


def _finish(table: str, args: argparse.Namespace) -> int:
    print(f"{table}\nreport and pictures: {args.out}")
    return 0


RUN = {"detection": evaluate_detection, "segmentation": evaluate_segmentation}
