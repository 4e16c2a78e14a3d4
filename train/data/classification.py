"""Classification data as people have them: class folders, ImageNet's folders, CSV lists.

    train = open_classification("photos", "train")
    val = open_classification("photos", "val")
    print(check_dataset(train, val=val))
    image, target = train[0]

Folders: `root/train/<class>/...` with `root/val/<class>/...`, or `root/<class>/...`, of which a part is held
out, always the same one. Folders named by WordNet ids are ImageNet's classes and keep ImageNet's indices, so
that a subset of them scores correctly. CSV: `labels.csv` with a column `image` and either a column `label`
(one class), a column `labels` (several, separated by `|`), or one 0/1 column for each class. Tar files
(`zoo.train.data.tars`): WebDataset shards, tars of class folders, ImageNet's own archives, not unpacked.
"""

from __future__ import annotations

import copy
import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor
from torch.utils.data import Dataset

from zoo.images import read_image
from zoo.train.data.checks import DataReport, check_dataset
from zoo.train.data.classification_csv import find_csv, open_csv
from zoo.train.data.errors import BadFile, DataError, DataNotFoundError
from zoo.train.data.names import SPLIT_FOLDERS, held_out, natural_key, shorten, unique_classes
from zoo.train.data.paths import PathList
from zoo.train.data.tars import class_names, has_tars, list_tars
from zoo.train.data.transforms import TrainTransform, build_transforms

__all__ = [
    "ClassificationData",
    "DataError",
    "DataReport",
    "TrainTransform",
    "build_transforms",
    "check_dataset",
    "open_classification",
]

Kind = Literal["auto", "folder", "imagenet", "csv"]
Transform = Callable[[Image.Image], Any]

# fmt: off
IMAGE_EXTENSIONS = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp",
    ".avif", ".jp2", ".j2k", ".pbm", ".pgm", ".ppm", ".pnm", ".tga", ".heic", ".heif",
})
# fmt: on
_LITTER = {"thumbs.db", "desktop.ini", "__macosx", "@eadir"}
_WNID = re.compile(r"n\d{8}")


class ClassificationData(Dataset):
    """Pictures and their classes. Small to pickle and to share between worker processes at any size.

    Attributes:
        paths: one path (str) a picture.
        targets: class indices, int64 (N,), or with `multilabel` uint8 (N, classes).
        classes: names of the classes, index by index.
        keys: the classes as the data name them, where that is not their name (ImageNet: WordNet ids).
        multilabel: a picture may have any number of classes.
        transform: picture -> what a model takes; None gives the upright RGB `PIL.Image`. One with a method
            `from_file(path)` is given the path instead, so that it can decode cheaply.
        split, root: where the data come from.
        left_out: files in the folders that are not used, with the reason (hidden, not pictures, ...).
        skipped: pictures removed by `drop`, with the reason.
        notes: sentences about how the layout was understood.
    """

    def __init__(
        self,
        paths: Sequence[str],
        targets: Sequence[int] | np.ndarray,
        classes: Sequence[str],
        *,
        multilabel: bool = False,
        keys: Sequence[str] | None = None,
        transform: Transform | None = None,
        split: str = "train",
        root: str | os.PathLike = "",
        left_out: Sequence[BadFile] = (),
        notes: Sequence[str] = (),
    ) -> None:
        self.paths = paths if hasattr(paths, "take") else PathList(paths)
        self.targets = np.asarray(targets, dtype=np.uint8 if multilabel else np.int64)
        self.classes = list(classes)
        self.keys = list(keys) if keys is not None else list(classes)
        self.multilabel = multilabel
        self.transform = transform
        self.split = split
        self.root = os.fspath(root)
        self.left_out = list(left_out)
        self.skipped: list[BadFile] = []
        self.notes = list(notes)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int | Tensor]:
        """The picture, transformed if there is a transform, and its target: an int, or float32 (classes,).

        Raises:
            ImageError: the picture cannot be read; the message names the file.
        """
        path = self.paths[index]
        if self.transform is None:
            picture = read_image(path)
        elif hasattr(self.transform, "from_file"):
            picture = self.transform.from_file(path)
        else:
            picture = self.transform(read_image(path))
        return picture, self.target(index)

    def target(self, index: int) -> int | Tensor:
        """The target of one picture, without reading it."""
        row = self.targets[index]
        return torch.from_numpy(row.astype(np.float32)) if self.multilabel else int(row)

    def class_counts(self) -> np.ndarray:
        """Pictures of each class, int64 (classes,)."""
        if self.multilabel:
            return self.targets.sum(0, dtype=np.int64).reshape(len(self.classes))
        return np.bincount(self.targets, minlength=len(self.classes))

    def select(self, indices: Iterable[int]) -> ClassificationData:
        """The same data with these pictures only, in this order."""
        chosen = np.fromiter(indices, dtype=np.int64)
        other = copy.copy(self)
        other.paths = self.paths.take(chosen)
        other.targets = self.targets[chosen]
        other.skipped = list(self.skipped)
        return other

    def drop(self, reasons: Mapping[int, BadFile]) -> None:
        """Remove pictures by index, in place, and remember them in `skipped`."""
        kept = self.select(i for i in range(len(self)) if i not in reasons)
        self.paths, self.targets = kept.paths, kept.targets
        self.skipped += [reasons[index] for index in sorted(reasons)]

    def __repr__(self) -> str:
        kind = "multi-label, " if self.multilabel else ""
        return f"ClassificationData({self.root}, {self.split}: {len(self)} pictures, {kind}{len(self.classes)} classes)"


