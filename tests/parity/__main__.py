"""`python -m tests.parity [CASE.json ...]`: a table of errors, exit status 1 if any case falls short."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import zoo  # noqa: F401 - registers the models
from tests.parity.golden import GOLDEN, Case
from tests.parity.runner import Row, print_rows, run_case


def main(arguments: list[str] | None = None) -> int:
    """Run the given golden files (or folders of them); by default everything under tests/golden."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("cases", nargs="*", type=Path, help="golden JSON files or folders of them")
    parser.add_argument("-v", "--verbose", action="store_true", help="a line for every output, not the worst only")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    paths = [f for p in args.cases or [GOLDEN] for f in (sorted(p.rglob("*.json")) if p.is_dir() else [p])]
    if not paths:
        print("no golden cases found", file=sys.stderr)
        return 1
    return 0 if print_rows(_rows(paths), args.verbose) else 1


def _rows(paths: list[Path]):
    for path in paths:
        try:
            case = Case(path)
        except (OSError, ValueError) as error:
            yield Row(str(path), "-", [], f"not readable: {error}", 0.0)
            continue
        yield from run_case(case)


if __name__ == "__main__":
    sys.exit(main())
