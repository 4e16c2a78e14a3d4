"""PoolFormer and the MetaFormer baselines: what mixes the tokens hardly matters.

A block is `x + mixer(norm(x))`, then `x + mlp(norm(x))`, in four stages at strides 4, 8, 16 and 32. The
evidence: average pooling (PoolFormer), nothing (IdentityFormer) or a frozen random matrix (RandFormer) for a
mixer already classify well. Papers: "MetaFormer Is Actually What You Need for Vision" (arXiv 2111.11418, here
"v1") and "MetaFormer Baselines for Vision" (arXiv 2210.13452, "v2").

timm has the network and, under its own names, `poolformer_*`, `poolformerv2_*`, `convformer_*` and
`caformer_*`. This file adds what timm lacks and takes over none of its names:

- `poolformerv1_*`: PoolFormer with the official head. timm pools first and normalises the pooled vector; the
  authors normalise the map (GroupNorm(1), eps 1e-5) and then pool, which gives other logits (0.05 to 0.2 std).
- `identityformer_*`, `randformer_*`, and v1's ablations `metaformer_*`.
- `dense=True`: v1's mode for detection and segmentation, four maps with a norm each.
- `load_checkpoint` for the official files of all of them, into timm's models too.

Differs from the official code: any number of input channels; position maps are resampled to other image
sizes; on CPU the pooling models run channels-last inside, where pooling is many times faster.
"""

from __future__ import annotations

import re
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import GroupNorm1, LayerNorm2d, Mlp, to_2tuple
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models.metaformer import (
    Attention,
    Downsampling,
    MetaFormer,
    MlpHead,
    Pooling,
    Scale,
    StarReLU,
    Stem,
)
from torch import Tensor, nn

from zoo._timm import feature_take_indices, update_model_input_size
from zoo.builder import build_model, pretrained_cfg
from zoo.checkpoint import Conversion, StateDict, checkpoint_converter
from zoo.metaformer_layers import (
    BiasedAttention,
    ChannelsLastStem,
    ImageSize,
    MapNorm,
    PositionedDownsampling,
    RandomMixing,
    SpatialFc,
    resample_position_map,
    stage_grid,
    use_accurate_map_norms,
)

# ---- models

# modules of one convolution each, in front of a stage
_BETWEEN_STAGES = (Stem, ChannelsLastStem, Downsampling, PositionedDownsampling)


class OfficialMetaFormer(MetaFormer):
    """timm's network with what zoo's models add: layer groups, complete initialisation, head dropout.

    `default_conv_init`: the convolutions between stages keep PyTorch's initialisation, as in v1's code; all
    other convolutions and linear layers are truncated normal (std 0.02) with zero biases.
    """

    default_conv_init = False

    def _init_weights(self, module: nn.Module) -> None:
        # called on children before their parents (nn.Module.apply)
        super()._init_weights(module)
        if self.default_conv_init and isinstance(
            module, (Stem, ChannelsLastStem, Downsampling, PositionedDownsampling)
        ):
            module.conv.reset_parameters()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise every parameter anew, also after `to_empty()`."""
        for module in self.modules():
            if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
                nn.init.ones_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, StarReLU):
                nn.init.ones_(module.scale)
                nn.init.zeros_(module.bias)
            elif isinstance(module, RandomMixing):
                module.reset_parameters()
            elif isinstance(module, PositionedDownsampling):
                nn.init.zeros_(module.pos_embed)
        for index, stage in enumerate(self.stages):
            for name, module in stage.named_modules():
                if isinstance(module, Scale):
                    values = self.layer_scale_inits if "layer_scale" in name else self.res_scale_inits
                    nn.init.constant_(module.scale, values[index])
        self.apply(self._init_weights)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that order parameters by depth, for layer-wise learning rates."""
        if coarse:
            blocks: Any = r"^stages\.(\d+)"
        else:
            blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return dict(stem=r"^stem", blocks=blocks)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Nothing beyond timm's rule for vectors and scalars, which is what the official recipes use."""
        return set()


