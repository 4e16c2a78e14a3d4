"""`geglu_norm` equals its definition written out, forward and backward, for every activation."""

import pytest
import torch
import torch.nn.functional as F

from zoo.kernels.geglu_norm import ACTIVATIONS, geglu_norm, reference


def draw(*shape, dtype=torch.float64):
    tensors = [torch.randn(*shape, dtype=torch.float64) for _ in range(2)]
    tensors += [
        1 + 0.1 * torch.randn(shape[-1], dtype=torch.float64),
        0.1 * torch.randn(shape[-1], dtype=torch.float64),
    ]
    return [t.to(dtype).requires_grad_() for t in tensors]


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(2, 20, 96), (1, 1, 40), (3, 200), (0, 4, 8)])
def test_forward_and_every_gradient_equal_the_definition(shape, act):
    leaves = draw(*shape)
    out, expected = (form(*leaves, eps=1e-5, act=act) for form in (geglu_norm, reference))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    grad = torch.randn_like(out)
    for got, want in zip(*(torch.autograd.grad(y, leaves, grad) for y in (out, expected)), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_the_norms_gradients_are_sums_over_both_factors():
    a, b, weight, bias = draw(5, 7, 12)
    out = geglu_norm(a, b, weight, bias)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, (weight, bias), grad)
    gate, value = (F.layer_norm(x, (12,)) for x in (F.gelu(a), b))  # without weight and bias
    p, q = grad * (value * weight + bias), grad * (gate * weight + bias)
    torch.testing.assert_close(got[0], (p * gate + q * value).sum((0, 1)))
    torch.testing.assert_close(got[1], (p + q).sum((0, 1)))


def test_the_gate_is_activated_before_its_norm_and_the_value_is_not():
    a, b, weight, bias = (t.detach() for t in draw(3, 16))
    assert not torch.allclose(geglu_norm(a, b, weight, bias), geglu_norm(b, a, weight, bias))
    assert (geglu_norm(a, b, weight, bias) / F.layer_norm(b, (16,), weight, bias)).min() < -0.17  # below GELU's bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_no_worse_than_twice_the_plain_form(dtype):
    exact = [t.detach() for t in draw(4, 9, 64)]
    low = [t.to(dtype) for t in exact]
    truth = reference(*exact)
    error, plain = ((form(*low).double() - truth).abs().max() for form in (geglu_norm, reference))
    assert error <= 2 * plain + torch.finfo(dtype).eps * truth.abs().max()


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="tanh"):
        geglu_norm(*draw(2, 4), act="tanh")


class _Gate(torch.nn.Module):
    def forward(self, a, b, weight, bias):
        return geglu_norm(a, b, weight, bias)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("form", ["script", "fx", "export", "compile"])
def test_every_capture_gives_the_same_numbers(form):
    inputs = tuple(t.detach() for t in draw(2, 9, 8))
    module = _Gate()
    captured = {
        "script": torch.jit.script,
        "fx": torch.fx.symbolic_trace,
        "export": lambda m: torch.export.export(m, inputs).module(),
        "compile": lambda m: torch.compile(m, fullgraph=True, backend="eager"),
    }[form](module)
    torch.testing.assert_close(captured(*inputs), module(*inputs), rtol=0, atol=1e-12)
