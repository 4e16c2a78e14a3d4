"""A small set of real photographs and the smallest model that trains on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from zoo.train.recipe import ClassificationRecipe

CLOTHING = Path(__file__).parents[1] / "data" / "clothing10"
TINY_CRATE = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "head_dim": 16}


def copy_photos(target: Path, *, classes=("dress", "hat", "pants"), train: int = 12, val: int = 4) -> Path:
    """A part of clothing10 as a folder of its own."""
    for split, count in (("train", train), ("val", val)):
        for name in classes:
            folder = target / split / name
            folder.mkdir(parents=True)
            for photo in sorted((CLOTHING / split / name).iterdir())[:count]:
                shutil.copy(photo, folder)
    return target


@pytest.fixture
def photos(tmp_path) -> Path:
    return copy_photos(tmp_path / "photos")


@pytest.fixture
def recipe(photos, tmp_path) -> ClassificationRecipe:
    return ClassificationRecipe(
        model="crate_tiny",
        model_args=TINY_CRATE,
        data=str(photos),
        out=str(tmp_path / "run"),
        img_size=32,
        epochs=2,
        batch_size=8,
        warmup_epochs=1,
        lr=2e-3,
        workers=0,
        device="cpu",
    )


def command_line(recipe: ClassificationRecipe, path: Path) -> list[str]:
    """`zoo train` with this recipe."""
    path.write_text(json.dumps(json.loads(recipe.to_json())))
    return ["train", "--recipe", str(path)]
