"""Models side by side: latency, throughput, memory, multiply-adds, parameters, in several forms.

A subject is a model in a form: "eager", "folded" (`zoo.fold`), "compiled" (`torch.compile` of the folded model) or
"onnx" (the folded model in ONNX Runtime on the CPU). All subjects are timed in turns, and each round's ratio to the
first subject is kept, so that a ratio and its spread hold on a busy machine, where absolute times do not.
"""

from __future__ import annotations

import fnmatch
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from zoo.manifest import known_weights
from zoo.tools.info import multiply_adds
from zoo.tools.timing import Clock, in_turns, spread

FORMS = ("eager", "folded", "compiled", "onnx")
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        forms: of `FORMS`.
        device: where the models run; ONNX Runtime always runs on the CPU.
        img_size: side of the images, each model's own if None.
        batch_size: images of a pass for the throughput; 0: not measured.
        repeats: rounds.
        channels_last: memory order of weights and images.
        precision: of weights and images, of `PRECISIONS`.
        memory: measure it, see `_memory`.
    """

    forms: tuple[str, ...] = ("eager", "folded")
    device: torch.device = torch.device("cpu")
    img_size: int | None = None
    batch_size: int = 8
    repeats: int = 15
    channels_last: bool = False
    precision: str = "float32"
    memory: bool = True


@dataclass
class Row:
    """What was measured of one subject: seconds, bytes, counts. `ratio` is the speed relative to the first subject."""

    model: str
    form: str
    image: tuple[int, int, int]
    parameters: int
    multiply_adds: int
    latency: tuple[float, float, float]
    ratio: tuple[float, float, float]
    throughput: float | None
    memory: int | None
    claim: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON with units in the names."""
        latency, ratio = (dict(zip(("median", "p10", "p90"), values)) for values in (self.latency, self.ratio))
        return {
            "model": self.model,
            "form": self.form,
            "image": list(self.image),
            "parameters": self.parameters,
            "multiply_adds": self.multiply_adds,
            "latency_ms": {k: 1e3 * v for k, v in latency.items()},
            "speed_relative_to_first": ratio,
            "images_per_second": self.throughput,
            "memory_bytes": self.memory,
            "claimed_top1": self.claim,
        }


