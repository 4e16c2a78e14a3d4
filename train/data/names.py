"""What data sets' files agree on: names of splits, an order of names, and which pictures are held out."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from zoo.train.data.errors import DataError

# what people call the folder of a split; the first that exists is taken
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "test", "testing"),
    "test": ("test", "testing"),
}


def natural_key(name: str) -> tuple:
    """Sorts "img2" before "img10", and without regard to case first."""
    parts = re.split(r"([0-9]+)", name.lower())
    return ([int(part) if index % 2 else part for index, part in enumerate(parts)], name)


def held_out(names: Sequence[str], groups: Sequence[int], fraction: float, seed: int) -> np.ndarray:
    """Which pictures are for validation: of each group the share `fraction`, by the hash of seed and name.

    A group of one stays in training. The choice for a picture hardly changes when others are added.
    """
    rank = [hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest() for name in names]
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(int(group), []).append(index)
    held = np.zeros(len(names), dtype=bool)
    for indices in members.values():
        count = min(len(indices) - 1, max(1, round(fraction * len(indices)))) if fraction else 0
        held[sorted(indices, key=lambda index: rank[index])[:count]] = True
    return held


def unique_classes(classes: Sequence[str]) -> list[str]:
    """The names as a list.

    Raises:
        DataError: one occurs twice.
    """
    double = next((name for name, count in Counter(classes).items() if count > 1), None)
    if double is not None:
        raise DataError(f"the class {double!r} is listed twice: class names are keys and must differ")
    return list(classes)


def shorten(names: Sequence[str]) -> str:
    """The first ten names for a message."""
    return ", ".join(names[:10]) + (f", and {len(names) - 10} more" if len(names) > 10 else "")
