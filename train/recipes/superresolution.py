"""Super-resolution recipes: CRAFT's own, a small one for a CPU, and fine-tuning on pictures of your own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from zoo.train.recipe import Recipe, check, option


@dataclass(frozen=True, kw_only=True)
class SuperResolutionRecipe(Recipe):
    """CRAFT, plain or with a side input from a backbone, on pairs or on high-resolution pictures alone."""

    task: ClassVar[str] = "superresolution"

    model: str = option("craft", "craft, or a registered model as the backbone of its side input")
    data: str = option("", "folder of high-resolution pictures for training")
    scale: int = option(2, "factor of enlargement")
    head_args: dict[str, Any] = option({}, "further arguments of CRAFT, as JSON")
    start: Literal["random", "bicubic"] = option("random", "initial weights; bicubic ones for short trainings")
    low: str | None = option(None, "folder of their low-resolution versions; made as MATLAB does by default")
    val_data: str | None = option(None, "folder of high-resolution pictures for validation; a part of data by default")
    val_low: str | None = option(None, "folder of their low-resolution versions")
    val_fraction: float = option(0.1, "part of data held out where there is no val_data")
    val_padding: Literal["official", "reflect"] = option("official", "the published padding, or the training-time one")
    patch: int = option(64, "rows and columns of a low-resolution crop, a multiple of 16")
    hr_shrink: float = option(1.0, "make pictures so many times smaller first, which hides JPEG's artefacts")
    cache: str | None = option("memory", "where decoded pictures stay: memory, a folder, or none")
    repeat: int = option(1, "how often a picture counts in an epoch")
    augment: bool = option(True, "flips and transposes")

    def validate(self) -> None:
        """Check every value that can be wrong on its own.

        Raises:
            ValueError: one sentence with the field, its value and what is allowed.
        """
        super().validate()
        check(self.scale >= 1, "scale", self.scale, "at least 1")
        check(self.patch >= 16 and self.patch % 16 == 0, "patch", self.patch, "a multiple of 16")
        check(self.hr_shrink >= 1, "hr_shrink", self.hr_shrink, "1 or more")
        check(self.repeat >= 1, "repeat", self.repeat, "at least 1")
        check(0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "between 0 and 1")


_ADAM = dict(optimizer="adam", betas=(0.9, 0.99), weight_decay=0.0, warmup_epochs=0.0, min_lr=0.0)


def _paper(scale: int, claim: str):
    def preset(**changes) -> SuperResolutionRecipe:
        values = dict(
            scale=scale,
            batch_size=64,
            lr=2e-4,
            epoch_steps=5000,
            epochs=100,
            schedule="step",
            milestones=(50.0, 80.0, 90.0, 95.0),
            step_factor=0.5,
            lr_update="epoch",
            seed=33,
            workers=8,
            repeat=400,
        )
        return SuperResolutionRecipe(**(_ADAM | values | changes))

    preset.__doc__ = f"CRAFT x{scale} as published: DIV2K, 500,000 steps of 64 pairs. The paper on Set5: {claim} dB."
    return preset


def finetune_sr(**changes) -> SuperResolutionRecipe:
    """Fine-tune trained CRAFT weights (`--checkpoint` or `--pretrained`) on your pictures, on a small machine."""
    values = dict(batch_size=8, patch=48, lr=1e-4, epochs=10, epoch_steps=100, repeat=20, ema_decay=0.998)
    return SuperResolutionRecipe(**(_ADAM | values | changes))


def craft_x2_small(**changes) -> SuperResolutionRecipe:
    """CRAFT x2 from its bicubic start in 1000 steps of 4 pairs: an hour or so on a CPU core."""
    values = dict(
        start="bicubic",
        batch_size=4,
        patch=48,
        hr_shrink=1.4,
        lr=5e-4,
        epochs=10,
        epoch_steps=100,
        ema_decay=0.998,
        warmup_epochs=1.0,
        repeat=4,
    )
    return SuperResolutionRecipe(**(_ADAM | values | changes))


RECIPES = {
    "craft_x2": _paper(2, "38.23"),
    "craft_x3": _paper(3, "34.71"),
    "craft_x4": _paper(4, "32.52"),
    "finetune_sr": finetune_sr,
    "craft_x2_small": craft_x2_small,
}
