"""Segmentation as a task of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

import zoo
from zoo.extras import require
from zoo.saving import load_model, save_model
from zoo.train.data.segmentation import TrainingSegments, check_segmentation
from zoo.train.data.segmentation_layouts import open_segmentation
from zoo.train.data.segmentation_transforms import SegmentationAugmentation
from zoo.train.loading import EpochSampler, SeededDataset, make_loader
from zoo.train.recipe import SegmentationRecipe
from zoo.train.reports import draw_curves
from zoo.train.segmentation import (
    EvaluationImages,
    PemSegmentation,
    SegmentationPreprocessor,
    collate_one,
    collate_segments,
)
from zoo.train.segmentation_evaluation import MAIN_METRIC, SegmentationMetric
from zoo.train.segmentation_reports import evaluate_segmenter, write_report
from zoo.train.tasks.base import Say, Task

require("mmengine", extra="train")

from mmengine.dataset import DefaultSampler  # noqa: E402


class Segmentation(Task):
    """Semantic, panoptic or instance segmentation by PEM."""

    recipe_class = SegmentationRecipe
    recipe: SegmentationRecipe

    def open_data(self, say: Say) -> None:
        """Open and check both splits; training images without a segment are left out and counted."""
        recipe = self.recipe
        if not recipe.data:
            raise ValueError("data is not set: give a folder of ADE20K, Cityscapes or COCO, or of images/ and masks/")
        options = dict(val_fraction=recipe.val_fraction, seed=recipe.seed)
        self.data = open_segmentation(recipe.data, "train", recipe.kind, **options)
        self.val_set = open_segmentation(recipe.data, "val", recipe.kind, classes=self.data.classes, **options)
        for name, data in (("training", self.data), ("validation", self.val_set)):
            report = check_segmentation(data, on_bad=recipe.on_bad, drop_empty=name == "training")
            for line in (*data.notes, *report.warnings):
                say(f"{name}: {line}")
            for bad in report.unreadable:
                say(f"{name}: left out {bad.path}: {bad.reason}")
        crop = tuple(recipe.crop_size)
        self.train_set = TrainingSegments(
            self.data,
            SegmentationAugmentation(
                crop,
                short_sides=recipe.short_sides,
                max_long=recipe.max_long,
                jitter=recipe.jitter_scale,
                color=recipe.color_distortion,
                hflip=recipe.hflip,
                pad=recipe.pad_to_crop,
            ),
        )
        say(f"{len(self.data)} training and {len(self.val_set)} validation images, {len(self.data.classes)} classes")
        self.metric = MAIN_METRIC[recipe.kind]

    def build(self, say: Say) -> PemSegmentation:
        """The segmenter with its loss."""
        recipe = self.recipe
        arguments = dict(recipe.model_args)
        if recipe.drop_path:
            arguments["drop_path_rate"] = recipe.drop_path
        model = zoo.create_segmenter(
            "pem",
            backbone=recipe.model,
            num_classes=len(self.data.classes),
            task=recipe.kind,
            pretrained_backbone=recipe.pretrained,
            backbone_args=arguments,
            class_names=self.data.classes,
            thing_classes=list(self.data.things),
            freeze_norm=recipe.freeze_norm,
            **recipe.head_args,
        )
        if recipe.backbone_checkpoint:
            report = zoo.load_checkpoint(model.backbone.backbone, recipe.backbone_checkpoint)
            say(f"{recipe.backbone_checkpoint}: {report}")
        if recipe.checkpoint:
            report = zoo.load_checkpoint(model, recipe.checkpoint, head="fit")
            say(f"{recipe.checkpoint}: {report}")
        if recipe.grad_checkpointing:
            model.backbone.set_grad_checkpointing(True)
        return PemSegmentation(
            model,
            SegmentationPreprocessor(model.backbone.mean, model.backbone.std, channels_last=recipe.channels_last),
            kind=recipe.kind,
            thresholds=self._thresholds,
            criterion_args=dict(num_points=recipe.loss_points),
            seed=recipe.seed,
        )

    @property
    def _thresholds(self) -> dict[str, float]:
        recipe = self.recipe
        return dict(object_threshold=recipe.object_threshold, overlap_threshold=recipe.overlap_threshold)

    def train_loader(self, sampler: EpochSampler, batch_size: int) -> DataLoader:
        """Augmented images and their segments, seeded by (draw, index)."""
        return make_loader(
            SeededDataset(self.train_set, self.recipe.seed),
            batch_size=batch_size,
            workers=self.recipe.workers,
            sampler=sampler,
            collate_fn=collate_segments,
        )

    def _images(self) -> EvaluationImages:
        return EvaluationImages(self.val_set, self.recipe.test_short, self.recipe.test_long)

    def val_loader(self, batch_size: int) -> DataLoader:
        """Whole images, one at a time."""
        dataset = self._images()
        return make_loader(
            dataset,
            batch_size=1,
            workers=self.recipe.workers,
            sampler=DefaultSampler(dataset, shuffle=False, round_up=False),
            collate_fn=collate_one,
        )

    def build_metric(self) -> SegmentationMetric:
        """Mean IoU, panoptic quality or mask AP, in percent."""
        return SegmentationMetric(self.val_set)

    def save_weights(self, model: nn.Module, path: Path, **metadata: Any) -> Path:
        """The segmenter with class names and test sizes."""
        recipe = self.recipe
        return save_model(
            model,
            path,
            class_names=list(self.data.classes),
            task="segmentation",
            kind=recipe.kind,
            thing_classes=list(self.data.things),
            category_ids=list(self.data.category_ids),
            test_size=[recipe.test_short, recipe.test_long],
            thresholds=self._thresholds,
            **metadata,
        )

    def report(self, weights: Path, folder: Path, *, title: str, batch_size: int, device: str, progress: bool):
        """Scores, per-class results, result files and pictures; gives the scores and their table."""
        evaluation = evaluate_segmenter(
            load_model(weights),
            self.val_set,
            test_size=(self.recipe.test_short, self.recipe.test_long),
            thresholds=self._thresholds,
            device=device,
            workers=self.recipe.workers,
            results=folder / "results",
            progress=progress,
        )
        table = write_report(evaluation, folder, title)
        draw_curves(folder / "history.jsonl", folder / "curves.png", self.metric)
        return evaluation, table
