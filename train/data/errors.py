"""What is wrong with a data set, in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class BadFile(NamedTuple):
    """A file that is not used, and why."""

    path: str
    reason: str


class DataError(ValueError):
    """A data set that cannot be used. The message is one sentence: which file or field, what is wrong, what to do.

    Attributes:
        unreadable: every picture that cannot be read, where that is the reason.
    """

    def __init__(self, message: str, unreadable: Sequence[BadFile] = ()) -> None:
        super().__init__(message)
        self.unreadable = tuple(unreadable)


class DataNotFoundError(DataError, FileNotFoundError):
    """There is no such folder or file."""
