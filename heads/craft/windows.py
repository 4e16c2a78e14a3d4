"""Rectangle windows on a map of tokens: where each token goes, which pairs a shift separates, and the attention.

A branch of CRAFT's attention splits the map into windows of h rows and w columns, after a cyclic shift of the map
by (s_h, s_w) in every second block. Shift and partition together are one permutation of the tokens, so a window
costs one gather before the attention and its inverse after it; nothing is rolled, padded or permuted in between.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.kernels.attention import attention

MASKED = -100.0  # what the second official repository adds between regions; exp(-100) is 4e-44


class Windows(NamedTuple):
    """A partition of an H x W map into windows.

    Attributes:
        order: (H*W,) the tokens in window order: those of window 0 row by row, then window 1, ...; windows that the
            border cuts (see `mask`) come last.
        inverse: (H*W,) the inverse permutation.
        area: tokens of a window, N.
        mask: (windows that the border cuts, 1, N, N), 0 or -100, to be added to the logits; None without a mask.
    """

    order: Tensor
    inverse: Tensor
    area: int
    mask: Tensor | None = None


def make_windows(
    height: int,
    width: int,
    window: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    masked: bool = False,
    rolled: bool = False,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Windows:
    """The partition of a height x width map (multiples of the window) into windows, shifted by `shift` tokens.

    Args:
        height: rows of the map.
        width: columns of the map.
        window: rows and columns of a window.
        shift: the map is rolled by minus this many rows and columns first.
        masked: with a shift, keep tokens apart that meet only because rolling is cyclic.
        rolled: the rows come shifted already; only columns are left to do.
        device: of the index tensors.
        dtype: of the mask.
    """
    if torch.compiler.is_compiling() or not (isinstance(height, int) and isinstance(width, int)):
        return _windows(height, width, window, shift, masked, rolled, device, dtype)
    return _cached_windows(height, width, window, shift, masked, rolled, device, dtype)


def _windows(height, width, window, shift, masked, rolled, device, dtype) -> Windows:
    h, w = window
    rows, columns = height // h, width // w
    r = modulo(torch.arange(height, device=device) + (0 if rolled else shift[0]), height)
    c = modulo(torch.arange(width, device=device) + shift[1], width)
    token = r.reshape(rows, 1, h, 1) * width + c.reshape(1, columns, 1, w)  # (rows, columns, h, w)
    token = token.reshape(rows * columns, h * w)
    mask = None
    if masked and any(shift):
        # (windows, N): the region of each token, 3 x 3 of them, cut one window and one shift before the end
        region = _regions(height, h, shift[0], device).reshape(rows, 1, h, 1) * 3
        region = region + _regions(width, w, shift[1], device).reshape(1, columns, 1, w)
        region = region.reshape(rows * columns, h * w)
        cut = torch.zeros(rows, columns, dtype=torch.bool, device=device)
        cut[-1], cut[:, -1] = True, True
        cut = cut.flatten()
        region = region[cut]
        apart = region.unsqueeze(1) != region.unsqueeze(2)
        mask = apart.to(dtype or torch.get_default_dtype()).mul_(MASKED).unsqueeze(1)
        token = torch.cat([token[~cut], token[cut]])
    order = token.flatten()
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(height * width, device=device))
    return Windows(order, inverse, h * w, mask)


# A size has four partitions, strips of it a few more. Masks of large maps are kept small by leaving out
# the windows that have none.
_cached_windows = functools.lru_cache(maxsize=64)(_windows)


def modulo(x: Tensor, n: int) -> Tensor:
    """x % n; for symbolic n, which the ONNX exporter does not take as a scalar, through a tensor."""
    return x % (n if isinstance(n, int) else x.new_full((1,), n))


def _regions(length: int, window: int, shift: int, device: torch.device | None) -> Tensor:
    position = torch.arange(length, device=device)
    return (position >= length - window).long() + (position >= length - shift).long()


class _Permute(torch.autograd.Function):
    """x[:, order], whose gradient is the gather by the inverse permutation instead of a scatter-add."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(1, order)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        order, inverse = ctx.saved_tensors
        return _Permute.apply(gradient, inverse, order), None, None


def permute_tokens(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """x[:, order] for (B, L, C) tokens; `inverse` is the inverse permutation."""
    if x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Permute.apply(x, order, inverse)
    return x.index_select(1, order)


def window_attention(qkv: Tensor, windows: Windows, num_heads: int, bias: Tensor | None = None) -> Tensor:
    """Attention within each window of one branch.

    Args:
        qkv: (B, H*W, 3*C) tokens in row-major order; queries, keys and values of C = num_heads * d channels each.
        windows: the partition.
        num_heads: heads of this branch.
        bias: (heads, N, N) added to the logits of every window.

    Returns:
        (B, H*W, C) in row-major order. Cost for each window: 4 N^2 C FLOPs and 4 N C elements moved, twice for the
        two permutations; the logits are not stored where PyTorch's fused kernel runs.
    """
    batch, length, channels = qkv.shape
    n, dim = windows.area, channels // 3
    x = permute_tokens(qkv, windows.order, windows.inverse)
    if windows.mask is None:
        out = _attend(x.reshape(-1, n, 3, num_heads, dim // num_heads), None if bias is None else bias.unsqueeze(0))
        out = out.reshape(batch, length, dim)
    else:
        # only the last row and column of windows need the mask: the others keep the fast kernel
        cut = windows.mask.shape[0]
        x = x.reshape(batch, -1, n, 3, num_heads, dim // num_heads)
        inner = x.shape[1] - cut
        added = windows.mask if bias is None else windows.mask + bias.unsqueeze(0)
        added = added.expand(batch, *added.shape).flatten(0, 1) if batch > 1 else added
        parts = [_attend(x[:, inner:].flatten(0, 1), added).reshape(batch, cut * n, dim)]
        if inner:
            bias = None if bias is None else bias.unsqueeze(0)
            parts.insert(0, _attend(x[:, :inner].flatten(0, 1), bias).reshape(batch, inner * n, dim))
        out = torch.cat(parts, dim=1)
    return permute_tokens(out, windows.inverse, windows.order)


def _attend(qkv: Tensor, added: Tensor | None) -> Tensor:
    """(windows, N, 3, heads, d) -> (windows, N, heads * d)."""
    q, k, v = qkv.transpose(1, 3).unbind(2)  # each (windows, heads, N, d), strided views
    if qkv.device.type != "cpu" or qkv.dtype != torch.bfloat16:
        return attention(q, k, v, bias=added).transpose(1, 2).flatten(2)
    # for heads of 8 channels, PyTorch's bf16 kernel for CPUs takes 15 times as long as the one for float32
    with torch.autocast("cpu", enabled=False):
        out = attention(q.float(), k.float(), v.float(), bias=None if added is None else added.float())
    return out.to(qkv.dtype).transpose(1, 2).flatten(2)
