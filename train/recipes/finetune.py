"""Presets for people with a folder of images and one small machine."""

from __future__ import annotations

from zoo.train.recipe import ClassificationRecipe


def finetune(**changes) -> ClassificationRecipe:
    """Fine-tune a trained model on a folder of photographs, on a CPU or one GPU.

    A short warm-up, light augmentation, weight averaging, a classifier that starts near zero. Minutes on two
    CPU cores for some hundred images; give `--checkpoint` or `--pretrained`. For large transformers add
    `--layer-decay 0.75`.
    """
    return ClassificationRecipe(
        **dict(
            epochs=10,
            batch_size=32,
            lr=5e-4,
            min_lr=1e-6,
            warmup_epochs=0.5,
            weight_decay=0.05,
            label_smoothing=0.1,
            scale=(0.4, 1.0),
            color_jitter=0.2,
            ema_decay=0.98,
            clip_grad=1.0,
        )
        | changes
    )


def scratch(**changes) -> ClassificationRecipe:
    """Train from random weights on a small data set: stronger augmentation, higher rate, more epochs."""
    return ClassificationRecipe(
        **dict(
            epochs=100,
            batch_size=64,
            lr=1e-3,
            min_lr=1e-5,
            warmup_epochs=5,
            weight_decay=0.05,
            label_smoothing=0.1,
            scale=(0.3, 1.0),
            rand_augment="rand-m7-mstd0.5-inc1",
            mixup=0.2,
            cutmix=1.0,
            drop_path=0.05,
            clip_grad=1.0,
        )
        | changes
    )


def linear_probe(**changes) -> ClassificationRecipe:
    """Train only the classifier on frozen features: the usual measure of how good features are."""
    return ClassificationRecipe(
        **dict(
            epochs=20,
            batch_size=64,
            lr=5e-3,
            min_lr=0.0,
            warmup_epochs=0,
            weight_decay=1e-3,
            scale=(0.5, 1.0),
            color_jitter=None,
            freeze_backbone=True,
        )
        | changes
    )


RECIPES = {"finetune": finetune, "scratch": scratch, "linear_probe": linear_probe}
