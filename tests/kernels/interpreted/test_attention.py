"""The kernels of `attention` against its definition: every addend and segment, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.kernels import use_backend
from zoo.kernels.attention import attention, reference


def draw(*shape, dtype, device):
    return torch.randn(*shape, dtype=dtype, device=device).requires_grad_()


def compare(B, H, N, M, D, DV=None, *, dtype, device, scale=None, **shapes):
    """Outputs and every gradient of the kernels equal the definition's."""
    qkv = [draw(B, H, n, d, dtype=dtype, device=device) for n, d in ((N, D), (M, D), (M, DV or D))]
    args = {name: draw(*shape, dtype=dtype, device=device) for name, shape in shapes.items() if name != "mask"}
    leaves = [*qkv, *args.values()]
    if "mask" in shapes:
        args["mask"] = torch.rand(*shapes["mask"], device=device) > 0.4
        args["mask"][..., 0, :] = False  # a query without a key
    with use_backend("triton"):
        out = attention(*qkv, scale=scale, **args)
        weight = torch.randn_like(out)
        got = torch.autograd.grad(out, leaves, weight)
    expected = reference(*qkv, scale=scale, **args)
    want = torch.autograd.grad(expected, leaves, weight)
    bar = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(out, expected, rtol=0, atol=bar)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=bar, atol=10 * bar)


@pytest.mark.parametrize(
    ("sizes", "addends"),
    [
        ((2, 3, 7, 9, 8), {}),
        ((1, 2, 130, 33, 16), {}),
        ((1, 1, 1, 1, 80), {}),
        ((2, 2, 12, 12, 24, 40), {"bias": (2, 12, 12), "table": (2, 5, 7)}),
        ((2, 3, 9, 9, 32), {"table": (3, 5, 5), "k2": (2, 3, 4, 32), "v2": (2, 3, 4, 32), "key_bias2": (3, 4)}),
        ((2, 2, 5, 7, 48), {"key_bias": (2, 7), "mask": (5, 7)}),
        ((2, 2, 5, 7, 96), {"bias": (2, 1, 5, 7)}),
        ((1, 1, 5, 7, 128), {"bias": (1, 7), "key_bias": (7,)}),
        ((4, 3, 6, 6, 8), {"bias": (2, 3, 6, 6), "mask": (2, 1, 6, 6), "key_bias": (2, 1, 6)}),
        ((0, 2, 3, 3, 8), {"bias": (2, 3, 3)}),
    ],
    ids=lambda value: "-".join(map(str, value)),
)
def test_outputs_and_gradients_equal_the_definition(sizes, addends, precise, device):
    compare(*sizes, dtype=precise, device=device, **addends)


@given(
    n=st.integers(1, 40),
    m=st.integers(1, 40),
    m2=st.integers(0, 20),
    d=st.sampled_from([8, 20, 24, 32, 64]),
    scale=st.sampled_from([None, 0.3]),
    biased=st.booleans(),
)
@settings(max_examples=5, deadline=None)
def test_any_sizes(n, m, m2, d, scale, biased):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if device == "cuda" else torch.float64
    second = {"k2": (1, 2, m2, d), "v2": (1, 2, m2, d)} if m2 else {}
    compare(1, 2, n, m, d, dtype=dtype, device=device, scale=scale, **second, **({"bias": (n, m)} if biased else {}))


def test_strided_heads_and_transposed_values(precise, device):
    q, k, v = torch.randn(2, 11, 3, 2, 16, dtype=precise, device=device).permute(2, 0, 3, 1, 4)
    swapped = v.transpose(-2, -1).contiguous().transpose(-2, -1)
    bar = 1e-12 if precise == torch.float64 else 1e-5
    torch.testing.assert_close(attention(q, k, swapped), reference(q, k, v), rtol=0, atol=bar)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_no_worse_than_twice_the_plain_form(dtype, device):
    qkv = [torch.randn(1, 2, 20, 24, device=device).to(dtype).requires_grad_() for _ in range(3)]
    bias = torch.randn(2, 20, 20, device=device).to(dtype).requires_grad_()
    weight = torch.randn(1, 2, 20, 24, device=device).to(dtype)
    leaves = [*qkv, bias]

    def results(form, wide):
        inputs = [x.detach().double().requires_grad_() for x in leaves] if wide else leaves
        out = form(*inputs[:3], bias=inputs[3])
        return [out, *torch.autograd.grad(out, inputs, weight.to(out.dtype))]

    for got, plain, exact in zip(results(attention, False), results(reference, False), results(reference, True)):
        assert got.dtype == dtype
        error, bar = ((x.double() - exact).abs().max() for x in (got, plain))
        assert error <= 2 * bar + torch.finfo(dtype).eps * exact.abs().max()


def test_gradients_are_the_same_in_every_run(device):
    q, k, v = (draw(2, 2, 40, 16, dtype=torch.float32, device=device) for _ in range(3))
    table = draw(2, 9, 15, dtype=torch.float32, device=device)
    first, second = (
        torch.autograd.grad(attention(q, k, v, table=table).square().sum(), [q, k, v, table]) for _ in "ab"
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_opcheck(device):
    q, k, v = (draw(1, 1, 4, 8, dtype=torch.float32, device=device) for _ in range(3))
    table = draw(1, 3, 3, dtype=torch.float32, device=device)
    torch.library.opcheck(torch.ops.zoo.attention, (q, k, v, None, None, None, None, None, None, None, table))
    out, lse = torch.ops.zoo.attention(q, k, v, None, None, None, 0.5, None, None, None, None)
    arguments = [x.detach() for x in (torch.randn_like(out), q, k, v)]
    needed = [True, False, True, *[False] * 6]
    torch.library.opcheck(
        torch.ops.zoo.attention_backward,
        (*arguments, None, None, None, 0.5, None, None, None, None, out.detach(), lse.detach(), needed),
        test_utils=("test_schema", "test_faketensor"),
    )


class _Attend(torch.nn.Module):
    def forward(self, q, k, v, bias):
        return attention(q, k, v, bias=bias)


@pytest.mark.parametrize("form", ["fx", "export", "compile"])
def test_captured_forms_hold_the_operator(form, device):
    inputs = [torch.randn(1, 2, 6, 8, device=device) for _ in range(3)] + [torch.randn(2, 6, 6, device=device)]
    module = _Attend()
    captured = {
        "fx": torch.fx.symbolic_trace,
        "export": lambda m: torch.export.export(m, tuple(inputs)).module(),
        "compile": lambda m: torch.compile(m, fullgraph=True, backend="aot_eager"),
    }[form](module)
    assert torch.equal(captured(*inputs), module(*inputs))


def test_autocast_computes_in_its_type(device):
    q, k, v = (torch.randn(1, 2, 6, 8, device=device) for _ in range(3))
    with torch.autocast(device, dtype=torch.bfloat16):
        assert attention(q, k, v).dtype == torch.bfloat16


def test_what_does_not_fit_is_refused(device):
    q = torch.randn(3, 2, 6, 136, device=device)
    with pytest.raises(ValueError, match="head size of 136"):
        attention(q, q, q)
    q = q[..., :8]
    with pytest.raises(ValueError, match="2 windows"):
        attention(q, q, q, bias=torch.zeros(2, 1, 6, 6, device=device))
    with pytest.raises(ValueError, match="map of 2 x 2"):
        attention(q, q, q, table=torch.zeros(2, 3, 3, device=device))
