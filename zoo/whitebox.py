"""What CRATE's layers do, by the measures of the papers: compression, sparsity, attention and segmentation.

Every function takes a `Crate` model (also CRATE-alpha, CRATE-MAE's encoder, folded models) and images
(B, C, H, W) normalised for it, runs it once in eval mode without gradients, and leaves it as it was.

Sources: coding rate and sparsity arXiv 2306.01129 (sections 2.2 and 3.1), attention maps and PCA
arXiv 2308.16271. Where the papers and their code differ, the code's formula is taken and the docstring says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo.crate import Crate

__all__ = [
    "LayerStatistics",
    "Principal",
    "PrincipalColors",
    "attention_maps",
    "cls_attention",
    "coding_rate",
    "expansion_rate",
    "layer_statistics",
    "mass_mask",
    "pca",
    "pca_colors",
    "shared_projection",
]


def coding_rate(x: Tensor, eps: float = 0.01) -> Tensor:
    """Rate of tokens projected on subspaces, sum over heads of 1/2 logdet(I + d / (N eps) X X^T), in nats.

    Each token is normalised to length 1 first (a token of zeros gives NaN). `eps` stands where the paper
    writes the square of its epsilon, so the default is the paper's 0.1.

    Args:
        x: (B, H, N, D), the shared projection of the tokens, head by head.
        eps: the precision of the code, squared.

    Returns:
        (B,), in float32 or wider. Computed from the smaller of the two Gram matrices, N x N and D x D.
    """
    x = x if x.dtype == torch.float64 else x.float()
    n, d = x.shape[-2:]
    x = x / x.norm(dim=-1, keepdim=True)
    gram = x @ x.transpose(-2, -1) if n < d else x.transpose(-2, -1) @ x
    identity = torch.eye(min(n, d), dtype=x.dtype, device=x.device)
    return torch.logdet(identity + d / (n * eps) * gram).sum(dim=-1) / 2


def expansion_rate(z: Tensor, eps: float = 0.1) -> Tensor:
    """Rate of whole tokens, 1/2 logdet(I + C / (N eps^2) Z^T Z): (B, N, C) -> (B,). Not normalised."""
    z = z if z.dtype == torch.float64 else z.float()
    n, c = z.shape[-2:]
    gram = z @ z.transpose(-2, -1) if n < c else z.transpose(-2, -1) @ z
    identity = torch.eye(min(n, c), dtype=z.dtype, device=z.device)
    return torch.logdet(identity + c / (n * eps**2) * gram) / 2


class LayerStatistics(NamedTuple):
    """Per layer and image, (depth, B): `coding_rate` in nats and `zeros`, the share of exact zeros.

    The papers plot their means over images, and 1 - zeros as "sparsity".
    """

    coding_rate: Tensor
    zeros: Tensor


def layer_statistics(model: Crate, images: Tensor, eps: float = 0.01) -> LayerStatistics:
    """Coding rate of the shared projection and sparsity of the output of the sparse step, layer by layer.

    All tokens count, the class token too. In CRATE-alpha, whose layers end with a residual, the sparsity is
    that of the code over the overcomplete dictionary.
    """
    rates: list[Tensor] = []
    zeros: list[Tensor] = []
    with _recording(model) as record:
        for block in model.blocks:
            heads, width = block.attn.num_heads, block.attn.head_dim

            def projected(module, inputs, output, heads=heads, width=width):
                rates.append(coding_rate(output.unflatten(-1, (heads, width)).transpose(1, 2), eps))

            def coded(module, inputs, output):
                code = module.code(inputs[0]).view(len(output), -1) if hasattr(module, "code") else output
                zeros.append((code == 0).flatten(1).double().mean(dim=1))

            record(block.attn.qkv, projected)
            record(_sparse_step(block), coded)
        model.forward_features(images)
    return LayerStatistics(torch.stack(rates), torch.stack(zeros))


def shared_projection(model: Crate, images: Tensor, layer: int = -1) -> Tensor:
    """Projection of the normalised tokens that is query, key and value of a layer: (B, 1 + N, heads x head_dim).

    The "key" features of the emergent-segmentation paper, which uses the last layer.
    """
    found: list[Tensor] = []
    with _recording(model) as record:
        record(_layer(model, layer).attn.qkv, lambda module, inputs, output: found.append(output))
        model.forward_features(images)
    return found[0]


def attention_maps(model: Crate, images: Tensor, layer: int = -1) -> Tensor:
    """Softmax attention of a layer: (B, heads, 1 + N, 1 + N), rows are queries, the class token is first."""
    attn = _layer(model, layer).attn
    w = shared_projection(model, images, layer).unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2)
    return torch.softmax((w * attn.scale) @ w.transpose(-2, -1), dim=-1)


def cls_attention(model: Crate, images: Tensor, layer: int = -1) -> Tensor:
    """Attention of the class token to the patches, as maps: (B, heads, H / patch, W / patch)."""
    attn = _layer(model, layer).attn
    w = shared_projection(model, images, layer).unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2)
    attention = torch.softmax((w[:, :, :1] * attn.scale) @ w.transpose(-2, -1), dim=-1)
    return attention[:, :, 0, 1:].unflatten(-1, _grid(model, images))


def mass_mask(attention: Tensor, mass: float = 0.6) -> Tensor:
    """The fewest patches that hold the share `mass` of each map's attention (DINO's convention), boolean.

    Args:
        attention: (..., H, W), non-negative.
        mass: share to hold, 0 to 1.
    """
    flat = attention.flatten(-2)
    values, order = flat.sort(dim=-1, descending=True)
    before = values.cumsum(dim=-1) - values  # mass of the larger ones
    chosen = before < mass * values.sum(dim=-1, keepdim=True)
    return torch.zeros_like(chosen).scatter(-1, order, chosen).view(attention.shape)


class Principal(NamedTuple):
    """`projection` (rows, k), `components` (k, columns), `mean` (columns,) and `variance` (k,), unbiased."""

    projection: Tensor
    components: Tensor
    mean: Tensor
    variance: Tensor


def pca(x: Tensor, components: int = 4) -> Principal:
    """Principal components of the rows of a matrix; each component's largest loading is positive."""
    x = x if x.dtype == torch.float64 else x.float()
    if not 0 < components <= min(x.shape):
        raise ValueError(f"{components} components asked of a {tuple(x.shape)} matrix: at most {min(x.shape)}")
    mean = x.mean(dim=0)
    _, values, rows = torch.linalg.svd(x - mean, full_matrices=False)
    rows = rows[:components]
    peak = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    rows = rows * peak.sign()
    variance = values[:components].square() / max(len(x) - 1, 1)
    return Principal((x - mean) @ rows.t(), rows, mean, variance)


