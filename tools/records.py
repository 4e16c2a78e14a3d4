"""The results file: one JSON object a line for each evaluation, appended, never rewritten.

    append_results("runs/results.jsonl", [record])
    for record in read_results("runs/results.jsonl"): ...

A run writes its lines with one call to the system in append mode, so that the lines of two runs do not mix.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import timm
import torch

import zoo
from zoo.manifest import Task


@dataclass(frozen=True)
class Record:
    """One evaluation.

    Attributes:
        model: registered name, or the name that the door takes.
        tag: of the manifest's entry; None for weights that it does not list.
        task: what was measured.
        file: name of the weight file; None for weights that timm fetched.
        sha256: of this file.
        dataset, split: what was evaluated on.
        images: how many.
        total: how many the data set's official split has; None where that is not known.
        settings: size, crop, thresholds, ... as they were.
        metrics: name -> value: percentages, decibels, SSIM of 0..1.
        errors: name -> binomial standard error, for shares of a subset.
        claims: name -> what the authors state for this data set; empty where nothing was compared.
        differing: settings that were not those of the claim, each a sentence.
        versions: of zoo, torch and timm.
        device: cpu, or the name of the GPU.
        date: UTC, ISO 8601.

    Raises:
        ValueError: a field is not what it should be; it is named.
    """

    model: str
    tag: str | None
    task: str
    file: str | None
    sha256: str | None
    dataset: str
    split: str
    images: int
    total: int | None
    settings: dict[str, Any]
    metrics: dict[str, float]
    errors: dict[str, float] = field(default_factory=dict)
    claims: dict[str, float] = field(default_factory=dict)
    differing: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: versions())
    device: str = "cpu"
    date: str = field(default_factory=lambda: now())

    def __post_init__(self):
        for name in ("model", "task", "dataset", "split", "device", "date"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name} is {value!r}, expected text")
        for name in ("tag", "file"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected text or null")
        if self.task not in get_args(Task):
            raise ValueError(f"task is {self.task!r}, expected one of {', '.join(get_args(Task))}")
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", str(self.sha256)):
            raise ValueError(f"sha256 is {self.sha256!r}, expected 64 hexadecimal digits or null")
        for name, value in (("images", self.images), ("total", self.total)):
            if (type(value) is not int or value < 1) and not (name == "total" and value is None):
                raise ValueError(f"{name} is {value!r}, expected a number of images")
        for name in ("settings", "versions"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected an object")
        for name in ("metrics", "errors", "claims"):
            values = getattr(self, name)
            if not isinstance(values, dict):
                raise ValueError(f"{name} is {values!r}, expected an object")
            for key, value in values.items():
                if type(value) not in (int, float) or not math.isfinite(value):
                    raise ValueError(f"{name}: {key} is {value!r}, expected a finite number")
        if not self.metrics:
            raise ValueError("metrics is empty, expected one at least")
        if not isinstance(self.differing, list) or any(not isinstance(line, str) for line in self.differing):
            raise ValueError(f"differing is {self.differing!r}, expected a list of sentences")
        try:
            datetime.datetime.fromisoformat(self.date)
        except ValueError as error:
            raise ValueError(f"date is {self.date!r}, expected one as 2026-01-31T12:00:00+00:00") from error

    @property
    def name(self) -> str:
        """`model.tag`, or the model alone."""
        return f"{self.model}.{self.tag}" if self.tag else self.model

    @property
    def complete(self) -> bool:
        """All images of the official split, as far as their number tells."""
        return self.total is None or self.images == self.total


def versions() -> dict[str, str]:
    """Of the packages that numbers depend on."""
    return {"zoo": zoo.__version__, "torch": str(torch.__version__), "timm": timm.__version__}


def now() -> str:
    """This second, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def device_name(device: str) -> str:
    """The GPU's name for a GPU, else the device."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def append_results(path: str | os.PathLike, records: Sequence[Record]) -> None:
    """Add lines to a results file, which is made where it is missing.

    Raises:
        OSError: not everything could be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records).encode()
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:  # a line that another program cut off must not take ours with it
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                text = b"\n" + text
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        written = os.write(handle, text)
    finally:
        os.close(handle)
    if written != len(text):
        raise OSError(f"{path}: only {written} of {len(text)} bytes could be written: is the disk full?")


def read_results(path: str | os.PathLike) -> list[Record]:
    """The records of a results file, in its order.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line is no record; line and reason are named.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no results file at {path}: `zoo eval --compare` or `--record` writes one")
    known = {f.name for f in fields(Record)}
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            if not isinstance(content, dict):
                raise ValueError("no JSON object")
            unknown, missing = sorted(set(content) - known), sorted(known - set(content))
            if unknown or missing:
                raise ValueError(f"unknown field {unknown[0]!r}" if unknown else f"no {missing[0]!r}")
            records.append(Record(**content))
        except ValueError as error:
            raise ValueError(f"{path} line {number} is no result: {error}") from error
    return records
