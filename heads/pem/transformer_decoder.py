"""PEM's transformer decoder: queries that look at one prototype token each and head (arXiv 2402.19422, 3.2).

A layer updates the queries t by cross-attention to a level of the pixel decoder, self-attention and an MLP. After each
layer, and before the first, every query predicts a class and a mask; inside that mask it looks for its prototypes
in the next layer.

The mask logits e F and their resizing to a level are both linear, so F is resized once for each level and the
full-size masks are made only where they are asked for: of the last prediction, or of all in training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.heads.pem.pixel_decoder import pointwise
from zoo.kernels.prototype_select import gather_tokens, select_tokens


class Prediction(NamedTuple):
    """Class logits (B, Q, K + 1), the last class being "no object", and mask logits (B, Q, H, W)."""

    class_logits: Tensor
    mask_logits: Tensor


def sine_position(height: int, width: int, dim: int, device=None, dtype=None) -> Tensor:
    """The sine position map of DETR, (dim, height, width): dim / 2 channels of y, then of x.

    Computed in float32, as the official code does in every type.
    """
    channels = torch.arange(dim // 2, dtype=torch.float32, device=device)
    period = 10000 ** (2 * (channels // 2) / (dim // 2))

    def axis(length: int) -> Tensor:
        steps = torch.arange(1, length + 1, dtype=torch.float32, device=device)
        steps = steps / (length + 1e-6) * (2 * math.pi)
        angles = steps[:, None] / period
        return torch.stack((angles[:, 0::2].sin(), angles[:, 1::2].cos()), 2).flatten(1).t()

    y = axis(height)[:, :, None].expand(-1, height, width)
    x = axis(width)[:, None, :].expand(-1, height, width)
    return torch.cat((y, x)).to(dtype)


class KeyProjection(nn.Module):
    """Features of a level to keys: batch norm, depthwise 3x3, linear, unit length: (B, C, H, W) -> (B, H W, C)."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.linear = nn.Linear(dim, dim, **dd)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W), position included -> (B, H W, C), each token of length 1 over all channels."""
        x = self.conv(self.norm(features))
        return F.normalize(self.linear(x.flatten(2).transpose(1, 2)), dim=-1)


