"""STDC: short-term dense concatenation, a backbone for real-time segmentation (arXiv 2104.13188).

A block halves the width from convolution to convolution and concatenates all results: deep layers, which see
much, are narrow, and every scale of view reaches the output. A stem at stride 4 and three stages at strides 8,
16 and 32.

PEM and other real-time segmenters use it as their backbone; it is here as they build it. The authors' ImageNet
files hold a classifier of their own (one more convolution, two linear layers), which segmenters drop; zoo's
classifier is timm's (pool, linear) and does not take those entries over.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, get_device_dtype
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from zoo._timm import feature_take_indices
from zoo.builder import build_model, pretrained_cfg
from zoo.checkpoint import Conversion, StateDict, checkpoint_converter


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, ReLU unless `act` is off: (B, C, H, W) -> (B, out, H', W')."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        act: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        pad = kernel_size // 2
        self.conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, pad, groups=groups, bias=False, **dd)
        self.bn = nn.BatchNorm2d(out_chs, **dd)
        self.act = nn.ReLU(inplace=True) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out, ceil(H / stride), ceil(W / stride))."""
        return self.act(self.bn(self.conv(x)))

    def reparameterize(self) -> None:
        """Merge the norm into the convolution."""
        if isinstance(self.bn, nn.BatchNorm2d):
            self.conv = fuse_conv_bn_eval(self.conv.eval(), self.bn.eval())
            self.bn = nn.Identity()


class CatBlock(nn.Module):
    """Four convolutions of falling width, concatenated: (B, C, H, W) -> (B, out, H / stride, W / stride).

    With stride 2 a depthwise convolution halves the map behind the first convolution, whose own result is
    average-pooled (zeros outside counted) for the concatenation. There is no residual path.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        widths = [out_chs // 2, out_chs // 4, out_chs // 8, out_chs // 8]
        self.conv1 = ConvNorm(in_chs, widths[0], 1, **dd)
        self.down = ConvNorm(widths[0], widths[0], 3, 2, widths[0], act=False, **dd) if stride == 2 else nn.Identity()
        self.pool = nn.AvgPool2d(3, 2, 1) if stride == 2 else nn.Identity()
        self.conv2 = ConvNorm(widths[0], widths[1], 3, **dd)
        self.conv3 = ConvNorm(widths[1], widths[2], 3, **dd)
        self.conv4 = ConvNorm(widths[2], widths[3], 3, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out, ceil(H / stride), ceil(W / stride))."""
        first = self.conv1(x)
        second = self.conv2(self.down(first))
        third = self.conv3(second)
        return torch.cat([self.pool(first), second, third, self.conv4(third)], 1)


