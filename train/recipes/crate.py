"""ImageNet-1k recipes of CRATE (arXiv 2306.01129) and CRATE-alpha (arXiv 2405.20299).

Two CRATE presets: the README's command of the official repository, and the paper's table (of which only a
digest was read: see the docstring). Mixed precision is bf16 here; the official script used fp16.
"""

from __future__ import annotations

from zoo.train.recipe import ClassificationRecipe


def imagenet_crate(model: str = "crate_tiny", **changes) -> ClassificationRecipe:
    """CRATE as the official README trains it: Lion 2e-4, 200 epochs, batch 512, crop and flip only.

    The schedule is stepped once an epoch and takes the lower of a 20-epoch warm-up and the cosine. The paper
    reports 66.7 (tiny), 69.2 (small), 70.8 (base), 71.3 (large) % top-1 for its own settings.
    """
    return ClassificationRecipe(
        **dict(
            model=model,
            epochs=200,
            batch_size=512,
            optimizer="lion",
            betas=(0.9, 0.99),
            lr=2e-4,
            weight_decay=0.05,
            schedule="min_cosine",
            warmup_epochs=20,
            label_smoothing=0.1,
            scale=(0.08, 1.0),
            hflip=0.5,
            color_jitter=None,
            interpolation="bilinear",
            img_size=224,
            workers=8,
            precision="bf16",
        )
        | changes
    )


def imagenet_crate_paper(model: str = "crate_base", **changes) -> ClassificationRecipe:
    """CRATE as its paper's appendix is reported: Lion 2.4e-4, weight decay 0.5, batch 2048, 150 epochs.

    Only a digest of that table was read; treat the values as approximate.
    """
    return imagenet_crate(
        model,
        **dict(
            epochs=150,
            batch_size=2048,
            lr=2.4e-4,
            weight_decay=0.5,
            schedule="cosine",
            warmup_epochs=5,
            min_lr=0.0,
            rand_augment="rand-m9-mstd0.5-inc1",
        )
        | changes,
    )


def finetune_crate(model: str = "crate_base", **changes) -> ClassificationRecipe:
    """CRATE on CIFAR-10/100, Flowers or Pets from ImageNet weights (official `finetune.py`): give `--checkpoint`.

    Evaluation resizes to 224 directly, without a crop.
    """
    return ClassificationRecipe(
        **dict(
            model=model,
            epochs=200,
            batch_size=256,
            optimizer="adamw",
            lr=5e-5,
            weight_decay=0.01,
            schedule="cosine",
            lr_update="epoch",
            warmup_epochs=0,
            min_lr=0.0,
            scale=(0.08, 1.0),
            hflip=0.5,
            color_jitter=None,
            rand_augment="rand-n2-m14",
            img_size=224,
            crop_pct=1.0,
            workers=8,
            precision="bf16",
        )
        | changes
    )


def imagenet21k_crate_alpha(model: str = "crate_alpha_base_p16", **changes) -> ClassificationRecipe:
    """CRATE-alpha's pre-training on ImageNet-21k (official configs): 91 epochs, batch 4096, lr 8e-4.

    The authors keep Adam's first moment in bf16; here it is float32.
    """
    return finetune_crate_alpha(model, **dict(lr=8e-4, rand_augment=None, label_smoothing=0.0) | changes)


def finetune_crate_alpha(model: str = "crate_alpha_base_p16", **changes) -> ClassificationRecipe:
    """CRATE-alpha on ImageNet-1k from its ImageNet-21k weights (official configs): give `--checkpoint`.

    91 epochs, batch 4096, lr 1.6e-4, decoupled weight decay 0.1, clipping at 1.0. The paper's B/16 reaches
    81.2 %, L/14 83.9 %, L/8 85.1 %.
    """
    return ClassificationRecipe(
        **dict(
            model=model,
            epochs=91,
            batch_size=4096,
            optimizer="adamw",
            betas=(0.9, 0.95),
            lr=1.6e-4,
            weight_decay=0.1,
            clip_grad=1.0,
            schedule="cosine",
            warmup_epochs=10,
            warmup_lr=0.0,
            min_lr=1e-6,
            scale=(0.08, 1.0),
            hflip=0.5,
            color_jitter=None,
            interpolation="bilinear",
            rand_augment="rand-n2-m9-inc1",
            label_smoothing=0.1,
            mixup=0.8,
            cutmix=1.0,
            mixup_switch_prob=0.5,
            img_size=224,
            workers=8,
            precision="bf16",
        )
        | changes
    )


RECIPES = {
    "imagenet_crate": imagenet_crate,
    "imagenet_crate_paper": imagenet_crate_paper,
    "finetune_crate": finetune_crate,
    "imagenet21k_crate_alpha": imagenet21k_crate_alpha,
    "finetune_crate_alpha": finetune_crate_alpha,
}
