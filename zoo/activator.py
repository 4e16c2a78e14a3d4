"""Activator: gated linear units are the only core of the blocks (arXiv 2405.15953).

Attention is replaced by a gated linear unit, activation path times linear path, projected back. The first version
of the paper keeps an ordinary MLP behind it (`activator_*`); the last one drops it (`activator_geglu_*`).

No layer mixes tokens: every unit acts on channels, there is no convolution beyond the patches and no position
table; the only operation across tokens is the mean before the classifier. So the model is a bag of patches, exactly:
the logits are the mean of every patch's own logits (`class_map`), the order of the patches does not matter, any
image size runs with the same weights, an image may be processed tile by tile, and dense features carry no context
beyond their patch, whatever the depth. Expect less than from any backbone that mixes; a dense head must bring
all context itself.

The unit is W3 (LN(gelu(W1 x)) * LN(W2 x)) with one LayerNorm for both factors, which is not timm's `SwiGLU`; another
LayerNorm serves both halves of a block. Gradients are sums of both uses, as in the official code.

Differs from the official code: image sizes that are no multiple of the patch are refused or padded
(`dynamic_img_pad`), not cropped silently; dropout is 0 unless asked for (the authors trained the model with the MLP
with `proj_drop_rate=0.5`; the unit has none); `act_layer` has the SwiGLU and ReGLU of the paper's ablation. The
ImageNet sizes (`*_patch16_224`) are this project's. No weights were released.

`uniform_activator_*`, the authors' relative without a paper, has neither inner norm nor MLP, and one width.
"""

# without `from __future__ import annotations`: fx would write forward's types as strings that TorchScript refuses
import re
from typing import Any

import torch
from timm.layers import (
    DropPath,
    LayerNorm,
    Mlp,
    PatchEmbed,
    calculate_drop_path_rates,
    get_device_dtype,
    register_notrace_function,
    resample_patch_embed,
    to_2tuple,
)
from timm.models import checkpoint, checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo._timm import feature_take_indices, update_model_input_size
from zoo.builder import build_model, pretrained_cfg
from zoo.checkpoint import Conversion, StateDict, checkpoint_converter
from zoo.dropout import replace_dropout
from zoo.kernels.geglu_norm import ACTIVATIONS, activate, geglu_norm

__all__ = ["Activator", "ActivatorBlock", "GatingUnit", "constructor_arguments"]


# Blocks --------------------------------------------------------------------------------------------------------


class GatingUnit(nn.Module):
    """W3 (LN(act(W1 x)) * LN(W2 x)), one LayerNorm for both: (..., C) -> (..., C).

    `fc1_g` is W1, the gate; `fc1_x` W2, the value; `fc2` W3. Without `norm` the unit is a plain GEGLU.
    """

    __constants__ = ["act"]

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        norm: bool = True,
        act_layer: str = "gelu",
        norm_eps: float = 1e-5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if act_layer not in ACTIVATIONS:
            raise ValueError(f"act_layer={act_layer!r} is unknown to Activator: pass 'gelu', 'silu' or 'relu'")
        self.act = act_layer
        self.fc1_g = nn.Linear(dim, hidden_dim, **dd)
        self.fc1_x = nn.Linear(dim, hidden_dim, **dd)
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)
        self.norm = LayerNorm(hidden_dim, eps=norm_eps, **dd) if norm else None

    def gated(self, x: Tensor) -> Tensor:
        """The hidden product, (..., C) -> (..., hidden_dim)."""
        gate, value = self.fc1_g(x), self.fc1_x(x)
        if self.norm is None:
            return activate(gate, self.act) * value
        return geglu_norm(gate, value, self.norm.weight, self.norm.bias, self.norm.eps, self.act)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.fc2(self.gated(x))


