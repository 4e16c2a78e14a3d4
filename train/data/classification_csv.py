"""Lists of pictures and their classes in CSV files: one label, several, or a 0/1 column for each class."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from zoo.train.data.errors import DataError, DataNotFoundError
from zoo.train.data.names import SPLIT_FOLDERS, held_out, natural_key, shorten, unique_classes

_IMAGE_COLUMNS = ("image", "image_path", "path", "file", "filename", "file_name", "image_id", "img", "id")
_LABEL_COLUMNS = ("label", "class", "target", "class_name")
_SPLIT_COLUMNS = ("split", "subset", "fold")


class CsvListing(NamedTuple):
    """Pictures of one split.

    Attributes:
        paths: one path a picture.
        targets: class indices (N,), or with `multilabel` 0/1 (N, classes).
        classes: names of the classes.
        multilabel: a picture may have any number of classes.
        notes: how the split was chosen.
    """

    paths: list[str]
    targets: np.ndarray
    classes: list[str]
    multilabel: bool
    notes: list[str]


def find_csv(root: Path, split: str) -> Path | None:
    """The CSV of a split: `root` itself, `<split>.csv` or `labels.csv`."""
    if root.is_file():
        return root
    names = [*SPLIT_FOLDERS.get(split, (split,))]
    candidates = [f"{name}.csv" for name in names] + ["labels.csv"] + [f"{name}/labels.csv" for name in names]
    return next((root / name for name in candidates if (root / name).is_file()), None)


def open_csv(
    file: Path, split: str, classes: Sequence[str] | None = None, val_fraction: float = 0.0, seed: int = 0
) -> CsvListing:
    """One split of the pictures that a CSV lists.

    Raises:
        DataNotFoundError: no such split.
        DataError: a malformed row, an unknown class, a picture named twice.
    """
    table = _read_csv(file)
    image_column = _column(table.header, _IMAGE_COLUMNS)
    if image_column is None:
        raise DataError(f"{file} has no column 'image'; its columns are: {', '.join(table.header)}")
    split_column = _column(table.header, _SPLIT_COLUMNS)
    label_column = _column(table.header, _LABEL_COLUMNS)
    many_column = _column(table.header, ("labels", "classes", "tags"))
    used = {image_column, split_column}
    if many_column is not None:
        labels = [[label.strip() for label in row[many_column].split("|") if label.strip()] for _, row in table.rows]
        multilabel = True
    elif label_column is not None:
        labels = [[row[label_column].strip()] for _, row in table.rows]
        empty = next((line for (line, _), (label,) in zip(table.rows, labels, strict=True) if not label), None)
        if empty is not None:
            raise DataError(f"{file} line {empty} has no label in the column {table.header[label_column]!r}")
        multilabel = False
    else:
        own = [index for index in range(len(table.header)) if index not in used]
        if not own:
            raise DataError(f"{file} has no labels: add a column 'label', 'labels' (a|b), or one 0/1 column a class")
        labels = [_flags(file, table.header, line, row, own) for line, row in table.rows]
        multilabel = True
        if classes is None:
            classes = [table.header[index] for index in own]
    if classes is None:
        classes = _csv_classes(file, split, labels)
    classes = unique_classes(classes)
    index_of = {name: index for index, name in enumerate(classes)}
    targets = np.zeros((len(labels), len(classes) if multilabel else 1), dtype=np.int64)
    for position, ((line, _), own_labels) in enumerate(zip(table.rows, labels, strict=True)):
        for label in own_labels:
            if label not in index_of:
                raise DataError(
                    f"{file} line {line} has the label {label!r}, none of the {len(classes)} classes: "
                    f"{shorten(classes)}"
                )
            if multilabel:
                targets[position, index_of[label]] = 1
            else:
                targets[position, 0] = index_of[label]
    names = [row[image_column].strip() for _, row in table.rows]
    _refuse_repeated(file, names, [line for line, _ in table.rows])
    keep, notes = _csv_split(file, split, table, split_column, names, targets, multilabel, val_fraction, seed)
    places = _image_folders(file, split)
    paths = [_locate(places, name) for name, kept in zip(names, keep, strict=True) if kept]
    targets = targets[keep] if multilabel else targets[keep, 0]
    return CsvListing(paths, targets, classes, multilabel, notes)


class _Table:
    """The header of a CSV and its rows with their line numbers."""

    def __init__(self, header: list[str], rows: list[tuple[int, list[str]]]) -> None:
        self.header, self.rows = header, rows


def _read_csv(file: Path) -> _Table:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    first = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    if len(rows) < 2:
        raise DataError(f"{file} has no rows: expected a header and one row a picture")
    header = [name.strip() for name in rows[0][1]]
    double = next((name for name, count in Counter(header).items() if count > 1), None)
    if double is not None:
        raise DataError(f"{file} has two columns named {double!r}")
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise DataError(f"{file} line {line} has {len(row)} values for {len(header)} columns")
    return _Table(header, rows[1:])


def _column(header: list[str], names: Sequence[str]) -> int | None:
    lowered = [name.lower() for name in header]
    return next((lowered.index(name) for name in names if name in lowered), None)


def _flags(file: Path, header: list[str], line: int, row: list[str], columns: list[int]) -> list[str]:
    labels = []
    for column in columns:
        value = row[column].strip()
        if value in ("1", "1.0"):
            labels.append(header[column])
        elif value not in ("0", "0.0"):
            raise DataError(f"{file} line {line} has {value!r} in the class column {header[column]!r}, expected 0 or 1")
    return labels


def _csv_classes(file: Path, split: str, labels: list[list[str]]) -> list[str]:
    """The labels that occur, those of the training list where `file` is another split's."""
    names = {label for own in labels for label in own}
    if file.stem.lower() in SPLIT_FOLDERS.get(split, (split,)) and split != "train":
        train = next((file.with_name(f"{name}.csv") for name in SPLIT_FOLDERS["train"]), None)
        if train is not None and train.is_file():
            return open_csv(train, "train").classes
    if not names:
        raise DataError(f"{file} has no label in any row")
    return sorted(names, key=natural_key)


