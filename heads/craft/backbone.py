"""CRAFT with a side input from any backbone: a complete CRAFT whose groups also see what a classifier sees.

A classification backbone begins at stride 2 to 4 and has lost what super-resolution restores, so it can only add
semantics to a path of full resolution. Its maps are projected to CRAFT's width, enlarged, and added to the inputs of
the groups, shallow maps to early groups, each through a scale `gamma` that starts at zero: a new model equals plain
CRAFT, loads its checkpoints, and learns how much of the backbone it wants.

    in_g = out_{g-1} + gamma_g * upsample(lateral(F_{m(g)}))

This is a design of this project: no published number pairs CRAFT with these backbones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.checkpoint import Conversion, StateDict, checkpoint_converter
from zoo.heads.craft.model import Craft, convert_checkpoint
from zoo.heads.pyramid import Pyramid, create_backbone

_SIDE = ("pyramid.", "laterals.", "gamma")


class CraftOnBackbone(Craft):
    """CRAFT whose groups also see a backbone's maps, through scales that start at zero: a new model equals plain CRAFT.

    Args:
        backbone: name of a zoo or timm model, or a built one with `forward_intermediates`.
        strides: strides of the maps to use; by default all of the backbone's up to 16 (its only one for
            single-scale models), the deepest ones where there are more than groups.
        pretrained_backbone: load the released weights of a backbone given by name.
        backbone_args: further arguments of a backbone given by name, such as `img_size`.
        options: arguments of `Craft`.

    Attributes:
        gamma: (groups, C) scales of the side input, zero at the start.
        sources: for each group, which of the maps it gets.

    Raises:
        ValueError: a backbone without maps of a stride up to 16, or images that are not RGB.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        strides: Sequence[int] | None = None,
        pretrained_backbone: bool = False,
        backbone_args: dict[str, Any] | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        if self.in_chans != 3:
            raise ValueError(f"in_chans is {self.in_chans}: backbones take RGB images, so it must be 3 with a backbone")
        if isinstance(backbone, str):
            backbone = create_backbone(backbone, pretrained=pretrained_backbone, **(backbone_args or {}))
        strides = tuple(strides or _usable_strides(backbone))[-len(self.layers) :]
        self.pyramid = Pyramid(backbone, strides)
        like = self.conv_first.weight
        self.pyramid.to(like.device, like.dtype)
        dd = dict(device=like.device, dtype=like.dtype)
        self.laterals = nn.ModuleList(nn.Conv2d(c, self.embed_dim, 1, **dd) for c in self.pyramid.channels)
        self.gamma = nn.Parameter(torch.zeros(len(self.layers), self.embed_dim, **dd))
        self.sources = tuple(min(g, len(strides) - 1) for g in range(len(self.layers)))
        for name in ("mean", "std"):
            values = torch.tensor(getattr(self.pyramid, name), **dd).reshape(1, 3, 1, 1)
            self.register_buffer(f"backbone_{name}", values, persistent=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """CRAFT's initialisation, the backbone's own, and no side input."""
        super().init_weights()
        if not hasattr(self, "gamma"):
            return  # called by the base class, before there is a side input
        if hasattr(self.pyramid.backbone, "init_weights"):
            self.pyramid.backbone.init_weights()
        for lateral in self.laterals:
            lateral.reset_parameters()
        self.gamma.zero_()
        for name in ("mean", "std"):
            values = torch.tensor(getattr(self.pyramid, name))
            getattr(self, f"backbone_{name}").copy_(values.reshape(1, 3, 1, 1))

    def side_inputs(self, x: Tensor) -> list[Tensor]:
        """The projected maps of a padded image, each (B, H, W, C)."""
        try:
            maps = self.pyramid((x - self.backbone_mean) / self.backbone_std)
        except AssertionError as error:  # timm's way to refuse a size
            raise ValueError(
                f"the backbone {self.pyramid.name} does not take images of {x.shape[2]} x {x.shape[3]} ({error}): "
                "use tiles of its size, or build it for this one with backbone_args={'img_size': ...}"
            ) from error
        side = []
        for lateral, map in zip(self.laterals, maps):
            y = F.interpolate(lateral(map), size=x.shape[2:], mode="bilinear", align_corners=False)
            side.append(y.permute(0, 2, 3, 1).contiguous())
        return side

    def join(self, x: Tensor, side: list[Tensor], index: int) -> Tensor:
        """The group's input with its share of the backbone."""
        map = side[self.sources[index]]
        return x + self.gamma[index] * (map if x.dim() == 4 else map[0])


def _usable_strides(backbone: nn.Module) -> tuple[int, ...]:
    reductions = sorted({stage["reduction"] for stage in getattr(backbone, "feature_info", ())})
    if len(reductions) == 1:  # a single scale, which the pyramid brings to a power of two
        return (1 << round(torch.log2(torch.tensor(float(reductions[0]))).item()),)
    usable = tuple(r for r in reductions if r <= 16)
    if not usable:
        raise ValueError(
            f"{type(backbone).__name__} has no maps of a stride up to 16 (it has {reductions or 'none'}): its maps are "
            "too coarse to help super-resolution"
        )
    return usable


@checkpoint_converter(CraftOnBackbone, layouts={})
def convert_with_backbone(state_dict: StateDict, model: CraftOnBackbone) -> Conversion:
    """Files of plain CRAFT leave the side input as it is; files with a backbone are zoo's own."""
    state, layout, notes = convert_checkpoint(state_dict, model)
    own = model.state_dict()
    new = [name for name in own if name.startswith(_SIDE) and name not in state]
    if new and not any(name.startswith(_SIDE) for name in state):
        state = state | {name: own[name] for name in new}
        notes = (*notes, f"the file is of CRAFT alone: the {len(new)} entries of the side input keep their values")
    return Conversion(state, layout, notes)
