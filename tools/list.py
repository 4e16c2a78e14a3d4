"""List models: zoo's own, or with --all every model of timm; with --task those that a task can be built on."""

from __future__ import annotations

import argparse
import inspect

import timm

import zoo
from zoo.manifest import known_weights
from zoo.registry import model_family


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `zoo list`."""
    parser.add_argument("filter", nargs="?", default="", help="shell-style pattern, such as 'crate*'")
    parser.add_argument("--all", action="store_true", help="timm's models too")
    parser.add_argument("--pretrained", action="store_true", help="only models whose weights can be downloaded")
    parser.add_argument(
        "--task",
        choices=("classification", "detection", "segmentation", "super-resolution"),
        help="models that can be the backbone of this task, with the heads that it has",
    )
    parser.add_argument("--names", action="store_true", help="names only, for scripts")
    parser.add_argument("--recipes", action="store_true", help="list training recipes instead")


def run(args: argparse.Namespace) -> int:
    """Print the list; status 1 if it is empty."""
    if args.recipes:
        return _list_recipes()
    dense = args.task not in (None, "classification")
    if dense and not args.names:
        print(f"heads: {', '.join(zoo.list_heads(args.task))}; backbones:")
    if args.all:
        names = timm.list_models(args.filter, pretrained=args.pretrained)
    else:
        names = zoo.list_models(args.filter, pretrained=args.pretrained)
    if dense:
        names = [name for name in names if gives_maps(name)]
    if not names:
        print(f"no model matches {args.filter!r}")
        return 1
    if args.names:
        print("\n".join(names))
        return 0
    access = {}
    for weights in known_weights():
        access.setdefault(weights.model, []).append(f"{weights.tag} ({weights.access})")
    width = max(map(len, names))
    print(f"{'model':<{width}}  {'family':<12}  weights")
    for name in names:
        print(f"{name:<{width}}  {model_family(name):<12}  {', '.join(access.get(name.split('.')[0], ['-']))}")
    print(f"{len(names)} models")
    return 0


def gives_maps(name: str) -> bool:
    """Whether a head can stand on the model: timm's way to the maps between its layers."""
    entry = timm.model_entrypoint(name.split(".")[0])
    cls = inspect.getmodule(entry)
    return any(hasattr(value, "forward_intermediates") for value in vars(cls).values() if isinstance(value, type))


def _list_recipes() -> int:
    from zoo.train.recipes import list_recipes

    recipes = list_recipes()
    width = max(map(len, recipes))
    for name, function in recipes.items():
        print(f"{name:<{width}}  {(function.__doc__ or '').strip().splitlines()[0]}")
    return 0
