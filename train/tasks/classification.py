"""Image classification as a task of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import Mixup, resolve_data_config
from torch import nn
from torch.utils.data import DataLoader

from zoo.extras import require
from zoo.saving import load_model, save_model
from zoo.train.classification import Classification, ClassificationPreprocessor
from zoo.train.data.classification import build_transforms, check_dataset, open_classification
from zoo.train.engine import PRepBNHook
from zoo.train.evaluation import evaluate
from zoo.train.loading import EpochSampler, EvaluationDataset, SeededDataset, make_loader
from zoo.train.metrics import classification_scores, main_metric
from zoo.train.recipe import ClassificationRecipe
from zoo.train.reports import draw_curves, write_report
from zoo.train.tasks.base import Say, Task

require("mmengine", extra="train")

from mmengine.dataset import DefaultSampler  # noqa: E402
from mmengine.evaluator import BaseMetric  # noqa: E402


class ImageClassification(Task):
    """One label an image, or several."""

    recipe_class = ClassificationRecipe
    recipe: ClassificationRecipe

    def open_data(self, say: Say) -> None:
        """Class folders or a labels.csv; pictures that cannot be read are an error or left out, as the recipe says."""
        recipe = self.recipe
        if not recipe.data:
            raise ValueError("data is not set: give a folder of class folders or a labels.csv")
        options = dict(val_fraction=recipe.val_fraction, seed=recipe.seed)
        self.train_set = open_classification(recipe.data, "train", **options)
        self.val_set = open_classification(recipe.data, "val", classes=self.train_set.classes, **options)
        report = check_dataset(self.train_set, val=self.val_set, on_bad=recipe.on_bad)
        for line in (*self.train_set.notes, *report.warnings):
            say(line)
        if report.unreadable:
            say(f"{len(report.unreadable)} unreadable pictures are left out, listed in {recipe.out}/left_out.txt")
        say(
            f"{len(self.train_set)} training and {len(self.val_set)} validation images, "
            f"{len(self.train_set.classes)} classes"
        )
        self.left_out = [(bad.path, bad.reason) for bad in report.unreadable]
        self.metric = main_metric(self.train_set.multilabel)

    @property
    def repeats(self) -> int:
        """Repeated augmentation."""
        return self.recipe.repeated_augmentation

    def build(self, say: Say) -> Classification:
        """The model with its loss; the data sets get their transforms, which depend on the model."""
        model, remarks = build_classifier(self.recipe, len(self.train_set.classes))
        for remark in remarks:
            say(remark)
        self.model_args = model.zoo_model_args
        self.settings = training_settings(self.recipe, model)
        self.train_set.transform = training_transform(self.recipe, self.settings)
        self.val_set.transform = evaluation_transform(self.settings)
        return _build_objective(self.recipe, model, self.settings, self.train_set)

    def train_loader(self, sampler: EpochSampler, batch_size: int) -> DataLoader:
        """Augmented images, seeded by (draw, index)."""
        views = self.recipe.distill_views if self.recipe.teacher else None
        dataset = SeededDataset(self.train_set, self.recipe.seed, views)
        return make_loader(dataset, batch_size=batch_size, workers=self.recipe.workers, sampler=sampler)

    def val_loader(self, batch_size: int) -> DataLoader:
        """Images as they are evaluated."""
        dataset = EvaluationDataset(self.val_set)
        return make_loader(
            dataset,
            batch_size=max(batch_size, 32),
            workers=self.recipe.workers,
            sampler=DefaultSampler(dataset, shuffle=False),
        )

    def build_metric(self) -> BaseMetric:
        """Top-1 and top-5, or mean average precision, in percent."""
        return ClassificationMetric()

    def hooks(self) -> list:
        """The schedule of PRepBN."""
        return [PRepBNHook(self.recipe)] if self.recipe.prepbn_share is not None else []

    def loop_options(self) -> dict[str, Any]:
        """Epochs that only renew statistics."""
        return dict(recalibrate_epochs=self.recipe.recalibrate_epochs)

    def save_weights(self, model: nn.Module, path: Path, **metadata: Any) -> Path:
        """The classifier with class names and input settings."""
        size = self.settings["eval_size"]
        return save_model(
            model,
            path,
            model_args=self.model_args,
            class_names=list(self.train_set.classes),
            multilabel=self.train_set.multilabel,
            input_config=dict(
                input_size=(3, size, size),
                crop_pct=self.settings["crop_pct"],
                interpolation=self.settings["eval_interpolation"],
            ),
            **metadata,
        )

    def report(self, weights: Path, folder: Path, *, title: str, batch_size: int, device: str, progress: bool):
        """Scores, per-class results, confusion, mistakes and curves; gives the `Evaluation` and its table."""
        evaluation = evaluate(
            load_model(weights),
            self.val_set,
            mean=self.settings["mean"],
            std=self.settings["std"],
            batch_size=max(batch_size, 32),
            workers=self.recipe.workers,
            device=device,
            left_out=self.left_out,
            progress=progress,
        )
        table = write_report(evaluation, folder, title)
        draw_curves(folder / "history.jsonl", folder / "curves.png", self.metric)
        return evaluation, table


class ClassificationMetric(BaseMetric):
    """Scores of all images of the validation set, each counted once however many processes there are."""

    default_prefix = ""

    def process(self, data_batch, data_samples) -> None:
        """Keep the logits of a batch."""
        self.results.extend((sample["logits"], sample["target"]) for sample in data_samples)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Metrics in percent."""
        logits, targets = zip(*results)
        return classification_scores(torch.stack(logits), torch.stack(targets))


