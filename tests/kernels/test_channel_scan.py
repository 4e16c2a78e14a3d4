"""The scan along channels equals its definition in float64, forward and backward."""

import pytest
import torch

from zoo.kernels import channel_scan as module
from zoo.kernels import scan_steps
from zoo.kernels.channel_scan import channel_orders, channel_scan, reference

NAMES = ("x", "conv_weight", "conv_bias", "dt_weight", "dt_bias", "A", "B", "C", "D")


def arguments(pixels, width, expand, states=4, taps=3, dtype=torch.float64):
    weights = [
        torch.randn(4, taps),
        torch.randn(1, 4),
        torch.randn(4, width),
        torch.randn(4, width),
        -torch.randn(4, states).exp(),
        torch.randn(4, states, width),
        torch.randn(4, states, width),
        torch.randn(4, width),
    ]
    tensors = [t.to(dtype) for t in (torch.randn(*pixels, width), *weights)]
    return [tensors[0], expand, *tensors[1:]]


def gradients(function, given):
    leaves = [t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t for t in given]
    y = function(*leaves)
    generator = torch.Generator().manual_seed(9)
    grad = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    tensors = [t for t in leaves if isinstance(t, torch.Tensor)]
    return {"y": y} | dict(zip(NAMES, torch.autograd.grad(y, tensors, grad)))


def assert_equal(given):
    expected = gradients(reference, given)
    for name, value in gradients(channel_scan, given).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("pixels", "width", "expand"), [((2, 3, 4), 24, 2), ((7,), 9, 3), ((3,), 5, 1), ((1,), 1, 1), ((2, 1), 2, 2)]
)
def test_output_and_gradients_equal_the_definition(pixels, width, expand):
    assert_equal(arguments(pixels, width, expand))


@pytest.mark.parametrize("width", [127, 128, 129])
def test_segment_borders_change_nothing(width):
    assert_equal(arguments((3,), width, 1))


@pytest.mark.parametrize("chunk", [1, 3, 5])  # below 4 the state is updated in place
@pytest.mark.parametrize("pixels", [15, 16, 17, 33])
def test_tiles_and_short_segments_change_nothing(pixels, chunk, monkeypatch):
    monkeypatch.setattr(module, "_TILE_ELEMENTS", 1)  # the smallest tiles, 16 pixels
    monkeypatch.setattr(scan_steps, "FEWEST_STEPS", 4)
    monkeypatch.setattr(scan_steps, "SEGMENT_ELEMENTS", 1)
    monkeypatch.setattr(scan_steps, "CHUNK_ELEMENTS", chunk * 4 * 4 * 16)
    assert_equal(arguments((pixels,), 18, 2))


@pytest.mark.parametrize(("taps", "width"), [(1, 6), (5, 6), (7, 2)])
def test_filters_of_other_lengths_may_be_longer_than_the_sequence(taps, width):
    assert_equal(arguments((4,), width, 2, taps=taps))


def test_orders_of_a_grid_and_of_a_single_column():
    assert channel_orders(6, 2).t().tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 2, 4, 1, 3, 5],
        [5, 4, 3, 2, 1, 0],
        [5, 3, 1, 4, 2, 0],
    ]
    orders = channel_orders(5, 1)
    assert torch.equal(orders[:, 0], orders[:, 1])
    assert torch.equal(orders[:, 2], orders[:, 3])
    with pytest.raises(ValueError, match="expand that divides"):
        channel_orders(5, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32_also_under_autocast(dtype):
    given = arguments((5,), 12, 2, dtype=dtype)
    exact = reference(*(t.double() if isinstance(t, torch.Tensor) else t for t in given))
    y = channel_scan(*given)
    assert y.dtype == dtype
    assert (y.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()
    wide = [t.float() if isinstance(t, torch.Tensor) else t for t in given]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = channel_scan(given[0], *wide[1:])
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, channel_scan(*wide), rtol=0, atol=0)


def test_pixels_do_not_mix_and_an_empty_batch_stays_empty():
    given = arguments((40,), 12, 2)
    y = channel_scan(*given)
    torch.testing.assert_close(channel_scan(given[0][7:9], *given[1:]), y[7:9])
    assert channel_scan(given[0][:0], *given[1:]).shape == (0, 12)


def test_autograd_keeps_the_input_and_the_weights_only():
    given = arguments((100,), 24, 2)
    leaves = [t.requires_grad_() if isinstance(t, torch.Tensor) else t for t in given]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        channel_scan(*leaves)
    assert sum(t.numel() for t in kept) == sum(t.numel() for t in leaves if isinstance(t, torch.Tensor))


def test_operator_passes_torchs_checks():
    given = [t.requires_grad_() if isinstance(t, torch.Tensor) else t for t in arguments((3, 2), 6, 2)]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.zoo.channel_scan, given, test_utils=tests)


def test_wrong_shapes_raise_one_sentence():
    given = arguments((3,), 6, 2)
    with pytest.raises(ValueError, match="B has shape"):
        channel_scan(*given[:7], given[7][:, :2], *given[8:])
    with pytest.raises(ValueError, match="odd number of taps"):
        channel_scan(*given[:2], given[2][:, :2], *given[3:])
