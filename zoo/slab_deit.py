"""DeiT with SLAB's norm, or with its norm and its attention."""

# without `from __future__ import annotations`: fx would write forward's types as strings that TorchScript refuses
from functools import partial
from typing import Any

import torch
from timm.layers import (
    PatchEmbed,
    calculate_drop_path_rates,
    get_device_dtype,
    global_pool_nlc,
    resample_abs_pos_embed,
    to_2tuple,
)
from timm.models import register_notrace_function
from torch import Tensor, nn

from zoo._timm import feature_take_indices, update_model_input_size
from zoo.prepbn import PRepBN, checkpoint_block, fold_into_linear
from zoo.slab_attention import Attention
from zoo.slab_blocks import Block, init_weights
from zoo.slab_windows import WindowLinearAttention


@register_notrace_function
def add_position(x: Tensor, table: Tensor, grid: tuple[int, int], cls_token: Tensor | None) -> Tensor:
    """Tokens (B, H, W, C) with the class token, if any, in front: (B, N, C); the position table added."""
    B, H, W, C = x.shape
    x = x.reshape(B, H * W, C)
    if cls_token is not None:
        x = torch.cat([cls_token.expand(B, -1, -1), x], dim=1)
    if grid[0] != H or grid[1] != W:
        prefix = 0 if cls_token is None else 1
        table = resample_abs_pos_embed(table, new_size=[H, W], old_size=grid, num_prefix_tokens=prefix)
    return x + table


class SlabDeit(nn.Module):
    """DeiT-PRepBN (softmax attention, class token) and SLAB-DeiT (linear attention, mean of the tokens).

    Args:
        img_size: image size (pixels, or (height, width)) that the position tables are made for; any other size
            works and resamples them in each call (`set_input_size` does it once). Images are padded to whole
            patches.
        patch_size: side of a patch.
        in_chans: channels of the image.
        num_classes: 0 for pooled features.
        global_pool: "avg", "token", another pooling of timm's, or "" for tokens; None: "avg" with linear
            attention, "token" with softmax attention.
        embed_dim: width.
        depth: blocks.
        num_heads: heads of each block.
        mlp_ratio: hidden width of the MLPs, relative.
        qkv_bias: bias of query, key and value.
        linear: linear attention without class token instead of softmax attention with one.
        kernel_size: of the linear attention's depthwise convolution.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout in the MLPs and after the position table.
        drop_path_rate: stochastic depth, growing linearly over the blocks.
        norm_layer: `PRepBN`, `RepBN` or another norm over the last axis.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        linear: bool = True,
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
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.num_prefix_tokens = 0 if linear else 1
        self.linear = linear
        default_pool = "avg" if linear else "token"
        self.global_pool = self._checked_pool(default_pool if global_pool is None else global_pool)
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(
            img_size,
            patch_size,
            in_chans,
            embed_dim,
            output_fmt="NHWC",
            strict_img_size=False,
            dynamic_img_pad=True,
            **dd,
        )
        self.grid = self.patch_embed.dynamic_feat_size(to_2tuple(img_size))  # of the position tables
        tokens = self.grid[0] * self.grid[1] + self.num_prefix_tokens
        self.cls_token = None if linear else nn.Parameter(torch.zeros(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim, **dd))
        self.pos_drop = nn.Dropout(proj_drop_rate)
        if linear:
            attention = partial(WindowLinearAttention, grid=self.grid, kernel_size=kernel_size)
        else:
            attention = Attention
        self.blocks = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    attention(embed_dim, num_heads, qkv_bias=qkv_bias, **dd),
                    mlp_ratio,
                    drop=proj_drop_rate,
                    drop_path=rate,
                    norm_layer=norm_layer,
                    **dd,
                )
                for rate in calculate_drop_path_rates(drop_path_rate, depth)
            )
        )
        self.norm = norm_layer(embed_dim, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.feature_info = [dict(module=f"blocks.{i}", num_chs=embed_dim, reduction=patch_size) for i in range(depth)]
        self.init_weights()

    def _checked_pool(self, pool: str) -> str:
        allowed = ["", "avg", "avgmax", "max"] + ["token"] * (self.num_prefix_tokens > 0)
        if pool not in allowed:
            raise ValueError(f"global_pool={pool!r}: this model has {', '.join(map(repr, allowed))}")
        return pool

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Truncated normal (std 0.02) for linear layers and position tables, zeros for those of the keys."""
        self.apply(init_weights)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for layer-wise learning rates."""
        return dict(stem=r"^cls_token|pos_embed|patch_embed", blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))])

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The position table of the tokens and the class token; the keys' tables are decayed."""
        return {"pos_embed"} if self.cls_token is None else {"pos_embed", "cls_token"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; 0 classes give pooled features, with `global_pool=""` tokens."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = self._checked_pool(global_pool)
        dd = get_device_dtype(self)
        self.head = nn.Linear(self.embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Resample the position tables in place for another image size."""
        if img_size is None:
            return
        grid = self.patch_embed.dynamic_feat_size(to_2tuple(img_size))
        table = resample_abs_pos_embed(self.pos_embed.detach(), list(grid), list(self.grid), self.num_prefix_tokens)
        self.pos_embed = nn.Parameter(table.clone(), requires_grad=self.pos_embed.requires_grad)
        for block in self.blocks:
            if self.linear:
                block.attn.set_grid(*grid)
        self.grid = grid
        self.patch_embed.set_input_size(to_2tuple(img_size))
        update_model_input_size(self, to_2tuple(img_size))

    def _embed(self, x: Tensor) -> Tensor:
        """Image -> (B, H, W, C) for linear attention, (B, 1 + N, C) for softmax attention."""
        x = self.patch_embed(x)
        tokens = self.pos_drop(add_position(x, self.pos_embed, self.grid, self.cls_token))
        return tokens.reshape(x.shape) if self.linear else tokens

    def _tokens(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2) if self.linear else x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Any]]:
        """Outputs of the blocks, as maps (NCHW) or tokens (NLC), the class token split off."""
        assert output_fmt in ("NCHW", "NLC"), f"output_fmt={output_fmt!r} must be 'NCHW' or 'NLC'"
        take, last = feature_take_indices(len(self.blocks), indices)
        H, W = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        x = self._embed(x)
        taps: list[Tensor] = []
        blocks = self.blocks if torch.jit.is_scripting() or not stop_early else self.blocks[: last + 1]
        for i, block in enumerate(blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_block(block, x)
            else:
                x = block(x)
            if i in take:
                taps.append(self._tokens(self.norm(x) if norm else x))
        prefix = [y[:, : self.num_prefix_tokens] for y in taps]
        taps = [y[:, self.num_prefix_tokens :] for y in taps]
        if output_fmt == "NCHW":
            taps = [y.transpose(1, 2).unflatten(2, (H, W)).contiguous() for y in taps]
        if not torch.jit.is_scripting() and return_prefix_tokens:
            taps = list(zip(taps, prefix))
        return taps if intermediates_only else (self._tokens(self.norm(x)), taps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Cut what follows the last tap; returns the taps as absolute indices."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Merge the final norm into the classifier: the features then are those before the norm."""
        if isinstance(self.head, nn.Linear) and self.global_pool in ("", "avg", "token"):
            self.norm = fold_into_linear(self.norm, self.head)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> tokens (B, N, C), after the norm."""
        x = self._embed(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for block in self.blocks:
                x = checkpoint_block(block, x)
        else:
            x = self.blocks(x)
        return self._tokens(self.norm(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling and classifier."""
        x = self.head_drop(global_pool_nlc(x, self.global_pool, self.num_prefix_tokens))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))
