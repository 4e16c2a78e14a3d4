"""Pictures for super-resolution: pairs of folders, or high-resolution pictures alone.

    data = open_superresolution("DF2K/HR", scale=4, lr="DF2K/LR_bicubic/X4", patch=64)
    low, high = data[0]                                       # uint8 (3, 64, 64) and (3, 256, 256)

Low-resolution pictures that are not given are made as the published test sets were (`zoo.imresize.shrink`). Decoding a
large PNG for one small crop would limit training, so pictures are decoded once: into memory, or into `.npy` files of a
cache folder, of which a crop touches only its own part.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from zoo.images import ImageError, read_image
from zoo.imresize import imresize, shrink, to_uint8
from zoo.train.data.classification import find_images
from zoo.train.data.errors import BadFile, DataError, DataNotFoundError


class Pair(NamedTuple):
    """Paths of a high-resolution picture and of its low-resolution version (None: to be made)."""

    high: str
    low: str | None


class SuperResolutionData(Dataset):
    """Random crops of pairs for training, or whole pairs for evaluation.

    An item is (low, high), both uint8 (C, h, w). With `patch`, a crop of the low-resolution picture and its
    counterpart, flipped and transposed at random (each with probability 1/2, by Python's `random`, which
    `SeededDataset` seeds).

    Args:
        pairs: the pictures.
        scale: high-resolution pixels for each low-resolution one, along an axis.
        patch: rows and columns of the low-resolution crop; None for whole pictures.
        repeat: how often a picture counts in an epoch.
        augment: flip and transpose crops.
        hr_shrink: make the high-resolution pictures so many times smaller first, which hides JPEG's artefacts.
        cache: "memory", a folder for `.npy` files, or None to decode each time.
        left_out: files that are not used, with the reason.
    """

    def __init__(
        self,
        pairs: list[Pair],
        scale: int,
        *,
        patch: int | None = None,
        repeat: int = 1,
        augment: bool = True,
        hr_shrink: float = 1.0,
        cache: str | os.PathLike | None = "memory",
        left_out: list[BadFile] | None = None,
    ):
        self.pairs, self.scale, self.patch, self.repeat, self.augment = pairs, scale, patch, repeat, augment
        self.hr_shrink = hr_shrink
        self.cache = cache
        self.left_out = left_out or []
        self._decoded: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        if cache not in (None, "memory"):
            Path(cache).mkdir(parents=True, exist_ok=True)

    classes = ()  # what the loaders of other tasks ask for

    def __len__(self) -> int:
        return len(self.pairs) * self.repeat

    def picture(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The low- and the high-resolution picture, uint8 (h, w, 3), the latter cut to a multiple of the scale.

        Raises:
            ImageError: a file cannot be read; it is named.
            DataError: the two do not belong together, or are smaller than the crop.
        """
        if index in self._decoded:
            return self._decoded[index]
        if self.cache in (None, "memory"):
            pair = self._decode(self.pairs[index])
        else:
            pair = self._from_files(self.pairs[index])
        if self.cache is not None:
            self._decoded[index] = pair  # of memory-mapped files: the handles
        return pair

    def _decode(self, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
        high = np.asarray(read_image(pair.high))
        if self.hr_shrink != 1:
            high = to_uint8(imresize(high, 1 / self.hr_shrink))
        s = self.scale
        if min(high.shape[:2]) < s:
            raise DataError(f"{pair.high} has {high.shape[1]}x{high.shape[0]} pixels, fewer than scale {s} needs")
        if pair.low is None:
            low = shrink(high, s)
        else:
            low = np.asarray(read_image(pair.low))
            expected = (high.shape[0] // s, high.shape[1] // s)
            if low.shape[:2] != expected:
                raise DataError(
                    f"{pair.low} has {low.shape[1]}x{low.shape[0]} pixels, expected {expected[1]}x{expected[0]}, "
                    f"a {s}th of {pair.high}: is it of another picture or scale?"
                )
        if self.patch and min(low.shape[:2]) < self.patch:
            raise DataError(
                f"{pair.high} is {low.shape[1]}x{low.shape[0]} pixels at low resolution, smaller than the patch of "
                f"{self.patch}: use a smaller patch or leave it out"
            )
        return low, np.ascontiguousarray(high[: low.shape[0] * s, : low.shape[1] * s])

    def _from_files(self, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
        parts = [str(self.scale), str(self.hr_shrink)]
        for path in filter(None, pair):
            stat = os.stat(path)
            parts += [os.path.abspath(path), str(stat.st_mtime_ns), str(stat.st_size)]
        stem = Path(self.cache) / hashlib.blake2b("|".join(parts).encode(), digest_size=12).hexdigest()
        files = [stem.with_suffix(suffix) for suffix in (".low.npy", ".high.npy")]
        if not all(file.is_file() for file in files):
            for file, values in zip(files, self._decode(pair)):
                # several workers may decode the same picture: each writes its own file and renames it
                part = file.with_suffix(f".{os.getpid()}.part")
                with part.open("wb") as out:
                    np.save(out, values)
                os.replace(part, file)
        low, high = (np.load(file, mmap_mode="r") for file in files)
        if self.patch and min(low.shape[:2]) < self.patch:
            raise DataError(f"{pair.high} is smaller than the patch of {self.patch} at low resolution")
        return low, high

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        low, high = self.picture(index % len(self.pairs))
        if self.patch:
            low, high = self._crop(low, high)
        return _to_tensor(low), _to_tensor(high)

    def _crop(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p, s = self.patch, self.scale
        r, c = (random.randint(0, n - p) for n in low.shape[:2])
        low, high = low[r : r + p, c : c + p], high[r * s : (r + p) * s, c * s : (c + p) * s]
        if self.augment:
            if random.random() < 0.5:
                low, high = low[:, ::-1], high[:, ::-1]
            if random.random() < 0.5:
                low, high = low[::-1], high[::-1]
            if random.random() < 0.5:
                low, high = low.transpose(1, 0, 2), high.transpose(1, 0, 2)
        return low, high

    def drop_small(self) -> list[BadFile]:
        """Leave out pictures that are smaller than the patch; returns and remembers them."""
        kept, small = [], []
        for index, pair in enumerate(self.pairs):
            try:
                decoded = self.picture(index)
            except DataError as error:
                small.append(BadFile(pair.high, str(error)))
                continue
            kept.append((pair, decoded))
        self.pairs = [pair for pair, _ in kept]
        self._decoded = dict(enumerate(d for _, d in kept)) if self.cache is not None else {}
        self.left_out += small
        if not self.pairs:
            raise DataError(f"no picture is large enough for patches of {self.patch}: {small[0].reason}")
        return small


def _to_tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


def open_superresolution(
    high: str | os.PathLike | list[str | os.PathLike],
    scale: int,
    *,
    low: str | os.PathLike | None = None,
    **options,
) -> SuperResolutionData:
    """The pictures of a folder (or several), with the low-resolution versions of another folder where it is given.

    Names of a pair are equal up to the extension and a mark of the scale: `0001.png` goes with `0001x4.png`,
    `0001_x4.png` or `0001.png`.

    Args:
        high: folder of high-resolution pictures, searched with its sub-folders; a list of such folders, or files.
        scale: see `SuperResolutionData`.
        low: folder of low-resolution pictures.
        options: further arguments of `SuperResolutionData`.

    Raises:
        DataNotFoundError: no such folder.
        DataError: no pictures, or pictures without a partner (they are named).
    """
    folders = [high] if isinstance(high, (str, os.PathLike)) else list(high)
    paths, left_out = [], []
    for folder in folders:
        if Path(folder).is_file():
            paths.append(os.fspath(folder))
            continue
        found, ignored = _images(folder)
        paths += found
        left_out += ignored
    if low is None:
        return SuperResolutionData([Pair(path, None) for path in paths], scale, left_out=left_out, **options)
    found, _ = _images(low)
    partners = {_stem(path, scale): path for path in found}
    missing = [path for path in paths if _stem(path, scale) not in partners]
    if missing:
        shown = ", ".join(Path(path).name for path in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise DataError(
            f"{len(missing)} of {len(paths)} pictures have no partner in {low}: {shown}; expected the same name, "
            f"or with x{scale} at its end"
        )
    pairs = [Pair(path, partners[_stem(path, scale)]) for path in paths]
    return SuperResolutionData(pairs, scale, left_out=left_out, **options)


def _images(folder: str | os.PathLike) -> tuple[list[str], list[BadFile]]:
    if not Path(folder).exists():
        raise DataNotFoundError(f"no folder of pictures at {folder}: check the path")
    found, ignored = find_images(folder)
    if not found:
        raise DataError(f"no pictures in {folder}")
    return found, ignored


def _stem(path: str, scale: int) -> str:
    return re.sub(rf"_?x{scale}$", "", Path(path).stem, flags=re.IGNORECASE)


__all__ = ["DataError", "ImageError", "Pair", "SuperResolutionData", "open_superresolution"]
