"""The parts of CRATE: tokeniser, subspace attention, sparse steps, layers and position tables.

Shared by `zoo.crate` (CRATE, CRATE-alpha) and `zoo.crate_mae`; see there for papers and differences.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import (
    DropPath,
    LayerNorm,
    PatchEmbed,
    is_exporting,
    register_notrace_function,
    resample_abs_pos_embed,
    to_2tuple,
    use_fused_attn,
)
from torch import Tensor, nn

from zoo.kernels.tied_attention import reference, tied_attention


class NormPatchEmbed(PatchEmbed):
    """Tokens from patches, (B, C, H, W) -> (B, N, D): LayerNorm over the pixels of each, linear, LayerNorm.

    `proj` has the shape of a convolution, so that timm's tools for first convolutions apply, but is applied
    as a matrix: the equal convolution (norm moved behind it) was slower on CPU.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        eps: float = 1e-5,
        strict_img_size: bool = True,
        device=None,
        dtype=None,
    ):
        dd = {"device": device, "dtype": dtype}
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            strict_img_size=strict_img_size,
            **dd,
        )
        self.norm_in = LayerNorm(in_chans * self.patch_size[0] * self.patch_size[1], eps=eps, **dd)
        self.norm = LayerNorm(embed_dim, eps=eps, **dd)

    def set_input_size(self, img_size=None, patch_size=None) -> None:
        """Change the size of images or patches; new patches resample the kernel, norm scales included."""
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            with torch.no_grad():
                weight, bias = absorb_affine(self.proj.weight, self.proj.bias, self.norm_in.weight, self.norm_in.bias)
                self.proj.weight.copy_(weight)
                self.proj.bias.copy_(bias)
            old = self.norm_in
            dim = self.proj.in_channels * math.prod(to_2tuple(patch_size))
            self.norm_in = LayerNorm(dim, eps=old.eps, device=old.weight.device, dtype=old.weight.dtype)
            self.norm_in.requires_grad_(old.weight.requires_grad).train(old.training)
        super().set_input_size(img_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D), N in row-major order of the patches."""
        B, C, H, W = x.shape
        p, q = self.patch_size
        x = x.reshape(B, C, H // p, p, W // q, q).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        x = F.linear(self.norm_in(x), self.proj.weight.flatten(1), self.proj.bias)
        return self.norm(x)


def absorb_affine(weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Kernel and bias of `proj` with the affine part of the norm before it moved in, which is exact."""
    kernel = weight.flatten(1)
    return (kernel * scale).view_as(weight), bias + kernel @ shift