def open_classification(
    root: str | os.PathLike,
    split: str = "train",
    *,
    kind: Kind = "auto",
    classes: Sequence[str] | None = None,
    transform: Transform | None = None,
    val_fraction: float = 0.2,
    seed: int = 0,
) -> ClassificationData:
    """One split of a classification data set, its layout recognised from what is there.

    Args:
        root: a folder (see the module's docstring), or a CSV file.
        split: "train", "val" ("valid", "validation" and, for want of these, "test" are found too), "test", or
            the name of any folder or entry of a CSV's `split` column.
        kind: "folder" (own numbering), "imagenet" (WordNet ids, indices 0..999), "csv"; "auto" takes a
            `labels.csv` or `<split>.csv` where there is one, else folders, as ImageNet's where all folder
            names are WordNet ids of ImageNet-1k.
        classes: class names in the model's order, for data that have fewer or are to keep a checkpoint's
            order. Default: those of the training split in natural order ("2" before "10"), ImageNet's 1000
            for "imagenet".
        transform: see `ClassificationData.transform`.
        val_fraction: part of each class held out as "val" where the data have no split of their own.
        seed: which part; the choice depends on this and the files' names only.

    Raises:
        DataNotFoundError: there is no such folder, file or split (a `DataError` and a `FileNotFoundError`).
        DataError: no pictures, no classes, an unknown class, a malformed CSV.
    """
    root = Path(root)
    if kind not in ("auto", "folder", "imagenet", "csv"):
        raise DataError(f"kind is {kind!r}, expected auto, folder, imagenet or csv")
    if not 0 <= val_fraction < 1:
        raise DataError(f"val_fraction is {val_fraction}, expected a share of at least 0 and below 1")
    if not root.exists():
        raise DataNotFoundError(f"no data set at {root}: check the path")
    in_tars = kind in ("auto", "imagenet") and has_tars(root)
    if root.is_file() and not in_tars and root.suffix.lower() not in (".csv", ".tsv"):
        raise DataError(f"{root} is a file: pass a folder of class folders or a CSV, or a .tar (unpack other archives)")
    listing = find_csv(root, split) if kind in ("auto", "csv") else None
    if in_tars:
        data = _open_tars(root, split, kind, classes, val_fraction, seed)
    elif listing is not None:
        found = open_csv(listing, split, classes, val_fraction, seed)
        data = ClassificationData(
            found.paths, found.targets, found.classes, multilabel=found.multilabel, notes=found.notes
        )
    elif kind == "csv":
        raise DataNotFoundError(f"no labels.csv or {split}.csv in {root}")
    else:
        data = _open_folders(root, split, kind, classes, val_fraction, seed)
    data.root, data.split, data.transform = os.fspath(root), split, transform
    if len(data) == 0:
        raise DataError(f"no pictures for the split {split!r} in {root}" + _left_out_hint(data.left_out))
    return data


# Folders


