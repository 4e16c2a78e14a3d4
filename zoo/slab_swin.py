"""Swin with SLAB's norm, or with its norm and its attention: classifiers, and the authors' dense backbones."""

# without `from __future__ import annotations`: fx would write forward's types as strings that TorchScript refuses
import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from timm.layers import calculate_drop_path_rates, to_2tuple
from timm.models import FeatureInfo
from torch import Tensor, nn

from zoo.prepbn import PRepBN
from zoo.slab_blocks import Block, ConvNorm, PatchMerging, init_weights
from zoo.slab_pyramids import SlabPyramid, Stage, check_stages, linear_blocks
from zoo.slab_windows import WindowAttention, WindowLinearAttention


class SlabSwin(SlabPyramid):
    """Swin with PRepBN and, in the stages of type L, linear attention in windows.

    Linear attention has one window as large as the map, up to `window_size`; where several are needed, their
    sides are chosen to cover the map with the least padding.

    Args:
        img_size: image size (pixels, or (height, width)) that the tables are made for.
        patch_size: side of a patch.
        in_chans: channels of the image.
        num_classes: 0 for pooled features.
        global_pool: "avg", or "" for maps.
        embed_dim: width of the first stage; doubles in each.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        window_size: largest window of linear attention.
        softmax_window_size: largest window of softmax attention.
        attn_type: kind of each stage: L (linear), S (softmax), M (mixed), see `linear_blocks`.
        mlp_ratio: hidden width of the MLPs, relative.
        qkv_bias: bias of query, key and value.
        kernel_size: of linear attention's depthwise convolution.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout in the MLPs.
        drop_path_rate: stochastic depth, growing linearly over all blocks.
        norm_layer: `PRepBN`, `RepBN` or another norm over the last axis.
        patch_norm: norm after the patch embedding.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 56,
        softmax_window_size: int = 7,
        attn_type: str = "LLSS",
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        kernel_size: int = 5,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer=PRepBN,
        patch_norm: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.patch_size = patch_size
        windows = [(window_size, softmax_window_size)] * len(depths)
        stem, stages = _swin_trunk(
            self.grids(img_size),
            patch_size,
            in_chans,
            embed_dim,
            depths,
            num_heads,
            windows,
            attn_type,
            mlp_ratio,
            qkv_bias,
            kernel_size,
            proj_drop_rate,
            drop_path_rate,
            norm_layer,
            patch_norm,
            fixed=False,
            **dd,
        )
        norm = norm_layer(embed_dim * 2 ** (len(depths) - 1), **dd)
        self._build(stem, stages, norm, in_chans, num_classes, global_pool, drop_rate, patch_size, **dd)

    def grids(self, img_size: int | tuple[int, int]) -> list[tuple[int, int]]:
        """Incomplete patches are padded."""
        h, w = to_2tuple(img_size)
        return [(math.ceil(h / (self.patch_size * s)), math.ceil(w / (self.patch_size * s))) for s in (1, 2, 4, 8)]


def _swin_trunk(
    grids: list[tuple[int, int]],
    patch_size: int,
    in_chans: int,
    embed_dim: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    windows: Sequence[tuple[int, int]],
    attn_type: str,
    mlp_ratio: float,
    qkv_bias: bool,
    kernel_size: int,
    drop: float,
    drop_path_rate: float,
    norm_layer,
    patch_norm: bool,
    fixed: bool,
    **dd: Any,
) -> tuple[ConvNorm, list[Stage]]:
    """Stem and stages; `windows` has the sizes for linear and for softmax attention in each stage."""
    check_stages(depths=depths, num_heads=num_heads)
    rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
    kinds = linear_blocks(attn_type, depths)
    stem = ConvNorm(
        in_chans,
        embed_dim,
        patch_size,
        patch_size,
        whole_patches=True,
        norm_layer=norm_layer if patch_norm else None,
        **dd,
    )
    stages = []
    for i, heads in enumerate(num_heads):
        dim = embed_dim * 2**i
        blocks = []
        for j, (linear, rate) in enumerate(zip(kinds[i], rates[i])):
            common = dict(shifted=j % 2 == 1, fixed=fixed, qkv_bias=qkv_bias, **dd)
            if linear:
                attn = WindowLinearAttention(dim, heads, grids[i], windows[i][0], kernel_size=kernel_size, **common)
            else:
                attn = WindowAttention(dim, heads, grids[i], windows[i][1], **common)
            blocks.append(Block(dim, attn, mlp_ratio, False, drop, rate, norm_layer=norm_layer, **dd))
        downsample = PatchMerging(dim // 2, norm_layer, **dd) if i else nn.Identity()
        stages.append(Stage(downsample, blocks, grids[i]))
    return stem, stages


class SlabSwinDense(nn.Module):
    """The authors' backbone for detectors: (B, 3, H, W) -> four maps, strides 4 to 32, each after a LayerNorm.

    Windows have the sizes of classification at 224 px, whatever the image; the map is padded to whole windows,
    and every second block shifts them, also where there is only one. In the linear stages the shifted map is
    not masked. BatchNorm stays in eval mode, and PRepBN blends while its counter is above 0: load a finished
    checkpoint, whose counter is 0, to train RepBN alone. Like timm's feature extractors the model has
    `feature_info` and returns a list.

    Args:
        in_chans: channels of the image.
        patch_size: side of a patch.
        embed_dim: width of the first stage; doubles in each.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        window_sizes: windows of linear attention, in each stage.
        softmax_window_size: windows of softmax attention.
        attn_type: kind of each stage: L (linear), S (softmax), M (mixed), see `linear_blocks`.
        mlp_ratio: hidden width of the MLPs, relative.
        qkv_bias: bias of query, key and value.
        kernel_size: of linear attention's depthwise convolution.
        proj_drop_rate: dropout in the MLPs.
        drop_path_rate: stochastic depth, growing linearly over all blocks.
        norm_layer: `PRepBN`, `RepBN` or another norm over the last axis.
        patch_norm: norm after the patch embedding.
        freeze_bn: keep BatchNorm in eval mode.
    """

    def __init__(
        self,
        in_chans: int = 3,
        patch_size: int = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_sizes: Sequence[int] = (56, 28, 7, 7),
        softmax_window_size: int = 7,
        attn_type: str = "LLSS",
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        kernel_size: int = 5,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer=PRepBN,
        patch_norm: bool = True,
        freeze_bn: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_stages(depths=depths, window_sizes=window_sizes)
        self.in_chans = in_chans
        self.freeze_bn = freeze_bn
        self.stem, stages = _swin_trunk(
            [(size, size) for size in window_sizes],
            patch_size,
            in_chans,
            embed_dim,
            depths,
            num_heads,
            [(size, softmax_window_size) for size in window_sizes],
            attn_type,
            mlp_ratio,
            qkv_bias,
            kernel_size,
            proj_drop_rate,
            drop_path_rate,
            norm_layer,
            patch_norm,
            fixed=True,
            **dd,
        )
        self.stages = nn.ModuleList(stages)
        widths = [embed_dim * 2**i for i in range(len(depths))]
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-5, **dd) for dim in widths)
        maps = [dict(num_chs=dim, reduction=patch_size * 2**i, module=f"stages.{i}") for i, dim in enumerate(widths)]
        self.feature_info = FeatureInfo(maps, tuple(range(len(maps))))
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """As in `SlabSwin`."""
        self.apply(init_weights)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Tables of relative positions."""
        return {"*.relative_position_bias_table"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def train(self, mode: bool = True) -> Self:
        """Train or eval mode; BatchNorm remains in eval mode if it is frozen."""
        super().train(mode)
        if self.freeze_bn:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> maps (B, C * 2**i, ceil(H / 2**(i+2)), ceil(W / 2**(i+2)))."""
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        maps: list[Tensor] = []
        for stage, norm in zip(self.stages, self.norms):
            x = stage(x)
            maps.append(norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return maps
