"""Write official weight files as safetensors that say which model they belong to, or zoo's files as the authors' code
wrote them. The model is recognised by the file's name, hash or entries.

  zoo convert crate_alpha_B16.pth --out crate_alpha_b16.safetensors
  zoo convert downloads/ --out converted/
  zoo convert converted/x.safetensors --to official --out x.pth
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt", ".pkl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `zoo convert`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("path", metavar="FILE|FOLDER", help="weight file, or a folder of them (searched deeply)")
    parser.add_argument("--out", required=True, help="file to write; for a folder the folder to write into")
    parser.add_argument("--model", help="what the file is, as NAME or NAME.TAG: recognised by default")
    parser.add_argument("--model-args", type=json_object, default={}, help="JSON object of arguments of the model")
    parser.add_argument("--source", help="where the weights come from, for the file's metadata")
    parser.add_argument("--license", help="their licence, for the file's metadata")
    parser.add_argument("--to", choices=("zoo", "official"), default="zoo", help="the layout to write (default: zoo)")
    parser.add_argument("--like", help="with --to official: an official file whose layout is used")
    parser.add_argument("--force", action="store_true", help="overwrite files")


def json_object(text: str) -> dict[str, Any]:
    """A JSON object from the command line."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object such as {{"img_size": 384}}')
    return value


def run(args: argparse.Namespace) -> int:
    """Convert; status 1 if a file of a folder could not be."""
    path, out = Path(args.path), Path(args.out)
    if args.like and args.to != "official":
        raise ValueError("--like is for --to official")
    if not path.exists():
        raise FileNotFoundError(f"no file or folder at {path}")
    if not path.is_dir():
        target = out / _target_name(path, args.to) if out.is_dir() else out
        print(_one(path, target, args))
        return 0
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in SUFFIXES)
    if not files:
        raise ValueError(f"{path} has no weight files ({', '.join(SUFFIXES)})")
    failed = 0
    for file in files:
        target = out / file.relative_to(path).parent / _target_name(file, args.to)
        try:
            print(_one(file, target, args), flush=True)
        except (ValueError, OSError, RuntimeError) as error:
            failed += 1
            print(f"{file}: {error}", file=sys.stderr, flush=True)
    print(f"{len(files) - failed} of {len(files)} files converted" + (f", {failed} failed" if failed else ""))
    return 1 if failed else 0


def _target_name(path: Path, to: str) -> str:
    stem = path.name.removesuffix(".tar")
    return Path(stem).with_suffix(".safetensors" if to == "zoo" else ".pth").name


def _one(path: Path, target: Path, args: argparse.Namespace) -> str:
    from zoo.tools.conversion import convert_file, write_official

    if target.exists() and not args.force:
        raise ValueError(f"{target} exists already: choose another name, or pass --force to overwrite")
    if target.resolve() == path.resolve():
        raise ValueError(f"{target} is the file itself: choose another name")
    if args.to == "zoo" and target.suffix != ".safetensors":
        raise ValueError(f"{target}: zoo's files end in .safetensors")
    if args.to == "official":
        done = write_official(path, target, like=args.like)
        taken = f", {len(done['taken'])} of them taken from {args.like}" if args.like and done["taken"] else ""
        return f"{path} -> {target}: {done['model']}, {done['entries']} official entries{taken}"
    done = convert_file(
        path, target, model=args.model, model_args=args.model_args, source=args.source, license=args.license
    )
    aside = f", {len(done['aside'])} official entries kept aside" if done["aside"] else ""
    listed = f" = {done['weights']}" if done["weights"] else ""
    return (
        f"{path} -> {target}: {done['model']}{listed} (known by {done['how']}), layout {done['layout']}, "
        f"{done['entries']} entries{aside}"
    )
