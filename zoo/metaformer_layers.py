"""Token mixers and stage entries that timm's MetaFormer lacks, and the inference form of its blocks.

Inference form, all of it exact: StarReLU's scale and bias and the layer scales fold into the linear layers and
norms next to them, which leaves a squared ReLU in place; so do the scales of norms over the whole map; residual
scales join the addition; convolutions run channels-last. `zoo.fold` applies it to timm's models and to zoo's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import GroupNorm1, Mlp, to_2tuple
from timm.layers import register_notrace_function as notrace
from timm.models.metaformer import (
    Attention,
    Downsampling,
    MetaFormerBlock,
    Pooling,
    Scale,
    SepConv,
    StarReLU,
    Stem,
)
from torch import Tensor, nn

from zoo.folding import register_fold

ImageSize = int | tuple[int, int]


def stage_grid(img_size: ImageSize, stage: int) -> tuple[int, int]:
    """Height and width of the map of `stage` (0 to 3): floor((H - 3) / 4) + 1, then ceil(h / 2) a stage."""
    sizes = [(side - 3) // 4 + 1 for side in to_2tuple(img_size)]
    for _ in range(stage):
        sizes = [(side + 1) // 2 for side in sizes]
    return sizes[0], sizes[1]


# ---- token mixers


@torch.fx.wrap
@notrace
def mix_positions(x: Tensor, weight: Tensor, height: int, width: int, image: str) -> Tensor:
    """y[b, c, m] = sum_n weight[m, n] x[b, c, n] over the positions of a map, in row-major order.

    (B, C, H, W), (H W, H W) -> (B, C, H, W), channels-last in memory; one GEMM of B C (H W)^2 multiply-adds.

    Raises:
        ValueError: the map is not of the size (`height`, `width`) that the weight was made for.
    """
    if x.shape[2] != height or x.shape[3] != width:
        raise ValueError(
            f"this model's token mixing was built for images of {image} px (a map of {height}x{width}), got a map "
            f"of {x.shape[2]}x{x.shape[3]}: create the model with img_size=(height, width) of your images"
        )
    tokens = torch.matmul(weight, x.flatten(2).transpose(1, 2))
    return tokens.transpose(1, 2).unflatten(2, (height, width))


class RandomMixing(nn.Module):
    """RandFormer's mixer: a frozen random matrix over the positions, whose rows are softmax of uniform noise.

    The matrix is a parameter without gradient, as in the official code: it is saved, counted, not trained.
    """

    def __init__(self, img_size: tuple[int, int], grid: tuple[int, int], device=None, dtype=None):
        super().__init__()
        self.image = f"{img_size[0]}x{img_size[1]}"
        self.height, self.width = grid
        matrix = torch.empty(grid[0] * grid[1], grid[0] * grid[1], device=device, dtype=dtype)
        self.random_matrix = nn.Parameter(matrix, requires_grad=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a new matrix."""
        with torch.no_grad():
            self.random_matrix.uniform_()
            self.random_matrix.copy_(self.random_matrix.softmax(dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return mix_positions(x, self.random_matrix, self.height, self.width, self.image)


class SpatialFc(nn.Module):
    """v1's linear map along the positions, shared by all channels, without bias."""

    def __init__(self, img_size: tuple[int, int], grid: tuple[int, int], device=None, dtype=None):
        super().__init__()
        self.image = f"{img_size[0]}x{img_size[1]}"
        self.height, self.width = grid
        self.fc = nn.Linear(grid[0] * grid[1], grid[0] * grid[1], bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return mix_positions(x, self.fc.weight, self.height, self.width, self.image)


class BiasedAttention(Attention):
    """v1's attention: heads of 32 channels, qkv without bias, output projection with bias."""

    def __init__(self, dim: int, proj_drop: float = 0.0, pool_size: int = 3, device=None, dtype=None):
        del pool_size  # timm hands each mixer the arguments of all
        super().__init__(dim, proj_drop=proj_drop, proj_bias=True, device=device, dtype=dtype)


# ---- norms


@torch.fx.wrap
@notrace
def map_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """GroupNorm with one group, of a map in any memory order: (B, C, H, W), (C,), (C,) -> (B, C, H, W).

    torch's CPU kernel for channels-last maps sums squares in the input's type, which costs 1e-5 to 3e-5 of the
    result in float32 where a map has outliers. One group does not care about the order of its elements: seen as
    a contiguous block, the map gets the accurate kernel at the same speed.
    """
    if x.device.type != "cpu" or x.is_contiguous():
        return F.group_norm(x, 1, weight, bias, eps)
    tokens = x.permute(0, 2, 3, 1)
    y = F.group_norm(tokens.flatten(2).unsqueeze(1), 1, None, None, eps).view(tokens.shape)
    if weight is not None:
        y = y * weight if bias is None else torch.addcmul(bias, y, weight)
    return y.permute(0, 3, 1, 2)


class MapNorm(GroupNorm1):
    """timm's GroupNorm1 (statistics over C, H, W) with or without bias, accurate in any memory order."""

    def __init__(self, num_channels: int, eps: float = 1e-5, bias: bool = True, device=None, dtype=None):
        super().__init__(num_channels, eps=eps, device=device, dtype=dtype)
        if not bias:
            self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return map_norm(x, self.weight, self.bias, self.eps)


def use_accurate_map_norms(model: nn.Module) -> int:
    """Replace timm's norms over whole maps by `MapNorm`, with the same parameters; returns how many."""
    count = 0
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, GroupNorm1) and not isinstance(child, MapNorm):
                norm = MapNorm(child.num_channels, child.eps, device="meta")
                norm.weight, norm.bias = child.weight, child.bias
                setattr(module, name, norm.train(child.training))
                count += 1
    return count


# ---- stage entries


@torch.fx.wrap
@notrace
def channels_last_on_cpu(x: Tensor) -> Tensor:
    """The same map, channels-last in memory on a CPU: torch pools 7 to 12 times faster there in that order."""
    if x.device.type == "cpu":
        return x.contiguous(memory_format=torch.channels_last)
    return x


class ChannelsLastStem(nn.Module):
    """timm's stem; on a CPU it hands on channels-last maps, and what follows keeps that order."""

    def __init__(self, stem: Stem):
        super().__init__()
        self.conv, self.norm = stem.conv, stem.norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, H / 4, W / 4)."""
        return self.norm(self.conv(channels_last_on_cpu(x)))

    def reparameterize(self) -> None:
        """Store the weight channels-last too, which saves reordering it in each call."""
        _store_channels_last(self.conv)


@torch.fx.wrap
@notrace
def add_position_map(x: Tensor, table: Tensor) -> Tensor:
    """x + table, the table resampled where the map has another size: (B, C, H, W), (1, C, h, w)."""
    if x.shape[2] != table.shape[2] or x.shape[3] != table.shape[3]:
        table = resample_position_map(table, x.shape[2], x.shape[3])
    return x + table


def resample_position_map(table: Tensor, height: int, width: int) -> Tensor:
    """A learned position map for another map size: (1, C, h, w) -> (1, C, height, width), bicubic."""
    wide = table if table.dtype == torch.float64 else table.float()
    resampled = F.interpolate(wide, size=(height, width), mode="bicubic", align_corners=False, antialias=True)
    return resampled.to(table.dtype)


class PositionedDownsampling(nn.Module):
    """A stage's entry (the downsampling convolution) followed by a learned position map."""

    def __init__(self, downsample: Downsampling, grid: tuple[int, int], device=None, dtype=None):
        super().__init__()
        self.conv = downsample.conv
        shape = (1, self.conv.out_channels, grid[0], grid[1])
        self.pos_embed = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C2, H / 2, W / 2)."""
        return add_position_map(self.conv(x), self.pos_embed)

    def reparameterize(self) -> None:
        """Store the weight channels-last."""
        _store_channels_last(self.conv)


# ---- inference form


@torch.fx.wrap
@notrace
def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2, overwriting x unless a gradient is wanted."""
    if torch.is_grad_enabled() and x.requires_grad:
        x = torch.relu(x)
        return x * x
    x = x.relu_()
    return x.mul_(x)


