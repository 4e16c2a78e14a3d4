"""The parts of NiNformer: resampling between grids of tokens, token MLP, gates and blocks; see `zoo.ninformer`."""

# without `from __future__ import annotations`: fx would write types as strings that TorchScript refuses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, Mlp, register_notrace_function
from torch import Tensor, nn

from zoo.kernels.token_gate import token_gate
from zoo.kernels.token_mix import token_linear, token_mix

# Other grids ---------------------------------------------------------------------------------------------------


def resize_map(new: list[int], old: list[int], like: Tensor) -> list[Tensor]:
    """Antialiased bicubic resize of a grid of tokens as two matrices, for rows (h', h) and for columns (w', w).

    R(old -> new) on row-major tokens is their Kronecker product. Dtype and device are those of `like`; matrices
    are formed in float32 at least.
    """
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    maps: list[Tensor] = []
    for target, source in zip(new, old):
        # the identity's rows resized; as columns, in maps of width 1, torch 2.15 gets them wrong
        basis = torch.eye(source, device=like.device, dtype=wide).reshape(1, 1, source, source)
        matrix = F.interpolate(basis, size=[source, target], mode="bicubic", antialias=True, align_corners=False)
        maps.append(matrix[0, 0].t().to(like.dtype))
    return maps


@torch.fx.wrap
@register_notrace_function
def native_grid_maps(height: int, width: int, patch: list[int], built: list[int], like: Tensor) -> list[Tensor]:
    """The maps from the patches of an image to the built grid and back; none if the grids are the same.

    `height` and `width` are in pixels; an incomplete patch counts, since the image was padded.
    """
    grid = [-(-height // patch[0]), -(-width // patch[1])]
    if grid[0] == built[0] and grid[1] == built[1]:
        maps: list[Tensor] = []
        return maps
    return resize_map(built, grid, like) + resize_map(grid, built, like)


@torch.fx.wrap
@register_notrace_function
def resize_tokens(x: Tensor, maps: list[Tensor], back: bool) -> Tensor:
    """Tokens (B, h w, C) of the images' grid on the built grid, or with `back` the other way round."""
    if len(maps) == 0:
        return x
    rows, columns = (maps[2], maps[3]) if back else (maps[0], maps[1])
    B, _, C = x.shape
    h, w = rows.shape[1], columns.shape[1]
    x = rows.expand(B, -1, -1).bmm(x.reshape(B, h, w * C))
    x = columns.expand(B * rows.shape[0], -1, -1).bmm(x.reshape(-1, w, C))
    return x.reshape(B, -1, C)


# Blocks --------------------------------------------------------------------------------------------------------


class TokenMlp(nn.Module):
    """MLP along the tokens, for every channel alike: (B, N, C) -> (B, N, C)."""

    __constants__ = ["drop", "exact_gelu"]

    def __init__(
        self,
        num_tokens: int,
        hidden_dim: int,
        act_layer: type[nn.Module] = nn.GELU,
        drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.drop = drop
        self.exact_gelu = act_layer is nn.GELU
        self.fc1 = nn.Linear(num_tokens, hidden_dim, **dd)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_dim, num_tokens, **dd)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        if self.exact_gelu and (self.drop == 0.0 or not self.training):
            return token_mix(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        x = self.drop1(self.act(token_linear(x, self.fc1.weight, self.fc1.bias)))
        return self.drop2(token_linear(x, self.fc2.weight, self.fc2.bias))

    @torch.no_grad()
    def set_grid(self, new: list[int], old: list[int]) -> None:
        """Fold the resampling between two grids into the weights, which then mix the tokens of `new`."""
        weights = fold_resampling(self.fc1.weight, self.fc2.weight, self.fc2.bias, new, old)
        tokens = new[0] * new[1]
        self.fc1.in_features = self.fc2.out_features = tokens
        for module, name, value in zip((self.fc1, self.fc2, self.fc2), ("weight", "weight", "bias"), weights):
            trained = getattr(module, name).requires_grad
            setattr(module, name, nn.Parameter(value, requires_grad=trained))


def fold_resampling(
    weight1: Tensor, weight2: Tensor, bias2: Tensor, new: list[int], old: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """W1 R(new -> old), R(old -> new) W2 and R(old -> new) b2: token mixing of one grid, for another.

    Formed in the dtype of the weights, float32 at least.
    """
    wide = weight1 if weight1.dtype == torch.float64 else weight1.float()
    down, up = (torch.kron(*resize_map(*grids, wide)) for grids in ((old, new), (new, old)))
    folded = wide @ down, up @ weight2.to(wide.dtype), up @ bias2.to(wide.dtype)
    return tuple(value.to(weight1.dtype) for value in folded)


class MixerGate(nn.Module):
    """The inner network, a block of MLP-Mixer: residual token MLP, then residual channel MLP.

    (B, N, C) -> (B, N, C). The residuals start from the normalised tokens that come in, and are part of the gate.
    """

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        token_dim: int,
        channel_dim: int,
        act_layer: type[nn.Module] = nn.GELU,
        drop: float = 0.0,
        norm_eps: float = 1e-5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm_tokens = LayerNorm(dim, eps=norm_eps, **dd)
        self.mlp_tokens = TokenMlp(num_tokens, token_dim, act_layer, drop, **dd)
        self.norm_channels = LayerNorm(dim, eps=norm_eps, **dd)
        self.mlp_channels = Mlp(dim, channel_dim, act_layer=act_layer, drop=drop, **dd)

    def forward(self, x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C); `maps` of `native_grid_maps` where the grid is not the built one."""
        branch = self.norm_tokens(x)
        if maps is None:
            branch = self.mlp_tokens(branch)
        else:
            branch = resize_tokens(self.mlp_tokens(resize_tokens(branch, maps, False)), maps, True)
        x = x + branch
        return x + self.mlp_channels(self.norm_channels(x))


@torch.fx.wrap
@register_notrace_function
def fourier_real(x: Tensor) -> Tensor:
    """Real part of the unnormalised 2-D Fourier transform over the last two axes, computed in float32 or wider."""
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.real(torch.fft.fft2(wide)).to(x.dtype)


class FourierGate(nn.Module):
    """Real part of the Fourier transform over tokens and channels: (B, N, C) -> (B, N, C), without parameters."""

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        token_dim: int,
        channel_dim: int,
        act_layer: type[nn.Module] = nn.GELU,
        drop: float = 0.0,
        norm_eps: float = 1e-5,
        device=None,
        dtype=None,
    ):
        super().__init__()  # the arguments are those of `MixerGate`

    def forward(self, x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return fourier_real(x)


class NinBlock(nn.Module):
    """z + value(x) * gate(x) with x = norm(z), then a residual MLP behind the same norm."""

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        hidden_dim: int,
        token_dim: int,
        channel_dim: int,
        gate_layer: Callable[..., nn.Module] = MixerGate,
        act_layer: type[nn.Module] = nn.GELU,
        drop: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = LayerNorm(dim, eps=norm_eps, **dd)
        self.gate = gate_layer(dim, num_tokens, token_dim, channel_dim, act_layer, drop, norm_eps, **dd)
        self.value = nn.Linear(dim, dim, **dd)
        self.mlp = Mlp(dim, hidden_dim, act_layer=act_layer, drop=drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def mix(self, z: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """The gated half: (B, N, C) -> (B, N, C)."""
        x = self.norm(z)
        return token_gate(z, self.drop_path(self.value(x)), self.gate(x, maps))

    def forward(self, z: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C); `maps` of `native_grid_maps` where the grid is not the built one."""
        z = self.mix(z, maps)
        return z + self.drop_path(self.mlp(self.norm(z)))

    def pooled(self, z: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """Mean of `forward` over the tokens, (B, N, C) -> (B, C), with the last product behind the mean."""
        z = self.mix(z, maps)
        return z.mean(dim=1) + self.mlp.fc2(self.mlp.act(self.mlp.fc1(self.norm(z))).mean(dim=1))