class Mssa(nn.Module):
    """Multi-head subspace self-attention: softmax(w w^T / sqrt(d)) w with w = x U^T, then a linear map.

    (B, N, C) -> (B, N, C). The output map is free (the paper's is the transposed U), there is no step size;
    with one head as wide as the tokens it is an identity.
    """

    __constants__ = ["fused_attn"]

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        inner = num_heads * head_dim
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.attn_drop = attn_drop
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(dim, inner, bias=False, **dd)  # one map, the bases of all subspaces
        alone = num_heads == 1 and head_dim == dim
        self.proj = nn.Identity() if alone else nn.Linear(inner, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        B, N, _ = x.shape
        w = self.qkv(x).reshape(B, N, self.num_heads, self.head_dim).transpose(1, 2)
        if self.training and self.attn_drop > 0.0:
            attention = torch.softmax((w * self.scale) @ w.transpose(-2, -1), dim=-1)
            x = F.dropout(attention, self.attn_drop) @ w
        elif self.fused_attn:
            x = tied_attention(w, self.scale)
        else:
            x = reference(w, self.scale)
        x = x.transpose(1, 2).reshape(B, N, self.num_heads * self.head_dim)
        return self.proj_drop(self.proj(x))


@torch.fx.wrap
@register_notrace_function
def ista_step(x: Tensor, weight: Tensor, step_size: float, lambd: float) -> Tensor:
    """relu(x + s (x W - x W^T W) - s l) for (..., C) with the fewest products; gradients included.

    With T tokens of width C, products of the official order cost 3 T C^2 multiply-adds, ((x - x W^T) W) two,
    and x (W - W^T W) one and C^3 for the bracket, three times each with the backward pass: the latter is
    cheaper when T > C. The base point x is added outside of the products, so that it is not rounded under
    mixed precision.
    """
    dim = weight.shape[0]
    shift = weight.new_full([dim], -step_size * lambd)
    if is_exporting() or x.numel() > dim * dim:
        step = torch.addmm(weight, weight.t(), weight, alpha=-1.0) * step_size
        return F.relu(x + F.linear(x, step.t(), shift))
    residual = x - F.linear(x, weight)
    return F.relu(x + F.linear(residual, (weight * step_size).t(), shift))


class Ista(nn.Module):
    """One proximal-gradient step of non-negative LASSO: (B, N, C) -> (B, N, C), all values >= 0.

    relu(x + s (x W - x W^T W) - s l), from x itself: there is no skip connection around it. In eval mode
    the products are taken in the official order; `zoo.fold` makes one of the three.
    """

    def __init__(self, dim: int, step_size: float = 0.1, lambd: float = 0.1, device=None, dtype=None):
        super().__init__()
        self.step_size = step_size
        self.lambd = lambd
        self.weight = nn.Parameter(torch.empty(dim, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He-uniform over the input width."""
        nn.init.kaiming_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        if self.training:
            return ista_step(x, self.weight, self.step_size, self.lambd)
        down = F.linear(F.linear(x, self.weight), self.weight.t())
        up = F.linear(x, self.weight.t())
        return F.relu(x + self.step_size * (up - down) - self.step_size * self.lambd)

    @torch.jit.ignore
    def fuse(self) -> nn.Sequential:
        """The inference form relu(x K - s l), K = I + s (W - W^T W), formed in float64.

        The affine part of the preceding LayerNorm would go in too, but a LayerNorm without it is slower.
        """
        weight = self.weight.detach().double()
        step = weight - weight.t() @ weight
        linear = nn.Linear(*self.weight.shape, device=self.weight.device, dtype=self.weight.dtype)
        with torch.no_grad():
            linear.weight.copy_(torch.eye(len(weight), device=weight.device) + self.step_size * step.t())
            linear.bias.fill_(-self.step_size * self.lambd)
        return nn.Sequential(linear, nn.ReLU(inplace=True)).eval()


class Odl(nn.Module):
    """CRATE-alpha's sparse step: two ISTA iterations on an overcomplete dictionary, then another to decode.

    (B, N, C) -> (B, N, C). From z = 0: z1 = relu(s x D - s l), z2 = relu(z1 - s (z1 D^T - x) D - s l), the
    output is z2 D1^T. x D is computed once, the scalings and shifts ride on the products.
    """

    def __init__(
        self,
        dim: int,
        ratio: float = 4.0,
        step_size: float = 0.1,
        lambd: float = 0.1,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.step_size = step_size
        self.lambd = lambd
        self.dictionary = nn.Parameter(torch.empty(dim, int(dim * ratio), **dd))
        self.decoder = nn.Parameter(torch.empty(dim, int(dim * ratio), **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He-uniform over the width of the code."""
        nn.init.kaiming_uniform_(self.dictionary)
        nn.init.kaiming_uniform_(self.decoder)

    def code(self, x: Tensor) -> Tensor:
        """The sparse code z2 of (B, N, C) tokens: (B N, ratio C), non-negative."""
        x = x.flatten(0, 1)
        shift = x.new_full([1], -self.step_size * self.lambd)
        q = torch.addmm(shift, x, self.dictionary, alpha=self.step_size)
        z = F.relu(q)
        back = z @ self.dictionary.t()
        return F.relu(torch.addmm(q + z, back, self.dictionary, alpha=-self.step_size))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return (self.code(x) @ self.decoder.t()).view(x.shape)


class CrateBlock(nn.Module):
    """A layer of CRATE: residual MSSA, then ISTA from the normalised tokens, without a residual."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        step_size: float = 0.1,
        lambd: float = 0.1,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = LayerNorm(dim, eps=norm_eps, **dd)
        self.attn = Mssa(dim, num_heads, head_dim, True, attn_drop, proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = LayerNorm(dim, eps=norm_eps, **dd)
        self.ista = Ista(dim, step_size, lambd, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return self.ista(self.norm2(x))


class CrateAlphaBlock(nn.Module):
    """A layer of CRATE-alpha: residual MSSA without output bias, then a residual ODL step."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        step_size: float = 0.1,
        lambd: float = 0.1,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = LayerNorm(dim, eps=norm_eps, **dd)
        self.attn = Mssa(dim, num_heads, head_dim, False, attn_drop, proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = LayerNorm(dim, eps=norm_eps, **dd)
        self.odl = Odl(dim, step_size=step_size, lambd=lambd, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.odl(self.norm2(x)))


PosMode = Literal["resample", "offset", "prefix"]


@torch.fx.wrap
@register_notrace_function
def resample_pos_embed(table: Tensor, new: list[int], old: list[int], mode: str) -> Tensor:
    """The position table (1, 1 + old area, C) of a grid of patches for the grid `new`; row 0 stays.

    Args:
        table: rows in row-major order behind that of the class token.
        new: rows and columns wanted.
        old: rows and columns that the table is for.
        mode: "resample": bicubic with antialiasing, as timm. "offset": bicubic with scale factors
            (new + 0.1) / old, as the official CRATE-MAE and segmentation notebooks. "prefix": the first rows
            of the table, whatever their place, as the official CRATE does for smaller images.

    Raises:
        ValueError: "prefix" has fewer rows than the grid has patches.
    """
    if mode == "prefix":
        rows = new[0] * new[1] + 1
        if rows > table.shape[1]:
            raise ValueError(
                f"pos_mode='prefix' has {table.shape[1] - 1} positions and the image has {rows - 1} patches: "
                "pass a smaller image or pos_mode='resample'"
            )
        return table[:, :rows]
    if mode == "resample":
        return resample_abs_pos_embed(table, new, old)
    if not is_exporting() and new[0] == old[0] and new[1] == old[1]:
        return table
    grid = table[:, 1:].reshape(1, old[0], old[1], -1).permute(0, 3, 1, 2)
    factors = [(new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1]]
    grid = F.interpolate(grid, scale_factor=factors, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


@torch.fx.wrap
@register_notrace_function
def check_image_size(x: Tensor, img_size: list[int], patch_size: list[int], dynamic: bool) -> None:
    """Refuse a batch of images that the model was not built for.

    Raises:
        ValueError: another size than the built one, or with `dynamic` no multiple of the patch.
    """
    h = x.shape[-2]
    w = x.shape[-1]
    if dynamic:
        if h % patch_size[0] != 0 or w % patch_size[1] != 0:
            raise ValueError(
                f"got an image of {h}x{w} px and patches of {patch_size[0]}x{patch_size[1]}: "
                "resize, crop or pad it to a multiple of the patch"
            )
    elif h != img_size[0] or w != img_size[1]:
        raise ValueError(
            f"model was built for {img_size[0]}x{img_size[1]} px, got {h}x{w}: pass img_size=({h}, {w}), "
            f"call model.set_input_size(({h}, {w})), or build it with dynamic_img_size=True"
        )


def sincos_pos_embed(grid: tuple[int, int], dim: int) -> Tensor:
    """CRATE-MAE's table (1, 1 + area, dim) in float32.

    Zeros for the class token; for a patch [sin, cos] of its column in the first half of the width and of its
    row in the second.
    """
    if dim % 4:
        raise ValueError(f"a sine-cosine table needs a width that is a multiple of 4, got embed_dim={dim}")
    # single precision, as the reference: computed in double and rounded, the last bit would differ
    omega = np.arange(dim // 4, dtype=np.float32)
    omega = 1.0 / 10000 ** (omega / np.float32(dim / 4))
    rows, columns = (np.arange(n, dtype=np.float32) for n in grid)
    angles = np.tile(columns, grid[0])[:, None] * omega, np.repeat(rows, grid[1])[:, None] * omega
    table = np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1)
    return torch.from_numpy(np.pad(table, ((1, 0), (0, 0)))).unsqueeze(0)
