"""Detectors, segmenters and upscalers that `zoo export` wrote, run by ONNX Runtime: `open_model("model.onnx")`.

Their predictions are those of the models themselves, up to rounding: resizing before the graph and the choice of
segments and objects after it are done by the same functions. One difference stays: where RetinaNet and FCOS pad a
picture, boxes are cut at the padding before suppression and at the picture after it, so that a few near the border may
differ.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from os import PathLike
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.heads.craft.padding import Padding, pad_image
from zoo.heads.craft.pictures import Picture, UpscalePrediction, enlarge_picture
from zoo.heads.craft.tiling import enlarge_tiled, self_ensemble
from zoo.heads.detection_prediction import DetectionPrediction
from zoo.heads.pem.postprocess import Geometry, find_instances, panoptic_map, resize_scores
from zoo.heads.segmentation_prediction import (
    SegmentationPrediction,
    _from_instances,
    _from_labels,
    _from_panoptic,
    prepare_pixels,
)
from zoo.images import ImageSource, describe_source, read_image
from zoo.onnx_model import OnnxModel
from zoo.prediction import Prediction, _is_several
from zoo.preprocess import to_channels


def open_model(path: str | PathLike, threads: int | None = None) -> OnnxModel:
    """A file of any task, with a `predict` for it.

    Raises:
        FileNotFoundError, ValueError: see `zoo.onnx_model.OnnxModel`.
    """
    model = OnnxModel(path, threads)
    heads = {"detection": OnnxDetector, "segmentation": OnnxSegmenter, "superresolution": OnnxUpscaler}
    return heads[model.task](model) if model.task in heads else model


class _OnnxHead(OnnxModel):
    """A model that takes one picture at a time."""

    def __init__(self, opened: OnnxModel):
        vars(self).update(vars(opened))

    def run(self, images: Tensor, source: ImageSource) -> list[Tensor]:
        """The outputs for images (1, C, H, W).

        Raises:
            ValueError: a size that the graph does not take, or results that are not finite.
        """
        rule = self.metadata["size_rule"]
        for side in images.shape[2:]:
            if side < rule["least"] or side > (rule["most"] or side) or side % rule["multiple"]:
                raise ValueError(
                    f"{describe_source(source)} reaches {self.path} at {images.shape[2]}x{images.shape[3]} px, and it "
                    f"takes {rule['text']}: export a model that is built for such sizes"
                )
        outputs = self.session.run(None, {self.session.get_inputs()[0].name: images.numpy()})
        if not all(np.isfinite(output).all() for output in outputs):
            raise ValueError(f"{self.path} gives non-finite numbers for {describe_source(source)}")
        return [torch.from_numpy(output) for output in outputs]

    def predict(self, image: ImageSource | Iterable[ImageSource], **options: Any) -> Prediction | list[Prediction]:
        """What the file says about one picture, or about each of several.

        Raises:
            ImageError, TypeError: a picture cannot be read.
            ValueError: an argument is out of range, or the graph does not take the picture.
        """
        if _is_several(image):
            return [self.predict_one(source, **options) for source in image]
        return self.predict_one(image, **options)

    def predict_one(self, source: ImageSource, **options: Any) -> Prediction:
        """One picture."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it predicts: open files with `open_model`")


