"""FcaFormer: the inference form against the trained form, and one against two key segments in attention.

    python -m tests.bench.fcaformer                                  # L1 and L2, batch 1, one thread
    python -m tests.bench.fcaformer --models fcaformer_l3 --batch 8 --threads 4

Both sides run alternately in one process, after their outputs were compared.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import quantiles

import timm
import torch
from torch import Tensor, nn

import zoo
from zoo.kernels.attention import attention, reference


def main(models: Sequence[str] = ("fcaformer_l1", "fcaformer_l2"), segments: bool = True) -> None:
    """Print a line a model."""
    parser = argparse.ArgumentParser(description="trained against folded form")
    parser.add_argument("--models", nargs="+", default=list(models))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{platform.machine()}, {options.threads} thread(s), torch {torch.__version__}, float32, CPU time in ms")
    for name in options.models:
        model = randomise(timm.create_model(name).eval())
        x = torch.randn(options.batch, 3, options.size, options.size)
        compare(f"{name} {options.size} px, batch {options.batch}", model, zoo.fold(model), x, options.runs)
    if segments:
        for heads, n, m in ((6, 196, 80), (16, 196, 176), (10, 49, 4)):
            q, k, v = (torch.randn(options.batch, heads, n, 32) for _ in range(3))
            k2, v2 = (torch.randn(options.batch, heads, m, 32) for _ in range(2))
            rest = dict(bias=torch.randn(heads, n, n), k2=k2, v2=v2, key_bias2=torch.randn(heads, m))
            plain, fused = (partial(form, k=k, v=v, **rest) for form in (reference, attention))
            compare(f"attention, {heads} heads, {n} + {m} keys: plain, fused", plain, fused, q, options.runs)


def randomise(model: nn.Module) -> nn.Module:
    """Layer scales and statistics as in a trained model, so that no value underflows."""
    for name, tensor in model.state_dict().items():
        if name.endswith("gamma"):
            tensor.fill_(0.5)
        elif tensor.ndim > 1:
            tensor.normal_(std=max(1, tensor[0].numel()) ** -0.5)
    return model


@torch.inference_mode()
def compare(title: str, slow: Callable, fast: Callable, x: Tensor, runs: int) -> None:
    """Time two forms alternately; stop if they differ."""
    expected, output = slow(x), fast(x)
    error = ((output - expected).abs().max() / expected.std()).item()
    if not error < 1e-3:
        raise SystemExit(f"{title}: the forms differ by {error:.1e} of the output's std")
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs + 2):
        for form, record in zip((slow, fast), times, strict=True):
            start = time.process_time()
            form(x)
            record.append((time.process_time() - start) * 1e3)
    cells = []
    for record in times:
        p20, _, _, p80 = quantiles(record[2:], n=5)
        cells.append(f"{sorted(record[2:])[runs // 2]:8.2f} ({p20:.2f}-{p80:.2f})")
    ratio = sorted(a / b for a, b in zip(times[0][2:], times[1][2:]))[runs // 2]
    print(f"{title:<52} {cells[0]:<26} {cells[1]:<26} x{ratio:.2f}  error {error:.0e}", flush=True)


if __name__ == "__main__":
    main()
