"""One reader for pictures: whatever a user has, as an upright RGB `PIL.Image`, or one clear sentence.

Every door of zoo that takes a picture goes through `read_image`. What a viewer shows is what a model sees:
cameras' EXIF rotation is applied, 16-bit grey is scaled instead of clipped, and a file that cannot be decoded
to its last pixel is an error, never a half-grey picture.
"""

from __future__ import annotations

import os
import re
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError

ImageSource = str | os.PathLike | bytes | bytearray | memoryview | BinaryIO | Image.Image | np.ndarray | torch.Tensor

_ORIENTATION_TAG = 0x0112
# EXIF orientation -> what to do to the stored picture
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow and its decoders raise on damaged files; MemoryError and the like are not about the file.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # an error under `-W error`
)
_FLOAT_SLACK = 1e-3  # floats this far outside 0..1 are rounding (resizing with bicubic), not another scale
_strict_lock = threading.Lock()


class ImageError(ValueError):
    """A picture that cannot be used. The message is one sentence: which one, what is wrong, what to do."""


class ImageNotFoundError(ImageError, FileNotFoundError):
    """There is no such file."""


def read_image(source: ImageSource) -> Image.Image:
    """Any picture as an upright RGB `PIL.Image` that no longer depends on its file.

    Args:
        source: a path; the bytes of a file or a binary file object; a `PIL.Image`; an array (H, W) or
            (H, W, 1 | 3 | 4) or a tensor (1 | 3 | 4, H, W) or (H, W), of uint8, uint16, bool, or floats
            in 0..1.

    Conventions: the EXIF orientation is applied; alpha is dropped as `convert("RGB")` drops it; 16-bit grey
    is divided by 257; of an animation or a multi-page file the first frame counts; the file's extension
    does not count.

    Raises:
        ImageNotFoundError: no such file (an `ImageError` and a `FileNotFoundError`).
        ImageError: empty, not a picture, truncated, larger than Pillow's limit, or values without a defined
            range.
        TypeError: `source` is none of the above.
    """
    if isinstance(source, Image.Image):
        return to_rgb(source, describe_source(source))
    if isinstance(source, np.ndarray):
        return _from_array(source, "array")
    if isinstance(source, torch.Tensor):
        return _from_tensor(source)
    image, name = open_encoded(source)
    return to_rgb(image, name)


def describe_source(source: Any) -> str:
    """How messages name a picture: its path where it has one, else what kind of object it is."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, np.ndarray | torch.Tensor):
        return f"{'array' if isinstance(source, np.ndarray) else 'tensor'} of shape {tuple(source.shape)}"
    name = getattr(source, "filename", None) or getattr(source, "name", None)
    if isinstance(name, str | os.PathLike) and os.fspath(name):
        return os.fspath(name)
    if isinstance(source, bytes | bytearray | memoryview):
        return f"picture of {len(source)} bytes"
    return "picture"


def open_encoded(
    source: str | os.PathLike | bytes | bytearray | memoryview | BinaryIO,
) -> tuple[Image.Image, str]:
    """The picture in a file, not yet decoded, and its name for messages.

    The whole file is in memory afterwards: nothing stays open, and `draft` can still be called.

    Raises:
        ImageNotFoundError, ImageError, TypeError: as for `read_image`.
    """
    name = describe_source(source)
    data = _read_bytes(source, name)
    if not data:
        raise ImageError(f"{name} is empty (0 bytes): copy or download it again")
    try:
        image = Image.open(BytesIO(data))
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not a picture: {_guess_content(data)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name} is too large: {_bomb_reason(error)}") from error
    except _DECODE_ERRORS as error:
        raise ImageError(f"{name} cannot be opened as a picture: {_one_line(error)}") from error
    zeros = _zero_tail(data, image.format)
    if zeros:
        raise ImageError(f"{name} is incomplete: its last {zeros} bytes are zeros; copy or download it again")
    return image, name


def to_rgb(image: Image.Image, name: str = "picture", *, owned: bool = False) -> Image.Image:
    """`image` decoded in full, as a new upright RGB picture without metadata.

    With `owned` the caller gives `image` up: where nothing has to be changed it is returned itself, not a copy.

    Raises:
        ImageError: it is truncated or damaged, or its mode has no defined conversion to RGB.
    """
    rgb = decode_rgb(image, name, owned=owned)
    return upright(rgb, read_orientation(image))  # some formats hold their EXIF block behind the pixels


def decode_rgb(image: Image.Image, name: str = "picture", *, owned: bool = False) -> Image.Image:
    """`image` decoded in full, in RGB, turned as it is stored; `owned` as in `to_rgb`.

    Raises:
        ImageError: as `to_rgb`.
    """
    try:
        with _strict_decoding():
            image.load()
    except _DECODE_ERRORS as error:
        reason = _one_line(error)
        state = "truncated" if "truncated" in reason.lower() else "damaged"
        hint = "" if state == "truncated" else f" ({reason})"
        raise ImageError(f"{name} is {state}: it ends or breaks before its last pixel{hint}; copy it again") from error
    if owned and image.mode == "RGB":
        return image
    try:
        rgb = _convert(image, name)
    except ImageError:
        raise
    except _DECODE_ERRORS as error:
        raise ImageError(f"{name} has mode {image.mode}, which has no conversion to RGB: {_one_line(error)}") from error
    rgb.info = {}
    return rgb


def read_orientation(image: Image.Image) -> int:
    """The EXIF orientation 1..8 of an opened picture; 1 where there is none or it makes no sense."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # EXIF blocks are broken in every imaginable way and never worth losing a picture for
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """A picture as stored, turned by its EXIF orientation 1..8; the same object if that is 1."""
    return image.transpose(_TRANSPOSE[orientation]) if orientation in _TRANSPOSE else image


