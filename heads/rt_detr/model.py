"""RT-DETR (arXiv 2304.08069): a transformer detector without anchors and without suppression, over any backbone.

Own code on plain torch operators: the libraries that have it (transformers, ultralytics, rf-detr) bring a framework
along and are tied to their own backbones. Its numbers are those of transformers' RT-DETR, which follows the authors'
repository: same weights, same outputs and losses. Different here: maps need not halve exactly, so images of any size
pass through; an image is resized once, to the size drawn for the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert

from zoo.heads.detection import Detector, Target
from zoo.heads.pyramid import Pyramid
from zoo.heads.rt_detr.criterion import criterion
from zoo.heads.rt_detr.decoder import Decoder, Predictions
from zoo.heads.rt_detr.denoising import denoising_queries
from zoo.heads.rt_detr.encoder import HybridEncoder


class RtDetr(Detector):
    """RT-DETR. The defaults are the authors' ResNet-50 model; their ResNet-18 one has expansion 0.5 and 3 layers.

    Args:
        pyramid: the backbone's maps at strides 8, 16, 32.
        num_classes: classes.
        class_names: their names.
        freeze_norm: keep the backbone's batch statistics.
        size: images are stretched to this height and width (or to this square).
        multi_scale: squares of which one is drawn for each batch in training; none: `size`.
        resize_in_training: off where the data set resizes already, to one size for a batch; of these, `multi_scale`
            still draws.
        image_mean, image_std: in 0..1; the backbone's own by default. The authors use 0 and 1.
        hidden_dim: width of encoder and decoder.
        num_heads: of all attention.
        ffn_dim: width of the MLPs.
        num_encoder_layers: attention layers on the coarsest map.
        expansion: width of the encoder's convolution blocks.
        depth: blocks in each fusion of the encoder.
        num_decoder_layers: refinements.
        num_points: that a head reads of each map.
        num_queries: detections that the decoder can make.
        num_denoising: roughly how many queries to add in training; 0: none.
        label_noise_ratio, box_noise_scale: of these.
        detections_per_img: the best pairs of query and class that are kept.
    """

    head_name = "rt_detr"
    class_entries = ("decoder.enc_score_head", "decoder.score_heads", "denoising_class_embed")
    strides = (8, 16, 32)

    def __init__(
        self,
        pyramid: Pyramid,
        num_classes: int,
        *,
        class_names: Sequence[str] | None = None,
        freeze_norm: bool = False,
        size: int | tuple[int, int] = 640,
        multi_scale: Sequence[int] = (),
        resize_in_training: bool = True,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        hidden_dim: int = 256,
        num_heads: int = 8,
        ffn_dim: int = 1024,
        num_encoder_layers: int = 1,
        expansion: float = 1.0,
        depth: int = 3,
        num_decoder_layers: int = 6,
        num_points: int = 4,
        num_queries: int = 300,
        num_denoising: int = 100,
        label_noise_ratio: float = 0.5,
        box_noise_scale: float = 1.0,
        detections_per_img: int = 300,
    ):
        super().__init__()
        self.backbone = pyramid
        self.encoder = HybridEncoder(
            pyramid.channels, hidden_dim, num_heads, ffn_dim, num_encoder_layers, expansion, depth
        )
        self.decoder = Decoder(
            hidden_dim,
            num_classes,
            num_queries,
            num_decoder_layers,
            num_heads,
            ffn_dim,
            len(pyramid.channels),
            num_points,
        )
        self.num_denoising = num_denoising
        self.label_noise_ratio, self.box_noise_scale = label_noise_ratio, box_noise_scale
        if num_denoising > 0:
            self.denoising_class_embed = nn.Embedding(num_classes + 1, hidden_dim, padding_idx=num_classes)
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.multi_scale = tuple(multi_scale)
        self.resize_in_training = resize_in_training
        self.detections_per_img = detections_per_img
        for name, value in (("image_mean", image_mean or pyramid.mean), ("image_std", image_std or pyramid.std)):
            self.register_buffer(name, torch.tensor(value).view(-1, 1, 1), persistent=False)
        self._describe(num_classes, class_names, freeze_norm)

    @property
    def pyramid(self) -> Pyramid:
        """The backbone's maps."""
        return self.backbone

    def network(self, batch: Tensor) -> Predictions:
        """(B, 3, H, W) in 0..1, of any size -> predictions, without denoising."""
        return self.decoder(self.encoder(self.backbone((batch - self.image_mean) / self.image_std)))

    def _batch(self, images: list[Tensor]) -> Tensor:
        size = self.size
        if self.training and self.multi_scale:
            size = (self.multi_scale[int(torch.randint(len(self.multi_scale), ()))],) * 2
        if self.training and not self.resize_in_training:
            if len({tuple(image.shape) for image in images}) > 1:
                raise ValueError("images of one batch differ in size: resize them, or pass resize_in_training=True")
            return _resize(torch.stack(images), size) if self.multi_scale else torch.stack(images)
        return torch.cat([_resize(image[None], size) for image in images])

    def _run(self, images: list[Tensor], targets: list[Target] | None) -> Any:
        batch = self._batch(images)
        if targets is None:
            return self.detections(self.network(batch), [tuple(image.shape[-2:]) for image in images])
        labels = [t["labels"] for t in targets]
        boxes = [
            box_convert(t["boxes"], "xyxy", "cxcywh") / t["boxes"].new_tensor(image.shape[-2:]).flip(0).repeat(2)
            for t, image in zip(targets, images)
        ]
        return self.losses(batch, labels, boxes)

    def losses(self, batch: Tensor, labels: list[Tensor], boxes: list[Tensor]) -> dict[str, Tensor]:
        """Losses, summed over layers.

        Args:
            batch: (B, 3, H, W) in 0..1.
            labels: for each image (N,).
            boxes: for each image (N, 4), centres and sides in 0..1.
        """
        denoising = None
        maps = self.encoder(self.backbone((batch - self.image_mean) / self.image_std))
        if self.num_denoising > 0:
            denoising = denoising_queries(
                labels,
                boxes,
                self.denoising_class_embed,
                min(self.decoder.num_queries, sum(m.shape[-2] * m.shape[-1] for m in maps)),
                num_denoising=self.num_denoising,
                label_noise_ratio=self.label_noise_ratio,
                box_noise_scale=self.box_noise_scale,
            )
        out: dict[str, Tensor] = {}
        for layer, losses in criterion(self.decoder(maps, denoising), labels, boxes, denoising).items():
            for name, loss in losses.items():
                key = f"dn_{name}" if layer.startswith("denoising") else name
                out[key] = out[key] + loss if key in out else loss
        if self.num_denoising > 0 and denoising is None:
            # distributed training takes a parameter without gradient for an error
            out["vfl"] = out["vfl"] + 0 * self.denoising_class_embed.weight.sum()
        return out

    def detections(self, predictions: Predictions, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """The best pairs of query and class, in the pixels of images of the given heights and widths."""
        scores = predictions.logits[-1].float().sigmoid()
        Q, classes = scores.shape[1:]
        best = scores.flatten(1).topk(min(self.detections_per_img, Q * classes), dim=1)
        query = best.indices // classes
        boxes = box_convert(predictions.boxes[-1].float(), "cxcywh", "xyxy").clamp(0, 1)
        boxes = boxes.gather(1, query[..., None].expand(-1, -1, 4))
        return [
            {"boxes": box * box.new_tensor([w, h, w, h]), "labels": label, "scores": score}
            for box, label, score, (h, w) in zip(boxes, best.indices % classes, best.values, sizes)
        ]


def _resize(batch: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(batch.shape[-2:]) == size:
        return batch
    return F.interpolate(batch, size, mode="bilinear", antialias=True)
