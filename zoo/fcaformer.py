"""FcaFormer: attention that also looks at summaries of all earlier blocks of its stage (arXiv 2211.07198).

Two ConvNeXt stages, then two transformer stages. In the latter each block merges its output into a few cross
tokens (a 7x7 convolution of stride 4), and later blocks read them as additional keys and values, scaled by
learned factors. A depthwise 3x3 convolution lies in the residual stream between attention and MLP.

Differs from the official code (ICCV 2023, hkzhang-git/FcaFormer): any input size, the position tables are
resampled; only keys and values of cross tokens are projected (the official code also projects and drops their
queries, which its multiply-adds count); a stage begins with its downsampling instead of ending with it.
`FcaFormerDense` is the windowed backbone of the authors' detectors and segmenters. The blocks are in
`fcaformer_blocks.py`, learning rates and weight decay of the parameters in `fcaformer_recipe.py`.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import (
    LayerNorm2d,
    NormMlpClassifierHead,
    calculate_drop_path_rates,
    get_device_dtype,
    to_2tuple,
)
from timm.models import FeatureInfo, generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo._timm import feature_take_indices, update_model_input_size
from zoo.builder import build_model, pretrained_cfg
from zoo.checkpoint import CheckpointError, Conversion, StateDict, checkpoint_converter
from zoo.fcaformer_blocks import (
    LN_EPS,
    ConvNorm,
    ConvStage,
    CrossStage,
    CxBlock,
    FcaBlock,
    PatchMerging,
    init_weights,
    merged_size,
    resize_table,
)
from zoo.fcaformer_recipe import learning_rate, optimizer_groups

__all__ = ["FcaFormer", "FcaFormerDense", "fcaformer_dense", "learning_rate", "optimizer_groups"]


def _grid_size(img_size: int | Sequence[int], stride: int) -> tuple[int, int]:
    h, w = to_2tuple(img_size)
    return math.ceil(h / stride), math.ceil(w / stride)


class FcaFormer(nn.Module):
    """Hybrid of ConvNeXt and cross-attention stages.

    Args:
        img_size: image size (pixels, or (height, width)) that the position tables are made for; any other
            size works and resamples them in each call (`set_input_size` does it once).
        in_chans: channels of the image.
        num_classes: 0 for pooled features.
        global_pool: "avg", or "" for maps.
        embed_dims: width of each stage.
        depths: blocks of each stage.
        num_heads: heads of each stage; a stage with 0 heads consists of ConvNeXt blocks.
        mlp_ratio: hidden width of the MLPs.
        max_sources: a block reads the cross tokens of at most this many earlier blocks; None: of all.
        window_size: attention windows of the transformer stages, in order, instead of global attention; the
            position tables are made for these windows then.
        init_values: initial layer scale.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, growing linearly over all blocks.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 192, 320),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (0, 0, 6, 10),
        mlp_ratio: float = 4.0,
        max_sources: int | None = 12,
        window_size: Sequence[int] | None = None,
        init_values: float = 1e-6,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if not len(embed_dims) == len(depths) == len(num_heads):
            raise ValueError(
                f"embed_dims, depths and num_heads have {len(embed_dims)}, {len(depths)} and {len(num_heads)} "
                "entries: pass one of each for every stage"
            )
        if window_size is not None and len(window_size) != sum(h > 0 for h in num_heads):
            raise ValueError(
                f"window_size={tuple(window_size)} has {len(window_size)} entries: pass one for each of the "
                f"{sum(h > 0 for h in num_heads)} stages with attention heads"
            )
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.windowed = window_size is not None
        self.stem = nn.Sequential(
            OrderedDict(
                conv1=ConvNorm(in_chans, embed_dims[0] // 2, 3, stride=2, **dd),
                act=nn.GELU(),
                conv2=ConvNorm(embed_dims[0] // 2, embed_dims[0], 3, stride=2, **dd),
            )
        )
        windows = iter(window_size or ())
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)  # a list for each stage
        common = dict(mlp_ratio=mlp_ratio, init_values=init_values, **dd)
        stages = []
        self.feature_info = []
        for i, (dim, depth, heads) in enumerate(zip(embed_dims, depths, num_heads, strict=True)):
            downsample = PatchMerging(embed_dims[i - 1], dim, **dd) if i else nn.Identity()
            if heads:
                window = next(windows, 0)
                grid = (window, window) if window else _grid_size(img_size, 4 * 2**i)
                limit = depth if max_sources is None else max_sources
                blocks = [
                    FcaBlock(dim, heads, grid, min(j, limit), j < depth - 1, drop_path=rates[i][j], **common)
                    for j in range(depth)
                ]
                stages.append(CrossStage(downsample, blocks, limit, window))
            else:
                stages.append(ConvStage(downsample, [CxBlock(dim, drop_path=d, **common) for d in rates[i]]))
            self.feature_info.append(dict(num_chs=dim, reduction=4 * 2**i, module=f"stages.{i}"))
        self.stages = nn.Sequential(*stages)
        self.head = NormMlpClassifierHead(
            self.num_features,
            num_classes,
            pool_type=global_pool,
            drop_rate=drop_rate,
            norm_layer=partial(LayerNorm2d, eps=LN_EPS),
            **dd,
        )
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Truncated normal (std 0.02) for convolutions and linear layers, and each table's own start."""
        self.apply(init_weights)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning rates."""
        return dict(
            stem=r"^stem",
            blocks=r"^stages\.(\d+)"
            if coarse
            else [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)],
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """No entries: the official recipe decays the position tables."""
        return set()

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

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Resample the position tables in place for another image size; windows stay as they are."""
        if img_size is None:
            return
        if not self.windowed:
            for stage, info in zip(self.stages, self.feature_info, strict=False):
                if isinstance(stage, CrossStage):
                    for block in stage.blocks:
                        block.attn.set_grid_size(*_grid_size(img_size, info["reduction"]))
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
        """Outputs of the stages, strides 4 to 32; `norm` has no effect, the only norm follows the pooling."""
        assert output_fmt == "NCHW", f"output_fmt={output_fmt!r}: the maps of this model are NCHW"
        take, last = feature_take_indices(len(self.stages), indices)
        x = self.forward_stem(x)
        taps: list[Tensor] = []
        stages = self.stages if torch.jit.is_scripting() or not stop_early else self.stages[: last + 1]
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take:
                taps.append(x)
        return taps if intermediates_only else (x, taps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Cut what follows the last tap; returns the taps as absolute indices."""
        take, last = feature_take_indices(len(self.stages), indices)
        cut = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if cut:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if cut or prune_head:
            self.num_classes, self.global_pool = 0, ""
            self.head.reset(0, "", reset_other=True)
        return take

    def forward_stem(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, ceil(H/4), ceil(W/4)), channels-last in memory, as all maps after it."""
        return self.stem(x.contiguous(memory_format=torch.channels_last))

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, ceil(H/32), ceil(W/32))."""
        return self.stages(self.forward_stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over the map, norm, classifier."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


class FcaFormerDense(nn.Module):
    """The windowed backbone of the authors' detectors and segmenters: (B, 3, H, W) -> four maps.

    The maps have strides 4, 8, 16 and 32, each after a 1x1 convolution without bias and a channel norm. The
    windows are the grids of classification at 224 px, whose weights fit without resampling; at 224 px the
    stages compute the same as there. Like timm's feature extractors it has `feature_info` and returns a list.

    Args:
        in_chans: channels of the image.
        out_channels: channels of the four maps; None keeps each stage's width and leaves out the
            convolutions.
        window_size: attention windows of the two transformer stages.
        max_sources: a block reads the cross tokens of at most this many earlier blocks; None: of all.
        init_values: initial layer scale.
        kwargs: `embed_dims`, `depths`, `num_heads`, `mlp_ratio`, `drop_path_rate` of `FcaFormer`.
    """

    def __init__(
        self,
        in_chans: int = 3,
        out_channels: Sequence[int] | None = (96, 192, 384, 768),
        window_size: Sequence[int] = (14, 7),
        max_sources: int | None = None,
        init_values: float = 1.0,
        device=None,
        dtype=None,
        **kwargs: Any,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        trunk = FcaFormer(
            in_chans=in_chans,
            num_classes=0,
            window_size=window_size,
            max_sources=max_sources,
            init_values=init_values,
            **dd,
            **kwargs,
        )
        self.in_chans = in_chans
        self.stem = trunk.stem
        self.stages = trunk.stages
        widths = [info["num_chs"] for info in trunk.feature_info]
        channels = widths if out_channels is None else list(out_channels)
        if len(channels) != len(widths):
            raise ValueError(f"out_channels={channels} needs {len(widths)} entries: pass one for each stage")
        self.laterals = nn.ModuleList(
            nn.Identity() if out_channels is None else nn.Conv2d(i, o, 1, bias=False, **dd)
            for i, o in zip(widths, channels, strict=True)
        )
        self.norms = nn.ModuleList(LayerNorm2d(c, eps=1e-6, **dd) for c in channels)
        maps = [dict(info, num_chs=c) for info, c in zip(trunk.feature_info, channels, strict=True)]
        self.feature_info = FeatureInfo(maps, tuple(range(len(maps))))
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """As in `FcaFormer`."""
        self.apply(init_weights)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in_chans, H, W) -> maps (B, out_channels[k], ceil(H / 2**(k+2)), ceil(W / 2**(k+2)))."""
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        maps: list[Tensor] = []
        for stage, lateral, norm in zip(self.stages, self.laterals, self.norms):
            x = stage(x)
            maps.append(norm(lateral(x)))
        return maps


# Official names -> zoo's. A stage's downsampling belongs to the next stage here.
_OFFICIAL_BLOCK_NAMES = {
    "gamma": "ls.gamma",
    "dwconv": "conv_dw",
    "pwconv1": "mlp.fc1",
    "pwconv2": "mlp.fc2",
    "gamma_1": "ls1.gamma",
    "gamma_2": "ls2.gamma",
    "attention_biases": "attn.offset_bias",
    "s_token_bias": "attn.cross_bias",
    "s_scale_factors": "attn.cross_scale",
    "s_norm": "attn.cross_norm",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "dw_conv": "merge_conv",
    "c": "conv",
}


def block_name(official: str) -> str:
    """zoo's name of a block's entry: "mlp.norm.weight" -> "norm3.weight"."""
    if official.startswith("mlp.norm."):
        return official.replace("mlp.norm.", "norm3.")
    return ".".join(_OFFICIAL_BLOCK_NAMES.get(part, part) for part in official.split("."))


def zoo_name(official: str) -> str:
    """zoo's name of an entry of an official checkpoint; names of zoo's own pass unchanged."""
    match official.split("."):
        case ["patch_embed", "seq", index, *rest]:
            return ".".join(["stem", {"0": "conv1", "2": "conv2"}.get(index, index), block_name(".".join(rest))])
        case [stage, "blocks", index, *rest] if stage.startswith("layer_"):
            return f"stages.{stage[6:]}.blocks.{index}.{block_name('.'.join(rest))}"
        case [stage, "downsample", conv, *rest] if stage.startswith("layer_"):
            return f"stages.{int(stage[6:]) + 1}.downsample.{conv}.{block_name('.'.join(rest))}"
        case ["norm_head", *rest]:
            return ".".join(["head.norm", *rest])
        case ["head", "weight" | "bias" as kind]:
            return f"head.fc.{kind}"
        case [name, kind] if name[:-1] == "head" and name[-1].isdigit():
            return f"laterals.{name[-1]}.{kind}"
        case [name, kind] if name[:-1] == "norm" and name[-1].isdigit():
            return f"norms.{name[-1]}.{kind}"
    return official


@checkpoint_converter(
    FcaFormer,
    FcaFormerDense,
    layouts={"FcaFormer": ("patch_embed.seq.0.c.weight", "layer_2.blocks.0.attention_biases")},
)
def convert_checkpoint(state_dict: StateDict, model: nn.Module) -> Conversion:
    """Official classifiers and dense backbones, of any image size, and zoo's own files."""
    official = any(name.startswith("patch_embed.seq.") for name in state_dict)
    state = {zoo_name(name): value for name, value in state_dict.items()}
    notes = []
    if isinstance(model, FcaFormerDense) and (dropped := [name for name in state if name.startswith("head.")]):
        state = {name: value for name, value in state.items() if name not in dropped}
        notes.append(f"the classifier of the file was left out ({len(dropped)} entries)")
    resampled = 0
    for i, stage in enumerate(model.stages):
        if isinstance(stage, CrossStage):
            prefix, grid = f"stages.{i}.blocks.", tuple(stage.blocks[0].attn.offset_bias.shape[1:])
            if official:
                _unflatten_tables(state, prefix, grid)
            resampled += _resample_tables(state, prefix, grid)
    if resampled:
        notes.append(f"{resampled} position tables were resampled to the model's size")
    return Conversion(state, "FcaFormer" if official else "zoo", tuple(notes))


def _tables(state: StateDict, prefix: str) -> list[str]:
    leaves = ("attn.offset_bias", "attn.cross_bias", "attn.cross_scale")
    return [name for name in state if name.startswith(prefix) and name.endswith(leaves)]


def _unflatten_tables(state: StateDict, prefix: str, grid: tuple[int, int]) -> None:
    """Give a stage's official tables, (n, N), (1, n, 1, K) and (1, K, 1), the axes of their maps."""
    first = state.get(f"{prefix}0.attn.offset_bias")
    if first is None:
        return
    second = state.get(f"{prefix}1.attn.cross_scale")
    h, w = _source_grid(first.shape[-1], None if second is None else second.numel(), grid)
    merged = merged_size(h, w)
    for name in _tables(state, prefix):
        table = state[name]
        if name.endswith("offset_bias"):
            shape = (table.shape[0], h, w)
        elif name.endswith("cross_bias"):
            shape = (table.shape[1], -1, *merged)
        else:
            shape = (-1, *merged)
        if table.numel() % math.prod(n for n in shape if n > 0) == 0:
            state[name] = table.reshape(shape)


def _source_grid(tokens: int, merged: int | None, grid: tuple[int, int]) -> tuple[int, int]:
    """The (h, w) of a table of `tokens` entries whose source blocks give `merged` cross tokens each.

    The model's own `grid` if it fits, otherwise the squarest that does, turned like the model's.
    """

    def fits(h: int, w: int) -> bool:
        return h * w == tokens and (merged is None or math.prod(merged_size(h, w)) == merged)

    if fits(*grid):
        return grid
    candidates = [(h, tokens // h) for h in range(1, tokens + 1) if fits(h, tokens // h)]
    if not candidates:
        raise CheckpointError(
            f"attention_biases of {tokens} entries and {merged} cross tokens a block fit no map size: "
            "pass an official FcaFormer file, or a zoo file whose tables have their map's axes"
        )
    return min(candidates, key=lambda s: (max(s) / min(s), (s[0] > s[1]) != (grid[0] > grid[1])))


def _resample_tables(state: StateDict, prefix: str, grid: tuple[int, int]) -> int:
    """Resample a stage's tables to the model's map size; returns how many were of another size."""
    resampled = 0
    for name in _tables(state, prefix):
        table, leaf = state[name], name.rsplit(".", 1)[-1]
        size = grid if leaf == "offset_bias" else merged_size(*grid)
        if table.ndim >= 3 and tuple(table.shape[-2:]) != size:
            state[name] = resize_table(leaf, table, *grid)
            resampled += 1
    return resampled


def _cfg(**fields: Any) -> dict[str, Any]:
    return pretrained_cfg(
        first_conv="stem.conv1.conv",
        classifier="head.fc",
        origin_url="https://github.com/hkzhang-git/FcaFormer",
        paper_ids="arXiv:2211.07198",
        **fields,
    )


default_cfgs = generate_default_cfgs(
    {
        "fcaformer_l1.in1k": _cfg(),
        "fcaformer_l2.in1k": _cfg(),
        "fcaformer_l3.in1k": _cfg(),
        "fcaformer_l4.in1k": _cfg(),
    }
)

VARIANTS: dict[str, dict[str, Any]] = {
    "fcaformer_l1": dict(embed_dims=(64, 128, 192, 320), depths=(2, 2, 6, 2), num_heads=(0, 0, 6, 10)),
    "fcaformer_l2": dict(embed_dims=(96, 192, 320, 480), depths=(2, 2, 7, 2), num_heads=(0, 0, 10, 15)),
    "fcaformer_l3": dict(embed_dims=(96, 192, 320, 512), depths=(3, 6, 12, 3), num_heads=(0, 0, 10, 16)),
    "fcaformer_l4": dict(embed_dims=(128, 256, 512, 768), depths=(3, 6, 12, 3), num_heads=(0, 0, 16, 24)),
}


def fcaformer_dense(variant: str = "fcaformer_l2", **kwargs: Any) -> FcaFormerDense:
    """The dense backbone of a variant; `kwargs` are those of `FcaFormerDense`.

    The authors' detection and segmentation configurations are "fcaformer_l2" with the default output channels.
    Weights of a classifier fit every variant with `zoo.load_checkpoint(model, path, strict=False)`, which leaves
    the 1x1 convolutions and norms of the outputs as they are.

    Raises:
        ValueError: there is no such variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"{variant!r} is no FcaFormer variant: pass one of {', '.join(VARIANTS)}")
    return FcaFormerDense(**VARIANTS[variant] | kwargs)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> FcaFormer:
    feature_cfg = dict(out_indices=kwargs.pop("out_indices", (0, 1, 2, 3)), flatten_sequential=True)
    arguments = VARIANTS[variant] | kwargs
    return build_model(FcaFormer, variant, pretrained, feature_cfg=feature_cfg, **arguments)


@register_model
def fcaformer_l1(pretrained: bool = False, **kwargs: Any) -> FcaFormer:
    """FcaFormer-L1: 6,187,560 parameters, 1.374 G multiply-adds at 224 px; trained with drop path 0.0."""
    return _create("fcaformer_l1", pretrained, **kwargs)


@register_model
def fcaformer_l2(pretrained: bool = False, **kwargs: Any) -> FcaFormer:
    """FcaFormer-L2: 16,275,870 parameters, 3.602 G multiply-adds at 224 px; trained with drop path 0.1."""
    return _create("fcaformer_l2", pretrained, **kwargs)


@register_model
def fcaformer_l3(pretrained: bool = False, **kwargs: Any) -> FcaFormer:
    """FcaFormer-L3: 27,894,484 parameters, 6.651 G multiply-adds at 224 px; trained with drop path 0.2."""
    return _create("fcaformer_l3", pretrained, **kwargs)


@register_model
def fcaformer_l4(pretrained: bool = False, **kwargs: Any) -> FcaFormer:
    """FcaFormer-L4: 65,638,204 parameters, 14.492 G multiply-adds at 224 px; trained with drop path 0.4."""
    return _create("fcaformer_l4", pretrained, **kwargs)
