"""Learning-rate schedules as pure functions of the progress, in epochs: nothing to save, nothing to resume.

Each returns the learning rate itself; a layer's own factor (layer-wise decay) multiplies it afterwards.
"""

from __future__ import annotations

import math


def warmup_cosine(
    epoch: float,
    *,
    lr: float,
    epochs: float,
    warmup_epochs: float = 0.0,
    warmup_lr: float = 0.0,
    min_lr: float = 0.0,
) -> float:
    """Linear warm-up to `lr`, then the cosine to `min_lr` that runs over all `epochs` (timm's convention).

    Args:
        epoch: progress, fractions allowed; beyond `epochs` (cool-down) the value stays at `min_lr`.
        lr: peak learning rate.
        epochs: where the cosine ends.
        warmup_epochs: length of the warm-up.
        warmup_lr: value at epoch 0.
        min_lr: value at the end.
    """
    if epoch < warmup_epochs:
        return warmup_lr + (lr - warmup_lr) * epoch / warmup_epochs
    if epoch >= epochs:
        return min_lr
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * epoch / epochs))


def late_cosine(epoch: float, **schedule: float) -> float:
    """`warmup_cosine` an epoch late, the first epoch twice: SpaRTAN's, whose script steps it with the epoch before."""
    return warmup_cosine(max(epoch - 1, 0), **schedule)


def cosine_after_warmup(
    epoch: float,
    *,
    lr: float,
    epochs: float,
    warmup_epochs: float = 0.0,
    warmup_lr: float = 0.0,
    min_lr: float = 0.0,
    update: float = 0.0,
) -> float:
    """Linear warm-up to `lr`, then a whole cosine from `lr` to `min_lr` (ConvNeXt's and FcaFormer's convention).

    Args:
        epoch: progress, fractions allowed; beyond `epochs` (cool-down) the value stays at `min_lr`.
        lr: peak learning rate.
        epochs: where the cosine ends.
        warmup_epochs: length of the warm-up, and where the cosine begins.
        warmup_lr: value at epoch 0.
        min_lr: value at the end.
        update: length of an update in epochs; the warm-up reaches `lr` with its last one.
    """
    if epoch < warmup_epochs:
        return warmup_lr + (lr - warmup_lr) * epoch / max(update, warmup_epochs - update)
    if epoch >= epochs:
        return min_lr
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * progress))


def crate_multiplier(epoch: int, epochs: int, warmup_epochs: int = 20) -> float:
    """CRATE's factor for a whole epoch: the lower of a linear warm-up and a cosine over all epochs.

    As in the official code: min((e + 1) / (warmup + 1e-8), (1 + cos(pi e / E)) / 2); the peak stays below 1.
    """
    return min((epoch + 1) / (warmup_epochs + 1e-8), (1 + math.cos(math.pi * epoch / epochs)) / 2)


def learning_rate(recipe, epoch: float, updates_per_epoch: float = math.inf) -> float:
    """The learning rate of a recipe after `epoch` epochs of progress (fractions allowed).

    `updates_per_epoch` matters to `cosine_after_warmup` alone, whose warm-up ends with an update.
    """
    if recipe.lr_update == "epoch":
        epoch = float(int(epoch))
    warmup = dict(warmup_epochs=recipe.warmup_epochs, warmup_lr=recipe.warmup_lr)
    if recipe.schedule == "min_cosine":
        return recipe.lr * crate_multiplier(int(epoch), recipe.epochs, int(recipe.warmup_epochs))
    cosine = dict(lr=recipe.lr, epochs=recipe.epochs, min_lr=recipe.min_lr, **warmup)
    if recipe.schedule == "cosine":
        return warmup_cosine(epoch, **cosine)
    if recipe.schedule == "late_cosine":
        return late_cosine(epoch, **cosine)
    if recipe.schedule == "cosine_after_warmup":
        return cosine_after_warmup(epoch, **cosine, update=1 / updates_per_epoch)
    if epoch < recipe.warmup_epochs:
        return recipe.warmup_lr + (recipe.lr - recipe.warmup_lr) * epoch / recipe.warmup_epochs
    if recipe.schedule == "step":
        milestones = recipe.milestones or (2 / 3 * recipe.epochs, 11 / 12 * recipe.epochs)
        return recipe.lr * recipe.step_factor ** sum(epoch >= milestone for milestone in milestones)
    if recipe.schedule == "poly":
        return recipe.min_lr + (recipe.lr - recipe.min_lr) * max(0.0, 1 - epoch / recipe.epochs) ** 0.9
    return recipe.lr
