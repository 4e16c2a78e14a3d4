"""CRATE on CPU, one thread: published graph against training form and folded form, side by side.

    python tests/bench/crate.py [model ...]          # crate_tiny and crate_base by default

"published" takes ISTA's three products, "folded" is `zoo.fold`; the outputs are compared first. A training
step is forward and backward of batch 8. The last lines compare the forms of tied attention.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable

import timm
import torch

import zoo
from zoo.crate_blocks import Ista
from zoo.kernels.tied_attention import reference, tied_attention


def alternate(*functions: Callable[[], object], rounds: int) -> list[list[float]]:
    """Milliseconds of each function, called in turns so that disturbances hit all of them."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(rounds):
        for function, taken in zip(functions, times):
            start = time.perf_counter()
            function()
            taken.append(1e3 * (time.perf_counter() - start))
    return times


def show(what: str, names: list[str], times: list[list[float]]) -> None:
    """Median, 20th and 80th percentile of each, and how many times faster than the first."""
    base = statistics.median(times[0])
    parts = []
    for name, taken in zip(names, times):
        low, *_, high = statistics.quantiles(taken, n=5)
        median = statistics.median(taken)
        parts.append(f"{name} {median:.2f} ms ({low:.2f}-{high:.2f}), {base / median:.2f}x")
    print(f"{what:<34} " + "; ".join(parts), flush=True)


class PublishedIsta(Ista):
    """ISTA with three products in training mode too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, C) -> (B, N, C)."""
        training, self.training = self.training, False
        try:
            return super().forward(x)
        finally:
            self.training = training


def published(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of `model` that always computes the published graph."""
    copy = timm.create_model(model.pretrained_cfg["architecture"])
    copy.load_state_dict(model.state_dict())
    for module in copy.modules():
        if type(module) is Ista:
            module.__class__ = PublishedIsta
    return copy


def bench_model(name: str) -> None:
    """Inference at batch 1 and 8, and a training step."""
    model = timm.create_model(name)
    official = published(model)
    folded = zoo.fold(model)
    model.eval()
    official.eval()
    image = torch.randn(8, 3, 224, 224)
    with torch.no_grad():
        expected = model.double()(image[:1].double())
        error = (zoo.fold(model)(image[:1].double()) - expected).abs().max() / expected.std()
        print(f"{name}: folded against unfolded in float64: {float(error):.1e} of the std")
        model.float()
        for batch, rounds in ((1, 25), (8, 9)):
            x = image[:batch]
            times = alternate(lambda x=x: official(x), lambda x=x: folded(x), rounds=rounds)
            show(f"{name} inference, batch {batch}", ["published", "folded"], times)
    model.train()
    official.train()
    for batch, rounds in ((1, 9), (8, 5)):
        x = image[:batch]

        def step(network: torch.nn.Module, x: torch.Tensor = x) -> None:
            network.zero_grad()
            network(x).logsumexp(dim=1).mean().backward()

        times = alternate(lambda: step(official), lambda: step(model), rounds=rounds)
        show(f"{name} training step, batch {batch}", ["published", "zoo"], times)


def explicit_gradient(w: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Tied attention forward and dw = P^T dO + s (dS + dS^T) w, with explicit products."""
    scale = w.shape[-1] ** -0.5
    p = torch.softmax((w * scale) @ w.transpose(-2, -1), dim=-1)
    out = p @ w
    ds = (grad @ w.transpose(-2, -1) - (grad * out).sum(-1, keepdim=True)) * p
    return p.transpose(-2, -1) @ grad + scale * (ds + ds.transpose(-2, -1)) @ w


def bench_attention(shape: tuple[int, int, int, int]) -> None:
    """Forward, and forward with backward, of three forms."""
    b, h, n, d = shape
    w = torch.randn(b, n, h, d).transpose(1, 2)
    grad = torch.randn(b, n, h, d).transpose(1, 2)

    def backward(function: Callable) -> torch.Tensor:
        leaf = w.detach().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf, grad)[0]

    assert torch.allclose(backward(tied_attention), backward(reference), atol=1e-4)
    assert torch.allclose(backward(tied_attention), explicit_gradient(w, grad), atol=1e-4)
    with torch.no_grad():
        times = alternate(lambda: reference(w), lambda: tied_attention(w), rounds=15)
        show(f"tied attention {shape}", ["explicit", "fused"], times)
    forms = [
        lambda: backward(reference),
        lambda: explicit_gradient(w, grad),
        lambda: backward(tied_attention),
    ]
    show("  with gradient", ["explicit", "dw formula", "fused"], alternate(*forms, rounds=9))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread")
    for model_name in sys.argv[1:] or ("crate_tiny", "crate_base"):
        bench_model(model_name)
    for attention_shape in ((8, 6, 197, 64), (8, 12, 197, 48), (1, 6, 785, 128)):
        bench_attention(attention_shape)
