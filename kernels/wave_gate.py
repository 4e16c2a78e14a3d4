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
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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
