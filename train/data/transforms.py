"""Transforms of classification: timm's, typed, and with cheaper decoding of large JPEGs in training.

A camera's JPEG has ten times the pixels that a random crop resized to 224 needs. libjpeg can decode at 1/2,
1/4 or 1/8 of the size for a fraction of the cost. `TrainTransform.from_file` draws the crop first and then
decodes at the smallest size at which the crop still has `_MARGIN` times the pixels that it is resized to in
both directions, so that the reduced picture is still reduced by at least that factor with the usual filter: the
result stays above 40 dB PSNR of the full decoding's (median 48 dB; COCO photographs, crops resized to 64 and 96 px;
with a margin of 1 it would be 32 and 41 dB). Evaluation always decodes in full.
"""

from __future__ import annotations

import os
import random
import re
from typing import Literal

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data import auto_augment as auto_augment_operations
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode, resized_crop

from zoo.images import ImageSource, decode_rgb, open_encoded, read_image, read_orientation, to_rgb, upright
from zoo.preprocess import CropMode, EvalTransform, check_input_size, check_interpolation, to_channels

_MARGIN = 2.0
# EXIF orientation -> (axes swapped, x mirrored, y mirrored) from the upright to the stored picture
_TO_STORED = {
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


def build_transforms(
    *,
    train: bool,
    input_size: int | tuple[int, ...] = (3, 224, 224),
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
    interpolation: str = "bicubic",
    crop_pct: float = 0.875,
    crop_mode: CropMode = "center",
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    vflip: float = 0.0,
    color_jitter: float | tuple[float, ...] | None = 0.4,
    auto_augment: str | None = None,
    crop_padding: int | None = None,
    random_erasing: float = 0.0,
    erasing_mode: Literal["const", "rand", "pixel"] = "pixel",
    normalize: bool = True,
    reduced_decoding: bool = True,
) -> TrainTransform | EvalTransform:
    """timm's classification transform for training or evaluation.

    Args:
        train: random augmentation, or the fixed evaluation transform (which uses the first seven arguments only).
        input_size: (C, H, W), (H, W) or the side of a square; C is 3 or 1 (grey).
        mean, std: per channel, for values in 0..1.
        interpolation: "bicubic", "bilinear", ...; in training also "random" (one of these two for each picture).
        crop_pct, crop_mode: of the evaluation crop, see `zoo.preprocess.EvalTransform`.
        scale, ratio: ranges of the random crop's area, as a share of the picture's, and of its aspect ratio.
        hflip, vflip: probabilities of a flip.
        color_jitter: strength; None for none. Off while `auto_augment` is on, as in timm.
        auto_augment: a timm policy: "rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2", "3a", "original", ...; or
            torchvision's RandAugment, "torchvision-n2-m7": 2 operations of magnitude 7 out of 30, weaker than timm's.
        crop_padding: instead of the crop by `scale` and `ratio`: resize to `input_size` whatever the aspect ratio,
            pad all sides by so many black pixels and crop anywhere, as is usual on CIFAR.
        random_erasing: probability of erasing a rectangle; needs `normalize`.
        erasing_mode: erase with zeros, one random colour, or noise.
        normalize: off gives uint8 tensors (C, H, W), a quarter of the bytes between processes.
        reduced_decoding: decode large JPEGs at a lower resolution in `TrainTransform.from_file`.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """
    if not train:
        return EvalTransform(
            input_size,
            mean=mean,
            std=std,
            interpolation="bicubic" if interpolation == "random" else interpolation,
            crop_pct=crop_pct,
            crop_mode=crop_mode,
            normalize=normalize,
        )
    size = check_input_size(input_size)
    check_interpolation(interpolation, ("random",))
    _check_range("scale", scale, 1.0)
    _check_range("ratio", ratio, float("inf"))
    for name, value in (("hflip", hflip), ("vflip", vflip), ("random_erasing", random_erasing)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}, expected a probability between 0 and 1")
    if random_erasing and not normalize:
        raise ValueError("random_erasing needs normalize=True: erase on the device when pictures stay uint8")
    torchvisions = _torchvision_rand_augment(auto_augment, interpolation)
    try:
        steps = create_transform(
            size,
            is_training=True,
            mean=mean,
            std=std,
            interpolation=interpolation,
            scale=scale,
            ratio=ratio,
            hflip=hflip,
            vflip=vflip,
            color_jitter=None if torchvisions else color_jitter,
            auto_augment=None if torchvisions else auto_augment,
            re_prob=random_erasing,
            re_mode=erasing_mode,
            normalize=normalize,
        ).transforms
    except (AssertionError, KeyError, ValueError) as error:
        if auto_augment is None:
            raise
        raise ValueError(
            f"auto_augment is {auto_augment!r}, expected a timm policy such as 'rand-m9-mstd0.5-inc1'"
        ) from error
    for step in steps:
        _mend_posterize(step)
    if torchvisions:
        steps.insert(1 + (hflip > 0) + (vflip > 0), torchvisions)
    if crop_padding is not None:
        filter = str_to_pil_interp("bicubic" if interpolation == "random" else interpolation)
        crop = PaddedCrop(size[1:], crop_padding, filter)
        return TrainTransform(crop, transforms.Compose(steps[1:]), channels=size[0], reduced_decoding=False)
    crop = RandomCrop(size[1:], scale=scale, ratio=ratio, interpolation=interpolation)
    return TrainTransform(crop, transforms.Compose(steps[1:]), channels=size[0], reduced_decoding=reduced_decoding)


class RandomCrop(RandomResizedCropAndInterpolation):
    """timm's random resized crop, which on pictures of a few pixels can draw a crop without area."""

    @staticmethod
    def get_params(
        img: Image.Image, scale: tuple[float, float], ratio: tuple[float, float]
    ) -> tuple[int, int, int, int]:
        """Top, left, height and width of the crop; the random numbers are those that timm draws."""
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(img, scale, ratio)
        return min(top, img.height - 1), min(left, img.width - 1), max(1, height), max(1, width)

    def choose_interpolation(self) -> InterpolationMode:
        """The filter for the next picture: fixed, or drawn as timm draws it."""
        if isinstance(self.interpolation, tuple | list):
            return random.choice(self.interpolation)
        return self.interpolation


class PaddedCrop:
    """Resize to the size (H, W), pad by black pixels and crop that size anywhere: CIFAR's usual augmentation.

    Without padding it resizes only.
    """

    def __init__(self, size: tuple[int, int], padding: int, interpolation: InterpolationMode | int) -> None:
        self.size, self.padding, self.interpolation = size, padding, interpolation
        self.crop = transforms.RandomCrop(size, padding=padding or None)

    def __call__(self, image: Image.Image) -> Image.Image:
        """Transform a picture."""
        height, width = self.size
        if image.size != (width, height):
            image = image.resize((width, height), self.interpolation)
        return self.crop(image)

    def __repr__(self) -> str:
        return f"PaddedCrop({self.size}, padding={self.padding})"


class TrainTransform:
    """A random crop and what follows it: picture -> tensor (C, H, W).

    Called on a picture it is timm's transform. `from_file` gives the same, with the same random numbers, from
    a file that it may decode at a lower resolution.
    """

    def __init__(
        self,
        crop: RandomCrop | PaddedCrop,
        then: transforms.Compose,
        *,
        channels: int = 3,
        reduced_decoding: bool = True,
    ) -> None:
        self.crop, self.then = crop, then
        self.channels, self.reduced_decoding = channels, reduced_decoding

    def __call__(self, image: Image.Image) -> Tensor:
        """Transform an RGB picture."""
        return self.then(self.crop(to_channels(image, self.channels)))

    def from_file(self, source: ImageSource) -> Tensor:
        """Read and transform a picture.

        Raises:
            ImageError: it cannot be read; the message names it.
        """
        if not self.reduced_decoding or not isinstance(source, str | os.PathLike | bytes):
            return self(read_image(source))
        image, name = open_encoded(source)
        if image.format not in ("JPEG", "MPO"):
            return self(to_rgb(image, name, owned=True))
        return self.then(to_channels(self._decode_crop(image, name), self.channels))

    def _decode_crop(self, image: Image.Image, name: str) -> Image.Image:
        """The random crop of a JPEG that is not decoded yet, resized, upright."""
        orientation = read_orientation(image)
        swap, mirror_x, mirror_y = _TO_STORED[orientation]
        width, height = image.size  # as stored
        shape = Image.new("1", (height, width)) if swap else image  # a picture of the upright size
        top, left, crop_height, crop_width = self.crop.get_params(shape, self.crop.scale, self.crop.ratio)
        filter = self.crop.choose_interpolation()
        out_height, out_width = self.crop.size
        reduction = min(crop_height / out_height, crop_width / out_width) / _MARGIN
        if reduction < 2:
            rgb = to_rgb(image, name, owned=True)
            return resized_crop(rgb, top, left, crop_height, crop_width, self.crop.size, filter)
        # The crop in the stored picture, resized there and turned afterwards: turning 224 x 224 costs nothing.
        x0, y0, x1, y1 = left, top, left + crop_width, top + crop_height
        if swap:
            x0, y0, x1, y1 = y0, x0, y1, x1
            out_height, out_width = out_width, out_height
        if mirror_x:
            x0, x1 = width - x1, width - x0
        if mirror_y:
            y0, y1 = height - y1, height - y0
        factor = next(f for f in (8, 4, 2) if f <= reduction)
        drafted = image.draft(None, (width // factor, height // factor))
        factor = width / drafted[1][2] if drafted else 1  # what the decoder really does
        stored = decode_rgb(image, name, owned=True)
        box = (x0 / factor, y0 / factor, x1 / factor, y1 / factor)
        small = stored.resize((out_width, out_height), str_to_pil_interp(filter.value), box=box)
        return upright(small, orientation)

    def __repr__(self) -> str:
        return f"TrainTransform({self.crop}, {self.then})"


def _torchvision_rand_augment(policy: str | None, interpolation: str) -> transforms.RandAugment | None:
    if policy is None or not policy.startswith("torchvision"):
        return None
    found = re.fullmatch(r"torchvision-n(\d+)-m(\d+)", policy)
    if found is None or int(found[2]) > 30:
        raise ValueError(
            f"auto_augment is {policy!r}, expected torchvision-n2-m7 or the like: operations, and magnitude up to 30"
        )
    filter = InterpolationMode("bicubic" if interpolation == "random" else interpolation)
    return transforms.RandAugment(num_ops=int(found[1]), magnitude=int(found[2]), interpolation=filter)


def _mend_posterize(step: object) -> None:
    """Let an auto-augmentation step posterize to 0 bits, which Pillow 13 refuses and timm 1.0.31 asks for."""
    for operations in (getattr(step, "ops", ()), *getattr(step, "policy", ())):
        for operation in operations:
            if getattr(operation, "aug_fn", None) is auto_augment_operations.posterize:
                operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    if bits < 1:
        return Image.new(image.mode, image.size)  # no bit kept: black, as Pillow made it before
    return auto_augment_operations.posterize(image, bits)


def _check_range(name: str, values: tuple[float, float], limit: float) -> None:
    if len(values) != 2 or not 0 < values[0] <= values[1] <= limit:
        raise ValueError(
            f"{name} is {values}, expected (least, most) with 0 < least <= most" + (" <= 1" * (limit == 1))
        )