class StdcStage(nn.Module):
    """Blocks of one resolution; the first halves the map."""

    def __init__(self, in_chs: int, out_chs: int, depth: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.blocks = nn.Sequential(
            *(CatBlock(out_chs if i else in_chs, out_chs, 1 if i else 2, **dd) for i in range(depth))
        )
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out, ceil(H/2), ceil(W/2))."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class Stdc(nn.Module):
    """The STDC network: (B, in_chans, H, W) -> logits (B, num_classes); maps at strides 4, 8, 16, 32.

    Args:
        in_chans: channels of the image.
        num_classes: 0 for pooled features.
        global_pool: "avg", "max", ..., or "" for maps.
        embed_dims: widths of the stem's output and of the three stages.
        depths: blocks of the three stages.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 256, 512, 1024),
        depths: Sequence[int] = (2, 2, 2),
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if len(embed_dims) != len(depths) + 1:
            raise ValueError(
                f"embed_dims has {len(embed_dims)} entries for {len(depths)} stages: pass the stem's width and one "
                "for each stage"
            )
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.stem = nn.Sequential(
            ConvNorm(in_chans, embed_dims[0] // 2, 3, 2, **dd),
            ConvNorm(embed_dims[0] // 2, embed_dims[0], 3, 2, **dd),
        )
        self.stages = nn.Sequential(
            *(StdcStage(embed_dims[i], embed_dims[i + 1], depth, **dd) for i, depth in enumerate(depths))
        )
        modules = ["stem.1", *(f"stages.{i}" for i in range(len(depths)))]
        self.feature_info = [
            dict(num_chs=dim, reduction=4 * 2**i, module=module)
            for i, (dim, module) in enumerate(zip(embed_dims, modules, strict=True))
        ]
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Kaiming-normal convolutions (fan-out), unit norms, a classifier of std 0.001: the official rule."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.001)
                nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning rates."""
        return dict(stem=r"^stem", blocks=r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.blocks\.(\d+)")

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Nothing beyond timm's rule for vectors."""
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
        """The stem's map and the stages', strides 4 to 32; there is no final norm, so `norm` has no effect."""
        assert output_fmt == "NCHW", f"output_fmt={output_fmt!r}: the maps of this model are NCHW"
        take, last = feature_take_indices(len(self.stages) + 1, indices)
        x = self.stem(x)
        taps = [x] if 0 in take else []
        stages = self.stages if torch.jit.is_scripting() or not stop_early else self.stages[:last]
        for i, stage in enumerate(stages):
            x = stage(x)
            if i + 1 in take:
                taps.append(x)
        return taps if intermediates_only else (x, taps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Cut what follows the last tap; returns the taps as absolute indices."""
        take, last = feature_take_indices(len(self.stages) + 1, indices)
        cut = last < len(self.stages)
        self.stages = self.stages[:last]
        if cut:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if cut or prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, C, ceil(H/32), ceil(W/32))."""
        return self.stages(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, dropout, classifier."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


# ---- official checkpoints

_OFFICIAL_HEAD = ("conv_last.", "fc.", "bn.", "linear.")


@checkpoint_converter(Stdc, layouts={"STDC": ("features.0.conv.weight", "features.*.conv_list.0.conv.weight")})
def convert_checkpoint(state_dict: StateDict, model: Stdc) -> Conversion:
    """Official files: `features.<n>.*` and a classifier of their own.

    The official module stores every tensor a second time, as `x2.0.<n>.*`, `x4.0.<n>.*`, ...; these are loaded
    last there, so they count if the two should ever differ.
    """
    if not any(name.startswith("features.") for name in state_dict):
        return Conversion(state_dict)
    depths = [len(stage.blocks) for stage in model.stages]
    kept = {name: value for name, value in state_dict.items() if not name.startswith(_OFFICIAL_HEAD)}
    dropped = len(state_dict) - len(kept)
    names = sorted(kept, key=lambda name: not name.startswith("features."))  # stable: the second copies last
    state = {official_to_zoo(re.sub(r"^x\d+\.0\.", "features.", name), depths): kept[name] for name in names}
    notes = (f"the authors' classifier was left out ({dropped} entries)",) if dropped else ()
    return Conversion(state, "STDC", notes)


def official_to_zoo(name: str, depths: Sequence[int]) -> str:
    """The entry name in zoo's layout of an official `features.<n>.<rest>`."""
    match = re.match(r"features\.(\d+)\.(.*)", name)
    if match is None:
        return name
    index, rest = int(match[1]), match[2]
    if index < 2:
        return f"stem.{index}.{rest}"
    stage, block = 0, index - 2
    while stage < len(depths) - 1 and block >= depths[stage]:
        block -= depths[stage]
        stage += 1
    rest = re.sub(r"^conv_list\.(\d)", lambda m: f"conv{int(m[1]) + 1}", rest)
    rest = rest.replace("avd_layer.0", "down.conv").replace("avd_layer.1", "down.bn")
    return f"stages.{stage}.blocks.{block}.{rest}"


# ---- variants


def _cfg(**fields: Any) -> dict[str, Any]:
    return pretrained_cfg(
        first_conv="stem.0.conv",
        classifier="head.fc",
        interpolation="bilinear",
        license="mit",
        origin_url="https://github.com/MichaelFan01/STDC-Seg",
        paper_ids="arXiv:2104.13188",
        **fields,
    )


default_cfgs = generate_default_cfgs({"stdc1.in1k": _cfg(), "stdc2.in1k": _cfg()})


def _create(variant: str, pretrained: bool, **kwargs: Any) -> Stdc:
    feature_cfg = dict(out_indices=kwargs.pop("out_indices", (0, 1, 2, 3)), flatten_sequential=True)
    return build_model(Stdc, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_model
def stdc1(pretrained: bool = False, **kwargs: Any) -> Stdc:
    """STDC1: 5,318,304 parameters without classifier, 0.76 G multiply-adds at 224 px."""
    return _create("stdc1", pretrained, **dict(depths=(2, 2, 2)) | kwargs)


@register_model
def stdc2(pretrained: bool = False, **kwargs: Any) -> Stdc:
    """STDC2: 9,348,768 parameters without classifier, 1.39 G multiply-adds at 224 px."""
    return _create("stdc2", pretrained, **dict(depths=(4, 5, 3)) | kwargs)