def _open_folders(
    root: Path, split: str, kind: Kind, classes: Sequence[str] | None, val_fraction: float, seed: int
) -> ClassificationData:
    base, own_split, notes = _split_folder(root, split)
    names = _class_folders(base)
    if not names:
        raise DataError(_no_class_folders(base))
    train = _find_split(root, "train")
    known = _class_folders(train) if own_split and split != "train" and train is not None else names
    keys, shown = _number_classes(base, sorted({*names, *known}, key=natural_key), kind, classes, known)
    index_of = {key: index for index, key in enumerate(keys)}
    paths: list[str] = []
    targets: list[int] = []
    left_out = [
        BadFile(entry.path, "hidden" if _is_hidden(entry.name) else "not in a class folder")
        for entry in sorted(os.scandir(base), key=lambda entry: natural_key(entry.name))
        if _is_hidden(entry.name) or not entry.is_dir()
    ]
    relative: list[str] = []
    for name in sorted(names, key=natural_key):
        found, ignored = find_images(base / name)
        left_out += ignored
        paths += found
        targets += [index_of[name]] * len(found)
        relative += [Path(path).relative_to(base).as_posix() for path in found]
    if not own_split:
        keep = held_out(relative, targets, val_fraction, seed) == (split == "val")
        paths = [path for path, kept in zip(paths, keep, strict=True) if kept]
        targets = [target for target, kept in zip(targets, keep, strict=True) if kept]
    return ClassificationData(paths, targets, shown, keys=keys, left_out=left_out, notes=notes)


def _split_folder(root: Path, split: str) -> tuple[Path, bool, list[str]]:
    """Where the class folders of `split` are, whether all of them belong to it, and notes."""
    found = _find_split(root, split)
    train = _find_split(root, "train")
    if found is not None:
        aliases = SPLIT_FOLDERS.get(split, ())
        odd = split == "val" and found.name.lower() in ("test", "testing")
        notes = [f"validation uses {found.name}/, there is no val/ in {root}"] if odd else []
        if split == "train" and _find_split(root, "val") is None:
            return found, False, [f"part of {found.name}/ is held out, there is no val/ in {root}"]
        return found, True, notes if aliases or notes else []
    if split == "val" and train is not None:
        return train, False, [f"part of {train.name}/ is held out, there is no val/ in {root}"]
    there = [name for other in SPLIT_FOLDERS if (name := _find_split(root, other)) is not None]
    if there or split not in ("train", "val"):
        names = ", ".join(sorted({f"{folder.name}/" for folder in there})) or "class folders without splits"
        raise DataNotFoundError(f"no split {split!r} in {root}, which has {names}")
    return root, False, [f"{root} has no splits: a part of each class is held out for validation"]


def _find_split(root: Path, split: str) -> Path | None:
    """The folder of a split, unless the folders with such names are classes: pictures in them, no folders."""
    named = {entry.name.lower(): Path(entry.path) for entry in os.scandir(root) if entry.is_dir()}
    names = SPLIT_FOLDERS.get(split, (split.lower(),))
    known = {*names, *(name for aliases in SPLIT_FOLDERS.values() for name in aliases)}
    folders = [folder for name, folder in named.items() if name in known]
    if not any(map(_class_folders, folders)) and any(map(_has_images, folders)):
        return None
    return next((named[name] for name in names if name in named), None)


def _class_folders(base: Path) -> list[str]:
    return [entry.name for entry in os.scandir(base) if entry.is_dir() and not _is_hidden(entry.name)]


def _has_images(folder: Path) -> bool:
    return any(_has_image_name(name) for name in os.listdir(folder))


def _no_class_folders(base: Path) -> str:
    names = os.listdir(base)
    count = sum(map(_has_image_name, names))
    if not count:
        return f"{base} is empty: expected one folder a class, with its pictures"
    if any(name.startswith("ILSVRC2012_val_") for name in names):
        return f"{base} has {count} pictures and no class folders: sort ImageNet's validation set into its WordNet ids"
    return f"{base} has {count} pictures and no class folders: put each into a folder of its class, or add a labels.csv"


