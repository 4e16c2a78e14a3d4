"""PRepBN: a LayerNorm that turns into a foldable BatchNorm in the course of training (arXiv 2405.11582, 3.2).

    RepBN(x)  = BN(x) + alpha x                               alpha is one learned scalar
    PRepBN(x) = gamma LN(x) + (1 - gamma) RepBN(x)            gamma falls linearly from 1 to 0

Transformers train badly with BatchNorm from the start; with a LayerNorm that fades out they do not. After
training gamma is 0, every norm is an affine map of each channel, and `fold_into_linear` and its like merge it
into the layer beside it, where it costs nothing.

The steps are counted in buffers under the authors' names (`warm`, `iter`, `total_step`), as they do, once in
each forward pass in train mode. `PRepBNSchedule` counts optimizer steps instead. Unlike the authors' modules,
these read no counter on the host (no synchronisation with a GPU), and neither counters nor statistics advance
when activation checkpointing repeats a block (`checkpoint_block`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import use_reentrant_ckpt
from timm.models import checkpoint, register_notrace_module
from torch import Tensor, nn

__all__ = [
    "PRepBN",
    "PRepBNSchedule",
    "RepBN",
    "checkpoint_block",
    "fold_into_conv",
    "fold_into_linear",
    "fold_out_of_conv",
    "gamma_at",
    "recalibrate",
    "recalibrating",
    "set_gamma",
]


class _Repetition(threading.local):
    """Whether the running forward pass repeats one that was made before, for the sake of its gradients."""

    active = False


_repetition = _Repetition()


@contextmanager
def _repeating() -> Iterator[None]:
    _repetition.active = True
    try:
        yield
    finally:
        _repetition.active = False


def _is_repetition() -> bool:
    return not torch.compiler.is_compiling() and _repetition.active


def checkpoint_block(block: nn.Module, x: Tensor) -> Tensor:
    """`block(x)`, recomputed in the backward pass; PRepBN's counters and BatchNorm's statistics advance once.

    With timm's reentrant checkpoints they advance twice, as in the authors' code.
    """
    if use_reentrant_ckpt() or torch.compiler.is_compiling():
        return checkpoint(block, x)
    return checkpoint(block, x, context_fn=lambda: (nullcontext(), _repeating()))


@register_notrace_module
class RepBN(nn.Module):
    """BN(x) + alpha x over the last axis: (..., C) -> (..., C); statistics run over all other axes."""

    def __init__(self, dim: int, bn_eps: float = 1e-5, momentum: float = 0.1, device=None, dtype=None):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, device=device, dtype=dtype))
        self.bn = nn.BatchNorm1d(dim, eps=bn_eps, momentum=momentum, device=device, dtype=dtype)

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """The identity path at 1, BatchNorm and its statistics as new."""
        nn.init.ones_(self.alpha)
        self.bn.reset_parameters()

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift (C,) that the module applies in eval mode."""
        bn = self.bn
        scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
        return scale + self.alpha, bn.bias - scale * bn.running_mean

    def normalize(self, x: Tensor) -> Tensor:
        """The BatchNorm alone; a repeated forward pass leaves its statistics as they are."""
        if not torch.jit.is_scripting():  # noqa: SIM102 - a condition of its own is what scripting understands
            if self.bn.training and _is_repetition():
                return self._normalize_again(x)
        return self.bn(x.reshape(-1, x.shape[-1])).view(x.shape)

    @torch.jit.unused
    def _normalize_again(self, x: Tensor) -> Tensor:
        momentum, self.bn.momentum = self.bn.momentum, 0.0
        y = self.bn(x.reshape(-1, x.shape[-1])).view(x.shape)
        self.bn.momentum = momentum
        self.bn.num_batches_tracked.sub_(1)
        return y

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        if self.bn.training:
            return torch.addcmul(self.normalize(x), x, self.alpha)
        scale, shift = self.affine()
        return torch.addcmul(shift, x, scale)


