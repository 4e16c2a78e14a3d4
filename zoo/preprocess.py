"""From a picture to a classifier's input in evaluation: timm's transform, safe for any aspect ratio.

timm resizes the whole picture and then crops its centre. For a 1000 x 8 strip that is a 28000 x 224 picture
of which one 224 x 224 square is kept. Here such pictures are cropped first and resized afterwards; all others
go through timm's own steps, so that their tensors are timm's to the last bit.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform, resolve_input_data_config
from timm.data.transforms import str_to_pil_interp
from torch import Tensor, nn
from torchvision import transforms

from zoo._timm import get_model_input_config

CropMode = Literal["center", "squash", "border"]

_MAX_ENLARGEMENT = 16  # pixels that timm's resize may produce, in multiples of the resize target's


class EvalTransform:
    """PIL picture -> normalised float tensor (C, H, W), as `timm.data.create_transform(is_training=False)`.

    Args:
        input_size: the model's input (C, H, W) or (H, W) or the side of a square; C is 3 or 1.
        mean, std: per channel, for values in 0..1.
        interpolation: "bicubic", "bilinear", "nearest", "lanczos", ...
        crop_pct: the crop's share of the resized picture.
        crop_mode: "center" (short side resized, centre cropped), "squash" (aspect ratio lost, nothing else),
            "border" (whole picture, padded).
        normalize: off gives uint8 tensors, to be normalised on the device.
    """

    def __init__(
        self,
        input_size: int | tuple[int, ...] = (3, 224, 224),
        *,
        mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
        interpolation: str = "bicubic",
        crop_pct: float = 0.875,
        crop_mode: CropMode = "center",
        normalize: bool = True,
    ) -> None:
        self.input_size = check_input_size(input_size)
        self.interpolation = check_interpolation(interpolation)
        self.mean, self.std = tuple(mean), tuple(std)
        self.crop_pct = crop_pct
        self.crop_mode = check_choice("crop_mode", crop_mode, ("center", "squash", "border"))
        if not 0 < crop_pct <= 2:
            raise ValueError(f"crop_pct is {crop_pct}, expected the crop's share of the resized picture, such as 0.875")
        self.timm = create_transform(
            self.input_size,
            is_training=False,
            mean=mean,
            std=std,
            interpolation=interpolation,
            crop_pct=crop_pct,
            crop_mode=crop_mode,
            normalize=normalize,
        )
        geometric = next(i for i, step in enumerate(self.timm.transforms) if not _is_geometric(step))
        self._crop = self.timm.transforms[geometric - 1]
        self._to_tensor = transforms.Compose(self.timm.transforms[geometric:])

    def __call__(self, image: Image.Image) -> Tensor:
        """Transform an upright RGB picture of any size."""
        image = to_channels(image, self.input_size[0])
        height, width = self._resized(image.height, image.width)
        if height * width <= _MAX_ENLARGEMENT * math.prod(self._target()) and min(height, width) > 0:
            return self.timm(image)
        return self._to_tensor(self._crop(self._resize_center(image, max(1, height), max(1, width))))

    def _target(self) -> tuple[int, int]:
        return tuple(math.floor(side / self.crop_pct) for side in self.input_size[1:])

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width to which timm resizes a picture before it crops."""
        target = self._target()
        if self.crop_mode == "squash":
            return target
        if self.crop_mode == "center" and target[0] == target[1]:  # torchvision's Resize(short side)
            if height <= width:
                return target[0], int(target[0] * width / height)
            return int(target[0] * height / width), target[0]
        choose = max if self.crop_mode == "border" else min
        ratio = choose(height / target[0], width / target[1])
        return round(height / ratio), round(width / ratio)

    def _resize_center(self, image: Image.Image, height: int, width: int) -> Image.Image:
        """The part of the picture resized to (height, width) that the centre crop keeps, computed alone."""
        crop_height, crop_width = min(height, self.input_size[1]), min(width, self.input_size[2])
        top, left = round((height - crop_height) / 2), round((width - crop_width) / 2)
        scale_y, scale_x = image.height / height, image.width / width
        box = (
            left * scale_x,
            top * scale_y,
            min((left + crop_width) * scale_x, image.width),
            min((top + crop_height) * scale_y, image.height),
        )
        return image.resize((crop_width, crop_height), str_to_pil_interp(self.interpolation), box=box)

    def __repr__(self) -> str:
        return f"EvalTransform({self.timm})"


def eval_transform_for(model: nn.Module) -> EvalTransform:
    """The evaluation transform of a live model.

    Size and channels are those it was built or last resized for (`img_size`, `in_chans`), else its pretrained
    cfg's; mean, std, interpolation and crop are the pretrained cfg's.

    Raises:
        ValueError: the model takes neither 3 nor 1 channels.
    """
    config = resolve_input_data_config(model, {"input_size": get_model_input_config(model)["input_size"]})
    return EvalTransform(
        config["input_size"],
        mean=config["mean"],
        std=config["std"],
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
    )


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """An RGB picture as the 3 or 1 channels that a model takes (grey by `convert("L")`, as timm's loaders)."""
    mode = "RGB" if channels == 3 else "L"
    return image if image.mode == mode else image.convert(mode)


def check_input_size(input_size: int | tuple[int, ...]) -> tuple[int, int, int]:
    """`input_size` as (C, H, W): from the side of a square, (H, W) or (C, H, W).

    Raises:
        ValueError: it is none of these, or has other than 3 or 1 channels.
    """
    sides = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    size = sides if len(sides) == 3 else (3, *sides)
    if len(size) != 3 or not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(f"input_size is {input_size}, expected a side, (H, W) or (C, H, W) of positive integers")
    if size[0] not in (1, 3):
        raise ValueError(f"input_size {size} has {size[0]} channels, pictures have 3 (RGB) or 1 (grey)")
    return size


def check_interpolation(name: str, extra: tuple[str, ...] = ()) -> str:
    """`name` if Pillow has that filter.

    Raises:
        ValueError: it has not.
    """
    return check_choice("interpolation", name, ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", *extra))


def check_choice(field: str, value: str, allowed: tuple[str, ...]) -> str:
    """`value` if it is one of `allowed`.

    Raises:
        ValueError: it is not; the message names `field` and the choices.
    """
    if value not in allowed:
        raise ValueError(f"{field} is {value!r}, expected one of {', '.join(allowed)}")
    return value


def _is_geometric(step: object) -> bool:
    name = type(step).__name__
    return "Resize" in name or "Crop" in name


def model_placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device and floating type of a model's first parameter or buffer; (cpu, float32) if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.float32
