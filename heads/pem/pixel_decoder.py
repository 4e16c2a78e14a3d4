"""PEM's pixel decoder: a feature pyramid of deformable convolutions with a channel gate (arXiv 2402.19422, 3.3).

    x32 = gate(p32) + context;  (f32, up) = level(x32);  x16 = gate(p16) + up;  ...  mask features from x4

`p_i` are 1x1 projections of the backbone's maps, the context is the projected mean of the coarsest one, a level
is a deformable convolution (its result is what the transformer decoder reads) followed by a transposed one that
doubles the map. On CPUs all maps are channels-last: the transposed convolution takes a third of the time there, and the
deformable one gathers whole pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

from zoo.heads.pem.deform_conv import deform_conv


def pointwise(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 1x1 convolution; on CPUs as a matrix product over pixels, whose result is channels-last whatever `x` is."""
    if x.device.type != "cpu" or torch.compiler.is_exporting():
        return conv(x)
    y = F.linear(x.flatten(2).transpose(1, 2), conv.weight.flatten(1), conv.bias)
    # with another order of views the batch axis of one image gets a stride that sends oneDNN down a slow path
    return y.unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2)


class ConvNormRelu(nn.Module):
    """1x1 convolution without bias, batch norm, ReLU: (B, C, H, W) -> (B, out, H, W)."""

    def __init__(self, in_chs: int, out_chs: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_chs, out_chs, 1, bias=False, **dd)
        self.norm = nn.BatchNorm2d(out_chs, **dd)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out, H, W), non-negative."""
        return self.act(self.norm(pointwise(x, self.conv)))

    def reparameterize(self) -> None:
        """Merge the norm into the convolution."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv = fuse_conv_bn_eval(self.conv.eval(), self.norm.eval())
            self.norm = nn.Identity()


class ChannelGate(nn.Module):
    """The factor 1 + sigmoid(sigmoid(MLP(mean over the map))) of each channel: (B, C, H, W) -> (B, C, 1, 1).

    The sigmoid is applied twice in the official code, so the factor lies in 1.5 to 1.73.
    """

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.reduce = nn.Conv2d(dim, dim // 2, 1, bias=False, **dd)
        self.norm = nn.BatchNorm2d(dim // 2, **dd)
        self.expand = nn.Conv2d(dim // 2, dim, 1, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 1, 1)."""
        hidden = self.norm(self.reduce(x.mean((2, 3), keepdim=True))).relu()
        return 1 + self.expand(hidden).sigmoid().sigmoid()

    def reparameterize(self) -> None:
        """Merge the norm into the first convolution."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.reduce = fuse_conv_bn_eval(self.reduce.eval(), self.norm.eval())
            self.norm = nn.Identity()


class DeformableLevel(nn.Module):
    """Modulated deformable 3x3 convolution, norm, ReLU; then a transposed 4x4 of stride 2, norm, ReLU."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        # 18 channels of offsets (dy, dx), tap after tap, and 9 of modulation before the sigmoid
        self.offset = nn.Conv2d(dim, 27, 3, padding=1, **dd)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, bias=False, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)
        self.up = nn.ConvTranspose2d(dim, dim, 4, stride=2, padding=1, bias=False, **dd)
        self.up_norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> the level's feature (B, C, H, W) and the map for the next level (B, C, 2H, 2W)."""
        offset, modulation = self.offset(x).split((18, 9), 1)
        y = deform_conv(x, offset, modulation.sigmoid(), self.conv.weight, self.conv.bias)
        feature = self.norm(y).relu_()
        return feature, self.up_norm(self.up(feature)).relu_()

    def reparameterize(self) -> None:
        """Merge both norms into their convolutions."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv = fuse_conv_bn_eval(self.conv.eval(), self.norm.eval())
            bn = self.up_norm
            self.up.weight, self.up.bias = fuse_conv_bn_weights(
                self.up.weight, None, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias, transpose=True
            )
            self.norm = self.up_norm = nn.Identity()
            # maps are channels-last here, and weights of another layout would be converted in each call
            self.to(memory_format=torch.channels_last)


class PixelDecoder(nn.Module):
    """Maps of the backbone at strides 4, 8, 16, 32 -> mask features at stride 4 and features at 32, 16 and 8.

    Args:
        in_channels: channels of the maps, finest first.
        dim: width inside.
        mask_dim: channels of the mask features.
    """

    def __init__(self, in_channels: Sequence[int], dim: int = 128, mask_dim: int = 256, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.projections = nn.ModuleList(ConvNormRelu(channels, dim, **dd) for channels in in_channels)
        self.context = ConvNormRelu(in_channels[-1], dim, **dd)
        self.gates = nn.ModuleList(ChannelGate(dim, **dd) for _ in in_channels)  # coarsest first
        self.levels = nn.ModuleList(DeformableLevel(dim, **dd) for _ in in_channels[1:])  # coarsest first
        self.out = ConvNormRelu(dim, mask_dim, **dd)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """The official initialisation, its bilinear start of the transposed convolutions included.

        Of these only output channel 0 starts bilinear (for every input channel), the others as PyTorch's default.
        """
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d | nn.ConvTranspose2d):
                module.reset_parameters()
            elif isinstance(module, ChannelGate):
                module.reduce.reset_parameters()
                module.expand.reset_parameters()
            elif isinstance(module, ConvNormRelu):
                nn.init.kaiming_normal_(module.conv.weight, a=1)
        for level in self.levels:
            nn.init.kaiming_normal_(level.conv.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(level.offset.weight)
            nn.init.zeros_(level.offset.bias)
            ramp = torch.tensor([0.25, 0.75, 0.75, 0.25], device=level.up.weight.device, dtype=level.up.weight.dtype)
            with torch.no_grad():
                level.up.weight[:, 0] = torch.outer(ramp, ramp)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Maps (B, C_i, H_i, W_i), each half as large as the one before it.

        Returns:
            Mask features (B, mask_dim, H_0, W_0), non-negative, and the features of the levels, coarsest first.

        Raises:
            ValueError: the sizes of the maps do not double from level to level.
        """
        _check_sizes(maps)
        carried = self.context(maps[-1].mean((2, 3), keepdim=True))
        features: list[Tensor] = []
        for level, x in enumerate(reversed(maps)):
            x = self.projections[len(maps) - 1 - level](x)
            x = torch.addcmul(carried, x, self.gates[level](x))
            if level < len(self.levels):
                feature, carried = self.levels[level](x)
                features.append(feature)
        return self.out(x), features


def _check_sizes(maps: Sequence[Tensor]) -> None:
    if torch.compiler.is_compiling():
        return
    sizes = [tuple(m.shape[-2:]) for m in maps]
    if any(fine != (2 * h, 2 * w) for fine, (h, w) in pairwise(sizes)):
        raise ValueError(
            f"maps of sizes {', '.join(f'{h}x{w}' for h, w in sizes)} do not halve from level to level: pad the image "
            "to a multiple of the largest stride"
        )
