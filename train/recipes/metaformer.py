"""ImageNet-1k recipes of PoolFormer (arXiv 2111.11418) and the MetaFormer baselines (arXiv 2210.13452).

Values are those of the official training scripts. The learning rates belong to the batch sizes given.
"""

from __future__ import annotations

from zoo.train.recipe import ClassificationRecipe

_COMMON = dict(
    epochs=300,
    cooldown_epochs=10,
    schedule="cosine",
    lr_update="epoch",
    warmup_lr=1e-6,
    min_lr=1e-5,
    weight_decay=0.05,
    rand_augment="rand-m9-mstd0.5-inc1",
    color_jitter=0.4,
    mixup=0.8,
    cutmix=1.0,
    mixup_switch_prob=0.5,
    label_smoothing=0.1,
    random_erasing=0.25,
    scale=(0.08, 1.0),
    hflip=0.5,
    interpolation="random",
    img_size=224,
    seed=42,
    workers=8,
    # the official v2 runs used full precision; the squared activation overflows fp16, bf16 is safe
    precision="bf16",
    channels_last=True,
)

_LAYOUTS = ("s12", "s24", "s36", "m36", "m48")
_POOLFORMER_DROP_PATH = dict(zip(_LAYOUTS, (0.1, 0.1, 0.2, 0.3, 0.4)))
_RANDFORMER_DROP_PATH = dict(zip(_LAYOUTS, (0.1, 0.1, 0.2, 0.3, 0.3)))
_CONVFORMER_DROP_PATH = dict(s18=0.2, s36=0.3, m36=0.4, b36=0.6)
_CAFORMER_DROP_PATH = dict(s18=0.15, s36=0.3, m36=0.4, b36=0.6)
_CAFORMER_HEAD_DROPOUT = dict(s18=0.0, s36=0.4, m36=0.4, b36=0.5)
_CONVFORMER_384_DROP_PATH = dict(s18=0.3, s36=0.5, m36=0.8, b36=0.8)
_CAFORMER_384_DROP_PATH = dict(s18=0.3, s36=0.5, m36=0.7, b36=0.8)
_HEAD_DROPOUT_384 = dict(s18=0.4, s36=0.4, m36=0.4, b36=0.5)

RECIPES = {}


def _recipe(name: str, expected: str, **values) -> None:
    def preset(**changes) -> ClassificationRecipe:
        return ClassificationRecipe(**(_COMMON | values | changes))

    preset.__name__ = name
    preset.__doc__ = f"ImageNet-1k from scratch, 224 px. The paper reports {expected} % top-1."
    RECIPES[name] = preset


for _layout, _top1 in zip(_LAYOUTS, (77.2, 80.3, 81.4, 82.1, 82.5)):
    _recipe(
        f"imagenet_poolformer_{_layout}",
        str(_top1),
        model=f"poolformerv1_{_layout}",
        batch_size=1024,
        lr=1e-3,
        warmup_epochs=5,
        drop_path=_POOLFORMER_DROP_PATH[_layout],
    )
for _family, _drop_path, _claims in (
    ("poolformerv2", _POOLFORMER_DROP_PATH, (78.0, 80.7, 81.6, 82.2, 82.6)),
    ("identityformer", _POOLFORMER_DROP_PATH, (74.6, 78.2, 79.3, 80.0, 80.4)),
    ("randformer", _RANDFORMER_DROP_PATH, (76.6, 78.2, 79.5, 81.2, 81.4)),
):
    for _layout, _top1 in zip(_LAYOUTS, _claims):
        _recipe(
            f"imagenet_{_family}_{_layout}",
            str(_top1),
            model=f"{_family}_{_layout}",
            batch_size=4096,
            lr=4e-3,
            warmup_epochs=5,
            drop_path=_drop_path[_layout],
        )
for _layout, _conv, _attention in zip(("s18", "s36", "m36", "b36"), (83.0, 84.1, 84.5, 84.8), (83.6, 84.5, 85.2, 85.5)):
    _recipe(
        f"imagenet_convformer_{_layout}",
        str(_conv),
        model=f"convformer_{_layout}",
        batch_size=4096,
        lr=4e-3,
        warmup_epochs=20,
        drop_path=_CONVFORMER_DROP_PATH[_layout],
    )
    _recipe(
        f"imagenet_caformer_{_layout}",
        str(_attention),
        model=f"caformer_{_layout}",
        batch_size=4096,
        optimizer="lamb",
        lr=8e-3,
        warmup_epochs=20,
        drop_path=_CAFORMER_DROP_PATH[_layout],
        head_dropout=_CAFORMER_HEAD_DROPOUT[_layout],
        # a user's run with LAMB and mixed precision went NaN at epoch 39; clipping is the cheap insurance
        clip_grad=1.0,
    )


def _finetune_384(name: str, expected: str, **values) -> None:
    def preset(**changes) -> ClassificationRecipe:
        fixed = dict(
            epochs=30,
            cooldown_epochs=0,
            schedule="constant",
            warmup_epochs=5,
            batch_size=1024,
            mixup=0.0,
            cutmix=0.0,
            ema_decay=0.9999,
            img_size=384,
            crop_pct=1.0,
        )
        return ClassificationRecipe(**(_COMMON | fixed | values | changes))

    preset.__name__ = name
    preset.__doc__ = f"ImageNet-1k fine-tuning at 384 px; give the 224 px weights. The paper reports {expected} %."
    RECIPES[name] = preset


for _layout, _conv, _attention in zip(("s18", "s36", "m36", "b36"), (84.4, 85.4, 85.6, 85.7), (85.0, 85.7, 86.2, 86.4)):
    _finetune_384(
        f"finetune384_convformer_{_layout}",
        str(_conv),
        model=f"convformer_{_layout}",
        lr=5e-5,
        drop_path=_CONVFORMER_384_DROP_PATH[_layout],
        head_dropout=_HEAD_DROPOUT_384[_layout],
    )
    _finetune_384(
        f"finetune384_caformer_{_layout}",
        str(_attention),
        model=f"caformer_{_layout}",
        optimizer="lamb",
        lr=1e-4,
        drop_path=_CAFORMER_384_DROP_PATH[_layout],
        head_dropout=_HEAD_DROPOUT_384[_layout],
    )
