"""Measure what runs on this machine.

`zoo bench models crate_tiny resnet50 --forms eager,folded,onnx` times models side by side, `zoo bench kernels` each
operator against its alternatives.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `zoo bench`."""
    subjects = parser.add_subparsers(dest="subject", required=True, metavar="SUBJECT")
    models = subjects.add_parser("models", help="any models of zoo and timm, in several forms, side by side")
    models.add_argument("names", nargs="+", help="models, patterns such as 'crate_*', or files of zoo train")
    models.add_argument("--forms", default="eager,folded", help="of eager, folded, compiled, onnx")
    models.add_argument("--device", help="cuda if there is one, else cpu")
    models.add_argument("--threads", type=int, help="of the CPU")
    models.add_argument("--img-size", type=int, help="side of the images; each model's own by default")
    models.add_argument("--batch-size", type=int, default=8, help="for the throughput; 0: latency alone (default: 8)")
    models.add_argument("--channels-last", action="store_true", help="memory order of weights and images")
    models.add_argument(
        "--precision", choices=("float32", "bf16", "fp16"), default="float32", help="of weights, images"
    )
    models.add_argument("--repeats", type=int, default=15, help="rounds over all models and forms (default: 15)")
    models.add_argument("--no-memory", action="store_true", help="do not measure memory (a pass more for each row)")
    models.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    models.add_argument("--plot", type=Path, metavar="FILE", help="claimed accuracy against images a second")
    kernels = subjects.add_parser("kernels", help="each operator against the forms that one would use otherwise")
    kernels.add_argument("operators", nargs="*", help="all of them by default")
    kernels.add_argument("--device", help="cuda if there is one, else cpu")
    kernels.add_argument("--repeats", type=int, default=7, help="rounds; the median counts (default: 7)")
    kernels.add_argument("--compile", action="store_true", help="also time torch.compile of the last form of each row")
    kernels.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, and write the file that was asked for."""
    return _models(args) if args.subject == "models" else _kernels(args)


def _models(args: argparse.Namespace) -> int:
    import torch

    from zoo.tools import bench_models

    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads is {args.threads}: pass at least 1")
        torch.set_num_threads(args.threads)
    if args.batch_size < 0 or (args.img_size is not None and args.img_size < 1):
        raise ValueError("--batch-size and --img-size are numbers of images and pixels, not negative")
    settings = bench_models.Settings(
        forms=tuple(form.strip() for form in args.forms.split(",") if form.strip()),
        device=torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu")),
        img_size=args.img_size,
        batch_size=args.batch_size,
        repeats=args.repeats,
        channels_last=args.channels_last,
        precision=args.precision,
        memory=not args.no_memory,
    )
    where = _machine(settings.device)
    print(f"{where}, torch {torch.__version__}, {torch.get_num_threads()} threads, {args.precision}")
    rows = bench_models.measure(bench_models.find_models(args.names), settings)
    clock = (
        "CPU time of this process" if settings.device.type == "cpu" and torch.get_num_threads() == 1 else "wall time"
    )
    print(f"batch 1 in turns, {args.repeats} rounds, {clock}; speed: times as fast as the first row, round by round\n")
    print(bench_models.table(rows, args.batch_size))
    if args.json:
        found = {
            "machine": where,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "precision": args.precision,
            "batch_size": args.batch_size,
            "rounds": args.repeats,
            "clock": clock,
            "rows": [row.to_dict() for row in rows],
        }
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    if args.plot:
        from zoo.tools.bench_plot import plot

        plot(rows, args.plot, f"{where}, {torch.get_num_threads()} threads, batch {args.batch_size}")
    return 0


def _machine(device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = Path("/proc/cpuinfo")
    for line in names.read_text().splitlines() if names.is_file() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


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
    where = _machine(device)
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
