"""ViM2: selective scans over pixels and over channels, without attention or MLP (arXiv 2403.19888, version 1).

Four stages of two kinds of mixers. A token mixer scans the map in four directions (VMamba's SS2D); a channel
mixer scans the channels of each pixel in four orders. Each mixer reads a learned weighted sum of all earlier
outputs of its stage instead of the latest one alone.

This is a reading of the paper's first version (`READING`): the authors published neither code nor weights and
call that version preliminary. Where the text leaves things open (residuals, the parameters of the channel
mixer, the order of the mixers, the depth of stage 3 of S and B) the choice is the one that meets the printed
parameter counts best. Accuracies that the paper prints are context, not a promise.

Without channel mixers and averaging the same class is vanilla VMamba (arXiv 2401.10166, first version), whose
official checkpoints load and give the official numbers. Any input size works; maps of odd size are padded
before they are merged. The mixers are in `vim2_blocks.py`, the scans in `kernels/`.
"""

# without `from __future__ import annotations`: fx would write forward's types as strings that TorchScript refuses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.layers import ClassifierHead, calculate_drop_path_rates, get_device_dtype, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo._timm import feature_take_indices
from zoo.builder import build_model, pretrained_cfg
from zoo.checkpoint import Conversion, StateDict, checkpoint_converter
from zoo.vim2_blocks import (
    LN_EPS,
    Average,
    ChannelMixer,
    MixerBlock,
    PatchStem,
    Stage,
    TokenMixer,
    mixer_order,
    patch_merging,
    wide_mlp,
)

__all__ = ["ViM2"]

READING = (
    "a reading of the paper's first version, which its authors call preliminary: neither code nor weights are "
    "public, and residuals, channel mixers, the order of mixers and the depths of S and B are choices that meet "
    "the printed parameter counts"
)
ChannelMixerType = Literal["grouped", "dense", "mlp"]
_UNDECAYED = ("A_logs", "A_log", "Ds", "D", "dt_projs_bias", "dt_bias", "alpha", "beta", "conv_bias")
_UNDECAYED += ("in_x_bias", "in_z_bias", "out_bias")