def build_classifier(recipe: ClassificationRecipe, num_classes: int) -> tuple[nn.Module, list[str]]:
    """The model of a recipe with its initial weights, and remarks on how they were loaded.

    Raises:
        ValueError: an argument that the model does not have.
        CheckpointError: the weights do not fit.
    """
    from zoo.checkpoint import load_checkpoint

    arguments = dict(recipe.model_args)
    if recipe.drop_path:
        arguments["drop_path_rate"] = recipe.drop_path
    if recipe.drop_rate:
        arguments["drop_rate"] = recipe.drop_rate
    sized = arguments | ({"img_size": recipe.img_size} if recipe.img_size else {})
    build = dict(num_classes=num_classes, pretrained=recipe.pretrained)
    try:
        try:
            model = timm.create_model(recipe.model, **build, **sized)
            arguments = sized
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            model = timm.create_model(recipe.model, **build, **arguments)  # takes any size
    except TypeError as error:
        raise ValueError(f"{recipe.model} does not take these arguments: {error}") from error
    except RuntimeError as error:
        if "Unknown model" in str(error) or "Invalid" in str(error):
            raise ValueError(f"no model is called {recipe.model!r}: `zoo list` names them") from error
        raise
    remarks = []
    if recipe.checkpoint:
        report = load_checkpoint(model, recipe.checkpoint, head="fit")
        remarks = [f"{recipe.checkpoint}: {line}" for line in str(report).splitlines()]
        if "classifier of the file was left out" in str(report):
            _start_near_zero(model.get_classifier())
    if recipe.head_dropout:
        from zoo.metaformer import set_head_dropout

        set_head_dropout(model, recipe.head_dropout)
    if recipe.freeze_backbone:
        model.requires_grad_(False)
        model.get_classifier().requires_grad_(True)
    if recipe.grad_checkpointing:
        model.set_grad_checkpointing(True)
    model.zoo_model_args = {k: v for k, v in arguments.items() if k not in ("drop_path_rate", "drop_rate")}
    return model, remarks


