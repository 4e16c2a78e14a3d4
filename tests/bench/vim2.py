"""ViM2 on CPU, one thread: zoo's scans against materialising ones, in one model and with the same weights.

    python tests/bench/vim2.py [--model vim2_tiny] [--train-size 192] [--rounds 3]

"materialised" is how a selective scan is usually written without a kernel: reordered copies of the map, decays
and inputs of all steps at once, a loop, autograd. Outputs and gradients are compared first. Times are those of
the CPU, medians of calls in turns. Memory is the growth of the process's peak, each measured in a process of
its own; a training step of the materialised form at 384 px needs 15 GB.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo import vim2_blocks
from zoo.kernels.channel_scan import channel_orders, channel_scan
from zoo.kernels.scan2d import cross_merge, cross_scan, scan2d
from zoo.kernels.scan_steps import scan_steps


def materialised_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """u, dt (b, d, L), B, C (b, d, N, L) or broadcast: decays and inputs of all steps, (L, b, d, N), come first."""
    delta = F.softplus(dt)
    decays = torch.exp(delta.permute(2, 0, 1).unsqueeze(3) * A)
    inputs = (delta * u).permute(2, 0, 1).unsqueeze(3) * B.permute(3, 0, 1, 2)
    h = torch.zeros_like(inputs[0])
    outputs = []
    for decay, step, c in zip(decays.unbind(0), inputs.unbind(0), C.permute(3, 0, 1, 2).unbind(0)):
        h = decay * h + step
        outputs.append((h * c).sum(-1))
    return torch.stack(outputs, dim=-1) + D * u


def materialised_scan2d(x, proj_weight, dt_weight, dt_bias, A, D, mode="cross") -> Tensor:
    """`scan2d` through `materialised_scan`."""
    batch, height, width, dim = x.shape
    rank, N = dt_weight.shape[-1], A.shape[1]
    xs = cross_scan(x.permute(0, 3, 1, 2), mode)
    r, B, C = torch.einsum("bkdl,kcd->bkcl", xs, proj_weight).split([rank, N, N], dim=2)
    dt = torch.einsum("bkrl,kdr->bkdl", r, dt_weight) + dt_bias.unsqueeze(-1)
    B, C = (m.repeat_interleave(dim, dim=1) for m in (B, C))
    y = materialised_scan(xs.flatten(1, 2), dt.flatten(1, 2), A, B, C, D.unsqueeze(-1))
    return cross_merge(y.view(batch, 4, dim, -1), height, width, mode).permute(0, 2, 3, 1)


def materialised_channel_scan(x, expand, conv_weight, conv_bias, dt_weight, dt_bias, A, B, C, D) -> Tensor:
    """`channel_scan` through `materialised_scan`, with B and C of every pixel."""
    width = x.shape[-1]
    flat = x.reshape(-1, width)
    orders = channel_orders(width, expand, x.device)
    a = flat[:, orders.t()]  # (M, 4, W)
    u = F.silu(F.conv1d(a, conv_weight.unsqueeze(1), conv_bias.view(4), padding="same", groups=4))
    B, C = (m * u.unsqueeze(2) for m in (B, C))
    y = materialised_scan(u, dt_weight * u + dt_bias, A, B, C, D)
    return sum(y[:, k, orders[:, k].argsort()] for k in range(4)).view(x.shape)


@contextmanager
def scans(name: str):
    """Let the blocks use the scans called "zoo" or "materialised"."""
    pairs = {"zoo": (scan2d, channel_scan), "materialised": (materialised_scan2d, materialised_channel_scan)}
    vim2_blocks.scan2d, vim2_blocks.channel_scan = pairs[name]
    try:
        yield
    finally:
        vim2_blocks.scan2d, vim2_blocks.channel_scan = pairs["zoo"]


def infer(model: torch.nn.Module, image: Tensor) -> Tensor:
    """Logits without gradients."""
    with torch.no_grad():
        return model.eval()(image)


def train(model: torch.nn.Module, image: Tensor) -> Tensor:
    """Forward and backward; the gradient of the stem."""
    model.train().zero_grad()
    model(image).logsumexp(dim=1).mean().backward()
    return model.stem.proj.weight.grad


def alternate(function: Callable, names: list[str], rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds of `function` with each of the scans, in turns."""
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            with scans(name):
                start = time.process_time()
                function()
                times[name].append(1e3 * (time.process_time() - start))
    return times


