"""`python -m tests.parity [CASE.json ...]`: a table of errors, exit status 1 if any case falls short.

With `--backend triton` every operator of zoo.kernels runs its Triton kernels: on a machine without a GPU under
Triton's interpreter, in a process of its own (Triton reads TRITON_INTERPRET when it is imported). The interpreter is
slow: choose operator cases and small models.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

import zoo  # noqa: F401 - registers the models
from tests.parity.golden import GOLDEN, Case
from tests.parity.runner import Row, print_rows, run_case, run_form
from zoo.kernels import use_backend


def main(arguments: list[str] | None = None) -> int:
    """Run the given golden files (or folders of them); by default everything under tests/golden."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="*", type=Path, help="golden JSON files or folders of them")
    parser.add_argument("-v", "--verbose", action="store_true", help="a line for every output, not the worst only")
    parser.add_argument("--backend", default="auto", choices=("auto", "triton", "torch"), help="of zoo.kernels")
    parser.add_argument("--eager", action="store_true", help="the float64 eager form only")
    args = parser.parse_args(arguments)
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if args.backend == "triton" and not torch.cuda.is_available() and not interpreted:
        command = [sys.executable, "-m", "tests.parity", *(sys.argv[1:] if arguments is None else arguments)]
        return subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}).returncode
    torch.manual_seed(0)
    paths = [f for p in args.cases or [GOLDEN] for f in (sorted(p.rglob("*.json")) if p.is_dir() else [p])]
    if not paths:
        print("no golden cases found", file=sys.stderr)
        return 1
    with use_backend(args.backend):
        return 0 if print_rows(_rows(paths, args.eager), args.verbose) else 1


def _rows(paths: list[Path], eager: bool):
    for path in paths:
        try:
            case = Case(path)
        except (OSError, ValueError) as error:
            yield Row(str(path), "-", [], f"not readable: {error}", 0.0)
            continue
        if eager:
            row = run_form(case, torch.float64, folded=False)
            yield from [] if row is None else [row]
        else:
            yield from run_case(case)


if __name__ == "__main__":
    sys.exit(main())