class PrincipalColors(NamedTuple):
    """`colors` (B, h, w, 3) in 0 to 1, zero outside of `foreground` (B, h, w), over the grid of patches."""

    colors: Tensor
    foreground: Tensor


def pca_colors(model: Crate, images: Tensor, layer: int = -1, threshold: float = 0.5) -> PrincipalColors:
    """Foreground and part colours from the shared projections of the patches, all images together.

    The first principal component, scaled to 0 to 1 over all patches, splits foreground from background at
    `threshold`; holes in the foreground are filled. A second PCA over the foreground patches gives the
    colours: its last three components of four, scaled jointly to 0 to 1. A component has no sign of its own:
    the side with fewer patches on the border of the images is called foreground.
    """
    keys = shared_projection(model, images, layer)[:, 1:]
    h, w = _grid(model, images)
    first = pca(keys.flatten(0, 1), min(4, *keys.flatten(0, 1).shape)).projection[:, 0]
    level = (first - first.min()) / (first.max() - first.min()).clamp_min(1e-12)
    foreground = (level > threshold).view(-1, h, w)
    if _border_share(foreground) > _border_share(~foreground):
        foreground = ~foreground
    foreground = _fill_holes(foreground)
    colors = torch.zeros(*foreground.shape, 3, dtype=level.dtype, device=level.device)
    chosen = keys.unflatten(1, (h, w))[foreground]
    if len(chosen) >= 4:
        parts = pca(chosen, 4).projection[:, -3:]
        low, high = parts.min(), parts.max()
        colors[foreground] = (parts - low) / (high - low).clamp_min(1e-12)
    return PrincipalColors(colors, foreground)


def _border_share(mask: Tensor) -> float:
    inner = mask[:, 1:-1, 1:-1]
    return float((mask.sum() - inner.sum()) / mask.sum().clamp_min(1))


def _fill_holes(mask: Tensor) -> Tensor:
    """Set what is not connected (by edges) to the border of its (h, w) map through unset entries."""
    padded = nn.functional.pad(mask, (1, 1, 1, 1))
    outside = torch.zeros_like(padded)
    outside[:, 0], outside[:, -1], outside[:, :, 0], outside[:, :, -1] = True, True, True, True
    while True:
        grown = outside.clone()
        grown[:, 1:] |= outside[:, :-1]
        grown[:, :-1] |= outside[:, 1:]
        grown[:, :, 1:] |= outside[:, :, :-1]
        grown[:, :, :-1] |= outside[:, :, 1:]
        grown &= ~padded
        if torch.equal(grown, outside):
            return ~outside[:, 1:-1, 1:-1]
        outside = grown


@contextmanager
def _recording(model: Crate) -> Iterator:
    """Within it the model is in eval mode without gradients, and the yielded function hooks outputs."""
    if not isinstance(model, Crate):
        raise TypeError(f"these measures are of CRATE models, got {type(model).__name__}: build one of zoo's crate_*")
    training = model.training
    handles = []
    model.eval()
    try:
        with torch.no_grad():
            yield lambda module, hook: handles.append(module.register_forward_hook(hook))
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)


def _layer(model: Crate, layer: int) -> nn.Module:
    depth = len(model.blocks)
    if not -depth <= layer < depth:
        raise ValueError(f"layer={layer} does not exist: the model has {depth}, numbered from 0")
    return model.blocks[layer]


def _sparse_step(block: nn.Module) -> nn.Module:
    return block.odl if hasattr(block, "odl") else block.ista


def _grid(model: Crate, images: Tensor) -> tuple[int, int]:
    return model.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
