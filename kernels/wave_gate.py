"""The wave gate of SpaRTAN: features as waves with an amplitude and a phase (arXiv 2507.10999).

For each pixel, with n = e C channels of amplitude a and phase t, and the C channels of the map x they come from:

    f   = a * gelu(t) + s          s = a_i * gelu(t_i) at i = argmax_c x_c, the strongest wave, added to every channel
    y_k = (alpha_j + i beta_j) * (f_2j + i f_2j+1)            a learned complex factor for channels k = 2j, 2j+1

The index comes from the C channels of x and selects in n channels, so that one of the first C waves is shared; ties
go to the lowest index. GELU is the exact erf form. No gradient flows through the index. With G the gradient of y,

    gF_2j = alpha G_2j + beta G_2j+1,  gF_2j+1 = alpha G_2j+1 - beta G_2j,  gs = sum_k gF_k
    da_k = gF_k gelu(t_k) + [k = i] gs gelu(t_i),  dt_k = (gF_k a_k + [k = i] gs a_i) gelu'(t_k)

Cost a pixel: about 15 n FLOPs; C + 3 n elements moved in a fused kernel, C + 13 n here (activation 2, product and sum
3, exchange within pairs 2, two products 6).

On CPU `max` returns the index of `argmax` in half the time or less, and the product of an exchanged copy keeps the
memory layout where stacking real and imaginary parts would not (tests/bench/spartan.py).

On a GPU one kernel forward (C + 3 n elements for C + 13 n) and one backward (5 n, where the gradients of the plain
form move about 25 n and keep five maps of n channels) pay: nothing here but memory takes time. The backward pass keeps
theta, the amplitudes and the index, and recomputes the waves. Only the whole gate is fused: `superpose` and `rotate`
alone, which the folded form uses on a CPU, would save a third of that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.dispatch import use_triton
from zoo.kernels.jit import cdiv, triton_jit

if TYPE_CHECKING:
    import triton.language as tl

__all__ = ["reference", "rotate", "strongest", "superpose", "wave_gate"]


def wave_gate(x: Tensor, theta: Tensor, amplitude: Tensor, rotation: Tensor) -> Tensor:
    """Phase gate, superposition with the strongest wave, and complex factors; differentiable but for x.

    Args:
        x: map that decides which wave is the strongest, (B, C, H, W).
        theta: phases before the activation, (B, n, H, W) with even n >= C.
        amplitude: amplitudes, (B, n, H, W).
        rotation: complex factors (alpha, beta) of the channel pairs, (n/2, 2).

    Returns:
        (B, n, H, W), in the promoted dtype of waves and factors, in the memory layout of the amplitudes.
    """
    return _wave_gate_on_device(x, theta, amplitude, rotation)


@torch.fx.wrap
def _wave_gate_on_device(x: Tensor, theta: Tensor, amplitude: Tensor, rotation: Tensor) -> Tensor:
    if not torch.jit.is_scripting():
        unsupported = None if theta.dtype == amplitude.dtype else f"phases {theta.dtype}, amplitudes {amplitude.dtype}"
        if use_triton("wave_gate", x, theta, amplitude, rotation, unsupported=unsupported):
            return torch.ops.zoo.wave_gate(x, theta, amplitude, rotation)[0]
    return rotate(superpose(strongest(x), theta, amplitude), rotation)


def strongest(x: Tensor, dim: int = 1) -> Tensor:
    """Index of the largest channel of each pixel, the lowest of equal ones: (B, C, H, W) -> (B, 1, H, W).

    `dim` is the axis of the channels.
    """
    return torch.max(x, dim, keepdim=True)[1]


def superpose(index: Tensor, theta: Tensor, amplitude: Tensor, dim: int = 1) -> Tensor:
    """amplitude * gelu(theta), plus its channel `index` (B, 1, H, W) in every channel: all (B, n, H, W).

    `dim` is the axis of the channels.
    """
    phase = F.gelu(theta)
    shared = amplitude.gather(dim, index) * phase.gather(dim, index)
    return torch.addcmul(shared, amplitude, phase)


def rotate(wave: Tensor, rotation: Tensor) -> Tensor:
    """Channels 2j, 2j+1 of (B, n, H, W) as complex numbers, times the factors (n/2, 2)."""
    alpha = rotation[:, :1].expand(-1, 2).reshape(-1, 1, 1)
    beta = torch.stack([-rotation[:, 1], rotation[:, 1]], dim=1).reshape(-1, 1, 1)
    exchanged = wave.unflatten(1, (rotation.shape[0], 2)).flip(2).flatten(1, 2)
    return torch.addcmul(wave * alpha, exchanged, beta)


def reference(x: Tensor, theta: Tensor, amplitude: Tensor, rotation: Tensor) -> Tensor:
    """The definition of `wave_gate`, with complex numbers; float32 and float64 only."""
    wave = amplitude * F.gelu(theta)
    wave = wave + wave.gather(1, x.argmax(1, keepdim=True))
    B, n, H, W = wave.shape
    pairs = torch.complex(*wave.reshape(B, n // 2, 2, H, W).unbind(2))
    turned = pairs * torch.complex(*rotation.unbind(1))[:, None, None]
    return torch.stack([turned.real, turned.imag], dim=2).reshape(B, n, H, W)


# The operator on a GPU -----------------------------------------------------------------------------------------


@torch.library.custom_op("zoo::wave_gate", mutates_args=())
def _wave_gate(x: Tensor, theta: Tensor, amplitude: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    return launch_forward(x, theta, amplitude, rotation)


@_wave_gate.register_fake
def _(x, theta, amplitude, rotation):
    amplitude = _laid_out(amplitude)
    y = torch.empty_like(amplitude, dtype=torch.promote_types(amplitude.dtype, rotation.dtype))
    return y, x.new_empty(x.shape[0], *x.shape[2:], dtype=torch.int32)


@torch.library.custom_op("zoo::wave_gate_backward", mutates_args=())
def _wave_gate_backward(
    dy: Tensor, theta: Tensor, amplitude: Tensor, rotation: Tensor, index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_backward(dy, theta, amplitude, rotation, index)


@_wave_gate_backward.register_fake
def _(dy, theta, amplitude, rotation, index):
    amplitude = _laid_out(amplitude)
    return torch.empty_like(amplitude), torch.empty_like(amplitude), torch.empty_like(rotation)


def _setup_context(ctx, inputs, output):
    _, theta, amplitude, rotation = inputs
    ctx.save_for_backward(theta, amplitude, rotation, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dy, dindex):
    return None, *_wave_gate_backward(dy, *ctx.saved_tensors)


_wave_gate.register_autograd(_backward, setup_context=_setup_context)


def _laid_out(amplitude: Tensor) -> Tensor:
    """Maps in the order of their channels, or channels last."""
    last = amplitude.is_contiguous(memory_format=torch.channels_last)
    return amplitude if last else amplitude.contiguous()


def _like(x: Tensor, amplitude: Tensor) -> Tensor:
    """`x` in the layout of the amplitudes."""
    last = not amplitude.is_contiguous()
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _sizes(amplitude: Tensor) -> tuple[int, ...]:
    """Pixels, waves, and the distances of channels and of pixels in memory."""
    n, pixels = amplitude.shape[1], amplitude.shape[2] * amplitude.shape[3]
    return (pixels, n, pixels, 1) if amplitude.is_contiguous() else (pixels, n, 1, n)


_PIXELS = 64  # of a program
_PAIRS = 16  # of a step


def launch_forward(x: Tensor, theta: Tensor, amplitude: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """The gate and the index of each pixel's strongest wave, in one kernel."""
    amplitude = _laid_out(amplitude)
    x, theta = _like(x, amplitude), _like(theta, amplitude)
    y = torch.empty_like(amplitude, dtype=torch.promote_types(amplitude.dtype, rotation.dtype))
    index = torch.empty(x.shape[0], *x.shape[2:], dtype=torch.int32, device=x.device)
    pixels, n, channel, pixel = _sizes(amplitude)
    channels = x.shape[1]
    _wave_gate_forward[(cdiv(pixels, _PIXELS), x.shape[0])](
        x,
        theta,
        amplitude,
        rotation.contiguous(),
        y,
        index,
        pixels,
        n,
        channel,
        pixel,
        channels,
        1 if pixel == 1 else channels,
        PIXELS=_PIXELS,
        PAIRS=_PAIRS,
        num_warps=4,
    )
    return y, index


