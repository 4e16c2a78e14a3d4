"""The four-direction scan equals its definition in float64, forward and backward, for any map."""

import pytest
import torch

from zoo.kernels import scan_steps
from zoo.kernels.scan2d import MODES, cross_merge, cross_scan, reference, scan2d, scan_orders

NAMES = ("x", "proj_weight", "dt_weight", "dt_bias", "A", "D")


def arguments(h, w, batch=2, dim=6, rank=2, states=4, dtype=torch.float64):
    weights = [
        torch.randn(4, rank + 2 * states, dim) / dim**0.5,
        torch.randn(4, dim, rank),
        torch.randn(4, dim),
        -torch.randn(4 * dim, states).exp(),
        torch.randn(4 * dim),
    ]
    return [t.to(dtype) for t in (torch.randn(batch, h, w, dim), *weights)]


def gradients(function, tensors, mode="cross"):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves, mode)
    generator = torch.Generator().manual_seed(9)
    grad = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    return {"y": y} | dict(zip(NAMES, torch.autograd.grad(y, leaves, grad)))


def assert_equal(tensors, mode="cross"):
    expected = gradients(reference, tensors, mode)
    for name, value in gradients(scan2d, tensors, mode).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (3, 5), (12, 11)])
def test_output_and_gradients_equal_the_definition(size):
    assert_equal(arguments(*size))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_equals_its_definition(mode):
    assert_equal(arguments(4, 3), mode)


@pytest.mark.parametrize("chunk", [1, 3, 5])  # below 4 the state is updated in place
@pytest.mark.parametrize("size", [(2, 4), (3, 3), (5, 5)])
def test_segments_and_chunks_of_a_few_steps_change_nothing(size, chunk, monkeypatch):
    monkeypatch.setattr(scan_steps, "FEWEST_STEPS", 4)
    monkeypatch.setattr(scan_steps, "SEGMENT_ELEMENTS", 1)
    monkeypatch.setattr(scan_steps, "CHUNK_ELEMENTS", chunk * 4 * 6 * 4)
    assert_equal(arguments(*size))


def test_strided_maps_and_an_empty_batch():
    x, *weights = arguments(3, 4)
    strided = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    torch.testing.assert_close(scan2d(strided, *weights), scan2d(x, *weights), rtol=0, atol=0)
    assert scan2d(x[:0], *weights).shape == (0, 3, 4, 6)


def test_large_steps_have_the_gradient_of_torchs_softplus():
    tensors = arguments(3, 4)
    tensors[3] = tensors[3] + 22  # some above, some below the threshold
    assert_equal(tensors)


def test_orders_visit_every_pixel_and_a_scan_merged_is_four_times_the_map():
    orders = scan_orders(2, 3)
    assert orders.t().tolist() == [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]]
    x = torch.randn(2, 3, 4, 5)
    for mode in MODES:
        torch.testing.assert_close(cross_merge(cross_scan(x, mode), 4, 5, mode), 4 * x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32_also_under_autocast(dtype):
    tensors = arguments(5, 6, dtype=dtype)
    exact = reference(*(t.double() for t in tensors))
    bar = 2 * torch.finfo(dtype).eps * exact.abs().max()
    y = scan2d(*tensors)
    assert y.dtype == dtype
    assert (y.double() - exact).abs().max() <= bar
    wide = [t.float() for t in tensors[1:]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = scan2d(tensors[0], *wide)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, scan2d(tensors[0].float(), *wide), rtol=0, atol=0)


def test_autograd_keeps_less_than_twice_the_map_for_each_image():
    tensors = [t.float().requires_grad_() for t in arguments(28, 28, batch=2, dim=192, rank=6, states=16)]
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        scan2d(*tensors)
    weights = sum(t.numel() * 4 for t in tensors[1:])
    assert sum(kept.values()) - weights < 2 * tensors[0].numel() * 4


def test_operator_passes_torchs_checks():
    given = [t.requires_grad_() for t in arguments(3, 4)]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.zoo.scan2d, [*given, "cross"], test_utils=tests)


def test_wrong_arguments_raise_one_sentence():
    tensors = arguments(3, 4)
    with pytest.raises(ValueError, match="mode='spiral' is unknown"):
        scan2d(*tensors, "spiral")
    tensors[4] = tensors[4][:5]
    with pytest.raises(ValueError, match="A has shape"):
        scan2d(*tensors)
