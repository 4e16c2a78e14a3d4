"""Everything about a model: size, cost, features, weights, what its names mean; or about this machine."""

from __future__ import annotations

import argparse
import inspect
import platform
import sys

import timm
import torch
from timm.data import resolve_data_config

from zoo.kernels.dispatch import explain
from zoo.manifest import known_weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `zoo info`."""
    parser.add_argument("model", nargs="?", help="registered model name")
    parser.add_argument("--img-size", type=int, help="input size for the cost, the model's own by default")


def run(args: argparse.Namespace) -> int:
    """Print the facts."""
    return _about_model(args) if args.model else _about_machine()


def _about_machine() -> int:
    import zoo

    print(f"zoo {zoo.__version__}, timm {timm.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    print(f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            print(f"GPU {i}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    print(f"kernels: {explain()}")
    return 0


def _about_model(args: argparse.Namespace) -> int:
    if not timm.is_model(args.model.split(".")[0]):
        raise ValueError(f"no model is called {args.model!r}: `zoo list` names them")
    entrypoint = timm.model_entrypoint(args.model.split(".")[0])
    size = {"img_size": args.img_size} if args.img_size else {}
    try:
        model = timm.create_model(args.model, **size)
    except TypeError:
        model = timm.create_model(args.model)  # takes any size
    model.eval()
    cfg = resolve_data_config({}, model=model)
    channels, height, width = cfg["input_size"]
    if args.img_size:
        height = width = args.img_size
    reading = getattr(sys.modules[entrypoint.__module__], "READING", None)
    rows = [
        ("model", args.model),
        ("defined in", entrypoint.__module__),
        ("about", " ".join((inspect.getdoc(entrypoint) or "").split("\n\n")[0].split())),
        ("input", f"{channels} x {height} x {width}, {cfg['interpolation']}, crop {cfg['crop_pct']:.3g}"),
        ("parameters", f"{sum(p.numel() for p in model.parameters()):,}"),
        (
            "multiply-adds",
            f"{multiply_adds(model, (1, channels, height, width)) / 1e9:.2f} G (matrix products, convolutions)",
        ),
        ("features", _features(model)),
    ]
    if reading:
        rows.append(("reading", reading))
    for weights in known_weights():
        if weights.model == args.model.split(".")[0]:
            claimed = ", ".join(f"{k} {v}" for k, v in weights.claimed.items())
            where = weights.hub_id or weights.url or weights.source or ""
            rows.append((f"weights {weights.tag}", f"{weights.access} {where} {claimed}".strip()))
    label = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{label}}  {value}")
    return 0


def _features(model: torch.nn.Module) -> str:
    info = getattr(model, "feature_info", None) or []
    info = info if isinstance(info, list) else info.info
    levels = sorted({(level["reduction"], level["num_chs"]) for level in info})
    return ", ".join(f"{channels} channels at stride {reduction}" for reduction, channels in levels) or "-"


def multiply_adds(model: torch.nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-adds of one forward pass: matrix products, convolutions and attention products."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(shape))
    return counter.get_total_flops() // 2
