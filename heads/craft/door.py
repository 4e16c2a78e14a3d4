"""`zoo.create_upscaler`: the door to super-resolution."""

from __future__ import annotations

from os import PathLike
from typing import Any

from torch import nn

from zoo.heads.craft.backbone import CraftOnBackbone
from zoo.heads.craft.model import Craft, read_options

_PLAIN = (str, int, float, bool, type(None), list, tuple, dict)


def create_upscaler(
    name: str = "craft",
    scale: int | None = None,
    *,
    backbone: str | nn.Module | None = None,
    pretrained: bool = False,
    pretrained_backbone: bool = False,
    checkpoint: str | PathLike | None = None,
    **options: Any,
) -> Craft:
    """A super-resolution model, in eval mode.

        zoo.create_upscaler("craft", scale=4)                              # the official model
        zoo.create_upscaler("craft", scale=4, backbone="convformer_s18")   # with a side input from a backbone
        zoo.create_upscaler("craft", checkpoint="CRAFT_MODEL_x4.pth")      # options read off the file

    Args:
        name: "craft".
        scale: factor of enlargement, 4 by default; that of the checkpoint where one is given.
        backbone: name of a zoo or timm model, or a built one (`CraftOnBackbone`).
        pretrained: load the weights that zoo comes with or that can be downloaded, for `name` and `scale`.
        pretrained_backbone: load the released weights of the backbone.
        checkpoint: a file of CRAFT weights, official or zoo's; what its entries tell need not be given.
        options: further arguments of `Craft` (and of `CraftOnBackbone`).

    Raises:
        ValueError: an unknown name, or options that do not fit.
        RuntimeError: `pretrained`, and these weights cannot be downloaded; says where they are.
        CheckpointError: the checkpoint is not of this model.
    """
    if name != "craft":
        raise ValueError(f"no upscaler is called {name!r}: there is 'craft'")
    state = None
    if checkpoint is not None:
        from zoo.checkpoint import read_checkpoint, unwrap_state_dict

        state = unwrap_state_dict(read_checkpoint(checkpoint))
        read = read_options(state)
        if scale is not None and scale != read["scale"]:
            raise ValueError(f"{checkpoint} is of a model for scale {read['scale']}, and scale={scale} was asked for")
        options = read | options
        scale = options.pop("scale")
    elif pretrained:
        from zoo.manifest import pretrained_state_dict

        state = pretrained_state_dict(f"craft_x{scale or 4}", {})
    scale = 4 if scale is None else scale
    arguments = dict(scale=scale, **options)
    if backbone is None:
        model = Craft(**arguments)
    else:
        model = CraftOnBackbone(backbone, pretrained_backbone=pretrained_backbone, **arguments)
    if all(isinstance(value, _PLAIN) for value in (backbone, *arguments.values())):
        # what `zoo.saving.load_model` rebuilds it from
        model.zoo_door = ("create_upscaler", dict(name=name, backbone=backbone, **arguments))
    if state is not None:
        from zoo.checkpoint import load_checkpoint

        load_checkpoint(model, state)
    return model.eval()
