"""`zoo predict --task sr`: enlarge pictures, `in.png out.png` or folders."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of super-resolution."""
    group = parser.add_argument_group("super-resolution (--task sr IN [IN ...] OUT)")
    group.add_argument(
        "--scale", type=int, help="factor: that of --checkpoint, else 2, for which zoo comes with weights"
    )
    group.add_argument("--max-memory", type=memory_size, help="as 2GB or 500MB: larger pictures go through files")
    group.add_argument("--tile", type=int, help="approximate tiles of so many pixels, instead of the exact result")
    group.add_argument("--overlap", type=int, default=32, help="pixels that tiles share")
    group.add_argument("--self-ensemble", action="store_true", help="average eight flips and transposes, 8 x slower")
    group.add_argument(
        "--padding", choices=("official", "reflect"), default="official", help="padding to whole windows"
    )
    group.add_argument("--shift-mask", action="store_true", help="the journal version's masked windows")
    group.add_argument("--force", action="store_true", help="overwrite files")


def memory_size(text: str) -> int:
    """Bytes of "2GB", "500 MB", "1e9"."""
    match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([kmgt]?)i?b?\s*", text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount of memory such as 2GB or 500MB")
    return int(float(match[1]) * 1000 ** " kmgt".index(match[2] or " "))


def run(args: argparse.Namespace, paths: list[Path]) -> int:
    """Enlarge; pictures that cannot be read or written are named at the end and give status 1.

    Raises:
        ValueError: no output, an output that is there already, or arguments that do not fit.
    """
    import torch

    from zoo.heads.craft.pictures import upscale_picture

    jobs = _jobs(args, paths)
    model = _build(args)
    model.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    options = dict(
        padding=args.padding,
        tile=args.tile,
        overlap=args.overlap,
        max_memory=args.max_memory,
        ensemble=args.self_ensemble,
    )
    return _enlarge(jobs, model.scale, lambda picture, **said: upscale_picture(model, picture, **options, **said))


def run_onnx(args: argparse.Namespace, model) -> int:
    """`run` with an upscaler that `zoo export` wrote: `zoo predict model.onnx IN [IN ...] OUT`."""
    for name, value in (
        ("--max-memory", args.max_memory),
        ("--shift-mask", args.shift_mask),
        ("--device", args.device),
    ):
        if value and value != "cpu":
            raise ValueError(f"{name} is not for ONNX files: leave it out (--tile bounds their memory)")
    if args.scale not in (None, model.scale):
        raise ValueError(f"{args.weights} enlarges by {model.scale}, and --scale is {args.scale}: leave it out")
    options = dict(padding=args.padding, tile=args.tile, overlap=args.overlap, ensemble=args.self_ensemble)
    jobs = _jobs(args, args.images)
    return _enlarge(jobs, model.scale, lambda picture, **_: model.upscale_picture(picture, **options))


def _jobs(args: argparse.Namespace, paths: list[Path]) -> list[tuple[Path, Path]]:
    if len(paths) < 2:
        raise ValueError("an upscaler takes a picture or folders and, last, the file or folder to write: IN OUT")
    *sources, out = paths
    jobs = plan_files(sources, out)
    if not args.force:
        there = [str(target) for _, target in jobs if target.exists()]
        if there:
            more = f" and {len(there) - 1} more" if len(there) > 1 else ""
            raise ValueError(f"{there[0]}{more} exist already: choose another name, or pass --force to overwrite")
    return jobs


def _enlarge(jobs: list[tuple[Path, Path]], scale: int, upscale: Callable) -> int:
    from tqdm import tqdm

    from zoo.heads.craft.pictures import check_format, read_picture
    from zoo.images import ImageError

    failed = []
    for source, target in jobs:
        bar = tqdm(
            total=100.0, desc=source.name, unit="%", disable=None, leave=False, bar_format="{l_bar}{bar}| {elapsed}"
        )
        try:
            picture = read_picture(source)
            check_format(target, picture, scale)
            result = upscale(
                picture,
                step=lambda share: bar.update(100 * share),  # noqa: B023 - called within this turn
                say=lambda line: tqdm.write(f"{source}: {line}", file=sys.stderr),  # noqa: B023
            )
            target.parent.mkdir(parents=True, exist_ok=True)
            result.save(target)
        except ImageError as error:
            failed.append(str(error))
            continue
        finally:
            bar.close()
        height, width = result.values.shape[:2]
        print(f"{source} -> {target}: {width}x{height}")
    for line in failed:
        print(f"not done: {line}", file=sys.stderr)
    return 1 if failed else 0


def plan_files(sources: list[Path], out: Path) -> list[tuple[Path, Path]]:
    """(picture, file to write) for each picture of files and folders.

    One picture and a name with an extension: that file. Otherwise `out` is a folder; the results are PNG files of the
    same names, in the same sub-folders.

    Raises:
        ValueError: several pictures for one file, a folder without pictures, or a result that would be its own source.
    """
    from zoo.tools.predict import find_pictures

    if len(sources) == 1 and not sources[0].is_dir() and out.suffix and not out.is_dir():
        jobs = [(sources[0], out)]
    else:
        if out.is_file() or (out.suffix.lower() in (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp")):
            raise ValueError(f"{out} is one file, and there are several pictures: give a folder to write to")
        jobs, names = [], set()
        for source in sources:
            for path in find_pictures([source]):
                inside = path.relative_to(source).parent if source.is_dir() else Path()
                target = out / inside / f"{path.stem}.png"
                if target in names:
                    target = out / inside / f"{path.name}.png"  # a.jpg and a.png
                names.add(target)
                jobs.append((path, target))
    for source, target in jobs:
        if target.exists() and source.exists() and target.samefile(source):
            raise ValueError(f"{target} would be written over its own source: choose another folder or name")
    return jobs


def _build(args: argparse.Namespace):
    import zoo

    options = {"shift_mask": True} if args.shift_mask else {}
    if args.checkpoint:
        return zoo.create_upscaler("craft", scale=args.scale, checkpoint=args.checkpoint, **options)
    return zoo.create_upscaler("craft", scale=args.scale or 2, pretrained=True, **options)
