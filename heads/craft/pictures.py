"""Enlarging the pictures that people have: any size and mode, in a stated amount of memory, with their metadata.

Grey pictures stay grey, 16-bit grey ones keep their 16 bits, transparency is kept (enlarged bicubically), palettes
become true colour, CMYK becomes RGB (Pillow's conversion; its ICC profile no longer applies and is dropped). The EXIF
orientation is applied and set to 1, the rest of EXIF and the ICC profile stay. Of animations the first frame counts.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zoo.heads.craft.model import Craft
from zoo.heads.craft.padding import Padding, pad_image, padded_size
from zoo.heads.craft.strips import LIVE_MAPS, TOKENS, Storage, forward_strips, total_work
from zoo.heads.craft.tiling import enlarge_tiled, self_ensemble
from zoo.images import (
    ImageError,
    ImageSource,
    decode_rgb,
    describe_source,
    open_encoded,
    read_image,
    read_orientation,
    upright,
)
from zoo.imresize import imresize, to_uint8
from zoo.prediction import Prediction

_ORIENTATION = 0x0112
# tags that say how a TIFF file stores its pixels, which Pillow lists among its EXIF tags
_STORAGE_TAGS = {
    *range(254, 260),
    262,
    266,
    273,
    *range(277, 281),
    284,
    *range(317, 339),
    339,
    347,
    34675,
    530,
    531,
    532,
}
_LUMA = (0.299, 0.587, 0.114)
# extension -> Pillow's format, longest side, transparency, 16 bits
_FORMATS = {
    ".png": ("PNG", 2**31 - 1, True, True),
    ".tif": ("TIFF", 2**31 - 1, True, True),
    ".tiff": ("TIFF", 2**31 - 1, True, True),
    ".webp": ("WEBP", 16383, True, False),
    ".jpg": ("JPEG", 65500, False, False),
    ".jpeg": ("JPEG", 65500, False, False),
    ".bmp": ("BMP", 2**31 - 1, False, False),
}


@dataclass
class Picture:
    """A decoded picture.

    Attributes:
        values: (H, W) grey or (H, W, 3) RGB, uint8 or uint16.
        alpha: (H, W) uint8, where it has transparency.
        name: for messages.
        metadata: `icc_profile` and `exif`, as Pillow writes them.
    """

    values: np.ndarray
    alpha: np.ndarray | None = None
    name: str = "picture"
    metadata: dict = field(default_factory=dict)

    def tensor(self) -> Tensor:
        """(1, C, H, W) in 0..1, float32."""
        top = 65535 if self.values.dtype == np.uint16 else 255
        values = torch.from_numpy(self.values.astype(np.float32)) / top
        return values[None, None] if values.dim() == 2 else values.permute(2, 0, 1)[None]

    def to_image(self) -> Image.Image:
        """As a `PIL.Image` of mode L, LA, RGB, RGBA or I;16."""
        image = Image.fromarray(self.values)
        if self.alpha is not None:
            image.putalpha(Image.fromarray(self.alpha))
        return image

    def save(self, path: str | os.PathLike) -> None:
        """Write it; the file appears under its name when it is complete.

        Raises:
            ImageError: the format cannot hold it.
        """
        path = Path(path)
        check_format(path, self)
        format = _FORMATS[path.suffix.lower()][0]
        options = dict(self.metadata)
        if format == "BMP":
            options = {}
        if format in ("JPEG", "WEBP"):
            options["quality"] = 95
        part = path.with_name(f".{path.name}.part")
        try:
            self.to_image().save(part, format=format, **options)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def check_format(path: Path, picture: Picture, scale: int = 1) -> None:
    """Whether a file of this name can hold the picture (enlarged `scale` times).

    Raises:
        ImageError: it cannot; says what can.
    """
    if path.suffix.lower() not in _FORMATS:
        known = ", ".join(sorted(_FORMATS))
        raise ImageError(f"{path} has no extension of a picture that can be written: use one of {known}")
    format, longest, transparency, deep = _FORMATS[path.suffix.lower()]
    height, width = (n * scale for n in picture.values.shape[:2])
    if max(height, width) > longest:
        raise ImageError(
            f"{format} holds at most {longest} pixels a side, {path} would have {width}x{height}: use .png"
        )
    if picture.alpha is not None and not transparency:
        raise ImageError(f"{picture.name} has transparency, which {format} cannot hold: write {path.stem}.png")
    if picture.values.dtype == np.uint16 and not deep:
        raise ImageError(f"{picture.name} has 16 bits a pixel, which {format} cannot hold: write {path.stem}.png")
    if picture.values.dtype == np.uint16 and picture.alpha is not None:
        raise ImageError(f"{picture.name} has 16 bits and transparency, which cannot be written together")


def read_picture(source: ImageSource) -> Picture:
    """Any picture that `zoo.read_image` takes, with grey, depth, transparency and metadata kept.

    Raises:
        ImageError: as `zoo.read_image`.
    """
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return Picture(np.asarray(read_image(source)), name=describe_source(source))
    if isinstance(source, Image.Image):
        image, name = source, describe_source(source)
    else:
        image, name = open_encoded(source)
    rgb = decode_rgb(image, name)  # decodes `image` too, and refuses what is damaged
    turn = read_orientation(image)
    values, alpha, same_colours = _channels(image, rgb)
    metadata = {}
    if same_colours and image.info.get("icc_profile"):
        metadata["icc_profile"] = image.info["icc_profile"]
    exif = _exif(image)
    if exif is not None:
        metadata["exif"] = exif
    turned = [None if v is None else np.asarray(upright(Image.fromarray(v), turn)) for v in (values, alpha)]
    return Picture(turned[0], turned[1], name, metadata)


def _channels(image: Image.Image, rgb: Image.Image) -> tuple[np.ndarray, np.ndarray | None, bool]:
    """Values, transparency, and whether the profile of the file still describes the values."""
    mode = image.mode
    if mode.startswith("I;16") or mode == "I":
        values = np.asarray(image)
        if mode == "I" and not (values.min() >= 0 and values.max() <= 65535):
            return np.asarray(rgb.convert("L")), None, False
        return values.astype(np.uint16), None, True
    if mode in ("1", "L", "F"):
        if mode == "L" and "transparency" in image.info:
            both = image.convert("LA")
            return np.asarray(both.getchannel("L")), np.asarray(both.getchannel("A")), True
        return np.asarray(rgb.getchannel("R")), None, True
    if mode in ("LA", "La"):
        both = image.convert("LA")
        return np.asarray(both.getchannel("L")), np.asarray(both.getchannel("A")), True
    if mode in ("RGBA", "RGBa", "PA") or (mode in ("RGB", "P") and "transparency" in image.info):
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
        return np.asarray(rgb), alpha, True
    return np.asarray(rgb), None, mode in ("RGB", "P")


def _exif(image: Image.Image) -> bytes | None:
    try:
        exif = image.getexif()
        if _ORIENTATION in exif:
            exif[_ORIENTATION] = 1
        for tag in _STORAGE_TAGS.intersection(exif):
            del exif[tag]
        return exif.tobytes() if len(exif) else None
    except Exception:  # broken EXIF blocks are common and never worth losing a picture for
        return None


# Memory -------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How an image is enlarged: whole in memory, exactly with maps in files, or approximately in tiles."""

    how: Literal["memory", "files", "tiles"]
    tile: int | None
    peak: int
    reason: str


