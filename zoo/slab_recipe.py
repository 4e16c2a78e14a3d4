"""How SLAB's authors train: learning rate of every update and weight decay of every parameter.

AdamW (0.9, 0.999), batches of 1024 (8 x 128; PVT-S, SLAB-PVT-M and Swin-B 512, CSwin-T 2048), 300 epochs.
RandAugment m9-mstd0.5, random erasing 0.25, mixup 0.8, cutmix 1.0, label smoothing 0.1; gradients clipped at 5
(PVT and CSwin: not, PVT-M: 1). After the last epoch 10 epochs of `zoo.prepbn.recalibrate`.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from torch import nn

from zoo.schedules import warmup_cosine

WEIGHT_DECAY = 0.05


@dataclass(frozen=True)
class LearningRates:
    """Learning rates of a run, for batches of 512 images; `scaled` gives those of another size.

    Attributes:
        base: after the warm-up.
        minimum: at the end.
        start: of the warm-up.
        warmup_epochs: length of the warm-up.
        epochs: length of the cosine, the warm-up included.
        cooldown_epochs: epochs at the minimum after it.
    """

    base: float = 5e-4
    minimum: float = 5e-6
    start: float = 5e-7
    warmup_epochs: int = 20
    epochs: int = 300
    cooldown_epochs: int = 0

    def scaled(self, batch_size: int) -> LearningRates:
        """The rates for batches of `batch_size` images on all devices together: proportional."""
        share = batch_size / 512
        return LearningRates(
            self.base * share,
            self.minimum * share,
            self.start * share,
            self.warmup_epochs,
            self.epochs,
            self.cooldown_epochs,
        )

    def at(self, update: int, updates_per_epoch: int) -> float:
        """The learning rate after `update` updates."""
        return learning_rate(
            update, updates_per_epoch, self.epochs, self.warmup_epochs, self.base, self.minimum, self.start
        )


RECIPES = {
    "deit": LearningRates(),
    "swin": LearningRates(),
    "pvt": LearningRates(minimum=1e-5, start=1e-6, warmup_epochs=5, cooldown_epochs=10),
    "cswin": LearningRates(minimum=1e-5, start=1e-6, cooldown_epochs=10),
}


def learning_rate(
    update: int,
    updates_per_epoch: int,
    epochs: int = 300,
    warmup_epochs: int = 20,
    base: float = 1e-3,
    minimum: float = 1e-5,
    start: float = 1e-6,
) -> float:
    """The learning rate after `update` updates: a linear warm-up inside a cosine that began at update 0.

    Args:
        update: updates made so far.
        updates_per_epoch: length of an epoch.
        epochs: of the cosine; the rate stays at `minimum` after them.
        warmup_epochs: of the warm-up.
        base: amplitude of the cosine.
        minimum: its end.
        start: where the warm-up begins.
    """
    return warmup_cosine(
        update / updates_per_epoch,
        lr=base,
        epochs=epochs,
        warmup_epochs=warmup_epochs,
        warmup_lr=start,
        min_lr=minimum,
    )


def optimizer_groups(model: nn.Module, weight_decay: float = WEIGHT_DECAY) -> list[dict[str, Any]]:
    """Parameter groups with the authors' weight decay, for any `torch.optim` class.

    Not decayed: tensors with one axis (norms, alpha), biases, and what `model.no_weight_decay()` names. The keys'
    position tables, PVT's position tables and the depthwise kernels are decayed.

    Returns:
        Groups with `params`, `param_names` and `weight_decay`; frozen parameters are in none.
    """
    patterns = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    groups = {True: ([], []), False: ([], [])}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim <= 1 or name.endswith(".bias") or any(fnmatch(name, p) for p in patterns)
            groups[not plain][0].append(name)
            groups[not plain][1].append(parameter)
    return [
        dict(params=parameters, param_names=names, weight_decay=weight_decay if decayed else 0.0)
        for decayed, (names, parameters) in groups.items()
        if names
    ]
