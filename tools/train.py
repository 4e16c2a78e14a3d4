"""Train or fine-tune a model on a folder of images.

`zoo train --data photos --model caformer_s18 --checkpoint caformer_s18.pth` fine-tunes with the `finetune`
recipe; every field of the recipe is a flag. A run that was interrupted goes on with the same command and
--resume, and ends with the weights that it would have had.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `zoo train`: one flag for each field of a recipe."""
    from zoo.train.recipe import ClassificationRecipe, convert

    parser.formatter_class = argparse.HelpFormatter
    parser.add_argument("--recipe", default="finetune", help="preset (`zoo list --recipes`) or a recipe.json")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--show", action="store_true", help="print the resolved recipe and stop")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    hints = typing.get_type_hints(ClassificationRecipe)
    group = parser.add_argument_group("recipe", "default: the preset's value")
    for field in dataclasses.fields(ClassificationRecipe):
        hint = hints[field.name]
        choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else None
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=f"field_{field.name}",
            metavar=None if choices else field.name.upper(),
            choices=choices,
            default=argparse.SUPPRESS,
            help=field.metadata["help"],
            **(dict(nargs="?", const="true") if hint is bool else {}),
            type=_reader(convert, hint, field.name),
        )


def _reader(convert, hint, name: str):
    def read(text: str):
        try:
            return convert(hint, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{name}: {error}") from error

    return read


def resolve_recipe(args: argparse.Namespace):
    """The preset with the flags that were given.

    Raises:
        ValueError: no such preset, or a value that does not fit.
    """
    from zoo.train.recipe import ClassificationRecipe
    from zoo.train.recipes import find_recipe

    changes = {name.removeprefix("field_"): v for name, v in vars(args).items() if name.startswith("field_")}
    if args.recipe.endswith(".json"):
        return ClassificationRecipe.load(args.recipe).replace(**changes)
    return find_recipe(args.recipe)(**changes)


def run(args: argparse.Namespace) -> int:
    """Train; the table of the best weights is printed at the end."""
    recipe = resolve_recipe(args)
    if args.show:
        print(recipe.to_json(), end="")
        return 0
    if not recipe.data:
        raise ValueError("--data is not set: give a folder of class folders or a labels.csv")
    from zoo.train.trainer import train

    result = train(recipe, resume=args.resume, quiet=args.quiet)
    if result is not None:
        print(f"\nbest weights: {result.weights} (epoch {result.best_epoch})\n{result.table}")
        print(f"curves, confusion matrix and pictures: {result.folder}")
    return 0
