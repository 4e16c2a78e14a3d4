"""CRATE: each layer compresses tokens against learned subspaces, then sparsifies them (arXiv 2306.01129).

A layer is one alternating step on "sparse rate reduction". MSSA, attention whose query, key and value are
the same projection, pulls the tokens towards K low-dimensional subspaces; ISTA, one proximal-gradient step
of non-negative LASSO with a square dictionary, makes them sparse. CRATE-alpha (arXiv 2405.20299) has an
overcomplete dictionary, a separate output dictionary and a residual around the sparse step.

`forward_features` returns the tokens after the last layer. Supervised CRATE has no norm there: its tokens are
non-negative and about half of their entries are exact zeros. The official head's LayerNorm (`mlp_head.0`)
acts on the pooled vector and is `fc_norm` here, so `norm` is an identity, as in timm's average-pooled ViT.

Differs from the official code: the position table is resampled for other image sizes (`pos_mode` has the
official behaviours); a training step computes ISTA with one or two matrix products instead of three,
whichever is cheaper, and `zoo.fold` merges them into one; rectangular images and any number of channels.
`global_pool="avg"` is the official `pool="mean"`: over all tokens, the class token included.
"""

# without `from __future__ import annotations`: fx would write forward's types as strings that TorchScript refuses
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from timm.layers import LayerNorm, PatchEmbed, calculate_drop_path_rates, get_device_dtype, to_2tuple
from timm.models import checkpoint, checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo._timm import feature_take_indices, update_model_input_size
from zoo.builder import build_model, pretrained_cfg
from zoo.checkpoint import checkpoint_converter
from zoo.crate_blocks import (
    CrateAlphaBlock,
    CrateBlock,
    NormPatchEmbed,
    PosMode,
    check_image_size,
    resample_pos_embed,
    sincos_pos_embed,
)
from zoo.crate_checkpoint import LAYOUTS, convert_checkpoint

__all__ = ["Crate", "learning_rate_factor"]


