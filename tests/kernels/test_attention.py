"""`attention` equals its definition, forward and backward, whatever segments, biases and masks it gets."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from zoo.kernels.attention import (
    attention,
    attention_logits,
    mirror_offsets,
    reference,
    relative_bias,
    resize_relative_table,
    sum_over_offsets,
)

B, H, N, M, M2, D = 2, 3, 7, 7, 4, 8


def draw(*shape, dtype=torch.float64, grad=True):
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def arguments(bias, key_bias, masked, second, dtype=torch.float64, grad=True):
    args = {}
    if bias:
        args["bias"] = draw(*bias, dtype=dtype, grad=grad)
    if key_bias:
        args["key_bias"] = draw(*key_bias, dtype=dtype, grad=grad)
    if masked:
        mask = torch.rand(N, M) > 0.4
        mask[0] = False  # a query that sees no key of the first segment
        args["mask"] = mask
    if second:
        args |= {name: draw(B, H, M2, D, dtype=dtype, grad=grad) for name in ("k2", "v2")}
        if second == "biased":
            args["key_bias2"] = draw(H, M2, dtype=dtype, grad=grad)
    return args


@pytest.mark.parametrize("second", [None, "plain", "biased"])
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("key_bias", [None, (H, M)])
@pytest.mark.parametrize("bias", [None, (H, N, M), (B, 1, N, M)])
def test_forward_and_every_gradient_equal_the_definition(bias, key_bias, masked, second):
    qkv = [draw(B, H, n, D) for n in (N, M, M)]
    args = arguments(bias, key_bias, masked, second)
    leaves = [*qkv, *(t for t in args.values() if t.requires_grad)]
    out, expected = attention(*qkv, **args), reference(*qkv, **args)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    weight = torch.randn_like(out)
    got, want = (torch.autograd.grad(y, leaves, weight) for y in (out, expected))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_no_worse_than_twice_the_plain_form(dtype):
    args = arguments((H, N, M), None, False, "biased", grad=False)
    qkv = [draw(B, H, n, D, grad=False) for n in (N, M, M)]
    exact = reference(*qkv, **args)
    low = [t.to(dtype) for t in qkv], {k: t.to(dtype) for k, t in args.items()}
    error = (attention(*low[0], **low[1]).double() - exact).abs().max()
    plain = (reference(*low[0], **low[1]).double() - exact).abs().max()
    assert error <= 2 * plain + torch.finfo(dtype).eps


def test_a_query_without_any_key_gets_zeros():
    qkv = [draw(1, 1, n, D) for n in (2, 3, 3)]
    mask = torch.tensor([[True, False, True], [False, False, False]])
    for form in (attention, reference):
        out = form(*qkv, mask=mask)
        assert out[0, 0, 1].eq(0).all()
        out.sum().backward()
        assert all(t.grad.isfinite().all() for t in qkv)


@pytest.mark.parametrize(("n", "m", "d", "batch"), [(1, 1, 1, 1), (63, 65, 12, 1), (5, 3, 32, 0)])
def test_odd_shapes_and_views_without_contiguous_heads(n, m, d, batch):
    q = torch.randn(batch, n, H, d, dtype=torch.float64).transpose(1, 2)
    k, v = torch.randn(batch, m, 2, H, d, dtype=torch.float64).permute(2, 0, 3, 1, 4).unbind(0)
    torch.testing.assert_close(attention(q, k, v), reference(q, k, v), rtol=0, atol=1e-12)


def test_logits_normalise_to_the_same_output():
    qkv = [draw(B, H, n, D) for n in (N, M, M)]
    args = arguments((H, N, M), (H, M), True, "biased")
    v2 = args.pop("v2")
    logits = attention_logits(*qkv[:2], **args)
    weights = (logits - logits.logsumexp(-1, keepdim=True)).exp()
    out = weights @ torch.cat([qkv[2], v2], dim=2)
    torch.testing.assert_close(out, attention(*qkv, **args, v2=v2), rtol=0, atol=1e-12)


def test_one_half_of_the_second_segment_is_refused():
    q = draw(1, 1, 2, 4)
    with pytest.raises(ValueError, match="both or neither"):
        attention(q, q, q, k2=q)


class _Attend(torch.nn.Module):
    def forward(self, q, k, v, bias, k2, v2, key_bias2):
        return attention(q, k, v, bias=bias, k2=k2, v2=v2, key_bias2=key_bias2)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("form", ["script", "fx", "export", "compile"])
def test_every_capture_gives_the_same_numbers(form):
    args = arguments((H, N, M), None, False, "biased", grad=False)
    inputs = (*(draw(B, H, n, D, grad=False) for n in (N, M, M)), *args.values())
    module = _Attend()
    captured = {
        "script": torch.jit.script,
        "fx": torch.fx.symbolic_trace,
        "export": lambda m: torch.export.export(m, inputs).module(),
        "compile": lambda m: torch.compile(m, fullgraph=True, backend="eager"),
    }[form](module)
    torch.testing.assert_close(captured(*inputs), module(*inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(3, 4), (1, 5), (1, 1)])
def test_relative_bias_looks_up_signed_and_absolute_offsets(size):
    h, w = size
    signed = draw(2, 2 * h - 1, 2 * w - 1)
    absolute = draw(2, h, w)
    dense, mirrored = relative_bias(signed), relative_bias(mirror_offsets(absolute))
    for (r, c), (r2, c2) in itertools.product(itertools.product(range(h), range(w)), repeat=2):
        p, p2 = r * w + c, r2 * w + c2
        assert torch.equal(dense[:, p, p2], signed[:, r - r2 + h - 1, c - c2 + w - 1])
        assert torch.equal(mirrored[:, p, p2], absolute[:, abs(r - r2), abs(c - c2)])


def test_resized_tables_keep_offset_zero_and_symmetry():
    table = mirror_offsets(draw(2, 7, 7, grad=False))
    resized = resize_relative_table(table, 10, 4)
    assert resized.shape == (2, 19, 7)
    torch.testing.assert_close(resized, resized.flip(1, 2))
    same_width = resize_relative_table(table, 7, 7)
    torch.testing.assert_close(same_width, table, rtol=0, atol=1e-12)
    ramp = torch.linspace(-1, 1, 13, dtype=torch.float64).abs().expand(1, 13, 13).contiguous()
    assert resize_relative_table(ramp, 14, 14)[0, 13].argmin() == 13  # the column of offset zero


def test_it_is_torchs_kernel_when_there_is_nothing_to_add():
    q, k, v = (draw(B, H, n, D, grad=False) for n in (N, M, M))
    assert torch.equal(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_a_table_is_its_dense_bias():
    q, k, v = (draw(B, H, 12, D) for _ in range(3))
    table = draw(H, 5, 7)
    dense = draw(H, 12, 12)
    for form in (attention, reference):
        out = form(q, k, v, bias=dense, table=table)
        torch.testing.assert_close(out, form(q, k, v, bias=dense + relative_bias(table)), rtol=0, atol=1e-14)


def test_windows_take_turns_over_the_images():
    q, k, v = (draw(4, H, n, D) for n in (N, M, M))
    windows = {"bias": draw(2, H, N, M), "key_bias": draw(2, H, M), "mask": torch.rand(2, 1, N, M) > 0.3}
    repeated = {name: x.repeat(2, *[1] * (x.dim() - 1)) for name, x in windows.items()}
    for form in (attention, reference):
        torch.testing.assert_close(form(q, k, v, **windows), form(q, k, v, **repeated), rtol=0, atol=1e-14)


def test_sums_over_offsets_are_the_gradient_of_the_dense_bias():
    for h, w in ((3, 4), (1, 5), (1, 1)):
        table, grad = draw(2, 2 * h - 1, 2 * w - 1), torch.randn(2, h * w, h * w, dtype=torch.float64)
        (expected,) = torch.autograd.grad(relative_bias(table), table, grad)
        torch.testing.assert_close(sum_over_offsets(grad, table), expected, rtol=0, atol=1e-13)