def launch_backward(
    dy: Tensor, theta: Tensor, amplitude: Tensor, rotation: Tensor, index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of theta, amplitude and rotation: one kernel, and a sum for rotation's."""
    amplitude = _laid_out(amplitude)
    dy, theta = _like(dy, amplitude), _like(theta, amplitude)
    dtheta, damplitude = torch.empty_like(amplitude), torch.empty_like(amplitude)
    pixels, n, channel, pixel = _sizes(amplitude)
    blocks, batch = cdiv(pixels, _PIXELS), amplitude.shape[0]
    dtype = torch.promote_types(dy.dtype, torch.float32)
    sums = torch.empty(batch * blocks, *rotation.shape, dtype=dtype, device=dy.device)
    _wave_gate_gradients[(blocks, batch)](
        dy,
        theta,
        amplitude,
        rotation.contiguous(),
        index,
        dtheta,
        damplitude,
        sums,
        pixels,
        n,
        channel,
        pixel,
        PIXELS=_PIXELS,
        PAIRS=_PAIRS,
        num_warps=4,
    )
    return dtheta, damplitude, sums.sum(0).to(rotation.dtype, copy=True)


# Triton --------------------------------------------------------------------------------------------------------


@triton_jit
def _gelu(x):
    return x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton_jit
def _gelu_slope(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton_jit
def _wave_gate_forward(
    X,
    THETA,
    AMPLITUDE,
    ROTATION,
    Y,
    INDEX,
    pixels,
    n,
    channel,
    pixel,
    channels,
    x_pixel,
    PIXELS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    wide: tl.constexpr = tl.float64 if Y.dtype.element_ty == tl.float64 else tl.float32
    image = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    live = p < pixels
    best = tl.full([PIXELS], float("-inf"), wide)
    index = tl.zeros([PIXELS], tl.int32)
    for first in range(0, channels, 2 * PAIRS):
        c = first + tl.arange(0, 2 * PAIRS)
        at = image * channels * pixels + c[:, None] * channel + p[None, :] * x_pixel
        x = tl.load(X + at, (c < channels)[:, None] & live[None, :], float("-inf")).to(wide)
        largest, place = tl.max(x, 0, return_indices=True)
        index = tl.where(largest > best, first + place, index)
        best = tl.maximum(largest, best)
    tl.store(INDEX + image * pixels + p, index, live)
    start = image * n * pixels + p * pixel
    at = start + index * channel
    shared = tl.load(AMPLITUDE + at, live, 0.0).to(wide) * _gelu(tl.load(THETA + at, live, 0.0).to(wide))
    for first in range(0, n // 2, PAIRS):
        j = first + tl.arange(0, PAIRS)
        j_live = j < n // 2
        mask = j_live[:, None] & live[None, :]
        alpha = tl.load(ROTATION + 2 * j, j_live, 0.0).to(wide)[:, None]
        beta = tl.load(ROTATION + 2 * j + 1, j_live, 0.0).to(wide)[:, None]
        even_at = start[None, :] + (2 * j)[:, None] * channel
        odd_at = even_at + channel
        even = _gelu(tl.load(THETA + even_at, mask, 0.0).to(wide)) * tl.load(AMPLITUDE + even_at, mask, 0.0).to(wide)
        odd = _gelu(tl.load(THETA + odd_at, mask, 0.0).to(wide)) * tl.load(AMPLITUDE + odd_at, mask, 0.0).to(wide)
        even += shared[None, :]
        odd += shared[None, :]
        tl.store(Y + even_at, (alpha * even - beta * odd).to(Y.dtype.element_ty), mask)
        tl.store(Y + odd_at, (alpha * odd + beta * even).to(Y.dtype.element_ty), mask)


@triton_jit
def _wave_gate_gradients(
    DY,
    THETA,
    AMPLITUDE,
    ROTATION,
    INDEX,
    DTHETA,
    DAMPLITUDE,
    SUMS,
    pixels,
    n,
    channel,
    pixel,
    PIXELS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    wide: tl.constexpr = tl.float64 if DY.dtype.element_ty == tl.float64 else tl.float32
    image = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    live = p < pixels
    start = image * n * pixels + p * pixel
    at = start + tl.load(INDEX + image * pixels + p, live, 0) * channel
    amplitude = tl.load(AMPLITUDE + at, live, 0.0).to(wide)
    theta = tl.load(THETA + at, live, 0.0).to(wide)
    shared = amplitude * _gelu(theta)
    total = tl.zeros([PIXELS], wide)
    for first in range(0, n // 2, PAIRS):
        j = first + tl.arange(0, PAIRS)
        j_live = j < n // 2
        mask = j_live[:, None] & live[None, :]
        alpha = tl.load(ROTATION + 2 * j, j_live, 0.0).to(wide)[:, None]
        beta = tl.load(ROTATION + 2 * j + 1, j_live, 0.0).to(wide)[:, None]
        even_at = start[None, :] + (2 * j)[:, None] * channel
        odd_at = even_at + channel
        even_a = tl.load(AMPLITUDE + even_at, mask, 0.0).to(wide)
        even_t = tl.load(THETA + even_at, mask, 0.0).to(wide)
        odd_a = tl.load(AMPLITUDE + odd_at, mask, 0.0).to(wide)
        odd_t = tl.load(THETA + odd_at, mask, 0.0).to(wide)
        even_dy = tl.load(DY + even_at, mask, 0.0).to(wide)
        odd_dy = tl.load(DY + odd_at, mask, 0.0).to(wide)
        even_phase, odd_phase = _gelu(even_t), _gelu(odd_t)
        even, odd = even_a * even_phase + shared[None, :], odd_a * odd_phase + shared[None, :]
        place = SUMS + (image * tl.num_programs(0) + tl.program_id(0)) * n + 2 * j
        tl.store(place, tl.sum(even_dy * even + odd_dy * odd, 1), j_live)
        tl.store(place + 1, tl.sum(odd_dy * even - even_dy * odd, 1), j_live)
        even_grad = alpha * even_dy + beta * odd_dy
        odd_grad = alpha * odd_dy - beta * even_dy
        total += tl.sum(even_grad + odd_grad, 0)
        tl.store(DAMPLITUDE + even_at, (even_grad * even_phase).to(DTHETA.dtype.element_ty), mask)
        tl.store(DAMPLITUDE + odd_at, (odd_grad * odd_phase).to(DTHETA.dtype.element_ty), mask)
        tl.store(DTHETA + even_at, (even_grad * even_a * _gelu_slope(even_t)).to(DTHETA.dtype.element_ty), mask)
        tl.store(DTHETA + odd_at, (odd_grad * odd_a * _gelu_slope(odd_t)).to(DTHETA.dtype.element_ty), mask)
    # the shared wave's gradient is the sum over all waves; its own channel is written anew
    tl.debug_barrier()
    wave = at - start  # its distance from channel 0
    i = wave // channel
    other = tl.where(i % 2 == 0, 1, -1)
    alpha = tl.load(ROTATION + (i // 2) * 2, live, 0.0).to(wide)
    beta = tl.load(ROTATION + (i // 2) * 2 + 1, live, 0.0).to(wide)
    own_dy = tl.load(DY + at, live, 0.0).to(wide)
    other_dy = tl.load(DY + at + other * channel, live, 0.0).to(wide)
    grad = total + alpha * own_dy + other * beta * other_dy
    tl.store(DAMPLITUDE + at, (grad * _gelu(theta)).to(DTHETA.dtype.element_ty), live)
    tl.store(DTHETA + at, (grad * amplitude * _gelu_slope(theta)).to(DTHETA.dtype.element_ty), live)
