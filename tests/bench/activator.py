"""Activator on CPU, one thread: formulations of its gate, and the inference form of its models, side by side.

    python -m tests.bench.activator [model ...]      # the 32 px models and activator_geglu_tiny_patch16_224 by default

"published" lets the tokens keep the layout of the convolution's output, "folded" is `zoo.fold`. Outputs are
compared first; times are those of the thread, as in tests/bench/ninformer.py.
"""

from __future__ import annotations

import sys
from functools import partial

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from tests.bench.ninformer import header, show, training
from zoo.activator import Activator, GatingUnit
from zoo.kernels.geglu_norm import geglu_norm, reference


def _stacked(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    both = F.layer_norm(torch.stack((F.gelu(a), b)), weight.shape, weight, bias)
    return both[0] * both[1]


def _affine_last(a: Tensor, b: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    gate, value = (F.layer_norm(x, weight.shape) for x in (F.gelu(a), b))
    return torch.addcmul(bias, gate, weight) * torch.addcmul(bias, value, weight)


def bench_operators() -> None:
    """The gate in four formulations, and the unit with one or two projections."""
    forms = {"geglu_norm": geglu_norm, "stacked": _stacked, "affine last": _affine_last, "written out": reference}
    for rows, f in [(64, 512), (2048, 512), (1568, 768)]:
        leaves = [torch.randn(rows, f), torch.randn(rows, f), torch.randn(f), torch.randn(f)]
        leaves = [t.requires_grad_() for t in leaves]
        for form in forms.values():
            torch.testing.assert_close(form(*leaves), reference(*leaves), rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            show(f"gate {rows}x{f}", {name: partial(form, *leaves) for name, form in forms.items()})
        show(f"  with gradients {rows}x{f}", {n: training(form, leaves) for n, form in forms.items()}, rounds=7)
    for batch, n, d, f in [(1, 64, 256, 512), (32, 64, 256, 512), (4, 196, 384, 1536)]:
        unit = GatingUnit(d, f).eval()
        x = torch.randn(batch, n, d)
        weight = torch.cat((unit.fc1_g.weight, unit.fc1_x.weight)).detach()
        bias = torch.cat((unit.fc1_g.bias, unit.fc1_x.bias)).detach()

        def merged(unit=unit, x=x, weight=weight, bias=bias) -> Tensor:
            gate, value = F.linear(x, weight, bias).chunk(2, dim=-1)
            return unit.fc2(geglu_norm(gate, value, unit.norm.weight, unit.norm.bias))

        with torch.no_grad():
            torch.testing.assert_close(merged(), unit(x), rtol=1e-4, atol=1e-5)
            forms = {"two projections": lambda unit=unit, x=x: unit(x), "merged": merged}
            show(f"unit {batch}x{n}x{d}, f {f}", forms)


def published(model: Activator, image: Tensor) -> Tensor:
    """The forward pass as the authors' code computes it."""
    return model.forward_head(model.blocks(model.patch_embed(image)))


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


if __name__ == "__main__":
    header()
    bench_operators()
    names = ("activator_patch4_32", "activator_geglu_patch4_32", "activator_geglu_tiny_patch16_224")
    for model_name in sys.argv[1:] or names:
        bench_model(model_name)