class ViM2(nn.Module):
    """Vision MambaMixer: four stages of selective token and channel mixers.

    Args:
        in_chans: channels of the image.
        num_classes: 0 for pooled features.
        global_pool: "avg", "max", ... as in timm, or "" for maps (B, H, W, C).
        dims: width of each stage.
        token_depths: token mixers of each stage.
        channel_depths: channel mixers of each stage, spread evenly among the token mixers.
        channel_expand: width of each stage's channel mixers, in multiples of the stage's.
        channel_mixer: projections of the channel mixer, "grouped" or "dense", or "mlp" in its place.
        token_expand: width of the token mixers, in multiples of the stage's.
        d_state: states of the scans.
        conv_kernel: taps of the channel mixer's filter.
        averaging: mixers read a weighted sum of all earlier outputs of the stage, not the latest alone.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, growing linearly over all mixers.
    """

    output_fmt = "NHWC"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (96, 192, 384, 768),
        token_depths: Sequence[int] = (2, 2, 6, 2),
        channel_depths: Sequence[int] = (1, 1, 3, 1),
        channel_expand: Sequence[int] = (2, 2, 2, 1),
        channel_mixer: ChannelMixerType = "grouped",
        token_expand: float = 2.0,
        d_state: int = 16,
        conv_kernel: int = 3,
        averaging: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if not len(dims) == len(token_depths) == len(channel_depths) == len(channel_expand):
            raise ValueError(
                f"dims, token_depths, channel_depths and channel_expand have {len(dims)}, {len(token_depths)}, "
                f"{len(channel_depths)} and {len(channel_expand)} entries: pass one of each for every stage"
            )
        if channel_mixer not in ("grouped", "dense", "mlp"):
            raise ValueError(f"channel_mixer={channel_mixer!r} is unknown: pass 'grouped', 'dense' or 'mlp'")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = dims[-1]
        self.stem = PatchStem(in_chans, dims[0], **dd)
        rates = iter(calculate_drop_path_rates(drop_path_rate, sum(token_depths) + sum(channel_depths)))
        stages = []
        self.feature_info = []
        for i, (dim, expand) in enumerate(zip(dims, channel_expand, strict=True)):
            blocks = []
            seen = {True: 1, False: 1}  # the stage's input counts as an output of either kind
            latest = True
            for is_token in mixer_order(token_depths[i], channel_depths[i]):
                if is_token:
                    mixer = TokenMixer(dim, token_expand, d_state, **dd)
                elif channel_mixer == "mlp":
                    mixer = wide_mlp(dim, expand, **dd)
                else:
                    mixer = ChannelMixer(dim, expand, d_state, conv_kernel, channel_mixer == "dense", **dd)
                average = Average(seen[True], seen[False], latest, **dd) if averaging else None
                blocks.append(MixerBlock(dim, mixer, is_token, average, next(rates), **dd))
                seen[is_token] += 1
                latest = is_token
            downsample = patch_merging(dims[i - 1], dim, **dd) if i else nn.Identity()
            stages.append(Stage(downsample, blocks, averaging))
            self.feature_info.append(dict(num_chs=dim, reduction=4 * 2**i, module=f"stages.{i}"))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(self.num_features, eps=LN_EPS, **dd)
        self.head = ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt="NHWC", **dd
        )
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw all weights anew: truncated normal (std 0.02) for linear layers, and each scan's own start."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (TokenMixer, ChannelMixer)):
                module.reset_scan()
            elif isinstance(module, (nn.Conv2d, nn.LayerNorm, Average)):
                module.reset_parameters()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning rates."""
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return dict(stem=r"^stem", blocks=r"^stages\.(\d+)" if coarse else blocks)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Decay rates, skips, step sizes, averaging weights and biases of the scans."""
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in _UNDECAYED}

    @torch.jit.ignore
    def mixer_orders(self) -> list[list[bool]]:
        """The order of each stage's mixers, True for a token mixer."""
        return [[block.is_token for block in stage.blocks] for stage in self.stages]

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each mixer in the backward pass."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; 0 classes give pooled features, with `global_pool=""` maps (B, H, W, C)."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        self.head.reset(num_classes, global_pool, **get_device_dtype(self))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of the stages, strides 4 to 32, as NCHW; `norm` applies the final norm to the last stage's."""
        assert output_fmt == "NCHW", f"output_fmt={output_fmt!r}: the maps of this model are given as NCHW"
        take, last = feature_take_indices(len(self.stages), indices)
        x = self.stem(x)
        taps: list[Tensor] = []
        depth = len(self.stages)
        stages = self.stages if torch.jit.is_scripting() or not stop_early else self.stages[: last + 1]
        ran = 0
        for i, stage in enumerate(stages):
            x = stage(x)
            ran += 1
            if i in take:
                tap = self.norm(x) if norm and i == depth - 1 else x
                taps.append(tap.permute(0, 3, 1, 2).contiguous())
        if intermediates_only:
            return taps
        if ran == depth:
            x = self.norm(x)
        return x, taps

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
            self.head.reset(0, "", in_features=self.num_features)
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, H / 32, W / 32, C) after the final norm."""
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over the map, classifier."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def block_name(name: str) -> str:
    """zoo's name of a mixer's entry: "in_proj.weight" -> "mixer.in_proj.weight"; its norm keeps its name."""
    return name if name.startswith("norm.") else f"mixer.{name}"


def entry_name(name: str, orders: list[list[bool]]) -> str:
    """zoo's name of an entry that is named by kind of mixer, or as VMamba names it; others pass unchanged."""
    match name.split("."):
        case ["stages", s, "token" | "channel" as kind, i, *rest]:
            return f"stages.{s}.blocks.{_position(orders, s, kind, i)}.{block_name('.'.join(rest))}"
        case ["stages", s, "token_mix" | "channel_mix" as kind, i, leaf]:
            leaf = {"theta": "alpha", "gamma": "beta"}.get(leaf, leaf)
            return f"stages.{s}.blocks.{_position(orders, s, kind.removesuffix('_mix'), i)}.average.{leaf}"
        case ["head", "weight" | "bias" as leaf]:
            return f"head.fc.{leaf}"
        case ["patch_embed", "0", leaf]:
            return f"stem.proj.{leaf}"
        case ["patch_embed", "2", leaf]:
            return f"stem.norm.{leaf}"
        case ["layers", s, "blocks", i, *rest]:
            return f"stages.{s}.blocks.{i}.{block_name('.'.join(rest).removeprefix('op.'))}"
        case ["layers", s, "downsample", *rest]:
            return ".".join([f"stages.{int(s) + 1}.downsample", *rest])
        case ["classifier", "norm", leaf]:
            return f"norm.{leaf}"
        case ["classifier", "head", leaf]:
            return f"head.fc.{leaf}"
    return name


def _position(orders: list[list[bool]], stage: str, kind: str, index: str) -> str:
    """Position among a stage's mixers of the `index`-th one of a kind ("9+" where there is none)."""
    order = orders[int(stage)] if int(stage) < len(orders) else []
    places = [k for k, is_token in enumerate(order) if is_token == (kind == "token")]
    return str(places[int(index)]) if int(index) < len(places) else f"{kind}{index}"


@checkpoint_converter(
    ViM2,
    layouts={
        "vanilla VMamba": ("patch_embed.0.weight", "layers.*.blocks.*.op.x_proj_weight"),
        "ViM2 by kind of mixer": ("stages.*.token.*.x_proj_weight", "stages.*.channel.*"),
    },
)
def convert_checkpoint(state_dict: StateDict, model: nn.Module) -> Conversion:
    """Official vanilla VMamba files, files that name mixers by kind (token.i, channel.j), and zoo's own."""
    orders = model.mixer_orders()
    state = {entry_name(name, orders): value for name, value in state_dict.items()}
    if any(name.startswith("layers.") for name in state_dict):
        layout = "vanilla VMamba"
    else:
        layout = "zoo" if state.keys() == state_dict.keys() else "ViM2 by kind of mixer"
    return Conversion(state, layout)


