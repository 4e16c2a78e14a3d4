"""How a zoo family builds its models: timm's builder, with zoo's checkpoint reader and manifest in front."""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, get_pretrained_cfg
from torch import nn

from zoo.checkpoint import CheckpointError, StateDict, classifier_names, find_converter
from zoo.manifest import pretrained_state_dict


def pretrained_cfg(**fields: Any) -> dict[str, Any]:
    """A timm pretrained cfg with the defaults of these papers: 224 px, bicubic, ImageNet mean and std."""
    defaults = dict(
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        crop_pct=0.875,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        fixed_input_size=False,
    )
    return defaults | fields


def build_model(
    model_class: type[nn.Module],
    variant: str,
    pretrained: bool,
    *,
    feature_cfg: dict[str, Any],
    **kwargs: Any,
) -> nn.Module:
    """Build a registered variant as timm's entrypoints do.

    Args:
        model_class: the family's class.
        variant: registered name, with a tag if the caller asked for one.
        pretrained: load released weights: a local file under `$ZOO_WEIGHTS` first, then the hub.
        feature_cfg: how `features_only=True` extracts maps (timm's feature wrappers).
        kwargs: the variant's arguments joined with the user's.

    Raises:
        RuntimeError: `pretrained` and these weights cannot be downloaded; the message says why and what to do.
    """
    overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    given = kwargs.pop("pretrained_cfg", None)
    if pretrained and not ({"file", "state_dict"} & overlay.keys()):
        cfg = given if given is not None and not isinstance(given, str) else get_pretrained_cfg(given or variant)
        if isinstance(given, str):  # a tag
            cfg = get_pretrained_cfg(f"{variant}.{given}")
        fields = cfg.to_dict() if hasattr(cfg, "to_dict") else dict(cfg or {})
        if not ({"file", "state_dict"} & {k for k, v in fields.items() if v}):
            overlay["state_dict"] = pretrained_state_dict(variant, fields)
    model = build_model_with_cfg(
        model_class,
        variant,
        pretrained,
        pretrained_cfg=given,
        pretrained_cfg_overlay=overlay or None,
        pretrained_filter_fn=filter_pretrained,
        feature_cfg=feature_cfg,
        **kwargs,
    )
    cfg = getattr(model, "pretrained_cfg", None)
    if isinstance(cfg, dict):
        cfg.pop("state_dict", None)  # the tensors have served, the model should not keep a second copy
    return model


def filter_pretrained(state_dict: StateDict, model: nn.Module) -> StateDict:
    """timm's `pretrained_filter_fn`: official or zoo layout in, the model's own names out, all present.

    timm stops checking names as soon as the class count differs, so the check is made here.

    Raises:
        CheckpointError: an entry of the model other than its classifier is not in the file.
    """
    converter = find_converter(model)
    state = converter(state_dict, model).state_dict if converter else state_dict
    classifier = classifier_names(model)
    missing = [n for n in model.state_dict() if n not in state and not (classifier and n.startswith(classifier))]
    if missing:
        shown = ", ".join(missing[:8])
        raise CheckpointError(f"the pretrained file lacks {len(missing)} entries of {type(model).__name__}: {shown}")
    return state