class FoldedKeys(nn.Module):
    """The keys of one layer from its level's bare projection W f; `KeyProjection` of W f + b + level + position.

    Batch norm, depthwise convolution and linear layer are linear, so what does not depend on the image is a
    map that is added to the result of the linear layer: y = linear(dw(scale W f)) + C. The zeros that pad the
    depthwise convolution come after the norm, so C differs at the borders; it is made by the official operations.
    As each position channel varies along one axis only, C is the sum of a map that does not vary along the inner
    columns and one that does not along the inner rows: a few lines of each are kept, per size, not the map.
    """

    def __init__(self, keys: KeyProjection, constant: Tensor):
        super().__init__()
        norm, conv = keys.norm, keys.conv
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        self.register_buffer("scale", scale.detach())
        self.register_buffer("shift", (scale * (constant - norm.running_mean) + norm.bias).detach())
        self.conv = conv
        self.linear = keys.linear
        weight = (conv.weight * scale[:, None, None, None]).detach().contiguous()
        self.register_buffer("weight", weight)
        self.lines: tuple | None = None

    def forward(self, projected: Tensor) -> Tensor:
        """(B, C, H, W), level's features times the projection's weight -> (B, H W, C), each of length 1."""
        B, C, H, W = projected.shape
        x = F.conv2d(projected, self.weight, padding=1, groups=C).permute(0, 2, 3, 1)
        if torch.compiler.is_compiling():
            y = F.linear(x, self.linear.weight) + self.constant(H, W)
            return F.normalize(y.flatten(1, 2), dim=-1)
        y = self._sum_lines(H, W, x.device).view(H * W, C)
        y = y.repeat(B, 1) if B > 1 else y
        y.addmm_(x.reshape(B * H * W, C).to(y.dtype), self.linear.weight.t())
        return y.div_(torch.linalg.vector_norm(y, dim=-1, keepdim=True).clamp_min_(1e-12)).view(B, H * W, C)

    def constant(self, height: int, width: int) -> Tensor:
        """C for a map of the given size: (H, W, C)."""
        position = sine_position(height, width, len(self.scale), self.scale.device, self.scale.dtype)
        return self._propagate(position * self.scale[:, None, None] + self.shift[:, None, None])

    def _propagate(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x[None])[0].permute(1, 2, 0))

    def _sum_lines(self, H: int, W: int, device: torch.device) -> Tensor:
        key = (H, W, device, self.scale.dtype)
        if self.lines is None or self.lines[0] != key:
            if torch.is_autocast_enabled(device.type):
                with torch.autocast(device.type, enabled=False):  # these are kept, also for calls without it
                    self.lines = (key, *self._make_lines(H, W))
            else:
                self.lines = (key, *self._make_lines(H, W))
        _, columns, rows = self.lines
        if columns is None:
            return rows.clone()
        y = columns[:, 1:2] + rows[1:2]
        y[:, 0] += columns[:, 0] - columns[:, 1]
        y[:, -1] += columns[:, 2] - columns[:, 1]
        y[0] += rows[0] - rows[1]
        y[-1] += rows[2] - rows[1]
        return y

    @torch.no_grad()
    def _make_lines(self, H: int, W: int) -> tuple[Tensor | None, Tensor]:
        if min(H, W) < 3:
            return None, self.constant(H, W)
        half = len(self.scale) // 2
        position = sine_position(H, W, 2 * half, self.scale.device, self.scale.dtype)
        x = position * self.scale[:, None, None]
        # the y channels and all that is constant, left, inner and right column; the x channels, top, inner, bottom row
        columns, rows = x[:, :, :3].clone(), x[:, :3].clone()
        columns[half:] = 0
        rows[:half] = 0
        columns = self._propagate(columns + self.shift[:, None, None])
        rows = self._propagate(rows) - self._propagate(torch.zeros_like(rows))
        return columns, rows


