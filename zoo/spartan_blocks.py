"""The blocks of SpaRTAN: spatial mixer with two receptive fields, channel mixer of waves, and their folded forms.

Maps are (B, C, H, W) in either memory layout. The folded forms keep them channels-last, where depthwise convolutions
and 1x1 products need no reordering.
"""

import copy

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import ConvNormAct, DropPath, GroupNorm1, SqueezeExcite, trunc_normal_
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from zoo.kernels.wave_gate import rotate, strongest, superpose, wave_gate

EPS = 1e-6  # of every norm
CACHED_ELEMENTS = 2**19  # of a map that a thread works on: 2 MB in float32
INIT_SCALE = 1e-5  # of residual scales and of the decomposition's gamma


class ConvNorm(ConvNormAct):
    """Convolution without bias, batch norm, activation: (B, C, H, W) -> (B, out, H', W')."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | str = "",
        dilation: int = 1,
        groups: int = 1,
        act_layer: type[nn.Module] = nn.GELU,
        device=None,
        dtype=None,
    ):
        super().__init__(
            in_chs,
            out_chs,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            norm_kwargs=dict(eps=EPS),
            act_layer=act_layer,
            device=device,
            dtype=dtype,
        )

    @torch.jit.ignore
    @torch.no_grad()
    def fused_conv(self) -> nn.Conv2d:
        """Convolution and norm as one convolution with bias."""
        conv = fuse_conv_bn_eval(self.conv.eval(), self.bn.eval())
        return conv.to(memory_format=torch.channels_last)

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> nn.Sequential:
        """The same in eval mode, without a norm."""
        return nn.Sequential(self.fused_conv(), self.bn.act)


class ChannelScale(nn.Module):
    """A learned factor for each channel: (B, C, H, W) -> (B, C, H, W).

    timm's LayerScale but for the parameter's shape: the authors decay this one, timm does not decay vectors.
    """

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(dim, 1, 1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The branch starts at 1e-5 of its size."""
        nn.init.constant_(self.scale, INIT_SCALE)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x * self.scale


