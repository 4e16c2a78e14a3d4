"""Dropout by random bits: what is dropped, what is scaled, and where PyTorch's own runs."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import zoo  # noqa: F401  (registers)
from zoo.dropout import Dropout, dropout, replace_dropout


@pytest.mark.parametrize("p", [0.5, 0.1, 0.9, 1 / 3])
def test_the_share_is_p_and_the_mean_stays(p):
    torch.manual_seed(0)
    x = torch.ones(1001, 997)
    y = dropout(x, p)
    kept = y != 0
    error = math.sqrt(p * (1 - p) / x.numel())
    assert abs(float((~kept).float().mean()) - p) < 5 * error
    assert abs(float(y.mean()) - 1) < 5 * error / (1 - p)
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)), rtol=2e-4 / (1 - p), atol=0)


def test_elements_are_dropped_independently():
    torch.manual_seed(0)
    kept = (dropout(torch.ones(1 << 20), 0.5) != 0).float() - 0.5
    for distance in (1, 2, 3, 4, 5, 8, 64, 256):  # four elements share a draw
        product = (kept[distance:] * kept[:-distance]).mean() * 4
        assert abs(float(product)) < 5 / math.sqrt(kept.numel()), distance


def test_the_seed_decides():
    x = torch.randn(7, 33)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(dropout(x, 0.4))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 0, 2), (2, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_follow_what_was_kept(shape, dtype):
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    y = dropout(x, 0.5)
    assert y.dtype == dtype
    assert y.shape == x.shape
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, y)


def test_layouts_other_than_contiguous():
    x = torch.ones(4, 6, 5).transpose(0, 2).requires_grad_()
    y = dropout(x, 0.5)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)


def test_the_ends_of_the_range_and_beyond():
    x = torch.randn(50)
    assert torch.equal(dropout(x, 0.0), x)
    assert torch.equal(dropout(x, 1.0), torch.zeros(50))
    assert dropout(x, 1 - 1e-9).isfinite().all()
    with pytest.raises(ValueError, match="probability"):
        dropout(x, 1.5)


def test_the_module_is_silent_in_evaluation_and_without_a_rate():
    x = torch.randn(50)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x
    y = x.clone()
    assert Dropout(0.5, inplace=True)(y) is y


def test_gradient_checkpoints_see_the_same_mask():
    x = torch.ones(100, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(Dropout(0.5), x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)


def test_scripted_and_traced_models_have_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5))
    replace_dropout(model)
    assert type(model[1]) is Dropout
    for form in (torch.jit.script(model), torch.fx.symbolic_trace(model)):
        share = float((form(torch.ones(50, 4)) == 0).float().mean())
        assert 0.4 < share < 0.6


def test_compiled_models_use_torch_own():
    seen = []

    def backend(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.compile(Dropout(0.5), backend=backend, fullgraph=True)(torch.ones(8))
    assert F.dropout in seen or torch.dropout in seen, seen


@pytest.mark.parametrize("name", ["ninformer_patch4_32", "activator_geglu_patch4_32", "activator_tiny_patch16_224"])
def test_models_whose_settings_drop_half_have_no_other(name):
    model = timm.create_model(name, proj_drop_rate=0.5, drop_rate=0.1)
    kinds = {type(m) for m in model.modules() if isinstance(m, nn.Dropout)}
    assert kinds == {Dropout}
