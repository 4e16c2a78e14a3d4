"""Evaluate a model on annotated images: a table, per-class results, and pictures of what went wrong.

  zoo eval runs/train/best.safetensors --data photos/val
  zoo eval caformer_s18.pth --data imagenet --compare
  zoo eval crate_alpha_base_p16 --pretrained --data imagenet --compare --real real.json
  zoo eval craft_x2 --pretrained --data Set5 --compare
  zoo eval exported/best_int8.onnx --data photos/val

What a file is, and so what it does, is in the file or recognised as by zoo convert. Released weights are evaluated with
the settings of their claim (zoo weights list), others with the model's own. --compare prints claim, measurement and
difference, and appends them to a results file, from which zoo card makes model cards.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.tools.convert import json_object

if TYPE_CHECKING:
    from zoo.tools.comparison import Outcome
    from zoo.tools.subject import Subject

_TASKS = ("classification", "detection", "segmentation", "superresolution")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `zoo eval`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "weights",
        nargs="?",
        metavar="FILE|MODEL",
        help="weight file (the authors', zoo's, or zoo export's ONNX), or a name with --pretrained",
    )
    parser.add_argument("--task", choices=_TASKS, help="the file's by default")
    parser.add_argument("--data", required=True, help="the data set, in any layout that zoo train takes for this task")
    parser.add_argument("--split", default="val", help="part of the data set (default: val)")
    parser.add_argument("--model", help="what the file is, as NAME or NAME.TAG: recognised by default")
    parser.add_argument("--model-args", type=json_object, default={}, help="JSON object of arguments of the model")
    parser.add_argument("--checkpoint", help="weights for --model, in any layout")
    parser.add_argument("--pretrained", action="store_true", help="released weights for --model")
    parser.add_argument("--num-classes", type=int, help="classes of --model, if not its own")
    parser.add_argument("--batch-size", type=int, default=32, help="images of one forward pass (default: 32)")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes (default: 2)")
    parser.add_argument("--device", help="cpu, cuda or mps; the best one found by default")
    parser.add_argument(
        "--precision", choices=("float32", "bf16"), default="float32", help="arithmetic (default: float32)"
    )
    parser.add_argument("--fold", action="store_true", help="evaluate the folded (inference) form")
    parser.add_argument(
        "--on-bad",
        choices=("error", "skip"),
        default="error",
        help="unreadable images: stop, or leave out and list (default: error)",
    )
    parser.add_argument("--out", default="runs/eval", help="folder for the report (default: runs/eval)")
    settings = parser.add_argument_group("settings", "by default those of the claim, else the model's own")
    settings.add_argument("--img-size", type=int, help="input size; for detectors and segmenters the shorter side")
    settings.add_argument("--crop-pct", type=float, help="part of the resized image that the crop covers")
    settings.add_argument("--interpolation", help="bilinear or bicubic")
    settings.add_argument("--padding", choices=("official", "reflect"), help="super-resolution: to whole windows")
    settings.add_argument(
        "--self-ensemble", action="store_true", help="super-resolution: average eight flips and transposes"
    )
    claims = parser.add_argument_group("claims")
    claims.add_argument("--compare", action="store_true", help="print claim, measurement and difference, and record")
    claims.add_argument("--record", action="store_true", help="append to the results file without comparing")
    claims.add_argument("--results", default="runs/results.jsonl", help="results file (default: runs/results.jsonl)")
    claims.add_argument(
        "--dataset", help="what the images are, as imagenet-1k: recognised by default, else the folder's name"
    )
    claims.add_argument("--real", metavar="real.json", help="ReaL labels of ImageNet's validation set: adds real_top1")


def run(args: argparse.Namespace) -> int:
    """Evaluate, write the report, compare and record."""
    from zoo.tools import evaluate_dense, evaluate_sr
    from zoo.tools.subject import load_subject

    arguments = dict(args.model_args) | ({"num_classes": args.num_classes} if args.num_classes else {})
    subject = load_subject(
        args.weights,
        model=args.model,
        checkpoint=args.checkpoint,
        pretrained=args.pretrained,
        arguments=arguments,
        img_size=args.img_size,
    )
    if args.task and args.task != subject.task:
        raise ValueError(f"{subject.title} is a model of {subject.task}, and --task is {args.task}: leave --task out")
    if args.real and subject.task != "classification":
        raise ValueError(f"--real is for classifiers of ImageNet, and {subject.title} is a model of {subject.task}")
    for line in subject.notes:
        print(line)
    runs = {
        "classification": _run_classification,
        "detection": evaluate_dense.evaluate_detection,
        "segmentation": evaluate_dense.evaluate_segmentation,
        "superresolution": evaluate_sr.evaluate_sets,
    }
    if subject.task not in runs:
        raise ValueError(f"{subject.title} extracts features only: there is nothing to evaluate without a head")
    if getattr(args, "fold", False) and subject.task != "classification":
        raise ValueError("--fold is for classifiers: leave it out")
    outcomes = runs[subject.task](subject, args)
    print(f"report and pictures: {args.out}")
    if args.compare or args.record:
        _compare(subject, outcomes, args)
    return 0


def _compare(subject: Subject, outcomes: list[Outcome], args: argparse.Namespace) -> None:
    from zoo.tools.comparison import compare, to_record
    from zoo.tools.records import append_results
    from zoo.train.engine import pick_device

    comparisons = [compare(subject, outcome) for outcome in outcomes]
    for comparison in comparisons if args.compare else ():
        outcome = comparison.outcome
        split = "" if outcome.split == "test" else f" {outcome.split}"
        print(f"\n{subject.weights.name if subject.weights else subject.name} on {outcome.dataset}{split}")
        print("\n".join(comparison.lines()))
    device = "cpu" if subject.is_onnx else pick_device(args.device)
    append_results(args.results, [to_record(subject, c, device) for c in comparisons])
    print(f"recorded in {args.results}")


# ---- classification


def _run_classification(subject: Subject, args: argparse.Namespace) -> list[Outcome]:
    import zoo
    from zoo.tools.comparison import Outcome
    from zoo.train.data.classification import check_dataset, open_classification
    from zoo.train.engine import pick_device
    from zoo.train.evaluation import evaluate
    from zoo.train.real_labels import labels_of, read_real_labels, real_scores
    from zoo.train.reports import write_report
    from zoo.train.tasks.classification import evaluation_transform

    model = subject.model
    if subject.is_onnx and (args.fold or args.precision != "float32"):
        raise ValueError(f"{subject.title} has its form and precision: leave --fold and --precision out")
    if subject.is_onnx and args.device not in (None, "cpu"):
        raise ValueError(f"{subject.title} runs on the CPU: leave --device {args.device} out")
    if not model.num_classes:
        raise ValueError(f"{subject.title} has no classifier: there is nothing to evaluate")
    real = read_real_labels(args.real) if args.real else None
    names = getattr(model, "class_names", None)
    dataset = open_classification(*_whole_split(args.data, args.split), classes=names)
    report = check_dataset(dataset, on_bad=args.on_bad)
    for line in (*dataset.notes, *report.warnings):
        print(line)
    if len(dataset.classes) != model.num_classes:
        raise ValueError(f"{args.data} has {len(dataset.classes)} classes, the model has {model.num_classes}")
    known = args.dataset or ("imagenet-1k" if _is_imagenet(dataset) else Path(args.data).resolve().name)
    if real is not None:
        if not _is_imagenet(dataset):
            raise ValueError(f"--real needs ImageNet's images, and {args.data} has other classes")
        labels_of(dataset.paths, real)  # wrong names are told before the work
    settings = _classification_settings(subject, args)
    dataset.transform = evaluation_transform(settings)
    if args.fold:
        model = zoo.fold(model)
    evaluation = evaluate(
        model,
        dataset,
        mean=settings["mean"],
        std=settings["std"],
        batch_size=args.batch_size,
        workers=args.workers,
        device="cpu" if subject.is_onnx else pick_device(args.device),
        precision=args.precision,
        left_out=[(bad.path, bad.reason) for bad in report.unreadable],
    )
    print(write_report(evaluation, Path(args.out), f"{subject.title} on {args.data}"))
    metrics, counts = dict(evaluation.scores), {}
    if real is not None:
        scores, counts["real_top1"] = real_scores(evaluation.logits, evaluation.paths, real)
        metrics |= scores
        print(f"real_top1   {metrics['real_top1']:.2f} % of {counts['real_top1']} images with ReaL labels")
    size = settings["eval_size"]
    used = {
        "input_size": [getattr(model, "in_chans", 3), size, size],
        "crop_pct": settings["crop_pct"],
        "interpolation": settings["eval_interpolation"],
        "mean": list(settings["mean"]),
        "std": list(settings["std"]),
        "precision": args.precision,
        "folded": args.fold,
        **({"real_images": counts["real_top1"]} if counts else {}),
    }
    if subject.is_onnx:
        used["precision"] = f"{model.file.metadata['precision']} in ONNX Runtime"
        del used["folded"]  # the file does not tell
    return [Outcome(known, args.split, len(evaluation.paths), metrics, used, counts)]


def _whole_split(data: str, split: str) -> tuple[str | os.PathLike, str]:
    """Root and split of a data set. `imagenet/val` is the split val of `imagenet`, of which nothing is held out."""
    root = Path(data).resolve()
    aliases = {"val": ("val", "valid", "validation", "test", "testing"), "train": ("train", "training")}
    if root.is_dir() and root.name.lower() in aliases.get(split, (split.lower(),)):
        inside = [entry for entry in root.iterdir() if not entry.name.startswith(".")]
        # class folders, and neither splits nor lists of its own
        if inside and not any(e.suffix.lower() in (".csv", ".tsv", ".tar") for e in inside):
            own = {name for names in aliases.values() for name in names}
            if any(e.is_dir() for e in inside) and not any(e.is_dir() and e.name.lower() in own for e in inside):
                return root.parent, root.name.lower()
    return data, split


def _is_imagenet(dataset) -> bool:
    from zoo.train.data.classification import imagenet_classes

    wnids, descriptions = imagenet_classes()
    return tuple(dataset.keys) == wnids or tuple(dataset.classes) == descriptions


def _classification_settings(subject: Subject, args: argparse.Namespace) -> dict:
    """What the user says, else what the claim was measured with, else the model's own."""
    from zoo.train.tasks.classification import evaluation_settings

    stated = subject.weights.evaluation if subject.weights and subject.weights.task == "classification" else {}
    size = stated.get("input_size", (0, 0, None))[-1]
    settings = evaluation_settings(
        subject.model,
        img_size=args.img_size or size,
        crop_pct=args.crop_pct or stated.get("crop_pct"),
        interpolation=args.interpolation or stated.get("interpolation"),
    )
    return settings | {name: tuple(stated[name]) for name in ("mean", "std") if name in stated}
