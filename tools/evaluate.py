"""Evaluate a model on annotated images: a table, per-class results, and pictures of what went wrong.

`zoo eval --data photos/val runs/train/best.safetensors`, or for other weights of a classifier
`zoo eval --data imagenet/val --model caformer_s18 --checkpoint caformer_s18.pth`. A file that zoo train wrote says
whether it classifies, detects or segments.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `zoo eval`."""
    parser.add_argument("weights", nargs="?", help="a file that zoo train wrote; it says which model it is")
    parser.add_argument("--task", choices=("classification", "detection", "segmentation"), help="the file's by default")
    parser.add_argument("--data", required=True, help="the data set, in any layout that zoo train takes for this task")
    parser.add_argument("--split", default="val", help="part of the data set")
    parser.add_argument("--model", help="registered model, for weights that do not say")
    parser.add_argument("--checkpoint", help="weights for --model, in any layout")
    parser.add_argument("--pretrained", action="store_true", help="released weights for --model")
    parser.add_argument("--num-classes", type=int, help="classes of --model, if not its own")
    parser.add_argument("--img-size", type=int, help="input size; the model's own by default")
    parser.add_argument("--crop-pct", type=float, help="part of the resized image that the crop covers")
    parser.add_argument("--interpolation", help="bilinear or bicubic; the model's own by default")
    parser.add_argument("--batch-size", type=int, default=32, help="images of one forward pass")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes")
    parser.add_argument("--device", help="cpu, cuda or mps; the best one found by default")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32", help="arithmetic")
    parser.add_argument("--fold", action="store_true", help="evaluate the folded (inference) form")
    parser.add_argument(
        "--on-bad",
        choices=("error", "skip"),
        default="error",
        help="unreadable images: stop, or leave out and list",
    )
    parser.add_argument("--out", default="runs/eval", help="folder for the report")


def load_classifier(args: argparse.Namespace):
    """The model that the arguments describe.

    Raises:
        ValueError: neither weights nor a model are given.
    """
    import zoo
    from zoo.saving import load_model

    size = {"img_size": args.img_size} if getattr(args, "img_size", None) else {}
    if args.weights:
        try:
            return load_model(args.weights, **size)
        except TypeError:
            return load_model(args.weights)  # takes any size
    if not args.model:
        raise ValueError("give a weight file of zoo, or --model with --checkpoint or --pretrained")
    if not (args.checkpoint or args.pretrained):
        raise ValueError(f"--model {args.model} has random weights: give --checkpoint or --pretrained")
    if not timm.is_model(args.model.split(".")[0]):
        raise ValueError(f"no model is called {args.model!r}: `zoo list` names them")
    classes = {"num_classes": args.num_classes} if getattr(args, "num_classes", None) else {}
    try:
        model = timm.create_model(args.model, pretrained=args.pretrained, **classes, **size)
    except TypeError:
        model = timm.create_model(args.model, pretrained=args.pretrained, **classes)
    if args.checkpoint:
        for line in str(zoo.load_checkpoint(model, args.checkpoint)).splitlines():
            print(line)
    return model.eval()


def run(args: argparse.Namespace) -> int:
    """Evaluate and write the report."""
    from zoo.tools import evaluate_dense

    recorded = task_of(args.weights)
    task = args.task or recorded
    if args.weights and task != recorded:
        raise ValueError(f"{args.weights} is a model of {recorded}, and --task is {task}: leave --task out")
    if task in evaluate_dense.RUN:
        if not args.weights:
            raise ValueError(f"zoo eval --task {task} needs a weight file of zoo train")
        return evaluate_dense.RUN[task](args)
    return _run_classification(args)


def task_of(weights: str | None) -> str:
    """What a weight file of zoo does; "classification" for others."""
    from zoo.saving import read_metadata

    if not weights or not str(weights).endswith(".safetensors") or not Path(weights).is_file():
        return "classification"
    return read_metadata(weights).get("task") or "classification"


def _run_classification(args: argparse.Namespace) -> int:
    import zoo
    from zoo.train.data.classification import check_dataset, open_classification
    from zoo.train.engine import pick_device
    from zoo.train.evaluation import evaluate
    from zoo.train.reports import write_report
    from zoo.train.tasks.classification import evaluation_settings, evaluation_transform

    model = load_classifier(args)
    names = getattr(model, "class_names", None)
    dataset = open_classification(args.data, args.split, classes=names)
    report = check_dataset(dataset, on_bad=args.on_bad)
    for line in (*dataset.notes, *report.warnings):
        print(line)
    if len(dataset.classes) != model.num_classes:
        raise ValueError(f"{args.data} has {len(dataset.classes)} classes, the model has {model.num_classes}")
    settings = evaluation_settings(
        model, img_size=args.img_size, crop_pct=args.crop_pct, interpolation=args.interpolation
    )
    dataset.transform = evaluation_transform(settings)
    device = pick_device(args.device)
    if args.fold:
        model = zoo.fold(model)
    evaluation = evaluate(
        model,
        dataset,
        mean=settings["mean"],
        std=settings["std"],
        batch_size=args.batch_size,
        workers=args.workers,
        device=device,
        precision=args.precision,
        left_out=[(bad.path, bad.reason) for bad in report.unreadable],
    )
    name = args.weights or f"{args.model} ({args.checkpoint or 'released weights'})"
    table = write_report(evaluation, Path(args.out), f"{name} on {args.data}")
    print(f"{table}\nreport and pictures: {args.out}")
    return 0
