"""Blocks of ViM2 (arXiv 2403.19888v1): selective token mixer, selective channel mixer, weighted averaging.

All maps are channels-last, (B, H, W, C).
"""

# without `from __future__ import annotations`: fx would write forward's types as strings that TorchScript refuses
import math
from typing import Final

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from timm.models import checkpoint
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from zoo.kernels.channel_scan import channel_scan
from zoo.kernels.scan2d import scan2d

LN_EPS = 1e-5


def _scan_init(log_decay: Tensor, skip: Tensor, step_bias: Tensor) -> None:
    """The start of every selective scan: A = -(1..N), D = 1, step sizes log-uniform in [0.001, 0.1]."""
    with torch.no_grad():
        states = torch.arange(1, log_decay.shape[-1] + 1, dtype=torch.float32, device=log_decay.device)
        log_decay.copy_(states.log())
        skip.fill_(1)
        steps = torch.empty(step_bias.shape, dtype=torch.float32, device=step_bias.device)
        steps.uniform_(math.log(1e-3), math.log(1e-1)).exp_().clamp_(min=1e-4)
        step_bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus


class TokenMixer(nn.Module):
    """Gated four-direction selective scan over the pixels, the SS2D of VMamba's first version.

    Args:
        dim: channels C.
        expand: the scan runs on expand * C channels.
        d_state: states of each channel.
        dt_rank: rank of the step sizes; None: C / 16, rounded up.
    """

    def __init__(
        self, dim: int, expand: float = 2.0, d_state: int = 16, dt_rank: int | None = None, device=None, dtype=None
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        inner = int(expand * dim)
        rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.inner = inner
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, **dd)
        self.x_proj_weight = nn.Parameter(torch.empty(4, rank + 2 * d_state, inner, **dd))
        self.dt_projs_weight = nn.Parameter(torch.empty(4, inner, rank, **dd))
        self.dt_projs_bias = nn.Parameter(torch.empty(4, inner, **dd))
        self.A_logs = nn.Parameter(torch.empty(4 * inner, d_state, **dd))
        self.Ds = nn.Parameter(torch.empty(4 * inner, **dd))
        self.out_norm = nn.LayerNorm(inner, eps=LN_EPS, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.reset_scan()

    @torch.jit.ignore
    def reset_scan(self) -> None:
        """Draw the parameters of the scan anew."""
        nn.init.uniform_(self.x_proj_weight, -(self.inner**-0.5), self.inner**-0.5)
        bound = self.dt_projs_weight.shape[-1] ** -0.5
        nn.init.uniform_(self.dt_projs_weight, -bound, bound)
        _scan_init(self.A_logs, self.Ds, self.dt_projs_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        # two products instead of one: neither half has to be copied out of their common result
        u = F.linear(x, self.in_proj.weight[: self.inner])
        z = F.linear(x, self.in_proj.weight[self.inner :])
        u = F.silu(self.conv2d(u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        A = -torch.exp(self.A_logs)
        y = scan2d(u, self.x_proj_weight, self.dt_projs_weight, self.dt_projs_bias, A, self.Ds)
        return self.out_proj(self.out_norm(y) * F.silu(z))


class ChannelMixer(nn.Module):
    """Gated selective scan along the channels of each pixel, in four orders of a C x expand grid.

    With grouped projections each channel has its own `expand` weights, so that the mixer has few parameters;
    dense projections are matrices.

    Args:
        dim: channels C.
        expand: the scan runs on W = expand * C channels.
        d_state: states of each direction.
        conv_kernel: taps of the filter before the scan, an odd number.
        dense: dense projections.
    """

    dense: Final[bool]

    def __init__(
        self,
        dim: int,
        expand: int = 2,
        d_state: int = 16,
        conv_kernel: int = 3,
        dense: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel={conv_kernel} has no middle: pass an odd number")
        width = expand * dim
        self.dim = dim
        self.expand = expand
        self.dense = dense
        if dense:
            self.in_x = nn.Linear(dim, width, bias=False, **dd)
            self.in_z = nn.Linear(dim, width, bias=False, **dd)
            self.out = nn.Linear(width, dim, bias=False, **dd)
        else:
            self.in_x_weight = nn.Parameter(torch.empty(dim, expand, **dd))
            self.in_x_bias = nn.Parameter(torch.empty(dim, expand, **dd))
            self.in_z_weight = nn.Parameter(torch.empty(dim, expand, **dd))
            self.in_z_bias = nn.Parameter(torch.empty(dim, expand, **dd))
            self.out_weight = nn.Parameter(torch.empty(dim, expand, **dd))
            self.out_bias = nn.Parameter(torch.empty(1, dim, **dd))
        self.conv_weight = nn.Parameter(torch.empty(4, conv_kernel, **dd))
        self.conv_bias = nn.Parameter(torch.empty(1, 4, **dd))
        self.dt_weight = nn.Parameter(torch.empty(4, width, **dd))
        self.dt_bias = nn.Parameter(torch.empty(4, width, **dd))
        self.B_weight = nn.Parameter(torch.empty(4, d_state, width, **dd))
        self.C_weight = nn.Parameter(torch.empty(4, d_state, width, **dd))
        self.A_log = nn.Parameter(torch.empty(4, d_state, **dd))
        self.D = nn.Parameter(torch.empty(4, width, **dd))
        self.out_norm = nn.LayerNorm(width, eps=LN_EPS, **dd)
        self.reset_scan()

    @torch.jit.ignore
    def reset_scan(self) -> None:
        """Draw the parameters of the scan and the grouped projections anew."""
        _uniform(self.conv_weight, self.conv_weight.shape[1])
        _uniform(self.conv_bias, self.conv_weight.shape[1])
        nn.init.normal_(self.dt_weight, std=0.02)
        nn.init.normal_(self.B_weight, std=self.B_weight.shape[1] ** -0.5)
        nn.init.normal_(self.C_weight, std=self.C_weight.shape[1] ** -0.5)
        _scan_init(self.A_log, self.D, self.dt_bias)
        if not self.dense:
            for weight, bias, fan_in in (
                (self.in_x_weight, self.in_x_bias, 1),
                (self.in_z_weight, self.in_z_bias, 1),
                (self.out_weight, self.out_bias, self.expand),
            ):
                _uniform(weight, fan_in)
                nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        if self.dense:
            a, z = self.in_x(x), self.in_z(x)
        else:
            v = x.unsqueeze(-1)
            a = torch.addcmul(self.in_x_bias, v, self.in_x_weight).flatten(-2)
            z = torch.addcmul(self.in_z_bias, v, self.in_z_weight).flatten(-2)
        y = channel_scan(
            a,
            self.expand,
            self.conv_weight,
            self.conv_bias,
            self.dt_weight,
            self.dt_bias,
            -torch.exp(self.A_log),
            self.B_weight,
            self.C_weight,
            self.D,
        )
        y = self.out_norm(y) * F.silu(z)
        if self.dense:
            return self.out(y)
        return (y.unflatten(-1, (self.dim, self.expand)) * self.out_weight).sum(-1) + self.out_bias[0]


def _uniform(weight: Tensor, fan_in: int) -> None:
    nn.init.uniform_(weight, -(fan_in**-0.5), fan_in**-0.5)


class Average(nn.Module):
    """Learned combination of all earlier outputs of a stage: sum alpha_i y_T^i + sum beta_i y_C^i (sec. 3.4).

    y_T^0 = y_C^0 is the stage's input. The weights are alpha, beta before a token mixer, theta, gamma before a
    channel mixer in the paper. The start is 1 for the latest output and 0 for the others.

    Args:
        tokens: number of token mixer outputs, the stage's input included.
        channels: number of channel mixer outputs, the stage's input included.
        latest_is_token: whether the latest output is a token mixer's (or the stage's input).
    """

    def __init__(self, tokens: int, channels: int, latest_is_token: bool, device=None, dtype=None):
        super().__init__()
        self.latest_is_token = latest_is_token
        self.alpha = nn.Parameter(torch.empty(1, tokens, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.empty(1, channels, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Take the latest output alone."""
        nn.init.zeros_(self.alpha)
        nn.init.zeros_(self.beta)
        nn.init.ones_((self.alpha if self.latest_is_token else self.beta)[:, -1:])

    def forward(self, tokens: list[Tensor], channels: list[Tensor]) -> Tensor:
        """Maps (B, H, W, C) -> their combination; accumulated, a stack of them would be as large as all."""
        x = tokens[0] * (self.alpha[0, 0] + self.beta[0, 0])
        for i in range(1, len(tokens)):
            x = torch.addcmul(x, tokens[i], self.alpha[0, i])
        for i in range(1, len(channels)):
            x = torch.addcmul(x, channels[i], self.beta[0, i])
        return x


class MixerBlock(nn.Module):
    """x + DropPath(mixer(LayerNorm(x))), and the average that makes its x."""

    is_token: Final[bool]

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        is_token: bool,
        average: nn.Module | None = None,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.is_token = is_token
        self.average = nn.Identity() if average is None else average
        self.norm = nn.LayerNorm(dim, eps=LN_EPS, device=device, dtype=dtype)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C), of the averaged input."""
        return x + self.drop_path(self.mixer(self.norm(x)))


def mixer_order(tokens: int, channels: int) -> list[bool]:
    """The order of a stage's mixers, True for a token mixer: [tokens / channels, then one channel mixer], rest.

    Three token mixers and one channel mixer: T T T C; five and two: T T C T T C T.
    """
    run = tokens // channels if channels else 0
    order = ([True] * run + [False]) * channels
    return order + [True] * (tokens - run * channels)


class Stage(nn.Module):
    """Patch merging, then mixers that each read an average of all earlier outputs of the stage.

    Args:
        downsample: what comes before the mixers.
        blocks: the mixers in order.
        averaging: without it each mixer reads the output of the one before.
    """

    averaging: Final[bool]

    def __init__(self, downsample: nn.Module, blocks: list[MixerBlock], averaging: bool):
        super().__init__()
        self.averaging = averaging
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H', W', C'): the last mixer's output."""
        x = self.downsample(x)
        tokens = [x]
        channels = [x]
        for block in self.blocks:
            if self.averaging:
                x = block.average(tokens, channels)
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
            if self.averaging:
                if block.is_token:
                    tokens.append(x)
                else:
                    channels.append(x)
        return x


class PatchStem(nn.Module):
    """4x4 patches and their norm: (B, in_chans, H, W) -> (B, H // 4, W // 4, C)."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 4, stride=4, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(dim, eps=LN_EPS, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, H // 4, W // 4, C)."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1).contiguous())


def patch_merging(dim: int, out_dim: int, device=None, dtype=None) -> PatchMerging:
    """timm's patch merging, which pads odd maps at the bottom and the right, with this family's norm."""

    def norm(width: int, device=None, dtype=None) -> nn.LayerNorm:
        return nn.LayerNorm(width, eps=LN_EPS, device=device, dtype=dtype)

    return PatchMerging(dim, out_dim, norm_layer=norm, device=device, dtype=dtype)


def wide_mlp(dim: int, expand: int, device=None, dtype=None) -> Mlp:
    """The MLP of the ViM2-MLP ablation: 8 W^2 weights, those of a W -> 4W -> W MLP of width W = expand * dim."""
    return Mlp(dim, 4 * expand * expand * dim, device=device, dtype=dtype)