def _number_classes(
    base: Path, names: list[str], kind: Kind, classes: Sequence[str] | None, known: list[str]
) -> tuple[list[str], list[str]]:
    """The folder name and the shown name of each class index."""
    if classes is not None and set(names) <= set(classes):
        return unique_classes(classes), list(classes)
    wnids, descriptions = imagenet_classes()
    foreign = [name for name in names if name not in wnids]
    if kind == "imagenet" or (kind == "auto" and not foreign and all(_WNID.fullmatch(name) for name in names)):
        if foreign:
            raise DataError(
                f"folder {foreign[0]!r} in {base} is no class of ImageNet-1k: expected WordNet ids such as {wnids[0]}"
            )
        if classes is not None and len(classes) != len(wnids):
            raise DataError(
                f"{len(classes)} class names for ImageNet's {len(wnids)} classes in {base}: pass its WordNet ids "
                "in the model's order, or kind='folder'"
            )
        return list(wnids), list(classes or descriptions)
    if classes is not None:
        stranger = next(name for name in names if name not in set(classes))
        raise DataError(f"folder {stranger!r} in {base} is none of the {len(classes)} classes: {shorten(classes)}")
    stranger = next((name for name in names if name not in set(known)), None)
    if stranger is not None:
        raise DataError(
            f"folder {stranger!r} in {base} is not among the training classes ({shorten(sorted(known))}): rename "
            "or remove it"
        )
    return names, names


@functools.cache
def imagenet_classes() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The 1000 WordNet ids in ImageNet's order, and what they mean (two meanings occur twice: no keys)."""
    info = ImageNetInfo("imagenet-1k")
    return tuple(info.label_names()), tuple(info.label_descriptions())


def find_images(folder: str | os.PathLike) -> tuple[list[str], list[BadFile]]:
    """Pictures under a folder in natural order, links followed, and the files that are none, with the reason."""
    found: list[str] = []
    left_out: list[BadFile] = []
    _walk(os.fspath(folder), found, left_out, frozenset())
    return found, left_out


def _walk(folder: str, found: list[str], left_out: list[BadFile], above: frozenset[str]) -> None:
    real = os.path.realpath(folder)
    if real in above:
        left_out.append(BadFile(folder, "a link to a folder above it"))
        return
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: natural_key(entry.name))
    for entry in ordered:
        if _is_hidden(entry.name):
            left_out.append(BadFile(entry.path, "hidden"))
        elif entry.is_dir():
            _walk(entry.path, found, left_out, above | {real})
        elif _has_image_name(entry.name):
            found.append(entry.path)
        else:
            left_out.append(BadFile(entry.path, "not a picture by its name"))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LITTER


def _has_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS and not _is_hidden(name)


# Tar files


def _open_tars(
    root: Path, split: str, kind: Kind, classes: Sequence[str] | None, val_fraction: float, seed: int
) -> ClassificationData:
    listing = list_tars(root, split, _has_image_name)
    labels = listing.labels
    if labels and isinstance(labels[0], int):
        count = max(labels) + 1
        named = classes or class_names(root) or (imagenet_classes()[1] if 500 < count <= 1000 else None)
        shown = list(named) if named else [str(index) for index in range(count)]
        if count > len(shown):
            raise DataError(f"{root} has the class index {count - 1}, and there are {len(shown)} class names")
        keys, targets = [str(index) for index in range(len(shown))], list(labels)
    else:
        names = sorted(set(labels), key=natural_key)
        own_names = listing.own_split and split != "train"
        known = sorted(set(list_tars(root, "train", _has_image_name).labels)) if own_names and not classes else names
        keys, shown = _number_classes(root, sorted({*names, *known}, key=natural_key), kind, classes, known)
        index_of = {key: index for index, key in enumerate(keys)}
        targets = [index_of[label] for label in labels]
    notes = [f"pictures are read inside {len(listing.paths.tars)} tar files"]
    data = ClassificationData(listing.paths, targets, shown, keys=keys, left_out=listing.left_out, notes=notes)
    if listing.own_split:
        return data
    base = f"{root if root.is_dir() else root.parent}/"
    held = held_out([str(path).removeprefix(base) for path in listing.paths], targets, val_fraction, seed)
    data.notes.append(f"{root} has no tar files for validation: a part of each class is held out")
    return data.select(np.flatnonzero(held == (split == "val")))


def _left_out_hint(left_out: Sequence[BadFile]) -> str:
    if not left_out:
        return ""
    return f"; {len(left_out)} files are none, such as {left_out[0].path} ({left_out[0].reason})"