def strip_bytes(model: Craft, width: int, tokens: int = TOKENS) -> int:
    """Bytes that the strips of an image of this width need at a time, at most."""
    wide = 2 * 2 * model.layers[0].residual_group.hf_blocks[0].ffn.project_out.in_channels  # 1x1 and 3x3 outputs
    rows = max(model.multiple, tokens // max(width, 1) // model.multiple * model.multiple) + 2
    return rows * width * (wide + 6 * model.embed_dim) * model.mean.element_size()


def whole_bytes(model: Craft, height: int, width: int) -> int:
    """Bytes that an image of this size needs at its peak when nothing is put into files."""
    pixels = height * width
    numbers = LIVE_MAPS * model.embed_dim + model.in_chans * (1 + 2 * model.scale**2)
    return pixels * numbers * model.mean.element_size() + strip_bytes(model, width)


def available_memory() -> int:
    """Bytes that this process can be expected to get."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 4 * 2**30


def make_plan(
    model: Craft,
    height: int,
    width: int,
    max_memory: int | None = None,
    tile: int | None = None,
    folder: str | None = None,
    padding: Padding = "official",
) -> Plan:
    """Choose how to enlarge an image: exact while memory or disk hold it, else tiles.

    Args:
        model: the model.
        height: rows of the image.
        width: columns.
        max_memory: bytes; 70 % of what is free by default.
        tile: ask for tiles of this size.
        folder: where maps can be put; the system's folder of temporary files by default.
        padding: of the image.

    Raises:
        ValueError: the memory is too small for anything.
    """
    budget = int(0.7 * available_memory()) if max_memory is None else max_memory
    height, width = (padded_size(n, model.multiple, padding) for n in (height, width))
    whole = whole_bytes(model, height, width)
    if tile is not None:
        return Plan("tiles", tile, whole_bytes(model, tile, tile), "tiles were asked for")
    if whole <= budget:
        return Plan("memory", None, whole, "it fits into memory")
    strips = strip_bytes(model, width, tokens=1) + 4 * height * width * model.scale**2
    on_disk = whole - strip_bytes(model, width)
    free = shutil.disk_usage(folder or tempfile.gettempdir()).free
    if strips <= budget and on_disk * 1.1 <= free:
        return Plan("files", None, strips, f"{_shown(whole)} are more than {_shown(budget)}")
    for size in range(512, 31, -32):
        if whole_bytes(model, size, size) + 4 * height * width * model.scale**2 <= budget:
            reason = f"neither {_shown(budget)} of memory nor {_shown(free)} of disk hold it"
            return Plan("tiles", size, whole_bytes(model, size, size), reason)
    raise ValueError(
        f"max_memory is {_shown(budget)}, too small for {width * model.scale}x{height * model.scale} pixels: "
        f"allow {_shown(whole_bytes(model, 64, 64) + 4 * height * width * model.scale**2)} or more"
    )


def _shown(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size / 1e3:.0f} kB"


# Enlarging ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def enlarge(
    model: Craft,
    image: Tensor,
    *,
    padding: Padding = "official",
    tile: int | None = None,
    overlap: int = 32,
    max_memory: int | None = None,
    ensemble: bool = False,
    folder: str | None = None,
    step: Callable[[float], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> Tensor:
    """(B, C, H, W) in 0..1 to (B, C, scale*H, scale*W), not clamped, in bounded memory.

    Exact, whatever the memory, unless tiles are asked for or neither memory nor disk hold the maps.

    Args:
        model: in eval mode.
        image: any size.
        padding: see `zoo.heads.craft.padding`.
        tile: approximate tiles of this size.
        overlap: pixels that tiles share.
        max_memory: bytes.
        ensemble: average the eight flips and transposes.
        folder: for maps that memory does not hold.
        step: called with shares of the work, which add up to 1.
        say: takes a sentence where the way is not the usual one.

    Raises:
        ValueError: too little memory for anything.
    """
    plan = make_plan(model, *image.shape[2:], max_memory, tile, folder, padding)
    if say is not None and plan.how == "files":
        say(f"exact, with intermediate maps in {folder or tempfile.gettempdir()}: {plan.reason}")
    if say is not None and plan.how == "tiles":
        say(f"approximate, in tiles of {plan.tile} with overlap {min(overlap, plan.tile // 4)}: {plan.reason}")
    share = 1 / 8 if ensemble else 1.0

    def exact(x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        padded = pad_image(x, model.multiple, padding)
        on_cpu = x.device.type == "cpu"
        if plan.how == "memory" and not on_cpu:
            out = model.forward_padded(padded)
            if step is not None:
                step(share)
        else:
            storage = Storage((folder or tempfile.gettempdir()) if plan.how == "files" else None)
            size = (len(x), model.in_chans, padded.shape[2] * model.scale, padded.shape[3] * model.scale)
            out = storage.map(size[2], size[3], size[0] * size[1], x).view(size[2], size[3], *size[:2])
            out = out.permute(2, 3, 0, 1)
            total = total_work(model) * len(x)
            forward_strips(
                model,
                padded,
                storage=storage,
                tokens=1 if plan.how == "files" else None,
                step=None if step is None else (lambda done: step(share * done / total)),
                out=out,
            )
        return out[:, :, : height * model.scale, : width * model.scale]

    def tiled(x: Tensor) -> Tensor:
        return enlarge_tiled(
            lambda part: model.upscale(part, padding="reflect"),
            x,
            model.scale,
            plan.tile,
            min(overlap, plan.tile // 4),
            blend=True,
            step=None if step is None else (lambda done: step(share * done)),
        )

    run = tiled if plan.how == "tiles" else exact
    return self_ensemble(run, image) if ensemble else run(image)


def upscale_picture(model: Craft, source: ImageSource | Picture, **options) -> Picture:
    """Enlarge a picture; `options` as for `enlarge`.

    Raises:
        ImageError: it cannot be read.
        ValueError: the model takes another number of channels.
    """
    like = model.conv_first.weight
    return enlarge_picture(
        lambda x: enlarge(model, x.to(like.device, like.dtype), **options), source, model.in_chans, model.scale
    )


def enlarge_picture(
    run: Callable[[Tensor], Tensor], source: ImageSource | Picture, in_chans: int, scale: int
) -> Picture:
    """Enlarge a picture by any function from (B, C, H, W) in 0..1 to (B, C, scale*H, scale*W).

    Raises:
        ImageError: it cannot be read.
        ValueError: the function takes another number of channels than pictures have.
    """
    picture = source if isinstance(source, Picture) else read_picture(source)
    x = picture.tensor()
    grey = x.shape[1] == 1
    if in_chans == 3:
        x = x.expand(-1, 3, -1, -1)
    elif in_chans == 1:
        x = x.transpose(0, 1)  # each colour is a grey picture of its own
    else:
        raise ValueError(f"the model takes images of {in_chans} channels, and pictures have 1 or 3")
    y = run(x)
    if in_chans == 1:
        y = y.transpose(0, 1)
    elif grey:
        y = (y * torch.tensor(_LUMA, device=y.device, dtype=y.dtype).reshape(3, 1, 1)).sum(1, keepdim=True)
    values = _quantised(y[0], picture.values.dtype)
    alpha = None
    if picture.alpha is not None:
        alpha = to_uint8(imresize(picture.alpha, scale))
    return Picture(values[..., 0] if grey else values, alpha, picture.name, picture.metadata)


def _quantised(image: Tensor, dtype: np.dtype) -> np.ndarray:
    """(C, H, W) in 0..1 to whole numbers (H, W, C), some rows at a time."""
    top = np.iinfo(dtype).max
    out = np.empty((*image.shape[1:], image.shape[0]), dtype=dtype)
    for r in range(0, len(out), 256):
        rows = image[:, r : r + 256].permute(1, 2, 0).float().cpu().clamp(0, 1)
        out[r : r + 256] = np.floor(rows.numpy().astype(np.float64) * top + 0.5).astype(dtype)
    return out


@dataclass(frozen=True)
class UpscalePrediction(Prediction):
    """An enlarged picture: `picture` with its metadata, `image` as a `PIL.Image`."""

    picture: Picture | None = None
    scale: int = 1

    @property
    def image(self) -> Image.Image:
        """The result."""
        return self.picture.to_image()

    def draw(self, image: ImageSource) -> Image.Image:
        """The original enlarged bicubically, and the result, side by side."""
        plain = read_image(image)
        result = self.image.convert("RGB") if self.picture.values.dtype == np.uint8 else read_image(self.image)
        enlarged = plain.resize(result.size, Image.Resampling.BICUBIC)
        sheet = Image.new("RGB", (2 * result.width, result.height))
        sheet.paste(enlarged, (0, 0))
        sheet.paste(result, (result.width, 0))
        return sheet

    def to_dict(self) -> dict:
        """Plain JSON: the scale and the size of the result."""
        height, width = self.picture.values.shape[:2]
        return {"task": self.task, "source": self.source, "scale": self.scale, "width": width, "height": height}

    def __str__(self) -> str:
        height, width = self.picture.values.shape[:2]
        return f"{self.source + ': ' if self.source else ''}{width}x{height}"


def predict(model: Craft, image: ImageSource, **options) -> UpscalePrediction:
    """Enlarge one picture: what `Craft.predict` does."""
    picture = upscale_picture(model, image, **options)
    path = os.fspath(image) if isinstance(image, str | os.PathLike) else None
    return UpscalePrediction("super-resolution", (), (), (), path, picture, model.scale)