def _convert(image: Image.Image, name: str) -> Image.Image:
    """A decoded picture in RGB, always a new object of the plain class."""
    if image.mode == "RGB":
        return image.copy()
    if image.mode.startswith("I;16"):  # convert() clips these at 255
        return Image.fromarray(_scale_16_bit(np.asarray(image))).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        if image.mode == "I" and values.min() >= 0 and values.max() <= 65535:
            return Image.fromarray(_scale_16_bit(values)).convert("RGB")
        return _from_array(values, name)
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        # convert() to RGB warns about the transparency that it drops
        return image.convert("RGBA").convert("RGB")
    if image.mode == "La":
        return image.convert("LA").convert("RGB")
    if image.mode == "RGBa":
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _scale_16_bit(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _from_tensor(tensor: torch.Tensor) -> Image.Image:
    shape = tuple(tensor.shape)
    if tensor.ndim == 4:
        raise ImageError(f"tensor of shape {shape} is a batch: pass its pictures one by one, or list(tensor)")
    if tensor.ndim not in (2, 3) or (tensor.ndim == 3 and shape[0] not in (1, 3, 4)):
        hint = "; call .permute(2, 0, 1)" if tensor.ndim == 3 and shape[2] in (1, 3, 4) else ""
        raise ImageError(f"tensor of shape {shape} is not a picture: expected (3, H, W), (1, H, W) or (H, W){hint}")
    tensor = tensor.detach().cpu()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    if tensor.ndim == 3:
        tensor = tensor.permute(1, 2, 0)
    return _from_array(tensor.numpy(), "tensor", shape)


def _from_array(values: np.ndarray, name: str, shape: tuple[int, ...] | None = None) -> Image.Image:
    shape = shape or values.shape
    if name in ("array", "tensor"):
        name = f"{name} of shape {tuple(shape)}"
    if values.ndim == 4:
        raise ImageError(f"{name} is a batch: pass its pictures one by one, or list(array)")
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (1, 3, 4)):
        hint = "; call .transpose(1, 2, 0)" if values.ndim == 3 and values.shape[0] in (1, 3, 4) else ""
        raise ImageError(f"{name} is not a picture: expected (H, W), (H, W, 3), (H, W, 1) or (H, W, 4){hint}")
    if values.size == 0:
        raise ImageError(f"{name} has no pixels")
    if values.dtype == np.bool_:
        values = values.astype(np.uint8) * 255
    elif values.dtype == np.uint16:
        values = _scale_16_bit(values)
    elif values.dtype.kind == "f":
        low, high = float(values.min()), float(values.max())
        if not (low >= -_FLOAT_SLACK and high <= 1 + _FLOAT_SLACK):  # also false for NaN
            raise ImageError(
                f"{name} has floats from {low:.4g} to {high:.4g}, expected 0..1: divide 8-bit values by 255 "
                "or undo the normalisation"
            )
        values = np.rint(values.clip(0, 1) * 255).astype(np.uint8)
    elif values.dtype != np.uint8:
        raise ImageError(
            f"{name} has type {values.dtype}, expected uint8 (0..255), uint16 (0..65535), bool or floats in "
            "0..1: convert it, for example with .astype('uint8')"
        )
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(values)).convert("RGB")


