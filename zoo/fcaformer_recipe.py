"""Learning rates and weight decay of FcaFormer's parameters in the authors' recipes (arXiv 2211.07198).

Pure functions of a parameter's name and rank, and of a step's number; any training loop can use them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from zoo.schedules import cosine_after_warmup


@dataclass(frozen=True)
class OptimizerRecipe:
    """What decides a parameter's learning rate and weight decay.

    `layers` says how the layers are numbered for layer-wise decay: "none" (each learning rate is the base rate),
    "detection" (a stage's downsampling counts with the stage before it, the third stage has several layers) or
    "segmentation" (a layer a stage, all downsampling counts with the stem). A layer's learning rate is
    `base_lr * layer_decay ** (num_layers + 1 - layer)`.
    """

    base_lr: float
    weight_decay: float
    layers: Literal["none", "detection", "segmentation"] = "none"
    layer_decay: float = 1.0
    num_layers: int = 6


IMAGENET = OptimizerRecipe(base_lr=2e-3, weight_decay=0.05)
MASK_RCNN_3X = OptimizerRecipe(base_lr=1e-4, weight_decay=0.05, layers="detection", layer_decay=0.95)
CASCADE_MASK_RCNN_3X = OptimizerRecipe(base_lr=2e-4, weight_decay=0.05, layers="detection", layer_decay=0.7)
UPERNET_160K = OptimizerRecipe(base_lr=1e-4, weight_decay=0.01, layers="segmentation", layer_decay=0.9)

_CROSS_TABLES = ("cross_scale", "cross_bias")
_POSITION_BIASES = ("cross_bias", "offset_bias")


def layer_index(name: str, recipe: OptimizerRecipe = IMAGENET) -> int:
    """The layer that a parameter counts with: 0 for the stem, `num_layers + 1` for what follows the stages.

    Args:
        name: the parameter's name inside the backbone.
        recipe: its `layers` and `num_layers` decide.
    """
    last = recipe.num_layers + 1
    if recipe.layers == "none":
        return last
    if name.startswith("stem.") or name.endswith(_CROSS_TABLES):
        return 0
    found = re.match(r"stages\.(\d+)\.(downsample|blocks\.(\d+))\.", name)
    if found is None:
        return last
    stage, downsample = int(found[1]), found[2] == "downsample"
    if recipe.layers == "segmentation":
        return 0 if downsample else stage + 1
    if downsample:  # officially the end of the stage before
        return (0, 2, 3)[stage - 1]
    return (1, 2, 3 + int(found[3] or 0) // 3, recipe.num_layers)[stage]


def is_decayed(name: str, ndim: int, recipe: OptimizerRecipe = IMAGENET) -> bool:
    """Whether weight decay applies: not to vectors and biases; to position tables except in segmentation."""
    if ndim <= 1 or name.endswith(".bias"):
        return False
    return not (recipe.layers == "segmentation" and (name.endswith(_POSITION_BIASES) or "norm" in name))


def optimizer_groups(model: nn.Module, recipe: OptimizerRecipe = IMAGENET) -> list[dict[str, Any]]:
    """Parameter groups for `torch.optim`, by layer and weight decay.

    Args:
        model: an `FcaFormer` or `FcaFormerDense`, or a detector or segmenter that contains one.
        recipe: `IMAGENET`, `MASK_RCNN_3X`, `CASCADE_MASK_RCNN_3X`, `UPERNET_160K` or one of your own.

    Returns:
        Groups with `params`, `lr`, `weight_decay`, and for schedulers and logs `lr_scale`, `layer`,
        `param_names`. Frozen parameters are left out.

    Raises:
        ValueError: the model contains no FcaFormer, or more than one.
    """
    prefix = _backbone_prefix(model)
    groups: dict[tuple[int, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inside = name.startswith(prefix)
        layer = layer_index(name[len(prefix) :], recipe) if inside else recipe.num_layers + 1
        decay = recipe.weight_decay if is_decayed(name, parameter.ndim, recipe) else 0.0
        if (layer, decay) not in groups:
            scale = recipe.layer_decay ** (recipe.num_layers + 1 - layer)
            groups[layer, decay] = dict(
                params=[],
                param_names=[],
                lr=recipe.base_lr * scale,
                lr_scale=scale,
                weight_decay=decay,
                layer=layer,
            )
        groups[layer, decay]["params"].append(parameter)
        groups[layer, decay]["param_names"].append(name)
    return [groups[key] for key in sorted(groups)]


def _backbone_prefix(model: nn.Module) -> str:
    from zoo.fcaformer import FcaFormer, FcaFormerDense

    found = [name for name, module in model.named_modules() if isinstance(module, FcaFormer | FcaFormerDense)]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} contains {len(found)} FcaFormer backbones: pass a model with exactly one"
        )
    return f"{found[0]}." if found[0] else ""


def learning_rate(
    step: int,
    steps_per_epoch: int,
    epochs: int = 300,
    warmup_epochs: int = 20,
    base: float = 2e-3,
    minimum: float = 1e-6,
    start: float = 0.0,
) -> float:
    """The ImageNet recipe's learning rate of iteration `step` (from 0): linear warm-up, then a cosine.

    The warm-up reaches `base` with its last iteration, the cosine starts from `base` with the next one.

    Raises:
        ValueError: `step` is outside the schedule.
    """
    total = epochs * steps_per_epoch
    if not 0 <= step < total:
        raise ValueError(f"step={step} is outside the schedule: pass 0 to {total - 1}")
    return cosine_after_warmup(
        step / steps_per_epoch,
        lr=base,
        epochs=epochs,
        warmup_epochs=warmup_epochs,
        warmup_lr=start,
        min_lr=minimum,
        update=1 / steps_per_epoch,
    )
