"""Golden cases: what a reference implementation computed, for weights and inputs that are rebuilt here.

A case records neither weights nor inputs: both are functions of (seed, name, shape). `Case` rebuilds them,
and the comparisons measure a computed tensor against a record in units of the recorded std.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.tools.golden import fill_input, fill_weight, output_error

__all__ = [
    "GOLDEN",
    "Case",
    "data_folder",
    "fill_input",
    "fill_weight",
    "golden_cases",
    "output_error",
    "relative_error",
]

GOLDEN = Path(__file__).parent.parent / "golden"


class Case(dict):
    """The fields of one golden file, with the weights and inputs that they stand for."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        super().__init__(json.loads(self.path.read_text()))

    @property
    def name(self) -> str:
        """Folder and stem: "crate/crate_tiny"."""
        return f"{self.path.parent.name}/{self.path.stem}"

    @property
    def seed(self) -> int:
        """Seed of weights and inputs."""
        return self.get("seed", 0)

    def weights(self, entries: list | None = None) -> dict[str, Tensor]:
        """The reference state dict in float64: every floating entry, `weight_edits` applied.

        Integer entries and what `derived_buffers` or `kept_entries` names are left out: the model builds
        those itself.
        """
        entries = self["state_dict"] if entries is None else entries
        kept = {*_names(self.get("derived_buffers")), *_names(self.get("kept_entries"))}
        state = {
            name: fill_weight(name, shape, self.seed)
            for name, shape, dtype in entries
            if "float" in dtype and name not in kept
        }
        for leaf, factor in self.get("weight_edits") or ():
            for name in state:
                if name.rsplit(".", 1)[-1] == leaf:
                    state[name] = state[name] * factor
        return state

    def input(self, name: str | None = None, shape: Iterable[int] | None = None) -> Tensor:
        """The recorded input, or another one of the given name and shape, in float64."""
        record = self.get("input") or {}
        return fill_input(name or record["name"], shape or record["shape"], self.seed)


def _names(value: Any) -> list[str]:
    """Names in a field that holds one, a list of them, or a list of (name, shape, dtype)."""
    if value is None:
        return []
    entries = list(value) if isinstance(value, (list, tuple, dict)) else [value]
    return [entry[0] if isinstance(entry, (list, tuple)) else entry for entry in entries]


def golden_cases(*families: str) -> list[Case]:
    """The cases under `tests/golden`, of the given families or of all."""
    folders = [GOLDEN / f for f in families] if families else sorted(p for p in GOLDEN.iterdir() if p.is_dir())
    return [Case(path) for folder in folders for path in sorted(folder.glob("*.json"))]


def data_folder(case: Case, name: str) -> Path:
    """The data set `name` that a case was measured on: under $ZOO_DATA, beside the golden files, or in tests/data.

    Raises:
        FileNotFoundError: it is in none of these.
    """
    roots = [Path(os.environ[key]) for key in ("ZOO_DATA",) if key in os.environ]
    roots += [case.path.resolve().parents[2] / "data", GOLDEN.parent / "data"]
    for root in roots:
        if (root / name).is_dir():
            return root / name
    raise FileNotFoundError(f"{case.name} needs the data set {name}, which is not in {', '.join(map(str, roots))}")


def relative_error(computed: float, recorded: float) -> float:
    """|computed - recorded| relative to the recorded value (absolute where that is zero)."""
    error = abs(float(computed) - recorded) / (abs(recorded) or 1.0)
    return error if math.isfinite(error) else math.inf
