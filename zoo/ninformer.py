"""NiNformer: a network inside each block makes the gate of the token path (arXiv 2403.02411).

A ViT block with attention replaced by an element-wise product: a linear value path times the output of a whole
MLP-Mixer block, run on the same normalised tokens. Mixer weights are fixed; multiplying their result into the
value path makes the mixing depend on the input, at a cost linear in the tokens. An ordinary MLP follows. There
is no position table (token-mixing weights know their place), no class token, and no norm before the pooling.

One LayerNorm serves both halves of a block, as in the official code: its gradient is the sum of both uses.

Differs from the official code: the sizes of the images are checked, not cropped silently (`dynamic_img_pad` pads);
dropout is 0 unless asked for (the authors trained with `proj_drop_rate=0.5`); other grids of patches. For those the
tokens are resampled to the grid g0 that the model was built for, mixed there, and the branch is resampled back:

    branch = R(g0 -> g) (W2 gelu(W1 R(g -> g0) LN(x) + b1) + b2)        R: antialiased bicubic resize

`dynamic_img_size=True` does so in every call. `set_input_size`, and loading a file of another number of tokens,
fold R into W1, W2 and b2, which gives the same outputs. The rule and the ImageNet sizes (`*_patch16_224`, widths and
depths of DeiT) are this project's; the paper's models are the `*_patch4_32` ones. No weights were released.

Token maps are neither normalised nor bounded (two paths are multiplied): a dense head should norm each tap.
`fourier_ninformer_*`, the authors' relative without a paper, has a Fourier transform for a gate and takes any size.
"""

# without `from __future__ import annotations`: fx would write forward's types as strings that TorchScript refuses
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import (
    LayerNorm,
    PatchEmbed,
    calculate_drop_path_rates,
    get_device_dtype,
    register_notrace_function,
    resample_patch_embed,
    to_2tuple,
)
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo._timm import feature_take_indices, get_pretrained_grid_size, update_model_input_size
from zoo.builder import build_model, pretrained_cfg
from zoo.checkpoint import CheckpointError, Conversion, StateDict, checkpoint_converter
from zoo.dropout import replace_dropout
from zoo.ninformer_blocks import FourierGate, MixerGate, NinBlock, fold_resampling, native_grid_maps

__all__ = ["NinFormer", "constructor_arguments"]

torch.fx.wrap("native_grid_maps")  # fx looks for wrapped functions in the caller's module