def find_models(patterns: Sequence[str]) -> list[str]:
    """Names behind patterns with wildcards; names and weight files as they are.

    Raises:
        ValueError: nothing is called so.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        if Path(pattern).suffix == ".safetensors":
            if not Path(pattern).is_file():
                raise ValueError(f"no file {pattern}")
            names = [pattern]
        elif any(c in pattern for c in "*?["):
            names = [name for name in timm.list_models() if fnmatch.fnmatch(name, pattern)]
        else:
            names = [pattern] if timm.is_model(pattern.split(".")[0]) else []
        if not names:
            raise ValueError(f"no model is called {pattern!r}: `zoo list` and timm.list_models() name them")
        found |= dict.fromkeys(names)
    return list(found)


def measure(names: Sequence[str], settings: Settings, clock: Clock | None = None) -> list[Row]:
    """One row for every form of every model.

    Raises:
        ValueError: a form or precision is unknown or has no meaning here, or a file is no classifier.
        ImportError: ONNX Runtime is asked for and missing.
    """
    _check(settings)
    subjects: dict[str, _Subject] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            for form in settings.forms:
                key = f"{name} {form}"
                print(f"building {key}", file=sys.stderr, flush=True)
                subjects[key] = _Subject(name, form, settings, Path(folder) / f"{len(subjects)}.onnx")
        with torch.inference_mode():
            times = in_turns({k: s.call(1) for k, s in subjects.items()}, settings.repeats, settings.device, clock, 2)
            batches: dict[str, list[float]] = {}
            if settings.batch_size:
                calls = {k: s.call(settings.batch_size) for k, s in subjects.items()}
                batches = in_turns(calls, max(3, settings.repeats // 3), settings.device, clock)
            memory = {}
            if settings.memory:
                memory = {k: _memory(s, settings.batch_size or 1, settings) for k, s in subjects.items()}
        first = next(iter(times.values()))
        rows = []
        for key, subject in subjects.items():
            rows.append(
                Row(
                    model=subject.name,
                    form=subject.form,
                    image=subject.image,
                    parameters=subject.parameters,
                    multiply_adds=subject.multiply_adds,
                    latency=spread(times[key]),
                    ratio=spread([a / b if b > 0 else float("nan") for a, b in zip(first, times[key])]),
                    throughput=settings.batch_size / max(min(batches[key]), 1e-12) if batches else None,
                    memory=memory.get(key),
                    claim=claimed_accuracy(subject.name),
                )
            )
    return rows


def _check(settings: Settings) -> None:
    for form in settings.forms:
        if form not in FORMS:
            raise ValueError(f"form {form!r} is unknown: choose from {', '.join(FORMS)}")
    if not settings.forms:
        raise ValueError(f"no forms are given: choose from {', '.join(FORMS)}")
    if settings.precision not in PRECISIONS:
        raise ValueError(f"precision {settings.precision!r} is unknown: choose from {', '.join(PRECISIONS)}")
    if settings.repeats < 1:
        raise ValueError(f"repeats is {settings.repeats}: pass at least 1")
    if "onnx" in settings.forms and (settings.device.type != "cpu" or settings.precision != "float32"):
        raise ValueError("the form onnx runs on the CPU in float32: leave it out, or --device and --precision")


class _Subject:
    """A model in a form, ready to be called."""

    def __init__(self, name: str, form: str, settings: Settings, file: Path):
        import zoo
        from zoo.preprocess import eval_transform_for

        self.name, self.form, self.settings = name, form, settings
        model = build(name, settings.img_size)
        channels, height, width = eval_transform_for(model).input_size
        if settings.img_size:
            height = width = settings.img_size
        self.image = (channels, height, width)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.multiply_adds = multiply_adds(model, (1, *self.image))
        self.model: nn.Module | None = model
        if form == "onnx":
            from zoo.exporting import export_onnx
            from zoo.onnx_model import open_session

            if not file.exists():
                export_onnx(model, file, img_size=(height, width) if settings.img_size else None, check=False)
            self.session, self.model = open_session(file), None
            return
        if form in ("folded", "compiled"):
            model = zoo.fold(model, inplace=True)
        model = model.to(settings.device, PRECISIONS[settings.precision])
        if settings.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.model = torch.compile(model) if form == "compiled" else model

    def call(self, batch: int) -> Callable[[], object]:
        """A function that runs one pass on fixed noise."""
        images = torch.randn(batch, *self.image, generator=torch.Generator().manual_seed(0))
        if self.model is None:
            fed = {"images": images.numpy()}
            return lambda: self.session.run(None, fed)
        images = images.to(self.settings.device, PRECISIONS[self.settings.precision])
        if self.settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return lambda: self.model(images)


def build(name: str, img_size: int | None) -> nn.Module:
    """A classifier by name (random weights) or from a file, in eval mode.

    Raises:
        ValueError: a file of another task.
    """
    from zoo.saving import load_model, read_metadata

    size = {"img_size": img_size} if img_size else {}
    is_file = Path(name).suffix == ".safetensors"
    if is_file and read_metadata(name).get("door"):
        raise ValueError(f"{name} is no classifier: zoo bench models times classifiers")
    for arguments in (size, {}):
        try:
            return (load_model(name, **arguments) if is_file else timm.create_model(name, **arguments)).eval()
        except TypeError:  # takes any size
            if not arguments:
                raise
    raise AssertionError("unreachable")


def claimed_accuracy(name: str) -> float | None:
    """Top-1 of ImageNet that the paper claims, by the manifest."""
    return next((w.claimed["top1"] for w in known_weights() if w.model == name and "top1" in w.claimed), None)


# Memory


def _memory(subject: _Subject, batch: int, settings: Settings) -> int | None:
    """Bytes that one pass needs at its peak on top of model and images; None where that is not known.

    CUDA: what PyTorch's allocator counts. CPU, forms of PyTorch: the largest sum of tensors that live at once, by the
    profiler's records of each allocation, so that nothing depends on other processes or on what was freed before; a
    kernel's own scratch memory outside PyTorch's allocator is not seen. ONNX Runtime does not tell: the growth of the
    process says nothing, since memory that was freed before is taken again.
    """
    if subject.model is None:
        return None
    call = subject.call(batch)
    if settings.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(settings.device)
        before = torch.cuda.memory_allocated(settings.device)
        call()
        return torch.cuda.max_memory_allocated(settings.device) - before
    return peak_of_tensors(call) if settings.device.type == "cpu" else None


def peak_of_tensors(call: Callable[[], object]) -> int:
    """The largest sum of bytes of CPU tensors made by `call` that live at the same time."""
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # its notes about itself would stand between the rows
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()  # held, so that the output counts to the end
    now = peak = 0
    # the aggregating views hide single allocations; the raw events come in the order of time
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
            now += event.nbytes()
            peak = max(peak, now)
    del result
    return peak


def table(rows: Sequence[Row], batch_size: int) -> str:
    """A Markdown table."""
    lines = [
        f"| model | form | image | params, M | MACs, G | latency, ms (p10-p90) | speed (p10-p90) | "
        f"images/s{f' at {batch_size}' if batch_size else ''} | memory, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        median, low, high = (1e3 * value for value in row.latency)
        speed, slowest, fastest = row.ratio
        rate = "-" if row.throughput is None else f"{row.throughput:.1f}"
        memory = "-" if row.memory is None else f"{row.memory / 2**20:.0f}"
        lines.append(
            f"| {row.model} | {row.form} | {row.image[1]}x{row.image[2]} | {row.parameters / 1e6:.2f} | "
            f"{row.multiply_adds / 1e9:.2f} | {median:.1f} ({low:.1f}-{high:.1f}) | "
            f"{speed:.2f} ({slowest:.2f}-{fastest:.2f}) | {rate} | {memory} |"
        )
    return "\n".join(lines)
