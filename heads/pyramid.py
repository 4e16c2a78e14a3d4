"""Maps at strides 4 to 32 from any timm model: what every dense head stands on.

A hierarchical model (ResNet, MetaFormer, SLAB-Swin, ...) has a stage for each stride; the last block of a stage is
tapped. A single-scale model (ViT, CRATE, NiNformer, Activator, ...) has one map, from which transposed convolutions
and pooling make the others: the simple feature pyramid of ViTDet (arXiv 2203.16527, section 3).

Whatever the size of the image, the map of stride s has ceil(H / s) x ceil(W / s) cells and cell (i, j) stands for
the pixels from (i s, j s): images are padded with zeros (the mean colour, after normalising) at the bottom and the
right to a multiple of the largest stride, and the maps are cropped back. Without that, a model that cuts patches
drops the rest of an image and one that pads in every stage keeps it, and strides are no longer what they are called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models import model_entrypoint
from torch import Tensor, nn

# constructor arguments that let a model take images of any size, each known to some models only
_ANY_SIZE_ARGUMENTS = ("dynamic_img_size", "strict_img_size")


def create_backbone(name: str, *, pretrained: bool = False, in_chans: int = 3, **kwargs: Any) -> nn.Module:
    """A timm or zoo model that takes images of any size, if it has a form that does.

    Args:
        name: registered name; zoo's or any of timm's.
        pretrained: load the released weights.
        in_chans: channels of the image.
        kwargs: arguments of the model; `img_size=(H, W)` for models with one fixed size.

    Raises:
        ValueError: no such model, or an argument that it does not take.
    """
    try:
        model_entrypoint(name.split(".")[0])
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"no model is called {name!r}: `zoo list` and timm.list_models() name them") from error
    build = dict(pretrained=pretrained, in_chans=in_chans)
    if "img_size" not in kwargs:
        # which of the two exists can only be found out by asking: entrypoints take **kwargs
        for option in _ANY_SIZE_ARGUMENTS:
            try:
                return timm.create_model(name, **build, **kwargs, **{option: option.startswith("dynamic")})
            except TypeError as error:
                if option not in str(error):
                    raise ValueError(f"{name} does not take these arguments: {error}") from error
    try:
        return timm.create_model(name, **build, **kwargs)
    except TypeError as error:
        raise ValueError(f"{name} does not take these arguments: {error}") from error


class Pyramid(nn.Module):
    """Maps of an image at the given strides, finest first.

    Args:
        backbone: name of a zoo or timm model, or a built one (its classifier is dropped).
        strides: strides of the maps, ascending powers of two; at most 4 to 64 for single-scale models, those of its
            stages for hierarchical ones.
        pretrained: load the released weights of a backbone that is given by name.
        norm: "layer" normalises each map over its channels with a LayerNorm of its own, as Swin's, SLAB's and VMamba's
            detectors do; "group" over channels and pixels with a GroupNorm of one group, as PoolFormer's do; None
            leaves the maps as the stages give them.
        kwargs: further arguments of the backbone's constructor.

    Attributes:
        backbone: the timm model, with the key names of its classification checkpoints:
            `zoo.load_checkpoint(pyramid.backbone, "official.pth")` leaves out what was pruned (the classifier).
        channels: channels of each map.
        strides: stride of each map.
        mean: what is subtracted from images, in 0..1.
        std: what they are then divided by.

    Raises:
        ValueError: no such model, or strides that it has no stage for.
        TypeError: a module without intermediate maps.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        strides: Sequence[int] = (4, 8, 16, 32),
        *,
        pretrained: bool = False,
        norm: Literal["layer", "group"] | None = None,
        **kwargs: Any,
    ):
        super().__init__()
        if norm not in ("layer", "group", None):
            raise ValueError(f"norm={norm!r}, expected 'layer', 'group' or None")
        if isinstance(backbone, str):
            self.name: str | None = backbone
            backbone = create_backbone(backbone, pretrained=pretrained, **kwargs)
        else:
            if kwargs or pretrained:
                given = ", ".join(sorted({**kwargs, **({"pretrained": True} if pretrained else {})}))
                raise ValueError(f"{given} given for a backbone that is built already: pass its name instead")
            self.name = (getattr(backbone, "pretrained_cfg", None) or {}).get("architecture")
        if not hasattr(backbone, "forward_intermediates") or not hasattr(backbone, "feature_info"):
            raise TypeError(
                f"{type(backbone).__name__} has no forward_intermediates(): pass a timm or zoo model, or its name"
            )
        self.strides = tuple(strides)
        if any(s & (s - 1) or s < 1 for s in self.strides) or list(self.strides) != sorted(set(self.strides)):
            raise ValueError(f"strides={tuple(strides)}, expected ascending powers of two such as (4, 8, 16, 32)")
        cfg = getattr(backbone, "pretrained_cfg", None) or {}
        self.mean = tuple(cfg.get("mean") or timm.data.IMAGENET_DEFAULT_MEAN)
        self.std = tuple(cfg.get("std") or timm.data.IMAGENET_DEFAULT_STD)

        entries = list(backbone.state_dict())
        info = [dict(stage) for stage in backbone.feature_info]
        reductions = [stage["reduction"] for stage in info]
        self.single_scale = len(set(reductions)) == 1
        self.divisor = self.strides[-1]
        if self.single_scale:
            self._tap_one(backbone, reductions[0], info[-1]["num_chs"])
        else:
            self._tap_stages(backbone, reductions)
            self.divisor = max(self.divisor, max(reductions))
        kept = backbone.state_dict()
        backbone.pruned_entries = frozenset(name for name in entries if name not in kept)
        self.backbone = backbone
        self.norms = None
        if norm is not None:
            self.norms = nn.ModuleList(
                LayerNorm2d(c, eps=1e-5) if norm == "layer" else nn.GroupNorm(1, c, eps=1e-5) for c in self.channels
            )

    def _tap_stages(self, backbone: nn.Module, reductions: list[int]) -> None:
        last = {reduction: i for i, reduction in enumerate(reductions)}
        missing = [s for s in self.strides if s not in last]
        if missing:
            raise ValueError(
                f"strides={self.strides}, and {self.name or type(backbone).__name__} has no stage of stride "
                f"{', '.join(map(str, missing))}: it has {', '.join(map(str, last))}"
            )
        self.indices = [last[s] for s in self.strides]
        channels = {i: stage["num_chs"] for i, stage in enumerate(backbone.feature_info)}
        self.channels = [channels[i] for i in self.indices]
        # what the maps do not depend on gets no gradient, which distributed training takes for an error
        backbone.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
        self.levels = None
        self.scale = None

    def _tap_one(self, backbone: nn.Module, patch: int, dim: int) -> None:
        depth = len(backbone.feature_info)
        self.indices = [depth - 1]
        backbone.prune_intermediate_layers(self.indices, prune_norm=False, prune_head=True)
        stride = 1 << round(torch.log2(torch.tensor(float(patch))).item())
        # patches of 14 px see an image shrunk to 14/16, so that they fall on a grid of stride 16
        self.scale = None if stride == patch else (patch, stride)
        self.divisor = max(self.divisor, stride)
        self.levels = nn.ModuleList(_rescale(dim, s, stride) for s in self.strides)
        self.channels = [level.channels for level in self.levels]

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W), normalised -> for each stride s, (B, channels, ceil(H / s), ceil(W / s)).

        The backbone and the rescaling run once, on the padded image; cropping is a view.
        """
        H, W, d = x.shape[-2], x.shape[-1], self.divisor
        below, right = (d - H % d) % d, (d - W % d) % d
        # under export the sizes are symbols: a branch on them would fix them
        if torch.compiler.is_exporting() or below or right:
            x = F.pad(x, (0, right, 0, below))
        if self.scale is not None:
            patch, stride = self.scale
            size = [x.shape[-2] * patch // stride, x.shape[-1] * patch // stride]
            x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
        maps = self.backbone.forward_intermediates(
            x,
            indices=self.indices,
            norm=self.single_scale,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        if self.levels is not None:
            maps = [level(maps[-1]) for level in self.levels]
        if self.norms is not None:
            maps = [norm(m) for norm, m in zip(self.norms, maps)]
        return [_crop(m, (H + s - 1) // s, (W + s - 1) // s) for m, s in zip(maps, self.strides)]

    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's grouping of the backbone's parameters, with the prefix that they have here."""
        matcher = self.backbone.group_matcher(coarse=coarse)
        return {k: _prefixed(v) for k, v in matcher.items()}

    def no_weight_decay(self) -> set[str]:
        """Parameters of the backbone that weight decay leaves alone, under the names that they have here."""
        own = getattr(self.backbone, "no_weight_decay", set)
        return {f"backbone.{name}" for name in own()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's activations in the backward pass."""
        self.backbone.set_grad_checkpointing(enable)


def _prefixed(pattern: Any) -> Any:
    if isinstance(pattern, str):
        return pattern.replace("^", r"^backbone\.", 1)
    return [(_prefixed(p), *rest) for p, *rest in pattern] if isinstance(pattern, list | tuple) else pattern


def _crop(x: Tensor, h: int, w: int) -> Tensor:
    if torch.compiler.is_exporting():  # a slice would ask the exporter to prove that h is no larger than the map
        x = x.index_select(-2, torch.arange(h, device=x.device))
        return x.index_select(-1, torch.arange(w, device=x.device))
    return x[..., :h, :w]


class _Level(nn.Sequential):
    channels: int


def _rescale(dim: int, target: int, stride: int) -> _Level:
    """From stride `stride` to `target` as ViTDet does: halve it by a transposed convolution, double it by pooling."""
    layers: list[nn.Module] = []
    channels = dim
    current = stride
    while current > target:
        if current < stride:
            layers += [LayerNorm2d(channels), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, max(channels // 2, 1), 2, stride=2))
        channels = max(channels // 2, 1)
        current //= 2
    if current < target:
        layers.append(nn.MaxPool2d(target // current, stride=target // current))
    level = _Level(*layers)
    level.channels = channels
    return level
