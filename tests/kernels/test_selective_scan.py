"""The selective scan equals its definition in float64, forward and backward, wherever chunks and segments end."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.kernels import scan_steps
from zoo.kernels.selective_scan import reference, selective_scan


def arguments(b, d, groups, states, length, seed=0, dtype=torch.float64, **given):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = {
        "u": normal(b, d, length),
        "dt": normal(b, d, length),
        "A": -normal(d, states).exp(),
        "B": normal(b, groups, states, length),
        "C": normal(b, groups, states, length),
        "D": normal(d),
        "z": normal(b, d, length),
        "dt_bias": normal(d),
    }
    return tensors | given


def gradients(function, tensors, **options):
    leaves = {n: t.detach().requires_grad_() for n, t in tensors.items() if t is not None}
    y, last = function(**leaves, return_last_state=True, **options)
    generator = torch.Generator().manual_seed(9)
    loss = sum(
        (t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)).sum() for t in (y, last)
    )
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"y": y, "last": last} | {f"d_{n}": g for n, g in zip(leaves, grads)}


def assert_equal(tensors, **options):
    expected = gradients(reference, tensors, **options)
    for name, value in gradients(selective_scan, tensors, **options).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("length", [1, 2, 63, 127, 128, 129, 257])
def test_output_and_gradients_equal_the_definition(length):
    assert_equal(arguments(2, 6, 3, 4, length), softplus=True)


@pytest.mark.parametrize("chunk", [1, 3, 5])  # below 4 the state is updated in place
@pytest.mark.parametrize("length", [7, 8, 9, 16, 25])
def test_segments_and_chunks_of_a_few_steps_change_nothing(length, chunk, monkeypatch):
    monkeypatch.setattr(scan_steps, "FEWEST_STEPS", 4)
    monkeypatch.setattr(scan_steps, "SEGMENT_ELEMENTS", 1)  # the shortest segments, 8 steps
    monkeypatch.setattr(scan_steps, "CHUNK_ELEMENTS", chunk * 4 * 5)
    assert scan_steps.num_segments(length, 20) == -(-length // 8)
    assert_equal(arguments(2, 4, 2, 5, length), softplus=True)


@pytest.mark.parametrize("absent", ["D", "z", "dt_bias"])
def test_each_optional_part_may_be_absent(absent):
    assert_equal(arguments(1, 4, 1, 3, 20, **{absent: None}), softplus=True)


def test_step_sizes_are_taken_as_they_are_without_softplus():
    tensors = arguments(1, 4, 2, 3, 20, dt_bias=None)
    assert_equal(tensors | {"dt": tensors["dt"].abs()})


@given(
    b=st.integers(0, 3),
    rows=st.integers(1, 4),
    groups=st.integers(1, 3),
    states=st.integers(1, 17),
    length=st.integers(1, 40),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_any_shape_equals_the_definition(b, rows, groups, states, length, seed):
    assert_equal(arguments(b, rows * groups, groups, states, length, seed), softplus=True)


def test_non_contiguous_tensors_and_one_group_without_its_axis():
    tensors = arguments(2, 6, 1, 4, 30)
    expected = selective_scan(**tensors, softplus=True)
    strided = {n: t.transpose(0, -1).contiguous().transpose(0, -1) for n, t in tensors.items()}
    strided |= {n: strided[n][:, 0] for n in ("B", "C")}
    torch.testing.assert_close(selective_scan(**strided, softplus=True), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decays_that_underflow_stay_finite_and_low_precision_is_computed_in_float32(dtype):
    tensors = arguments(1, 4, 1, 8, 50, dtype=dtype)
    tensors["dt"] = tensors["dt"] * 60
    low, last = selective_scan(**tensors, softplus=True, return_last_state=True)
    exact = reference(**{n: t.double() for n, t in tensors.items()}, softplus=True)
    assert low.dtype == dtype
    assert last.dtype == torch.float32
    bar = 1e-5 if dtype is torch.float32 else 1e-2
    assert (low.double() - exact).abs().max() <= bar * exact.abs().max()


def test_autograd_keeps_less_than_a_tenth_of_the_states():
    tensors = {n: t.requires_grad_() for n, t in arguments(1, 64, 1, 16, 2000, dtype=torch.float32).items()}
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        selective_scan(**tensors, softplus=True)
    states = 64 * 16 * 2000 * 4
    assert sum(kept.values()) < states
    assert max(kept.values()) < states / 10


def test_operator_passes_torchs_checks():
    b, d, groups, states, length = 1, 4, 2, 3, 10
    t = arguments(b, d, groups, states, length)
    given = [t["u"], t["dt"].abs(), t["A"], t["B"], t["C"]]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.zoo.selective_scan, [g.requires_grad_() for g in given], test_utils=tests)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("dt", (1, 4, 9), "dt has shape"), ("A", (3, 3), "for the 4 channels"), ("C", (1, 2, 5, 10), "B and C")],
)
def test_shapes_that_do_not_fit_raise_one_sentence(name, shape, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**arguments(1, 4, 2, 3, 10, **{name: torch.zeros(shape)}))