def _read_bytes(source: Any, name: str) -> bytes:
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, str | os.PathLike):
        try:
            # a place inside an archive reads itself
            return source.read_bytes() if hasattr(source, "read_bytes") else Path(source).read_bytes()
        except FileNotFoundError as error:
            web = re.match(r"(https?|s3|gs|ftp)://", name)
            hint = "download it first, addresses are not opened" if web else "check the path"
            raise ImageNotFoundError(f"no picture at {name}: {hint}") from error
        except IsADirectoryError as error:
            raise ImageError(f"{name} is a folder: pass one picture, or a list of the pictures in it") from error
        except (OSError, ValueError) as error:
            if Path(name).is_dir():  # how Windows says it
                raise ImageError(f"{name} is a folder: pass one picture, or a list of the pictures in it") from error
            raise ImageError(f"{name} cannot be read: {_one_line(error)}") from error
    if hasattr(source, "read"):
        data = source.read()
        if not isinstance(data, bytes):
            raise ImageError(f"{name} was opened as text: open it with mode 'rb'")
        return data
    raise TypeError(
        f"a picture is a path, bytes, a file object, a PIL image, an array or a tensor, got {type(source).__name__}"
    )


@contextmanager
def _strict_for_a_moment() -> Iterator[None]:
    with _strict_lock:
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def _strict_decoding():
    """Switch off the process-wide flag with which other packages let Pillow fill missing rows with grey."""
    return _strict_for_a_moment() if ImageFile.LOAD_TRUNCATED_IMAGES else nullcontext()


def _zero_tail(data: bytes, format: str | None) -> int:
    """How many zero bytes stand where a compressed picture should go on: a download that was cut short.

    JPEG and GIF decoders notice; these formats' decoders fill the picture up. 0 if the file looks complete.
    """
    if format not in ("PNG", "WEBP", "AVIF", "JPEG2000") or data[-256:].count(0) < 256:
        return 0
    body = data.rstrip(b"\0")
    if format == "PNG" and body[-16:].find(b"IEND") >= 0:  # padding behind a complete picture
        return 0
    if format == "WEBP" and len(body) >= struct.unpack("<I", data[4:8])[0]:
        return 0
    return len(data) - len(body)


def _guess_content(data: bytes) -> str:
    head = data[:512]
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, run `git lfs pull`"
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"mif1", b"hevc", b"msf1"):
        return "it is HEIC, convert it to JPEG or call pillow_heif.register_heif_opener() first"
    stripped = head.lstrip().lower()
    if stripped.startswith((b"<!doctype html", b"<html")):
        return "it is a web page, the download was redirected"
    if stripped.startswith((b"<svg", b"<?xml")):
        return "it is XML or SVG, convert it to PNG"
    if head.startswith((b"PK\x03\x04", b"\x1f\x8b")):
        return "it is an archive, unpack it"
    if not head.strip(b"\0"):
        return "it holds zeros only, copy or download it again"
    try:
        text = head.decode("utf-8").split("\n")[0].strip()
    except UnicodeDecodeError:
        return f"no format that Pillow reads begins with {data[:8].hex(' ')}"
    if text.isprintable():
        shown = text if len(text) <= 40 else text[:40] + "..."
        return f"it is text ({shown!r})"
    return f"no format that Pillow reads begins with {data[:8].hex(' ')}"


def _bomb_reason(error: Exception) -> str:
    numbers = re.findall(r"\d+", str(error))
    what = f"{int(numbers[0]):,} pixels" if numbers else "more pixels than allowed"
    return f"{what}, beyond Pillow's limit; if you trust the file, raise PIL.Image.MAX_IMAGE_PIXELS"


def _one_line(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"\s+", " ", text)[:160]
