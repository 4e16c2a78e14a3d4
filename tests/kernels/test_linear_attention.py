"""`linear_attention` equals its definition, forward and backward, in every form that torch can give it."""

import pytest
import torch
from torch import nn

from zoo.kernels.linear_attention import linear_attention, linear_attention_flops, reference


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


@pytest.mark.parametrize(
    ("queries", "keys", "dim", "value_dim"),
    [(9, 9, 4, 4), (1, 1, 1, 1), (7, 30, 5, 3), (30, 7, 12, 24), (49, 49, 96, 96)],
)
def test_forward_and_every_gradient_equal_the_definition(queries, keys, dim, value_dim):
    leaves = [draw(2, 3, queries, dim), draw(2, 3, keys, dim), draw(2, 3, keys, value_dim)]
    out, expected = linear_attention(*leaves), reference(*leaves)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(out)
    got, want = (torch.autograd.grad(y, leaves, weight) for y in (out, expected))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)


def test_second_derivatives_are_those_of_finite_differences():
    leaves = [draw(1, 1, 3, 2), draw(1, 1, 4, 2), draw(1, 1, 4, 2)]
    assert torch.autograd.gradgradcheck(lambda *qkv: linear_attention(*qkv, eps=1e-3), leaves)


def test_a_query_without_positive_features_gets_zeros_and_no_gradient():
    q, k, v = draw(1, 2, 6, 4), draw(1, 2, 6, 4), draw(1, 2, 6, 4)
    with torch.no_grad():
        q.copy_(q.abs())
        q[:, :, ::2] *= -1
    out = linear_attention(q, k, v)
    out.square().sum().backward()
    assert out[:, :, ::2].abs().max() == 0
    assert q.grad[:, :, ::2].abs().max() == 0
    assert out[:, :, 1::2].abs().min() > 0


def test_strided_heads_of_one_projection_give_the_same_as_contiguous_ones():
    q, k, v = torch.randn(3, 10, 3, 2, 8, dtype=torch.float64).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(
        linear_attention(q, k, v), linear_attention(q.contiguous(), k.contiguous(), v.contiguous()), rtol=0, atol=1e-14
    )


def test_an_empty_batch_gives_an_empty_result():
    q = torch.randn(0, 2, 5, 4)
    assert linear_attention(q, q, q).shape == (0, 2, 5, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_no_more_than_rounding_the_result_of_its_inputs(dtype):
    q, k, v = (torch.randn(2, 2, 400, 16).to(dtype) for _ in range(3))
    out = linear_attention(q, k, v)
    exact = reference(q.double(), k.double(), v.double())
    assert out.dtype == dtype
    bar = exact.abs().max() * torch.finfo(dtype).eps
    assert (out.double() - exact).abs().max() <= bar


@pytest.mark.parametrize("autocast", [False, True])
def test_float16_sums_over_many_keys_do_not_overflow(autocast):
    q, k, v = (torch.full((1, 1, 4096, 8), 20.0, dtype=torch.float16) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
        out = linear_attention(q, k, v)
    torch.testing.assert_close(out, v, rtol=2e-3, atol=0)


class Layer(nn.Module):
    def forward(self, qkv):
        q, k, v = qkv.unbind(0)
        return linear_attention(q, k, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["script", "fx", "export", "compile"])
def test_scripted_traced_exported_and_compiled_forms_give_the_same(how, dtype):
    qkv = torch.randn(3, 2, 2, 11, 4).to(dtype)
    layer = Layer()
    made = {
        "script": lambda: torch.jit.script(layer),
        "fx": lambda: torch.fx.symbolic_trace(layer),
        "export": lambda: torch.export.export(layer, (qkv,)).module(),
        "compile": lambda: torch.compile(layer, backend="eager", fullgraph=True),
    }[how]()
    torch.testing.assert_close(made(qkv), layer(qkv), rtol=0, atol=0)


def test_it_runs_on_the_meta_device_in_every_type():
    for dtype in (torch.float32, torch.bfloat16):
        q = torch.empty(2, 3, 7, 4, device="meta", dtype=dtype)
        assert linear_attention(q, q, q).shape == (2, 3, 7, 4)


def test_cost_grows_linearly_with_the_tokens():
    assert linear_attention_flops(1, 1, 200, 200, 8, 8) == 2 * linear_attention_flops(1, 1, 100, 100, 8, 8)