@register_notrace_module
class PRepBN(nn.Module):
    """gamma LN(x) + (1 - gamma) RepBN(x) in train mode, RepBN(x) in eval mode: (..., C) -> (..., C).

    Args:
        dim: channels.
        eps: of the LayerNorm.
        total_steps: forward passes in train mode until gamma is 0.
        warm_steps: forward passes with the LayerNorm alone before that; BatchNorm's statistics wait as well.
        initial_gamma: where gamma starts (the authors' r0).
        bn_eps: of the BatchNorm.
        momentum: of the BatchNorm's statistics.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        total_steps: int = 300000,
        warm_steps: int = 0,
        initial_gamma: float = 1.0,
        bn_eps: float = 1e-5,
        momentum: float = 0.1,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if total_steps < 1:
            raise ValueError(f"total_steps={total_steps}: gamma needs at least 1 step to fall to 0")
        self.total_steps = total_steps
        self.warm_steps = warm_steps
        self.initial_gamma = initial_gamma
        self.counting = True  # False: a schedule sets the counters
        self.warming = warm_steps > 0  # known on the host: whether `warm` may be above 0
        counter = dict(dtype=torch.int64, device=device)
        self.register_buffer("warm", torch.full((), warm_steps, **counter))
        self.register_buffer("iter", torch.full((), total_steps, **counter))
        self.register_buffer("total_step", torch.full((), total_steps, **counter))
        self.register_buffer("last", torch.full((), total_steps, **counter), persistent=False)  # `iter` as last used
        self.norm1 = nn.LayerNorm(dim, eps=eps, device=device, dtype=dtype)
        self.norm2 = RepBN(dim, bn_eps, momentum, device=device, dtype=dtype)

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Parameters, statistics and counters as new."""
        self.norm1.reset_parameters()
        self.norm2.reset_parameters()
        self.counting, self.warming = True, self.warm_steps > 0
        self.warm.fill_(self.warm_steps)
        for counter in (self.iter, self.total_step, self.last):
            counter.fill_(self.total_steps)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if not self.warm.is_meta:
            self.warming = bool(self.warm > 0)
            self.last.copy_(self.iter)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift (C,) that the module applies in eval mode."""
        return self.norm2.affine()

    def next_gamma(self) -> Tensor:
        """gamma of this forward pass, a float32 scalar; advances the counters."""
        if not torch.jit.is_scripting():  # noqa: SIM102
            if _is_repetition():
                return self._gamma(self.last.clone())
        left = self.iter.clone()
        if self.warming:
            left = torch.where(self.warm > 0, torch.full_like(left, -1), left)
        self.last.copy_(left)
        if self.counting:
            self.iter.sub_(((self.warm == 0) & (self.iter > 0)).long())
            if self.warming:
                self.warm.sub_((self.warm > 0).long())
        return self._gamma(left)

    def _gamma(self, left: Tensor) -> Tensor:
        gamma = self.initial_gamma * left.float() / self.total_step
        return torch.where(left < 0, torch.ones_like(gamma), gamma) if self.warming else gamma

    def normalize(self, x: Tensor) -> Tensor:
        """The BatchNorm alone, whose statistics stay as they are while the LayerNorm is alone."""
        bn = self.norm2.bn
        if not self.warming or not bn.training:
            return self.norm2.normalize(x)
        if not torch.jit.is_scripting():  # noqa: SIM102
            if _is_repetition():
                return self.norm2.normalize(x)
        # copies, which the backward pass keeps: it refuses statistics that were set back in place
        mean, var = bn.running_mean.clone(), bn.running_var.clone()
        rows = x.reshape(-1, x.shape[-1])
        y = F.batch_norm(rows, mean, var, bn.weight, bn.bias, True, bn.momentum, bn.eps)
        waiting = self.last < 0
        bn.running_mean.copy_(torch.where(waiting, bn.running_mean, mean))
        bn.running_var.copy_(torch.where(waiting, bn.running_var, var))
        bn.num_batches_tracked.add_((~waiting).long())
        return y.view(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        if not self.training:
            return self.norm2(x)
        gamma = self.next_gamma()
        rest = 1 - gamma
        # the blend's factors go into the norms' parameters, C values instead of passes over x; both branches
        # always run, so that every parameter has a gradient at every gamma
        shape = [x.shape[-1]]
        y = F.layer_norm(x, shape, self.norm1.weight * gamma, self.norm1.bias * gamma, self.norm1.eps)
        y = torch.addcmul(y, self.normalize(x), rest)
        return torch.addcmul(y, x, rest * self.norm2.alpha)


def _norms(model: nn.Module) -> list[PRepBN]:
    return [module for module in model.modules() if isinstance(module, PRepBN)]


# The schedule


def gamma_at(step: int, total_steps: int, warm_steps: int = 0) -> float:
    """gamma of training step `step` (from 0): 1 in the warm-up, then falling to 0 in `total_steps` steps."""
    return min(1.0, max(0.0, 1.0 - (step - warm_steps) / total_steps))


def set_gamma(model: nn.Module, gamma: float) -> None:
    """Fix gamma of every PRepBN in `model`, as a multiple of 1 / total_step; they stop counting by themselves.

    Raises:
        ValueError: gamma is not within 0 and 1.
    """
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma={gamma}: PRepBN blends with a share between 0 (RepBN) and 1 (LayerNorm)")
    for norm in _norms(model):
        norm.counting, norm.warming = False, False
        norm.warm.zero_()
        norm.iter.copy_(torch.round(norm.total_step * gamma))


@dataclass(frozen=True)
class PRepBNSchedule:
    """Drives gamma by optimizer steps: call `before_step(model, step)` ahead of each step's forward passes.

    The state is in the model's counters and in the step's number; a resumed run needs nothing else. Other
    forward passes in train mode (accumulated gradients, checkpointing, adversarial steps) do not count.

    Attributes:
        total_steps: optimizer steps until gamma is 0.
        warm_steps: optimizer steps with the LayerNorm alone before that.
    """

    total_steps: int
    warm_steps: int = 0

    def __post_init__(self) -> None:
        if self.total_steps < 1 or self.warm_steps < 0:
            raise ValueError(
                f"total_steps={self.total_steps} and warm_steps={self.warm_steps}: gamma needs at least 1 step to "
                "fall, after 0 or more warm-up steps"
            )

    @classmethod
    def of_training(cls, training_steps: int, share: float = 0.8, warm_steps: int = 0) -> PRepBNSchedule:
        """gamma falls during `share` of the training, after the warm-up; the authors advise 4/5."""
        return cls(max(1, round(share * training_steps) - warm_steps), warm_steps)

    def gamma(self, step: int) -> float:
        """gamma of training step `step`, from 0."""
        return gamma_at(step, self.total_steps, self.warm_steps)

    def before_step(self, model: nn.Module, step: int) -> float:
        """Set every PRepBN in `model` for training step `step` and return its gamma."""
        warm = max(0, self.warm_steps - step)
        left = min(self.total_steps, max(0, self.total_steps + self.warm_steps - step))
        for norm in _norms(model):
            norm.counting, norm.warming = False, warm > 0
            norm.warm.fill_(warm)
            norm.iter.fill_(left)
            norm.total_step.fill_(self.total_steps)
        return self.gamma(step)


@contextmanager
def recalibrating(model: nn.Module) -> Iterator[nn.Module]:
    """Within it forward passes renew BatchNorm's statistics and do nothing else of a training step.

    Eval mode (no stochastic depth, gamma at 0) with every BatchNorm in train mode, no gradients; the modules'
    modes return afterwards. The authors run 10 epochs of training images without mixup after the last epoch,
    which repairs the shift of the variances that stochastic depth leaves behind.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module, training in modes:
            module.training = training


