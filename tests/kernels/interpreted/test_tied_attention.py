"""The kernels of `tied_attention` against its definition."""

import pytest
import torch

from zoo.kernels.tied_attention import reference, tied_attention


def gradient(function, w, grad, scale):
    leaf = w.detach().requires_grad_()
    return torch.autograd.grad(function(leaf, scale), leaf, grad)[0]


@pytest.mark.parametrize(
    "shape", [(2, 3, 70, 64), (1, 2, 33, 48), (1, 1, 1, 8), (1, 1, 17, 128), (0, 2, 3, 16), (1, 1, 40, 5)]
)
def test_output_and_gradient_equal_the_definition(shape, precise, device):
    w, grad = torch.randn(2, *shape, dtype=precise, device=device)
    w = w.transpose(1, 2).contiguous().transpose(1, 2)  # heads beside each other, as a projection leaves them
    bar = 1e-12 if precise == torch.float64 else 1e-5
    for scale in (None, 0.3):
        torch.testing.assert_close(tied_attention(w, scale), reference(w, scale), rtol=0, atol=bar)
        got, want = (gradient(form, w, grad, scale) for form in (tied_attention, reference))
        torch.testing.assert_close(got, want, rtol=0, atol=10 * bar)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_no_worse_than_twice_the_plain_form(dtype, device):
    w, grad = torch.randn(2, 1, 2, 20, 24, device=device).to(dtype)
    # the interpreter cuts bfloat16 off instead of rounding, always towards zero
    factor = 5 if dtype == torch.bfloat16 and device == "cpu" else 2
    for form in (lambda f, x, g: f(x, None), lambda f, x, g: gradient(f, x, g, None)):
        exact = form(reference, w.double(), grad.double())
        got, plain = (form(f, w, grad) for f in (tied_attention, reference))
        assert got.dtype == dtype
        error, bar = ((x.double() - exact).abs().max() for x in (got, plain))
        assert error <= factor * bar + torch.finfo(dtype).eps * exact.abs().max()


def test_gradients_are_the_same_in_every_run(device):
    w, grad = torch.randn(2, 1, 2, 40, 16, device=device)
    assert torch.equal(*(gradient(tied_attention, w, grad, None) for _ in range(2)))


def test_opcheck(device):
    w = torch.randn(1, 2, 5, 8, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.zoo.tied_attention, (w, None))