def _cfg(**fields: Any) -> dict[str, Any]:
    return pretrained_cfg(
        **dict(
            first_conv="stem.proj",
            classifier="head.fc",
            origin_url="https://github.com/MambaMixer/M2",
            paper_ids="arXiv:2403.19888v1",
        )
        | fields
    )


_VMAMBA = dict(origin_url="https://github.com/MzeroMiko/VMamba", paper_ids="arXiv:2401.10166", license="mit")

default_cfgs = generate_default_cfgs(
    {
        "vim2_tiny.in1k": _cfg(),
        "vim2_small.in1k": _cfg(),
        "vim2_base.in1k": _cfg(),
        "vim2_small_table8.untrained": _cfg(),
        "vim2_base_table8.untrained": _cfg(),
        "vim2_mlp.in1k": _cfg(),
        "vanilla_vmamba_tiny.in1k": _cfg(**_VMAMBA),
        "vanilla_vmamba_small.in1k": _cfg(**_VMAMBA),
        "vanilla_vmamba_base.in1k": _cfg(**_VMAMBA),
    }
)

_SMALL, _BASE = (96, 192, 384, 768), (128, 256, 512, 1024)
_PLAIN: dict[str, Any] = dict(channel_depths=(0, 0, 0, 0), averaging=False)

VARIANTS: dict[str, dict[str, Any]] = {
    "vim2_tiny": dict(dims=_SMALL, token_depths=(2, 2, 6, 2), channel_depths=(1, 1, 3, 1)),
    "vim2_small": dict(dims=_SMALL, token_depths=(2, 2, 25, 2), channel_depths=(1, 1, 12, 1)),
    "vim2_base": dict(dims=_BASE, token_depths=(2, 2, 25, 2), channel_depths=(1, 1, 12, 1)),
    "vim2_small_table8": dict(dims=_SMALL, token_depths=(2, 2, 18, 2), channel_depths=(1, 1, 9, 1)),
    "vim2_base_table8": dict(dims=_BASE, token_depths=(2, 2, 18, 2), channel_depths=(1, 1, 9, 1)),
    "vim2_mlp": dict(
        dims=_SMALL, token_depths=(2, 2, 6, 2), channel_depths=(1, 1, 3, 1), channel_mixer="mlp", averaging=False
    ),
    "vanilla_vmamba_tiny": dict(dims=_SMALL, token_depths=(2, 2, 9, 2), **_PLAIN),
    "vanilla_vmamba_small": dict(dims=_SMALL, token_depths=(2, 2, 27, 2), **_PLAIN),
    "vanilla_vmamba_base": dict(dims=_BASE, token_depths=(2, 2, 27, 2), **_PLAIN),
}


def _create(variant: str, pretrained: bool, **kwargs: Any) -> ViM2:
    feature_cfg = dict(out_indices=kwargs.pop("out_indices", (0, 1, 2, 3)), flatten_sequential=True)
    return build_model(ViM2, variant, pretrained, feature_cfg=feature_cfg, **VARIANTS[variant] | kwargs)


@register_model
def vim2_tiny(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """ViM2-T as read here: 19,849,561 parameters (the paper prints 20 M), 5.68 G multiply-adds at 224 px."""
    return _create("vim2_tiny", pretrained, **kwargs)


@register_model
def vim2_small(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """ViM2-S as read here, stage 3 deeper than printed: 43,597,143 parameters (43 M), 12.56 G multiply-adds."""
    return _create("vim2_small", pretrained, **kwargs)


@register_model
def vim2_base(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """ViM2-B as read here, stage 3 deeper than printed: 74,242,199 parameters (74 M), 19.61 G multiply-adds."""
    return _create("vim2_base", pretrained, **kwargs)


@register_model
def vim2_small_table8(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """ViM2-S at the depths that table 8 prints: 34,883,992 parameters, 10.06 G multiply-adds at 224 px."""
    return _create("vim2_small_table8", pretrained, **kwargs)


@register_model
def vim2_base_table8(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """ViM2-B at the depths that table 8 prints: 59,413,592 parameters, 15.65 G multiply-adds at 224 px."""
    return _create("vim2_base_table8", pretrained, **kwargs)


@register_model
def vim2_mlp(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """The ablation ViM2-MLP, MLPs for channel mixers, no averaging: 39,687,784 parameters (40 M)."""
    return _create("vim2_mlp", pretrained, **kwargs)


@register_model
def vanilla_vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """VMamba-T of the first version: 22,893,448 parameters, 5.60 G multiply-adds at 224 px."""
    return _create("vanilla_vmamba_tiny", pretrained, **kwargs)


@register_model
def vanilla_vmamba_small(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """VMamba-S of the first version: 44,417,416 parameters, 11.18 G multiply-adds at 224 px."""
    return _create("vanilla_vmamba_small", pretrained, **kwargs)


@register_model
def vanilla_vmamba_base(pretrained: bool = False, **kwargs: Any) -> ViM2:
    """VMamba-B of the first version: 76,254,056 parameters, 17.95 G multiply-adds at 224 px."""
    return _create("vanilla_vmamba_base", pretrained, **kwargs)