def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Renew BatchNorm's statistics on `batches` of images; returns how many there were."""
    count = 0
    with recalibrating(model):
        for images in batches:
            model(images)
            count += 1
    return count


# The inference form: (a x + b) disappears in the layer before or after it. Computed in float64, so that the
# rounding of float32 weights happens once.


def _eval_affine(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    if not isinstance(norm, PRepBN | RepBN):
        return None
    repbn = norm.norm2 if isinstance(norm, PRepBN) else norm
    bn = repbn.bn
    scale = bn.weight.double() * torch.rsqrt(bn.running_var.double() + bn.eps)
    return scale + repbn.alpha.double(), bn.bias.double() - scale * bn.running_mean.double()


def _set(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    dtype = layer.weight.dtype
    layer.weight.data = weight.to(dtype)
    if layer.bias is None:
        layer.bias = nn.Parameter(bias.to(dtype), requires_grad=layer.weight.requires_grad)
    else:
        layer.bias.data = bias.to(dtype)


def _bias(layer: nn.Module) -> Tensor:
    if layer.bias is None:
        return layer.weight.new_zeros(layer.weight.shape[0], dtype=torch.float64)
    return layer.bias.double()


@torch.no_grad()
def fold_into_linear(norm: nn.Module, *linears: nn.Linear) -> nn.Module:
    """Merge `norm` into the linear layers that read it; returns what takes its place.

    A layer without bias gains one. Other norms than RepBN and PRepBN stay.
    """
    affine = _eval_affine(norm)
    if affine is None:
        return norm
    scale, shift = affine
    for linear in linears:
        weight = linear.weight.double()
        _set(linear, weight * scale, _bias(linear) + weight @ shift)
    return nn.Identity()


@torch.no_grad()
def fold_into_conv(norm: nn.Module, *convs: nn.Conv2d) -> nn.Module:
    """Merge `norm` into the convolutions, without padding or groups, that read it; returns what takes its place."""
    affine = _eval_affine(norm)
    if affine is None:
        return norm
    scale, shift = affine
    for conv in convs:
        weight = conv.weight.double()
        _set(conv, weight * scale.view(1, -1, 1, 1), _bias(conv) + weight.sum((2, 3)) @ shift)
    return nn.Identity()


@torch.no_grad()
def fold_out_of_conv(conv: nn.Conv2d, norm: nn.Module) -> nn.Module:
    """Merge `norm` into the convolution whose output it reads; returns what takes its place."""
    affine = _eval_affine(norm)
    if affine is None:
        return norm
    scale, shift = affine
    _set(conv, conv.weight.double() * scale.view(-1, 1, 1, 1), scale * _bias(conv) + shift)
    return nn.Identity()
