"""Measure what runs on this machine: `zoo bench kernels` times each operator against its alternatives."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `zoo bench`."""
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    kernels = subjects.add_parser("kernels", help="each operator against the forms that one would use otherwise")
    kernels.add_argument("operators", nargs="*", help="all of them by default")
    kernels.add_argument("--device", help="cuda if there is one, else cpu")
    kernels.add_argument("--repeats", type=int, default=7, help="rounds; the median counts (default: 7)")
    kernels.add_argument("--compile", action="store_true", help="also time torch.compile of the last form of each row")
    kernels.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, and write the file that was asked for."""
    return _kernels(args)


def _kernels(args: argparse.Namespace) -> int:
    import torch

    from zoo.kernels import explain
    from zoo.tools.bench_kernels import OPERATORS, measure, table

    unknown = [name for name in args.operators if name not in OPERATORS]
    if unknown:
        raise ValueError(f"no operator is called {unknown[0]!r}: choose from {', '.join(OPERATORS)}")
    if args.repeats < 1:
        raise ValueError(f"--repeats is {args.repeats}: pass at least 1")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{where}, torch {torch.__version__}, {torch.get_num_threads()} threads; kernels: {explain()}")
    print("milliseconds; backward includes the forward pass\n")
    timings = []
    for name in args.operators or OPERATORS:
        for timing in measure(name, device, args.repeats, args.compile):
            timings.append(timing)
            print("\n".join(table([timing]).split("\n")[len(timings) > 1 and 2 :]), flush=True)
    if args.json:
        records = [t._asdict() | {"ratio": t.ratio} for t in timings]
        args.json.write_text(
            json.dumps({"device": where, "torch": torch.__version__, "rows": records}, indent=2) + "\n"
        )
    return 0
