"""The classification objective: what happens between a batch of photographs and a loss.

Images arrive as uint8; normalising, erasing, mixing and distilling happen on the device, a batch at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup, resolve_data_config
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn

from zoo.extras import require

require("mmengine", extra="train")

from mmengine.model import BaseDataPreprocessor, BaseModel  # noqa: E402


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite; raised before the optimiser could spoil the weights with it."""


class ClassificationPreprocessor(BaseDataPreprocessor):
    """uint8 (B, C, H, W) to normalised float, and in training random erasing, mixup and CutMix.

    Args:
        mean: of the channels, in 0..1.
        std: of the channels, in 0..1.
        mixup: timm's mixup, or None.
        random_erasing: probability.
        erasing_mode: erase with noise ("pixel"), one random colour ("rand") or zeros ("const").
        channels_last: give the batch in NHWC memory order.
    """

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        mixup: Mixup | None = None,
        random_erasing: float = 0.0,
        erasing_mode: str = "pixel",
        channels_last: bool = False,
    ):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.mixup = mixup
        self.random_erasing = random_erasing
        self.erasing_mode = erasing_mode
        self.channels_last = channels_last

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 or 0..1 images to zero mean and unit variance."""
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype).div_(255)
        return images.sub(self.mean).div_(self.std)

    def forward(self, data: dict[str, Tensor], training: bool = False, mix: bool = True) -> dict[str, Tensor]:
        """Move a batch to the device and prepare it for the model; in training erase and, with `mix`, mix it."""
        data = self.cast_data(data)
        inputs, targets = self.normalize(data["inputs"]), data["targets"]
        if training and self.random_erasing:
            erase = RandomErasing(probability=self.random_erasing, mode=self.erasing_mode, device=inputs.device)
            inputs = erase(inputs)
        if training and mix and self.mixup is not None:
            inputs, targets = self._mix(inputs, targets)
        if self.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return {"inputs": inputs, "targets": targets, "keys": data["keys"]}

    def _mix(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if len(inputs) % 2 == 0:
            return self.mixup(inputs, targets)
        # timm mixes pairs; the odd image out is mixed with the first one
        mixed, soft = self.mixup(torch.cat([inputs, inputs[:1]]), torch.cat([targets, targets[:1]]))
        return mixed[:-1], soft[:-1]


class _Unregistered:
    """Holds a module that is no part of the model's state: not saved, not averaged, not copied."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __deepcopy__(self, memo: dict) -> _Unregistered:
        return self


class Classification(BaseModel):
    """A timm-style model with its loss, in the form that mmengine's Runner trains and evaluates.

    Args:
        model: (B, C, H, W) -> (B, classes) logits.
        preprocessor: see `ClassificationPreprocessor`.
        multilabel: several classes may be right at once: sigmoid and binary cross entropy.
        label_smoothing: for hard targets; mixed targets are smoothed by the mixer.
        teacher: model that was trained on the same classes, or None.
        distill_weight: weight of the teacher's labels in the loss.
        distill_temperature: temperature of the teacher's labels.
        remember_teacher: keep the teacher's answer to each key, for images that come back unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocessor: ClassificationPreprocessor,
        *,
        multilabel: bool = False,
        label_smoothing: float = 0.0,
        teacher: nn.Module | None = None,
        distill_weight: float = 0.7,
        distill_temperature: float = 2.0,
        remember_teacher: bool = False,
    ):
        super().__init__(data_preprocessor=preprocessor)
        self.model = model
        self.multilabel = multilabel
        self.label_smoothing = label_smoothing
        self.distill_weight = distill_weight
        self.distill_temperature = distill_temperature
        self.answers: dict[int, Tensor] | None = {} if remember_teacher else None
        self.teacher = None
        if teacher is not None:
            cfg = resolve_data_config({}, model=teacher)
            self.teacher = _Unregistered(teacher.eval().requires_grad_(False))
            self.teacher_size = cfg["input_size"][-2:]
            self.teacher_statistics = tuple(torch.tensor(cfg[k]).view(1, -1, 1, 1) for k in ("mean", "std"))

    def init_weights(self) -> None:
        """Nothing: the model comes with its weights, and mmengine must not draw them anew."""

    def forward(
        self, inputs: Tensor, targets: Tensor | None = None, keys: Tensor | None = None, mode: str = "tensor"
    ) -> Any:
        """mmengine's protocol: `loss` gives {"loss": ...}, `predict` a list of scores, `tensor` the logits."""
        logits = self.model(inputs)
        if mode == "loss":
            return {"loss": self.loss(logits, inputs, targets, keys)}
        if mode == "predict":
            return [{"logits": row, "target": target} for row, target in zip(logits.float().cpu(), targets.cpu())]
        return logits

    def loss(self, logits: Tensor, inputs: Tensor, targets: Tensor, keys: Tensor | None = None) -> Tensor:
        """Cross entropy (binary for multi-label) with the true labels, the teacher's mixed in by weight."""
        logits = logits.float()
        if self.multilabel:
            loss = F.binary_cross_entropy_with_logits(logits, targets)
        else:
            smoothing = self.label_smoothing if targets.dtype == torch.int64 else 0.0
            loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        if self.teacher is None:
            return loss
        return (1 - self.distill_weight) * loss + self.distill_weight * self._distillation(logits, inputs, keys)

    def _distillation(self, logits: Tensor, inputs: Tensor, keys: Tensor | None) -> Tensor:
        """KL divergence from the teacher's softened labels, times T^2 (Hinton et al., 2015, section 2)."""
        T = self.distill_temperature
        taught = self._teach(inputs, keys)
        if self.multilabel:
            return F.binary_cross_entropy_with_logits(logits / T, torch.sigmoid(taught / T)) * T * T
        log_p, log_q = F.log_softmax(logits / T, dim=1), F.log_softmax(taught / T, dim=1)
        return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * T * T

    def _teach(self, inputs: Tensor, keys: Tensor | None) -> Tensor:
        if self.answers is not None and keys is not None:
            known = [self.answers.get(key) for key in keys.tolist()]
            if all(answer is not None for answer in known):
                return torch.stack(known)
        teacher = self.teacher.module.to(inputs.device)
        # float32 whatever the student uses: a depthwise network in bf16 is several times slower on a CPU
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=inputs.device.type != "cpu"):
            taught = teacher(self._as_the_teacher_sees(inputs)).float()
        if self.answers is not None and keys is not None:
            self.answers.update(zip(keys.tolist(), taught))
        return taught

    def _as_the_teacher_sees(self, inputs: Tensor) -> Tensor:
        own = self.data_preprocessor
        mean, std = (s.to(inputs) for s in self.teacher_statistics)
        images = (inputs * own.std + own.mean - mean) / std
        if images.shape[-2:] != self.teacher_size:
            images = F.interpolate(images, self.teacher_size, mode="bilinear", antialias=True)
        return images

    def parse_losses(self, losses: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum and log variables of the losses.

        Raises:
            NonFiniteLossError: before a NaN reaches the weights.
        """
        loss, log_vars = super().parse_losses(losses)
        if not torch.isfinite(loss):
            raise NonFiniteLossError(f"the loss is {loss.item()}")
        return loss, log_vars