def set_head_dropout(model: MetaFormer, rate: float) -> None:
    """Set the papers' head dropout, which timm's constructor cannot reach, on a (timm or zoo) MetaFormer.

    In the MLP head of ConvFormer and CAFormer it acts between the norm and the last linear layer, elsewhere
    before the classifier. `reset_classifier` builds a new head, without dropout in its MLP.

    Raises:
        ValueError: `rate` is not in [0, 1).
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"head dropout is {rate}, expected a rate in [0, 1): pass 0 to turn it off")
    drop = model.head.fc.head_drop if isinstance(model.head.fc, MlpHead) else model.head.drop
    drop.p = rate


class IdentityFormer(OfficialMetaFormer):
    """v2's baseline without token mixing: each half block still adds `norm1(x)`.

    Args:
        in_chans: input channels.
        num_classes: classes; 0 for none.
        global_pool: pooling of the head.
        depths: blocks a stage.
        dims: channels a stage.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
        proj_drop_rate: dropout in the MLPs.
        drop_rate: dropout before the classifier.
        head_dropout: the papers' name of `drop_rate`; used if not 0.
        layer_scale_init_values: initial layer scale, one for all or one a stage; None for no layer scale.
        res_scale_init_values: initial scale of the residual branch a stage; None for no such scale.
        device: where the parameters live.
        dtype: their type.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (64, 128, 320, 512),
        drop_path_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_rate: float = 0.0,
        head_dropout: float = 0.0,
        layer_scale_init_values: float | Sequence[float | None] | None = None,
        res_scale_init_values: float | Sequence[float | None] | None = (None, None, 1.0, 1.0),
        device=None,
        dtype=None,
    ):
        super().__init__(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            depths=list(depths),
            dims=list(dims),
            token_mixers=nn.Identity,
            drop_path_rate=drop_path_rate,
            proj_drop_rate=proj_drop_rate,
            drop_rate=head_dropout or drop_rate,
            layer_scale_init_values=layer_scale_init_values,
            res_scale_init_values=res_scale_init_values,
            norm_layers=partial(MapNorm, eps=1e-6, bias=False),
            use_mlp_head=False,
            device=device,
            dtype=dtype,
        )
        self.layer_scale_inits = _per_stage(layer_scale_init_values, len(dims))
        self.res_scale_inits = _per_stage(res_scale_init_values, len(dims))


class RandFormer(IdentityFormer):
    """v2's baseline whose last stages mix tokens with frozen random matrices.

    Args:
        random_stages: stages (0 to 3) with a random matrix; the others have none.
        img_size: image size that the matrices are made for, (height, width) or one number for both; other sizes
            are refused, since resampling a random matrix has no meaning.
        kwargs: those of `IdentityFormer`.
    """

    def __init__(self, random_stages: Sequence[int] = (2, 3), img_size: ImageSize = 224, **kwargs):
        super().__init__(**kwargs)
        dd = dict(device=kwargs.get("device"), dtype=kwargs.get("dtype"))
        self.img_size = to_2tuple(img_size)
        for stage in random_stages:
            for block in self.stages[stage].blocks:
                block.token_mixer = RandomMixing(self.img_size, stage_grid(self.img_size, stage), **dd)


def _per_stage(value, stages: int) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value] * stages


