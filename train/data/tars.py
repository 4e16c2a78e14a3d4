"""Pictures inside tar files: WebDataset shards, tars of class folders, and ImageNet's own archives, as they are.

A tar is indexed once (names, offsets and sizes; kept in `.zoo_index/` beside it where that can be written) and
every picture is then read at its place, as from a folder. So everything that holds for folders holds here: a new
order of all pictures in every epoch, each process and worker its exact share, a killed run that continues with the
very next picture. It needs files that can be read at any place; a pure stream cannot give that.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from zoo.train.data.errors import BadFile, DataError, DataNotFoundError
from zoo.train.data.paths import PathList

_SPLIT = re.compile(r"(?:^|[-_.])(train|training|val|valid|validation|test)(?=[-_.\d]|$)", re.IGNORECASE)
_SAME = {"training": "train", "valid": "val", "validation": "val"}
_DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_INDEX_FOLDER = ".zoo_index"


class TarPicture(str):
    """A picture's place in a tar file: as text `shard.tar/name`, with what is needed to read it.

    Attributes:
        tar: path of the tar file.
        offset, size: where the picture's bytes are in it.
    """

    tar: str
    offset: int
    size: int

    def __new__(cls, tar: str, name: str, offset: int, size: int) -> TarPicture:
        """The picture called `name` in `tar`."""
        self = super().__new__(cls, f"{tar}/{name}")
        self.tar, self.offset, self.size = tar, offset, size
        return self

    def __reduce__(self) -> tuple:
        return TarPicture, (self.tar, self[len(self.tar) + 1 :], self.offset, self.size)

    def read_bytes(self) -> bytes:
        """The picture's file."""
        with open(self.tar, "rb", buffering=0) as file:
            return _read_at(file, self.offset, self.size)

    def open(self) -> io.BufferedReader:
        """The picture's file as a file."""
        return io.BufferedReader(_Window(self))


class _Window(io.RawIOBase):
    def __init__(self, place: TarPicture):
        self.file = open(place.tar, "rb", buffering=0)  # noqa: SIM115 - closed with the window
        self.place, self.position = place, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.place.size}[whence]
        self.position = max(0, base + offset)
        return self.position

    def readinto(self, buffer) -> int:
        count = max(0, min(len(buffer), self.place.size - self.position))
        data = _read_at(self.file, self.place.offset + self.position, count)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()