class ActivatorBlock(nn.Module):
    """Residual gating unit, and with `mlp` a residual MLP behind the same norm: (B, N, C) -> (B, N, C)."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        mlp: bool = True,
        gate_norm: bool = True,
        act_layer: str = "gelu",
        drop: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = LayerNorm(dim, eps=norm_eps, **dd)
        self.glu = GatingUnit(dim, hidden_dim, gate_norm, act_layer, norm_eps, **dd)
        self.mlp = Mlp(dim, hidden_dim, drop=drop, **dd) if mlp else None
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, z: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        z = z + self.drop_path(self.glu(self.norm(z)))
        if self.mlp is not None:
            z = z + self.drop_path(self.mlp(self.norm(z)))
        return z

    def pooled(self, z: Tensor) -> Tensor:
        """Mean of `forward` over the tokens, (B, N, C) -> (B, C), with the last product behind the mean."""
        if self.mlp is None:
            return z.mean(dim=1) + self.glu.fc2(self.glu.gated(self.norm(z)).mean(dim=1))
        z = z + self.glu(self.norm(z))
        return z.mean(dim=1) + self.mlp.fc2(self.mlp.act(self.mlp.fc1(self.norm(z))).mean(dim=1))


# Model ---------------------------------------------------------------------------------------------------------


class Activator(nn.Module):
    """Activator: a bag of patches, (B, 3, H, W) of any size -> logits. There is no token mixing."""

    __constants__ = ["pooled_tail"]

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 12,
        hidden_dim: int | None = None,
        mlp: bool = True,
        gate_norm: bool = True,
        act_layer: str = "gelu",
        norm_eps: float = 1e-5,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_pad: bool = False,
        device=None,
        dtype=None,
    ):
        """Build the model.

        Args:
            img_size: nominal image height and width; no weight depends on it and any size runs.
            patch_size: side of a patch, which is the whole receptive field.
            in_chans: input channels.
            num_classes: classes, 0 for pooled features.
            global_pool: "avg" (mean over the tokens) or "" (none).
            embed_dim: width of the tokens.
            depth: blocks.
            hidden_dim: width of gating unit and MLP; if None twice the tokens', without `mlp` four times.
            mlp: an MLP behind each gating unit, as in the first version of the paper.
            gate_norm: the LayerNorm inside the gating unit; off in Uniform_Activator only.
            act_layer: activation of the gate: "gelu", or "silu" and "relu" of the paper's ablation.
            norm_eps: epsilon of the LayerNorms.
            drop_rate: dropout before the classifier.
            proj_drop_rate: dropout after both layers of the MLP; there is none in the gating unit.
            drop_path_rate: stochastic depth of the residual branches, growing to this rate.
            dynamic_img_pad: pad images at the right and at the bottom to a multiple of the patch.
            device: device of all parameters.
            dtype: dtype of all parameters.
        """
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        _check_pool(global_pool)
        if hidden_dim is None:
            hidden_dim = embed_dim * (2 if mlp else 4)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 0
        self.grad_checkpointing = False
        self.pooled_tail = False

        self.patch_embed = PatchEmbed(
            img_size, patch_size, in_chans, embed_dim, strict_img_size=False, dynamic_img_pad=dynamic_img_pad, **dd
        )
        self.blocks = nn.Sequential(
            *[
                ActivatorBlock(
                    embed_dim,
                    hidden_dim,
                    mlp=mlp,
                    gate_norm=gate_norm,
                    act_layer=act_layer,
                    drop=proj_drop_rate,
                    drop_path=rate,
                    norm_eps=norm_eps,
                    **dd,
                )
                for rate in calculate_drop_path_rates(drop_path_rate, depth)
            ]
        )
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [dict(module=f"blocks.{i}", num_chs=embed_dim, reduction=reduction) for i in range(depth)]
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        replace_dropout(self)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw all weights anew, each layer as torch does by default, which is the official initialisation."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves alone: none beyond norms and biases."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters by depth, for layer-wise learning rates."""
        return dict(stem=r"^patch_embed", blocks=r"^blocks\.(\d+)")

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of storing their activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The linear classifier, an identity without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling if one is named.

        Raises:
            ValueError: a pooling other than "avg" and "".
        """
        if global_pool is not None:
            _check_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        dd = get_device_dtype(self)
        self.head = nn.Linear(self.embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the nominal image size, which no weight depends on, or the patches, which resamples their kernel."""
        size = to_2tuple(img_size) if img_size is not None else self.patch_embed.img_size
        self.patch_embed.set_input_size(size, patch_size)
        for info in self.feature_info:
            info["reduction"] = self.patch_embed.feat_ratio()
        update_model_input_size(self, size, patch_size=patch_size)

    def embed(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> the tokens (B, N, embed_dim) that enter the first block, row-major."""
        check_image_size(x, self.patch_embed.patch_size, self.patch_embed.dynamic_img_pad)
        # a view of the convolution's output would give every residual its layout, and every norm a copy
        return self.patch_embed(x).contiguous()

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> tokens (B, N, embed_dim) after the last block."""
        x = self.embed(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of chosen blocks, and `forward_features` unless `intermediates_only`.

        Args:
            x: images (B, C, H, W).
            indices: all blocks if None, the last n if a number, else these.
            norm: accepted as in every model; there is no final norm here.
            stop_early: do not run blocks behind the last chosen one.
            output_fmt: "NCHW" maps or "NLC" tokens.
            intermediates_only: return the list alone.

        Raises:
            ValueError: another `output_fmt`.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r} is unknown: pass 'NCHW' or 'NLC'")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        size = (x.shape[-2], x.shape[-1])
        x = self.embed(x)
        blocks = self.blocks if torch.jit.is_scripting() or not stop_early else self.blocks[: max_index + 1]
        taps: list[Tensor] = []
        for i, block in enumerate(blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
            if i in take_indices:
                taps.append(x)
        if output_fmt == "NCHW":
            taps = [self.to_map(tap, size) for tap in taps]
        if intermediates_only:
            return taps
        return x, taps

    def to_map(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens (B, N, C) of images of a size in pixels -> (B, C, H / p, W / p)."""
        rows, columns = self.patch_embed.dynamic_feat_size(size)
        return x.reshape(x.shape[0], rows, columns, x.shape[-1]).permute(0, 3, 1, 2).contiguous()

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Cut what the chosen blocks do not need; returns their absolute indices."""
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def pool(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) -> (B, C), or as they are without pooling."""
        return x.mean(dim=1) if self.global_pool == "avg" else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, N, C) -> logits: mean, dropout, classifier, which `pre_logits` leaves out."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, num_classes)."""
        if self.pooled_tail and self.global_pool == "avg":
            return self.head(self.forward_pooled(x))
        return self.forward_head(self.forward_features(x))

    def forward_pooled(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> mean token (B, C), the last block's last product taken behind the mean."""
        x = self.embed(x)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            x = block.pooled(x) if i == last else block(x)
        return x

    @torch.jit.ignore
    def class_map(self, x: Tensor) -> Tensor:
        """Every patch's own logits, (B, 3, H, W) -> (B, num_classes, H / p, W / p).

        Their spatial mean is the model's output. For an image too large for memory: sum them over tiles, divide by
        the number of patches.
        """
        return self.to_map(self.head(self.forward_features(x)), (x.shape[-2], x.shape[-1]))

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Inference form of `forward`: pool before the last linear map, which is exact and saves N - 1 of N rows.

        The block norms' affine parts could move into the projections, but a LayerNorm without them is slower, and
        the two projections as one matrix product gain nothing on CPU.
        """
        self.pooled_tail = True


@torch.fx.wrap
@register_notrace_function
def check_image_size(x: Tensor, patch_size: list[int], pad: bool) -> None:
    """Refuse images that the patches do not fill.

    Raises:
        ValueError: the size is no multiple of the patch and `pad` is off.
    """
    h = x.shape[-2]
    w = x.shape[-1]
    if not pad and (h % patch_size[0] != 0 or w % patch_size[1] != 0):
        raise ValueError(
            f"got an image of {h}x{w} px and patches of {patch_size[0]}x{patch_size[1]}: "
            "resize or crop it to a multiple of the patch, or build the model with dynamic_img_pad=True"
        )


def _check_pool(global_pool: str) -> None:
    if global_pool not in ("avg", ""):
        raise ValueError(f"global_pool={global_pool!r} is unknown to Activator: pass 'avg' or ''")


# Checkpoints ---------------------------------------------------------------------------------------------------

_NAMES = {
    "patcher.": "patch_embed.proj.",
    "classifier.": "head.",
    "actgu.proj_1.": "glu.fc1_g.",
    "actgu.proj_2.": "glu.fc1_x.",
    "actgu.proj_3.": "glu.fc2.",
    "actgu.norm.": "glu.norm.",
    "ffn.net.0.": "mlp.fc1.",
    "ffn.net.3.": "mlp.fc2.",
}
_BLOCK = re.compile(r"model\.(\d+)\.")


def rename(name: str) -> str:
    """An official entry's name in zoo's terms; other names stay."""
    block = _BLOCK.match(name)
    prefix, rest = (f"blocks.{block[1]}.", name[block.end() :]) if block else ("", name)
    for official, ours in _NAMES.items():
        if rest.startswith(official):
            return prefix + ours + rest[len(official) :]
    return prefix + rest


@checkpoint_converter(
    Activator,
    layouts={
        "Activator": (
            "patcher.weight",
            "model.0.actgu.proj_1.weight",
            "model.0.actgu.norm.weight",
            "model.0.ffn.net.0.weight",
        ),
        "Activator GEGLU-only": ("patcher.weight", "model.0.actgu.proj_1.weight", "model.0.actgu.norm.weight"),
        "Uniform Activator": ("patcher.weight", "model.0.actgu.proj_1.weight"),
    },
)
def convert_checkpoint(state_dict: StateDict, model: nn.Module) -> Conversion:
    """Official entries under zoo's names; the patch kernel is resampled if the model's patches have another size."""
    layout = "zoo"
    if "patcher.weight" in state_dict:
        layout = "Activator" if "model.0.ffn.net.0.weight" in state_dict else "Activator GEGLU-only"
        if "model.0.actgu.norm.weight" not in state_dict:
            layout = "Uniform Activator"
    state = {rename(name): value for name, value in state_dict.items()}
    kernel, patch = state.get("patch_embed.proj.weight"), tuple(model.patch_embed.patch_size)
    if kernel is None or kernel.ndim != 4 or tuple(kernel.shape[-2:]) == patch:
        return Conversion(state, layout)
    state["patch_embed.proj.weight"] = resample_patch_embed(kernel, list(patch))
    note = f"the patch kernel was resampled from {tuple(kernel.shape[-2:])} to {patch}"
    return Conversion(state, layout, (note,))


def constructor_arguments(state_dict: StateDict) -> dict[str, Any]:
    """The arguments of `Activator` that a file's shapes tell: official or zoo's names."""
    state = {rename(name): value for name, value in state_dict.items()}
    kernel = state["patch_embed.proj.weight"]
    patch = tuple(kernel.shape[-2:])
    return dict(
        patch_size=patch[0] if patch[0] == patch[1] else patch,
        in_chans=kernel.shape[1],
        num_classes=len(state["head.weight"]) if "head.weight" in state else 0,
        embed_dim=kernel.shape[0],
        depth=sum(name.endswith(".glu.fc1_g.weight") for name in state),
        hidden_dim=len(state["blocks.0.glu.fc1_g.weight"]),
        mlp="blocks.0.mlp.fc1.weight" in state,
        gate_norm="blocks.0.glu.norm.weight" in state,
    )


# Variants ------------------------------------------------------------------------------------------------------


def _cfg(**fields: Any) -> dict[str, Any]:
    defaults = dict(
        pool_size=None,
        crop_pct=0.9,
        first_conv="patch_embed.proj",
        classifier="head",
        license="bsd-3-clause",
        origin_url="https://github.com/Abdullah-88/Activator",
        paper_ids="arXiv:2405.15953",
    )
    return pretrained_cfg(**defaults | fields)


def _cifar_cfg(**fields: Any) -> dict[str, Any]:
    defaults = dict(input_size=(3, 32, 32), num_classes=10, crop_pct=1.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return _cfg(**defaults | fields)


default_cfgs = generate_default_cfgs(
    {
        "activator_patch4_32.cifar10": _cifar_cfg(),
        "activator_patch4_32.cifar100": _cifar_cfg(num_classes=100),
        "activator_geglu_patch4_32.cifar10": _cifar_cfg(),
        "activator_geglu_patch4_32.cifar100": _cifar_cfg(num_classes=100),
        "uniform_activator_patch4_32.cifar10": _cifar_cfg(
            origin_url="https://github.com/Abdullah-88/Uniform_Activator", paper_ids=None
        ),
        "activator_tiny_patch16_224.untrained": _cfg(),
        "activator_small_patch16_224.untrained": _cfg(),
        "activator_base_patch16_224.untrained": _cfg(),
        "activator_geglu_tiny_patch16_224.untrained": _cfg(),
        "activator_geglu_small_patch16_224.untrained": _cfg(),
        "activator_geglu_base_patch16_224.untrained": _cfg(),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> Activator:
    depth = kwargs["depth"]
    quarters = tuple(sorted({-(-depth * k // 4) - 1 for k in (1, 2, 3, 4)}))
    feature_cfg = dict(out_indices=kwargs.pop("out_indices", quarters), feature_cls="getter")
    return build_model(Activator, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


_CIFAR = dict(img_size=32, patch_size=4, embed_dim=256, depth=4, hidden_dim=512)
_TINY = dict(embed_dim=192, depth=12)  # GEGLU only has four times the width: as many weights a layer as a ViT
_SMALL = dict(embed_dim=384, depth=12)
_BASE = dict(embed_dim=768, depth=12)


@register_model
def activator_patch4_32(pretrained: bool = False, **kwargs: Any) -> Activator:
    """The first version's model for 32 px, with MLP, patches never mix: 2.65 M parameters, 0.169 G multiply-adds.

    Trained by the authors with `proj_drop_rate=0.5`.
    """
    return _create("activator_patch4_32", pretrained, **_CIFAR | kwargs)


@register_model
def activator_geglu_patch4_32(pretrained: bool = False, **kwargs: Any) -> Activator:
    """The last version's model for 32 px, GEGLU only, patches never mix: 1.60 M parameters, 0.101 G multiply-adds."""
    return _create("activator_geglu_patch4_32", pretrained, **_CIFAR | dict(mlp=False) | kwargs)


@register_model
def uniform_activator_patch4_32(pretrained: bool = False, **kwargs: Any) -> Activator:
    """Uniform_Activator for 32 px, patches never mix: 0.81 M parameters, 0.051 G multiply-adds."""
    uniform = dict(hidden_dim=256, mlp=False, gate_norm=False)
    return _create("uniform_activator_patch4_32", pretrained, **_CIFAR | uniform | kwargs)


@register_model
def activator_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Activator:
    """This project's size, with MLP, patches never mix: 4.80 M parameters, 0.896 G multiply-adds at 224 px."""
    return _create("activator_tiny_patch16_224", pretrained, **_TINY | kwargs)


@register_model
def activator_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Activator:
    """This project's size, with MLP, patches never mix: 18.4 M parameters, 3.53 G multiply-adds at 224 px."""
    return _create("activator_small_patch16_224", pretrained, **_SMALL | kwargs)


@register_model
def activator_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Activator:
    """This project's size, with MLP, patches never mix: 72.3 M parameters, 14.0 G multiply-adds at 224 px."""
    return _create("activator_base_patch16_224", pretrained, **_BASE | kwargs)


@register_model
def activator_geglu_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Activator:
    """This project's size, GEGLU only, patches never mix: 5.69 M parameters, 1.07 G multiply-adds at 224 px."""
    return _create("activator_geglu_tiny_patch16_224", pretrained, **_TINY | dict(mlp=False) | kwargs)


@register_model
def activator_geglu_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Activator:
    """This project's size, GEGLU only, patches never mix: 22.0 M parameters, 4.22 G multiply-adds at 224 px."""
    return _create("activator_geglu_small_patch16_224", pretrained, **_SMALL | dict(mlp=False) | kwargs)


@register_model
def activator_geglu_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Activator:
    """This project's size, GEGLU only, patches never mix: 86.5 M parameters, 16.8 G multiply-adds at 224 px."""
    return _create("activator_geglu_base_patch16_224", pretrained, **_BASE | dict(mlp=False) | kwargs)
