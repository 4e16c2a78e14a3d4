"""`check_dataset`: every file is looked at before the first step, and whatever is wrong is named and counted.

A training run that stops in its third hour at a broken picture has wasted three hours. The quick check parses
each file's header and tests whether the file is complete by its last bytes, and decodes only the files whose
end is not what it should be; `decode=True` decodes all.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from zoo.images import ImageError, read_image
from zoo.train.data.errors import BadFile, DataError

if TYPE_CHECKING:
    from zoo.train.data.classification import ClassificationData

_EDGE = 4096  # bytes of a file's beginning and end that identify it and show whether it is complete
_LISTED = 10  # entries of a list that the printed report shows; the object has all of them
_PLAIN_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I;16B"}


class _Seen(NamedTuple):
    """What one file is: stored width and height, format, a fingerprint of its bytes."""

    width: int
    height: int
    format: str
    fingerprint: bytes


@dataclass(frozen=True)
class SplitReport:
    """What one split holds.

    Attributes:
        split: its name.
        pictures: usable pictures (after skipping).
        class_counts: pictures of each class that the split has, by name.
        classes: number of classes, with those that have no picture.
        width, height: least, median and most pixels, as stored; None if nothing is readable.
        smallest, largest: paths of the pictures with fewest and most pixels.
        formats: pictures of each file format.
        unreadable: pictures that cannot be read, with the reason.
        skipped: whether those were removed from the data set.
        left_out: files that were never part of it, with the reason.
        empty_classes: names of classes without pictures.
        repeated: groups of paths whose files are byte for byte the same.
        conflicting: those of them whose classes differ.
    """

    split: str
    pictures: int
    classes: int
    class_counts: dict[str, int]
    width: tuple[int, int, int] | None
    height: tuple[int, int, int] | None
    smallest: str | None
    largest: str | None
    formats: dict[str, int]
    unreadable: tuple[BadFile, ...]
    skipped: bool
    left_out: tuple[BadFile, ...]
    empty_classes: tuple[str, ...]
    repeated: tuple[tuple[str, ...], ...]
    conflicting: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class DataReport:
    """What `check_dataset` found; `str()` is a page for people, `to_dict()` plain JSON.

    Attributes:
        splits: one report a split.
        warnings: sentences about what is suspicious but usable.
        shared: (training path, validation path) of the same picture in both.
        notes: how the layout was understood.
    """

    splits: tuple[SplitReport, ...]
    warnings: tuple[str, ...]
    shared: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def unreadable(self) -> tuple[BadFile, ...]:
        """Pictures of any split that cannot be read."""
        return tuple(bad for split in self.splits for bad in split.unreadable)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "splits": [
                vars(split)
                | {
                    "unreadable": [bad._asdict() for bad in split.unreadable],
                    "left_out": [bad._asdict() for bad in split.left_out],
                    "empty_classes": list(split.empty_classes),
                    "repeated": [list(group) for group in split.repeated],
                    "conflicting": [list(group) for group in split.conflicting],
                    "width": split.width and list(split.width),
                    "height": split.height and list(split.height),
                }
                for split in self.splits
            ],
            "warnings": list(self.warnings),
            "shared": [list(pair) for pair in self.shared],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines: list[str] = []
        for split in self.splits:
            formats = ", ".join(f"{count} {name}" for name, count in split.formats.items())
            lines.append(f"{split.split}: {split.pictures} pictures, {split.classes} classes ({formats})")
            if split.width and split.height:
                lines.append(
                    f"  size: {split.width[0]}-{split.width[2]} x {split.height[0]}-{split.height[2]} px, "
                    f"median {split.width[1]} x {split.height[1]}"
                )
            if split.class_counts:
                ordered = sorted(split.class_counts.items(), key=lambda item: -item[1])
                shown = ordered if len(ordered) <= 2 * _LISTED else [*ordered[:_LISTED], *ordered[-_LISTED:]]
                dots = "" if len(ordered) == len(shown) else f" (of {len(ordered)} classes, most and fewest)"
                lines.append("  classes: " + ", ".join(f"{name} {count}" for name, count in shown) + dots)
            what = "left out" if split.skipped else "cannot be read"
            lines += _listing(f"{_count(split.unreadable, 'picture')} {what}", [bad.reason for bad in split.unreadable])
            lines += _listing(
                f"{_count(split.left_out, 'other file')} ignored",
                [f"{path} ({reason})" for path, reason in split.left_out],
            )
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])


def check_dataset(
    dataset: ClassificationData,
    *,
    val: ClassificationData | None = None,
    on_bad: Literal["error", "skip"] = "error",
    decode: bool = False,
    threads: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> DataReport:
    """Look at every file of a data set, and at its classes.

    Args:
        dataset: usually the training split.
        val: the validation split, for the same check and the comparison of both.
        on_bad: "error" raises if a picture cannot be read; "skip" removes such pictures from the data set, in
            place, and lists them in the report.
        decode: decode every picture in full. Otherwise only headers and file ends are read, and files with an
            odd end are decoded.
        threads: files open at the same time.
        progress: called with (files done, files in all), often.

    Raises:
        DataError: with `on_bad="error"`: the first unreadable picture and how many there are (`.unreadable` has
            all); in any case if no readable picture is left in a split.
    """
    if on_bad not in ("error", "skip"):
        raise DataError(f"on_bad is {on_bad!r}, expected 'error' or 'skip'")
    sets = [dataset] if val is None else [dataset, val]
    total, done = sum(map(len, sets)), 0
    results: list[list[_Seen | BadFile]] = []
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for data in sets:
            seen: list[_Seen | BadFile] = []
            for start in range(0, len(data), 1024):  # in pieces: a million pending futures are gigabytes
                seen += pool.map(lambda path: _inspect(path, decode), data.paths[start : start + 1024])
                done += len(seen) - start
                if progress is not None:
                    progress(done, total)
            results.append(seen)
    bad = [{i: s for i, s in enumerate(seen) if isinstance(s, BadFile)} for seen in results]
    unreadable = [entry for entries in bad for entry in entries.values()]
    if unreadable and on_bad == "error":
        more = "" if len(unreadable) == 1 else f" ({len(unreadable)} of {total} pictures cannot be read)"
        raise DataError(f"{unreadable[0].reason}{more}; or pass on_bad='skip' to leave such out", unreadable)
    reports, marks = [], []
    for data, seen, entries in zip(sets, results, bad, strict=True):
        if entries:
            data.drop(entries)
        if len(data) == 0:
            raise DataError(f"none of the {len(seen)} pictures of {data.split} can be read: {unreadable[0].reason}")
        good = [entry for entry in seen if isinstance(entry, _Seen)]
        reports.append(_report(data, good, tuple(entries.values())))
        mark: dict[bytes, str] = {}
        for entry, path in zip(good, data.paths, strict=True):
            mark.setdefault(entry.fingerprint, path)
        marks.append(mark)
    shared = []
    if val is not None:
        shared = [(marks[0][mark], path) for mark, path in marks[1].items() if mark in marks[0]]
    notes = dict.fromkeys(note for data in sets for note in data.notes)
    return DataReport(tuple(reports), tuple(_warnings(sets, reports, shared)), tuple(shared), tuple(notes))


def _inspect(path: str, decode: bool) -> _Seen | BadFile:
    try:
        if decode:
            read_image(path)
        with path.open() if hasattr(path, "open") else open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            head = file.read(_EDGE)
            file.seek(max(0, size - _EDGE))
            tail = file.read(_EDGE)
            file.seek(0)
            with Image.open(file) as image:
                seen = _Seen(
                    image.width,
                    image.height,
                    image.format or "unknown",
                    hashlib.blake2b(head + tail + struct.pack("<Q", size), digest_size=16).digest(),
                )
                sound = image.mode in _PLAIN_MODES and _is_complete(seen.format, head, tail, size)
        if not sound and not decode:
            read_image(path)
        return seen
    except ImageError as error:
        return BadFile(path, str(error))
    except Exception as error:  # Pillow could not parse the header, in any of its ways: the reader finds the words
        try:
            read_image(path)
        except ImageError as reason:
            return BadFile(path, str(reason))
        return BadFile(path, f"{path} cannot be opened: {error}")


def _is_complete(format: str, head: bytes, tail: bytes, size: int) -> bool:
    """Whether a file's end is what the format's files end with. False means unknown, not broken."""
    if format in ("JPEG", "MPO"):
        return b"\xff\xd9" in tail
    if format == "PNG":
        return b"IEND" in tail
    if format == "GIF":
        return tail.rstrip(b"\0").endswith(b";")
    if format == "WEBP":
        return size >= struct.unpack("<I", head[4:8])[0] + 8 and any(tail[-256:])
    if format == "BMP":
        return size >= struct.unpack("<I", head[2:6])[0] > 0
    return False


def _report(data: ClassificationData, seen: Sequence[_Seen], unreadable: tuple[BadFile, ...]) -> SplitReport:
    widths, heights = np.array([s.width for s in seen]), np.array([s.height for s in seen])
    counts = data.class_counts().tolist()
    groups: dict[bytes, list[int]] = {}
    for index, entry in enumerate(seen):
        groups.setdefault(entry.fingerprint, []).append(index)
    repeated = [indices for indices in groups.values() if len(indices) > 1]
    conflicting = [
        indices for indices in repeated if any((data.targets[i] != data.targets[indices[0]]).any() for i in indices)
    ]
    by_area = widths.astype(np.int64) * heights
    return SplitReport(
        split=data.split,
        pictures=len(data),
        classes=len(data.classes),
        class_counts={name: count for name, count in zip(_labels(data), counts, strict=True) if count},
        width=_spread(widths),
        height=_spread(heights),
        smallest=data.paths[int(by_area.argmin())],
        largest=data.paths[int(by_area.argmax())],
        formats=dict(Counter(s.format for s in seen).most_common()),
        unreadable=unreadable,
        skipped=bool(unreadable),
        left_out=tuple(data.left_out),
        empty_classes=tuple(name for name, count in zip(_labels(data), counts, strict=True) if not count),
        repeated=tuple(tuple(data.paths[i] for i in indices) for indices in repeated),
        conflicting=tuple(tuple(data.paths[i] for i in indices) for indices in conflicting),
    )


def _labels(data: ClassificationData) -> list[str]:
    """Names that differ: ImageNet has two classes "crane"."""
    if len(set(data.classes)) == len(data.classes):
        return data.classes
    return [f"{key} {name}" for key, name in zip(data.keys, data.classes, strict=True)]


def _spread(values: np.ndarray) -> tuple[int, int, int]:
    return int(values.min()), int(np.median(values)), int(values.max())


def _warnings(
    sets: Sequence[ClassificationData], reports: Sequence[SplitReport], shared: Sequence[tuple[str, str]]
) -> list[str]:
    warnings: list[str] = []
    first = reports[0]
    if first.empty_classes:
        warnings.append(
            f"{len(first.empty_classes)} of {first.classes} classes without a picture in {first.split}: "
            f"{_some(first.empty_classes)}"
        )
    for names in _lookalikes(sets[0].classes):
        warnings.append(f"the classes {_some(names)} differ in spelling only: are they the same?")
    for report in reports:
        if report.repeated:
            warnings.append(
                f"{_count(report.repeated, 'picture')} more than once in {report.split}, such as "
                f"{report.repeated[0][0]} and {report.repeated[0][1]}"
            )
        if report.conflicting:
            warnings.append(
                f"{_count(report.conflicting, 'picture')} of {report.split} in more than one class, such as "
                f"{report.conflicting[0][0]} and {report.conflicting[0][1]}"
            )
    if len(reports) > 1:
        second = reports[1]
        missing = [name for name in second.empty_classes if name in first.class_counts]
        if missing:
            warnings.append(f"{_count(missing, 'class')} without a picture in {second.split}: {_some(missing)}")
        alien = [name for name in second.class_counts if name not in first.class_counts]
        if alien:
            warnings.append(
                f"{_count(alien, 'class')} of {second.split} without a picture in {first.split}: {_some(alien)}"
            )
    if shared:
        warnings.append(
            f"{_count(shared, 'picture')} of {reports[1].split} also in {first.split}, such as {shared[0][1]} and "
            f"{shared[0][0]}: scores on them mean nothing"
        )
    return warnings


def _lookalikes(classes: Sequence[str]) -> list[list[str]]:
    groups: Mapping[str, list[str]] = {}
    for name in dict.fromkeys(classes):
        groups.setdefault(re.sub(r"[\s_-]+", "", name.casefold()), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _count(things: Sequence[object], noun: str) -> str:
    plural = "es" if noun.endswith("ss") else "s"
    return f"{len(things)} {noun}" + plural * (len(things) != 1)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_LISTED])
    return shown + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def _listing(title: str, lines: Sequence[str]) -> list[str]:
    if not lines:
        return []
    more = [f"    and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
    return [f"  {title}:", *(f"    {line}" for line in lines[:_LISTED]), *more]
