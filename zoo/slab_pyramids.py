"""PVT and CSwin with SLAB's norm, or with its norm and its attention, and what they share with Swin."""

# without `from __future__ import annotations`: fx would write forward's types as strings that TorchScript refuses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import ClassifierHead, calculate_drop_path_rates, get_device_dtype, to_2tuple
from torch import Tensor, nn

from zoo._timm import feature_take_indices, update_model_input_size
from zoo.prepbn import PRepBN, checkpoint_block, fold_into_linear
from zoo.slab_attention import SpatialReductionAttention, SpatialReductionLinearAttention, replace_parameter
from zoo.slab_blocks import Block, ConvNorm, add_map_position, init_weights, resample_map_position
from zoo.slab_windows import StripeAttention

STRIDES = (4, 8, 16, 32)


def linear_blocks(attn_type: str, depths: Sequence[int]) -> list[list[bool]]:
    """Which blocks of each stage use linear attention: "L" all, "S" none, "M" the first n ("LMSS4": n = 4).

    Raises:
        ValueError: not one letter for each stage, or "M" without a number.
    """
    letters, count = attn_type[: len(depths)], attn_type[len(depths) :]
    known = len(letters) == len(depths) and set(letters) <= set("LSM")
    if not known or (not count.isdigit() if "M" in letters else count != ""):
        raise ValueError(
            f"attn_type={attn_type!r}: pass one of L (linear), S (softmax) or M (mixed) for each of the "
            f"{len(depths)} stages, and after them, if there is an M, how many of its blocks are linear"
        )
    return [
        [letter == "L" or (letter == "M" and j < int(count)) for j in range(depth)]
        for letter, depth in zip(letters, depths)
    ]


