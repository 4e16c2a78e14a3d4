"""From pictures of any kind and size to segmentations: `model.predict(image)` of every segmenter.

found = model.predict("street.jpg", task="panoptic")
found.draw("street.jpg").save("segments.png")
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from zoo.heads.masks import encode_rle, mask_box
from zoo.heads.pem.model import TASKS, Pem, PemOutput, Task
from zoo.heads.pem.postprocess import (
    Geometry,
    Size,
    find_instances,
    panoptic_map,
    resize_scores,
    semantic_map,
    semantic_scores,
)
from zoo.images import ImageSource, describe_source, read_image
from zoo.prediction import Prediction, _is_several, evaluating, resolve_class_names
from zoo.preprocess import check_choice, model_placement, to_channels


@dataclass(frozen=True)
class SegmentationPrediction(Prediction):
    """What a segmenter says about one picture: regions, the largest (semantic, panoptic) or surest (instance) first.

    Attributes:
        labels: class index of each region.
        names: their names.
        scores: instance and panoptic: how sure it is; semantic: the region's share of the picture.
        map: (H, W) int32 of the picture's size: the class of each pixel (semantic) or the id of its region, 0 for none
            (panoptic; instance, where the surest of overlapping ones is on top).
        ids: value of each region in `map`.
        areas: pixels of each region.
        is_thing: whether a region is one object (True) or all of a class (False).
        packed: instance: each region's pixels, which may overlap, eight a byte, for `mask`; else empty.
    """

    map: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int32), repr=False)
    ids: tuple[int, ...] = ()
    areas: tuple[int, ...] = ()
    is_thing: tuple[bool, ...] = ()
    packed: tuple[np.ndarray, ...] = field(default=(), repr=False)

    def mask(self, index: int) -> np.ndarray:
        """The pixels of one region, bool (H, W)."""
        if self.packed:
            return np.unpackbits(self.packed[index], axis=-1, count=self.map.shape[1]).astype(bool)
        return self.map == self.ids[index]

    def draw(self, image: ImageSource) -> Image.Image:
        """The picture with coloured regions, outlines around single objects, and a legend."""
        from zoo.mask_pictures import Region, class_colour, draw_regions

        seen: dict[int, int] = {}
        regions = []
        for i, label in enumerate(self.labels):
            shade = seen[label] = seen.get(label, -1) + 1
            colour = class_colour(label, shade if self.is_thing[i] else 0)
            regions.append(Region(self.ids[i], self.names[i], colour, f"{self.scores[i]:.0%}"))
        return draw_regions(read_image(image), self.map, regions)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; each region has COCO's `category_id`, `bbox`, `area` and uncompressed `segmentation`."""
        predictions = []
        for i, label in enumerate(self.labels):
            mask = self.mask(i)
            predictions.append(
                {
                    "label": label,
                    "name": self.names[i],
                    "score": self.scores[i],
                    "id": self.ids[i],
                    "category_id": label,
                    "isthing": int(self.is_thing[i]),
                    "area": self.areas[i],
                    "bbox": mask_box(mask),
                    "segmentation": encode_rle(mask),
                }
            )
        return {"task": self.task, "source": self.source, "size": list(self.map.shape), "predictions": predictions}