class PoolFormer(OfficialMetaFormer):
    """PoolFormer (v1) as published: the final norm acts on the map, before pooling.

    Entries are named as in timm's `poolformer_*`, so files of timm's models load as well as the official ones.

    Args:
        in_chans: input channels.
        num_classes: classes; 0 for none.
        global_pool: pooling of the head.
        depths: blocks a stage.
        dims: channels a stage.
        token_mixers: mixer class, one for all or one a stage. `Pooling` and `nn.Identity` take any image size.
        pool_size: side of the pooling window, odd.
        mlp_ratios: hidden width of the MLPs over their input's, one for all or one a stage.
        channel_norm: LayerNorm over the channels of each position (eps 1e-5) instead of GroupNorm(1) everywhere.
        use_layer_scale: scale each branch by a learned vector.
        layer_scale_init_value: its initial value.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
        proj_drop_rate: dropout in the MLPs (the official `drop_rate`).
        drop_rate: dropout before the classifier.
        head_dropout: v2's name of `drop_rate`; used if not 0.
        device: where the parameters live.
        dtype: their type.
    """

    default_conv_init = True

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (64, 128, 320, 512),
        token_mixers: type[nn.Module] | Sequence[type[nn.Module]] = Pooling,
        pool_size: int = 3,
        mlp_ratios: float | Sequence[float] = 4.0,
        channel_norm: bool = False,
        use_layer_scale: bool = True,
        layer_scale_init_value: float = 1e-5,
        drop_path_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_rate: float = 0.0,
        head_dropout: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = dict(device=device, dtype=dtype)
        mixers = _per_stage(token_mixers, len(dims))
        attends = [issubclass(mixer, Attention) for mixer in mixers]
        if pool_size % 2 == 0:
            raise ValueError(f"pool_size is {pool_size}, expected an odd number: an even window changes the map's size")
        if any(attends) and not channel_norm:
            raise ValueError("a model with attention needs a norm per position: pass channel_norm=True")
        group_norm, map_norm = partial(MapNorm, eps=1e-5), partial(LayerNorm2d, eps=1e-5)
        token_norm = partial(nn.LayerNorm, eps=1e-5)
        super().__init__(
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            depths=list(depths),
            dims=list(dims),
            token_mixers=mixers,
            mlp_act=nn.GELU,
            mlp_bias=True,
            drop_path_rate=drop_path_rate,
            proj_drop_rate=proj_drop_rate,
            drop_rate=head_dropout or drop_rate,
            layer_scale_init_values=layer_scale_init_value if use_layer_scale else None,
            res_scale_init_values=None,
            downsample_norm=None,
            norm_layers=[(token_norm if a else map_norm) if channel_norm else group_norm for a in attends],
            output_norm=map_norm if channel_norm else group_norm,
            use_mlp_head=False,
            **dict(pool_size=pool_size) if Pooling in mixers else {},
            **dd,
        )
        self.stem = ChannelsLastStem(self.stem)
        self.layer_scale_inits = [layer_scale_init_value] * len(dims)
        self.res_scale_inits = [None] * len(dims)
        for stage, ratio in zip(self.stages, _per_stage(mlp_ratios, len(dims)), strict=True):
            if ratio != 4:  # timm's blocks know this one ratio
                for block in stage.blocks:
                    width = block.mlp.fc1.weight.shape[1]
                    mlp = Mlp(width, int(width * ratio), drop=proj_drop_rate, use_conv=stage.use_nchw, **dd)
                    block.mlp = mlp.apply(self._init_weights)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Norm on the map, pooling, classifier: (B, C, H, W) -> (B, num_classes)."""
        x = self.head.norm(x)
        x = self.head.global_pool(x)
        x = self.head.flatten(x)
        x = self.head.drop(x)
        return x if pre_logits else self.head.fc(x)


class SpatialFcPoolFormer(PoolFormer):
    """v1's ablations that mix with spatial FCs in some stages.

    Args:
        fc_stages: stages (0 to 3) with a spatial FC; their entry of `token_mixers` is not used.
        img_size: image size of the FCs, (height, width) or one number for both; others are refused.
        kwargs: those of `PoolFormer`.
    """

    def __init__(self, fc_stages: Sequence[int] = (), img_size: ImageSize = 224, **kwargs):
        super().__init__(**kwargs)
        dd = dict(device=kwargs.get("device"), dtype=kwargs.get("dtype"))
        self.img_size = to_2tuple(img_size)
        for stage in fc_stages:
            for block in self.stages[stage].blocks:
                mixer = SpatialFc(self.img_size, stage_grid(self.img_size, stage), **dd)
                block.token_mixer = mixer.apply(self._init_weights)


class AttentionPoolFormer(PoolFormer):
    """v1's ablations with attention in the last stages, and a learned position map.

    Args:
        position_stage: stage (1 to 3) in front of which the map is added; None for no map.
        img_size: image size of the map, (height, width) or one number for both; for other images it is resampled.
        kwargs: those of `PoolFormer`.
    """

    def __init__(self, position_stage: int | None = None, img_size: ImageSize = 224, **kwargs):
        super().__init__(**kwargs | dict(channel_norm=True))
        dd = dict(device=kwargs.get("device"), dtype=kwargs.get("dtype"))
        self.img_size = to_2tuple(img_size)
        self.position_stage = position_stage
        if position_stage is not None:
            entry = self.stages[position_stage]
            grid = stage_grid(self.img_size, position_stage)
            entry.downsample = PositionedDownsampling(entry.downsample, grid, **dd)

    @torch.jit.ignore
    def set_input_size(self, img_size: ImageSize | None = None) -> None:
        """Resample the position map to another image size, in place."""
        if img_size is None or to_2tuple(img_size) == self.img_size:
            return
        self.img_size = to_2tuple(img_size)
        if self.position_stage is not None and self.position_stage < len(self.stages):
            entry = self.stages[self.position_stage].downsample
            grid = stage_grid(self.img_size, self.position_stage)
            resampled = resample_position_map(entry.pos_embed.detach(), *grid)
            entry.pos_embed = nn.Parameter(resampled, requires_grad=entry.pos_embed.requires_grad)
        update_model_input_size(self, self.img_size)


class DensePoolFormer(PoolFormer):
    """PoolFormer for dense prediction: the maps of all four stages, each after a GroupNorm(1) of its own.

    `forward` returns the list of the normed maps. There is no final norm and no classifier, and ImageNet files
    do not have the four norms. `features_only=True` gives the same maps at chosen levels.

    Args:
        norm_levels: levels with a norm; the maps of the others are raw. The official code leaves level 0 out for
            detectors that do not use stride 4 (its environment variable FORK_LAST3): `norm_levels=(1, 2, 3)`.
        kwargs: those of `PoolFormer`.
    """

    def __init__(self, norm_levels: Sequence[int] = (0, 1, 2, 3), **kwargs):
        super().__init__(**kwargs | dict(num_classes=0, global_pool=""))
        dd = dict(device=kwargs.get("device"), dtype=kwargs.get("dtype"))
        norm = partial(LayerNorm2d if kwargs.get("channel_norm") else MapNorm, eps=1e-5)
        self.head.norm = nn.Identity()
        self.out_norms = nn.ModuleList(
            norm(info["num_chs"], **dd) if level in norm_levels else nn.Identity()
            for level, info in enumerate(self.feature_info)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> four maps, at strides 4, 8, 16 and 32."""
        maps = []
        x = self.stem(x)
        for stage, norm in zip(self.stages, self.out_norms):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(stage, x)
            else:
                x = stage(x)
            maps.append(norm(x))
        return maps

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """As timm's; with `norm` each map goes through the norm of its level."""
        final, maps = super().forward_intermediates(x, indices, False, stop_early, output_fmt)
        if norm:
            levels, _ = feature_take_indices(len(self.stages), indices)
            maps = [self.out_norms[level](each) for level, each in zip(sorted(levels), maps, strict=True)]
        return maps if intermediates_only else (final, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As timm's; norms of levels that are not taken go too."""
        levels = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        self.out_norms = self.out_norms[: len(self.stages)]
        for level in range(len(self.stages)):
            if prune_norm or level not in levels:
                self.out_norms[level] = nn.Identity()
        return levels


# ---- checkpoint layouts


@checkpoint_converter(
    MetaFormer,
    layouts={
        "PoolFormer": ("patch_embed.proj.weight", "network.0.0.mlp.fc1.weight"),
        "MetaFormer baselines": ("downsample_layers.0.conv.weight", "stages.0.0.mlp.fc1.weight"),
    },
)
def convert_checkpoint(state_dict: StateDict, model: nn.Module) -> Conversion:
    """Entries of an official file (v1, its ablations and dense mode; v2) or of timm's under timm's names.

    A file does not say what mixes the tokens where the mixer has no weights: `metaformer_id_s12` and
    `poolformer_s12` have the same entries, and so have `identityformer_*` and `poolformerv2_*`. The model decides.

    A model of timm's own class gets the official head with official weights: v2's MLP head has eps 1e-5 (timm
    1e-6), v1 normalises before pooling (timm after). That happens when the weights are in.
    """
    layout, state = rename_official(state_dict)
    own = model.state_dict()
    notes: list[str] = []
    for name, value in state.items():
        if name in own and value.shape != own[name].shape:
            state[name] = _fit(name, value, own[name], notes)
    if isinstance(model, DensePoolFormer) and any(name.startswith("head.") for name in state):
        _use_as_dense(state, own, notes)
    if layout != "timm":
        if not any(".token_mixer." in name for name in state):
            mixers = {type(block.token_mixer).__name__ for stage in model.stages for block in stage.blocks}
            notes.append(f"the file does not say what mixes the tokens, the model does: {' and '.join(sorted(mixers))}")
        if not isinstance(model, OfficialMetaFormer):
            _become_official(model, layout, state, notes)
    return Conversion(state, layout, tuple(notes))


def rename_official(state_dict: StateDict) -> tuple[str, StateDict]:
    """The layout that entries are named in, and the same entries, in the same order, under timm's names."""
    if any(name.startswith("network.") for name in state_dict):
        return "PoolFormer", _rename_v1(state_dict)
    if any(name.startswith("downsample_layers.") for name in state_dict):
        return "MetaFormer baselines", _rename_v2(state_dict)
    return "timm", dict(state_dict)


def _rename_v1(state_dict: StateDict) -> StateDict:
    # network.N is, in order of N: the blocks of a stage, a downsampling, or a position map
    entries = sorted({int(name.split(".")[1]) for name in state_dict if name.startswith("network.")})
    stage, prefixes = 0, {}
    for entry in entries:
        if f"network.{entry}.proj.weight" in state_dict:
            stage += 1
            prefixes[f"network.{entry}.proj."] = f"stages.{stage}.downsample.conv."
        elif f"network.{entry}.pos_embed" in state_dict:
            prefixes[f"network.{entry}.pos_embed"] = f"stages.{stage}.downsample.pos_embed"
        else:
            prefixes[f"network.{entry}."] = f"stages.{stage}.blocks."
    prefixes |= {"patch_embed.proj.": "stem.conv.", "norm.": "head.norm.", "head.": "head.fc."}
    prefixes |= {f"norm{2 * level}.": f"out_norms.{level}." for level in range(4)}
    renamed = {}
    for name, value in state_dict.items():
        prefix = next((p for p in prefixes if name.startswith(p)), "")
        new = prefixes.get(prefix, "") + name[len(prefix) :]
        renamed[re.sub(r"layer_scale_([12])$", r"layer_scale\1.scale", new)] = value
    return renamed


_V2_NAMES = (
    (r"^downsample_layers\.0\.post_norm\.", "stem.norm."),
    (r"^downsample_layers\.0\.conv\.", "stem.conv."),
    (r"^downsample_layers\.(\d+)\.pre_norm\.", r"stages.\1.downsample.norm."),
    (r"^downsample_layers\.(\d+)\.conv\.", r"stages.\1.downsample.conv."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^norm\.", "head.norm."),
    (r"^head\.", "head.fc."),
)


def _rename_v2(state_dict: StateDict) -> StateDict:
    renamed = {}
    for name, value in state_dict.items():
        pattern, new = next((rule for rule in _V2_NAMES if re.match(rule[0], name)), ("", ""))
        renamed[re.sub(pattern, new, name, count=1)] = value
    return renamed


def _fit(name: str, value: Tensor, own: Tensor, notes: list[str]) -> Tensor:
    """A linear weight as a 1x1 convolution or back, and position maps at the model's size."""
    if value.numel() == own.numel() and value.squeeze().shape == own.squeeze().shape:
        return value.reshape(own.shape)
    if name.endswith("downsample.pos_embed") and value.ndim == 4 and value.shape[1] == own.shape[1]:
        there, here = ("x".join(map(str, t.shape[2:])) for t in (value, own))
        notes.append(f"the position map was resampled from {there} to {here}")
        return resample_position_map(value, *own.shape[2:])
    return value


def _use_as_dense(state: StateDict, own: StateDict, notes: list[str]) -> None:
    for name in [name for name in state if name.startswith("head.")]:
        del state[name]
    fresh = [name for name in own if name.startswith("out_norms.") and name not in state]
    state.update({name: own[name] for name in fresh})
    notes.append("an ImageNet file has no norms of the output maps: those of the model stay as they are")


@dataclass
class _OnLoad:
    """What a load of official weights changes in a model of timm's own class, once they are in.

    `load_checkpoint` may still refuse the file or rebuild the classifier after the conversion.
    """

    changes: tuple[Callable[[MetaFormer], Any], ...]
    final_norm: Tensor

    def __call__(self, model: MetaFormer, _incompatible: Any) -> None:
        handle = _pending.pop(model, None)
        if handle is None:  # a copy of the model
            return
        handle.remove()
        weight = getattr(model.head.norm, "weight", None)
        if weight is not None and torch.equal(weight, self.final_norm.to(weight)):  # not another file's
            for change in self.changes:
                change(model)


_pending: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()  # the hooks that wait


def become_official(model: MetaFormer, layout: str) -> None:
    """Give a model of timm's own class the head and norms of the official code, which wrote the weights in it.

    Loading an official file does this by itself; a file converted from one does not say so in its entries.
    """
    if isinstance(model, OfficialMetaFormer) or layout == "timm":
        return
    use_accurate_map_norms(model)
    if layout == "PoolFormer":
        norm_before_pooling(model)
    if hasattr(model.head, "fc"):
        _official_mlp_head(model)


def _become_official(model: MetaFormer, layout: str, state: StateDict, notes: list[str]) -> None:
    changes: list[Callable[[MetaFormer], Any]] = [use_accurate_map_norms]
    if layout == "PoolFormer":
        changes.append(norm_before_pooling)
        notes.append(
            "the head now normalises the map before pooling, as the official code does (timm pools first); "
            "reset_classifier(n, global_pool=...) goes back to timm's order, zoo's poolformerv1_* models keep it"
        )
    if "head.fc.norm.weight" in state:
        changes.append(_official_mlp_head)
        notes.append("head.fc.norm.eps was set to 1e-5, the official value (timm's is 1e-6)")
    if any(isinstance(module, GroupNorm1) for module in model.stages.modules()):
        notes.append("the norms of the blocks were replaced by ones that stay accurate in channels-last order")
    if model in _pending:
        _pending.pop(model).remove()
    if "head.norm.weight" in state:
        hook = _OnLoad(tuple(changes), state["head.norm.weight"])
        _pending[model] = model.register_load_state_dict_post_hook(hook)


def _official_mlp_head(model: MetaFormer) -> None:
    if isinstance(model.head.fc, MlpHead):
        model.head.fc.norm.eps = 1e-5


def norm_before_pooling(model: MetaFormer) -> None:
    """Give a timm `poolformer_*` the official head in place: GroupNorm(1, eps 1e-5) on the map, then pooling.

    The names of the entries stay the same. `reset_classifier` keeps the new order unless it is asked for another
    `global_pool`, which brings timm's order back.
    """
    head = model.head
    if isinstance(head.norm, GroupNorm1):
        return
    norm = MapNorm(model.num_features, eps=1e-5, device=head.norm.weight.device, dtype=head.norm.weight.dtype)
    norm.weight, norm.bias = head.norm.weight, head.norm.bias
    modules = OrderedDict(global_pool=nn.Identity(), norm=norm, flatten=nn.Sequential(head.global_pool, head.flatten))
    for name, module in modules.items():
        setattr(head, name, module.train(head.training))


# ---- variants

_LAYOUTS = {
    "s12": dict(depths=(2, 2, 6, 2), dims=(64, 128, 320, 512)),
    "s24": dict(depths=(4, 4, 12, 4), dims=(64, 128, 320, 512)),
    "s36": dict(depths=(6, 6, 18, 6), dims=(64, 128, 320, 512)),
    "m36": dict(depths=(6, 6, 18, 6), dims=(96, 192, 384, 768)),
    "m48": dict(depths=(8, 8, 24, 8), dims=(96, 192, 384, 768)),
}


def _create(model_class: type[nn.Module], variant: str, pretrained: bool, **kwargs) -> nn.Module:
    out_indices = kwargs.pop("out_indices", (0, 1, 2, 3))
    feature_cfg = dict(flatten_sequential=True, out_indices=out_indices)
    if model_class is DensePoolFormer:
        feature_cfg = dict(feature_cls="getter", norm=True, out_indices=out_indices)
    return build_model(model_class, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


def _poolformer(variant: str, pretrained: bool, size: str, dense: bool = False, **kwargs) -> PoolFormer:
    # v1's layer scale starts at 1e-5 in the two small models and at 1e-6 in the others
    defaults = dict(_LAYOUTS[size], layer_scale_init_value=1e-5 if size in ("s12", "s24") else 1e-6)
    return _create(DensePoolFormer if dense else PoolFormer, variant, pretrained, **defaults | kwargs)


def _cfg_v1(file: str, crop_pct: float, **fields) -> dict[str, Any]:
    return _cfg(
        f"https://github.com/sail-sg/poolformer/releases/download/v1.0/{file}.pth.tar",
        crop_pct=crop_pct,
        origin_url="https://github.com/sail-sg/poolformer",
        paper_ids="arXiv:2111.11418",
        **fields,
    )


def _cfg_v2(family: str, size: str, **fields) -> dict[str, Any]:
    return _cfg(
        f"https://huggingface.co/sail/dl/resolve/main/{family}/{family}_{size}.pth",
        crop_pct=1.0,
        origin_url="https://github.com/sail-sg/metaformer",
        paper_ids="arXiv:2210.13452",
        **fields,
    )


def _cfg(url: str, **fields) -> dict[str, Any]:
    return pretrained_cfg(url=url, first_conv="stem.conv", classifier="head.fc", license="apache-2.0", **fields)


default_cfgs = generate_default_cfgs(
    {f"poolformerv1_{s}.sail_in1k": _cfg_v1(f"poolformer_{s}", 0.95 if s[0] == "m" else 0.9) for s in _LAYOUTS}
    | {
        "metaformer_id_s12.sail_in1k": _cfg_v1("metaformer_id_s12", 0.9),
        "metaformer_pppa_s12_224.sail_in1k": _cfg_v1("metaformer_pppa_s12_224", 0.95),
        "metaformer_ppaa_s12_224.sail_in1k": _cfg_v1("metaformer_ppaa_s12_224", 0.95),
        "metaformer_pppf_s12_224.sail_in1k": _cfg_v1("metaformer_pppf_s12_224", 0.9, fixed_input_size=True),
        "metaformer_ppff_s12_224.sail_in1k": _cfg_v1("metaformer_ppff_s12_224", 0.95, fixed_input_size=True),
    }
    | {f"identityformer_{s}.sail_in1k": _cfg_v2("identityformer", s) for s in _LAYOUTS}
    | {f"randformer_{s}.sail_in1k": _cfg_v2("randformer", s, fixed_input_size=True) for s in _LAYOUTS}
)


@register_model
def poolformerv1_s12(pretrained: bool = False, **kwargs) -> PoolFormer:
    """PoolFormer-S12 with the official head, 11.9 M parameters, 1.82 G multiply-adds at 224 px."""
    return _poolformer("poolformerv1_s12", pretrained, "s12", **kwargs)


@register_model
def poolformerv1_s24(pretrained: bool = False, **kwargs) -> PoolFormer:
    """PoolFormer-S24 with the official head, 21.4 M parameters, 3.41 G multiply-adds at 224 px."""
    return _poolformer("poolformerv1_s24", pretrained, "s24", **kwargs)


@register_model
def poolformerv1_s36(pretrained: bool = False, **kwargs) -> PoolFormer:
    """PoolFormer-S36 with the official head, 30.9 M parameters, 5.00 G multiply-adds at 224 px."""
    return _poolformer("poolformerv1_s36", pretrained, "s36", **kwargs)


@register_model
def poolformerv1_m36(pretrained: bool = False, **kwargs) -> PoolFormer:
    """PoolFormer-M36 with the official head, 56.2 M parameters, 8.80 G multiply-adds at 224 px."""
    return _poolformer("poolformerv1_m36", pretrained, "m36", **kwargs)


@register_model
def poolformerv1_m48(pretrained: bool = False, **kwargs) -> PoolFormer:
    """PoolFormer-M48 with the official head, 73.5 M parameters, 11.59 G multiply-adds at 224 px."""
    return _poolformer("poolformerv1_m48", pretrained, "m48", **kwargs)


@register_model
def metaformer_id_s12(pretrained: bool = False, **kwargs) -> PoolFormer:
    """No token mixing (v1's ablation), 11.9 M parameters, 1.82 G multiply-adds at 224 px."""
    return _poolformer("metaformer_id_s12", pretrained, "s12", **dict(token_mixers=nn.Identity) | kwargs)


def _attention(variant: str, pretrained: bool, **kwargs) -> AttentionPoolFormer:
    return _create(AttentionPoolFormer, variant, pretrained, **_LAYOUTS["s12"] | kwargs)


def _spatial_fc(variant: str, pretrained: bool, **kwargs) -> SpatialFcPoolFormer:
    return _create(SpatialFcPoolFormer, variant, pretrained, **_LAYOUTS["s12"] | kwargs)


@register_model
def metaformer_pppa_s12_224(pretrained: bool = False, **kwargs) -> AttentionPoolFormer:
    """Pooling in three stages, then attention (v1's ablation), 14.0 M parameters, 1.92 G multiply-adds at 224 px."""
    args = dict(token_mixers=(Pooling, Pooling, Pooling, BiasedAttention), position_stage=3)
    return _attention("metaformer_pppa_s12_224", pretrained, **args | kwargs)


@register_model
def metaformer_ppaa_s12_224(pretrained: bool = False, **kwargs) -> AttentionPoolFormer:
    """Pooling in two stages, then attention (v1's ablation), 16.5 M parameters, 2.55 G multiply-adds at 224 px."""
    args = dict(token_mixers=(Pooling, Pooling, BiasedAttention, BiasedAttention), position_stage=2)
    return _attention("metaformer_ppaa_s12_224", pretrained, **args | kwargs)


@register_model
def metaformer_pppf_s12_224(pretrained: bool = False, **kwargs) -> SpatialFcPoolFormer:
    """Pooling in three stages, then spatial FC (v1's ablation), 11.9 M parameters, 1.83 G multiply-adds at 224 px."""
    return _spatial_fc("metaformer_pppf_s12_224", pretrained, **dict(fc_stages=(3,)) | kwargs)


@register_model
def metaformer_ppff_s12_224(pretrained: bool = False, **kwargs) -> SpatialFcPoolFormer:
    """Pooling in two stages, then spatial FC (v1's ablation), 12.2 M parameters, 1.90 G multiply-adds at 224 px."""
    return _spatial_fc("metaformer_ppff_s12_224", pretrained, **dict(fc_stages=(2, 3)) | kwargs)


@register_model
def identityformer_s12(pretrained: bool = False, **kwargs) -> IdentityFormer:
    """IdentityFormer-S12, 11.9 M parameters, 1.81 G multiply-adds at 224 px."""
    return _create(IdentityFormer, "identityformer_s12", pretrained, **_LAYOUTS["s12"] | kwargs)


@register_model
def identityformer_s24(pretrained: bool = False, **kwargs) -> IdentityFormer:
    """IdentityFormer-S24, 21.3 M parameters, 3.39 G multiply-adds at 224 px."""
    return _create(IdentityFormer, "identityformer_s24", pretrained, **_LAYOUTS["s24"] | kwargs)


@register_model
def identityformer_s36(pretrained: bool = False, **kwargs) -> IdentityFormer:
    """IdentityFormer-S36, 30.8 M parameters, 4.97 G multiply-adds at 224 px."""
    return _create(IdentityFormer, "identityformer_s36", pretrained, **_LAYOUTS["s36"] | kwargs)


@register_model
def identityformer_m36(pretrained: bool = False, **kwargs) -> IdentityFormer:
    """IdentityFormer-M36, 56.1 M parameters, 8.76 G multiply-adds at 224 px."""
    return _create(IdentityFormer, "identityformer_m36", pretrained, **_LAYOUTS["m36"] | kwargs)


@register_model
def identityformer_m48(pretrained: bool = False, **kwargs) -> IdentityFormer:
    """IdentityFormer-M48, 73.3 M parameters, 11.53 G multiply-adds at 224 px."""
    return _create(IdentityFormer, "identityformer_m48", pretrained, **_LAYOUTS["m48"] | kwargs)


@register_model
def randformer_s12(pretrained: bool = False, **kwargs) -> RandFormer:
    """RandFormer-S12, 12.1 M parameters (11.9 M trained), 1.89 G multiply-adds at 224 px."""
    return _create(RandFormer, "randformer_s12", pretrained, **_LAYOUTS["s12"] | kwargs)


@register_model
def randformer_s24(pretrained: bool = False, **kwargs) -> RandFormer:
    """RandFormer-S24, 21.8 M parameters (21.3 M trained), 3.54 G multiply-adds at 224 px."""
    return _create(RandFormer, "randformer_s24", pretrained, **_LAYOUTS["s24"] | kwargs)


@register_model
def randformer_s36(pretrained: bool = False, **kwargs) -> RandFormer:
    """RandFormer-S36, 31.5 M parameters (30.8 M trained), 5.20 G multiply-adds at 224 px."""
    return _create(RandFormer, "randformer_s36", pretrained, **_LAYOUTS["s36"] | kwargs)


@register_model
def randformer_m36(pretrained: bool = False, **kwargs) -> RandFormer:
    """RandFormer-M36, 56.8 M parameters (56.1 M trained), 9.04 G multiply-adds at 224 px."""
    return _create(RandFormer, "randformer_m36", pretrained, **_LAYOUTS["m36"] | kwargs)


@register_model
def randformer_m48(pretrained: bool = False, **kwargs) -> RandFormer:
    """RandFormer-M48, 74.3 M parameters (73.3 M trained), 11.90 G multiply-adds at 224 px."""
    return _create(RandFormer, "randformer_m48", pretrained, **_LAYOUTS["m48"] | kwargs)
