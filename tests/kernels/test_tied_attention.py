"""Tied attention equals its definition, forward and backward, for the shapes that models and edges have."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.kernels.tied_attention import reference, tied_attention

SHAPES = [(2, 6, 197, 64), (1, 12, 50, 48), (1, 6, 65, 128), (3, 2, 1, 8), (1, 1, 2, 5), (0, 3, 7, 16)]


def gradient(function, w, grad, scale=None):
    leaf = w.detach().requires_grad_()
    return torch.autograd.grad(function(leaf, scale), leaf, grad)[0]


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradient_equal_the_definition_in_float64(shape, scale):
    w, grad = torch.randn(2, *shape, dtype=torch.float64)
    torch.testing.assert_close(tied_attention(w, scale), reference(w, scale), rtol=0, atol=1e-12)
    expected = gradient(reference, w, grad, scale)
    torch.testing.assert_close(gradient(tied_attention, w, grad, scale), expected, rtol=0, atol=1e-11)


@given(b=st.integers(1, 3), h=st.integers(1, 3), n=st.integers(1, 40), d=st.integers(1, 33), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_any_shape_and_layout_equals_the_definition(b, h, n, d, seed):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(b, n, h, d, dtype=torch.float64, generator=generator).transpose(1, 2)
    grad = torch.randn(b, h, n, d, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(tied_attention(w), reference(w), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient(tied_attention, w, grad), gradient(reference, w, grad), rtol=0, atol=1e-11)


def test_gradient_is_the_published_formula():
    w, grad = torch.randn(2, 2, 3, 11, 8, dtype=torch.float64)
    scale = 8**-0.5
    p = torch.softmax(scale * w @ w.mT, dim=-1)
    ds = p * (grad @ w.mT - (grad * (p @ w)).sum(-1, keepdim=True))
    expected = p.mT @ grad + scale * (ds + ds.mT) @ w
    torch.testing.assert_close(gradient(tied_attention, w, grad), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_low_precision_stays_near_the_float64_definition(dtype, bar):
    w = torch.randn(2, 3, 70, 48).to(dtype)
    error = (tied_attention(w).double() - reference(w.double())).abs().max()
    assert tied_attention(w).dtype == dtype
    assert error <= bar * reference(w.double()).abs().max()


def test_second_order_gradients_of_the_definition_exist():
    w = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(reference, (w,))