def predict(
    model: Pem,
    image: ImageSource | Iterable[ImageSource],
    *,
    task: Task | None = None,
    size: int | None = 512,
    max_size: int = 2048,
    window: int | Size | None = None,
    overlap: float = 0.25,
    object_threshold: float = 0.8,
    overlap_threshold: float = 0.8,
    score_threshold: float = 0.5,
    topk: int = 100,
    class_names: Sequence[str] | None = None,
    device: torch.device | str | None = None,
) -> SegmentationPrediction | list[SegmentationPrediction]:
    """Segment one picture, or each of several, at their own size.

    Args:
        model: the segmenter; it is in evaluation mode during the call.
        image: what `zoo.read_image` takes, or an iterable of these: then the answer is a list.
        task: "semantic", "instance" or "panoptic"; default: the model's.
        size: the picture's shorter side is resized to this for the network; None leaves it as it is.
        max_size: limit of the longer side then.
        window: side or (height, width) of a sliding window over the resized picture, whose class scores are averaged
            where windows overlap; None: the picture as a whole. For "semantic" only.
        overlap: share of a window that its neighbour covers, too.
        object_threshold, overlap_threshold: see `zoo.heads.pem.postprocess.panoptic_map`.
        score_threshold: smallest score of an instance.
        topk: instances that are looked at.
        class_names: one for each class; default: the model's.
        device: move the model there first, where it stays.

    Raises:
        ImageError, TypeError: a picture cannot be read.
        ValueError: an argument is out of range, or the network gives non-finite numbers.
    """
    task = model.task if task is None else task
    check_choice("task", task, TASKS)
    for name, value in (("object_threshold", object_threshold), ("overlap_threshold", overlap_threshold)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}, expected a number between 0 and 1")
    if size is not None and not 0 < size <= max_size:
        raise ValueError(f"size is {size} and max_size {max_size}, expected 0 < size <= max_size")
    if window is not None and task != "semantic":
        raise ValueError(
            f"a sliding window joins class scores, not objects: use task='semantic', or window=None ({task})"
        )
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is {overlap}, expected a share of the window from 0 to below 1")
    if device is not None:
        model.to(device)
    names = resolve_class_names(model, model.num_classes, class_names)
    several = _is_several(image)
    found = []
    with evaluating(model), torch.no_grad():
        for source in image if several else [image]:
            picture = read_image(source)
            pixels = prepare(model, picture, size, max_size)
            output = (picture.height, picture.width)
            if task == "semantic":
                labels = _semantic(model, pixels, output, window, overlap, source)
                result = _from_labels(labels, names)
            else:
                logits, masks, geometry = _run_network(model, pixels, output, source)
                if task == "panoptic":
                    result = _from_panoptic(
                        panoptic_map(logits, masks, geometry, model.thing_classes, object_threshold, overlap_threshold),
                        names,
                    )
                else:
                    instances = find_instances(logits, masks, geometry, topk, model.thing_classes, score_threshold)
                    result = _from_instances(instances, names, score_threshold)
            path = os.fspath(source) if isinstance(source, str | os.PathLike) else None
            found.append(SegmentationPrediction(task=task, source=path, **result))
    return found if several else found[0]


def prepare(model: Pem, picture: Image.Image, size: int | None, max_size: int) -> Tensor:
    """A picture as the network's input (1, C, H, W): resized (PIL, bilinear), normalised, on the model's device."""
    backbone = model.backbone
    channels = getattr(backbone.backbone, "in_chans", 3)
    device, dtype = model_placement(model)
    return prepare_pixels(picture, channels, backbone.mean, backbone.std, size, max_size, device).to(dtype)


