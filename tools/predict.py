"""Predict on pictures: names and scores on the screen, and with --out labelled pictures and JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `zoo predict`."""
    from zoo.tools import predict_sr

    parser.add_argument(
        "weights", help="a file of zoo train or zoo export (.onnx), or a registered model name with --checkpoint"
    )
    parser.add_argument("images", nargs="+", type=Path, help="pictures or folders of them")
    parser.add_argument(
        "--task",
        choices=("classification", "detection", "segmentation", "sr", "superresolution"),
        help="the file's by default; sr: IN OUT",
    )
    parser.add_argument("--checkpoint", help="weights, where a model name is given")
    parser.add_argument("--pretrained", action="store_true", help="released weights, where a model name is given")
    parser.add_argument("--topk", type=int, default=5, help="classes to name")
    parser.add_argument("--out", type=Path, help="folder for labelled pictures and predictions.json")
    parser.add_argument("--device", help="cpu, cuda or mps; the best one found by default")
    predict_sr.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Predict; pictures that cannot be read are named at the end and give status 1."""
    if Path(args.weights).suffix == ".onnx":
        return _run_onnx(args)
    if args.task in ("sr", "superresolution"):
        from zoo.tools import predict_sr

        return predict_sr.run(args, [Path(args.weights), *args.images])
    from zoo.tools.subject import load_subject

    subject = load_subject(args.weights, checkpoint=args.checkpoint, pretrained=args.pretrained)
    if args.task and args.task != subject.task:
        raise ValueError(f"{args.weights} is a model of {subject.task}, and --task is {args.task}: leave --task out")
    model = subject.model
    multilabel = bool(getattr(model, "zoo_metadata", {}).get("multilabel"))
    if subject.task == "classification":
        import zoo

        return report(
            args, lambda image: zoo.predict(model, image, topk=args.topk, multilabel=multilabel, device=args.device)
        )
    options = _options(model)
    return report(args, lambda image: model.predict(image, device=args.device, **options))


def _run_onnx(args: argparse.Namespace) -> int:
    from zoo.heads.onnx_model import open_model

    if args.checkpoint or args.pretrained:
        raise ValueError(f"{args.weights} has its weights: leave --checkpoint and --pretrained out")
    model = open_model(args.weights)
    asked = "superresolution" if args.task == "sr" else args.task
    if asked and asked != model.task:
        raise ValueError(f"{args.weights} is a model of {model.task}, and --task is {args.task}: leave --task out")
    if model.task == "superresolution":
        from zoo.tools import predict_sr

        return predict_sr.run_onnx(args, model)
    options = {"topk": args.topk} if model.task == "classification" else model.metadata.get("thresholds", {})
    return report(args, lambda image: model.predict(image, **options))


def report(args: argparse.Namespace, predict: Callable) -> int:
    """Predict on every picture, print, and write what --out asks for; status 1 if a picture cannot be read."""
    import zoo
    from zoo.images import ImageError

    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    records, unreadable = [], []
    for path in find_pictures(args.images):
        try:
            image = zoo.read_image(path)
        except (ImageError, FileNotFoundError) as error:
            unreadable.append(str(error))
            continue
        prediction = predict(image)
        shown = ", ".join(f"{name} {100 * score:.1f} %" for name, score in zip(prediction.names, prediction.scores))
        print(f"{path}: {shown or 'nothing above the threshold'}")
        records.append({"file": str(path), **prediction.to_dict()})
        if args.out:
            prediction.draw(image).save(args.out / f"{path.stem}.png")
    if args.out:
        (args.out / "predictions.json").write_text(json.dumps(records, indent=2) + "\n")
    for line in unreadable:
        print(f"not read: {line}", file=sys.stderr)
    return 1 if unreadable else 0


def _options(model) -> dict:
    """How a detector or segmenter was evaluated when it was trained."""
    described = getattr(model, "zoo_metadata", {})
    if described.get("task") != "segmentation":
        return {}
    short, long = described.get("test_size", (512, 2048))
    return dict(size=short, max_size=long, **described.get("thresholds", {}))


def find_pictures(paths: list[Path]) -> list[Path]:
    """The pictures among files and folders; files are taken as they are.

    Raises:
        ValueError: a folder without pictures.
    """
    from timm.data.readers.img_extensions import get_img_extensions

    extensions = {e.lower() for e in get_img_extensions()} | {".gif", ".webp", ".bmp", ".tif", ".tiff"}
    found = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in extensions)
            if not inside:
                raise ValueError(f"no pictures in {path}")
            found += inside
        else:
            found.append(path)
    return found
