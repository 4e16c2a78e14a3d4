"""Released weights: list them, fetch them, check the files at hand, add files that were fetched with a browser.

Files are looked for in the folder $ZOO_WEIGHTS, else in ~/.cache/zoo/weights, where downloads go as well.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import shutil
import sys
from pathlib import Path
from typing import get_args

from zoo.manifest import (
    Access,
    Task,
    Weights,
    find_weights,
    known_weights,
    local_file,
    local_file_names,
    obtain,
    weights_folder,
)
from zoo.tools.convert import json_object


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `zoo weights`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="a table of the known weights")
    listing.add_argument("pattern", nargs="?", default="", help="shell-style pattern of model.tag, such as 'crate*'")
    listing.add_argument("--family", help="of one family: crate, metaformer, craft, pem, ...")
    listing.add_argument("--task", choices=get_args(Task))
    listing.add_argument("--access", choices=get_args(Access), help="how they can be had")
    listing.add_argument("--local", action="store_true", help="only those on this machine")
    getting = actions.add_parser("get", help="fetch weights and print where they are")
    getting.add_argument("names", nargs="+", metavar="NAME[.TAG]")
    checking = actions.add_parser("verify", help="check files: hash, readable, fits the model")
    checking.add_argument("names", nargs="*", metavar="FILE|NAME[.TAG]", help="default: all files at hand")
    adding = actions.add_parser("add", help="put a file where pretrained=True finds it")
    adding.add_argument("file", metavar="FILE")
    adding.add_argument("--model", help="what it is, as NAME or NAME.TAG: recognised by default")
    adding.add_argument("--model-args", type=json_object, default={}, help="JSON object of arguments of the model")
    adding.add_argument("--force", action="store_true", help="overwrite a file that is there")


def run(args: argparse.Namespace) -> int:
    """Do it; status 1 if something could not be had or is damaged."""
    return {"list": _list, "get": _get, "verify": _verify, "add": _add}[args.action](args)


def family_of(weights: Weights) -> str:
    """The family of an entry: that of its model, or the head's name."""
    from timm.models import is_model, model_entrypoint

    if not is_model(weights.model):
        return weights.model.partition("_x")[0] if weights.door else weights.model.partition("_")[0]
    return model_entrypoint(weights.model).__module__.rsplit(".", 1)[-1].split("_")[0]


def _list(args: argparse.Namespace) -> int:
    rows = []
    for weights in known_weights():
        backbone = str(weights.options.get("backbone", ""))
        names = (weights.name, weights.model, backbone)
        if args.pattern and not any(fnmatch.fnmatch(name, args.pattern) for name in names):
            continue
        if args.family and args.family != family_of(weights) and not backbone.startswith(args.family):
            continue
        if (args.task and args.task != weights.task) or (args.access and args.access != weights.access):
            continue
        here = local_file(weights.model, weights)
        if args.local and here is None:
            continue
        size = weights.size or (here.stat().st_size if here else None)
        claimed = ", ".join(f"{name} {value:g}" for name, value in list(weights.claimed.items())[:3])
        rows.append((weights.name, weights.task, weights.access, _size(size), "yes" if here else "no", claimed))
    if not rows:
        print("no weights match")
        return 1
    head = ("weights", "task", "access", "size", "local", "claimed")
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print(f"{len(rows)} of {len(known_weights())}")
    return 0


def _size(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.1f} MB"


def _named(name: str) -> tuple[str, Weights | None]:
    """The model's name and the entry.

    Raises:
        ValueError: the manifest has no such name.
    """
    weights = find_weights(name)
    if weights is None:
        near = [w.name for w in known_weights() if w.model == name.partition(".")[0]]
        hint = f"it has {', '.join(near)}" if near else "`zoo weights list` shows what it has"
        raise ValueError(f"{name} is not in the manifest: {hint}")
    return weights.model, weights


def _get(args: argparse.Namespace) -> int:
    entries = [_named(name) for name in args.names]
    failed = 0
    for model, weights in entries:
        try:
            print(obtain(model, weights), flush=True)
        except RuntimeError as error:
            failed += 1
            print(error, file=sys.stderr, flush=True)
    return 1 if failed else 0


def _verify(args: argparse.Namespace) -> int:
    from zoo.tools.verify import verify_file

    jobs: list[tuple[Path, str | None]] = []
    for name in args.names:
        if Path(name).is_file():
            jobs.append((Path(name), None))
            continue
        model, weights = _named(name)
        path = local_file(model, weights)
        if path is None:
            raise FileNotFoundError(f"{weights.name} is not on this machine: `zoo weights get {weights.name}`")
        jobs.append((path, weights.name))
    if not args.names:
        found = {}
        for weights in known_weights():
            path = local_file(weights.model, weights)
            if path is not None:
                found.setdefault(path, weights.name)
        jobs = list(found.items())
    failed = 0
    for path, model in jobs:
        try:
            lines = [line for line, _ in verify_file(path, model)]
        except (ValueError, OSError) as error:
            failed += 1
            print(f"{path}: {error}", file=sys.stderr, flush=True)
        else:
            print(f"{path}: good, {' '.join(lines[0].split()[1:])}; {' '.join(lines[1].split()[1:])}", flush=True)
    print(f"{len(jobs) - failed} of {len(jobs)} files are good")
    return 1 if failed else 0


def _add(args: argparse.Namespace) -> int:
    import torch

    from zoo.checkpoint import CheckpointError, load_checkpoint, read_checkpoint
    from zoo.downloads import file_sha256
    from zoo.tools.recognition import recognise

    path = Path(args.file)
    content = read_checkpoint(path)
    sha256 = file_sha256(path)
    found = recognise(path, content, model=args.model, arguments=args.model_args, sha256=sha256)
    with torch.no_grad():
        load_checkpoint(found.build(), content)
    weights = found.weights or find_weights(found.model)
    if weights is not None and weights.sha256 not in (None, sha256) and not args.force:
        raise CheckpointError(f"{path} has another SHA-256 than {weights.name} of the manifest: {weights.sha256}")
    if weights is None and found.door is not None:
        raise ValueError(f"{path} is {found.name}, which the manifest does not have: pass --model NAME.TAG of it")
    names = local_file_names(found.model, weights)
    name = names[0] if path.suffix == ".safetensors" else names[-1]
    target = weights_folder() / name
    there = [weights_folder() / other for other in names if (weights_folder() / other).exists()]
    if there and not args.force:
        raise ValueError(f"{there[0]} is there already: pass --force to replace it")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        shutil.copyfile(path, partial)
        if file_sha256(partial) != sha256:
            raise OSError(f"{path} changed while it was copied")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    for other in there:
        if other != target and other.parent == target.parent and other.stem == target.stem:
            other.unlink()  # it would be found before the new one
    print(f"{path} is {found.name} (known by {found.how}): added as {target}")
    return 0
