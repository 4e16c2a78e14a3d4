"""Recipes of Activator (arXiv 2405.15953): the official script for CIFAR, and this project's for ImageNet-1k.

Patches never mix in these models: expect them to trail every network whose patches do.
"""

from __future__ import annotations

from zoo.train.recipe import ClassificationRecipe


def cifar_activator(model: str = "activator_patch4_32", **changes) -> ClassificationRecipe:
    """Activator with MLP on CIFAR-10 or CIFAR-100 (official `train.py`): Adam 1e-3, constant, 100 epochs, dropout 0.5.

    A digest of the paper reports 73.2 % on CIFAR-10 and 46.1 % on CIFAR-100 for "Activator", probably the GEGLU-only
    model. No augmentation, as in the last version of the script; earlier ones cropped and flipped (`--crop-padding 4
    --hflip 0.5`), the test images too. Which of them gave the figures is not known. The script keeps the last
    epoch's weights: compare `last.safetensors`.
    """
    return ClassificationRecipe(
        **dict(
            model=model,
            model_args={"proj_drop_rate": 0.5},
            epochs=100,
            batch_size=128,
            optimizer="adam",
            betas=(0.9, 0.999),
            eps=1e-8,
            lr=1e-3,
            weight_decay=0.0,
            schedule="constant",
            warmup_epochs=0,
            crop_padding=0,
            hflip=0.0,
            color_jitter=None,
            img_size=32,
        )
        | changes
    )


def cifar_activator_geglu(**changes) -> ClassificationRecipe:
    """Activator of GEGLUs only on CIFAR-10 or CIFAR-100 (official `train_only_GEGLU.py`); see `cifar_activator`.

    A digest of the paper reports 73.2 % on CIFAR-10 and 46.1 % on CIFAR-100. Its dropout has no place in this model.
    """
    return cifar_activator("activator_geglu_patch4_32", **dict(model_args={}) | changes)


RECIPES = {"cifar_activator": cifar_activator, "cifar_activator_geglu": cifar_activator_geglu}


def _recipe(variant: str) -> None:
    def preset(**changes) -> ClassificationRecipe:
        return ClassificationRecipe(
            **dict(
                model=f"{variant}_patch16_224",
                epochs=300,
                batch_size=1024,
                optimizer="adamw",
                lr=1e-3,
                weight_decay=0.05,
                schedule="cosine",
                warmup_epochs=5,
                warmup_lr=1e-6,
                min_lr=1e-5,
                rand_augment="rand-m9-mstd0.5-inc1",
                repeated_augmentation=3,
                random_erasing=0.25,
                mixup=0.8,
                cutmix=1.0,
                mixup_switch_prob=0.5,
                label_smoothing=0.1,
                interpolation="bicubic",
                img_size=224,
                workers=8,
                precision="bf16",
            )
            | changes
        )

    preset.__name__ = f"imagenet_{variant}"
    preset.__doc__ = (
        "ImageNet-1k from scratch, 224 px, for a size of this project's: DeiT's recipe without stochastic depth. The "
        "accuracy is not known, and will be far below DeiT's: the model sees a bag of patches."
    )
    RECIPES[preset.__name__] = preset


for _variant in ("activator", "activator_geglu"):
    for _size in ("tiny", "small", "base"):
        _recipe(f"{_variant}_{_size}")
