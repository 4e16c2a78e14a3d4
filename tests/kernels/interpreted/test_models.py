"""Whole models give the same outputs and gradients with Triton kernels as with plain torch."""

import pytest
import timm
import torch

import zoo
from zoo.ascan import AsCan
from zoo.crate import Crate
from zoo.fcaformer import FcaFormer
from zoo.kernels import use_backend

ASCAN = dict(stem_width=8, widths=(8, 8, 16, 16), patterns=("C", "C", "C", "CT"), head_dim=8, num_classes=5)
FCAFORMER = dict(embed_dims=(16, 16, 16, 32), depths=(1, 1, 2, 2), num_heads=(0, 0, 0, 2), num_classes=5)
MODELS = {  # model and input size; the kernels that it runs
    "crate: tied_attention": (
        lambda: Crate(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5),
        16,
    ),
    "fcaformer: attention, two segments": (lambda: FcaFormer(**FCAFORMER), 64),
    "ascan: attention, table": (lambda: AsCan(pos_bias="relative", img_size=64, **ASCAN), 64),
    "slab_deit: linear_attention": (
        lambda: timm.create_model("slab_deit_t", embed_dim=16, depth=1, num_heads=2, num_classes=5, img_size=32),
        32,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_the_same_with_either_backend(name, precise, device):
    build, size = MODELS[name]
    model = build().to(device, precise).eval()
    x = torch.randn(2, 3, size, size, dtype=precise, device=device, requires_grad=True)
    leaves = [x, *model.parameters()]
    results = []
    for backend in ("triton", "torch"):
        with use_backend(backend):
            out = model(x)
            grads = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
            results.append([out, *(g for g in grads if g is not None)])
    bar = 1e-9 if precise == torch.float64 else 1e-4
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=bar, atol=bar * max(1.0, want.abs().max().item()))


def test_a_folded_model_runs_them_too(precise, device):
    model = zoo.fold(MODELS["fcaformer: attention, two segments"][0]().to(device, precise).eval())
    x = torch.randn(1, 3, 64, 64, dtype=precise, device=device)
    with torch.no_grad():
        got = model(x)
        with use_backend("torch"):
            torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-6)
