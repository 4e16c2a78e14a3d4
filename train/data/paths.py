"""Many paths in little memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import numpy as np


class PathList(Sequence):
    """Paths in one buffer: a list of a million strings is copied into every worker as its counts are touched."""

    def __init__(self, paths: Iterable[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._buffer = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        start = self._ends[position - 1] if position else 0
        return os.fsdecode(self._buffer[start : self._ends[position]].tobytes())

    def take(self, indices: Iterable[int]) -> PathList:
        """These paths, in this order."""
        return PathList([self[i] for i in indices])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None

    def __repr__(self) -> str:
        return f"PathList({len(self)} paths)"