def prepare_pixels(
    picture: Image.Image,
    channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    size: int | None,
    max_size: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A picture as float32 (1, C, H, W): resized (PIL, bilinear) and normalised."""
    picture = to_channels(picture, channels)
    if size is not None:
        scale = size / min(picture.size)
        scale = min(scale, max_size / max(picture.size))
        target = tuple(max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize(target, Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(picture)).to(device)
    pixels = pixels.reshape(picture.height, picture.width, -1).permute(2, 0, 1)[None].to(torch.float32) / 255
    mean, std = (torch.tensor(values, device=device)[:channels].view(1, -1, 1, 1) for values in (mean, std))
    return (pixels - mean) / std


def _run_network(model: Pem, pixels: Tensor, output: Size, source: ImageSource) -> tuple[Tensor, Tensor, Geometry]:
    result: PemOutput = model(pixels)
    work = torch.float64 if pixels.dtype is torch.float64 else torch.float32
    logits, masks = result.class_logits[0].to(work), result.mask_logits[0].to(work)
    if not (logits.isfinite().all() and masks.isfinite().all()):
        raise ValueError(
            f"{type(model).__name__} gives non-finite numbers for {describe_source(source)}: its weights are damaged, "
            f"or {str(pixels.dtype).removeprefix('torch.')} overflows (try float32)"
        )
    H, W = pixels.shape[-2:]
    padded = (-(-H // model.divisor) * model.divisor, -(-W // model.divisor) * model.divisor)
    return logits, masks, Geometry(padded, (H, W), output)


def _semantic(
    model: Pem, pixels: Tensor, output: Size, window: int | Size | None, overlap: float, source: ImageSource
) -> np.ndarray:
    H, W = pixels.shape[-2:]
    height, width = (window, window) if isinstance(window, int) else window or (H, W)
    if min(height, width) < 1:
        raise ValueError(f"window is {window}, expected a positive side or (height, width)")
    if height >= H and width >= W:
        logits, masks, geometry = _run_network(model, pixels, output, source)
        return semantic_map(logits, masks, geometry).cpu().numpy().astype(np.int32)
    bands = _sliding_scores(model, pixels, (min(height, H), min(width, W)), overlap, source)
    return torch.cat([tile.argmax(0) for tile in resize_scores(bands, (H, W), output)]).cpu().numpy().astype(np.int32)


def _sliding_scores(model: Pem, pixels: Tensor, window: Size, overlap: float, source: ImageSource):
    """Mean class scores of all windows, as finished bands of rows from top to bottom: (K, rows, W) each."""
    H, W = pixels.shape[-2:]
    height, width = window
    tops, lefts = _places(H, height, overlap), _places(W, width, overlap)
    scores = pixels.new_zeros(model.num_classes, height, W, dtype=torch.float32)
    count = pixels.new_zeros(height, W, dtype=torch.float32)
    for number, top in enumerate(tops):
        for left in lefts:
            part = pixels[..., top : top + height, left : left + width]
            logits, masks, geometry = _run_network(model, part, window, source)
            scores[:, :, left : left + width] += semantic_scores(logits, masks, geometry)
            count[:, left : left + width] += 1
        done = (tops[number + 1] if number + 1 < len(tops) else H) - top
        yield scores[:, :done] / count[:done]
        scores = F.pad(scores[:, done:], (0, 0, 0, done))
        count = F.pad(count[done:], (0, 0, 0, done))


def _places(length: int, window: int, overlap: float) -> list[int]:
    """Beginnings of windows that cover `length`; the last one ends where it ends."""
    step = max(1, round(window * (1 - overlap)))
    return [*range(0, length - window, step), length - window]


def _from_labels(labels: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    values, areas = np.unique(labels, return_counts=True)
    order = areas.argsort()[::-1]
    found = [int(v) for v in values[order]]
    return dict(
        labels=tuple(found),
        names=tuple(names[v] for v in found),
        scores=tuple(float(a) / labels.size for a in areas[order]),
        map=labels,
        ids=tuple(found),
        areas=tuple(int(a) for a in areas[order]),
        is_thing=(False,) * len(found),
    )


def _from_panoptic(found, names: Sequence[str]) -> dict[str, Any]:
    segments = sorted(found.segments, key=lambda s: -s.area)
    return dict(
        labels=tuple(s.label for s in segments),
        names=tuple(names[s.label] for s in segments),
        scores=tuple(s.score for s in segments),
        map=found.ids.cpu().numpy(),
        ids=tuple(s.id for s in segments),
        areas=tuple(s.area for s in segments),
        is_thing=tuple(s.is_thing for s in segments),
    )


def _from_instances(found, names: Sequence[str], score_threshold: float) -> dict[str, Any]:
    scores, labels, areas = (each.tolist() for each in (found.scores, found.labels, found.areas))
    kept = [i for i in range(len(scores)) if scores[i] >= score_threshold and areas[i]]
    ids = np.zeros((found.bits.shape[1], found.width), np.int32)
    for number in reversed(range(len(kept))):  # the surest last, on top
        ids[found.mask(kept[number])] = number + 1
    return dict(
        labels=tuple(labels[i] for i in kept),
        names=tuple(names[labels[i]] for i in kept),
        scores=tuple(scores[i] for i in kept),
        map=ids,
        ids=tuple(range(1, len(kept) + 1)),
        areas=tuple(areas[i] for i in kept),
        is_thing=(True,) * len(kept),
        packed=tuple(found.bits[int(found.rows[i])] for i in kept),
    )
