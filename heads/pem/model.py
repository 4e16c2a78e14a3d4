"""The PEM segmenter: a pyramid of any backbone, pixel decoder, transformer decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.heads.pem.pixel_decoder import PixelDecoder
from zoo.heads.pem.transformer_decoder import Prediction, TransformerDecoder

Task = Literal["semantic", "instance", "panoptic"]
TASKS = ("semantic", "instance", "panoptic")


class PemOutput(NamedTuple):
    """What the network returns for a batch.

    Attributes:
        class_logits: (B, Q, K + 1), the last class is "no object".
        mask_logits: (B, Q, h, w) at a quarter of the padded image's size.
        auxiliary: the predictions before the last (of the learned queries first); empty unless asked for.
    """

    class_logits: Tensor
    mask_logits: Tensor
    auxiliary: list[Prediction]


class PemHead(nn.Module):
    """Pixel decoder and transformer decoder.

    Args:
        in_channels: channels of the maps at strides 4, 8, 16, 32.
        num_classes: classes without "no object".
        num_queries: the largest number of segments in an image.
        conv_dim: width of the pixel decoder.
        mask_dim: channels of the mask features.
        dim, num_heads, mlp_dim, depth, pre_norm: see `TransformerDecoder`.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int = 150,
        num_queries: int = 100,
        conv_dim: int = 128,
        mask_dim: int = 256,
        dim: int = 256,
        num_heads: int = 8,
        mlp_dim: int = 2048,
        depth: int = 6,
        pre_norm: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.pixel_decoder = PixelDecoder(in_channels, conv_dim, mask_dim, **dd)
        self.decoder = TransformerDecoder(
            conv_dim,
            mask_dim,
            num_classes,
            num_queries,
            dim,
            num_heads,
            mlp_dim,
            depth,
            num_levels=len(in_channels) - 1,
            pre_norm=pre_norm,
            **dd,
        )

    def forward(self, maps: Sequence[Tensor], auxiliary: bool = False) -> PemOutput:
        """Maps of the backbone, finest first, each half as large as the one before it."""
        mask_features, levels = self.pixel_decoder(maps)
        last, earlier = self.decoder(mask_features, levels, auxiliary)
        return PemOutput(*last, earlier)


class Pem(nn.Module):
    """Segmenter for semantic, instance and panoptic segmentation: one network and one loss for all three.

    Args:
        backbone: a `zoo.heads.pyramid.Pyramid` with maps at strides 4, 8, 16 and 32.
        num_classes: classes without "no object".
        task: what `predict` and `postprocess` return by default.
        thing_classes: classes whose objects are told apart, for "panoptic"; default: all of them.
        freeze_norm: the backbone's batch norms use their stored statistics and are not trained (as in the
            ADE20K recipes; for small batches).
        kwargs: arguments of `PemHead`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int = 150,
        task: Task = "semantic",
        *,
        thing_classes: Sequence[int] | None = None,
        freeze_norm: bool = False,
        **kwargs,
    ):
        super().__init__()
        if task not in TASKS:
            raise ValueError(f"task is {task!r}, expected one of {', '.join(TASKS)}")
        things = tuple(range(num_classes)) if thing_classes is None else tuple(sorted({int(c) for c in thing_classes}))
        if things and not 0 <= things[0] <= things[-1] < num_classes:
            raise ValueError(f"thing_classes={things} do not lie in 0..{num_classes - 1}: num_classes is {num_classes}")
        self.num_classes = num_classes
        self.task: Task = task
        self.thing_classes = things
        self.backbone = backbone
        if freeze_norm:
            from timm.utils.model import freeze_batch_norm_2d

            self.backbone = freeze_batch_norm_2d(backbone)
        self.head = PemHead(backbone.channels, num_classes, **kwargs)
        self.class_names: list[str] | None = None
        self.divisor = getattr(backbone, "divisor", max(backbone.strides))

    def forward(self, images: Tensor, auxiliary: bool | None = None) -> PemOutput:
        """Normalised images (B, C, H, W) of any size; they are padded with zeros to a multiple of 32.

        `auxiliary` asks for the predictions before the last; by default they are made in training only.
        """
        auxiliary = self.training if auxiliary is None else auxiliary
        return self.head(self.backbone(self.pad(images)), auxiliary)

    def predict(self, image: Any, **options: Any) -> Any:
        """Segment a picture, or each of several; see `zoo.heads.segmentation_prediction.predict` for the options.

        Returns:
            A `SegmentationPrediction` with `draw(image)` and `to_dict()`, or a list of them.
        """
        from zoo.heads.segmentation_prediction import predict

        return predict(self, image, **options)

    def no_weight_decay(self) -> set[str]:
        """The three embeddings, which the official recipes do not decay, and what the backbone exempts."""
        own = {f"head.decoder.{name}" for name in ("query_feat", "query_pos", "level_embed")}
        return own | {f"backbone.{name}" for name in getattr(self.backbone, "no_weight_decay", set)()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's activations in the backward pass."""
        self.backbone.set_grad_checkpointing(enable)

    def pad(self, images: Tensor) -> Tensor:
        """The images with zeros to the right and below up to a multiple of `divisor`."""
        H, W = images.shape[-2:]
        below, right = -H % self.divisor, -W % self.divisor
        return F.pad(images, (0, right, 0, below)) if torch.compiler.is_exporting() or below or right else images