def step_loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """A scan of (L, G, D) that does all of a step at a time, the state (G, N, D) staying in the cache."""
    h, decay, y = torch.zeros_like(A), torch.empty_like(A), torch.empty_like(u)
    v = delta * u
    for t in range(len(u)):
        torch.mul(A, delta[t].unsqueeze(1), out=decay).exp_()
        h.mul_(decay).addcmul_(B[t].unsqueeze(2), v[t].unsqueeze(1))
        torch.bmm(C[t].unsqueeze(1), h, out=y[t].unsqueeze(1))
    return y


def time_scans(groups: int, rows: int, length: int, rounds: int, states: int = 16) -> None:
    """`scan_steps` against the loop over steps, forward, for one mixer's shapes."""
    A = -torch.rand(groups, states, rows) * states
    u, delta = torch.randn(length, groups, rows), 0.1 * torch.rand(length, groups, rows)
    B, C = torch.randn(2, length, groups, states)
    y = torch.empty_like(u)

    def chunked() -> None:
        def inputs(s: int, e: int):
            return delta[s:e], delta[s:e] * u[s:e], B[s:e], C[s:e]

        scan_steps(length, A, rows, inputs, lambda s, e, out: y[s:e].copy_(out))

    chunked()
    assert (y - step_loop(u, delta, A, B, C)).abs().max() < 1e-3
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for function, taken in zip((lambda: step_loop(u, delta, A, B, C), chunked), times):
            start = time.process_time()
            function()
            taken.append(1e3 * (time.process_time() - start))
    loop, chunks = (statistics.median(taken) for taken in times)
    shape = f"{groups} x {rows} rows, {length} steps"
    print(f"scan of {shape}: loop {loop:.0f} ms, zoo {chunks:.0f} ms, {loop / chunks:.2f}x")


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))


def _measure(result, name: str, model_name: str, size: int, training: bool) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, run = timm.create_model(model_name), train if training else infer
    run(model, torch.randn(1, 3, 32, 32))  # libraries and gradients exist before the measurement
    image = torch.randn(1, 3, size, size)
    before = _status("VmRSS")
    with scans(name):
        run(model, image)
    result.put(_status("VmHWM") - before)


def peak_memory(*arguments) -> int:
    """Bytes by which one call makes a process of its own grow."""
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    process = context.Process(target=_measure, args=(result, *arguments))
    process.start()
    value = result.get()
    process.join()
    return value


def main() -> None:
    """Compare, then time, then measure memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vim2_tiny")
    parser.add_argument("--train-size", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    names = ["materialised", "zoo"]
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread, {args.model}")
    model, image = timm.create_model(args.model), torch.randn(1, 3, 224, 224)
    for function, size in ((infer, 224), (train, 64)):
        got = {}
        for name in names:
            with scans(name):
                got[name] = function(model, image[..., :size, :size]).clone()
        error = (got["zoo"] - got["materialised"]).abs().max() / got["materialised"].std()
        print(f"{function.__name__} at {size}: largest difference {float(error):.1e} of the std")
        assert error < 1e-3
    for function, size in ((infer, 224), (train, 96)):
        times = alternate(lambda f=function, s=size: f(model, image[..., :s, :s]), names, args.rounds)
        base = statistics.median(times["materialised"])
        for name, taken in times.items():
            median = statistics.median(taken)
            spread = f"{min(taken):.0f}-{max(taken):.0f}"
            print(f"{function.__name__} at {size}, batch 1, {name}: {median:.0f} ms ({spread}), {base / median:.2f}x")
    for shape in ((4, 192, 3136), (4, 384, 784), (4, 768, 196), (4, 1536, 49)):
        time_scans(*shape, rounds=2 * args.rounds + 1)
    for training, size in ((False, 224), (True, args.train_size)):
        peaks = {name: peak_memory(name, args.model, size, training) for name in names}
        what = "training step" if training else "inference"
        ratio = peaks["materialised"] / peaks["zoo"]
        shown = ", ".join(f"{name} {value / 2**20:.0f} MB" for name, value in peaks.items())
        print(f"{what} at {size}, batch 1, peak memory: {shown}, 1/{ratio:.1f}")


if __name__ == "__main__":
    main()
