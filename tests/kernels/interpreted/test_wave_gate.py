"""The kernels of `wave_gate` against its definition."""

import pytest
import torch

from tests.kernels.test_wave_gate import waves
from zoo.kernels import use_backend
from zoo.kernels.wave_gate import reference, wave_gate


def moved(device, **shape):
    return [t.detach().to(device).requires_grad_() for t in waves(**shape)]


@pytest.mark.parametrize("shape", [dict(), dict(C=40, n=40, H=9, W=8), dict(n=24, H=1, W=1), dict(B=0)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_output_and_gradients_equal_the_definition(shape, memory_format, device, precise):
    x, *leaves = moved(device, dtype=precise, **shape)
    laid_out = [leaf.contiguous(memory_format=memory_format) for leaf in leaves[:2]]
    y, expected = wave_gate(x, *laid_out, leaves[2]), reference(x, *leaves)
    bar = 1e-12 if precise == torch.float64 else 1e-4
    torch.testing.assert_close(y, expected, rtol=bar, atol=bar)
    assert y.is_contiguous(memory_format=memory_format)
    grad = torch.randn_like(expected)
    for got, want in zip(*(torch.autograd.grad(out, leaves, grad) for out in (y, expected)), strict=True):
        torch.testing.assert_close(got, want, rtol=bar, atol=10 * bar)


def test_the_first_of_equal_channels_is_the_strongest(device, precise):
    _, theta, amplitude, rotation = moved(device, C=40, n=40, dtype=precise)
    for index in (0, 7, 33):
        x = torch.zeros(2, 40, 5, 3, dtype=precise, device=device)
        x[:, index:] = 1
        torch.testing.assert_close(wave_gate(x, theta, amplitude, rotation), reference(x, theta, amplitude, rotation))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_as_plain_torch(dtype, device):
    x, theta, amplitude, rotation = (t.detach() for t in moved(device, dtype=dtype))
    truth = reference(*(t.double() for t in (x, theta, amplitude, rotation)))
    for factors in (rotation, rotation.float()):
        with use_backend("torch"):
            plain = wave_gate(x, theta, amplitude, factors)
        got = wave_gate(x, theta, amplitude, factors)
        assert got.dtype == plain.dtype
        error, allowed = ((y.double() - truth).abs().max() for y in (got, plain))
        assert error <= 2 * allowed


def test_repeated_runs_torchs_checks_and_compile(device):
    x, *leaves = moved(device, dtype=torch.float32)
    x = x.detach()
    grad = torch.randn_like(leaves[0])
    first, second = (torch.autograd.grad(wave_gate(x, *leaves), leaves, grad) for _ in range(2))
    assert all(map(torch.equal, first, second))
    torch.library.opcheck(torch.ops.zoo.wave_gate, (x, *leaves))
    compiled = torch.compile(wave_gate, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, *leaves), wave_gate(x, *leaves))
