"""The kernels of `linear_attention` against its definition."""

import pytest
import torch

from zoo.kernels.linear_attention import linear_attention, reference


def draw(*shape, dtype, device):
    return torch.randn(*shape, dtype=dtype, device=device).requires_grad_()


SIZES = [  # B, H, queries, keys, head sizes
    (2, 3, 9, 9, 8, 8),
    (1, 1, 1, 1, 24, 24),
    (1, 2, 37, 600, 12, 24),
    (1, 1, 300, 5, 96, 48),
    (1, 1, 20, 33, 128, 80),
    (0, 2, 3, 3, 8, 8),
]


@pytest.mark.parametrize(("B", "H", "queries", "keys", "dim", "value_dim"), SIZES)
def test_outputs_and_gradients_equal_the_definition(B, H, queries, keys, dim, value_dim, precise, device):
    shapes = ((queries, dim), (keys, dim), (keys, value_dim))
    leaves = [draw(B, H, n, d, dtype=precise, device=device) for n, d in shapes]
    with torch.no_grad():
        leaves[0][:, :, ::3] = -leaves[0][:, :, ::3].abs()  # queries without features
    out, expected = (form(*leaves, eps=1e-3) for form in (linear_attention, reference))
    bar = 1e-11 if precise == torch.float64 else 1e-4
    torch.testing.assert_close(out, expected, rtol=bar, atol=bar)
    weight = torch.randn_like(out)
    got, want = (torch.autograd.grad(y, leaves, weight) for y in (out, expected))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=bar, atol=bar)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_no_more_than_rounding_the_result_of_its_inputs(dtype, device):
    q, k, v = torch.randn(3, 2, 70, 2, 16, device=device).to(dtype).transpose(2, 3)
    out = linear_attention(q, k, v)
    exact = reference(q.double(), k.double(), v.double())
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= exact.abs().max() * torch.finfo(dtype).eps


def test_float16_sums_over_many_keys_do_not_overflow(device):
    q, k, v = (torch.full((1, 1, 4096, 8), 20.0, dtype=torch.float16, device=device) for _ in range(3))
    torch.testing.assert_close(linear_attention(q, k, v), v, rtol=2e-3, atol=0)


def test_opcheck(device):
    q, k, v = (draw(1, 2, 5, 8, dtype=torch.float32, device=device) for _ in range(3))
    torch.library.opcheck(torch.ops.zoo.linear_attention, (q, k, v, 1e-6), test_utils=TESTS)
    y, A, a = torch.ops.zoo.linear_attention(q, k, v, 1e-6)
    arguments = [x.detach() for x in (torch.randn_like(y), q, k, v, A, a)]
    torch.library.opcheck(torch.ops.zoo.linear_attention_backward, (*arguments, 1e-6))


# aot_dispatch would ask for the gradients of A and a too, which are kept for the backward pass only
TESTS = ("test_schema", "test_faketensor", "test_autograd_registration")
