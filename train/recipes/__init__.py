"""Presets: functions that return a complete recipe. `find_recipe` looks one up by name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from pathlib import Path

from zoo.train.recipe import ClassificationRecipe, DetectionRecipe, Recipe, SegmentationRecipe
from zoo.train.recipes import (
    activator,
    ascan,
    crate,
    detection,
    fcaformer,
    finetune,
    metaformer,
    ninformer,
    segmentation,
    slab,
    spartan,
    superresolution,
    vim2,
)
from zoo.train.recipes.superresolution import SuperResolutionRecipe

_MODULES = (
    finetune,
    metaformer,
    crate,
    fcaformer,
    slab,
    ascan,
    ninformer,
    activator,
    spartan,
    vim2,
    detection,
    segmentation,
    superresolution,
)

# task -> the class of its recipes, and the preset for people with images of their own
RECIPE_CLASSES: dict[str, type[Recipe]] = {
    cls.task: cls for cls in (ClassificationRecipe, DetectionRecipe, SegmentationRecipe, SuperResolutionRecipe)
}
FINE_TUNING = {
    "classification": "finetune",
    "detection": "finetune_detection",
    "segmentation": "finetune_segmentation",
    "superresolution": "finetune_sr",
}


def list_recipes() -> dict[str, Callable[..., Recipe]]:
    """Every preset by name, in the order of their files."""
    return {name: function for module in _MODULES for name, function in module.RECIPES.items()}


def find_recipe(name: str) -> Callable[..., Recipe]:
    """The preset called `name`.

    Raises:
        ValueError: there is none; close names are suggested.
    """
    recipes = list_recipes()
    key = name.replace("-", "_")
    if key not in recipes:
        close = difflib.get_close_matches(key, recipes, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else f"; there are: {', '.join(recipes)}"
        raise ValueError(f"no recipe is called {name!r}{hint}")
    return recipes[key]


def load_recipe(path: str | Path) -> Recipe:
    """Read a `recipe.json` of any task.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a recipe, an unknown task or field, or a wrong value.
    """
    try:
        text = Path(path).read_text()
        task = json.loads(text).get("task", "classification")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{path} is not a recipe that zoo train wrote: {error}") from error
    if task not in RECIPE_CLASSES:
        raise ValueError(f"{path} is a recipe of {task!r}, expected one of {', '.join(RECIPE_CLASSES)}")
    return RECIPE_CLASSES[task].from_json(text)