@torch.fx.wrap
@notrace
def star_relu(x: Tensor, scale: float, bias: Tensor) -> Tensor:
    """scale * relu(x)^2 + bias in two passes, the first one in place unless a gradient is wanted."""
    x = torch.relu(x) if torch.is_grad_enabled() and x.requires_grad else x.relu_()
    return torch.addcmul(bias, x, x, value=scale)


class FoldedSquaredRelu(nn.Module):
    """StarReLU whose scale and bias went into the next linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        return squared_relu(x)


class FoldedStarRelu(nn.Module):
    """StarReLU in front of a zero-padded convolution, into which its bias cannot go."""

    def __init__(self, act: StarReLU):
        super().__init__()
        self.scale = act.scale.item()
        self.bias = act.bias

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        return star_relu(x, self.scale, self.bias)


class FoldedPooling(nn.Module):
    """pool(x) - x with the subtraction in place."""

    def __init__(self, pooling: Pooling):
        super().__init__()
        self.pool = pooling.pool

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.pool(x).sub_(x)


class FoldedMapNorm(nn.Module):
    """MapNorm whose scale and bias went elsewhere."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return map_norm(x, None, None, self.eps)


class FoldedSum(nn.Module):
    """scale * x + branch_scale * branch, either scale optional, per channel."""

    def __init__(self, scale: Tensor | None, branch_scale: Tensor | None = None):
        super().__init__()
        self.scale = None if scale is None else nn.Parameter(scale, requires_grad=False)
        self.branch_scale = None if branch_scale is None else nn.Parameter(branch_scale, requires_grad=False)

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """Two maps, or two token sequences, to their weighted sum."""
        if self.branch_scale is not None:
            return torch.addcmul(x if self.scale is None else x * self.scale, branch, self.branch_scale)
        return x + branch if self.scale is None else torch.addcmul(branch, x, self.scale)


