"""ImageNet-1k recipes of FcaFormer (arXiv 2211.07198): the official training script, a copy of ConvNeXt's.

The plain model L0 of the paper has no recipe here: its code was not released.
"""

from __future__ import annotations

from zoo.train.recipe import ClassificationRecipe

_COMMON = dict(
    epochs=300,
    batch_size=1024,
    optimizer="adamw",
    betas=(0.9, 0.999),
    eps=1e-8,
    lr=2e-3,
    weight_decay=0.05,
    param_groups="family",  # the position tables are decayed
    schedule="cosine_after_warmup",
    lr_update="step",
    warmup_epochs=20,
    warmup_lr=0.0,
    min_lr=1e-6,
    ema_decay=0.9999,
    rand_augment="rand-m9-mstd0.5-inc1",
    color_jitter=0.4,
    random_erasing=0.25,
    mixup=0.8,
    cutmix=1.0,
    mixup_prob=1.0,
    mixup_switch_prob=0.5,
    label_smoothing=0.1,
    interpolation="bicubic",
    img_size=224,
    crop_pct=0.875,
    workers=8,
    precision="float32",  # as by default in the official script
)

RECIPES = {}


def _recipe(variant: str, drop_path: float, expected: float) -> None:
    def preset(**changes) -> ClassificationRecipe:
        return ClassificationRecipe(**(_COMMON | dict(model=f"fcaformer_{variant}", drop_path=drop_path) | changes))

    preset.__name__ = f"imagenet_fcaformer_{variant}"
    preset.__doc__ = (
        f"ImageNet-1k from scratch, 224 px. The authors report {expected} % top-1, of the trained or of the averaged "
        "weights, whichever is better; here the average is evaluated."
    )
    RECIPES[preset.__name__] = preset


for _variant, _drop_path, _top1 in zip(("l1", "l2", "l3", "l4"), (0.0, 0.1, 0.2, 0.4), (80.3, 83.1, 84.2, 84.9)):
    _recipe(_variant, _drop_path, _top1)
