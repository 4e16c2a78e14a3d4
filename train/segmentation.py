"""The segmentation objective: from a batch of images with labelled pixels to PEM's loss, and to maps in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.extras import require
from zoo.heads.pem.criterion import PemCriterion, Segments
from zoo.heads.pem.postprocess import Geometry, find_instances, panoptic_map, semantic_map
from zoo.train.classification import NonFiniteLossError
from zoo.train.data.segmentation import Kind
from zoo.train.data.segmentation_transforms import PAD_VALUE, resize
from zoo.train.data.sizes import short_side_size
from zoo.train.loading import derive_seed

require("mmengine", extra="train")

from mmengine.model import BaseDataPreprocessor, BaseModel  # noqa: E402


def collate_segments(samples: Sequence[tuple]) -> dict[str, Any]:
    """Training samples to a batch, padded at the right and the bottom to the largest image.

    `inputs` uint8 (B, 3, H, W); `labels` and `masks`, lists of (n,) int64 and (n, H, W) bool; `keys` (B,).
    """
    images, targets, keys = zip(*samples)
    H, W = (max(image.shape[axis] for image in images) for axis in (1, 2))
    inputs = torch.full((len(images), 3, H, W), PAD_VALUE, dtype=torch.uint8)
    masks = []
    for place, image, target in zip(inputs, images, targets):
        _, h, w = image.shape
        place[:, :h, :w] = torch.from_numpy(image)
        mask = torch.zeros((len(target["labels"]), H, W), dtype=torch.bool)
        mask[:, :h, :w] = torch.from_numpy(target["masks"])
        masks.append(mask)
    labels = [torch.from_numpy(target["labels"]) for target in targets]
    return {"inputs": inputs, "labels": labels, "masks": masks, "keys": torch.tensor(keys)}


def collate_one(samples: Sequence[tuple]) -> dict[str, Any]:
    """One image for evaluation: (image uint8 (3, h, w), (height, width) of the file, index)."""
    ((image, size, index),) = samples
    return {"inputs": torch.from_numpy(image)[None], "sizes": [tuple(size)], "keys": torch.tensor([index])}


class SegmentationPreprocessor(BaseDataPreprocessor):
    """uint8 images to normalised float, on the device.

    Args:
        mean: of the channels, in 0..1.
        std: of the channels, in 0..1.
        channels_last: give the batch in NHWC memory order.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], *, channels_last: bool = False):
        super().__init__()
        self.register_buffer("mean", torch.tensor(tuple(mean)).view(1, -1, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std)).view(1, -1, 1, 1) * 255, persistent=False)
        self.channels_last = channels_last

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """Move a batch to the device and normalise its images."""
        data = self.cast_data(data)
        inputs = data["inputs"].to(self.mean.dtype).sub_(self.mean).div_(self.std)
        if self.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return {**data, "inputs": inputs}


class PemSegmentation(BaseModel):
    """A PEM segmenter with its loss, in the form that mmengine's Runner trains and evaluates.

    Args:
        model: what `zoo.create_segmenter("pem", ...)` built.
        preprocessor: see `SegmentationPreprocessor`.
        kind: what evaluation makes of the network's masks.
        thresholds: `object_threshold` and `overlap_threshold` of panoptic maps.
        criterion_args: arguments of `PemCriterion`.
        seed: of the points at which masks are compared.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocessor: SegmentationPreprocessor,
        *,
        kind: Kind,
        thresholds: dict[str, float] | None = None,
        criterion_args: dict[str, Any] | None = None,
        seed: int = 0,
    ):
        super().__init__(data_preprocessor=preprocessor)
        self.model = model
        self.kind = kind
        self.thresholds = thresholds or {}
        self.seed = seed
        self.criterion = PemCriterion(model.num_classes, **(criterion_args or {}))

    def init_weights(self) -> None:
        """Nothing: the model comes with its weights, and mmengine must not draw them anew."""

    def forward(
        self,
        inputs: Tensor,
        labels: list[Tensor] | None = None,
        masks: list[Tensor] | None = None,
        sizes: list[tuple[int, int]] | None = None,
        keys: Tensor | None = None,
        mode: str = "tensor",
    ) -> Any:
        """mmengine's protocol: `loss` gives the weighted losses, `predict` maps, `tensor` the network's output."""
        if mode == "loss":
            output = self.model(inputs, auxiliary=True)
            targets = [Segments(l, m) for l, m in zip(labels, masks, strict=True)]  # noqa: E741
            return self.criterion(output, targets, [self._points_of(key) for key in keys.tolist()])
        output = self.model(inputs)
        if mode == "predict":
            return [
                {"index": int(key), **self.decide(output, b, inputs.shape[-2:], size)}
                for b, (key, size) in enumerate(zip(keys.tolist(), sizes, strict=True))
            ]
        return output

    def _points_of(self, key: int) -> Callable[..., Tensor]:
        """Uniform numbers that depend on the seed and the image's key alone: not on its batch, process or step."""
        seed = derive_seed(self.seed, key)
        generators: dict[Any, torch.Generator] = {}

        def draw(shape: tuple[int, ...], device: torch.device) -> Tensor:
            if device not in generators:
                generators[device] = torch.Generator(device).manual_seed(seed)
            return torch.rand(shape, generator=generators[device], device=device)

        return draw

    def decide(self, output: Any, b: int, image: Sequence[int], size: tuple[int, int]) -> dict[str, Any]:
        """What the network says of image `b` of a batch, at the file's size.

        Args:
            output: of the network.
            b: place in the batch.
            image: (height, width) of the network's input without padding.
            size: (height, width) of the result.
        """
        classes, masks = output.class_logits[b].float(), output.mask_logits[b].float()
        padded = (masks.shape[-2] * 4, masks.shape[-1] * 4)
        geometry = Geometry(padded, tuple(image), tuple(size))
        if self.kind == "semantic":
            return {"labels": semantic_map(classes, masks, geometry).to(torch.int16).cpu().numpy()}
        if self.kind == "panoptic":
            ids, segments = panoptic_map(classes, masks, geometry, self.model.thing_classes, **self.thresholds)
            return {"ids": ids.cpu().numpy(), "segments": segments}
        return {"instances": find_instances(classes, masks, geometry)}

    def parse_losses(self, losses: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum and log variables of the losses.

        Raises:
            NonFiniteLossError: before a NaN reaches the weights.
        """
        loss, log_vars = super().parse_losses(losses)
        if not torch.isfinite(loss):
            raise NonFiniteLossError(f"the loss is {loss.item()}")
        return loss, log_vars


class EvaluationImages:
    """Map-style view of a data set for evaluation: (image uint8 (3, h, w), (height, width) of the file, index).

    Args:
        data: annotated images.
        short: the shorter side is resized to this.
        long: limit of the longer side.
    """

    def __init__(self, data, short: int, long: int):
        self.data, self.short, self.long = data, short, long

    def __len__(self) -> int:
        return len(self.data)

    @property
    def metainfo(self) -> dict[str, Any]:
        """The class names."""
        return {"classes": list(self.data.classes)}

    def __getitem__(self, index: int):
        image = self.data.image(index)
        H, W = image.shape[:2]
        resized, _ = resize(image, np.zeros((0, H, W), np.int32), *short_side_size(H, W, self.short, self.long))
        return np.ascontiguousarray(resized.transpose(2, 0, 1)), (H, W), index
