"""Augmentation of images with labelled pixels, as the segmentation papers do it.

Ids are resized by the nearest neighbour and stay ids. Random numbers come from Python's global generator, which the
loaders seed for each sample. Images are resized by PIL's bilinear filter, which looks at every pixel of the source;
OpenCV's (and so albumentations') skips pixels when it shrinks.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from PIL import Image

from zoo.train.data.sizes import short_side_size

PAD_VALUE = 128  # of the image, before it is normalised; labels are padded with 0, no segment


def resize(image: np.ndarray, layers: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Image (H, W, 3) and id layers (L, H, W) at another size."""
    if image.shape[:2] == (height, width):
        return image, layers
    resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    rows = np.minimum(((np.arange(height) + 0.5) * (image.shape[0] / height)).astype(np.int64), image.shape[0] - 1)
    columns = np.minimum(((np.arange(width) + 0.5) * (image.shape[1] / width)).astype(np.int64), image.shape[1] - 1)
    return resized, layers[:, rows[:, None], columns]


class SegmentationAugmentation:
    """Random size, crop, colours and flip.

    Args:
        crop: (height, width) of the crop.
        short_sides: the shorter side becomes one of these, at random; empty for large-scale jitter.
        max_long: limit of the longer side.
        jitter: range of large-scale jitter (arXiv 2012.07177): the image is fitted into the crop's size times a
            factor drawn from it.
        color: SSD's colour distortion.
        hflip: probability of a horizontal flip.
        pad: give every image the crop's size, padded at the right and the bottom.
    """

    def __init__(
        self,
        crop: tuple[int, int],
        *,
        short_sides: Sequence[int] = (),
        max_long: int = 2048,
        jitter: tuple[float, float] | None = None,
        color: bool = True,
        hflip: float = 0.5,
        pad: bool = True,
    ):
        if bool(short_sides) == (jitter is not None):
            raise ValueError("give either short_sides or jitter")
        self.crop, self.short_sides, self.max_long = tuple(crop), tuple(short_sides), max_long
        self.jitter, self.color, self.hflip, self.pad = jitter, color, hflip, pad

    def __call__(self, image: np.ndarray, layers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Augment an image (H, W, 3) uint8 and its id layers (L, H, W)."""
        H, W = image.shape[:2]
        if self.short_sides:
            size = short_side_size(H, W, random.choice(self.short_sides), self.max_long)
        else:
            factor = random.uniform(*self.jitter)
            scale = min(factor * self.crop[0] / H, factor * self.crop[1] / W)
            size = max(1, round(H * scale)), max(1, round(W * scale))
        image, layers = resize(image, layers, *size)
        h, w = min(self.crop[0], size[0]), min(self.crop[1], size[1])
        top, left = random.randint(0, size[0] - h), random.randint(0, size[1] - w)
        image, layers = image[top : top + h, left : left + w], layers[:, top : top + h, left : left + w]
        if self.color:
            image = distort_colors(image)
        if random.random() < self.hflip:
            image, layers = image[:, ::-1], layers[:, :, ::-1]
        if self.pad and (h, w) != self.crop:
            below, right = self.crop[0] - h, self.crop[1] - w
            image = np.pad(image, ((0, below), (0, right), (0, 0)), constant_values=PAD_VALUE)
            layers = np.pad(layers, ((0, 0), (0, below), (0, right)))
        return image, layers


def distort_colors(image: np.ndarray) -> np.ndarray:
    """SSD's colour distortion (arXiv 1512.02325): brightness, contrast, saturation and hue, each with probability 1/2.

    Contrast comes first or last, at random. Hue turns by up to 18 of OpenCV's 180 units, 36 degrees.
    """
    if random.random() < 0.5:
        image = _clip(image.astype(np.float32) + random.uniform(-32, 32))
    contrast_last = random.random() < 0.5
    if not contrast_last:
        image = _contrast(image)
    image = _saturation_and_hue(image)
    return _contrast(image) if contrast_last else image


def _clip(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).astype(np.uint8)


def _contrast(image: np.ndarray) -> np.ndarray:
    return _clip(image.astype(np.float32) * random.uniform(0.5, 1.5)) if random.random() < 0.5 else image


def _saturation_and_hue(image: np.ndarray) -> np.ndarray:
    saturation = random.uniform(0.5, 1.5) if random.random() < 0.5 else None
    hue = random.randint(-18, 18) if random.random() < 0.5 else None
    if saturation is None and hue is None:
        return image
    import cv2

    hsv = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2HSV)
    if saturation is not None:
        hsv[..., 1] = _clip(hsv[..., 1].astype(np.float32) * saturation)
    if hue is not None:
        hsv[..., 0] = (hsv[..., 0].astype(np.int16) + hue) % 180
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