def _start_near_zero(classifier: nn.Module) -> None:
    """Small weights for a new classifier: timm's own can give logits of +-10 (EfficientNet with few classes), whose
    gradients would wreck the trained features before the classifier has learnt anything."""
    if isinstance(classifier, nn.Linear):
        nn.init.trunc_normal_(classifier.weight, std=0.01)
        if classifier.bias is not None:
            nn.init.zeros_(classifier.bias)


def evaluation_settings(
    model: nn.Module,
    *,
    img_size: int | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
) -> dict:
    """How a model's images are prepared for evaluation: what is given, else what its file or timm says."""
    cfg = resolve_data_config({}, model=model)
    return dict(
        eval_size=img_size or cfg["input_size"][-1],
        crop_pct=crop_pct or cfg["crop_pct"],
        eval_interpolation=interpolation or cfg["interpolation"],
        mean=cfg["mean"],
        std=cfg["std"],
    )


def training_settings(recipe: ClassificationRecipe, model: nn.Module) -> dict:
    """`evaluation_settings` of a recipe, with the size and interpolation of training."""
    own = resolve_data_config({}, model=model)
    size = recipe.img_size or own["input_size"][-1]
    evaluation = evaluation_settings(
        model,
        img_size=recipe.eval_size or size,
        crop_pct=recipe.crop_pct,
        interpolation=None if recipe.interpolation == "random" else recipe.interpolation,
    )
    return evaluation | dict(train_size=size, interpolation=recipe.interpolation or own["interpolation"])


def evaluation_transform(settings: dict):
    """Picture -> uint8 (C, H, W), resized and cropped as `settings` say."""
    return build_transforms(
        train=False,
        input_size=settings["eval_size"],
        interpolation=settings["eval_interpolation"],
        crop_pct=settings["crop_pct"],
        normalize=False,
    )


def training_transform(recipe: ClassificationRecipe, settings: dict):
    """Picture -> uint8 (C, H, W) with the recipe's augmentation of single images."""
    return build_transforms(
        train=True,
        input_size=settings["train_size"],
        mean=settings["mean"],
        std=settings["std"],
        interpolation=settings["interpolation"],
        scale=recipe.scale,
        ratio=recipe.ratio,
        hflip=recipe.hflip,
        vflip=recipe.vflip,
        color_jitter=recipe.color_jitter,
        auto_augment=recipe.rand_augment,
        crop_padding=recipe.crop_padding,
        normalize=False,
    )


def _build_objective(recipe: ClassificationRecipe, model: nn.Module, settings: dict, train_set) -> Classification:
    mixup = None
    if recipe.mixup or recipe.cutmix:
        if train_set.multilabel:
            raise ValueError("mixup and cutmix need one label an image, and this data has several: set both to 0")
        mixup = Mixup(
            mixup_alpha=recipe.mixup,
            cutmix_alpha=recipe.cutmix,
            prob=recipe.mixup_prob,
            switch_prob=recipe.mixup_switch_prob,
            label_smoothing=recipe.label_smoothing,
            num_classes=len(train_set.classes),
        )
    teacher = None
    if recipe.teacher:
        teacher = load_model(recipe.teacher)
        taught = getattr(teacher, "class_names", None)
        if taught is not None and list(taught) != list(train_set.classes):
            raise ValueError(
                f"the teacher {recipe.teacher} knows the classes {', '.join(taught[:5])}..., this data has "
                f"{', '.join(train_set.classes[:5])}...: train the teacher on the same data first"
            )
    return Classification(
        model,
        ClassificationPreprocessor(
            settings["mean"],
            settings["std"],
            mixup=mixup,
            random_erasing=recipe.random_erasing,
            erasing_mode=recipe.erasing_mode,
            channels_last=recipe.channels_last,
        ),
        multilabel=train_set.multilabel,
        label_smoothing=recipe.label_smoothing,
        teacher=teacher,
        distill_weight=recipe.distill_weight,
        distill_temperature=recipe.distill_temperature,
        remember_teacher=bool(recipe.distill_views),
    )
