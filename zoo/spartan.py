"""SpaRTAN: convolutions with two receptive fields, and a channel mixer of waves (arXiv 2507.10999).

Four stages of blocks on MogaNet's skeleton. Each block mixes space with a 3x3 and a 9x9 receptive field side by
side, then channels as waves: an amplitude times a phase gate, plus the pixel's strongest wave, times a learned
complex factor for each pair of channels. No attention, any input size.

Differs from the official code (henry-pay/SpaRTAN): stages instead of one flat list of layers; no cast to float32
around the complex factors, which stay in float32 under autocast as parameters do, so that half and double precision
work; an image too small to leave a pixel is refused by name. The norms span the whole map: padding or tiling an
image changes every pixel. The blocks are in `spartan_blocks.py`.

The authors released `spartan_tiny`'s configuration. `spartan_xtiny` is a reading: it has the published numbers of
parameters and multiply-adds, its widths and depths are nowhere stated. A checkpoint of any other size, such as
SpaRTAN-S, says its own widths: `spartan_from_checkpoint`.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
import torch.fx
from timm.layers import ClassifierHead, get_device_dtype, register_notrace_function
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo._timm import feature_take_indices
from zoo.builder import build_model, pretrained_cfg
from zoo.checkpoint import (
    CheckpointError,
    Conversion,
    StateDict,
    checkpoint_converter,
    load_checkpoint,
    read_checkpoint,
    unwrap_state_dict,
)
from zoo.schedules import late_cosine
from zoo.spartan_blocks import ConvNorm, SpartanBlock, init_weights

__all__ = ["SpaRTAN", "learning_rate", "model_arguments", "spartan_from_checkpoint"]


@torch.fx.wrap
@register_notrace_function
def check_image_size(x: Tensor, smallest: int) -> None:
    """Refuse images (B, C, H, W) that leave no pixel in the last stage.

    Raises:
        ValueError: a side is shorter than `smallest`.
    """
    h, w = x.shape[-2], x.shape[-1]
    if h < smallest or w < smallest:
        raise ValueError(
            f"an image of {h}x{w} px leaves no pixel in the last stage: enlarge or pad it to {smallest} px or more"
        )


class SpartanStage(nn.Module):
    """Downsampling, then blocks: (B, C, H, W) -> (B, dim, H', W')."""

    def __init__(self, downsample: nn.Module, blocks: list[SpartanBlock]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, dim, H', W')."""
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class SpaRTAN(nn.Module):
    """Four-stage convolutional network with waves as channel mixers.

    The first half of the stages (rounded down) is of the early form: dense spatial and depthwise channel
    convolutions; the others are the other way round.

    Args:
        in_chans: channels of the image.
        num_classes: 0 for pooled features.
        global_pool: "avg", another of timm's poolings, or "" for maps.
        embed_dims: width of each stage, multiples of 8.
        depths: blocks of each stage.
        expand_ratios: hidden width of each stage's channel mixers in units of its width, integers above 1.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth; block i of n has i / n of it, so that none reaches it.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (32, 64, 128, 256),
        depths: Sequence[int] = (3, 3, 12, 2),
        expand_ratios: Sequence[int] = (4, 4, 2, 2),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if not len(embed_dims) == len(depths) == len(expand_ratios):
            raise ValueError(
                f"embed_dims, depths and expand_ratios have {len(embed_dims)}, {len(depths)} and "
                f"{len(expand_ratios)} entries: pass one of each for every stage"
            )
        if min(depths) < 1:
            raise ValueError(f"depths={tuple(depths)} has a stage without blocks: pass 1 or more for every stage")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.stem = nn.Sequential(
            OrderedDict(
                conv1=ConvNorm(in_chans, embed_dims[0] // 2, 3, stride=2, **dd),
                conv2=ConvNorm(embed_dims[0] // 2, embed_dims[0], 3, stride=2, **dd),
            )
        )
        total, done = sum(depths), 0
        stages = []
        self.feature_info = []
        for i, (dim, depth, ratio) in enumerate(zip(embed_dims, depths, expand_ratios, strict=True)):
            downsample = nn.Identity()
            if i:
                downsample = ConvNorm(embed_dims[i - 1], dim, 2, stride=2, padding=0, act_layer=nn.SiLU, **dd)
            early = i < len(depths) // 2
            rates = [drop_path_rate * (done + j) / total for j in range(depth)]
            stages.append(SpartanStage(downsample, [SpartanBlock(dim, ratio, early, rate, **dd) for rate in rates]))
            self.feature_info.append(dict(num_chs=dim, reduction=4 * 2**i, module=f"stages.{i}"))
            done += depth
        self.stages = nn.Sequential(*stages)
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, **dd)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Normal by fan-out for convolutions, truncated normal (std 0.02) for the classifier, scales 1e-5."""
        self.apply(init_weights)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning rates."""
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return dict(stem=r"^stem", blocks=r"^stages\.(\d+)" if coarse else blocks)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """No entries: what the authors do not decay are vectors, which timm exempts by itself."""
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

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of the stages, strides 4 to 32; `norm` has no effect, there is no norm behind the stages."""
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
            self.head.reset(0, "", in_features=self.num_features)
        return take

    def forward_stem(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, ceil(H/4), ceil(W/4))."""
        check_image_size(x, (2 << len(self.stages)) - 3)
        return self.stem(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, H', W'): ceil(H/4), halved and rounded down by each further stage."""
        return self.stages(self.forward_stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over the map and classifier, no norm."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


# Official names -> zoo's, part by part
_OFFICIAL_BLOCK_NAMES = {
    "norm_1": "norm1",
    "norm_2": "norm2",
    "scale_1": "scale1.scale",
    "scale_2": "scale2.scale",
    "smixer": "spatial",
    "cmixer": "channel",
}
_OFFICIAL_MIXER_NAMES = {
    "norm": "bn",
    "h_conv": "conv_near",
    "h_attn": "se_near",
    "l_attn": "se_far",
    "attn": "se",
    "squeeze": "fc1",
    "expand": "fc2",
    "complex": "rotation",
}


def mixer_name(official: str) -> str:
    """zoo's name of an entry of a mixer or another small part: "l_conv.1.norm.bias" -> "conv_far2.bn.bias"."""
    official = official.replace("l_conv.0.conv.", "conv_far1.").replace("l_conv.1.", "conv_far2.")
    return ".".join(_OFFICIAL_MIXER_NAMES.get(part, part) for part in official.split("."))


def block_name(official: str) -> str:
    """zoo's name of an entry of a block: "smixer.h_attn.squeeze.bias" -> "spatial.se_near.fc1.bias"."""
    first, *rest = official.split(".")
    return ".".join([_OFFICIAL_BLOCK_NAMES.get(first, first)] + ([mixer_name(".".join(rest))] if rest else []))


def name_map(names: Sequence[str]) -> dict[str, str]:
    """zoo's names of the entries of an official checkpoint, whose layers are numbered through all stages."""
    layers = {int(found[1]) for name in names if (found := re.match(r"layers\.(\d+)\.", name))}
    downs = {int(found[1]) for name in names if (found := re.match(r"layers\.(\d+)\.conv\.weight$", name))}
    places, stage, block = {}, 0, 0
    for layer in sorted(layers):
        if layer in downs:
            stage, block = stage + 1, 0
            places[str(layer)] = f"stages.{stage}.downsample"
        else:
            places[str(layer)] = f"stages.{stage}.blocks.{block}"
            block += 1
    translated = {}
    for name in names:
        first, _, rest = name.partition(".")
        index, _, tail = rest.partition(".")
        if first == "layers":
            inner = mixer_name(tail) if int(index) in downs else block_name(tail)
            translated[name] = f"{places[index]}.{inner}"
        elif first == "conv" and index in ("0", "1"):
            translated[name] = f"stem.conv{int(index) + 1}.{mixer_name(tail)}"
        elif first == "linear":
            translated[name] = f"head.fc.{rest}"
        else:
            translated[name] = name
    return translated


def reshape_entry(name: str, value: Tensor) -> Tensor:
    """An official entry under zoo's name `name` in zoo's shape: without axes of size 1 around it."""
    if name.endswith(("scale1.scale", "scale2.scale")):
        return value.reshape(-1, 1, 1)
    if name.endswith("gamma"):
        return value.flatten()
    return value.reshape(-1, 2) if name.endswith("rotation") else value


@checkpoint_converter(SpaRTAN, layouts={"SpaRTAN": ("layers.*.smixer.gamma", "layers.*.cmixer.complex")})
def convert_checkpoint(state_dict: StateDict, model: nn.Module | None = None) -> Conversion:
    """Official checkpoints of any size, and zoo's own files."""
    if not any(name.startswith("layers.") for name in state_dict):
        return Conversion(dict(state_dict))
    names = name_map(list(state_dict))
    return Conversion({names[n]: reshape_entry(names[n], v) for n, v in state_dict.items()}, "SpaRTAN")


def model_arguments(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of the `SpaRTAN` that a state dict, official or zoo's, belongs to.

    Raises:
        CheckpointError: the entries are not those of a SpaRTAN.
    """
    state = convert_checkpoint(dict(state_dict)).state_dict
    found = (re.match(r"stages\.(\d+)\.blocks\.(\d+)\.channel\.theta\.weight$", name) for name in state)
    blocks = sorted((int(f[1]), int(f[2])) for f in found if f)
    stages = sorted({stage for stage, _ in blocks})
    if not blocks or stages != list(range(len(stages))) or "stem.conv1.conv.weight" not in state:
        raise CheckpointError(
            f"this state dict is not of a SpaRTAN ({len(state)} entries, {len(blocks)} channel mixers): "
            "pass the file of a whole model, official or saved by zoo"
        )
    waves = [state[f"stages.{stage}.blocks.0.channel.theta.weight"].shape for stage in stages]
    head = state.get("head.fc.weight")
    return dict(
        in_chans=state["stem.conv1.conv.weight"].shape[1],
        num_classes=0 if head is None else head.shape[0],
        embed_dims=tuple(shape[1] for shape in waves),
        depths=tuple(sum(s == stage for s, _ in blocks) for stage in stages),
        expand_ratios=tuple(shape[0] // shape[1] for shape in waves),
    )


def spartan_from_checkpoint(checkpoint: str | PathLike | Mapping, **kwargs: Any) -> SpaRTAN:
    """A model of the size that a checkpoint has, with its weights, in eval mode.

    Args:
        checkpoint: a file or a state dict, official or zoo's, in any wrapper.
        kwargs: further arguments of `SpaRTAN`, such as `drop_path_rate` or `dtype`.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: unreadable, pickled objects besides tensors, or not of a SpaRTAN.
    """
    content = checkpoint if isinstance(checkpoint, Mapping) else read_checkpoint(checkpoint)
    state = unwrap_state_dict(content)
    model = SpaRTAN(**model_arguments(state) | kwargs)
    load_checkpoint(model, state)
    return model.eval()


def learning_rate(
    epoch: int,
    epochs: int = 300,
    warmup_epochs: int = 20,
    base: float = 2.5e-3,
    minimum: float = 1e-6,
    start: float = 1e-4,
) -> float:
    """Learning rate during an epoch (counted from 1) of the official training script, total batch 2048.

    It lags one epoch behind timm's cosine schedule, and the cosine is not shifted by the warm-up: epochs 1 and 2 are
    equal, and the warm-up ends with a jump below `base`.
    """
    schedule = dict(lr=base, epochs=epochs, warmup_epochs=warmup_epochs, warmup_lr=start, min_lr=minimum)
    return late_cosine(epoch - 1, **schedule)


def _cfg(**fields: Any) -> dict[str, Any]:
    """Evaluation of the official code: bilinear resize of the short side to 256, centre crop of 256."""
    defaults = dict(
        input_size=(3, 256, 256),
        pool_size=(8, 8),
        crop_pct=1.0,
        interpolation="bilinear",
        first_conv="stem.conv1.conv",
        classifier="head.fc",
        license="apache-2.0",
        origin_url="https://github.com/henry-pay/SpaRTAN",
        paper_ids="arXiv:2507.10999",
    )
    return pretrained_cfg(**defaults | fields)


default_cfgs = generate_default_cfgs(
    {
        "spartan_tiny.in1k": _cfg(),
        "spartan_xtiny.in1k": _cfg(),
        "spartan_wide.untrained": _cfg(),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> SpaRTAN:
    feature_cfg = dict(out_indices=kwargs.pop("out_indices", (0, 1, 2, 3)), flatten_sequential=True)
    return build_model(SpaRTAN, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_model
def spartan_xtiny(pretrained: bool = False, **kwargs: Any) -> SpaRTAN:
    """SpaRTAN-XT: 2,222,792 parameters, 0.802 G multiply-adds at 256 px (0.614 G at 224 px).

    A reading: sizes that give the published 2.2 M parameters and 0.64 G at 224 px, counted as the authors do.
    """
    return _create("spartan_xtiny", pretrained, **dict(embed_dims=(32, 64, 96, 192), depths=(3, 3, 10, 2)) | kwargs)


@register_model
def spartan_tiny(pretrained: bool = False, **kwargs: Any) -> SpaRTAN:
    """SpaRTAN-T: 3,820,296 parameters, 1.044 G multiply-adds at 256 px (0.800 G at 224 px)."""
    return _create("spartan_tiny", pretrained, **kwargs)


@register_model
def spartan_wide(pretrained: bool = False, **kwargs: Any) -> SpaRTAN:
    """SpaRTAN-T of twice its width, zoo's own size: 14,418,472 parameters, 4.08 G multiply-adds at 256 px."""
    return _create("spartan_wide", pretrained, **dict(embed_dims=(64, 128, 256, 512)) | kwargs)
