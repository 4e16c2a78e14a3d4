"""Recipes of NiNformer (arXiv 2403.02411): the official script for CIFAR, and this project's for ImageNet-1k.

The script draws the same random crops and flips for the test images; here they are evaluated as they are, so
figures are not comparable with the paper's, whose tables could not be read.
"""

from __future__ import annotations

from zoo.train.recipe import ClassificationRecipe


def cifar_ninformer(**changes) -> ClassificationRecipe:
    """NiNformer on CIFAR-10 or CIFAR-100 (official `train.py`): Adam 1e-3, constant, 100 epochs, dropout 0.5.

    Its accuracy could not be read in the paper and is not known here. The script keeps the last epoch's weights:
    compare `last.safetensors`.
    """
    return ClassificationRecipe(
        **dict(
            model="ninformer_patch4_32",
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
            crop_padding=4,
            hflip=0.5,
            color_jitter=None,
            img_size=32,
        )
        | changes
    )


_DROP_PATH = dict(tiny=0.0, small=0.1, base=0.2)

RECIPES = {"cifar_ninformer": cifar_ninformer}


def _recipe(size: str) -> None:
    def preset(**changes) -> ClassificationRecipe:
        return ClassificationRecipe(
            **dict(
                model=f"ninformer_{size}_patch16_224",
                drop_path=_DROP_PATH[size],
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

    preset.__name__ = f"imagenet_ninformer_{size}"
    preset.__doc__ = (
        "ImageNet-1k from scratch, 224 px, for a size of this project's: DeiT's recipe without dropout. The paper has "
        "no ImageNet experiment; the accuracy is not known."
    )
    RECIPES[preset.__name__] = preset


for _size in _DROP_PATH:
    _recipe(_size)
