"""CRAFT on one image in strips of rows: the way to run it on a CPU, and on images of any size in bounded memory.

All operators but one are local: windows need their own rows, 3x3 convolutions one row more. The exception is the
channel attention, whose matrices belong to the whole image; each is computed in two passes over the strips, the first
adding up the Gram matrix and the norms, the second applying the matrix. So the result is that of the whole image (to
rounding), the wide intermediate maps (144 to 256 channels) exist for a strip at a time and stay in the cache, and what
lives between layers is at most six maps of C channels, in memory or, for images that memory does not hold, in files.

    peak = 6 H W C numbers + some strips

Shifted windows are a matter of which rows a strip reads: (r + shift) mod H. Nothing is rolled.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.heads.craft.blocks import (
    ChannelAttention,
    FusionBlock,
    Group,
    HighFrequencyBlock,
    RectangleAttentionBlock,
    depthwise_conv,
    spatial,
)

TOKENS = 2560  # of a strip, where the image has more: its widest maps (144 channels) are 1.5 MB of float32
LIVE_MAPS = 6


class Storage:
    """Where the maps between layers live: in memory, or in files that are deleted as soon as they are opened.

    Args:
        folder: for the files; None for memory.
    """

    def __init__(self, folder: str | None = None):
        self.folder = folder

    def map(self, height: int, width: int, channels: int, like: Tensor) -> Tensor:
        """An uninitialised (H, W, C) map."""
        shape = (height, width, channels)
        if self.folder is None:
            return torch.empty(shape, dtype=like.dtype, device=like.device)
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix="zoo_map_") as file:
            # the file has no name any more once this block ends, and no bytes once the tensor is gone
            size = height * width * channels
            file.truncate(size * like.element_size())
            return torch.from_file(file.name, shared=True, size=size, dtype=like.dtype).view(shape)


class Strips:
    """The strips of an image and how its maps are read and written by them.

    Args:
        height: rows of the (padded) image.
        width: columns.
        multiple: what the rows of a strip are a multiple of.
        storage: of the maps.
        tokens: of a strip, about.
        step: called after each strip of each layer with the share of the work that it was.
    """

    def __init__(
        self,
        height: int,
        width: int,
        multiple: int,
        storage: Storage | None = None,
        tokens: int | None = None,
        step: Callable[[float], None] | None = None,
    ):
        self.height, self.width = height, width
        self.storage = storage or Storage()
        rows = max(multiple, (tokens or TOKENS) // width // multiple * multiple)
        count = -(-height // rows)
        rows = -(-height // count // multiple) * multiple  # strips of about the same size
        self.bounds = [(r, min(r + rows, height)) for r in range(0, height, rows)]
        self.step = step

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.bounds)

    @property
    def single(self) -> bool:
        """The whole image is one strip."""
        return len(self.bounds) == 1

    def build(self, compute: Callable[[int, int], Tensor], work: float, into: Tensor | None = None) -> Tensor:
        """The map whose rows r0 ... r1 are compute(r0, r1), of shape (1, r1-r0, W, C); `into` is overwritten.

        Args:
            compute: gives the rows; may read from `into` the rows that it gives.
            work: its cost for each pixel, for the progress.
            into: where to put them.
        """
        if self.single:
            out = compute(0, self.height)[0]
            self.done(work, self.height)
            return out
        for r0, r1 in self.bounds:
            rows = compute(r0, r1)[0]
            if into is None:
                into = self.storage.map(self.height, self.width, rows.shape[-1], rows)
            into[r0:r1] = rows
            self.done(work, r1 - r0)
        return into

    def done(self, work: float, rows: int) -> None:
        """Report progress."""
        if self.step is not None:
            self.step(work * rows / self.height)

    def halo(self, x: Tensor, r0: int, r1: int) -> tuple[Tensor, slice]:
        """Rows r0-1 ... r1+1 of a map as (1, rows, W, C), where they exist, and where r0 ... r1 are among them."""
        top, bottom = max(r0 - 1, 0), min(r1 + 1, self.height)
        return x[top:bottom].unsqueeze(0), slice(r0 - top, r1 - top)

    def wrapped(self, x: Tensor, r0: int, r1: int) -> Tensor:
        """Rows r0 ... r1 of a map, continued at its top where it ends: (1, r1-r0, W, C)."""
        if r1 <= self.height:
            return x[r0:r1].unsqueeze(0)
        return torch.cat([x[r0:], x[: r1 - self.height]]).unsqueeze(0)

    def put_wrapped(self, x: Tensor, rows: Tensor, r0: int, channels: slice) -> None:
        """Write (r1-r0, W, c) rows where `wrapped` reads them."""
        fit = min(len(rows), max(self.height - r0, 0))
        x[r0 : r0 + fit, :, channels] = rows[:fit]
        if fit < len(rows):
            start = r0 + fit - self.height
            x[start : start + len(rows) - fit, :, channels] = rows[fit:]


# Shares of the work, as the specification's counts of multiply-adds for a pixel have them.
_ATTENTION, _MLP, _HIGH, _GRAM, _MIX, _GATED, _CONV = 6.5, 6.0, 4.0, 3.0, 2.6, 10.3, 20.7


def total_work(model) -> float:
    """What the `step` calls of a forward pass add up to."""
    fusion = _HIGH + _GRAM + _MIX + _GATED
    return sum(depth * (2 * (_ATTENTION * 2 + _MLP) + fusion) + _CONV for depth in model.depths) + 2 * _CONV


def forward_strips(
    model,
    images: Tensor,
    *,
    storage: Storage | None = None,
    tokens: int | None = None,
    step: Callable[[float], None] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`Craft.forward_padded` in strips, image by image, without gradients.

    Args:
        model: a `Craft`.
        images: (B, C, H, W), rows and columns in whole windows.
        storage: of the maps; memory by default.
        tokens: of a strip.
        step: takes the work done, of `total_work` for each image.
        out: (B, C, scale*H, scale*W) to write to.
    """
    _, _, height, width = images.shape
    model.check_size(height, width)
    strips = Strips(height, width, model.multiple, storage, tokens, step)
    s = model.scale
    if out is None:
        out = images.new_empty(len(images), model.in_chans, s * height, s * width)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        for i in range(len(images)):
            deep = _features(model, images[i : i + 1], strips)
            for r0, r1 in strips:
                rows, inner = strips.halo(deep, r0, r1)
                y = spatial(rows, model.upsample[0])[:, inner].permute(0, 3, 1, 2)
                out[i : i + 1, :, s * r0 : s * r1] = model.upsample[1](y) / model.img_range + model.mean
                strips.done(_CONV, r1 - r0)
    return out


