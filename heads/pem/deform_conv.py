"""Modulated deformable convolution (DCNv2), 3x3, stride 1, as a weighted gather and one matrix product.

    y[p] = bias + sum_k W_k (m_k[p] x(p + p_k + d_k[p])),   x(.) bilinear, zero outside the map

torchvision's `deform_conv2d` is the definition and what runs in training, on GPUs and in exported graphs (ONNX has
`DeformConv`). For inference on CPUs its column buffer, which costs several times the product behind it, is made here by
`embedding_bag`: a row of the buffer is a weighted sum of four rows of the channels-last map, one contiguous row a
corner. 9 C^2 multiply-adds and 9 C numbers of buffer a pixel; the buffer is made in tiles of bounded size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import deform_conv2d

_TILE = 1 << 20  # numbers of a column buffer that exist at a time (16 MB in float32: near the caches)


def deform_conv(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Deformable convolution of (B, C, H, W) with zero padding that keeps the size.

    Args:
        x: the map.
        offset: (B, 2 k k, H, W), pairs (dy, dx) for the taps in row-major order.
        mask: (B, k k, H, W), the modulation of each tap.
        weight: (out, C, k, k), k odd.
        bias: (out,) or None.
    """
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, offset, weight))
    if x.device.type == "cpu" and not grad and not torch.compiler.is_compiling():
        return _in_full_precision(_gather_and_multiply, x, offset, mask, weight, bias)
    return reference(x, offset, mask, weight, bias)


def reference(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torchvision's operator, in float32 where the types are shorter or mixed."""
    return _in_full_precision(_torchvision, x, offset, mask, weight, bias)


def _in_full_precision(compute: Callable, x: Tensor, *others: Tensor | None) -> Tensor:
    """In float32, outside of autocast, and back: in bfloat16 positions are off by pixels, and CPUs have no kernel."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return _in_full_precision(compute, x, *others)
    work = torch.float64 if x.dtype is torch.float64 else torch.float32
    return compute(x.to(work), *(None if t is None else t.to(work) for t in others)).to(x.dtype)


def _torchvision(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return deform_conv2d(x, offset, weight, bias, padding=weight.shape[-1] // 2, mask=mask)


def _gather_and_multiply(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    B, C, H, W = x.shape
    out, _, k, _ = weight.shape
    taps = k * k
    rows = x.permute(0, 2, 3, 1).reshape(B * H * W, C)  # a view of a channels-last map
    kernel = weight.permute(0, 2, 3, 1).reshape(out, taps * C).t()
    index, share = _corners(offset, mask, k)
    tile = max(1, _TILE // (taps * C))
    y = x.new_empty(B * H * W, out)
    for start in range(0, B * H * W, tile):
        stop = min(start + tile, B * H * W)
        i, s = index[start:stop].view(-1, 4), share[start:stop].view(-1, 4)
        columns = F.embedding_bag(i, rows, per_sample_weights=s, mode="sum").view(stop - start, taps * C)
        if bias is None:
            torch.mm(columns, kernel, out=y[start:stop])
        else:
            torch.addmm(bias, columns, kernel, out=y[start:stop])
    return y.view(B, H, W, out).permute(0, 3, 1, 2)


def _corners(offset: Tensor, mask: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """For each pixel and tap the four corners' rows in the flattened map, and their shares: (B H W, taps, 4) each."""
    B, _, H, W = offset.shape
    taps = k * k
    dtype, device = offset.dtype, offset.device
    steps = torch.arange(k, device=device, dtype=dtype) - k // 2
    offset = offset.permute(0, 2, 3, 1).reshape(B, H, W, taps, 2)
    y = offset[..., 0] + torch.arange(H, device=device, dtype=dtype).view(H, 1, 1) + steps.repeat_interleave(k)
    x = offset[..., 1] + torch.arange(W, device=device, dtype=dtype).view(W, 1) + steps.repeat(k)
    top, left = y.floor(), x.floor()
    below, right = y - top, x - left
    m = mask.permute(0, 2, 3, 1)
    first = torch.arange(B, device=device, dtype=torch.int32).view(B, 1, 1, 1) * (H * W)
    index = torch.empty(B, H, W, taps, 4, dtype=torch.int32, device=device)
    share = torch.empty(B, H, W, taps, 4, dtype=dtype, device=device)
    # shares of rows and columns outside the map are zero, their indices any valid one
    tops = (m * (1 - below) * ((top >= 0) & (top < H)), m * below * ((top >= -1) & (top < H - 1)))
    lefts = ((1 - right) * ((left >= 0) & (left < W)), right * ((left >= -1) & (left < W - 1)))
    lines = [(top + i).clamp_(0, H - 1).int() * W + first for i in (0, 1)]
    columns = [(left + j).clamp_(0, W - 1).int() for j in (0, 1)]
    for i in (0, 1):
        for j in (0, 1):
            torch.add(lines[i], columns[j], out=index[..., 2 * i + j])
            torch.mul(tops[i], lefts[j], out=share[..., 2 * i + j])
    return index.view(B * H * W, taps, 4), share.view(B * H * W, taps, 4)
