"""Recipes of PEM (arXiv 2402.19422, appendix and official configurations), and one for images of your own.

The official trainer counts iterations; an epoch here is the 5000 iterations between its evaluations.
"""

from __future__ import annotations

from zoo.train.recipe import SegmentationRecipe

_COMMON = dict(
    model="resnet50",
    pretrained=True,
    batch_size=32,
    optimizer="adamw",
    weight_decay=0.05,
    decay_bias=True,
    backbone_lr=0.1,
    clip_grad=0.01,
    schedule="cosine",
    warmup_epochs=0,
    epoch_steps=5000,
    precision="fp16",
    workers=8,
)


def _short_sides(base: int) -> tuple[int, ...]:
    return tuple(int(base * step / 10) for step in range(5, 21))


def pem_ade20k_semantic(**changes) -> SegmentationRecipe:
    """ADE20K, 150 classes, 160k iterations of 32 images. The paper: 45.5 mIoU (ResNet-50), 45.0 (STDC2)."""
    return SegmentationRecipe(
        **_COMMON
        | dict(
            kind="semantic",
            lr=4e-4,
            min_lr=1e-6,
            epochs=32,
            crop_size=(512, 512),
            short_sides=_short_sides(512),
            max_long=2048,
            test_short=512,
            test_long=2048,
            freeze_norm=True,
        )
        | changes
    )


def pem_ade20k_panoptic(**changes) -> SegmentationRecipe:
    """ADE20K, 100 things and 50 stuff classes, 160k iterations of 32 images. The paper: 38.5 PQ (ResNet-50)."""
    return SegmentationRecipe(
        **_COMMON
        | dict(
            kind="panoptic",
            lr=4e-4,
            min_lr=1e-6,
            epochs=32,
            crop_size=(640, 640),
            short_sides=_short_sides(640),
            max_long=2560,
            test_short=640,
            test_long=2560,
            freeze_norm=True,
        )
        | changes
    )


def pem_cityscapes_semantic(**changes) -> SegmentationRecipe:
    """Cityscapes, 19 classes, 90k iterations of 32 images. The paper: 79.9 mIoU (ResNet-50), 79.0 (STDC2)."""
    return SegmentationRecipe(
        **_COMMON
        | dict(
            kind="semantic",
            lr=7e-4,
            min_lr=0.0,
            epochs=18,
            crop_size=(512, 1024),
            short_sides=_short_sides(1024),
            max_long=4096,
            pad_to_crop=False,
            test_short=1024,
            test_long=2048,
        )
        | changes
    )


def pem_cityscapes_panoptic(**changes) -> SegmentationRecipe:
    """Cityscapes, 8 things and 11 stuff classes, 90k iterations of 32 images. The paper: 61.1 PQ (ResNet-50)."""
    return pem_cityscapes_semantic(**dict(kind="panoptic") | changes)


def finetune_segmentation(**changes) -> SegmentationRecipe:
    """PEM on images of your own, on a CPU or one GPU: small crops, few images a step, a backbone that moves slowly.

    Give `--pretrained` or `--backbone-checkpoint`; `--kind panoptic` for COCO panoptic annotations.
    """
    return SegmentationRecipe(
        **dict(
            model="caformer_s18",
            epochs=50,
            batch_size=4,
            optimizer="adamw",
            lr=2e-4,
            min_lr=1e-6,
            warmup_epochs=1,
            weight_decay=0.05,
            backbone_lr=0.1,
            clip_grad=1.0,
            freeze_norm=True,
            crop_size=(384, 384),
            jitter_scale=(0.5, 2.0),
            loss_points=4096,
            test_short=384,
            test_long=1333,
            val_interval=5,
        )
        | changes
    )


RECIPES = {
    "pem_ade20k_semantic": pem_ade20k_semantic,
    "pem_ade20k_panoptic": pem_ade20k_panoptic,
    "pem_cityscapes_semantic": pem_cityscapes_semantic,
    "pem_cityscapes_panoptic": pem_cityscapes_panoptic,
    "finetune_segmentation": finetune_segmentation,
}