def _features(model, image: Tensor, strips: Strips) -> Tensor:
    def embed(r0: int, r1: int) -> Tensor:
        top, bottom = max(r0 - 1, 0), min(r1 + 1, strips.height)
        return model.embed(image[:, :, top:bottom])[:, r0 - top : r1 - top]

    side = model.side_inputs(image)
    shallow = x = strips.build(embed, 0.0)
    for i, group in enumerate(model.layers):
        x = _group(group, model.join(x, side, i), strips)

    def close(r0: int, r1: int) -> Tensor:
        rows, inner = strips.halo(x, r0, r1)
        return model.close(model.norm(rows))[:, inner].add_(shallow[r0:r1])

    return strips.build(close, _CONV)


def _group(group: Group, x: Tensor, strips: Strips) -> Tensor:
    y = _refinement(group, x, strips)

    def finish(r0: int, r1: int) -> Tensor:
        if isinstance(group.conv, torch.nn.Identity):
            return (y[r0:r1] + x[r0:r1]).unsqueeze(0)
        rows, inner = strips.halo(y, r0, r1)
        return spatial(rows, group.conv)[:, inner].add_(x[r0:r1])

    return strips.build(finish, _CONV)


def _refinement(group: Group, x: Tensor, strips: Strips) -> Tensor:
    parts = group.residual_group
    for i, (high_block, fusion) in enumerate(zip(parts.hfer_blocks, parts.hf_blocks)):
        low = _attention(parts.srwa_blocks[2 * i], x, strips)
        low = _attention(parts.srwa_blocks[2 * i + 1], low, strips, into=low)
        high = _high_frequency(high_block, x, strips)
        matrix = _mixing_matrix(fusion, low, high, strips)
        del high, x
        x = _fusion(fusion, low, matrix, strips)
    return x