class Crate(nn.Module):
    """CRATE, CRATE-alpha and the encoder of CRATE-MAE: tokens of one scale, a class token first."""

    __constants__ = ["dynamic_img_size"]

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        head_dim: int | None = None,
        step_size: float = 0.1,
        lambd: float = 0.1,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
        pos_mode: PosMode = "resample",
        block_fn: Callable[..., nn.Module] = CrateBlock,
        norm_eps: float = 1e-5,
        head_norm_eps: float = 1e-5,
        patch_norm: bool = True,
        final_norm: bool = False,
        weight_init: Literal["crate", "mae"] = "crate",
        device=None,
        dtype=None,
    ):
        """Build the model.

        Args:
            img_size: image height and width that the position table is for.
            patch_size: side of a patch.
            in_chans: input channels.
            num_classes: classes, 0 for pooled features.
            global_pool: "token" (class token), "avg" (mean of all tokens) or "" (none).
            embed_dim: width of the tokens.
            depth: layers.
            num_heads: subspaces a layer.
            head_dim: dimension of a subspace, embed_dim / num_heads if None.
            step_size: step of ISTA, the official `ista`.
            lambd: sparsity weight of ISTA; not part of a checkpoint.
            drop_rate: dropout before the classifier.
            pos_drop_rate: dropout after the position table.
            proj_drop_rate: dropout after MSSA's output map.
            attn_drop_rate: dropout of attention weights.
            drop_path_rate: stochastic depth of the residual branches, growing to this rate.
            dynamic_img_size: take any multiple of the patch, with the position table adapted in each call.
            pos_mode: how the table is adapted, see `resample_pos_embed`.
            block_fn: `CrateBlock` or `CrateAlphaBlock`.
            norm_eps: epsilon of the LayerNorms in tokenizer and layers.
            head_norm_eps: epsilon of the LayerNorm of the head or, with `final_norm`, of the trunk.
            patch_norm: LayerNorms before and behind the patch projection, else a plain convolution.
            final_norm: the trunk ends with a LayerNorm and the head has none.
            weight_init: "mae" has the initialisation and the frozen sine-cosine table of CRATE-MAE.
            device: device of all parameters.
            dtype: dtype of all parameters.
        """
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        _check_pool(global_pool)
        if pos_mode not in ("resample", "offset", "prefix"):
            raise ValueError(f"pos_mode={pos_mode!r} is unknown: pass 'resample', 'offset' or 'prefix'")
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(f"embed_dim={embed_dim} is no multiple of num_heads={num_heads}: pass head_dim")
            head_dim = embed_dim // num_heads
        size, patch = to_2tuple(img_size), to_2tuple(patch_size)
        _check_divisible(size, patch)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1
        self.dynamic_img_size = dynamic_img_size
        self.pos_mode = pos_mode
        self.weight_init = weight_init
        self.grad_checkpointing = False

        strict = not dynamic_img_size
        if patch_norm:
            self.patch_embed = NormPatchEmbed(size, patch, in_chans, embed_dim, norm_eps, strict, **dd)
        else:
            self.patch_embed = PatchEmbed(size, patch, in_chans, embed_dim, strict_img_size=strict, **dd)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        table = torch.empty(1, 1 + self.patch_embed.num_patches, embed_dim, **dd)
        if weight_init == "mae":
            self.register_buffer("pos_embed", table)
        else:
            self.pos_embed = nn.Parameter(table)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.blocks = nn.Sequential(
            *[
                block_fn(
                    embed_dim,
                    num_heads,
                    head_dim,
                    step_size=step_size,
                    lambd=lambd,
                    attn_drop=attn_drop_rate,
                    proj_drop=proj_drop_rate,
                    drop_path=rate,
                    norm_eps=norm_eps,
                    **dd,
                )
                for rate in calculate_drop_path_rates(drop_path_rate, depth)
            ]
        )
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [dict(module=f"blocks.{i}", num_chs=embed_dim, reduction=reduction) for i in range(depth)]
        self.norm = LayerNorm(embed_dim, eps=head_norm_eps, **dd) if final_norm else nn.Identity()
        self.fc_norm = nn.Identity() if final_norm else LayerNorm(embed_dim, eps=head_norm_eps, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draw all weights anew as the official code does: positions and class token from N(0, 1).

        CRATE-MAE: Xavier-uniform linear maps, N(0, 0.02^2) tokens, the fixed table.
        """
        mae = self.weight_init == "mae"
        for module in self.modules():
            if mae and isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.data.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        nn.init.normal_(self.cls_token, std=0.02 if mae else 1.0)
        if mae:
            self.pos_embed.copy_(sincos_pos_embed(self.patch_embed.grid_size, self.embed_dim))
        else:
            nn.init.normal_(self.pos_embed)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves alone."""
        return {"cls_token"} if self.weight_init == "mae" else {"cls_token", "pos_embed"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters by depth, for layer-wise learning rates."""
        return dict(
            stem=r"^cls_token|^pos_embed|^patch_embed",
            blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the layers in the backward pass instead of storing their activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The linear classifier, an identity without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling if one is named.

        Raises:
            ValueError: a pooling other than "token", "avg" and "".
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
        """Rebuild in place for another size of images or patches; the position table is resampled.

        Raises:
            ValueError: the size is no multiple of the patch.
        """
        old = self.patch_embed.grid_size
        size = to_2tuple(img_size) if img_size is not None else self.patch_embed.img_size
        patch = to_2tuple(patch_size) if patch_size is not None else self.patch_embed.patch_size
        _check_divisible(size, patch)
        self.patch_embed.set_input_size(size, patch)
        new = self.patch_embed.grid_size
        if new != old:
            mode = "resample" if self.pos_mode == "prefix" else self.pos_mode
            table = resample_pos_embed(self.pos_embed.detach(), list(new), list(old), mode)
            if isinstance(self.pos_embed, nn.Parameter):
                table = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
            self.pos_embed = table
        for info in self.feature_info:
            info["reduction"] = self.patch_embed.feat_ratio()
        update_model_input_size(self, size, patch_size=patch_size)

    def add_position(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patch tokens (B, N, C) of a grid -> (B, 1 + N, C) with the class token and positions."""
        table = self.pos_embed
        if self.dynamic_img_size:
            table = resample_pos_embed(table, grid, self.patch_embed.grid_size, self.pos_mode)
        x = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        return self.pos_drop(x + table)

    def embed(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> the tokens (B, 1 + N, C) that enter the first layer."""
        check_image_size(x, self.patch_embed.img_size, self.patch_embed.patch_size, self.dynamic_img_size)
        grid = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        return self.add_position(self.patch_embed(x), grid)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> tokens (B, 1 + N, embed_dim) after the last layer, class token first."""
        return self.forward_tokens(self.embed(x))

    def forward_tokens(self, x: Tensor) -> Tensor:
        """Tokens (B, 1 + N, C) that enter the first layer -> those that leave the trunk."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of chosen layers, and `forward_features` unless `intermediates_only`.

        Args:
            x: images (B, C, H, W).
            indices: all layers if None, the last n if a number, else these.
            return_prefix_tokens: pairs of (patch tokens, class token) instead of patch tokens.
            norm: apply the trunk's final norm to each (there is one in CRATE-MAE only).
            stop_early: do not run layers behind the last chosen one.
            output_fmt: "NCHW" maps or "NLC" tokens.
            intermediates_only: return the list alone.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r} is unknown: pass 'NCHW' or 'NLC'")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        B, _, height, width = x.shape
        x = self.embed(x)
        blocks = self.blocks if torch.jit.is_scripting() or not stop_early else self.blocks[: max_index + 1]
        taps: list[Tensor] = []
        for i, block in enumerate(blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
            if i in take_indices:
                taps.append(self.norm(x) if norm else x)
        prefixes = [tap[:, :1] for tap in taps]
        taps = [tap[:, 1:] for tap in taps]
        if output_fmt == "NCHW":
            H, W = self.patch_embed.dynamic_feat_size((height, width))
            taps = [tap.reshape(B, H, W, -1).permute(0, 3, 1, 2).contiguous() for tap in taps]
        if not torch.jit.is_scripting() and return_prefix_tokens:
            taps = list(zip(taps, prefixes))
        if intermediates_only:
            return taps
        return self.norm(x), taps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Cut what the chosen layers do not need; returns their absolute indices."""
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return take_indices

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, 1 + N, C) -> logits: pool, norm, dropout, classifier, which `pre_logits` leaves out."""
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x.mean(dim=1)
        x = self.head_drop(self.fc_norm(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _check_pool(global_pool: str) -> None:
    if global_pool not in ("token", "avg", ""):
        raise ValueError(f"global_pool={global_pool!r} is unknown to CRATE: pass 'token', 'avg' or ''")


def _check_divisible(size: tuple[int, int], patch: tuple[int, int]) -> None:
    if size[0] % patch[0] or size[1] % patch[1]:
        raise ValueError(f"img_size={size} is no multiple of patch_size={patch}: pass a multiple")


checkpoint_converter(Crate, layouts=LAYOUTS)(convert_checkpoint)


def learning_rate_factor(epoch: int, epochs: int, warmup_epochs: int = 20) -> float:
    """Factor of the learning rate in an epoch (from 0) in the official training script.

    The smaller of a linear warm-up and a cosine over all epochs, so the peak stays below 1.
    """
    warmup = (epoch + 1) / (warmup_epochs + 1e-8)
    return min(warmup, (1 + math.cos(math.pi * epoch / epochs)) / 2)


def cfg(**fields: Any) -> dict[str, Any]:
    """Evaluation of the official code: bilinear resize to 256, centre crop of 224."""
    defaults = dict(
        pool_size=None,
        interpolation="bilinear",
        fixed_input_size=True,
        first_conv="patch_embed.proj",
        classifier="head",
        origin_url="https://github.com/Ma-Lab-Berkeley/CRATE",
        paper_ids="arXiv:2306.01129",
    )
    return pretrained_cfg(**defaults | fields)


def _demo_cfg() -> dict[str, Any]:
    return cfg(
        num_classes=21842,
        origin_url="https://github.com/LeslieTrue/crate-emergence-notebooks",
        paper_ids="arXiv:2308.16271",
    )


def _alpha_cfg(file: str | None = None, **fields: Any) -> dict[str, Any]:
    address = dict(hf_hub_id="UCSC-VLAA/CRATE-alpha", hf_hub_filename=f"torch/{file}") if file else {}
    paper = dict(origin_url="https://github.com/UCSC-VLAA/CRATE-alpha", paper_ids="arXiv:2405.20299")
    return cfg(**address, **paper, **fields)


def _clipa_cfg(file: str) -> dict[str, Any]:
    """The vision tower of a contrastive model: features, no classes."""
    return _alpha_cfg(file, num_classes=0, crop_pct=1.0)


default_cfgs = generate_default_cfgs(
    {
        "crate_tiny.in1k": cfg(),
        "crate_small.in1k": cfg(),
        "crate_base.in1k": cfg(),
        "crate_large.in1k": cfg(),
        "crate_small_p8.in1k": cfg(),
        "crate_base_demo.in21k": _demo_cfg(),
        "crate_small_p8_21k.in21k": _demo_cfg(),
        "crate_base_p8_21k.in21k": _demo_cfg(),
        "crate_alpha_small_p16.in1k": _alpha_cfg(),
        "crate_alpha_base_p32.in21k_ft_in1k": _alpha_cfg(),
        "crate_alpha_base_p16.in21k_ft_in1k": _alpha_cfg("crate_alpha_B16.pth"),
        "crate_alpha_base_p8.in21k_ft_in1k": _alpha_cfg(),
        "crate_alpha_large_p32.in21k_ft_in1k": _alpha_cfg(),
        "crate_alpha_large_p14.in21k_ft_in1k": _alpha_cfg("crate_alpha_L14.pth"),
        "crate_alpha_large_p8.in21k_ft_in1k": _alpha_cfg(),
        "crate_alpha_large_p14.datacomp1b": _clipa_cfg("crate_alpha_CLIPA_L14.pth"),
        "crate_alpha_huge_p14.datacomp1b": _clipa_cfg("crate_alpha_CLIPA_H14.pth"),
    }
)


def create(variant: str, pretrained: bool, **kwargs: Any) -> Crate:
    """Build a registered variant of `Crate` from its arguments joined with the user's."""
    out_indices = kwargs.pop("out_indices", 3)
    feature_cfg = dict(out_indices=out_indices, feature_cls="getter")
    return build_model(Crate, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


_TINY = dict(embed_dim=384, depth=12, num_heads=6)
_SMALL = dict(embed_dim=576, depth=12, num_heads=12)
_BASE = dict(embed_dim=768, depth=12, num_heads=12)
_LARGE = dict(embed_dim=1024, depth=24, num_heads=16)
_HUGE = dict(embed_dim=1280, depth=32, num_heads=16)
_ALPHA = dict(block_fn=CrateAlphaBlock, patch_norm=False, norm_eps=1e-6)


@register_model
def crate_tiny(pretrained: bool = False, **kwargs: Any) -> Crate:
    """CRATE-T/16: 6.1 M parameters, 2.16 G multiply-adds at 224 px, 1.46 G folded."""
    return create("crate_tiny", pretrained, **_TINY | kwargs)


@register_model
def crate_small(pretrained: bool = False, **kwargs: Any) -> Crate:
    """CRATE-S/16: 13.1 M parameters, 4.55 G multiply-adds at 224 px, 2.98 G folded."""
    return create("crate_small", pretrained, **_SMALL | kwargs)


@register_model
def crate_base(pretrained: bool = False, **kwargs: Any) -> Crate:
    """CRATE-B/16: 22.8 M parameters, 7.80 G multiply-adds at 224 px, 5.02 G folded."""
    return create("crate_base", pretrained, **_BASE | kwargs)


@register_model
def crate_large(pretrained: bool = False, **kwargs: Any) -> Crate:
    """CRATE-L/16: 77.6 M parameters, 26.9 G multiply-adds at 224 px, 16.9 G folded."""
    return create("crate_large", pretrained, **_LARGE | kwargs)


@register_model
def crate_small_p8(pretrained: bool = False, **kwargs: Any) -> Crate:
    """CRATE-S/8: 13.1 M parameters, 24.2 G multiply-adds at 224 px."""
    return create("crate_small_p8", pretrained, **dict(patch_size=8) | _SMALL | kwargs)


@register_model
def crate_base_demo(pretrained: bool = False, **kwargs: Any) -> Crate:
    """The segmentation notebook's B/8 with 6 heads, ImageNet-21K: 38.8 M parameters, 39.3 G multiply-adds."""
    return create("crate_base_demo", pretrained, **dict(patch_size=8) | _BASE | dict(num_heads=6) | kwargs)


@register_model
def crate_small_p8_21k(pretrained: bool = False, **kwargs: Any) -> Crate:
    """The notebooks' "small" /8 model of width 384, ImageNet-21K: 14.1 M parameters, 12.7 G multiply-adds."""
    return create("crate_small_p8_21k", pretrained, **dict(patch_size=8) | _TINY | kwargs)


@register_model
def crate_base_p8_21k(pretrained: bool = False, **kwargs: Any) -> Crate:
    """CRATE-B/8 with 12 heads, ImageNet-21K: 38.8 M parameters, 39.3 G multiply-adds."""
    return create("crate_base_p8_21k", pretrained, **dict(patch_size=8) | _BASE | kwargs)


@register_model
def crate_alpha_small_p16(pretrained: bool = False, **kwargs: Any) -> Crate:
    """CRATE-alpha-S/16: 41.0 M parameters, 14.7 G multiply-adds at 224 px."""
    return create("crate_alpha_small_p16", pretrained, **_ALPHA | _SMALL | kwargs)


@register_model
def crate_alpha_base_p32(pretrained: bool = False, **kwargs: Any) -> Crate:
    """CRATE-alpha-B/32: 74.0 M parameters, 6.53 G multiply-adds at 224 px."""
    return create("crate_alpha_base_p32", pretrained, **dict(patch_size=32) | _ALPHA | _BASE | kwargs)


@register_model
def crate_alpha_base_p16(pretrained: bool = False, **kwargs: Any) -> Crate:
    """CRATE-alpha-B/16: 72.3 M parameters, 25.9 G multiply-adds at 224 px."""
    return create("crate_alpha_base_p16", pretrained, **_ALPHA | _BASE | kwargs)


@register_model
def crate_alpha_base_p8(pretrained: bool = False, **kwargs: Any) -> Crate:
    """CRATE-alpha-B/8: 72.3 M parameters, 111 G multiply-adds at 224 px."""
    return create("crate_alpha_base_p8", pretrained, **dict(patch_size=8) | _ALPHA | _BASE | kwargs)


@register_model
def crate_alpha_large_p32(pretrained: bool = False, **kwargs: Any) -> Crate:
    """CRATE-alpha-L/32: 256 M parameters, 22.9 G multiply-adds at 224 px."""
    return create("crate_alpha_large_p32", pretrained, **dict(patch_size=32) | _ALPHA | _LARGE | kwargs)


@register_model
def crate_alpha_large_p14(pretrained: bool = False, **kwargs: Any) -> Crate:
    """CRATE-alpha-L/14: 254 M parameters, 120 G multiply-adds at 224 px."""
    return create("crate_alpha_large_p14", pretrained, **dict(patch_size=14) | _ALPHA | _LARGE | kwargs)


@register_model
def crate_alpha_large_p8(pretrained: bool = False, **kwargs: Any) -> Crate:
    """CRATE-alpha-L/8: 254 M parameters, 386 G multiply-adds at 224 px."""
    return create("crate_alpha_large_p8", pretrained, **dict(patch_size=8) | _ALPHA | _LARGE | kwargs)


@register_model
def crate_alpha_huge_p14(pretrained: bool = False, **kwargs: Any) -> Crate:
    """CRATE-alpha-H/14 (the vision tower of CLIPA-H): 527 M parameters, 248 G multiply-adds at 224 px."""
    return create("crate_alpha_huge_p14", pretrained, **dict(patch_size=14) | _ALPHA | _HUGE | kwargs)
