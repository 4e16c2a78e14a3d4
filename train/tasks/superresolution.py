"""Super-resolution as a task of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

import zoo
from zoo.extras import require
from zoo.heads.craft.start import start_from_bicubic
from zoo.saving import load_model, save_model
from zoo.train.data.superresolution import SuperResolutionData, open_superresolution
from zoo.train.loading import EpochSampler, EvaluationDataset, SeededDataset, make_loader
from zoo.train.recipes.superresolution import SuperResolutionRecipe
from zoo.train.reports import draw_curves
from zoo.train.sr_metrics import mean_scores
from zoo.train.sr_reports import write_report
from zoo.train.superresolution import SuperResolution as Objective
from zoo.train.superresolution import evaluate_superresolution
from zoo.train.tasks.base import Say, Task

require("mmengine", extra="train")

from mmengine.dataset import DefaultSampler  # noqa: E402
from mmengine.evaluator import BaseMetric  # noqa: E402


class MeanScores(BaseMetric):
    """The mean over pictures of PSNR and SSIM, on Y and on RGB."""

    default_prefix = ""

    def process(self, data_batch, data_samples) -> None:
        """Keep the scores of each picture."""
        self.results.extend(data_samples)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Their means."""
        return mean_scores(results)


class SuperResolution(Task):
    """CRAFT on crops of pictures; whole pictures are validated."""

    recipe_class = SuperResolutionRecipe
    recipe: SuperResolutionRecipe

    def open_data(self, say: Say) -> None:
        """Open both splits; with `on_bad=skip`, pictures smaller than the patch are left out and counted."""
        recipe = self.recipe
        if not recipe.data:
            raise ValueError("data is not set: give a folder of high-resolution pictures")
        options = dict(hr_shrink=recipe.hr_shrink, cache=recipe.cache)
        crops = dict(patch=recipe.patch, repeat=recipe.repeat, augment=recipe.augment)
        self.train_set = open_superresolution(recipe.data, recipe.scale, low=recipe.low, **options, **crops)
        if recipe.val_data:
            self.val_set = open_superresolution(recipe.val_data, recipe.scale, low=recipe.val_low, cache=recipe.cache)
        else:
            self.val_set = SuperResolutionData([], recipe.scale, **options)
            self._hold_out()
        if recipe.on_bad == "skip":
            for bad in self.train_set.drop_small():
                say(f"training: left out {bad.path}: {bad.reason}")
        pairs = (len(self.train_set.pairs), len(self.val_set.pairs))
        say(f"{pairs[0]} pictures for training, {pairs[1]} for validation")
        self.metric = "psnr_y"

    def _hold_out(self) -> None:
        """Every n-th picture, so that the choice depends on the folder's content alone."""
        pairs = self.train_set.pairs
        if len(pairs) < 2:
            raise ValueError(f"{self.recipe.data} has one picture, which leaves none for validation: give val_data")
        every = max(2, round(1 / self.recipe.val_fraction))
        chosen = set(range(every - 1, len(pairs), every)) or {len(pairs) - 1}
        self.val_set.pairs = [pairs[i] for i in sorted(chosen)]
        self.train_set.pairs = [pair for i, pair in enumerate(pairs) if i not in chosen]

    def build(self, say: Say) -> Objective:
        """CRAFT with the L1 loss."""
        recipe = self.recipe
        backbone = None if recipe.model == "craft" else recipe.model
        model = zoo.create_upscaler(
            "craft",
            scale=recipe.scale,
            backbone=backbone,
            pretrained=recipe.pretrained,
            **(dict(backbone_args=recipe.model_args) if backbone and recipe.model_args else {}),
            **recipe.head_args,
        )
        if recipe.start == "bicubic":
            start_from_bicubic(model)
        if recipe.checkpoint:
            say(f"{recipe.checkpoint}: {zoo.load_checkpoint(model, recipe.checkpoint)}")
        model.freeze_inert()
        return Objective(model.train(), padding=recipe.val_padding)

    def train_loader(self, sampler: EpochSampler, batch_size: int) -> DataLoader:
        """Crops, seeded by (draw, index)."""
        return make_loader(
            SeededDataset(self.train_set, self.recipe.seed),
            batch_size=batch_size,
            workers=self.recipe.workers,
            sampler=sampler,
        )

    def val_loader(self, batch_size: int) -> DataLoader:
        """Whole pictures, one at a time."""
        dataset = EvaluationDataset(self.val_set)
        return make_loader(
            dataset,
            batch_size=1,
            workers=self.recipe.workers,
            sampler=DefaultSampler(dataset, shuffle=False, round_up=False),
        )

    def build_metric(self) -> MeanScores:
        """PSNR and SSIM."""
        return MeanScores()

    def save_weights(self, model: nn.Module, path: Path, **metadata: Any) -> Path:
        """The upscaler with what rebuilds it."""
        return save_model(model, path, task="superresolution", scale=self.recipe.scale, **metadata)

    def report(self, weights: Path, folder: Path, *, title: str, batch_size: int, device: str, progress: bool):
        """Scores of each picture beside bicubic ones, as a table and as JSON, and pictures; gives the mean scores."""
        model = load_model(weights).to(device)
        data = self.val_set
        mean, scores = evaluate_superresolution(model, data, padding=self.recipe.val_padding)
        table = write_report(model, data, scores, folder, title)
        draw_curves(folder / "history.jsonl", folder / "curves.png", self.metric)
        return mean, table