def _attention(block: RectangleAttentionBlock, x: Tensor, strips: Strips, into: Tensor | None = None) -> Tensor:
    """A rectangle attention block; `into` may be `x` itself."""
    height, width, dim = x.shape
    half = dim // 2
    weights = block.branch_weights()
    biases = [block.bias(i) for i in (0, 1)]
    values = strips.storage.map(height, width, dim, x)
    attended = strips.storage.map(height, width, dim, x)
    for r0, r1 in strips:
        y = None
        for i in (0, 1):
            # a single strip takes the rows in their order and leaves the shift to the windows
            shift = 0 if strips.single else block.shifts[i][0]
            if y is None or not strips.single:
                y = block.norm1(strips.wrapped(x, r0 + shift, r1 + shift))
            qkv = F.linear(y, *weights[i])
            windows = block.windows(i, r1 - r0, width, qkv, rolled=not strips.single, last=r1 == height)
            channels = slice(i * half, (i + 1) * half)
            strips.put_wrapped(values, qkv[0, :, :, dim:], r0 + shift, channels)
            strips.put_wrapped(attended, block.attend(qkv, i, windows, biases[i])[0], r0 + shift, channels)
        strips.done(2 * _ATTENTION, r1 - r0)

    def finish(r0: int, r1: int) -> Tensor:
        rows, inner = strips.halo(values, r0, r1)
        y = spatial(rows, block.get_v)[:, inner].add_(attended[r0:r1])
        y = add_linear_(x[r0:r1].unsqueeze(0) + block.proj.bias, y, block.proj.weight)
        hidden = gelu_(block.mlp.fc1(block.norm2(y)))
        return add_linear_(y.add_(block.mlp.fc2.bias), hidden, block.mlp.fc2.weight)

    return strips.build(finish, _MLP, into)


gelu_ = torch._C._nn.gelu_  # PyTorch's own, exact, in place; it has no other public name


def add_linear_(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y += x W^T, accumulated by the matrix product itself: no bias to spread, no sum to form."""
    y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.t())
    return y


def _high_frequency(block: HighFrequencyBlock, x: Tensor, strips: Strips) -> Tensor:
    def compute(r0: int, r1: int) -> Tensor:
        rows, inner = strips.halo(x, r0, r1)
        return block(rows)[:, inner]

    return strips.build(compute, _HIGH)


def _mixing_matrix(fusion: FusionBlock, low: Tensor, high: Tensor, strips: Strips) -> Tensor:
    """First pass: the Gram matrix and the norms, and from them the matrix that mixes the values, (1, C, C)."""
    attention: ChannelAttention = fusion.attn
    gram = q_square = k_square = 0
    for r0, r1 in strips:
        rows, inner = strips.halo(high, r0, r1)
        q = attention.queries(rows)[:, inner].flatten(1, 2)
        rows, inner = strips.halo(low, r0, r1)
        k = attention.keys(fusion.norm1(rows))[:, inner].flatten(1, 2)
        if q.dtype != torch.float64:
            q, k = q.float(), k.float()  # sums over all positions, never in half precision
        gram = gram + q.transpose(1, 2) @ k
        q_square = q_square + q.square().sum(1)
        k_square = k_square + k.square().sum(1)
        strips.done(_GRAM, r1 - r0)
    return attention.mixing_matrix(gram, q_square.sqrt(), k_square.sqrt())


def _fusion(fusion: FusionBlock, low: Tensor, matrix: Tensor, strips: Strips) -> Tensor:
    """Second pass: the mixed values added, then the gated feed-forward."""
    transposed = matrix.transpose(1, 2).to(low.dtype)

    def mix(r0: int, r1: int) -> Tensor:
        rows, inner = strips.halo(low, r0, r1)
        v = fusion.attn.values(fusion.norm1(rows))[:, inner]
        return (v.flatten(1, 2) @ transposed).reshape(v.shape).add_(low[r0:r1])

    x = strips.build(mix, _MIX)
    first, depthwise, last = fusion.ffn.aligned_weights()
    half = len(last[0])

    def feed_forward(r0: int, r1: int) -> Tensor:
        rows, inner = strips.halo(x, r0, r1)
        y = fusion.norm2(rows)
        # the two halves one after the other: their maps are contiguous and half as large
        a, b = (
            depthwise_conv(F.linear(y, first[part]), depthwise[part])[:, inner]
            for part in (slice(0, half), slice(half, None))
        )
        return add_linear_(x[r0:r1].unsqueeze(0).clone(), gelu_(a).mul_(b), last)

    return strips.build(feed_forward, _GATED)
