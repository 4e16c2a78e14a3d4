"""The super-resolution objective and its evaluation, in the form that mmengine's Runner trains and evaluates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.extras import require
from zoo.imresize import to_uint8
from zoo.train.classification import NonFiniteLossError
from zoo.train.data.superresolution import SuperResolutionData
from zoo.train.sr_metrics import mean_scores, sr_scores

require("mmengine", extra="train")

from mmengine.model import BaseDataPreprocessor, BaseModel  # noqa: E402


class SuperResolutionPreprocessor(BaseDataPreprocessor):
    """uint8 pairs (B, C, h, w) and (B, C, s*h, s*w), or float ones in 0..255, to 0..1 on the device."""

    def forward(self, data: dict[str, Tensor], training: bool = False) -> dict[str, Tensor]:
        """`inputs` and `targets` in 0..1."""
        data = self.cast_data(data)
        return {"inputs": data["inputs"].float() / 255, "targets": data["targets"].float() / 255}


class SuperResolution(BaseModel):
    """A model (B, C, h, w) -> (B, C, s*h, s*w) with the mean absolute error as its loss.

    Args:
        model: takes and gives images in 0..1.
        border: pixels that the scores leave out on each side; the scale by default.
        padding: of evaluation, "official" (the published protocol) or "reflect" (the training-time one).
    """

    def __init__(self, model: nn.Module, border: int | None = None, padding: str = "official"):
        super().__init__(data_preprocessor=SuperResolutionPreprocessor())
        self.model = model
        self.border = model.scale if border is None else border
        self.padding = padding

    def init_weights(self) -> None:
        """Nothing: the model comes with its weights, and mmengine must not draw them anew."""

    def forward(self, inputs: Tensor, targets: Tensor | None = None, mode: str = "tensor") -> Any:
        """mmengine's protocol: `loss` gives {"loss": ...}, `predict` a list of scores, `tensor` the images."""
        if mode == "loss":
            return {"loss": F.l1_loss(self.model(inputs).float(), targets)}
        if mode == "predict":
            outputs = self.model.upscale(inputs, padding=self.padding)
            return [
                sr_scores(as_picture(output), as_picture(target), self.border)
                for output, target in zip(outputs, targets)
            ]
        return self.model(inputs)

    def parse_losses(self, losses: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum and log variables of the losses.

        Raises:
            NonFiniteLossError: before a NaN reaches the weights.
        """
        loss, log_vars = super().parse_losses(losses)
        if not torch.isfinite(loss):
            raise NonFiniteLossError(f"the loss is {loss.item()}")
        return loss, log_vars


def as_picture(image: Tensor) -> np.ndarray:
    """(C, H, W) in 0..1 to uint8 (H, W, C), clipped and rounded."""
    return to_uint8(image.detach().float().clamp(0, 1).permute(1, 2, 0).cpu().numpy() * 255)


@torch.inference_mode()
def evaluate_superresolution(
    model: nn.Module,
    data: SuperResolutionData | Iterable[tuple[Tensor, Tensor]],
    *,
    padding: str = "official",
    self_ensemble: bool = False,
    border: int | None = None,
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Mean scores over whole pictures, and those of each (`psnr_y`, `ssim_y`, `psnr`, `ssim`).

    Args:
        model: with `scale` and `upscale`.
        data: pairs uint8 (C, h, w) and (C, s*h, s*w); they may have any sizes.
        padding: "official" for the published protocol, "reflect" for the training-time one.
        self_ensemble: average the eight flips and transposes.
        border: pixels that the scores leave out on each side; the scale by default.
    """
    from zoo.heads.craft.tiling import self_ensemble as ensemble

    model.eval()
    border = model.scale if border is None else border
    device = next(model.parameters()).device
    scores = []
    for index in range(len(data)):
        low, high = data[index]
        image = low[None].to(device).float() / 255

        def enlarge(x: Tensor) -> Tensor:
            return model.upscale(x, padding=padding)

        output = ensemble(enlarge, image) if self_ensemble else enlarge(image)
        scores.append(sr_scores(as_picture(output[0]), high.permute(1, 2, 0).numpy(), border))
    return mean_scores(scores), scores
