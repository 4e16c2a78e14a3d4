"""Inference forms: the same function with fewer operations (folded norms, scales and parallel branches).

A zoo block folds through timm's hooks (`reparameterize()` in place, or `fuse()` returning a replacement),
so `timm.utils.reparameterize_model` works too; `fold` also folds the root and, through `register_fold`,
blocks of timm's own classes, which timm would leave as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

_folds: dict[type[nn.Module], Callable[[nn.Module], nn.Module | None]] = {}


def register_fold(module_class: type[nn.Module]) -> Callable:
    """Register the decorated function as the fold of exactly `module_class` (not of its subclasses).

    The function changes the module in place and returns None, or returns its replacement.
    """

    def register(function: Callable[[nn.Module], nn.Module | None]):
        _folds[module_class] = function
        return function

    return register


def fold(model: nn.Module, inplace: bool = False) -> nn.Module:
    """The inference form of `model`: equal outputs, fewer operations, in eval mode, not for training.

    Args:
        model: any module; what has no inference form stays as it is.
        inplace: change `model` itself instead of a copy.

    Returns:
        The folded model. Its state dict has other entries than the trained one: load weights first.
    """
    if not inplace:
        model = copy.deepcopy(model)
    return _fold(model.eval())


def _fold(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        folded = _fold(child)
        if folded is not child:
            setattr(module, name, folded)
    if type(module) in _folds:
        return _folds[type(module)](module) or module
    if hasattr(module, "fuse"):
        return module.fuse()
    if hasattr(module, "reparameterize"):
        module.reparameterize()
    elif hasattr(module, "switch_to_deploy"):
        module.switch_to_deploy()
    return module
