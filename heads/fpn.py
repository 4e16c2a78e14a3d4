"""torchvision's feature pyramid network over `Pyramid`, with the parts whose geometry must be exact.

torchvision infers strides from the sizes of maps, which is right only where every map is a whole fraction of the
image: a P7 of 7 cells over 800 pixels would be given stride 114, and RoIs of a batch of small images may be read at
half their scale. Here strides are what they are called. Boxes, RoIs and masks follow the conventions of the papers'
own detectors (aligned RoIs, adaptive sampling, base anchors that are not rounded, pasting without rounding the box).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, roi_align
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool

from zoo.heads.pyramid import Pyramid


class CoarseLevels(ExtraFPNBlock):
    """P6 and P7 by convolutions of stride 2.

    Args:
        in_channels: of what P6 is made from.
        out_channels: of the pyramid.
        source: P6 from the backbone's last map ("c5", RetinaNet) or from the pyramid's ("p5", FCOS).
        relu: a ReLU between P6 and P7.
    """

    def __init__(self, in_channels: int, out_channels: int, *, source: Literal["c5", "p5"], relu: bool):
        super().__init__()
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
        for conv in (self.p6, self.p7):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            nn.init.zeros_(conv.bias)
        self.source = source
        self.relu = relu

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """torchvision's protocol: the maps of the pyramid, of the backbone, and their names."""
        p6 = self.p6(p[-1] if self.source == "p5" else c[-1])
        p7 = self.p7(F.relu(p6) if self.relu else p6)
        return [*p, p6, p7], [*names, "p6", "p7"]


class FpnBackbone(nn.Module):
    """Image to maps of equal width: `Pyramid`, then torchvision's FPN.

    Args:
        pyramid: the backbone's maps.
        out_channels: width of the maps.
        coarse: how the levels above the backbone's last are made.
        norm_layer: norm behind each of the FPN's convolutions; None for none.
    """

    def __init__(
        self,
        pyramid: Pyramid,
        out_channels: int = 256,
        *,
        coarse: Literal["pool", "c5", "p5"] = "pool",
        relu: bool = False,
        norm_layer: type[nn.Module] | None = None,
    ):
        super().__init__()
        self.body = pyramid
        if coarse == "pool":
            extra: ExtraFPNBlock = LastLevelMaxPool()
        else:
            source = pyramid.channels[-1] if coarse == "c5" else out_channels
            extra = CoarseLevels(source, out_channels, source=coarse, relu=relu)
        self.fpn = FeaturePyramidNetwork(pyramid.channels, out_channels, extra_blocks=extra, norm_layer=norm_layer)
        self.out_channels = out_channels
        last = pyramid.strides[-1]
        self.strides = (*pyramid.strides, *((2 * last,) if coarse == "pool" else (2 * last, 4 * last)))

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """(B, 3, H, W) -> maps by name, finest first."""
        maps = self.body(x)
        return self.fpn(OrderedDict((str(i), m) for i, m in enumerate(maps)))


class Anchors(AnchorGenerator):
    """Boxes of given sizes and ratios around the corner of every cell, at given strides.

    Args:
        sizes: for each level, the square roots of the areas in pixels.
        aspect_ratios: height / width, the same for all levels.
        strides: of the levels.
    """

    def __init__(self, sizes: Sequence[Sequence[float]], aspect_ratios: Sequence[float], strides: Sequence[int]):
        if len(sizes) != len(strides):
            raise ValueError(f"anchor_sizes has {len(sizes)} levels, expected one for each stride of {tuple(strides)}")
        if len({len(s) for s in sizes}) != 1:
            raise ValueError(f"anchor_sizes={sizes}, expected equally many sizes in each level")
        super().__init__(tuple(map(tuple, sizes)), (tuple(aspect_ratios),) * len(sizes))
        self.strides = tuple(strides)

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> Tensor:
        """(ratios * scales, 4) boxes around the origin, ratios outermost."""
        scales = torch.as_tensor(scales, dtype=dtype, device=device)
        root = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        w = (scales / root[:, None]).flatten()
        h = (scales * root[:, None]).flatten()
        return torch.stack([-w, -h, w, h], dim=1) / 2

    def per_level(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """For each map (B, C, h, w) its boxes (h * w * anchors, 4), rows first."""
        out = []
        for base, stride, m in zip(self.cell_anchors, self.strides, maps, strict=True):
            h, w = m.shape[-2:]
            x = torch.arange(w, device=m.device, dtype=torch.float32) * stride
            y = torch.arange(h, device=m.device, dtype=torch.float32) * stride
            corner = torch.stack([x.expand(h, w), y[:, None].expand(h, w)], dim=-1).reshape(-1, 1, 2)
            out.append((corner.repeat(1, 1, 2) + base.to(m.device)).reshape(-1, 4))
        return out

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """torchvision's protocol: the boxes of all levels, once for each image."""
        boxes = torch.cat(self.per_level(feature_maps))
        return [boxes] * len(image_list.image_sizes)


class RoiAlign(MultiScaleRoIAlign):
    """Features of boxes from the level that suits their size (FPN, arXiv 1612.03144, equation 1).

    Args:
        output_size: cells of each side.
        strides: of the levels, finest first; coarser maps are not used.
        sampling_ratio: points of a cell's side; 0: one for every cell of the map that it covers.
        aligned: pixel centres at half integers.
    """

    def __init__(self, output_size: int, strides: Sequence[int], *, sampling_ratio: int = 0, aligned: bool = True):
        super().__init__([str(i) for i in range(len(strides))], output_size, sampling_ratio)
        self.strides = tuple(strides)
        self.aligned = aligned

    def forward(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]] | None = None
    ) -> Tensor:
        """(K, C, output_size, output_size) of all images' boxes, in order."""
        maps = [x[name] for name in self.featmap_names]
        size = self.output_size
        rois = torch.cat(boxes)
        image = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
        rois = torch.cat([image, rois], dim=1)
        # a box of 224 px is read two levels above stride 4
        scale = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).clamp(min=0).sqrt()
        level = torch.floor(torch.log2(scale / (14 * self.strides[0]) + 1e-6)).clamp(0, len(maps) - 1)
        out = maps[0].new_zeros(len(rois), maps[0].shape[1], *size)
        # never in half precision, whose steps are several pixels in a large image
        work = torch.promote_types(maps[0].dtype, torch.float32)
        rois = rois.to(work)
        for i, (m, stride) in enumerate(zip(maps, self.strides)):
            chosen = torch.where(level == i)[0]
            pooled = roi_align(
                m.to(work),
                rois[chosen],
                size,
                1 / stride,
                sampling_ratio=self.sampling_ratio,
                aligned=self.aligned,
            )
            out[chosen] = pooled.to(out.dtype)
        return out


