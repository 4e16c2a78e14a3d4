"""Write a model for deployment: ONNX and torch.export files with free batch and image size, checked against the model.

`zoo export runs/train/best.safetensors --out model.onnx`, then `zoo predict model.onnx photo.jpg`. Several formats and
precisions go to a folder: `zoo export caformer_s18 --checkpoint caformer_s18.pth --format onnx pt2 --precision float32
int8 --out exported`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `zoo export`."""
    parser.add_argument("weights", help="a file that zoo train wrote, or a registered model name")
    parser.add_argument("--checkpoint", help="weights, where a model name is given")
    parser.add_argument("--pretrained", action="store_true", help="released weights, where a model name is given")
    parser.add_argument("--random", action="store_true", help="allow random weights, to try the export alone")
    parser.add_argument("--model-args", type=_mapping, default={}, help="constructor arguments, as JSON")
    parser.add_argument("--num-classes", type=int, help="classes of a named model, if not its own")
    parser.add_argument("--format", nargs="+", choices=tuple(SUFFIXES), help="onnx, or that of --out's name")
    parser.add_argument(
        "--precision", nargs="+", choices=("float32", "fp16", "int8"), default=["float32"], help="of ONNX files"
    )
    parser.add_argument("--out", type=Path, default=Path("exported"), help="file to write, or a folder")
    parser.add_argument("--img-size", type=int, nargs="+", help="nominal side, or height and width")
    parser.add_argument("--batch-size", type=int, help="a fixed batch; free by default")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--dynamic-size", dest="dynamic_size", action="store_true", default=True, help="free image size")
    size.add_argument("--static-size", dest="dynamic_size", action="store_false", help="one image size")
    parser.add_argument("--no-fold", action="store_true", help="leave the model as it was trained")
    parser.add_argument("--opset", type=int, default=20, help="of ONNX")
    parser.add_argument("--tolerance", type=float, help="largest difference, in std of the outputs (default: 1e-4)")
    parser.add_argument("--no-check", action="store_true", help="do not run the files")
    parser.add_argument("--images", nargs="+", type=Path, default=[], help="pictures or folders for the check")


def _mapping(text: str) -> dict:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError('expected an object such as {"depth": 2}')
    return value


def run(args: argparse.Namespace) -> int:
    """Export everything that was asked for and print what was measured."""
    from zoo.tools.predict import find_pictures

    if args.batch_size is not None and args.batch_size < 1:
        raise ValueError(f"--batch-size is {args.batch_size}: pass at least 1")
    model, source = _load(args)
    jobs = plan(args)
    if getattr(model, "zoo_door", None) is not None:
        return _export_head(args, model, jobs, source)
    from zoo.exporting import export_onnx, export_program

    common = dict(
        img_size=_size(args.img_size),
        batch_size=args.batch_size,
        dynamic_size=args.dynamic_size,
        folded=not args.no_fold,
        tolerance=1e-4 if args.tolerance is None else args.tolerance,
        check=not args.no_check,
        images=find_pictures(args.images)[:32],
        **source,
    )
    for form, precision, path in jobs:
        path.parent.mkdir(parents=True, exist_ok=True)
        if form == "pt2":
            report = export_program(model, path, **common)
        else:
            report = export_onnx(model, path, precision=precision, opset=args.opset, **common)
        print(f"{precision} {report}", flush=True)
    return 0


def _export_head(args: argparse.Namespace, model, jobs: list[tuple[str, str, Path]], source: dict[str, str]) -> int:
    """A detector, segmenter or upscaler."""
    from zoo.heads.exporting import export_head

    if [(form, precision) for form, precision, _ in jobs] != [("onnx", "float32")]:
        raise ValueError("detectors, segmenters and upscalers export to ONNX in float32 alone")
    fixed = {
        "--img-size": args.img_size,
        "--batch-size": args.batch_size,
        "--static-size": not args.dynamic_size,
        "--no-fold": args.no_fold,
        "--images": args.images,
    }
    given = [name for name, value in fixed.items() if value]
    if given:
        raise ValueError(f"{given[0]} is for classifiers: detectors, segmenters and upscalers are exported in one form")
    tolerance = {} if args.tolerance is None else {"tolerance": args.tolerance}
    print(export_head(model, jobs[0][2], opset=args.opset, check=not args.no_check, **tolerance, **source))
    return 0


def plan(args: argparse.Namespace) -> list[tuple[str, str, Path]]:
    """(format, precision, file) of everything to write.

    Raises:
        ValueError: one file name for several files, or a name that does not fit the format.
    """
    suffix = args.out.suffix
    named = suffix in SUFFIXES.values()
    forms = args.format or ([next(f for f, s in SUFFIXES.items() if s == suffix)] if named else ["onnx"])
    jobs = [(form, p) for form in forms for p in (args.precision if form == "onnx" else ["float32"])]
    if named:
        if len(jobs) > 1:
            raise ValueError(f"{args.out} is one file and {len(jobs)} were asked for: give a folder as --out")
        if SUFFIXES[jobs[0][0]] != suffix:
            raise ValueError(f"{args.out} is no name for {jobs[0][0]}: end it with {SUFFIXES[jobs[0][0]]}")
        return [(*jobs[0], args.out)]
    stem = Path(args.weights).stem if Path(args.weights).is_file() else args.weights.split(".")[0]
    return [(f, p, args.out / f"{stem}{'' if p == 'float32' else f'_{p}'}{SUFFIXES[f]}") for f, p in jobs]


def _size(sides: list[int] | None) -> int | tuple[int, int] | None:
    if sides is None:
        return None
    if len(sides) > 2 or min(sides) < 1:
        raise ValueError(f"--img-size is {sides}: pass one side, or height and width")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _load(args: argparse.Namespace):
    """The model, and what the file will say about where its weights are from."""
    import timm

    import zoo
    from zoo.saving import load_model

    file = Path(args.weights)
    if file.suffix == ".safetensors" and not args.checkpoint:
        return load_model(file, **args.model_args), {"source": file.name, "source_sha256": _sha256(file)}
    if not timm.is_model(args.weights.split(".")[0]):
        raise ValueError(f"no file and no model is called {args.weights!r}: `zoo list` names the models")
    if not (args.checkpoint or args.pretrained or args.random):
        raise ValueError(f"{args.weights} has random weights: give --checkpoint or --pretrained (or --random)")
    classes = {"num_classes": args.num_classes} if args.num_classes else {}
    model = timm.create_model(args.weights, pretrained=args.pretrained, **classes, **args.model_args)
    if not args.checkpoint:
        return model.eval(), {"source": "pretrained" if args.pretrained else "random"}
    print(zoo.load_checkpoint(model, args.checkpoint))
    return model.eval(), {"source": Path(args.checkpoint).name, "source_sha256": _sha256(Path(args.checkpoint))}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