class PrototypeAttention(nn.Module):
    """Cross-attention that takes, for each query and head, the one most similar token: (B, Q, C) -> (B, Q, C).

    Similarity is the product with keys of unit length over all channels, so that a head's share of the length
    counts. The prototype is the key itself. The result is normalised over the queries: a query's output depends on
    all of them.
    """

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.keys = KeyProjection(dim, **dd)
        self.query_norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.query = nn.Linear(dim, dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.final = nn.Linear(dim, dim, **dd)
        self.alpha = nn.Parameter(torch.ones(dim, **dd))

    def select(self, t: Tensor, query_pos: Tensor, keys: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        """Queries of unit length (B, Q, C), and the chosen token of each query and head (B, Q, heads)."""
        q = F.normalize(self.query(self.query_norm(t + query_pos)), dim=-1)
        with torch.no_grad():
            return q, select_tokens(q, keys, allowed, self.num_heads)

    def forward(self, t: Tensor, query_pos: Tensor, keys: Tensor, allowed: Tensor) -> Tensor:
        """Queries (B, Q, C), keys (B, N, C), allowed tokens (B, Q, N) -> (B, Q, C)."""
        q, index = self.select(t, query_pos, keys, allowed)
        p = gather_tokens(keys, index)
        return self.final(torch.addcmul(p, self.alpha, F.normalize(self.proj(p * q), dim=1))) + t


class SelfAttention(nn.Module):
    """Attention among the queries; their positions are added to queries and keys, not to values."""

    def __init__(self, dim: int, num_heads: int, pre_norm: bool, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.pre_norm = pre_norm
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, t: Tensor, query_pos: Tensor) -> Tensor:
        """(B, Q, C) -> (B, Q, C)."""
        C = t.shape[-1]
        x = self.norm(t) if self.pre_norm else t
        weight, bias = self.qkv.weight, self.qkv.bias
        q, k = F.linear(x + query_pos, weight[: 2 * C], bias[: 2 * C]).chunk(2, -1)
        v = F.linear(x, weight[2 * C :], bias[2 * C :])
        q, k, v = (each.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for each in (q, k, v))
        y = t + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y if self.pre_norm else self.norm(y)


class FeedForward(nn.Module):
    """Linear, ReLU, linear with a residual path: (B, Q, C) -> (B, Q, C)."""

    def __init__(self, dim: int, hidden_dim: int, pre_norm: bool, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.pre_norm = pre_norm
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)

    def forward(self, t: Tensor) -> Tensor:
        """(B, Q, C) -> (B, Q, C)."""
        y = t + self.fc2(self.fc1(self.norm(t) if self.pre_norm else t).relu_())
        return y if self.pre_norm else self.norm(y)


class DecoderLayer(nn.Module):
    """Cross-attention to a level, self-attention, MLP."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, pre_norm: bool, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.cross_attn = PrototypeAttention(dim, num_heads, **dd)
        self.self_attn = SelfAttention(dim, num_heads, pre_norm, **dd)
        self.mlp = FeedForward(dim, hidden_dim, pre_norm, **dd)

    def forward(self, t: Tensor, query_pos: Tensor, keys: Tensor, allowed: Tensor) -> Tensor:
        """(B, Q, C) -> (B, Q, C)."""
        t = self.cross_attn(t, query_pos, keys, allowed)
        return self.mlp(self.self_attn(t, query_pos))


class TransformerDecoder(nn.Module):
    """Queries to classes and masks.

    Args:
        in_dim: channels of the pixel decoder's levels.
        mask_dim: channels of its mask features.
        num_classes: classes without "no object".
        num_queries: the largest number of segments in an image.
        dim: width of the queries.
        num_heads: heads of both attentions.
        mlp_dim: hidden width of the MLPs.
        depth: layers; layer i looks at level i mod `num_levels`.
        num_levels: levels of the pixel decoder, coarsest first.
        pre_norm: norms before self-attention and MLP (PEM), not behind them.
    """

    def __init__(
        self,
        in_dim: int = 128,
        mask_dim: int = 256,
        num_classes: int = 150,
        num_queries: int = 100,
        dim: int = 256,
        num_heads: int = 8,
        mlp_dim: int = 2048,
        depth: int = 6,
        num_levels: int = 3,
        pre_norm: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % num_heads or dim % 4:
            raise ValueError(f"dim={dim} is not a multiple of 4 and of num_heads={num_heads}: choose one that is")
        self.dim = dim
        self.folded = False
        self.num_levels = num_levels
        self.num_classes = num_classes
        self.num_queries = num_queries
        self.query_feat = nn.Parameter(torch.empty(num_queries, dim, **dd))
        self.query_pos = nn.Parameter(torch.empty(num_queries, dim, **dd))
        self.level_embed = nn.Parameter(torch.empty(num_levels, dim, **dd))
        # as in Mask2Former, levels that have the decoder's width already are not projected
        self.projections = nn.ModuleList(
            nn.Conv2d(in_dim, dim, 1, **dd) if in_dim != dim else nn.Identity() for _ in range(num_levels)
        )
        self.layers = nn.ModuleList(DecoderLayer(dim, num_heads, mlp_dim, pre_norm, **dd) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.class_head = nn.Linear(dim, num_classes + 1, **dd)
        self.mask_head = nn.Sequential(
            nn.Linear(dim, dim, **dd),
            nn.ReLU(inplace=True),
            nn.Linear(dim, dim, **dd),
            nn.ReLU(inplace=True),
            nn.Linear(dim, mask_dim, **dd),
        )
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """The official initialisation: Xavier for self-attention and MLPs, standard normal for the embeddings."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm | nn.BatchNorm2d | nn.Conv2d):
                module.reset_parameters()
        for projection in self.projections:
            if isinstance(projection, nn.Conv2d):
                nn.init.kaiming_uniform_(projection.weight, a=1)
                nn.init.zeros_(projection.bias)
        for layer in self.layers:
            nn.init.ones_(layer.cross_attn.alpha)
            for linear in (layer.self_attn.qkv, layer.self_attn.proj, layer.mlp.fc1, layer.mlp.fc2):
                nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(layer.self_attn.qkv.bias)
            nn.init.zeros_(layer.self_attn.proj.bias)
        for embedding in (self.query_feat, self.query_pos, self.level_embed):
            nn.init.normal_(embedding)

    def forward(
        self, mask_features: Tensor, levels: Sequence[Tensor], auxiliary: bool = False
    ) -> tuple[Prediction, list[Prediction]]:
        """Mask features (B, mask_dim, H, W) and levels, coarsest first.

        Returns:
            The last prediction, masks at the size of the mask features; with `auxiliary` also those before it (of
            the learned queries first), else an empty list.
        """
        B = mask_features.shape[0]
        keys = self.make_keys(levels)
        with torch.no_grad():
            small = [resize_to(mask_features.detach(), level).flatten(2) for level in levels]
        t = self.query_feat.expand(B, -1, -1)
        earlier: list[Prediction] = []
        for i, layer in enumerate(self.layers):
            if auxiliary:
                prediction, embedding = self.predict(t, mask_features)
                earlier.append(prediction)
            else:
                embedding = self.mask_head(self.norm(t))
            with torch.no_grad():
                allowed = embedding.detach() @ small[i % self.num_levels] >= 0
            t = layer(t, self.query_pos, keys[i], allowed)
        return self.predict(t, mask_features)[0], earlier

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Merge positions, level embeddings and the projections' biases into the keys' norms."""
        if self.folded:
            return
        for i, layer in enumerate(self.layers):
            level = i % self.num_levels
            bias = getattr(self.projections[level], "bias", None)
            constant = self.level_embed[level] if bias is None else self.level_embed[level] + bias
            layer.cross_attn.keys = FoldedKeys(layer.cross_attn.keys, constant)
        for projection in self.projections:
            if isinstance(projection, nn.Conv2d):
                projection.bias = None
        self.folded = True

    def make_keys(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """The keys of every layer, (B, N, C) each; they depend on the levels alone."""
        features = []
        for level, (x, projection) in enumerate(zip(levels, self.projections)):
            x = pointwise(x, projection) if isinstance(projection, nn.Conv2d) else x
            if not self.folded:
                position = sine_position(*x.shape[-2:], self.dim, x.device, x.dtype)
                x = x + (self.level_embed[level][:, None, None] + position)
            features.append(x)
        return [layer.cross_attn.keys(features[i % self.num_levels]) for i, layer in enumerate(self.layers)]

    def predict(self, t: Tensor, mask_features: Tensor) -> tuple[Prediction, Tensor]:
        """The prediction of queries t (B, Q, C), and their mask embeddings (B, Q, mask_dim)."""
        t = self.norm(t)
        embedding = self.mask_head(t)
        masks = (embedding @ mask_features.flatten(2)).unflatten(2, mask_features.shape[-2:])
        return Prediction(self.class_head(t), masks), embedding


def resize_to(x: Tensor, level: Tensor) -> Tensor:
    """`x` resized bilinearly, without antialiasing, to the size of `level`.

    At an exact fraction 1 / 2n of the size that is the mean of four pixels, much faster on channels-last maps.
    """
    H, W = level.shape[-2:]
    if not torch.compiler.is_compiling():
        step = x.shape[-2] // H
        if step % 2 == 0 and x.shape[-2:] == (step * H, step * W):
            half = step // 2
            x = x[..., half - 1 :: step, :] + x[..., half::step, :]
            return (x[..., half - 1 :: step] + x[..., half::step]).mul_(0.25)
    return F.interpolate(x, size=(H, W), mode="bilinear", align_corners=False)
