"""`token_gate` is z + u * g, with its gradients, in the promoted dtype."""

import pytest
import torch

from zoo.kernels.token_gate import reference, token_gate


@pytest.mark.parametrize("shape", [(2, 5, 3), (1, 1, 1), (0, 4, 2)])
def test_forward_and_every_gradient_equal_the_definition(shape):
    leaves = [torch.randn(*shape, dtype=torch.float64).requires_grad_() for _ in range(3)]
    out, expected = token_gate(*leaves), reference(*leaves)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)
    grad = torch.randn_like(out)
    for got, want in zip(*(torch.autograd.grad(y, leaves, grad) for y in (out, expected)), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


def test_mixed_dtypes_are_promoted_as_in_the_definition():
    z, u, g = (torch.randn(2, 3, 4, dtype=dtype) for dtype in (torch.bfloat16, torch.bfloat16, torch.float32))
    out = token_gate(z, u, g)
    assert out.dtype == reference(z, u, g).dtype == torch.float32
    torch.testing.assert_close(out, reference(z, u, g))


def test_low_precision_rounds_once():
    z, u, g = (torch.randn(64, 32) for _ in range(3))
    low = [t.bfloat16() for t in (z, u, g)]
    truth = reference(*(t.double() for t in low))
    assert ((token_gate(*low).double() - truth).abs() <= 2**-8 * truth.abs() + 1e-30).all()
