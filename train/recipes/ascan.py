"""ImageNet-1k recipes for zoo's reading of AsCAN (arXiv 2411.04967).

The paper's recipe is not known: no code and no checkpoint were released, and its tables could not be read. These
are this project's values, usual for hybrid networks, and nothing is known of the accuracy that they reach.
"""

from __future__ import annotations

from zoo.train.recipe import ClassificationRecipe

_COMMON = dict(
    epochs=300,
    batch_size=1024,
    optimizer="adamw",
    lr=1e-3,
    weight_decay=0.05,
    schedule="cosine",
    warmup_epochs=20,
    warmup_lr=1e-6,
    min_lr=1e-5,
    clip_grad=1.0,
    ema_decay=0.9999,
    rand_augment="rand-m9-mstd0.5-inc1",
    random_erasing=0.25,
    mixup=0.8,
    cutmix=1.0,
    mixup_switch_prob=0.5,
    label_smoothing=0.1,
    interpolation="bicubic",
    img_size=224,
    crop_pct=0.875,
    workers=8,
    precision="bf16",
    channels_last=True,
)

RECIPES = {}


def _recipe(size: str, drop_path: float) -> None:
    def preset(**changes) -> ClassificationRecipe:
        return ClassificationRecipe(**(_COMMON | dict(model=f"ascan_{size}", drop_path=drop_path) | changes))

    preset.__name__ = f"imagenet_ascan_{size}"
    preset.__doc__ = (
        "ImageNet-1k from scratch, 224 px, zoo's own values; the paper's recipe and its result are not known."
    )
    RECIPES[preset.__name__] = preset


for _size, _drop_path in (("tiny", 0.1), ("base", 0.2), ("large", 0.3)):
    _recipe(_size, _drop_path)
