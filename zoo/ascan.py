"""AsCAN: plain convolution and attention blocks, more of the former early and of the latter late (arXiv 2411.04967).

Fused inverted bottlenecks (C) and transformer blocks with ordinary global attention (T) fill four stages. The
paper's claim is that plain attention, where maps are small, beats models with special attention.

This is a reading, not a reproduction: no official code or weights exist, and the paper's table of patterns and
widths could not be read. Everything is a function of `patterns`, `widths` and the other arguments; the three
variants below are fitted to sizes recalled for the paper's models, which identify no architecture. When the real
configuration is known, only the variants' table changes.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.fx
from timm.layers import (
    DropPath,
    LayerNorm2d,
    Mlp,
    NormMlpClassifierHead,
    calculate_drop_path_rates,
    get_device_dtype,
    register_notrace_function,
    to_2tuple,
    trunc_normal_,
    use_fused_attn,
)
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from zoo._timm import feature_take_indices, update_model_input_size
from zoo.builder import build_model, pretrained_cfg
from zoo.checkpoint import Conversion, StateDict, checkpoint_converter
from zoo.kernels.attention import attention, reference, resize_relative_table

__all__ = ["AsCan"]

READING = (
    "R1, provisional: block types and their asymmetric order are the paper's; patterns, widths and every detail "
    "of the blocks are assumptions, because neither code nor weights nor the configuration table are public"
)
LN_EPS = 1e-6


class Stem(nn.Module):
    """Two 3x3 convolutions with batch norm and GELU: (B, in_chs, H, W) -> (B, width, H/2, W/2), rounded up."""

    def __init__(self, in_chs: int, width: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chs, width, 3, stride=2, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(width, **dd)
        self.act1 = nn.GELU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(width, **dd)
        self.act2 = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chs, H, W) -> (B, width, H/2, W/2)."""
        x = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(x)))

    def reparameterize(self) -> None:
        """Fold the batch norms into the convolutions."""
        self.conv1, self.bn1 = _fold_norm(self.conv1, self.bn1)
        self.conv2, self.bn2 = _fold_norm(self.conv2, self.bn2)


class ConvBlock(nn.Module):
    """C: a 3x3 convolution that widens, GELU, a 1x1 convolution that narrows: (B, C, H, W) -> (B, out, H', W').

    The expansion counts from the input's width. A block that changes width or size has no shortcut.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        stride: int = 1,
        expansion: float = 4.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        mid_chs = int(in_chs * expansion)
        self.has_shortcut = stride == 1 and in_chs == out_chs
        self.conv_exp = nn.Conv2d(in_chs, mid_chs, 3, stride, 1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(mid_chs, **dd)
        self.act = nn.GELU()
        self.conv_pwl = nn.Conv2d(mid_chs, out_chs, 1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(out_chs, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out, H / stride, W / stride), rounded up."""
        y = self.bn2(self.conv_pwl(self.act(self.bn1(self.conv_exp(x)))))
        return x + self.drop_path(y) if self.has_shortcut else y

    def reparameterize(self) -> None:
        """Fold the batch norms into the convolutions."""
        self.conv_exp, self.bn1 = _fold_norm(self.conv_exp, self.bn1)
        self.conv_pwl, self.bn2 = _fold_norm(self.conv_pwl, self.bn2)


def _fold_norm(conv: nn.Conv2d, norm: nn.Module) -> tuple[nn.Conv2d, nn.Module]:
    if isinstance(norm, nn.Identity):
        return conv, norm
    fused = fuse_conv_bn_eval(conv.eval(), norm.eval())
    # maps are channels-last: weights of another layout would be converted in each call
    return fused.to(memory_format=torch.channels_last), nn.Identity()