class NinFormer(nn.Module):
    """NiNformer: tokens of one scale at the stride of the patches, (B, 3, H, W) -> logits."""

    __constants__ = ["dynamic_img_size", "pooled_tail"]

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 12,
        hidden_dim: int | None = None,
        token_dim: int | None = None,
        channel_dim: int | None = None,
        gate_layer: Callable[..., nn.Module] = MixerGate,
        act_layer: type[nn.Module] = nn.GELU,
        norm_eps: float = 1e-5,
        final_norm: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        device=None,
        dtype=None,
    ):
        """Build the model.

        Args:
            img_size: image height and width; the token-mixing weights are for its grid of patches.
            patch_size: side of a patch.
            in_chans: input channels.
            num_classes: classes, 0 for pooled features.
            global_pool: "avg" (mean over the tokens) or "" (none).
            embed_dim: width of the tokens.
            depth: blocks.
            hidden_dim: width of the outer MLP, twice the tokens' if None.
            token_dim: hidden width of the gate's token MLP, `hidden_dim` if None.
            channel_dim: hidden width of the gate's channel MLP, `hidden_dim` if None.
            gate_layer: `MixerGate` or `FourierGate`.
            act_layer: activation of the MLPs.
            norm_eps: epsilon of the LayerNorms.
            final_norm: end the trunk with a LayerNorm; the paper's has none.
            drop_rate: dropout before the classifier.
            proj_drop_rate: dropout after both layers of every MLP.
            drop_path_rate: stochastic depth of both residual branches, growing to this rate.
            dynamic_img_size: take any multiple of the patch, mixing tokens on the built grid.
            dynamic_img_pad: pad images at the right and at the bottom to a multiple of the patch.
            device: device of all parameters.
            dtype: dtype of all parameters.
        """
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        _check_pool(global_pool)
        hidden_dim = 2 * embed_dim if hidden_dim is None else hidden_dim
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 0
        self.final_norm = final_norm
        self.grad_checkpointing = False
        self.pooled_tail = False

        any_size = gate_layer is FourierGate
        self.dynamic_img_size = dynamic_img_size and not any_size
        self.patch_embed = PatchEmbed(
            img_size,
            patch_size,
            in_chans,
            embed_dim,
            strict_img_size=not (dynamic_img_size or any_size),
            dynamic_img_pad=dynamic_img_pad,
            **dd,
        )
        self.grid = self._grid_of(self.patch_embed.img_size)
        self.blocks = nn.Sequential(
            *[
                NinBlock(
                    embed_dim,
                    self.grid[0] * self.grid[1],
                    hidden_dim,
                    hidden_dim if token_dim is None else token_dim,
                    hidden_dim if channel_dim is None else channel_dim,
                    gate_layer=gate_layer,
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
        self.norm = LayerNorm(embed_dim, eps=norm_eps, **dd) if final_norm else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        replace_dropout(self)

    def _grid_of(self, size: tuple[int, int]) -> list[int]:
        patch = self.patch_embed.patch_size
        if not self.patch_embed.dynamic_img_pad and (size[0] % patch[0] or size[1] % patch[1]):
            raise ValueError(
                f"img_size={tuple(size)} is no multiple of patch_size={patch}: pass a multiple or dynamic_img_pad=True"
            )
        return list(self.patch_embed.dynamic_feat_size(size))

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
        return dict(stem=r"^patch_embed", blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))])

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
        """Rebuild in place for another size of images or patches.

        The resampling of the tokens is folded into the token-mixing weights, which then belong to the new grid;
        going back does not restore them.

        Raises:
            ValueError: the size is no multiple of the patch.
        """
        size = to_2tuple(img_size) if img_size is not None else self.patch_embed.img_size
        patch = to_2tuple(patch_size) if patch_size is not None else self.patch_embed.patch_size
        if not self.patch_embed.dynamic_img_pad and (size[0] % patch[0] or size[1] % patch[1]):
            raise ValueError(f"img_size={size} is no multiple of patch_size={patch}: pass a multiple")
        self.patch_embed.set_input_size(size, patch)
        old, self.grid = self.grid, self._grid_of(size)
        if self.grid != old:
            for block in self.blocks:
                if isinstance(block.gate, MixerGate):
                    block.gate.mlp_tokens.set_grid(self.grid, old)
        for info in self.feature_info:
            info["reduction"] = self.patch_embed.feat_ratio()
        update_model_input_size(self, size, patch_size=patch_size)

    def embed(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> the tokens (B, N, embed_dim) that enter the first block, row-major."""
        strict, pad = self.patch_embed.strict_img_size, self.patch_embed.dynamic_img_pad
        check_image_size(x, self.patch_embed.img_size, self.patch_embed.patch_size, strict, pad)
        # a view of the convolution's output would give every residual its layout, and every norm a copy
        return self.patch_embed(x).contiguous()

    def grid_maps(self, height: int, width: int, like: Tensor) -> list[Tensor] | None:
        """The resampling that images of this size need; None in a model of one size."""
        if not self.dynamic_img_size:
            return None
        return native_grid_maps(height, width, self.patch_embed.patch_size, self.grid, like)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> tokens (B, N, embed_dim) after the last block."""
        height, width = x.shape[-2], x.shape[-1]
        x = self.embed(x)
        maps = self.grid_maps(height, width, x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, maps)
            else:
                x = block(x, maps)
        return self.norm(x)

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
            norm: apply the trunk's final norm to each (an identity unless built with `final_norm`).
            stop_early: do not run blocks behind the last chosen one.
            output_fmt: "NCHW" maps or "NLC" tokens.
            intermediates_only: return the list alone.

        Raises:
            ValueError: another `output_fmt`.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r} is unknown: pass 'NCHW' or 'NLC'")
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        B, _, height, width = x.shape
        x = self.embed(x)
        maps = self.grid_maps(height, width, x)
        blocks = self.blocks if torch.jit.is_scripting() or not stop_early else self.blocks[: max_index + 1]
        taps: list[Tensor] = []
        for i, block in enumerate(blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, maps)
            else:
                x = block(x, maps)
            if i in take_indices:
                taps.append(self.norm(x) if norm else x)
        if output_fmt == "NCHW":
            H, W = self.patch_embed.dynamic_feat_size((height, width))
            taps = [tap.reshape(B, H, W, -1).permute(0, 3, 1, 2).contiguous() for tap in taps]
        if intermediates_only:
            return taps
        return self.norm(x), taps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Cut what the chosen blocks do not need; returns their absolute indices."""
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
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
        height, width = x.shape[-2], x.shape[-1]
        x = self.embed(x)
        maps = self.grid_maps(height, width, x)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            x = block.pooled(x, maps) if i == last else block(x, maps)
        return x

    @torch.jit.ignore
    def reparameterize(self) -> None:
        """Inference form of `forward`: pool before the last linear map, which is exact and saves N - 1 of N rows.

        The norms' affine parts could move into the linear maps behind them, but a LayerNorm without them is slower.
        """
        self.pooled_tail = not self.final_norm


@torch.fx.wrap
@register_notrace_function
def check_image_size(x: Tensor, img_size: list[int], patch_size: list[int], strict: bool, pad: bool) -> None:
    """Refuse a batch of images that the model was not built for.

    Raises:
        ValueError: with `strict` another size than the built one; no multiple of the patch unless `pad`.
    """
    h = x.shape[-2]
    w = x.shape[-1]
    if strict:
        if h != img_size[0] or w != img_size[1]:
            raise ValueError(
                f"model was built for {img_size[0]}x{img_size[1]} px, got {h}x{w}: pass img_size=({h}, {w}), "
                f"call model.set_input_size(({h}, {w})), or build it with dynamic_img_size=True"
            )
    elif not pad and (h % patch_size[0] != 0 or w % patch_size[1] != 0):
        raise ValueError(
            f"got an image of {h}x{w} px and patches of {patch_size[0]}x{patch_size[1]}: "
            "resize or crop it to a multiple of the patch, or build the model with dynamic_img_pad=True"
        )


def _check_pool(global_pool: str) -> None:
    if global_pool not in ("avg", ""):
        raise ValueError(f"global_pool={global_pool!r} is unknown to NiNformer: pass 'avg' or ''")


# Checkpoints ---------------------------------------------------------------------------------------------------

_NAMES = {
    "patcher.": "patch_embed.proj.",
    "classifier.": "head.",
    "mgu.Mixer.token_mix.0.": "gate.norm_tokens.",
    "mgu.Mixer.token_mix.2.net.0.": "gate.mlp_tokens.fc1.",
    "mgu.Mixer.token_mix.2.net.3.": "gate.mlp_tokens.fc2.",
    "mgu.Mixer.channel_mix.0.": "gate.norm_channels.",
    "mgu.Mixer.channel_mix.1.net.0.": "gate.mlp_channels.fc1.",
    "mgu.Mixer.channel_mix.1.net.3.": "gate.mlp_channels.fc2.",
    "mgu.proj.": "value.",
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
    NinFormer,
    layouts={
        "NiNformer": ("patcher.weight", "model.0.mgu.proj.weight", "model.0.mgu.Mixer.token_mix.0.weight"),
        "Fourier NiNformer": ("patcher.weight", "model.0.mgu.proj.weight"),
    },
)
def convert_checkpoint(state_dict: StateDict, model: nn.Module) -> Conversion:
    """Official entries under zoo's names, token mixing on the model's grid, kernels of its patch size.

    A file of as many tokens as the model has is loaded as it is: it does not tell its grid. For another number the
    grid is that of the weights' `pretrained_cfg` if the numbers agree, else square.

    Raises:
        CheckpointError: another number of tokens, on a grid that cannot be told.
    """
    official = "patcher.weight" in state_dict
    state = {rename(name): value for name, value in state_dict.items()} if official else dict(state_dict)
    fourier = official and not any(".gate." in name for name in state)
    layout = ("Fourier NiNformer" if fourier else "NiNformer") if official else "zoo"
    notes = tuple(note for note in (_fit_grid(state, model), _fit_patches(state, model)) if note)
    return Conversion(state, layout, notes)


def _fit_grid(state: StateDict, model: NinFormer) -> str | None:
    first = state.get("blocks.0.gate.mlp_tokens.fc1.weight")
    grid = list(model.grid)
    if first is None or first.ndim != 2 or first.shape[1] == grid[0] * grid[1]:
        return None
    tokens = first.shape[1]
    old = get_pretrained_grid_size(model, state.get("patch_embed.proj.weight"), tokens)
    if old is None:
        side = math.isqrt(tokens)
        if side * side != tokens:
            raise CheckpointError(
                f"the file mixes {tokens} tokens, no square grid, and the model has {grid[0]}x{grid[1]} patches: build "
                "it with the img_size that the file was trained at, load, then call set_input_size"
            )
        old = (side, side)
    i = 0
    while (gate := f"blocks.{i}.gate.mlp_tokens.") + "fc1.weight" in state:
        names = [gate + name for name in ("fc1.weight", "fc2.weight", "fc2.bias")]
        state.update(zip(names, fold_resampling(*(state[n] for n in names), grid, list(old))))
        i += 1
    return f"token mixing was resampled from {old[0]}x{old[1]} to {grid[0]}x{grid[1]} patches"


def _fit_patches(state: StateDict, model: NinFormer) -> str | None:
    kernel, patch = state.get("patch_embed.proj.weight"), model.patch_embed.patch_size
    if kernel is None or kernel.ndim != 4 or tuple(kernel.shape[-2:]) == tuple(patch):
        return None
    state["patch_embed.proj.weight"] = resample_patch_embed(kernel, list(patch))
    return f"the patch kernel was resampled from {tuple(kernel.shape[-2:])} to {tuple(patch)}"


def constructor_arguments(state_dict: StateDict) -> dict[str, Any]:
    """The arguments of `NinFormer` that a file's shapes tell: official or zoo's names.

    `img_size` is left out where the file mixes a number of tokens that is no square, or does not mix.
    """
    state = {rename(name): value for name, value in state_dict.items()}
    kernel = state["patch_embed.proj.weight"]
    patch = tuple(kernel.shape[-2:])
    arguments: dict[str, Any] = dict(
        patch_size=patch[0] if patch[0] == patch[1] else patch,
        in_chans=kernel.shape[1],
        num_classes=len(state["head.weight"]) if "head.weight" in state else 0,
        embed_dim=kernel.shape[0],
        depth=sum(name.endswith(".value.weight") for name in state),
        hidden_dim=len(state["blocks.0.mlp.fc1.weight"]),
    )
    if "blocks.0.gate.mlp_tokens.fc1.weight" not in state:
        return arguments | dict(gate_layer=FourierGate)
    arguments["token_dim"], tokens = state["blocks.0.gate.mlp_tokens.fc1.weight"].shape
    arguments["channel_dim"] = len(state["blocks.0.gate.mlp_channels.fc1.weight"])
    side = math.isqrt(tokens)
    if side * side == tokens:
        size = (side * patch[0], side * patch[1])
        arguments["img_size"] = size[0] if size[0] == size[1] else size
    return arguments


# Variants ------------------------------------------------------------------------------------------------------


def _cfg(**fields: Any) -> dict[str, Any]:
    defaults = dict(
        pool_size=None,
        crop_pct=0.9,
        fixed_input_size=True,
        first_conv="patch_embed.proj",
        classifier="head",
        license="bsd-3-clause",
        origin_url="https://github.com/Abdullah-88/NiNformer",
        paper_ids="arXiv:2403.02411",
    )
    return pretrained_cfg(**defaults | fields)


def _cifar_cfg(**fields: Any) -> dict[str, Any]:
    defaults = dict(input_size=(3, 32, 32), num_classes=10, crop_pct=1.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return _cfg(**defaults | fields)


default_cfgs = generate_default_cfgs(
    {
        "ninformer_patch4_32.cifar10": _cifar_cfg(),
        "ninformer_patch4_32.cifar100": _cifar_cfg(num_classes=100),
        "fourier_ninformer_patch4_32.cifar10": _cifar_cfg(
            fixed_input_size=False, origin_url="https://github.com/Abdullah-88/Fourier_NiNformer", paper_ids=None
        ),
        "ninformer_tiny_patch16_224.untrained": _cfg(),
        "ninformer_small_patch16_224.untrained": _cfg(),
        "ninformer_base_patch16_224.untrained": _cfg(),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> NinFormer:
    depth = kwargs["depth"]
    quarters = tuple(sorted({-(-depth * k // 4) - 1 for k in (1, 2, 3, 4)}))
    feature_cfg = dict(out_indices=kwargs.pop("out_indices", quarters), feature_cls="getter")
    return build_model(NinFormer, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


_CIFAR = dict(img_size=32, patch_size=4, embed_dim=256, depth=4)


@register_model
def ninformer_patch4_32(pretrained: bool = False, **kwargs: Any) -> NinFormer:
    """The paper's model for 32 px (CIFAR-10): 2.65 M parameters, 0.219 G multiply-adds.

    Trained by the authors with `proj_drop_rate=0.5`.
    """
    return _create("ninformer_patch4_32", pretrained, **_CIFAR | kwargs)


@register_model
def fourier_ninformer_patch4_32(pretrained: bool = False, **kwargs: Any) -> NinFormer:
    """Fourier_NiNformer for 32 px: 1.33 M parameters, 0.085 G multiply-adds without the transforms; any size."""
    return _create("fourier_ninformer_patch4_32", pretrained, **_CIFAR | dict(gate_layer=FourierGate) | kwargs)


@register_model
def ninformer_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> NinFormer:
    """This project's size, DeiT-Ti's width and depth: 6.17 M parameters, 1.16 G multiply-adds at 224 px."""
    return _create("ninformer_tiny_patch16_224", pretrained, **dict(embed_dim=192, depth=12) | kwargs)


@register_model
def ninformer_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> NinFormer:
    """This project's size, DeiT-S's width and depth: 20.3 M parameters, 4.57 G multiply-adds at 224 px."""
    return _create("ninformer_small_patch16_224", pretrained, **dict(embed_dim=384, depth=12) | kwargs)


@register_model
def ninformer_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> NinFormer:
    """This project's size, DeiT-B's width and depth: 72.4 M parameters, 18.2 G multiply-adds at 224 px."""
    return _create("ninformer_base_patch16_224", pretrained, **dict(embed_dim=768, depth=12) | kwargs)
