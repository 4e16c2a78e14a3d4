"""Augmentation of images with boxes and masks, as the detection papers do it, by albumentations.

Sizes and places are drawn here, from Python's global generator, which the loaders seed for each sample; albumentations
then moves image, boxes and masks. An object of which less than a pixel is left is dropped with its mask.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from types import ModuleType

import numpy as np

from zoo.extras import require
from zoo.train.data.sizes import short_side_size

PAD_VALUE = (124, 116, 104)  # ImageNet's mean colour: 0 once it is normalised
Sample = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]


def _albumentations() -> ModuleType:
    # it would ask the network for newer versions when it is imported
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    return require("albumentations", extra="train")


class DetectionAugmentation:
    """Random size, crop, colours and flip. Exactly one of `short_sides`, `jitter` and `size` is given.

    Args:
        short_sides: the shorter side becomes one of these, at random (the papers: 800, or 480 to 800 by 32).
        max_long: limit of the longer side.
        crop_policy: DETR's: half of the images are first resized to a shorter side of 400, 500 or 600 and cropped to
            sides of 384 to 600 (all in proportion to the largest of `short_sides`, for 800).
        jitter: range of large-scale jitter (arXiv 2012.07177): the image is fitted into `jitter_size` times a factor
            drawn from it, and cropped or padded to it.
        jitter_size: see there.
        size: stretch to this height and width, as RT-DETR does.
        zoom_out: probability that the image is first set into a canvas of up to 4 times its sides (SSD).
        iou_crop: probability of a crop that keeps a minimum overlap with some object (SSD).
        color: probability of distorted brightness, contrast, saturation and hue.
        hflip: probability of a horizontal flip.
    """

    def __init__(
        self,
        *,
        short_sides: Sequence[int] = (),
        max_long: int = 1333,
        crop_policy: bool = False,
        jitter: tuple[float, float] | None = None,
        jitter_size: tuple[int, int] = (1024, 1024),
        size: int | tuple[int, int] | None = None,
        zoom_out: float = 0.0,
        iou_crop: float = 0.0,
        color: float = 0.0,
        hflip: float = 0.5,
    ):
        given = [name for name, on in (("short_sides", short_sides), ("jitter", jitter), ("size", size)) if on]
        if len(given) != 1:
            raise ValueError(f"give one of short_sides, jitter and size, got {', '.join(given) or 'none'}")
        _albumentations()
        self.short_sides, self.max_long, self.crop_policy = tuple(short_sides), max_long, crop_policy
        self.jitter, self.jitter_size = jitter, tuple(jitter_size)
        self.size = (size, size) if isinstance(size, int) else size
        self.zoom_out, self.iou_crop, self.color, self.hflip = zoom_out, iou_crop, color, hflip

    def __call__(
        self, image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, masks: np.ndarray | None = None
    ) -> Sample:
        """Augment an image (H, W, 3) uint8 with boxes (N, 4) in pixels, labels (N,) and masks (N, H, W)."""
        sample = (image, boxes, labels, masks)
        if random.random() < self.color:
            sample = (_distort(image), *sample[1:])
        if random.random() < self.zoom_out:
            sample = _zoom_out(sample)
        if random.random() < self.iou_crop and len(boxes):
            sample = _iou_crop(sample)
        if self.jitter is not None:
            sample = self._jitter(sample)
        elif self.size is not None:
            sample = resize(sample, *self.size)
        else:
            if self.crop_policy and random.random() < 0.5:
                sample = self._crop_policy(sample)
            H, W = sample[0].shape[:2]
            sample = resize(sample, *short_side_size(H, W, random.choice(self.short_sides), self.max_long))
        if random.random() < self.hflip:
            sample = apply(_albumentations().HorizontalFlip(p=1), sample)
        return sample

    def _jitter(self, sample: Sample) -> Sample:
        H, W = sample[0].shape[:2]
        height, width = self.jitter_size
        factor = random.uniform(*self.jitter)
        scale = min(factor * height / H, factor * width / W)
        h, w = max(1, round(H * scale)), max(1, round(W * scale))
        sample = resize(sample, h, w)
        top, left = random.randint(0, max(h - height, 0)), random.randint(0, max(w - width, 0))
        return pad(crop(sample, top, left, min(h, height), min(w, width)), height, width)

    def _crop_policy(self, sample: Sample) -> Sample:
        unit = max(self.short_sides) / 800
        H, W = sample[0].shape[:2]
        short = round(random.choice((400, 500, 600)) * unit)
        sample = resize(sample, *short_side_size(H, W, short, 10**9))
        H, W = sample[0].shape[:2]
        low, high = max(1, round(384 * unit)), max(1, round(600 * unit))
        h, w = (random.randint(min(side, low), min(side, high)) for side in (H, W))
        return crop(sample, random.randint(0, H - h), random.randint(0, W - w), h, w)


def apply(step, sample: Sample) -> Sample:
    """One albumentations step on image, boxes and masks; objects that are gone are dropped with their masks."""
    A = _albumentations()
    image, boxes, labels, masks = sample
    H, W = image.shape[:2]
    boxes = boxes.clip(0, np.array([W, H, W, H], dtype=np.float32))
    # rounding may leave a side of nothing, which albumentations refuses
    kept = np.flatnonzero(((boxes[:, 2:] - boxes[:, :2]) > 1e-4).all(1))
    parameters = A.BboxParams(format="pascal_voc", label_fields=["place"], clip=True, min_width=1, min_height=1)
    pipeline = A.Compose([step], bbox_params=parameters)
    with_masks = {} if masks is None or not len(kept) else {"masks": np.ascontiguousarray(masks[kept])}
    out = pipeline(image=image, bboxes=boxes[kept], place=kept.astype(np.int64), **with_masks)
    place = np.asarray(out["place"], dtype=np.int64).reshape(-1)
    moved = np.asarray(out["bboxes"], dtype=np.float32).reshape(-1, 4)
    height, width = out["image"].shape[:2]
    if masks is not None:
        chosen = np.searchsorted(kept, place)
        masks = np.asarray(out["masks"])[chosen] if with_masks else np.zeros((0, height, width), np.uint8)
    return out["image"], moved, labels[place], masks


def resize(sample: Sample, height: int, width: int) -> Sample:
    """Another size; shrinking averages over the pixels, so that nothing is skipped."""
    import cv2

    A = _albumentations()
    H, W = sample[0].shape[:2]
    if sample[0].shape[:2] == (height, width):
        return sample
    kind = cv2.INTER_AREA if height < H and width < W else cv2.INTER_LINEAR
    return apply(A.Resize(height, width, interpolation=kind, mask_interpolation=cv2.INTER_NEAREST_EXACT, p=1), sample)


def crop(sample: Sample, top: int, left: int, height: int, width: int) -> Sample:
    """A part of the image."""
    A = _albumentations()
    if sample[0].shape[:2] == (height, width):
        return sample
    return apply(A.Crop(x_min=left, y_min=top, x_max=left + width, y_max=top + height, p=1), sample)


def pad(sample: Sample, height: int, width: int) -> Sample:
    """At least this size, by the mean colour at the bottom and the right."""
    A = _albumentations()
    if sample[0].shape[:2] == (height, width):
        return sample
    return apply(A.PadIfNeeded(height, width, position="top_left", fill=PAD_VALUE, fill_mask=0, p=1), sample)


def _zoom_out(sample: Sample) -> Sample:
    A = _albumentations()
    H, W = sample[0].shape[:2]
    factor = random.uniform(1, 4)
    below, right = int(H * factor) - H, int(W * factor) - W
    top, left = random.randint(0, below), random.randint(0, right)
    step = A.Pad(padding=(left, top, right - left, below - top), fill=PAD_VALUE, fill_mask=0, p=1)
    return apply(step, sample)


def _iou_crop(sample: Sample) -> Sample:
    """SSD's: up to 40 tries for a crop that covers some object by at least a drawn share; objects keep their centre."""
    image, boxes, labels, masks = sample
    H, W = image.shape[:2]
    least = random.choice((0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0))
    if least == 1.0:
        return sample
    for _ in range(40):
        h, w = int(random.uniform(0.3, 1) * H), int(random.uniform(0.3, 1) * W)
        if min(h, w) < 2 or not 0.5 <= w / h <= 2:
            continue
        top, left = random.randint(0, H - h), random.randint(0, W - w)
        window = np.array([left, top, left + w, top + h], dtype=np.float32)
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        inside = ((centres > window[:2]) & (centres < window[2:])).all(1)
        if not inside.any():
            continue
        low, high = np.maximum(boxes[inside, :2], window[:2]), np.minimum(boxes[inside, 2:], window[2:])
        common = (high - low).clip(min=0).prod(1)
        union = (boxes[inside, 2:] - boxes[inside, :2]).prod(1) + h * w - common
        if (common / union).max() < least:
            continue
        sample = (image, boxes[inside], labels[inside], masks[inside] if masks is not None else None)
        return crop(sample, top, left, h, w)
    return sample


def _distort(image: np.ndarray) -> np.ndarray:
    """Brightness, contrast, saturation and hue as SSD distorts them, contrast first or last."""
    A = _albumentations()
    step = A.ColorJitter(brightness=(0.875, 1.125), contrast=(0.5, 1.5), saturation=(0.5, 1.5), hue=(-0.05, 0.05), p=1)
    step.set_random_seed(random.getrandbits(31))
    return A.Compose([step], seed=random.getrandbits(31))(image=image)["image"]
