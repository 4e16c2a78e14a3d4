"""CRATE-MAE: CRATE as a masked autoencoder, self-supervised (arXiv 2404.02446).

Three quarters of the patches are replaced by one learned token *before* the encoder, which therefore sees all
positions; the decoder undoes the encoder's steps: a free linear map stands for the inverse of ISTA, then MSSA
is subtracted. The loss is the squared error of the pixels of the replaced patches.

    encoder = timm.create_model("mae_crate_base", lambd=0.5)          # features: an ordinary timm model
    zoo.load_checkpoint(encoder, "mae_checkpoint.pth")                # the official file, but its decoder
    model = zoo.crate_mae.create_mae("mae_crate_base")                # pre-training: encoder and decoder
    loss = model(images).loss
    encoder = timm.create_model("mae_crate_base", num_classes=10)     # fine-tuning from the pre-trained model
    zoo.load_checkpoint(encoder, model.state_dict(), head="keep")

Differs from the official code: the three parameters that its forward never reads (`pos_embed`,
`decoder_embed.*`) are left out; rectangular images; any size of image (`dynamic_img_size=True`, or built for
it), with the official interpolation of the table. The sparsity weight lambda of the encoder is in no
checkpoint: `choose_lambda` finds which value reconstructs best.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import LayerNorm
from timm.models import checkpoint, generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.checkpoint import Conversion, StateDict, checkpoint_converter
from zoo.crate import Crate, cfg, create
from zoo.crate_blocks import Ista, Mssa, check_image_size
from zoo.crate_checkpoint import LAYOUTS, convert_checkpoint, rename_layer

__all__ = ["CrateMae", "CrateMaeDecoder", "MaeOutput", "Reconstruction", "create_mae", "random_mask"]


class CrateDecoderBlock(nn.Module):
    """A decoder layer: v = G LN(x), then v - MSSA(LN(v)): (B, N, C) -> (B, N, C).

    The linear map has no bias, no residual and no activation.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int, norm_eps: float = 1e-5, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = LayerNorm(dim, eps=norm_eps, **dd)
        self.linear = nn.Linear(dim, dim, bias=False, **dd)
        self.norm2 = LayerNorm(dim, eps=norm_eps, **dd)
        self.attn = Mssa(dim, num_heads, head_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        x = self.linear(self.norm1(x))
        return x - self.attn(self.norm2(x))


class CrateMaeDecoder(nn.Module):
    """Tokens (B, 1 + N, C) of the encoder -> pixels (B, N, patch area x channels), (row, column, channel)."""

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        patch_dim: int,
        head_dim: int | None = None,
        norm_eps: float = 1e-5,
        final_norm_eps: float = 1e-6,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        head_dim = head_dim or dim // num_heads
        self.blocks = nn.Sequential(
            *[CrateDecoderBlock(dim, num_heads, head_dim, norm_eps, **dd) for _ in range(depth)]
        )
        self.norm = LayerNorm(dim, eps=final_norm_eps, **dd)
        self.pred = nn.Linear(dim, patch_dim, **dd)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1 + N, C) -> (B, N, patch_dim)."""
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        return self.pred(self.norm(x))[:, 1:]


class MaeOutput(NamedTuple):
    """`loss` (scalar), `pred` (B, N, patch_dim), `mask` (B, N) of ones where a patch was removed."""

    loss: Tensor
    pred: Tensor
    mask: Tensor


class Reconstruction(NamedTuple):
    """Images (B, C, H, W) in the scale of the input: removed patches predicted, or zero; `mask` (B, N)."""

    image: Tensor
    masked: Tensor
    mask: Tensor


def random_mask(noise: Tensor, ratio: float = 0.75) -> Tensor:
    """Which patches to remove: per image, all but the int(N (1 - ratio)) ones of smallest noise.

    Args:
        noise: (B, N), in training uniform random numbers.
        ratio: share of patches to remove, 0 <= ratio < 1.

    Returns:
        (B, N) in the dtype of `noise`, 1 where a patch is removed.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"mask_ratio={ratio} leaves no patch to see: pass a number of 0 or more and below 1")
    keep = int(noise.shape[1] * (1 - ratio))
    rank = noise.argsort(dim=1).argsort(dim=1)
    return (rank >= keep).to(noise.dtype)