class FoldedBlock(nn.Module):
    """A block without layer scales, StarReLU scalars and dropouts."""

    def __init__(self, block: MetaFormerBlock, branch_scale: Tensor | None):
        super().__init__()
        self.norm1, self.token_mixer = block.norm1, block.token_mixer
        self.norm2, self.mlp = block.norm2, nn.Sequential(block.mlp.fc1, block.mlp.act, block.mlp.fc2)
        self.sum1 = FoldedSum(_scale_of(block.res_scale1), branch_scale)
        self.sum2 = FoldedSum(_scale_of(block.res_scale2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W); (B, N, C) -> (B, N, C) in stages with attention."""
        x = self.sum1(x, self.token_mixer(self.norm1(x)))
        return self.sum2(x, self.mlp(self.norm2(x)))


# mixers that act on each channel alike and linearly: a scale before them may as well stand behind them
_CHANNELWISE = (nn.Identity, Pooling, RandomMixing, SpatialFc)


@register_fold(MetaFormerBlock)
@torch.no_grad()
def fold_block(block: MetaFormerBlock) -> nn.Module:
    """The inference form of a block; one with a mixer, MLP or norm that is not timm's or zoo's stays as it is."""
    mixer, mlp = block.token_mixer, block.mlp
    known = isinstance(mixer, (*_CHANNELWISE, SepConv, Attention)) and type(mlp) is Mlp
    if not known or getattr(block.norm1, "weight", None) is None:
        return block
    _fold_mlp(block)
    branch_scale = _fold_mixer(block)
    return FoldedBlock(block, branch_scale).eval()


def _fold_mlp(block: MetaFormerBlock) -> None:
    mlp, norm, scale = block.mlp, block.norm2, _scale_of(block.layer_scale2)
    if isinstance(mlp.act, StarReLU):
        _add_to_bias(mlp.fc2, mlp.act.bias * mlp.fc2.weight.flatten(1).sum(1))
        mlp.fc2.weight.mul_(mlp.act.scale)
        mlp.act = FoldedSquaredRelu()
    if scale is not None:
        _scale_output(mlp.fc2, scale)
    if isinstance(norm, GroupNorm1):
        if norm.bias is not None:
            _add_to_bias(mlp.fc1, mlp.fc1.weight.flatten(1) @ norm.bias)
        mlp.fc1.weight.mul_(norm.weight.view(-1, *[1] * (mlp.fc1.weight.ndim - 2)))
        block.norm2 = FoldedMapNorm(norm.eps)


def _fold_mixer(block: MetaFormerBlock) -> Tensor | None:
    """Folds what surrounds the mixer; returns a scale of the branch that goes into the sum."""
    mixer, norm, scale = block.token_mixer, block.norm1, _scale_of(block.layer_scale1)
    branch_scale = None
    if isinstance(mixer, SepConv):
        _store_channels_last(mixer.dwconv)
        for name in ("act1", "act2"):
            if isinstance(getattr(mixer, name), StarReLU):
                setattr(mixer, name, FoldedStarRelu(getattr(mixer, name)))
    if scale is not None:
        scaled = {Attention: "proj", SepConv: "pwconv2"}
        layer = next((getattr(mixer, scaled[kind]) for kind in scaled if isinstance(mixer, kind)), norm)
        _scale_output(layer, scale)
    if isinstance(mixer, _CHANNELWISE) and isinstance(norm, GroupNorm1):
        # pooling minus its input keeps nothing of a constant, so the norm's bias has no effect there
        if isinstance(mixer, Pooling) or norm.bias is None:
            block.norm1 = FoldedMapNorm(norm.eps)
            branch_scale = norm.weight.view(-1, 1, 1)
        else:
            use_accurate_map_norms(block)
    if isinstance(mixer, Pooling):
        block.token_mixer = FoldedPooling(mixer)
    return branch_scale


@register_fold(Stem)
def fold_stem(stem: Stem) -> ChannelsLastStem:
    """timm's stem in the order that is fast on a CPU."""
    folded = ChannelsLastStem(stem)
    folded.reparameterize()
    return folded.eval()


@register_fold(Downsampling)
def fold_downsampling(downsample: Downsampling) -> None:
    """Store the weight channels-last."""
    _store_channels_last(downsample.conv)


def _store_channels_last(conv: nn.Conv2d) -> None:
    if conv.weight.device.type == "cpu":
        conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)


def _scale_of(module: nn.Module) -> Tensor | None:
    return module.scale.detach().view(module.shape) if isinstance(module, Scale) else None


def _add_to_bias(layer: nn.Module, bias: Tensor) -> None:
    bias = bias if layer.bias is None else layer.bias + bias
    layer.bias = nn.Parameter(bias, requires_grad=False)


def _scale_output(layer: nn.Module, scale: Tensor) -> None:
    layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.ndim - 1)))
    if layer.bias is not None:
        layer.bias.mul_(scale.flatten())