class OnnxDetector(_OnnxHead):
    """Boxes in the picture's pixels."""

    def predict_one(self, source: ImageSource, *, threshold: float = 0.5, topk: int = 100) -> DetectionPrediction:
        """See `zoo.heads.detection_prediction.predict`."""
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold}, expected a score between 0 and 1")
        if topk < 1:
            raise ValueError(f"topk is {topk}, expected at least 1")
        how = self.metadata["preprocessing"]
        picture = to_channels(read_image(source), how["in_chans"])
        pixels = torch.from_numpy(np.array(picture).reshape(picture.height, picture.width, -1))
        pixels = pixels.permute(2, 0, 1)[None].float() / 255
        height, width = how["size"] if how["kind"] == "stretched" else _fitted(pixels.shape[2:], how)
        smaller = height < picture.height or width < picture.width
        antialias = smaller or how["kind"] == "stretched"
        pixels = F.interpolate(pixels, (height, width), mode="bilinear", antialias=antialias)
        if how["kind"] != "stretched":
            rows, columns = (-(-side // how["divisor"]) * how["divisor"] for side in (height, width))
            padded = torch.tensor(how["mean"]).view(1, -1, 1, 1).expand(1, pixels.shape[1], rows, columns).clone()
            padded[:, :, :height, :width] = pixels
            pixels = padded
        boxes, labels, scores = (output[0] for output in self.run(pixels, source))
        # back to the picture, without the padding
        limit = torch.tensor([width, height, width, height], dtype=boxes.dtype)
        boxes = torch.minimum(boxes, limit) * (torch.tensor([picture.width, picture.height] * 2) / limit)
        kept = ((scores >= threshold) & (scores > 0)).nonzero()[:, 0][:topk]
        labels, ids = labels[kept].tolist(), self.metadata.get("category_ids")
        return DetectionPrediction(
            task="detection",
            labels=tuple(labels),
            names=tuple(self.class_names[label] for label in labels),
            scores=tuple(scores[kept].tolist()),
            source=_path(source),
            boxes=tuple(map(tuple, boxes[kept].tolist())),
            size=(picture.height, picture.width),
            category_ids=tuple(ids[label] for label in labels) if ids else tuple(labels),
        )


def _fitted(sides: tuple[int, int], how: dict[str, Any]) -> tuple[int, int]:
    """Height and width whose shorter side is `size` and whose longer one is at most `max_size`."""
    scale = min(how["size"] / min(sides), how["max_size"] / max(sides))
    height, width = (max(1, int(side * scale)) for side in sides)
    return height, width


class OnnxSegmenter(_OnnxHead):
    """Regions of the picture's size."""

    def predict_one(
        self,
        source: ImageSource,
        *,
        size: int | None = None,
        max_size: int | None = None,
        object_threshold: float = 0.8,
        overlap_threshold: float = 0.8,
        score_threshold: float = 0.5,
        topk: int = 100,
    ) -> SegmentationPrediction:
        """See `zoo.heads.segmentation_prediction.predict`; sizes are the file's by default."""
        described, how = self.metadata, self.metadata["preprocessing"]
        picture = read_image(source)
        pixels = prepare_pixels(
            picture, how["in_chans"], how["mean"], how["std"], size or how["size"], max_size or how["max_size"]
        )
        (H, W), output = pixels.shape[2:], (picture.height, picture.width)
        found = self.run(pixels, source)
        if described["kind"] == "semantic":
            scores = found[0][0]
            labels = torch.cat([band.argmax(0) for band in resize_scores([scores], (H, W), output)])
            result = _from_labels(labels.numpy().astype(np.int32), self.class_names)
            return SegmentationPrediction(task="semantic", source=_path(source), **result)
        logits, masks, things = found[0][0], found[1][0], described["thing_classes"]
        padded = tuple(-(-side // described["divisor"]) * described["divisor"] for side in (H, W))
        geometry = Geometry(padded, (H, W), output)
        if described["kind"] == "panoptic":
            result = panoptic_map(logits, masks, geometry, things, object_threshold, overlap_threshold)
            result = _from_panoptic(result, self.class_names)
        else:
            instances = find_instances(logits, masks, geometry, topk, things, score_threshold)
            result = _from_instances(instances, self.class_names, score_threshold)
        return SegmentationPrediction(task=described["kind"], source=_path(source), **result)


class OnnxUpscaler(_OnnxHead):
    """Enlarged pictures.

    Attributes:
        scale: the factor.
    """

    @property
    def scale(self) -> int:
        """The factor."""
        return self.metadata["scale"]

    def enlarge(
        self,
        images: Tensor,
        *,
        padding: Padding = "official",
        tile: int | None = None,
        overlap: int = 32,
        ensemble: bool = False,
    ) -> Tensor:
        """(B, C, H, W) in 0..1 to (B, C, scale*H, scale*W); options as for `zoo.heads.craft.pictures.enlarge`."""

        def whole(x: Tensor) -> Tensor:
            height, width = x.shape[2:]
            padded = pad_image(x, self.metadata["multiple"], padding)
            rows = [self.run(row[None].contiguous(), "the picture")[0] for row in padded]
            return torch.cat(rows)[:, :, : height * self.scale, : width * self.scale]

        def tiled(x: Tensor) -> Tensor:
            return enlarge_tiled(whole, x, self.scale, tile, min(overlap, tile // 4), blend=True)

        run = whole if tile is None else tiled
        return self_ensemble(run, images) if ensemble else run(images)

    def upscale_picture(self, source: ImageSource | Picture, **options: Any) -> Picture:
        """See `zoo.heads.craft.pictures.upscale_picture`."""
        return enlarge_picture(
            lambda x: self.enlarge(x.float(), **options), source, self.metadata["in_chans"], self.scale
        )

    def predict_one(self, source: ImageSource, **options: Any) -> UpscalePrediction:
        """One picture; options as for `enlarge`."""
        picture = self.upscale_picture(source, **options)
        return UpscalePrediction("super-resolution", (), (), (), _path(source), picture, self.scale)


def _path(source: ImageSource) -> str | None:
    return os.fspath(source) if isinstance(source, str | os.PathLike) else None
