"""`wave_gate` equals its definition with complex numbers, with gradients, and picks the first of equal channels."""

import pytest
import torch

from zoo.kernels.wave_gate import reference, rotate, strongest, superpose, wave_gate


def waves(B=2, C=8, n=16, H=5, W=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, C, H, W), (B, n, H, W), (B, n, H, W), (n // 2, 2)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("shape", [dict(), dict(n=8), dict(n=24, H=1, W=1), dict(B=0)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_output_and_gradients_equal_the_definition(shape, memory_format):
    x, *leaves = waves(**shape)
    laid_out = [leaf.contiguous(memory_format=memory_format) for leaf in leaves[:2]]
    y, expected = wave_gate(x, *laid_out, leaves[2]), reference(x, *leaves)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)
    assert y.is_contiguous(memory_format=memory_format)
    grad = torch.randn_like(expected)
    for got, want in zip(*(torch.autograd.grad(out, leaves, grad) for out in (y, expected)), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_gradients_equal_the_formulas_of_the_docstring():
    x, theta, amplitude, rotation = waves()
    y = wave_gate(x, theta, amplitude, rotation)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, [theta, amplitude], grad)
    alpha, beta = (factor.reshape(-1, 1, 1) for factor in rotation.detach().unbind(1))
    even, odd = grad[:, 0::2], grad[:, 1::2]
    wave_grad = torch.stack([alpha * even + beta * odd, alpha * odd - beta * even], 2).flatten(1, 2)
    chosen = torch.zeros_like(grad).scatter(1, x.argmax(1, keepdim=True), 1.0) * wave_grad.sum(1, keepdim=True)
    phase = torch.nn.functional.gelu(theta)
    slope = torch.autograd.grad(phase.sum(), theta)[0]
    torch.testing.assert_close(got[0], (wave_grad + chosen) * amplitude * slope, rtol=0, atol=1e-12)
    torch.testing.assert_close(got[1], (wave_grad + chosen) * phase, rtol=0, atol=1e-12)


def test_the_first_of_equal_channels_is_the_strongest():
    x = torch.tensor([1.0, 3.0, 3.0, -1.0]).reshape(1, 4, 1, 1).expand(2, 4, 3, 3)
    assert strongest(x).eq(1).all()
    assert strongest(x.permute(0, 2, 3, 1), -1).eq(1).all()
    assert strongest(torch.zeros(1, 7, 2, 2)).eq(0).all()


def test_superposition_is_the_same_over_the_last_axis():
    x, theta, amplitude, _ = waves()
    expected = superpose(strongest(x), theta, amplitude)
    x, theta, amplitude = (t.permute(0, 2, 3, 1) for t in (x, theta, amplitude))
    torch.testing.assert_close(superpose(strongest(x, -1), theta, amplitude, -1).permute(0, 3, 1, 2), expected)


def test_factors_turn_and_stretch_interleaved_pairs():
    wave = torch.tensor([1.0, 0.0, 0.0, 1.0]).reshape(1, 4, 1, 1)
    turned = rotate(wave, torch.tensor([[0.0, 2.0], [3.0, 1.0]]))
    assert turned.flatten().tolist() == [0.0, 2.0, -1.0, 3.0]


def test_half_precision_keeps_float32_factors():
    x, theta, amplitude, rotation = waves(dtype=torch.bfloat16)
    assert wave_gate(x, theta, amplitude, rotation).dtype == torch.bfloat16
    y = wave_gate(x, theta, amplitude, rotation.float())
    assert y.dtype == torch.float32
    torch.testing.assert_close(
        y, reference(*(t.float() for t in (x, theta, amplitude, rotation))), rtol=0.02, atol=0.05
    )


def test_it_can_be_scripted_traced_and_exported():
    class Gate(torch.nn.Module):
        def forward(self, x: torch.Tensor, theta: torch.Tensor, amplitude: torch.Tensor, rotation: torch.Tensor):
            return wave_gate(x, theta, amplitude, rotation)

    inputs = tuple(t.detach() for t in waves())
    expected = wave_gate(*inputs)
    gate = Gate()
    for form in (
        torch.jit.script(gate),
        torch.fx.symbolic_trace(gate),
        torch.export.export(gate, inputs).module(),
        torch.compile(gate, fullgraph=True, backend="eager"),
    ):
        torch.testing.assert_close(form(*inputs), expected, rtol=0, atol=0)
