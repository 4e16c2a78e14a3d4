"""`token_mix` equals the papers' transposed form, forward and backward, at any shape and in any capture."""

import pytest
import torch

from zoo.kernels.token_mix import reference, token_linear, token_mix


def draw(batch, n, d, f, m=None, dtype=torch.float64):
    m = n if m is None else m
    shapes = [(batch, n, d), (f, n), (f,), (m, f), (m,)]
    return [torch.randn(*s, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize(
    ("batch", "n", "d", "f", "m"), [(2, 49, 40, 72, 49), (1, 1, 1, 1, 1), (3, 7, 5, 11, 13), (0, 4, 3, 5, 4)]
)
def test_forward_and_every_gradient_equal_the_definition(batch, n, d, f, m):
    leaves = draw(batch, n, d, f, m)
    out, expected = token_mix(*leaves), reference(*leaves)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    grad = torch.randn_like(out)
    for got, want in zip(*(torch.autograd.grad(y, leaves, grad) for y in (out, expected)), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_tokens_that_are_a_view_of_a_map_need_no_copy():
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64).flatten(2).transpose(1, 2)
    _, *weights = draw(2, 12, 6, 5)
    torch.testing.assert_close(token_mix(x, *weights), reference(x, *weights), rtol=0, atol=1e-12)


def test_each_bias_belongs_to_a_row_of_its_product():
    x = torch.zeros(1, 3, 2)
    bias = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert torch.equal(token_linear(x, torch.ones(4, 3), bias), bias[None, :, None].expand(1, 4, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_no_worse_than_twice_the_plain_form(dtype):
    exact = [t.detach() for t in draw(2, 16, 12, 24)]
    low = [t.to(dtype) for t in exact]
    truth = reference(*exact)
    error, plain = ((form(*low).double() - truth).abs().max() for form in (token_mix, reference))
    assert error <= 2 * plain + torch.finfo(dtype).eps * truth.abs().max()


class _Mix(torch.nn.Module):
    def forward(self, x, w1, b1, w2, b2):
        return token_mix(x, w1, b1, w2, b2)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("form", ["script", "fx", "export", "compile"])
def test_every_capture_gives_the_same_numbers(form):
    inputs = tuple(t.detach() for t in draw(2, 9, 8, 10))
    module = _Mix()
    captured = {
        "script": torch.jit.script,
        "fx": torch.fx.symbolic_trace,
        "export": lambda m: torch.export.export(m, inputs).module(),
        "compile": lambda m: torch.compile(m, fullgraph=True, backend="eager"),
    }[form](module)
    torch.testing.assert_close(captured(*inputs), module(*inputs), rtol=0, atol=1e-12)
