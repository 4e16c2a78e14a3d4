"""ImageNet-1k recipes of ViM2 (MambaMixer, arXiv 2403.19888).

The paper prints optimiser, learning rate, epochs, warm-up, batch size and weight decay. The rest is not stated there:
augmentation, clipping and the ends of the schedule are Swin's, stochastic depth and averaging those of VMamba's first
version, which the paper builds on (whose base size had 0.5 or 0.6). The models are readings, and the results
preliminary by the authors' own word.
"""

from __future__ import annotations

from zoo.train.recipe import ClassificationRecipe

_COMMON = dict(
    epochs=300,
    batch_size=1024,
    optimizer="adamw",
    betas=(0.9, 0.999),
    lr=1e-3,
    weight_decay=0.05,
    schedule="cosine",
    warmup_epochs=20,
    warmup_lr=1e-6,
    min_lr=1e-5,
    clip_grad=5.0,
    ema_decay=0.9999,
    rand_augment="rand-m9-mstd0.5-inc1",
    color_jitter=0.4,
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
)

RECIPES = {}


def _recipe(model: str, drop_path: float, expected: float) -> None:
    def preset(**changes) -> ClassificationRecipe:
        return ClassificationRecipe(**(_COMMON | dict(model=model, drop_path=drop_path) | changes))

    preset.__name__ = f"imagenet_{model}"
    preset.__doc__ = (
        f"ImageNet-1k from scratch, 224 px, completed by usual values. The paper reports {expected} % top-1."
    )
    RECIPES[preset.__name__] = preset


for _model, _drop_path, _top1 in (
    ("vim2_tiny", 0.2, 82.7),
    ("vim2_small", 0.3, 83.7),
    ("vim2_base", 0.5, 83.9),
    ("vim2_mlp", 0.2, 79.1),
    ("vanilla_vmamba_tiny", 0.2, 82.2),
    ("vanilla_vmamba_small", 0.3, 83.5),
    ("vanilla_vmamba_base", 0.5, 83.2),
):
    _recipe(_model, _drop_path, _top1)
