"""Train or fine-tune a model: classification, detection, segmentation, super-resolution.

`zoo train --data photos --model caformer_s18 --checkpoint caformer_s18.pth` fine-tunes a classifier with the
`finetune` recipe, `zoo train --task detection --data coco --model caformer_s18` a detector with
`finetune_detection`; every field of the recipe is a flag. A run that was interrupted goes on with the same command
and --resume, and ends with the weights that it would have had.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `zoo train`: one flag for each field of a recipe of any task."""
    from zoo.train.recipe import Recipe
    from zoo.train.recipes import RECIPE_CLASSES

    parser.formatter_class = argparse.HelpFormatter
    parser.add_argument("--task", choices=(*RECIPE_CLASSES, *_ALIASES), help="what to train; the recipe's by default")
    parser.add_argument("--recipe", help="preset (`zoo list --recipes`) or a recipe.json; the task's fine-tuning")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument("--show", action="store_true", help="print the resolved recipe and stop")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    shared = {field.name for field in dataclasses.fields(Recipe)}
    flags: dict[str, argparse.Action] = {}
    for title, cls in {"every task": Recipe, **RECIPE_CLASSES}.items():
        hints = typing.get_type_hints(cls)
        group = parser.add_argument_group(f"recipe, {title}", "default: the preset's value")
        for field in dataclasses.fields(cls):
            if field.name in shared and cls is not Recipe:
                continue
            help = field.metadata["help"]
            if field.name in flags:  # of another task, too: its meaning there is added
                if help not in flags[field.name].help:
                    flags[field.name].help += f"; {title}: {help}"
                continue
            hint = hints[field.name]
            choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else None
            # the text is read as the field's type when the task is known: tasks may differ in it
            flags[field.name] = group.add_argument(
                f"--{field.name.replace('_', '-')}",
                dest=f"field_{field.name}",
                metavar="{" + ",".join(map(str, choices)) + "}" if choices else field.name.upper(),
                default=argparse.SUPPRESS,
                help=help,
                **(dict(nargs="?", const="true") if hint is bool else {}),
            )


_ALIASES = {"sr": "superresolution"}  # as zoo predict calls it


def resolve_recipe(args: argparse.Namespace):
    """The preset with the flags that were given.

    Raises:
        ValueError: no such preset, a preset of another task, or a value that does not fit.
    """
    from zoo.train.recipe import convert
    from zoo.train.recipes import FINE_TUNING, find_recipe, load_recipe

    given = {name.removeprefix("field_"): v for name, v in vars(args).items() if name.startswith("field_")}
    task = _ALIASES.get(args.task, args.task)
    name = args.recipe or FINE_TUNING[task or "classification"]
    from_file = name.endswith(".json")
    recipe = load_recipe(name) if from_file else find_recipe(name)()
    if task and recipe.task != task:
        raise ValueError(f"--recipe {name} is one of {recipe.task}, and --task is {task}: leave one of them out")
    hints = typing.get_type_hints(type(recipe))
    changes = {}
    for field, text in given.items():
        if field not in hints:
            raise ValueError(f"a recipe of {recipe.task} has no field {field}: leave out --{field.replace('_', '-')}")
        try:
            changes[field] = convert(hints[field], text)
        except ValueError as error:
            raise ValueError(f"--{field.replace('_', '-')}: {error}") from error
    # a preset is made with the changes, since values that fit together may not fit one by one
    return recipe.replace(**changes) if from_file else find_recipe(name)(**changes)


def run(args: argparse.Namespace) -> int:
    """Train; the table of the best weights is printed at the end."""
    recipe = resolve_recipe(args)
    if args.show:
        print(recipe.to_json(), end="")
        return 0
    if not recipe.data:
        raise ValueError("--data is not set: give the folder of the data set")
    from zoo.train.trainer import train

    result = train(recipe, resume=args.resume, quiet=args.quiet)
    if result is not None:
        print(f"\nbest weights: {result.weights} (epoch {result.best_epoch})\n{result.table}")
        print(f"curves, tables and pictures: {result.folder}")
    return 0
