"""What SLAB's norm costs unfolded, and what its attention costs: `python tests/bench/slab.py [--image 224]`.

The sides of each comparison run alternately in one process; medians and the 20th to 80th percentile of the
processor time are printed. Outputs are compared first. "as written" is the norm in the authors' form: a BatchNorm
of the transposed tokens, the scaled identity, their sum; unfolded models of zoo apply one affine map instead.
"""

from __future__ import annotations

import argparse
import copy
import functools
import platform
import statistics
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from zoo.kernels.linear_attention import linear_attention, reference
from zoo.prepbn import PRepBN, RepBN, set_gamma

MODELS = ("deit_t_prepbn", "slab_deit_t", "slab_pvt_t", "swin_t_prepbn", "slab_swin_t", "slab_cswin_t")


def as_written(norm: RepBN, x: Tensor) -> Tensor:
    """RepBN of (..., C) as the authors compute it."""
    tokens = x.reshape(x.shape[0], -1, x.shape[-1])
    y = norm.bn(tokens.transpose(1, 2)).transpose(1, 2) + norm.alpha * tokens
    return y.reshape(x.shape)


def blend_as_written(norm: PRepBN, x: Tensor) -> Tensor:
    """PRepBN of (B, N, C) in train mode as the authors compute it."""
    gamma = norm.iter / norm.total_step
    return gamma * norm.norm1(x) + (1 - gamma) * as_written(norm.norm2, x)


def keys_first(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-6) -> Tensor:
    """The same products on strided heads, copied inside the batched product."""
    q, k = F.relu(q), F.relu(k)
    return (q @ (k.transpose(-2, -1) @ v)) / (q @ k.sum(-2).unsqueeze(-1) + eps)


def compare(name: str, slow: Callable[[], Tensor], fast: Callable[[], Tensor], rounds: int) -> None:
    """Print the medians of both sides and their ratio."""
    first, second = slow(), fast()
    error = float((first - second).abs().max() / first.std())
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for side, run in zip(times, (slow, fast)):
            start = time.process_time()
            run()
            side.append(1e3 * (time.process_time() - start))
    a, b = (statistics.quantiles(side, n=5) for side in times)
    ratio = statistics.median(times[0]) / statistics.median(times[1])
    print(
        f"{name:<44} {statistics.median(times[0]):8.2f} ({a[0]:.2f}-{a[3]:.2f})"
        f"  {statistics.median(times[1]):8.2f} ({b[0]:.2f}-{b[3]:.2f})  {ratio:5.2f}x  {error:.0e}",
        flush=True,
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", type=int, default=224, help="image size in pixels")
    parser.add_argument("--batch", type=int, default=1, help="images")
    parser.add_argument("--rounds", type=int, default=15, help="runs of each side")
    parser.add_argument("--models", nargs="*", default=MODELS)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}, float32")
    header = f"{'milliseconds':<44} {'unfolded':>8} (20-80 %)  {'folded':>14} (20-80 %)  ratio  error/std"
    print(header)
    with torch.inference_mode():
        for name in args.models:
            model = timm.create_model(name).eval()
            folded = zoo.fold(model)
            image = torch.randn(args.batch, 3, args.image, args.image)
            what = f"{name}, {args.batch} image(s)"
            compare(what, lambda: model(image), lambda: folded(image), args.rounds)  # noqa: B023
            plain = copy.deepcopy(model)
            for norm in plain.modules():
                if isinstance(norm, RepBN):
                    norm.forward = functools.partial(as_written, norm)
            compare(f"{what}, as written", lambda: plain(image), lambda: folded(image), args.rounds)  # noqa: B023
    print(header.replace("unfolded", "written").replace("folded", "zoo's "))
    for shape in ((8, 3136, 96), (8, 196, 384)):
        norm = PRepBN(shape[-1], total_steps=2).train()
        set_gamma(norm, 0.5)
        tokens, weight = torch.randn(shape, requires_grad=True), torch.randn(shape)
        what = f"training step of PRepBN, {list(shape)}"
        compare(
            what,
            lambda: torch.autograd.grad(blend_as_written(norm, tokens), tokens, weight)[0],  # noqa: B023
            lambda: torch.autograd.grad(norm(tokens), tokens, weight)[0],  # noqa: B023
            args.rounds,
        )
    with torch.inference_mode():
        print(header.replace("unfolded", "  other ").replace("folded", "zoo's "))
        for heads, tokens, dim in ((3, 3136, 32), (6, 784, 32), (3, 196, 64)):
            q, k, v = torch.randn(4, tokens, 3, heads, dim).permute(2, 0, 3, 1, 4)
            shape = f"{heads} heads, {tokens} tokens of {dim}"
            for what, other in (("strided heads", keys_first), ("query by key", reference)):
                rounds = args.rounds if other is keys_first else 3
                compare(f"{what}, {shape}", lambda: other(q, k, v), lambda: linear_attention(q, k, v), rounds)  # noqa: B023


if __name__ == "__main__":
    main()