def _read_at(file: io.FileIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    parts = []
    while size > 0 and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


class TarPaths(Sequence):
    """Places of pictures in a few arrays, so that worker processes share them at any size."""

    def __init__(self, tars: Sequence[str], tar: np.ndarray, names: Sequence[str], offsets: np.ndarray, sizes):
        self.tars, self._tar = list(tars), np.asarray(tar, dtype=np.int32)
        self._names = names if isinstance(names, PathList) else PathList(names)
        self._offsets, self._sizes = np.asarray(offsets, dtype=np.int64), np.asarray(sizes, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._tar)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        return TarPicture(self.tars[self._tar[i]], self._names[i], int(self._offsets[i]), int(self._sizes[i]))

    def take(self, indices: np.ndarray) -> TarPaths:
        """These pictures, in this order."""
        return TarPaths(
            self.tars, self._tar[indices], self._names.take(indices), self._offsets[indices], self._sizes[indices]
        )

    def __repr__(self) -> str:
        return f"TarPaths({len(self)} pictures in {len(self.tars)} tar files)"


class TarListing(NamedTuple):
    """What the tar files of one split hold.

    Attributes:
        paths: the pictures.
        labels: of each picture, the name of its class, or its index where the tar files hold numbers.
        own_split: the tar files are this split's own; otherwise a part of them is to be held out.
        left_out: members that are no samples, with the reason.
    """

    paths: TarPaths
    labels: list[str] | list[int]
    own_split: bool
    left_out: list[BadFile]


class _Member(NamedTuple):
    name: str
    offset: int
    size: int


def has_tars(root: Path) -> bool:
    """Whether the data are in tar files: `root` is one, or has some, itself or in its splits' folders.

    Class folders count before a tar file that lies beside them, from which they were probably unpacked.
    """
    if root.is_file():
        return _is_tar(root.name)
    folders = [p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")]
    splits = [p for p in folders if split_of(p.name)]
    if len(splits) < len(folders) or any(p.is_dir() for folder in splits for p in folder.iterdir()):
        return False
    return any(_is_tar(p.name) for folder in (root, *splits) for p in folder.iterdir())


def split_of(name: str) -> str | None:
    """The split that a file's or folder's name speaks of."""
    found = _SPLIT.search(name)
    return _SAME.get(found[1].lower(), found[1].lower()) if found else None


def list_tars(root: Path, split: str, is_picture: Callable[[str], bool]) -> TarListing:
    """The pictures of a split and their classes.

    Args:
        root: a tar file, or a folder of them; `train` or `val` in their names or their folders' names say which
            split they are of.
        split: "train", "val" or "test".
        is_picture: whether a member of this name is one.

    Raises:
        DataNotFoundError: no tar file of this split.
        DataError: a tar file is compressed or truncated, or has pictures without classes.
    """
    files, own_split = _tar_files(root, split)
    with ThreadPoolExecutor(8) as pool:  # reading headers waits for the disk
        members = list(pool.map(_members, files))
    samples: list[tuple[int, _Member, str | int]] = []
    left_out: list[BadFile] = []
    for number, (file, inside) in enumerate(zip(files, members)):
        for member, label in _labelled(file, inside, is_picture, left_out):
            samples.append((number, member, label))
    if len({type(label) for _, _, label in samples}) > 1:
        raise DataError(
            f"the tar files of {root} name classes in two ways: use class folders or .cls members, not both"
        )
    paths = TarPaths(
        [os.fspath(file) for file in files],
        np.array([number for number, _, _ in samples], dtype=np.int32),
        [member.name for _, member, _ in samples],
        np.array([member.offset for _, member, _ in samples], dtype=np.int64),
        np.array([member.size for _, member, _ in samples], dtype=np.int64),
    )
    return TarListing(paths, [label for _, _, label in samples], own_split, left_out)


def class_names(root: Path) -> list[str] | None:
    """The lines of `classes.txt` beside the tar files: what class indices mean."""
    file = (root if root.is_dir() else root.parent) / "classes.txt"
    return [line.strip() for line in file.read_text().splitlines() if line.strip()] if file.is_file() else None


def _is_tar(name: str) -> bool:
    return name.lower().endswith((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")) and "devkit" not in name


def _tar_files(root: Path, split: str) -> tuple[list[Path], bool]:
    if root.is_file():
        return [root], False
    by_split: dict[str | None, list[Path]] = {}
    for folder in [root, *sorted(p for p in root.iterdir() if p.is_dir())]:
        for path in sorted(p for p in folder.iterdir() if _is_tar(p.name)):
            by_split.setdefault(split_of(path.name) or (split_of(folder.name) if folder != root else None), []).append(
                path
            )
    if split in by_split:
        own = not (split == "train" and "val" not in by_split and "test" not in by_split)
        return by_split[split], own
    if split == "val" and "test" in by_split:
        return by_split["test"], True
    if split in ("train", "val"):
        rest = by_split.get("train", by_split.get(None))
        if rest:
            return rest, False
    names = ", ".join(str(name) for name in by_split if name) or "none that says its split"
    raise DataNotFoundError(f"no tar file of the split {split!r} in {root}, which has those of {names}")


def _members(file: Path) -> list[_Member]:
    """Regular files in a tar, those of tars inside it (ImageNet's training archive) with their absolute places."""
    stat = file.stat()
    cache = file.parent / _INDEX_FOLDER / f"{file.name}.json"
    try:
        known = json.loads(cache.read_text())
        if known["size"] == stat.st_size and known["mtime_ns"] == stat.st_mtime_ns:
            return [_Member(*member) for member in known["members"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no index, or one that a killed process wrote half: made again
    members = list(_scan(file, stat.st_size))
    _keep_index(cache, {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "members": members})
    return members


def _scan(file: Path, size: int) -> Iterator[_Member]:
    try:
        with tarfile.open(file, "r:") as archive:
            for info in archive:
                if not info.isfile():
                    continue
                if info.offset_data + info.size > size:
                    raise DataError(f"{file} is truncated: it ends inside {info.name}; copy or download it again")
                if info.name.endswith(".tar"):
                    yield from _scan_inside(archive, info)
                else:
                    yield _Member(info.name, info.offset_data, info.size)
    except tarfile.ReadError as error:
        with file.open("rb") as opened:
            head = opened.read(6)
        if head[:2] == b"\x1f\x8b" or head[:3] == b"BZh" or head == b"\xfd7zXZ\0":
            raise DataError(
                f"{file} is compressed, so that its pictures cannot be read at their places: unpack it to a plain .tar"
            ) from error
        raise DataError(f"{file} is truncated or not a tar file ({error}): copy or download it again") from error


def _scan_inside(archive: tarfile.TarFile, outer: tarfile.TarInfo) -> Iterator[_Member]:
    folder = Path(outer.name).stem
    with tarfile.open(fileobj=archive.extractfile(outer), mode="r:") as inner:
        for info in inner:
            if info.isfile():
                yield _Member(f"{folder}/{info.name}", outer.offset_data + info.offset_data, info.size)


def _keep_index(cache: Path, content: dict) -> None:
    temporary = cache.with_name(f"{cache.name}.{os.getpid()}.partial")
    try:
        cache.parent.mkdir(exist_ok=True)
        temporary.write_text(json.dumps(content))
        os.replace(temporary, cache)
    except OSError:
        temporary.unlink(missing_ok=True) if cache.parent.is_dir() else None  # a read-only disk: indexed every time


def _labelled(
    file: Path, members: Iterable[_Member], is_picture: Callable[[str], bool], left_out: list[BadFile]
) -> Iterator[tuple[_Member, str | int]]:
    """WebDataset's samples where there are .cls or .json members, else class folders, else ImageNet's validation."""
    members = list(members)
    pictures = [m for m in members if is_picture(Path(m.name).name)]
    labels = [m for m in members if m.name.endswith((".cls", ".json")) and _key(m.name)]
    if labels:
        yield from _webdataset(file, pictures, labels, left_out)
        return
    left_out += [
        BadFile(f"{file}/{m.name}", "not a picture by its name") for m in members if not is_picture(Path(m.name).name)
    ]
    folders = [Path(m.name).parent.name for m in pictures]
    if pictures and not any(folders) and pictures[0].name.startswith("ILSVRC2012_val_"):
        wnids = _devkit_labels(file)
        for member in pictures:
            yield member, wnids[int(Path(member.name).stem.rsplit("_", 1)[1]) - 1]
        return
    for member, folder in zip(pictures, folders):
        if folder in ("", ".") or split_of(folder) == folder:
            raise DataError(
                f"{file}/{member.name} has no class: expected class folders in the tar file, or a member "
                f"{_key(member.name)}.cls with the class index beside it"
            )
        yield member, folder


def _key(name: str) -> str:
    """WebDataset's key: the path up to the first dot of the file's name."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}" if folder else base.partition(".")[0]


def _webdataset(
    file: Path, pictures: list[_Member], labels: list[_Member], left_out: list[BadFile]
) -> Iterator[tuple[_Member, int]]:
    by_key: dict[str, int] = {}
    with file.open("rb", buffering=0) as opened:
        # a .cls is what WebDataset means by a class; .json may hold anything
        for member in sorted(labels, key=lambda m: m.name.endswith(".cls")):
            text = _read_at(opened, member.offset, member.size).decode("utf-8", "replace").strip()
            label = _index_in(text, member.name.endswith(".json"))
            if label is None and member.name.endswith(".cls"):
                raise DataError(f"{file}/{member.name} is {text[:40]!r}, expected a class index")
            if label is not None:
                by_key[_key(member.name)] = label
    for member in pictures:
        label = by_key.get(_key(member.name))
        if label is None:
            left_out.append(BadFile(f"{file}/{member.name}", "no class: there is no .cls or .json beside it"))
        else:
            yield member, label


def _index_in(text: str, is_json: bool) -> int | None:
    if is_json:
        try:
            content = json.loads(text)
        except ValueError:
            return None
        text = content if not isinstance(content, dict) else content.get("label", content.get("cls"))
    return int(text) if isinstance(text, int) or (isinstance(text, str) and text.isdecimal()) else None


def _devkit_labels(file: Path) -> list[str]:
    """The WordNet id of each of ImageNet's validation pictures, from the development kit beside the archive."""
    kit = file.parent / _DEVKIT
    if not kit.is_file():
        raise DataError(f"{file} has no classes in it: put ImageNet's {_DEVKIT} beside it")
    from zoo.extras import require

    loadmat = require("scipy.io", extra="train").loadmat
    with tarfile.open(kit) as archive:
        parts = {Path(info.name).name: info for info in archive if info.isfile()}
        truth = archive.extractfile(parts["ILSVRC2012_validation_ground_truth.txt"]).read().split()
        table = loadmat(io.BytesIO(archive.extractfile(parts["meta.mat"]).read()), squeeze_me=True)["synsets"]
    wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table}
    return [wnids[int(number)] for number in truth]
