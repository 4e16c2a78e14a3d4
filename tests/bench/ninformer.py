"""NiNformer on CPU, one thread: its operators and its inference form against the published graph, side by side.

    python -m tests.bench.ninformer [model ...]      # ninformer_patch4_32 and ninformer_tiny_patch16_224 by default

"published" transposes around the token MLP, writes the gate as z + u * g and lets the tokens keep the layout of the
convolution's output; "folded" is `zoo.fold`. Outputs are compared first. Times are those of the thread, so
that other work on the machine disturbs them little: median (20th-80th percentile) and how many times faster than
the first.
"""

from __future__ import annotations

import copy
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo
from zoo.kernels import token_gate, token_mix
from zoo.ninformer import NinFormer


def alternate(*functions: Callable[[], object], rounds: int = 15) -> list[list[float]]:
    """Milliseconds of each function, called in turns so that disturbances hit all of them."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(rounds):
        for function, taken in zip(functions, times):
            start = time.thread_time()
            function()
            taken.append(1e3 * (time.thread_time() - start))
    return times


def show(what: str, forms: dict[str, Callable[[], object]], rounds: int = 15) -> None:
    """Time the forms and print a line."""
    times = alternate(*forms.values(), rounds=rounds)
    base = statistics.median(times[0])
    parts = []
    for name, taken in zip(forms, times):
        low, *_, high = statistics.quantiles(taken, n=5)
        median = statistics.median(taken)
        parts.append(f"{name} {median:.2f} ms ({low:.2f}-{high:.2f}) {base / median:.2f}x")
    print(f"{what:<40} " + "; ".join(parts), flush=True)


def header() -> None:
    """The machine and the versions that the numbers are of."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{platform.machine()}, 1 thread, float32, torch {torch.__version__}, timm {timm.__version__}")


def training(form: Callable[..., Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    """Forward and backward of an operator."""
    gradient = torch.randn_like(form(*leaves))
    return lambda: torch.autograd.grad(form(*leaves), leaves, gradient)


def _broadcast(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return torch.matmul(w2, F.gelu(torch.matmul(w1, x) + b1[:, None])) + b2[:, None]


def bench_operators() -> None:
    """Token MLP, gate, and LayerNorm with and without its affine part."""
    forms = {"transposed": token_mix.reference, "matmul": _broadcast, "token_mix": token_mix.token_mix}
    for batch, n, d, f in [(1, 64, 256, 512), (32, 64, 256, 512), (8, 196, 192, 384), (8, 196, 384, 768)]:
        leaves = [torch.randn(batch, n, d), torch.randn(f, n) / n**0.5, torch.randn(f)]
        leaves += [torch.randn(n, f) / f**0.5, torch.randn(n)]
        leaves = [t.requires_grad_() for t in leaves]
        for form in forms.values():
            torch.testing.assert_close(form(*leaves), token_mix.reference(*leaves), rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            calls = {name: partial(form, *leaves) for name, form in forms.items()}
            show(f"token MLP {batch}x{n}x{d}, f {f}", calls)
        show(f"  with gradients {batch}x{n}x{d}", {n: training(form, leaves) for n, form in forms.items()}, rounds=7)
    z, u, g = (torch.randn(8, 196, 384) for _ in range(3))
    torch.testing.assert_close(token_gate.token_gate(z, u, g), token_gate.reference(z, u, g))
    gate = {"z + u * g": lambda: token_gate.reference(z, u, g), "token_gate": lambda: token_gate.token_gate(z, u, g)}
    show("gate 8x196x384", gate)
    weight, bias = torch.ones(384), torch.zeros(384)
    norms = {
        "affine": lambda: F.layer_norm(z, (384,), weight, bias),
        "folded away": lambda: F.layer_norm(z, (384,)),
    }
    show("LayerNorm 8x196x384", norms)


def published(model: NinFormer, image: Tensor) -> Tensor:
    """The forward pass as the authors' code computes it."""
    with (
        mock.patch("zoo.ninformer_blocks.token_mix", token_mix.reference),
        mock.patch("zoo.ninformer_blocks.token_gate", token_gate.reference),
    ):
        x = model.patch_embed(image)
        for block in model.blocks:
            x = block(x)
        return model.forward_head(x)


def bench_model(name: str) -> None:
    """Inference at batch 1 and 8."""
    model = timm.create_model(name).eval()
    folded = zoo.fold(model)
    for batch in (1, 8):
        image = torch.randn(batch, *model.pretrained_cfg["input_size"])
        with torch.no_grad():
            expected = published(model, image)
            for form in (model, folded):
                torch.testing.assert_close(form(image), expected, rtol=1e-3, atol=1e-4)
            calls = (partial(published, model, image), partial(model, image), partial(folded, image))
            forms = dict(zip(("published", "zoo", "folded"), calls))
            show(f"{name}, batch {batch}", forms)


def bench_training(name: str) -> None:
    """A training step with the official dropout, by zoo's module and by torch's."""
    model = timm.create_model(name, num_classes=10, proj_drop_rate=0.5).train()
    plain = copy.deepcopy(model)
    for module in plain.modules():
        for child_name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                setattr(module, child_name, nn.Dropout(child.p))
    images, targets = torch.randn(32, *model.pretrained_cfg["input_size"]), torch.randint(10, (32,))

    def step(model: nn.Module, dtype: torch.dtype) -> None:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(images), targets)
        loss.backward()
        model.zero_grad()

    for dtype in (torch.float32, torch.bfloat16):
        forms = {"torch's dropout": partial(step, plain, dtype), "zoo's": partial(step, model, dtype)}
        show(f"{name}, training, 32, {str(dtype)[6:]}", forms, rounds=7)


if __name__ == "__main__":
    header()
    bench_operators()
    for model_name in sys.argv[1:] or ("ninformer_patch4_32", "ninformer_tiny_patch16_224"):
        bench_model(model_name)
    for model_name in ("ninformer_patch4_32", "activator_patch4_32"):
        bench_training(model_name)
