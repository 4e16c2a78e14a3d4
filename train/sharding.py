"""Fully sharded training: parameters, gradients and optimiser states in equal parts on every process.

`shard(model, device)` splits a model in place (torch's `fully_shard`): it keeps its class and its names, and a
step gathers one unit's weights at a time. Files do not know of it: what is saved is whole (`whole`), what is
loaded is split (`SplitCheckpointHook`), so that a run may go on with another number of processes, or
unsharded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from zoo.extras import require

require("mmengine", extra="train")

from mmengine.hooks import Hook  # noqa: E402
from mmengine.runner import ValLoop  # noqa: E402

# Below this a unit's gather costs more in latency than it saves in memory.
_UNIT_PARAMETERS = 1_000_000
# Ways into a model besides its forward pass that need the root's weights gathered too.
_ENTRANCES = ("upscale",)


def shard(model: nn.Module, device: str, unit_parameters: int = _UNIT_PARAMETERS) -> nn.Module:
    """Split a model's parameters over all processes, in place.

    A unit, whose weights are gathered together, is an element of a `ModuleList` or `Sequential` (a block) with at
    least `unit_parameters` parameters that no unit inside it has taken; the rest belongs to the root. Of a detector
    or segmenter only the backbone has units: heads reach into their layers past the layers' forward pass, where
    nothing would gather. Buffers stay whole on every process.

    Args:
        model: the network, the same on every process; its optimiser is made afterwards.
        device: type of the device that it is trained on, "cuda" or "cpu".
        unit_parameters: least size of a unit.
    """
    mesh = torch.distributed.init_device_mesh(device.split(":")[0], (torch.distributed.get_world_size(),))
    model.to(device)
    blank = copy.deepcopy(model).to("meta")
    _shard_units(getattr(model, "backbone", model), mesh, unit_parameters)
    fully_shard(model, mesh=mesh)
    for name in _ENTRANCES:
        if hasattr(model, name):
            torch.distributed.fsdp.register_fsdp_forward_method(model, name)

    def copied(memo: dict) -> nn.Module:
        # torch refuses to copy a sharded module; weight averaging needs a copy, split in the same way
        twin = copy.deepcopy(blank).to_empty(device=device)
        _shard_units(getattr(twin, "backbone", twin), mesh, unit_parameters)
        fully_shard(twin, mesh=mesh)
        with torch.no_grad():
            for mine, its in zip(twin.parameters(), model.parameters()):
                mine.to_local().copy_(its.to_local())
            for mine, its in zip(twin.buffers(), model.buffers()):
                mine.copy_(its)
        return twin

    model.__deepcopy__ = copied
    return model


def _shard_units(module: nn.Module, mesh: Any, least: int) -> int:
    """Make units of the blocks inside; gives the number of parameters that no unit has taken."""
    free = sum(p.numel() for p in module.parameters(recurse=False))
    for child in module.children():
        inside = _shard_units(child, mesh, least)
        if isinstance(module, nn.ModuleList | nn.Sequential) and inside >= least and _has_forward(child):
            fully_shard(child, mesh=mesh)
            inside = 0
        free += inside
    return free


def _has_forward(module: nn.Module) -> bool:
    return not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList)


def is_sharded(model: nn.Module) -> bool:
    """Whether some part of the model was split by `shard`."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def whole(tree: Any) -> Any:
    """The same nested lists and dicts with whole tensors on the CPU. Every process must call it: parts are gathered."""
    if isinstance(tree, DTensor):
        return tree.full_tensor().cpu()
    if isinstance(tree, Tensor):
        return tree.cpu()
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map(whole, tree))
    return tree


def split_like(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole tensor, split as `parameter` is; as it is if that is whole or of another shape."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor) or value.shape != parameter.shape:
        return value
    # every process has read the same file: nothing needs sending
    mesh = parameter.device_mesh
    return distribute_tensor(value.to(parameter.device), mesh, parameter.placements, src_data_rank=None)


class SplitCheckpointHook(Hook):
    """Splits what is loaded as the model is split, before any other hook or the model sees it."""

    priority = "HIGHEST"

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Turn a whole checkpoint into this process's part, in place."""
        own = runner.model.state_dict()
        for key, prefix in (("state_dict", ""), ("ema_state_dict", "module.")):
            state = checkpoint.get(key, {})
            for name, value in state.items():
                target = own.get(name.removeprefix(prefix))
                if target is not None:
                    state[name] = split_like(value, target)
        if "optimizer" in checkpoint:
            groups = runner.optim_wrapper.optimizer.param_groups
            parameters = [p for group in groups for p in group["params"]]
            for number, state in checkpoint["optimizer"]["state"].items():
                for name, value in state.items():
                    if isinstance(value, Tensor):
                        state[name] = split_like(value, parameters[number])


class GatheredValLoop(ValLoop):
    """An evaluation with the weights gathered once.

    The processes may evaluate different numbers of pictures, so that none may wait for another one's gather.
    """

    def run(self) -> dict[str, float]:
        """Evaluate."""
        runner = self.runner
        runner.call_hook("before_val")
        runner.call_hook("before_val_epoch")
        runner.model.eval()
        with gathered(runner.model):
            for index, batch in enumerate(self.dataloader):
                self.run_iter(index, batch)
        metrics = self.evaluator.evaluate(len(self.dataloader.dataset))
        runner.call_hook("after_val_epoch", metrics=metrics)
        runner.call_hook("after_val")
        return metrics


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Every process holds all weights inside the block; they must not be changed there."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(True, recurse=False)