def _csv_split(
    file: Path,
    split: str,
    table: _Table,
    column: int | None,
    names: list[str],
    targets: np.ndarray,
    multilabel: bool,
    val_fraction: float,
    seed: int,
) -> tuple[np.ndarray, list[str]]:
    """Which rows belong to the split: by the split column, the file's own name, or held out by hash."""
    if column is not None:
        values = [row[column].strip().lower() for _, row in table.rows]
        for name in SPLIT_FOLDERS.get(split, (split.lower(),)):
            if name in values:
                return np.array([value == name for value in values]), []
        there = ", ".join(sorted(set(values)))
        raise DataNotFoundError(f"no split {split!r} in {file}, whose column {table.header[column]!r} has {there}")
    own_names = {name for aliases in SPLIT_FOLDERS.values() for name in aliases} | {split.lower()}
    others = [file.with_name(f"{name}.csv") for name in SPLIT_FOLDERS["val"]]
    in_folder = file.stem.lower() == "labels" and file.parent.name.lower() in own_names
    if in_folder or (file.stem.lower() in own_names and (split != "train" or any(o.is_file() for o in others))):
        return np.ones(len(names), dtype=bool), []
    if split not in ("train", "val"):
        raise DataNotFoundError(f"no split {split!r} in {file}: add a column 'split' or a file {split}.csv")
    if multilabel:  # keep rare classes on both sides: a row counts for the rarest class that it has
        counts = targets.sum(0)
        groups = [min(row.nonzero()[0], key=lambda index: counts[index], default=-1) for row in targets]
    else:
        groups = targets[:, 0]
    held = held_out(names, groups, val_fraction, seed)
    return held == (split == "val"), [f"part of {file.name} is held out for validation, it has no column 'split'"]


def _refuse_repeated(file: Path, names: list[str], lines: list[int]) -> None:
    first: dict[str, int] = {}
    for name, line in zip(names, lines, strict=True):
        if not name:
            raise DataError(f"{file} line {line} names no picture")
        if name in first:
            raise DataError(f"{file} names {name} twice, in lines {first[name]} and {line}: keep one row a picture")
        first[name] = line


def _image_folders(file: Path, split: str) -> list[Path]:
    base = file.parent
    names = ["", "images", *SPLIT_FOLDERS.get(split, (split,))]
    return [folder for name in names if (folder := base / name).is_dir()]


def _locate(folders: list[Path], name: str) -> str:
    """The picture's path; in the CSV's own folder if it is nowhere, where reading it will say so."""
    places = [folder / name for folder in folders]
    return os.fspath(next((place for place in places if place.is_file()), places[0]))
