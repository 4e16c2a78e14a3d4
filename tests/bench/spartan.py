"""SpaRTAN on CPU, one thread: trained against folded form, and the wave gate's formulations, side by side.

    python tests/bench/spartan.py [name ...] [--size 256] [--batch 8] [--rounds 7]

Outputs are compared first, in float64. "official" is the trained form with complex numbers for the factors, as the
authors compute them; "trained" is zoo's, "channels last" the same in the other memory layout, "folded" is `zoo.fold`.
Times are CPU time of this process, milliseconds an image: median (20th to 80th percentile).
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

import zoo
from zoo import spartan_blocks
from zoo.kernels.wave_gate import reference, wave_gate


def alternate(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds of each function, called in turns so that disturbances hit all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.process_time()
            function()
            times[name].append(1e3 * (time.process_time() - start))
    return times


def show(what: str, times: dict[str, list[float]], images: int, base: str) -> None:
    """One line: each side's median and spread, and how many times faster than `base` it is."""
    unit = statistics.median(times[base])
    parts = []
    for name, taken in times.items():
        low, *_, high = (t / images for t in statistics.quantiles(taken, n=5))
        median = statistics.median(taken)
        parts.append(f"{name} {median / images:.2f} ({low:.2f}-{high:.2f}), {unit / median:.2f}x")
    print(f"{what}: " + "; ".join(parts), flush=True)


def shaken(model: nn.Module) -> nn.Module:
    """The model with scales and vectors as training would leave them, so that every part counts."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or name.endswith("scale"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


class Official(nn.Module):
    """A model whose channel mixers multiply complex numbers."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        spartan_blocks.wave_gate = reference
        try:
            return self.model(x)
        finally:
            spartan_blocks.wave_gate = wave_gate


def bench_model(name: str, size: int, batch: int, rounds: int) -> None:
    """Inference of a registered model."""
    model = shaken(timm.create_model(name))
    folded = zoo.fold(model)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    double = copy.deepcopy(model).double()
    image = torch.randn(1, 3, size, size, dtype=torch.float64)
    expected = double(image)
    sides = [Official(double)(image), zoo.fold(double)(image)]
    error = max(float((side - expected).abs().max() / expected.std()) for side in sides)
    print(f"{name}, {size} px: float64 difference {error:.1e} std")
    assert error < 1e-10
    for images in sorted({1, batch}):
        x = torch.randn(images, 3, size, size)
        x_last = x.contiguous(memory_format=torch.channels_last)
        calls = {
            "official": lambda x=x: Official(model)(x),
            "trained": lambda x=x: model(x),
            "channels last": lambda x=x_last: other(x),
            "folded": lambda x=x: folded(x),
        }
        show(f"{name}, batch {images}", alternate(calls, rounds), images, "trained")


def bench_gate(rounds: int) -> None:
    """The wave gate at the sizes of the first and third stage of `spartan_tiny` at 256 px."""
    for C, n, side in ((32, 128, 64), (128, 256, 16)):
        x, theta, amplitude = (torch.randn(2, k, side, side) for k in (C, n, n))
        rotation = torch.randn(n // 2, 2)
        error = (wave_gate(x, theta, amplitude, rotation) - reference(x, theta, amplitude, rotation)).abs().max()
        assert error < 1e-4
        calls = {
            "complex": lambda a=(x, theta, amplitude, rotation): reference(*a),
            "wave_gate": lambda a=(x, theta, amplitude, rotation): wave_gate(*a),
        }
        show(f"wave gate, {n} channels, {side}x{side}", alternate(calls, 3 * rounds), 2, "complex")
        calls = {"argmax": lambda x=x: x.argmax(1), "max": lambda x=x: x.max(1)}
        show(f"strongest of {C}, {side}x{side}", alternate(calls, 3 * rounds), 2, "argmax")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["spartan_tiny"])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, timm {timm.__version__}, 1 thread")
    with torch.inference_mode():
        bench_gate(options.rounds)
        for name in options.names:
            bench_model(name, options.size, options.batch, options.rounds)


if __name__ == "__main__":
    main()