class SpatialMixer(nn.Module):
    """A 3x3 and a 9x9 receptive field side by side, each with squeeze-excitation: (B, C, H, W) -> (B, C, H, W).

    The 9x9 field is two 3x3 convolutions of dilation 2 without anything between them. They do not merge into one
    5x5 of dilation 2: the map between them is padded with zeros, which changes two pixels along every border.

    Args:
        dim: width C, a multiple of 8.
        depthwise: depthwise convolutions (late stages) instead of dense ones.
    """

    def __init__(self, dim: int, depthwise: bool, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dim % 8:
            raise ValueError(f"a stage of SpaRTAN cannot be {dim} channels wide: pass multiples of 8")
        half = dim // 2
        groups = half if depthwise else 1
        self.proj_in = nn.Conv2d(dim, half, 1, **dd)
        self.gamma = nn.Parameter(torch.empty(half, **dd))
        self.conv_near = ConvNorm(half, half, groups=groups, **dd)
        self.conv_far1 = nn.Conv2d(half, half, 3, padding=2, dilation=2, groups=groups, bias=False, **dd)
        self.conv_far2 = ConvNorm(half, half, dilation=2, groups=groups, **dd)
        self.se_near = SqueezeExcite(half, rd_channels=half // 4, **dd)
        self.se_far = SqueezeExcite(half, rd_channels=half // 4, **dd)
        self.proj_out = nn.Conv2d(dim, dim, 1, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The decomposition starts near the identity."""
        nn.init.constant_(self.gamma, INIT_SCALE)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.proj_in(x)
        x = torch.addcmul(x, self.gamma.view(-1, 1, 1), x - x.mean((2, 3), keepdim=True))
        near = self.se_near(self.conv_near(x))
        far = self.se_far(self.conv_far2(self.conv_far1(x)))
        return self.proj_out(torch.cat([near, far], dim=1))

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> "FoldedSpatialMixer":
        """The inference form."""
        return FoldedSpatialMixer(self)


class ChannelMixer(nn.Module):
    """Waves of e C channels, a 3x3 convolution, squeeze-excitation: (B, C, H, W) -> (B, C, H, W).

    Args:
        dim: width C.
        expand_ratio: e, an integer above 1.
        depthwise: depthwise convolution (early stages) instead of one with C groups of e channels.
    """

    def __init__(self, dim: int, expand_ratio: int, depthwise: bool, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if expand_ratio != int(expand_ratio) or expand_ratio < 2:
            raise ValueError(f"expand_ratio={expand_ratio} leaves no pairs of waves: pass an integer above 1")
        hidden = dim * int(expand_ratio)
        self.theta = nn.Conv2d(dim, hidden, 1, **dd)
        self.proj = nn.Conv2d(dim, hidden, 1, **dd)
        self.rotation = nn.Parameter(torch.empty(hidden // 2, 2, **dd))
        self.conv = ConvNorm(hidden, hidden, groups=hidden if depthwise else dim, **dd)
        self.se = SqueezeExcite(hidden, rd_channels=dim // 4, **dd)
        self.proj_out = nn.Conv2d(hidden, dim, 1, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Real and imaginary parts from a standard normal distribution: not of modulus 1."""
        nn.init.normal_(self.rotation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = wave_gate(x, self.theta(x), self.proj(x), self.rotation)
        return self.proj_out(self.se(self.conv(x)))

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> "FoldedChannelMixer":
        """The inference form."""
        return FoldedChannelMixer(self)


class SpartanBlock(nn.Module):
    """Spatial and channel mixer, each behind a norm of the whole map: (B, C, H, W) -> (B, C, H, W).

    Args:
        dim: width C.
        expand_ratio: hidden width of the channel mixer in units of `dim`.
        early: dense spatial and depthwise channel convolutions; late blocks the other way round.
        drop_path: stochastic depth rate of both branches.
    """

    def __init__(self, dim: int, expand_ratio: int, early: bool, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = GroupNorm1(dim, eps=EPS, **dd)
        self.spatial = SpatialMixer(dim, depthwise=not early, **dd)
        self.scale1 = ChannelScale(dim, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = GroupNorm1(dim, eps=EPS, **dd)
        self.channel = ChannelMixer(dim, expand_ratio, depthwise=early, **dd)
        self.scale2 = ChannelScale(dim, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = x + self.drop_path1(self.scale1(self.spatial(self.norm1(x))))
        return x + self.drop_path2(self.scale2(self.channel(self.norm2(x))))

    @torch.jit.ignore
    @torch.no_grad()
    def fuse(self) -> "FoldedBlock":
        """The inference form."""
        return FoldedBlock(self)


# The inference forms. Norms move into convolutions, residual scales into the projections before them, the gates of
# squeeze-excitation into per-image projections, whose sum with the residual stream is one call. Maps are (B, H, W, C)
# and contiguous: torch has a faster GELU for contiguous tensors, and oneDNN faster depthwise convolutions.


class SqueezeGate(nn.Module):
    """The factors of a squeeze-excitation: a map (B, H, W, n) -> (B, n).

    Args:
        se: what it is made from.
        order: the channels' new order, (n,).
    """

    def __init__(self, se: SqueezeExcite, order: Tensor | None = None):
        super().__init__()
        self.fc1 = _linear(se.fc1)
        self.fc2 = _linear(se.fc2)
        if order is not None:
            self.fc1.weight.copy_(self.fc1.weight[:, order])
            self.fc2.weight.copy_(self.fc2.weight[order])
            self.fc2.bias.copy_(self.fc2.bias[order])

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, n) -> (B, n), between 0 and 1."""
        return self.fc2(self.fc1(x.mean((1, 2))).relu()).sigmoid()


def add_projection(shortcut: Tensor, x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """shortcut + weight (gate * x): the gate scales the weights of each image instead of the map.

    Args:
        shortcut: (B, H, W, C).
        x: (B, H, W, n).
        gate: (B, n).
        weight: (C, n).

    Returns:
        (B, H, W, C).
    """
    weight = (weight * gate.unsqueeze(1)).transpose(1, 2)
    y = torch.baddbmm(shortcut.flatten(1, 2), x.flatten(1, 2), weight)
    return y.unflatten(1, (x.shape[1], x.shape[2]))


class FoldedSpatialMixer(nn.Module):
    """`SpatialMixer` in eval mode, its sum with a residual stream included: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, mixer: SpatialMixer):
        super().__init__()
        self.proj_in = _linear(mixer.proj_in)
        self.proj_in.weight.mul_(1 + mixer.gamma.unsqueeze(1))
        self.proj_in.bias.mul_(1 + mixer.gamma)
        # x + gamma (x - mean(x)) = (1 + gamma) x - gamma mean(x), and a projection's mean is that of its input
        self.proj_mean = _linear(mixer.proj_in)
        self.proj_mean.weight.mul_(mixer.gamma.unsqueeze(1))
        self.proj_mean.bias.mul_(mixer.gamma)
        self.conv_near = _conv_of(mixer.conv_near)
        self.conv_far1 = copy.deepcopy(mixer.conv_far1).to(memory_format=torch.channels_last)
        self.conv_far2 = _conv_of(mixer.conv_far2)
        self.se_near = SqueezeGate(mixer.se_near)
        self.se_far = SqueezeGate(mixer.se_far)
        self.proj_out = _linear(mixer.proj_out)
        self.half = self.proj_in.out_features

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """The norm's output and the residual stream, both (B, H, W, C) -> (B, H, W, C)."""
        y = self.proj_in(x) - self.proj_mean(x.mean((1, 2)))[:, None, None]
        y = y.permute(0, 3, 1, 2)
        near = F.gelu(self.conv_near(y).permute(0, 2, 3, 1))
        far = F.gelu(self.conv_far2(self.conv_far1(y)).permute(0, 2, 3, 1))
        weight = self.proj_out.weight
        out = add_projection(shortcut + self.proj_out.bias, near, self.se_near(near), weight[:, : self.half])
        return add_projection(out, far, self.se_far(far), weight[:, self.half :])


class FoldedChannelMixer(nn.Module):
    """`ChannelMixer` in eval mode, its sum with a residual stream included: (B, H, W, C) -> (B, H, W, C).

    Where the convolution is depthwise, or its groups hold one pair, the channels are reordered: first members of all
    pairs, then second ones. Before a depthwise convolution the complex factors are two shears of these halves p, q,

        q += t p,   p -= t / (1 + t^2) q,          t = beta / alpha; the rest goes into the convolution's weights

    (the members of a pair change places where |beta| > |alpha|, so that |t| <= 1). Groups of one pair take the
    factors into their weights and become two depthwise convolutions: within a channel, and between the channels of
    a pair. Wider groups of whole pairs take the factors in; groups of odd width do not hold whole pairs. On CPU both
    reordered forms took less than half the time of a grouped convolution with the factors in its weights.
    """

    mode: torch.jit.Final[str]

    def __init__(self, mixer: ChannelMixer):
        super().__init__()
        conv = _conv_of(mixer.conv)
        hidden, width = conv.out_channels, conv.weight.shape[1]
        alpha, beta = mixer.rotation.unbind(1)
        even = 2 * torch.arange(hidden // 2, device=alpha.device)
        inputs = outputs = torch.arange(hidden, device=alpha.device)  # channels before and behind the convolution
        shear = torch.zeros_like(alpha)
        self.conv_cross = None
        if width == 1:
            self.mode = "shear"
            exchanged = beta.abs() > alpha.abs()
            main = torch.where(exchanged, beta, alpha)
            shear = torch.where(main == 0, 0, torch.where(exchanged, alpha, beta) / main)
            inputs = torch.cat([even + exchanged.long(), even + (~exchanged).long()])
            outputs = torch.cat([even, even + 1])
            factors = torch.cat([torch.where(exchanged, -main, main) * (1 + shear.square()), main])
            conv = depthwise(conv.weight[outputs] * factors.view(-1, 1, 1, 1), conv.bias[outputs])
        elif width == 2:
            self.mode = "pairs"
            inputs = outputs = torch.cat([even, even + 1])
            first, second = turn_weight(conv.weight, mixer.rotation)[outputs].chunk(2)
            # the part that belongs to a pair's other channel is computed where its input lies
            self.conv_cross = depthwise(torch.cat([second[:, :1], first[:, 1:]]))
            conv = depthwise(torch.cat([first[:, :1], second[:, 1:]]), conv.bias[outputs])
        elif width % 2 == 0:
            self.mode = "groups"
            conv.weight.copy_(turn_weight(conv.weight, mixer.rotation))
        else:
            self.mode = "rotate"
        self.half = hidden // 2
        self.theta = _linear(mixer.theta, inputs)
        self.proj = _linear(mixer.proj, inputs)
        self.conv = conv
        self.se = SqueezeGate(mixer.se, outputs)
        self.proj_out = _linear(mixer.proj_out)
        self.proj_out.weight.copy_(self.proj_out.weight[:, outputs])
        self.register_buffer("inputs", inputs)
        self.register_buffer("outputs", outputs)
        self.register_buffer("position", inputs.argsort())  # where each wave has gone
        self.register_buffer("shear", shear)
        self.register_buffer("unshear", -shear / (1 + shear.square()))
        self.register_buffer("rotation", mixer.rotation.detach().clone())

    def turn_and_convolve(self, x: Tensor) -> Tensor:
        """Waves (B, H, W, n) in the order `inputs`, which are overwritten -> (B, H, W, n) in the order `outputs`."""
        if self.mode == "shear":
            first, second = x[..., : self.half], x[..., self.half :]
            second.addcmul_(first, self.shear)
            first.addcmul_(second, self.unshear)
        x = x.permute(0, 3, 1, 2)
        if self.mode == "rotate":
            x = rotate(x, self.rotation)
        y = self.conv(x).permute(0, 2, 3, 1)
        if self.conv_cross is not None:
            cross = self.conv_cross(x).permute(0, 2, 3, 1)
            y[..., : self.half].add_(cross[..., self.half :])
            y[..., self.half :].add_(cross[..., : self.half])
        return y

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """The norm's output and the residual stream, both (B, H, W, C) -> (B, H, W, C)."""
        y = superpose(self.position[strongest(x, -1)], self.theta(x), self.proj(x), -1)
        y = F.gelu(self.turn_and_convolve(y))
        return add_projection(shortcut + self.proj_out.bias, y, self.se(y), self.proj_out.weight)


class FoldedBlock(nn.Module):
    """`SpartanBlock` in eval mode: (B, C, H, W) -> (B, C, H, W).

    On CPU, images whose waves together outgrow the caches are computed a few at a time, which took 0.7 of the time in
    the early stages. Scripted, traced, compiled and exported forms compute all of them at once.
    """

    def __init__(self, block: SpartanBlock):
        super().__init__()
        self.norm1 = block.norm1
        self.spatial = block.spatial.fuse() if isinstance(block.spatial, SpatialMixer) else block.spatial
        self.norm2 = block.norm2
        self.channel = block.channel.fuse() if isinstance(block.channel, ChannelMixer) else block.channel
        for projection, scale in ((self.spatial.proj_out, block.scale1), (self.channel.proj_out, block.scale2)):
            projection.weight.mul_(scale.scale.flatten(1))
            projection.bias.mul_(scale.scale.flatten())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), channels-last."""
        if torch.jit.is_scripting():
            return self.mix(x)
        images = self.images_at_once(x)
        if images == 0:
            return self.mix(x)
        return torch.cat([self.mix(part) for part in x.split(images)])

    @torch.jit.ignore
    def images_at_once(self, x: Tensor) -> int:
        """How many images of a batch to compute at a time, 0 for all of them."""
        tracing = isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing() or torch.compiler.is_compiling()
        if tracing or x.device.type != "cpu":
            return 0
        waves = self.channel.proj.out_features * x.shape[2] * x.shape[3]
        images = max(1, CACHED_ELEMENTS * torch.get_num_threads() // waves)
        return images if images < x.shape[0] else 0

    def mix(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), channels-last."""
        x = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        x = self.spatial(self.norm1(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), x)
        return self.channel(self.norm2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), x).permute(0, 3, 1, 2)


def turn_weight(weight: Tensor, rotation: Tensor) -> Tensor:
    """Weights (out, k, h, w) of a grouped convolution, k even, that multiply the pairs of their input by factors.

    The pairs of the input are channels 2j, 2j+1; `rotation` (in/2, 2) holds their factors (alpha, beta).
    """
    outputs, width, h, w = weight.shape
    groups = 2 * rotation.shape[0] // width
    pairs = weight.reshape(groups, outputs // groups, width // 2, 2, h, w)
    alpha, beta = rotation.reshape(groups, 1, width // 2, 2, 1, 1).unbind(3)
    real, imag = pairs.unbind(3)
    return torch.stack([real * alpha + imag * beta, imag * alpha - real * beta], dim=3).reshape(weight.shape)


def depthwise(weight: Tensor, bias: Tensor | None = None) -> nn.Conv2d:
    """The depthwise 3x3 convolution of `weight` (n, 1, 3, 3) and `bias` (n,)."""
    n = weight.shape[0]
    dd = {"device": weight.device, "dtype": weight.dtype}
    conv = nn.Conv2d(n, n, 3, padding=1, groups=n, bias=bias is not None, **dd)
    conv.weight.copy_(weight)
    if bias is not None:
        conv.bias.copy_(bias)
    return conv.to(memory_format=torch.channels_last)


def _conv_of(layer: ConvNorm | nn.Sequential) -> nn.Conv2d:
    return layer.fused_conv() if isinstance(layer, ConvNorm) else layer[0]


def _linear(conv: nn.Conv2d, order: Tensor | None = None) -> nn.Linear:
    """A copy of a 1x1 convolution as a linear layer, its output channels in another order."""
    weight = conv.weight
    linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    linear.weight.copy_(weight.flatten(1) if order is None else weight.flatten(1)[order])
    linear.bias.copy_(conv.bias if order is None else conv.bias[order])
    return linear


def init_weights(module: nn.Module) -> None:
    """Convolutions by their fan-out, linear layers from a truncated normal, and each vector's own start."""
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
    elif isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm | ChannelScale | SpatialMixer | ChannelMixer):
        module.reset_parameters()
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