class ImageTransform(GeneralizedRCNNTransform):
    """Normalise, resize and pad images into a batch; bring what was found back to the image's own pixels.

    Args:
        min_size, max_size: the shorter side becomes `min_size` unless the longer one would exceed `max_size`; of
            several `min_size` one is drawn in training and the last is used in evaluation.
        image_mean, image_std: in 0..1.
        size_divisible: sides of a batch are multiples of it.
        resize_in_training: off where the data set resizes already.
    """

    def __init__(
        self,
        min_size: int | Sequence[int],
        max_size: int,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        size_divisible: int,
        resize_in_training: bool,
    ):
        super().__init__(min_size, max_size, list(image_mean), list(image_std), size_divisible)
        self.resize_in_training = resize_in_training

    def resize(self, image: Tensor, target: dict | None = None) -> tuple[Tensor, dict | None]:
        """As torchvision's, but a smaller image is made of all pixels; nothing in training if the data set did it."""
        if self.training and not self.resize_in_training:
            return image, target
        h, w = image.shape[-2:]
        short = self.torch_choice(self.min_size) if self.training else self.min_size[-1]
        scale = min(short / min(h, w), self.max_size / max(h, w))
        size = (max(1, int(h * scale)), max(1, int(w * scale)))
        if size != (h, w):
            image = F.interpolate(image[None], size, mode="bilinear", antialias=scale < 1)[0]
        if target is None:
            return image, target
        target["boxes"] = resize_boxes(target["boxes"], (h, w), size)
        if "masks" in target and size != (h, w):
            rows, columns = (
                ((torch.arange(new, device=image.device) + 0.5) * (old / new)).long().clamp(max=old - 1)
                for old, new in zip((h, w), size)
            )
            target["masks"] = target["masks"][:, rows[:, None], columns]
        return image, target

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        """As torchvision's, without the copy where nothing needs padding."""
        first = images[0]
        if len(images) == 1 and not any(side % size_divisible for side in first.shape[-2:]):
            return first[None]
        return super().batch_images(images, size_divisible)

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Boxes in the pixels of the image, masks as bool (N, H, W)."""
        if self.training:
            return result
        for found, size, original in zip(result, image_shapes, original_image_sizes):
            found["boxes"] = resize_boxes(found["boxes"], size, original)
            if "masks" in found:
                found["masks"] = paste_masks(found["masks"][:, 0], found["boxes"], original)
        return result


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Probabilities (N, M, M) inside boxes (N, 4) to bool masks (N, H, W) of the image.

    Bilinear, pixel by pixel without rounding the box, as the papers' detectors do; outside of the M x M cells the
    probability falls to 0. A mask is two small matrix products, and only the pixels of its box are touched.
    """
    H, W = size
    out = torch.zeros(len(masks), H, W, dtype=torch.bool, device=masks.device)
    sides = torch.cat([boxes[:, :2].floor() - 1, boxes[:, 2:].ceil() + 1], dim=1).long()
    sides[:, 0::2].clamp_(0, W)
    sides[:, 1::2].clamp_(0, H)
    for mask, box, (x0, y0, x1, y1), canvas in zip(masks.float(), boxes.float(), sides.tolist(), out):
        if x1 > x0 and y1 > y0:
            rows = _hat(y0, y1, box[1], box[3], mask.shape[0])
            columns = _hat(x0, x1, box[0], box[2], mask.shape[1])
            canvas[y0:y1, x0:x1] = rows @ mask @ columns.T >= threshold
    return out


def _hat(start: int, stop: int, low: Tensor, high: Tensor, cells: int) -> Tensor:
    """(stop - start, cells) weights of linear interpolation at pixel centres between cells spread from low to high."""
    pixels = torch.arange(start, stop, device=low.device, dtype=torch.float32) + 0.5
    place = (pixels - low) / (high - low).clamp(min=1e-6) * cells - 0.5
    return (1 - (place[:, None] - torch.arange(cells, device=low.device)).abs()).clamp(min=0)
