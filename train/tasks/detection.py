"""Detection as a task of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

import zoo
from zoo.extras import require
from zoo.saving import load_model, save_model
from zoo.train.data.detection import (
    DetectionData,
    DetectionSamples,
    EvaluationImages,
    check_detection,
    collate_detection,
)
from zoo.train.data.detection_layouts import open_detection
from zoo.train.data.detection_transforms import DetectionAugmentation
from zoo.train.detection import DetectionPreprocessor, DetectorObjective
from zoo.train.detection_metrics import coco_metric
from zoo.train.detection_reports import evaluate_detector, write_report
from zoo.train.loading import EpochSampler, SeededDataset, make_loader
from zoo.train.recipe import DetectionRecipe
from zoo.train.reports import draw_curves
from zoo.train.tasks.base import Say, Task

require("mmengine", extra="train")

from mmengine.dataset import DefaultSampler  # noqa: E402
from mmengine.evaluator import BaseMetric  # noqa: E402


class Detection(Task):
    """Boxes, and masks with `mask_rcnn`."""

    recipe_class = DetectionRecipe
    recipe: DetectionRecipe

    def open_data(self, say: Say) -> None:
        """Open and check both splits; training images without an object are left out and counted."""
        recipe = self.recipe
        if not recipe.data:
            raise ValueError("data is not set: give a folder of a COCO, YOLO or VOC data set")
        self.masks = recipe.head == "mask_rcnn"
        options = dict(masks=self.masks, val_fraction=recipe.val_fraction, seed=recipe.seed)
        train = open_detection(recipe.data, "train", **options)
        val = open_detection(recipe.data, "val", classes=train.classes, **options)
        train, val = (self._checked(data, name, say) for data, name in ((train, "training"), (val, "validation")))
        with_objects = train.with_objects()
        if len(with_objects) < len(train):
            say(f"training: {len(train) - len(with_objects)} images without an object are left out")
        self.data, self.val_set = with_objects, val
        augmentation = DetectionAugmentation(
            short_sides=recipe.short_sides,
            max_long=recipe.max_long,
            crop_policy=recipe.crop_policy,
            jitter=recipe.jitter_scale,
            jitter_size=recipe.jitter_size,
            size=recipe.train_size,
            zoom_out=recipe.zoom_out,
            iou_crop=recipe.iou_crop,
            color=recipe.color,
            hflip=recipe.hflip,
        )
        self.train_set = DetectionSamples(self.data, augmentation)
        self.metric = "AP"

    def _checked(self, data: DetectionData, name: str, say: Say) -> DetectionData:
        data, report = check_detection(data, on_bad=self.recipe.on_bad)
        for line in str(report).splitlines():
            say(f"{name}: {line}")
        return data

    def build(self, say: Say) -> DetectorObjective:
        """The detector with its losses."""
        recipe = self.recipe
        backbone_args = dict(recipe.model_args)
        if recipe.drop_path:
            backbone_args["drop_path_rate"] = recipe.drop_path
        if recipe.head == "rt_detr":
            sizes = dict(size=recipe.test_short)
        else:
            sizes = dict(min_size=recipe.test_short, max_size=recipe.test_long)
        model = zoo.create_detector(
            recipe.head,
            recipe.model,
            len(self.data.classes),
            pretrained_backbone=recipe.pretrained,
            norm=recipe.map_norm,
            backbone_args=backbone_args,
            class_names=list(self.data.classes),
            freeze_norm=recipe.freeze_norm,
            resize_in_training=False,
            **(sizes | recipe.head_args),
        )
        model.category_ids = list(self.data.category_ids)
        if recipe.backbone_checkpoint:
            report = zoo.load_checkpoint(model.pyramid.backbone, recipe.backbone_checkpoint)
            say(f"{recipe.backbone_checkpoint}: {report}")
        if recipe.checkpoint:
            report = zoo.load_checkpoint(model, recipe.checkpoint, head="fit")
            say(f"{recipe.checkpoint}: {report}")
        if recipe.grad_checkpointing:
            model.set_grad_checkpointing(True)
        return DetectorObjective(model, DetectionPreprocessor(channels_last=recipe.channels_last))

    def train_loader(self, sampler: EpochSampler, batch_size: int) -> DataLoader:
        """Augmented images and their objects, seeded by (draw, index)."""
        return make_loader(
            SeededDataset(self.train_set, self.recipe.seed),
            batch_size=batch_size,
            workers=self.recipe.workers,
            sampler=sampler,
            collate_fn=collate_detection,
        )

    def val_loader(self, batch_size: int) -> DataLoader:
        """Whole images."""
        dataset = EvaluationImages(self.val_set)
        return make_loader(
            dataset,
            batch_size=1,
            workers=self.recipe.workers,
            sampler=DefaultSampler(dataset, shuffle=False),
            collate_fn=collate_detection,
        )

    def build_metric(self) -> BaseMetric:
        """COCO's AP of boxes, and of masks where the head has them."""
        kinds = ("bbox", "segm") if self.masks else ("bbox",)
        return coco_metric(self.val_set.coco, self.val_set.category_ids, kinds)

    def save_weights(self, model: nn.Module, path: Path, **metadata: Any) -> Path:
        """The detector with class names and COCO's ids of them."""
        return save_model(
            model,
            path,
            class_names=list(self.data.classes),
            task="detection",
            category_ids=list(self.data.category_ids),
            **metadata,
        )

    def report(self, weights: Path, folder: Path, *, title: str, batch_size: int, device: str, progress: bool):
        """AP table, per-class AP, COCO result file and pictures; gives the scores and their table."""
        evaluation = evaluate_detector(
            load_model(weights), self.val_set, device=device, workers=self.recipe.workers, progress=progress
        )
        table = write_report(evaluation, folder, title)
        draw_curves(folder / "history.jsonl", folder / "curves.png", self.metric)
        return evaluation, table
