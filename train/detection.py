"""The detection objective: from images with boxes to a detector's losses, and to detections in evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.extras import require
from zoo.train.classification import NonFiniteLossError

require("mmengine", extra="train")

from mmengine.model import BaseDataPreprocessor, BaseModel  # noqa: E402


class DetectionPreprocessor(BaseDataPreprocessor):
    """Images and targets to the device. The detector itself scales, normalises, resizes and pads.

    Args:
        channels_last: give the images in NHWC memory order.
    """

    def __init__(self, *, channels_last: bool = False):
        super().__init__()
        self.channels_last = channels_last

    def forward(self, data: dict[str, Any], training: bool = False, **options: Any) -> dict[str, Any]:
        """A batch of `collate_detection` on the device."""
        data = self.cast_data(data)
        if self.channels_last:
            images = [i[None].contiguous(memory_format=torch.channels_last)[0] for i in data["inputs"]]
            data = {**data, "inputs": images}
        return data


class DetectorObjective(BaseModel):
    """A detector of `zoo.create_detector` in the form that mmengine's Runner trains and evaluates.

    Args:
        model: the detector; its training images come in their final size where `resize_in_training` is off.
        preprocessor: see `DetectionPreprocessor`.
    """

    def __init__(self, model: nn.Module, preprocessor: DetectionPreprocessor | None = None):
        super().__init__(data_preprocessor=preprocessor or DetectionPreprocessor())
        self.model = model

    def init_weights(self) -> None:
        """Nothing: the model comes with its weights, and mmengine must not draw them anew."""

    def forward(
        self,
        inputs: Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]] | None = None,
        keys: Tensor | None = None,
        mode: str = "tensor",
    ) -> Any:
        """mmengine's protocol: `loss` gives a dict of losses, `predict` and `tensor` a dict for each image."""
        if mode == "loss":
            # mmengine adds up what has "loss" in its name
            losses = self.model(inputs, targets)
            return {k if "loss" in k else f"loss_{k}": v for k, v in losses.items()}
        found = self.model(inputs)
        if targets is not None:
            found = [{**one, "index": target["index"]} for one, target in zip(found, targets)]
        return found

    def parse_losses(self, losses: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum and log variables of the losses.

        Raises:
            NonFiniteLossError: before a NaN reaches the weights; the losses that are not finite are named.
        """
        loss, log_vars = super().parse_losses(losses)
        if not torch.isfinite(loss):
            bad = ", ".join(name for name, value in losses.items() if not torch.isfinite(value.detach()).all())
            raise NonFiniteLossError(f"the loss is {loss.item()} ({bad})")
        return loss, log_vars
