"""Presets: functions that return a complete recipe. `find_recipe` looks one up by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from zoo.train.recipe import ClassificationRecipe
from zoo.train.recipes import (
    activator,
    ascan,
    crate,
    fcaformer,
    finetune,
    metaformer,
    ninformer,
    slab,
    spartan,
    vim2,
)

_MODULES = (finetune, metaformer, crate, fcaformer, slab, ascan, ninformer, activator, spartan, vim2)


def list_recipes() -> dict[str, Callable[..., ClassificationRecipe]]:
    """Every preset by name, in the order of their files."""
    return {name: function for module in _MODULES for name, function in module.RECIPES.items()}


def find_recipe(name: str) -> Callable[..., ClassificationRecipe]:
    """The preset called `name`.

    Raises:
        ValueError: there is none; close names are suggested.
    """
    recipes = list_recipes()
    if name not in recipes:
        close = difflib.get_close_matches(name, recipes, n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else f"; there are: {', '.join(recipes)}"
        raise ValueError(f"no recipe is called {name!r}{hint}")
    return recipes[name]