class CrateMae(nn.Module):
    """Encoder and decoder of CRATE-MAE for pre-training and reconstruction."""

    def __init__(
        self,
        encoder: Crate,
        decoder_depth: int | None = None,
        decoder_num_heads: int | None = None,
        norm_pix_loss: bool = False,
        final_norm_eps: float = 1e-6,
    ):
        """Put a decoder behind an encoder.

        Args:
            encoder: a model without classifier, as `timm.create_model("mae_crate_base")`.
            decoder_depth: layers of the decoder, those of the encoder if None.
            decoder_num_heads: subspaces a decoder layer, those of the encoder if None.
            norm_pix_loss: targets are normalised by mean and deviation of each patch.
            final_norm_eps: epsilon of the LayerNorm before the pixel map.
        """
        super().__init__()
        attn = encoder.blocks[0].attn
        dd = {"device": encoder.cls_token.device, "dtype": encoder.cls_token.dtype}
        dim = encoder.embed_dim
        patch = encoder.patch_embed.patch_size
        heads = decoder_num_heads or attn.num_heads
        self.encoder = encoder
        self.norm_pix_loss = norm_pix_loss
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim, **dd))
        self.decoder = CrateMaeDecoder(
            dim,
            decoder_depth or len(encoder.blocks),
            heads,
            patch[0] * patch[1] * encoder.in_chans,
            attn.head_dim if heads == attn.num_heads else None,
            encoder.blocks[0].norm1.eps,
            final_norm_eps,
            **dd,
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Draw all weights anew: Xavier-uniform linear maps, N(0, 0.02^2) tokens, He-uniform G and ISTA."""
        self.encoder.init_weights()
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.decoder.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for block in self.decoder.blocks:
            nn.init.kaiming_uniform_(block.linear.weight)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the layers in the backward pass instead of storing their activations."""
        self.encoder.set_grad_checkpointing(enable)
        self.decoder.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves alone."""
        return {"mask_token", *(f"encoder.{name}" for name in self.encoder.no_weight_decay())}

    def patchify(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, patch area x C), a patch in the order (row, column, channel)."""
        B, C, H, W = images.shape
        p, q = self.encoder.patch_embed.patch_size
        return images.reshape(B, C, H // p, p, W // q, q).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def unpatchify(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """The inverse of `patchify` for a grid of (rows, columns) patches."""
        p, q = self.encoder.patch_embed.patch_size
        x = patches.reshape(len(patches), grid[0], grid[1], p, q, -1).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(len(patches), -1, grid[0] * p, grid[1] * q)

    def forward_encoder(self, images: Tensor, mask: Tensor) -> Tensor:
        """Tokens (B, 1 + N, C) of images whose patches with mask 1 are replaced by the mask token."""
        encoder = self.encoder
        embed = encoder.patch_embed
        check_image_size(images, embed.img_size, embed.patch_size, encoder.dynamic_img_size)
        tokens = embed(images)
        tokens = torch.where(mask.unsqueeze(-1) > 0, self.mask_token.to(tokens.dtype), tokens)
        grid = embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
        return encoder.forward_tokens(encoder.add_position(tokens, grid))

    def loss(self, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error of the pixels of removed patches, a scalar."""
        target = self.patchify(images)
        if self.norm_pix_loss:
            target = (target - target.mean(-1, keepdim=True)) / self._deviation(target)
        return ((pred - target).square().mean(dim=-1) * mask).sum() / mask.sum()

    @staticmethod
    def _deviation(target: Tensor) -> Tensor:
        return (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()

    def forward(self, images: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None) -> MaeOutput:
        """Remove patches at random, predict them and measure the error.

        Args:
            images: (B, C, H, W), normalised.
            mask_ratio: share of patches to remove.
            noise: (B, N) numbers whose order decides which; drawn if None.
        """
        if noise is None:
            patch = self.encoder.patch_embed.patch_size
            n = (images.shape[-2] // patch[0]) * (images.shape[-1] // patch[1])
            noise = torch.rand(images.shape[0], n, device=images.device)
        mask = random_mask(noise, mask_ratio)
        pred = self.decoder(self.forward_encoder(images, mask))
        return MaeOutput(self.loss(images, pred, mask), pred, mask)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None) -> Reconstruction:
        """Images with the removed patches predicted; see `forward` for the arguments.

        With `norm_pix_loss` the predictions are brought to the mean and deviation of the true patches.
        """
        _, pred, mask = self(images, mask_ratio, noise)
        target = self.patchify(images)
        if self.norm_pix_loss:
            pred = pred * self._deviation(target) + target.mean(-1, keepdim=True)
        grid = self.encoder.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
        removed = mask.unsqueeze(-1) > 0
        return Reconstruction(
            self.unpatchify(torch.where(removed, pred, target), grid),
            self.unpatchify(target.masked_fill(removed, 0), grid),
            mask,
        )

    def set_lambda(self, lambd: float) -> None:
        """Set the sparsity weight of all ISTA steps; not possible once the model was folded."""
        steps = [module for module in self.encoder.modules() if isinstance(module, Ista)]
        if not steps:
            raise ValueError("a folded model has no sparsity weight any more: set it before zoo.fold")
        for step in steps:
            step.lambd = lambd

    @torch.no_grad()
    def choose_lambda(
        self, images: Tensor, candidates: Sequence[float] = (0.5, 5.0), seed: int = 0
    ) -> dict[float, float]:
        """Set the sparsity weight that reconstructs `images` best, and return the loss of each candidate.

        A checkpoint does not record the value that it was trained with; the released ones have 0.5 or 5.
        """
        patches = self.patchify(images).shape[1]
        noise = torch.rand(len(images), patches, generator=torch.Generator().manual_seed(seed)).to(images)
        losses = {}
        training = self.training
        self.eval()
        for value in candidates:
            self.set_lambda(value)
            losses[value] = float(self(images, noise=noise).loss)
        self.train(training)
        self.set_lambda(min(losses, key=losses.__getitem__))
        return losses


_UNREAD = ("pos_embed", "decoder_embed.weight", "decoder_embed.bias")


@checkpoint_converter(CrateMae, layouts={"CRATE-MAE": LAYOUTS["CRATE-MAE"]})
def convert_mae_checkpoint(state_dict: StateDict, model: CrateMae) -> Conversion:
    """Official entries under zoo's names; the three that the official forward never reads are left out."""
    if "decoder_pos_embed" not in state_dict:
        return Conversion(dict(state_dict))
    converted = convert_checkpoint(state_dict, model.encoder)
    state = {f"encoder.{name}": value for name, value in converted.state_dict.items()}
    notes = [note for note in converted.notes if not note.startswith("the encoder was used")]
    for name, value in state_dict.items():
        if name == "mask_token":
            state[name] = value
        elif name.startswith("decoder_blocks."):
            state["decoder." + rename_layer(name.removeprefix("decoder_"), decoder=True)] = value
        elif name.startswith(("decoder_norm.", "decoder_pred.")):
            state["decoder." + name.removeprefix("decoder_")] = value
    left_out = [name for name in _UNREAD if name in state_dict]
    notes.append(f"left out, the official model never reads them: {', '.join(left_out)}")
    return Conversion(state, converted.layout, tuple(notes))


def create_mae(
    name: str,
    *,
    decoder_depth: int | None = None,
    norm_pix_loss: bool = False,
    **kwargs: Any,
) -> CrateMae:
    """The autoencoder around a registered encoder.

    Args:
        name: "mae_crate_tiny", "mae_crate_small", "mae_crate_base" or "mae_crate_large".
        decoder_depth: layers of the decoder, those of the encoder if None.
        norm_pix_loss: targets are normalised by mean and deviation of each patch.
        kwargs: arguments of the encoder, as `img_size`, `lambd`, `dynamic_img_size`.
    """
    encoder = timm.create_model(name, num_classes=0, **kwargs)
    return CrateMae(encoder, decoder_depth=decoder_depth, norm_pix_loss=norm_pix_loss)


def _cfg() -> dict[str, Any]:
    return cfg(num_classes=0, paper_ids="arXiv:2404.02446")


default_cfgs = generate_default_cfgs(
    {
        "mae_crate_tiny.in1k": _cfg(),
        "mae_crate_small.in1k": _cfg(),
        "mae_crate_base.in1k": _cfg(),
        "mae_crate_large.in1k": _cfg(),
    }
)

_MAE = dict(lambd=0.5, patch_norm=False, final_norm=True, head_norm_eps=1e-6, weight_init="mae", pos_mode="offset")


@register_model
def mae_crate_tiny(pretrained: bool = False, **kwargs: Any) -> Crate:
    """Encoder of CRATE-MAE-T/16: 5.7 M parameters, 2.16 G multiply-adds at 224 px."""
    return create("mae_crate_tiny", pretrained, **_MAE | dict(embed_dim=384, depth=12, num_heads=6) | kwargs)


@register_model
def mae_crate_small(pretrained: bool = False, **kwargs: Any) -> Crate:
    """Encoder of CRATE-MAE-S/16: 12.4 M parameters, 4.54 G multiply-adds at 224 px."""
    return create("mae_crate_small", pretrained, **_MAE | dict(embed_dim=576, depth=12, num_heads=12) | kwargs)


@register_model
def mae_crate_base(pretrained: bool = False, **kwargs: Any) -> Crate:
    """Encoder of CRATE-MAE-B/16: 21.9 M parameters, 7.80 G multiply-adds at 224 px."""
    return create("mae_crate_base", pretrained, **_MAE | dict(embed_dim=768, depth=12, num_heads=12) | kwargs)


@register_model
def mae_crate_large(pretrained: bool = False, **kwargs: Any) -> Crate:
    """Encoder of CRATE-MAE-L/16: 76.4 M parameters, 26.9 G multiply-adds at 224 px."""
    return create("mae_crate_large", pretrained, **_MAE | dict(embed_dim=1024, depth=24, num_heads=16) | kwargs)