class Stage(nn.Module):
    """Downsampling, a position table (PVT), blocks, a norm (PVTv2): NCHW maps, channels-last in memory.

    Args:
        downsample: from the previous stage's map.
        blocks: maps (B, H, W, C) to maps.
        pos_embed: a position table (1, N, C), or None.
        grid: the map that tables are made for.
        norm: after the blocks.
    """

    def __init__(
        self,
        downsample: nn.Module,
        blocks: list[Block],
        grid: tuple[int, int],
        pos_embed: nn.Parameter | None = None,
        norm: nn.Module | None = None,
    ):
        super().__init__()
        self.grid = grid
        self.first = isinstance(downsample, nn.Identity)
        self.grad_checkpointing = False
        self.downsample = downsample
        self.pos_embed = pos_embed
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm or nn.Identity()

    @torch.jit.ignore
    def set_grid(self, h: int, w: int) -> None:
        """Make all tables for another map."""
        if self.pos_embed is not None:
            replace_parameter(self, "pos_embed", resample_map_position(self.pos_embed, self.grid, h, w, self.first))
        for block in self.blocks:
            if hasattr(block.attn, "set_grid"):
                block.attn.set_grid(h, w)
        self.grid = (h, w)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C, H', W')."""
        x = self.downsample(x).permute(0, 2, 3, 1)
        if self.pos_embed is not None:
            x = add_map_position(x, self.pos_embed, self.grid, self.first)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for block in self.blocks:
                x = checkpoint_block(block, x)
        else:
            x = self.blocks(x)
        return self.norm(x).permute(0, 3, 1, 2)


class SlabPyramid(nn.Module):
    """What the three hosts share once `stem`, `stages`, `norm` and `head` are there.

    Features are NCHW maps with strides 4 to 32. Any image size works: tables are resampled in each call
    (`set_input_size` does it once), and maps are padded where a host needs whole windows.
    """

    def _build(
        self,
        stem: nn.Module,
        stages: list[Stage],
        norm: nn.Module,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        stride: int = STRIDES[0],
        **dd: Any,
    ) -> None:
        widths = [stage.blocks[0].dim for stage in stages]
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = widths[-1]
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.norm = norm
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.feature_info = [
            dict(num_chs=dim, reduction=stride * 2**i, module=f"stages.{i}") for i, dim in enumerate(widths)
        ]
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Truncated normal (std 0.02) for linear layers and tables; the keys' position tables start at zero."""
        self.apply(init_weights)
        for stage in self.stages:
            if stage.pos_embed is not None:
                nn.init.trunc_normal_(stage.pos_embed, std=0.02)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning rates."""
        if coarse:
            return dict(stem=r"^stem", blocks=[(r"^stages\.(\d+)", None), (r"^norm", (99999,))])
        return dict(
            stem=r"^stem",
            blocks=[
                (r"^stages\.(\d+)\.(?:downsample|pos_embed)", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.norm", (99998,)),
                (r"^norm", (99999,)),
            ],
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Tables of relative positions; the other tables are decayed."""
        tables = "*.relative_position_bias_table"
        return {tables} if any(name.endswith(tables[1:]) for name, _ in self.named_parameters()) else set()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; 0 classes give pooled features, with `global_pool=""` maps."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        self.head.reset(num_classes, global_pool, **get_device_dtype(self))

    def grids(self, img_size: int | tuple[int, int]) -> list[tuple[int, int]]:
        """Height and width of each stage's map."""
        raise NotImplementedError(f"{type(self).__name__} does not say which maps its stages have: a subclass does")

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Resample all tables in place for another image size."""
        if img_size is None:
            return
        for stage, (h, w) in zip(self.stages, self.grids(img_size)):
            stage.set_grid(h, w)
        update_model_input_size(self, to_2tuple(img_size))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of the stages, strides 4 to 32; `norm` applies the final norm to the last."""
        assert output_fmt == "NCHW", f"output_fmt={output_fmt!r}: the maps of this model are NCHW"
        take, last = feature_take_indices(len(self.stages), indices)
        x = self.forward_stem(x)
        taps: list[Tensor] = []
        final = len(self.stages) - 1
        stages = self.stages if torch.jit.is_scripting() or not stop_early else self.stages[: last + 1]
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take:
                taps.append(self._normalized(x) if norm and i == final else x)
        if intermediates_only:
            return taps
        return (self._normalized(x) if last == final or not stop_early else x), taps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Cut what follows the last tap; returns the taps as absolute indices."""
        take, last = feature_take_indices(len(self.stages), indices)
        cut = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if cut:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if cut or prune_norm:
            self.norm = nn.Identity()
        if cut or prune_head:
            self.num_classes, self.global_pool = 0, ""
            self.head.reset(0, "", reset_other=True)
        return take

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Merge the final norm into the classifier: the features then are those before the norm."""
        if isinstance(self.head.fc, nn.Linear) and self.global_pool in ("", "avg"):
            self.norm = fold_into_linear(self.norm, self.head.fc)

    def _normalized(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward_stem(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, H/4, W/4), channels-last in memory, as all maps after it."""
        return self.stem(x.contiguous(memory_format=torch.channels_last))

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, H/32, W/32), after the final norm, if there is one."""
        return self._normalized(self.stages(self.forward_stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over the map, classifier."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def check_stages(**lists: Sequence) -> None:
    """Refuse lists that do not have one entry for each of the same stages."""
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1 or not 1 <= len(next(iter(lists.values()))) <= len(STRIDES):
        given = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"one entry for each of 1 to {len(STRIDES)} stages is needed, got {given}")


class SlabPvt(SlabPyramid):
    """PVT (v1 and v2) with PRepBN and, in the stages of type L, linear attention.

    Args:
        img_size: image size (pixels, or (height, width)) that the position tables are made for.
        in_chans: channels of the image.
        num_classes: 0 for pooled features.
        global_pool: "avg", or "" for maps.
        embed_dims: width of each stage.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        mlp_ratios: hidden width of each stage's MLPs, relative.
        sr_ratios: by which softmax attention reduces the map of its keys, in each stage.
        linear_sr_ratios: by which linear attention does.
        attn_type: kind of each stage: L (linear), S (softmax), M (mixed), see `linear_blocks`.
        overlapping: PVTv2: overlapping patches, a convolution in the MLPs, a norm after each stage, no tables
            of absolute positions.
        qkv_bias: bias of query, key and value.
        kernel_size: of linear attention's depthwise convolution.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout in the MLPs.
        drop_path_rate: stochastic depth, growing linearly over all blocks.
        norm_layer: `PRepBN`, `RepBN` or another norm over the last axis.
        sr_norm_layer: the norm after the reduction; None: `norm_layer`, in PVTv2 a LayerNorm.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        linear_sr_ratios: Sequence[int] = (1, 1, 1, 1),
        attn_type: str = "LLLL",
        overlapping: bool = False,
        qkv_bias: bool = True,
        kernel_size: int = 5,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer=PRepBN,
        sr_norm_layer=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_stages(embed_dims=embed_dims, depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios)
        self.overlapping = overlapping
        if sr_norm_layer is None:
            sr_norm_layer = partial(nn.LayerNorm, eps=1e-5) if overlapping else norm_layer
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        kinds = linear_blocks(attn_type, depths)
        patches = [(7, 4, 3), (3, 2, 1)] if overlapping else [(4, 4, 0), (2, 2, 0)]
        stem, stages = None, []
        for i, (grid, dim) in enumerate(zip(self.grids(img_size), embed_dims)):
            embed = ConvNorm(
                in_chans if i == 0 else embed_dims[i - 1], dim, *patches[i > 0], norm_layer=norm_layer, **dd
            )
            stem = stem or embed
            blocks = []
            for linear, rate in zip(kinds[i], rates[i]):
                if linear:
                    attn = SpatialReductionLinearAttention(
                        dim, num_heads[i], linear_sr_ratios[i], qkv_bias, sr_norm_layer, grid, kernel_size, **dd
                    )
                else:
                    attn = SpatialReductionAttention(dim, num_heads[i], sr_ratios[i], qkv_bias, sr_norm_layer, **dd)
                blocks.append(
                    Block(dim, attn, mlp_ratios[i], overlapping, proj_drop_rate, rate, norm_layer=norm_layer, **dd)
                )
            table = None if overlapping else nn.Parameter(torch.zeros(1, grid[0] * grid[1], dim, **dd))
            last = i == len(depths) - 1
            norm = norm_layer(dim, **dd) if overlapping and not last else None
            stages.append(Stage(nn.Identity() if i == 0 else embed, blocks, grid, table, norm))
        norm = norm_layer(embed_dims[-1], **dd) if overlapping else nn.Identity()
        self._build(stem, stages, norm, in_chans, num_classes, global_pool, drop_rate, **dd)

    def grids(self, img_size: int | tuple[int, int]) -> list[tuple[int, int]]:
        """PVT drops incomplete patches, PVTv2 pads them."""
        h, w = to_2tuple(img_size)
        if min(h, w) < STRIDES[-1]:
            raise ValueError(f"images of {h}x{w} px leave no map with stride 32: pass 32 px or more")
        divide = (lambda n, d: math.ceil(n / d)) if self.overlapping else (lambda n, d: n // d)
        sizes = [(divide(h, 4), divide(w, 4))]
        for _ in STRIDES[1:]:
            sizes.append((divide(sizes[-1][0], 2), divide(sizes[-1][1], 2)))
        return sizes

    @torch.jit.ignore
    def init_weights(self) -> None:
        """As in all hosts; PVTv2's convolutions have a normal distribution by their fan-out."""
        super().init_weights()
        if self.overlapping:
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                    nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
                    nn.init.zeros_(module.bias)


class SlabCswin(SlabPyramid):
    """CSwin with PRepBN and, in the stages of type L, linear attention.

    Args:
        img_size: image size (pixels, or (height, width)) that the position tables are made for.
        in_chans: channels of the image.
        num_classes: 0 for pooled features.
        global_pool: "avg", or "" for maps.
        embed_dim: width of the first stage; doubles in each.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        split_size: width of softmax attention's stripes in each stage; None: the whole map.
        linear_split_size: of linear attention's; a stage whose map has this size has no stripes.
        attn_type: kind of each stage: L (linear), S (softmax), M (mixed), see `linear_blocks`.
        mlp_ratio: hidden width of the MLPs, relative.
        qkv_bias: bias of query, key and value.
        kernel_size: of linear attention's depthwise convolution.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout in the MLPs.
        drop_path_rate: stochastic depth, growing linearly over all blocks.
        norm_layer: `PRepBN`, `RepBN` or another norm over the last axis.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 4, 18, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        split_size: Sequence[int | None] = (1, 2, 7, None),
        linear_split_size: Sequence[int | None] = (None, None, None, None),
        attn_type: str = "LLSS",
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        kernel_size: int = 5,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer=PRepBN,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        check_stages(depths=depths, num_heads=num_heads, split_size=split_size, linear_split_size=linear_split_size)
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        kinds = linear_blocks(attn_type, depths)
        stages = []
        for i, (grid, heads) in enumerate(zip(self.grids(img_size), num_heads)):
            dim = embed_dim * 2**i
            blocks = []
            for linear, rate in zip(kinds[i], rates[i]):
                split = linear_split_size[i] if linear else split_size[i]
                if grid == (split, split):
                    split = None
                attn = StripeAttention(dim, heads, grid, split, linear, qkv_bias, kernel_size, **dd)
                blocks.append(Block(dim, attn, mlp_ratio, False, proj_drop_rate, rate, norm_layer=norm_layer, **dd))
            downsample = ConvNorm(dim // 2, dim, 3, 2, 1, norm_layer=norm_layer, **dd) if i else nn.Identity()
            stages.append(Stage(downsample, blocks, grid))
        stem = ConvNorm(in_chans, embed_dim, 7, 4, 2, norm_layer=norm_layer, **dd)
        norm = norm_layer(embed_dim * 2 ** (len(depths) - 1), **dd)
        self._build(stem, stages, norm, in_chans, num_classes, global_pool, drop_rate, **dd)

    def grids(self, img_size: int | tuple[int, int]) -> list[tuple[int, int]]:
        """The stem pads by 2 px, which is 3 less than a whole patch needs."""
        h, w = to_2tuple(img_size)
        if min(h, w) < 3:
            raise ValueError(f"images of {h}x{w} px are smaller than the first kernel: pass 3 px or more")
        sizes = [((h - 3) // 4 + 1, (w - 3) // 4 + 1)]
        for _ in STRIDES[1:]:
            sizes.append((math.ceil(sizes[-1][0] / 2), math.ceil(sizes[-1][1] / 2)))
        return sizes