class Attention(nn.Module):
    """Global multi-head attention on a channels-last map: (B, H, W, C) -> (B, H, W, C).

    Args:
        dim: width C, a multiple of `head_dim`.
        head_dim: width of a head.
        grid_size: (h, w) that a table of relative positions is made for, resampled for other maps; None: no table.
    """

    fused_attn: torch.jit.Final[bool]

    def __init__(self, dim: int, head_dim: int = 32, grid_size: tuple[int, int] | None = None, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % head_dim:
            raise ValueError(f"width {dim} is no multiple of head_dim={head_dim}: pass another width or head_dim")
        self.num_heads = dim // head_dim
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        table = None
        if grid_size is not None:
            size = (2 * grid_size[0] - 1) * (2 * grid_size[1] - 1)
            table = nn.Parameter(torch.zeros(size, self.num_heads, **dd))
        self.register_parameter("relative_position_bias_table", table)
        self.grid_size = grid_size or (0, 0)

    def reset_parameters(self) -> None:
        """Relative positions start at 0."""
        if self.relative_position_bias_table is not None:
            nn.init.zeros_(self.relative_position_bias_table)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        B, H, W, C = x.shape
        qkv = self.qkv(x).reshape(B, H * W, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, N, head_dim)
        table: Tensor | None = None
        if self.relative_position_bias_table is not None:
            h, w = self.grid_size
            table = offset_table(self.relative_position_bias_table, h, w, H, W)
        if self.fused_attn:
            x = attention(q, k, v, scale=self.scale, table=table)
        else:
            x = reference(q, k, v, scale=self.scale, table=table)
        return self.proj(x.transpose(1, 2).reshape(B, H, W, C))

    @torch.no_grad()
    def set_grid_size(self, h: int, w: int) -> None:
        """Resample the table of relative positions in place for maps of h x w."""
        table = self.relative_position_bias_table
        if table is not None:
            resized = resize_table(table, *self.grid_size, h, w)
            self.relative_position_bias_table = nn.Parameter(resized, requires_grad=table.requires_grad)
            self.grid_size = (h, w)


def resize_table(table: Tensor, h0: int, w0: int, h: int, w: int) -> Tensor:
    """((2 h0 - 1)(2 w0 - 1), heads) -> ((2 h - 1)(2 w - 1), heads)."""
    maps = table.t().reshape(-1, 2 * h0 - 1, 2 * w0 - 1)
    return resize_relative_table(maps, h, w).flatten(1).t().contiguous()


@torch.fx.wrap
@register_notrace_function
def offset_table(table: Tensor, h0: int, w0: int, h: int, w: int) -> Tensor:
    """A table that was made for h0 x w0, by head and offset in a map of h x w: (heads, 2h-1, 2w-1)."""
    maps = table.t().reshape(-1, 2 * h0 - 1, 2 * w0 - 1)
    if h != h0 or w != w0:
        maps = resize_relative_table(maps, h, w)
    return maps


class TransformerBlock(nn.Module):
    """T: pre-norm attention and MLP over all positions of a map: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(
        self,
        dim: int,
        head_dim: int = 32,
        mlp_ratio: float = 4.0,
        grid_size: tuple[int, int] | None = None,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, eps=LN_EPS, **dd)
        self.attn = Attention(dim, head_dim, grid_size, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=LN_EPS, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W); nothing is copied where the map is channels-last in memory."""
        x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class Stage(nn.Module):
    """A pattern of C and T blocks; the first, always C, halves the map: (B, C, H, W) -> (B, dim, H/2, W/2)."""

    def __init__(self, blocks: list[nn.Module]):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, dim, H/2, W/2), rounded up."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class AsCan(nn.Module):
    """Hybrid of convolution (C) and transformer (T) blocks in four stages of strides 4 to 32.

    Args:
        img_size: image size that tables of relative positions are made for; any size works.
        in_chans: channels of the image.
        num_classes: 0 for pooled features.
        global_pool: "avg", or "" for maps.
        stem_width: channels of the stem.
        widths: channels of each stage, multiples of `head_dim` where the stage has T blocks.
        patterns: blocks of each stage as a string of "C" and "T" that begins with "C".
        conv_expansion: hidden width of C blocks in units of their input's width.
        mlp_ratio: hidden width of the T blocks' MLP in units of their width.
        head_dim: width of an attention head.
        pos_bias: "none" (the convolutions' zero padding gives position) or "relative" (a table as in Swin).
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth, growing linearly over all blocks.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stem_width: int = 32,
        widths: Sequence[int] = (64, 128, 256, 576),
        patterns: Sequence[str] = ("CCCC", "CCCT", "CCTTCCTT", "CTTTCTTT"),
        conv_expansion: float = 4.0,
        mlp_ratio: float = 4.0,
        head_dim: int = 32,
        pos_bias: str = "none",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if len(widths) != len(patterns):
            raise ValueError(f"{len(widths)} widths for {len(patterns)} patterns: pass one of each for every stage")
        for pattern in patterns:
            if not pattern.startswith("C") or set(pattern) - {"C", "T"}:
                raise ValueError(f"pattern {pattern!r} is not a string of C and T that begins with C: correct it")
        if pos_bias not in ("none", "relative"):
            raise ValueError(f"pos_bias={pos_bias!r} is unknown: pass 'none' or 'relative'")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = widths[-1]
        self.stem = Stem(in_chans, stem_width, **dd)
        rates = calculate_drop_path_rates(drop_path_rate, [len(p) for p in patterns], stagewise=True)
        stages, in_chs = [], stem_width
        self.feature_info = []
        for i, (width, pattern) in enumerate(zip(widths, patterns, strict=True)):
            grid = _grid_size(img_size, 4 * 2**i) if pos_bias == "relative" else None
            blocks: list[nn.Module] = []
            for j, (kind, rate) in enumerate(zip(pattern, rates[i], strict=True)):
                if kind == "C":
                    stride = 1 if j else 2
                    blocks.append(ConvBlock(in_chs, width, stride, conv_expansion, rate, **dd))
                else:
                    blocks.append(TransformerBlock(width, head_dim, mlp_ratio, grid, rate, **dd))
                in_chs = width
            stages.append(Stage(blocks))
            self.feature_info.append(dict(num_chs=width, reduction=4 * 2**i, module=f"stages.{i}"))
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
        """He for convolutions (fan-out), truncated normal (std 0.02) for linear layers, norms 1 and 0."""
        self.apply(_init_weights)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning rates."""
        return dict(stem=r"^stem", blocks=r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.blocks\.(\d+)")

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The tables of relative positions, if there are any."""
        return {n for n, _ in self.named_parameters() if n.endswith("relative_position_bias_table")}

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
        """Resample tables of relative positions in place for another image size; without tables only record it."""
        if img_size is None:
            return
        for stage, info in zip(self.stages, self.feature_info):
            for block in stage.blocks:
                if isinstance(block, TransformerBlock):
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
        """(B, in_chans, H, W) -> (B, stem_width, H/2, W/2), channels-last in memory, as all maps after it."""
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


def _grid_size(img_size: int | Sequence[int], stride: int) -> tuple[int, int]:
    h, w = to_2tuple(img_size)
    return -(-h // stride), -(-w // stride)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm | Attention):
        module.reset_parameters()


HEAD_NAMES = {
    "norm.weight": "head.norm.weight",
    "norm.bias": "head.norm.bias",
    "head.weight": "head.fc.weight",
    "head.bias": "head.fc.bias",
}


@checkpoint_converter(AsCan, layouts={})
def convert_checkpoint(state_dict: StateDict, model: nn.Module) -> Conversion:
    """zoo's own files, and reading R1's flat names of head and norm; there is no official layout.

    Tables of relative positions are resampled to the model's size.
    """
    state = {HEAD_NAMES.get(name, name): value for name, value in state_dict.items()}
    notes: list[str] = []
    leaf = ".attn.relative_position_bias_table"
    for name, module in model.named_modules():
        table = state.get(f"{name.removesuffix('.attn')}{leaf}") if isinstance(module, Attention) else None
        own = getattr(module, "relative_position_bias_table", None)
        if table is None or own is None or table.shape[0] == own.shape[0]:
            continue
        side = round(table.shape[0] ** 0.5)
        if side * side == table.shape[0] and side % 2:  # a square map's; others are reported as mismatched
            h, w = module.grid_size
            state[f"{name.removesuffix('.attn')}{leaf}"] = resize_table(table, (side + 1) // 2, (side + 1) // 2, h, w)
            notes = ["tables of relative positions were resampled to the model's size"]
    return Conversion(state, "zoo", tuple(notes))


def _cfg(**fields: Any) -> dict[str, Any]:
    return pretrained_cfg(
        first_conv="stem.conv1",
        classifier="head.fc",
        origin_url="https://snap-research.github.io/snap_image",
        paper_ids="arXiv:2411.04967",
        notes=("A reading of the paper, not a reproduction: no official code or weights exist.",),
        **fields,
    )


default_cfgs = generate_default_cfgs({"ascan_tiny.in1k": _cfg(), "ascan_base.in1k": _cfg(), "ascan_large.in1k": _cfg()})

VARIANTS: dict[str, dict[str, Any]] = {
    "ascan_tiny": dict(stem_width=32, widths=(64, 128, 256, 576)),
    "ascan_base": dict(stem_width=96, widths=(96, 160, 384, 736)),
    "ascan_large": dict(stem_width=128, widths=(128, 256, 512, 960)),
}


def _create(variant: str, pretrained: bool, **kwargs: Any) -> AsCan:
    feature_cfg = dict(out_indices=kwargs.pop("out_indices", (0, 1, 2, 3)), flatten_sequential=True)
    return build_model(AsCan, variant, pretrained, feature_cfg=feature_cfg, **VARIANTS[variant] | kwargs)


@register_model
def ascan_tiny(pretrained: bool = False, **kwargs: Any) -> AsCan:
    """AsCAN-Tiny in reading R1: 54,735,176 parameters, 7.650 G multiply-adds at 224 px."""
    return _create("ascan_tiny", pretrained, **kwargs)


@register_model
def ascan_base(pretrained: bool = False, **kwargs: Any) -> AsCan:
    """AsCAN-Base in reading R1: 98,209,256 parameters, 16.561 G multiply-adds at 224 px."""
    return _create("ascan_base", pretrained, **kwargs)


@register_model
def ascan_large(pretrained: bool = False, **kwargs: Any) -> AsCan:
    """AsCAN-Large in reading R1: 172,182,888 parameters, 30.720 G multiply-adds at 224 px."""
    return _create("ascan_large", pretrained, **kwargs)
