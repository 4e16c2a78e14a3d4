"""SLAB: transformers whose norms vanish and whose attention is linear (arXiv 2405.11582, ICML 2024).

PRepBN blends LayerNorm into a BatchNorm with an identity path during training; for inference every norm merges
into the layer beside it. Simplified linear attention (SLA) replaces softmax by relu features and adds a
depthwise convolution of the values. Both are put into DeiT, PVT, Swin and CSwin: `*_prepbn` has the norm,
`slab_*` norm and attention.

Differs from the official code (xinghaochen/SLAB): any input size, where SLA's position tables are resampled; no
parameters without effect (SLAB-DeiT's class token, SLAB-CSwin's `scale`); counters and statistics do not
advance twice under activation checkpointing; all norms fold, without the error that the official merge makes in
the patch embedding. As released, DeiT-T-PRepBN and Swin-T-PRepBN have RepBN alone: pass `norm_layer="prepbn"`
(or `partial(PRepBN, total_steps=...)`) to train them as in the paper. `SlabSwinDense` is the authors' detection
backbone. The hosts are in `slab_deit.py`, `slab_pyramids.py` and `slab_swin.py`, their attention in
`slab_attention.py` and `slab_windows.py`, their blocks in `slab_blocks.py`, the norm in `prepbn.py`, learning rates
and weight decay in `slab_recipe.py`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from zoo.builder import build_model, pretrained_cfg
from zoo.checkpoint import CheckpointError, Conversion, StateDict, checkpoint_converter
from zoo.prepbn import PRepBN, PRepBNSchedule, RepBN, gamma_at, recalibrate, recalibrating, set_gamma
from zoo.slab_attention import resample_position, resample_relative
from zoo.slab_blocks import resample_map_position
from zoo.slab_deit import SlabDeit
from zoo.slab_pyramids import SlabCswin, SlabPvt, SlabPyramid, Stage
from zoo.slab_recipe import LearningRates, learning_rate, optimizer_groups
from zoo.slab_swin import SlabSwin, SlabSwinDense

__all__ = [
    "LearningRates",
    "PRepBN",
    "PRepBNSchedule",
    "RepBN",
    "SlabCswin",
    "SlabDeit",
    "SlabPvt",
    "SlabSwin",
    "SlabSwinDense",
    "gamma_at",
    "learning_rate",
    "optimizer_groups",
    "recalibrate",
    "recalibrating",
    "set_gamma",
    "slab_swin_dense",
]

# Official names -> zoo's


def zoo_name(official: str, model: nn.Module) -> str | None:
    """The model's name of an official checkpoint's entry; None for what is derived or has no effect.

    Names of zoo's own pass unchanged.
    """
    match official.split("."):
        case [*_, "attn_mask" | "relative_position_index" | "scale"]:
            return None
        case ["cls_token"] if isinstance(model, SlabDeit) and model.cls_token is None:
            return None
    if isinstance(model, SlabDeit) or official.startswith(("stem.", "stages.", "norm.", "norms.", "head.fc.")):
        return official
    return _pyramid_name(official, model)


def _pyramid_name(official: str, model: nn.Module) -> str:
    match official.split("."):
        case ["patch_embed" | "patch_embed1", "proj", leaf]:
            return f"stem.conv.{leaf}"
        case ["patch_embed" | "patch_embed1", "norm", *rest]:
            return ".".join(["stem.norm", *rest])
        case ["stage1_conv_embed", index, *rest]:
            return ".".join(["stem", {"0": "conv", "2": "norm"}.get(index, index), *rest])
        case [embed, part, *rest] if embed[:-1] == "patch_embed":
            return ".".join([f"stages.{int(embed[-1]) - 1}.downsample", {"proj": "conv"}.get(part, part), *rest])
        case [merge, *rest] if merge[:-1] == "merge":
            return ".".join([f"stages.{merge[-1]}.downsample", *rest])
        case [table] if table[:-1] == "pos_embed":
            return f"stages.{int(table[-1]) - 1}.pos_embed"
        case ["layers", i, "downsample", *rest]:
            return ".".join([f"stages.{int(i) + 1}.downsample", *rest])
        case ["layers", i, *rest]:
            return ".".join([f"stages.{i}", *rest])
        case [stage, j, *rest] if stage[:-1] in ("block", "stage"):
            return f"stages.{int(stage[-1]) - 1}.blocks.{j}.{_block_name('.'.join(rest))}"
        case [norm, *rest] if norm[:-1] == "norm":
            if isinstance(model, SlabSwinDense):
                return ".".join([f"norms.{norm[-1]}", *rest])
            last = int(norm[-1]) == len(model.stages)
            return ".".join(["norm" if last else f"stages.{int(norm[-1]) - 1}.norm", *rest])
        case ["head", "weight" | "bias" as leaf]:
            return f"head.fc.{leaf}"
    return official


def _block_name(official: str) -> str:
    """CSwin's blocks hold their projections themselves; PVTv2 wraps its convolution twice."""
    if official.startswith(("qkv.", "proj.")):
        return f"attn.{official}"
    return official.replace("attns.", "attn.branches.").replace("dwconv.dwconv.", "dwconv.")


@checkpoint_converter(
    SlabDeit,
    SlabPyramid,
    SlabSwinDense,
    layouts={
        "SLAB (PRepBN)": ("*.norm1.norm2.alpha", "*.norm1.norm2.bn.running_var"),
        "SLAB (RepBN)": ("*.norm1.alpha", "*.norm1.bn.running_var"),
        "SLAB-Swin": ("layers.*.norm1.norm2.alpha",),
        "SLAB-PVT": ("block1.*.norm1.norm2.alpha",),
        "SLAB-CSwin": ("stage1.*.norm1.norm2.alpha",),
    },
)
def convert_checkpoint(state_dict: StateDict, model: nn.Module) -> Conversion:
    """Official classifiers and dense backbones of any image size, with PRepBN or RepBN, and zoo's own files."""
    official = not any(name.startswith(("stem.", "stages.")) for name in state_dict)
    names = {name: zoo_name(name, model) for name in state_dict}
    state = {new: state_dict[old] for old, new in names.items() if new is not None}
    notes: list[str] = []
    if isinstance(model, SlabSwinDense):
        _use_as_dense(state, model, notes)
    _match_norms(state, model, notes)
    resampled = _resample_tables(state, model)
    if resampled:
        notes.append(f"{resampled} position tables were resampled to the model's size")
    return Conversion(state, "SLAB" if official else "zoo", tuple(notes))


def _use_as_dense(state: StateDict, model: SlabSwinDense, notes: list[str]) -> None:
    """A classifier's file for the dense backbone: no classifier, and the maps' norms as they are in the model."""
    dropped = [name for name in state if name.startswith(("head.", "norm."))]
    for name in dropped:
        del state[name]
    if dropped:
        notes.append(f"the classifier and its norm were left out ({len(dropped)} entries)")
    own = {name: value for name, value in model.state_dict().items() if name.startswith("norms.")}
    if not any(name in state for name in own):
        state.update(own)
        notes.append("the norms of the four maps are not in the file and stay as they are")


def _match_norms(state: StateDict, model: nn.Module, notes: list[str]) -> None:
    """Bring the entries of every norm into the layout of the model's: RepBN alone, or PRepBN with counters."""
    narrowed = widened = 0
    for prefix, norm in model.named_modules():
        if isinstance(norm, PRepBN):
            if f"{prefix}.alpha" in state:
                for name in [n for n in state if n.startswith(f"{prefix}.") and n != prefix]:
                    leaf = name[len(prefix) + 1 :]
                    state[f"{prefix}.norm2.{leaf}"] = state.pop(name)
                own = norm.norm1.weight
                state[f"{prefix}.norm1.weight"] = torch.ones_like(own, device="cpu")
                state[f"{prefix}.norm1.bias"] = torch.zeros_like(own, device="cpu")
                state[f"{prefix}.iter"] = torch.zeros((), dtype=torch.int64)
                state[f"{prefix}.total_step"] = torch.tensor(norm.total_steps)
                widened += 1
            if f"{prefix}.norm2.alpha" in state:  # the detectors' layout has no warm-up
                state.setdefault(f"{prefix}.warm", torch.zeros((), dtype=torch.int64))
        elif isinstance(norm, RepBN) and f"{prefix}.norm2.alpha" in state:
            for name in [n for n in state if n.startswith(f"{prefix}.")]:
                value = state.pop(name)
                leaf = name[len(prefix) + 1 :]
                if leaf.startswith("norm2."):
                    state[f"{prefix}.{leaf[6:]}"] = value
            narrowed += 1
    if widened:
        notes.append(f"{widened} norms of the file are RepBN: gamma is 0 in the model's PRepBN")
    if narrowed:
        notes.append(f"the LayerNorm branches of {narrowed} norms of the file were left out")


def _square(tokens: int) -> tuple[int, int]:
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise CheckpointError(
            f"a position table of the file has {tokens} entries, which is no square: build the model with the "
            "img_size that the file was trained with, load it, and call model.set_input_size"
        )
    return side, side


def _resample_tables(state: StateDict, model: nn.Module) -> int:
    """Resample the file's tables to the model's grids; returns how many there were."""
    count = 0
    own = model.state_dict()
    for prefix, module in model.named_modules():
        for leaf in ("positional_encoding", "relative_position_bias_table", "pos_embed"):
            name = f"{prefix}.{leaf}".lstrip(".")
            if name in state and name in own and state[name].shape != own[name].shape:
                state[name] = _resampled(state[name], module, leaf, own[name])
                count += 1
    return count


def _resampled(table: Tensor, module: nn.Module, leaf: str, own: Tensor) -> Tensor:
    if leaf == "relative_position_bias_table":
        side = (math.isqrt(table.shape[0]) + 1) // 2
        return resample_relative(table, (side, side), *module.window)
    if isinstance(module, SlabDeit):
        grid = _square(table.shape[1] - module.num_prefix_tokens)
        return resample_abs_pos_embed(table, list(module.grid), list(grid), module.num_prefix_tokens)
    grid = _square(table.shape[1])
    if isinstance(module, Stage):
        return resample_map_position(table, grid, *module.grid, False)
    return resample_position(table, grid, *(module.window if hasattr(module, "window") else module.grid))


# Variants


def _cfg(**fields: Any) -> dict[str, Any]:
    defaults = dict(
        crop_pct=0.875,
        first_conv="stem.conv",
        classifier="head.fc",
        origin_url="https://github.com/xinghaochen/SLAB",
        paper_ids="arXiv:2405.11582",
    )
    return pretrained_cfg(**defaults | fields)


_DEIT_CFG = _cfg(first_conv="patch_embed.proj", classifier="head", pool_size=None)

default_cfgs = generate_default_cfgs(
    {
        "deit_t_prepbn.in1k": _DEIT_CFG,
        "deit_s_prepbn.in1k": _DEIT_CFG,
        "slab_deit_t.in1k": _DEIT_CFG,
        "slab_deit_s.in1k": _DEIT_CFG,
        "pvt_t_prepbn.in1k": _cfg(),
        "pvt_s_prepbn.in1k": _cfg(),
        "pvt_m_prepbn.in1k": _cfg(),
        "pvt_l_prepbn.untrained": _cfg(),
        "slab_pvt_t.in1k": _cfg(),
        "slab_pvt_s.in1k": _cfg(),
        "slab_pvt_m.in1k": _cfg(),
        "slab_pvt_l.untrained": _cfg(),
        "slab_pvt_v2_b0.untrained": _cfg(),
        "slab_pvt_v2_b1.untrained": _cfg(),
        "slab_pvt_v2_b2.untrained": _cfg(),
        "slab_pvt_v2_b3.untrained": _cfg(),
        "slab_pvt_v2_b4.untrained": _cfg(),
        "slab_pvt_v2_b5.untrained": _cfg(),
        "swin_t_prepbn.in1k": _cfg(),
        "slab_swin_t.in1k": _cfg(),
        "slab_swin_s.in1k": _cfg(),
        "slab_swin_b.in1k": _cfg(),
        "slab_cswin_t.in1k": _cfg(),
        "slab_cswin_s.in1k": _cfg(),
    }
)

# Where gamma reaches 0, in forward passes, and the epsilon of the LayerNorm that fades out.
_DEIT_NORM = partial(PRepBN, eps=1e-6, total_steps=300000)
_SLAB_DEIT_NORM = partial(PRepBN, eps=1e-6, total_steps=60000)
_PVT_NORM = partial(PRepBN, eps=1e-6, total_steps=300000)
_SWIN_NORM = partial(PRepBN, eps=1e-5, total_steps=60000)
_CSWIN_NORM = partial(PRepBN, eps=1e-5, total_steps=120000)
_DENSE_NORM = partial(PRepBN, eps=1e-5, total_steps=300000)


def _norm_layer(norm: Any, eps: float) -> Any:
    """The norm itself for the names "prepbn", "repbn" and "layernorm", which a recipe or a saved model can hold."""
    named = dict(prepbn=partial(PRepBN, eps=eps), repbn=RepBN, layernorm=partial(nn.LayerNorm, eps=eps))
    if isinstance(norm, str) and norm not in named:
        raise ValueError(f"norm_layer is {norm!r}, expected one of {', '.join(named)}")
    return named[norm] if isinstance(norm, str) else norm


def _deit(variant: str, pretrained: bool, **kwargs: Any) -> SlabDeit:
    kwargs["norm_layer"] = _norm_layer(kwargs["norm_layer"], 1e-6)
    feature_cfg = dict(out_indices=kwargs.pop("out_indices", 3), feature_cls="getter")
    return build_model(SlabDeit, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


def _pyramid(model_class: type[SlabPyramid], variant: str, pretrained: bool, **kwargs: Any) -> SlabPyramid:
    kwargs["norm_layer"] = _norm_layer(kwargs["norm_layer"], 1e-6 if model_class is SlabPvt else 1e-5)
    feature_cfg = dict(out_indices=kwargs.pop("out_indices", (0, 1, 2, 3)), flatten_sequential=True)
    return build_model(model_class, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_model
def deit_t_prepbn(pretrained: bool = False, **kwargs: Any) -> SlabDeit:
    """DeiT-Ti/16 with RepBN: 5.72 M parameters, 1.254 G multiply-adds at 224 px; 73.6 % top-1 claimed."""
    return _deit("deit_t_prepbn", pretrained, **dict(linear=False, norm_layer=RepBN) | kwargs)


@register_model
def deit_s_prepbn(pretrained: bool = False, **kwargs: Any) -> SlabDeit:
    """DeiT-S/16 with PRepBN: 22.07 M parameters, 4.599 G multiply-adds at 224 px; 80.2 % top-1 claimed."""
    return _deit(
        "deit_s_prepbn", pretrained, **dict(embed_dim=384, num_heads=6, linear=False, norm_layer=_DEIT_NORM) | kwargs
    )


@register_model
def slab_deit_t(pretrained: bool = False, **kwargs: Any) -> SlabDeit:
    """SLAB-DeiT-Ti/16: 6.20 M parameters, 1.139 G multiply-adds at 224 px; 74.3 % top-1 claimed."""
    return _deit("slab_deit_t", pretrained, **dict(norm_layer=_SLAB_DEIT_NORM) | kwargs)


@register_model
def slab_deit_s(pretrained: bool = False, **kwargs: Any) -> SlabDeit:
    """SLAB-DeiT-S/16: 22.99 M parameters, 4.359 G multiply-adds at 224 px; 80.0 % top-1 claimed."""
    return _deit("slab_deit_s", pretrained, **dict(embed_dim=384, num_heads=6, norm_layer=_SLAB_DEIT_NORM) | kwargs)


@register_model
def pvt_t_prepbn(pretrained: bool = False, **kwargs: Any) -> SlabPvt:
    """PVT-Tiny with PRepBN: 13.24 M parameters, 1.926 G multiply-adds at 224 px; 76.0 % top-1 claimed."""
    return _pyramid(
        SlabPvt,
        "pvt_t_prepbn",
        pretrained,
        **dict(depths=(2, 2, 2, 2), attn_type="SSSS", norm_layer=_PVT_NORM) | kwargs,
    )


@register_model
def pvt_s_prepbn(pretrained: bool = False, **kwargs: Any) -> SlabPvt:
    """PVT-Small with PRepBN: 24.51 M parameters, 3.806 G multiply-adds at 224 px.

    80.1 % top-1 claimed, trained with drop_path_rate=0.1.
    """
    return _pyramid(
        SlabPvt,
        "pvt_s_prepbn",
        pretrained,
        **dict(depths=(3, 4, 6, 3), attn_type="SSSS", norm_layer=_PVT_NORM) | kwargs,
    )


@register_model
def pvt_m_prepbn(pretrained: bool = False, **kwargs: Any) -> SlabPvt:
    """PVT-Medium with PRepBN: 44.25 M parameters, 6.649 G multiply-adds at 224 px.

    81.7 % top-1 claimed, trained with drop_path_rate=0.3.
    """
    return _pyramid(
        SlabPvt,
        "pvt_m_prepbn",
        pretrained,
        **dict(depths=(3, 4, 18, 3), attn_type="SSSS", norm_layer=_PVT_NORM) | kwargs,
    )


@register_model
def pvt_l_prepbn(pretrained: bool = False, **kwargs: Any) -> SlabPvt:
    """PVT-Large with PRepBN: 61.43 M parameters, 9.804 G multiply-adds at 224 px.

    Trained with drop_path_rate=0.3.
    """
    return _pyramid(
        SlabPvt,
        "pvt_l_prepbn",
        pretrained,
        **dict(depths=(3, 8, 27, 3), attn_type="SSSS", norm_layer=_PVT_NORM) | kwargs,
    )


@register_model
def slab_pvt_t(pretrained: bool = False, **kwargs: Any) -> SlabPvt:
    """SLAB-PVT-Tiny: 12.16 M parameters, 2.036 G multiply-adds at 224 px; 76.5 % top-1 claimed."""
    return _pyramid(SlabPvt, "slab_pvt_t", pretrained, **dict(depths=(2, 2, 2, 2), norm_layer=_PVT_NORM) | kwargs)


@register_model
def slab_pvt_s(pretrained: bool = False, **kwargs: Any) -> SlabPvt:
    """SLAB-PVT-Small: 21.68 M parameters, 4.028 G multiply-adds at 224 px.

    Trained with drop_path_rate=0.1.
    """
    return _pyramid(SlabPvt, "slab_pvt_s", pretrained, **dict(depths=(3, 4, 6, 3), norm_layer=_PVT_NORM) | kwargs)


@register_model
def slab_pvt_m(pretrained: bool = False, **kwargs: Any) -> SlabPvt:
    """SLAB-PVT-Medium: 37.27 M parameters, 7.034 G multiply-adds at 224 px.

    Trained with drop_path_rate=0.3.
    """
    return _pyramid(SlabPvt, "slab_pvt_m", pretrained, **dict(depths=(3, 4, 18, 3), norm_layer=_PVT_NORM) | kwargs)


@register_model
def slab_pvt_l(pretrained: bool = False, **kwargs: Any) -> SlabPvt:
    """SLAB-PVT-Large: 50.68 M parameters, 10.378 G multiply-adds at 224 px.

    Trained with drop_path_rate=0.3.
    """
    return _pyramid(SlabPvt, "slab_pvt_l", pretrained, **dict(depths=(3, 8, 27, 3), norm_layer=_PVT_NORM) | kwargs)


@register_model
def slab_pvt_v2_b0(pretrained: bool = False, **kwargs: Any) -> SlabPvt:
    """SLAB-PVTv2-B0, which the authors defined and never trained: 3.60 M parameters, 0.580 G multiply-adds at 224 px.

    Trained with drop_path_rate=0.1.
    """
    return _pyramid(
        SlabPvt,
        "slab_pvt_v2_b0",
        pretrained,
        **dict(embed_dims=(32, 64, 160, 256), depths=(2, 2, 2, 2), overlapping=True, norm_layer=_PVT_NORM) | kwargs,
    )


@register_model
def slab_pvt_v2_b1(pretrained: bool = False, **kwargs: Any) -> SlabPvt:
    """SLAB-PVTv2-B1, which the authors defined and never trained: 12.94 M parameters, 2.218 G multiply-adds at 224 px.

    Trained with drop_path_rate=0.1.
    """
    return _pyramid(
        SlabPvt,
        "slab_pvt_v2_b1",
        pretrained,
        **dict(depths=(2, 2, 2, 2), overlapping=True, norm_layer=_PVT_NORM) | kwargs,
    )


@register_model
def slab_pvt_v2_b2(pretrained: bool = False, **kwargs: Any) -> SlabPvt:
    """SLAB-PVTv2-B2, which the authors defined and never trained: 22.56 M parameters, 4.248 G multiply-adds at 224 px.

    Trained with drop_path_rate=0.1.
    """
    return _pyramid(
        SlabPvt,
        "slab_pvt_v2_b2",
        pretrained,
        **dict(depths=(3, 4, 6, 3), overlapping=True, norm_layer=_PVT_NORM) | kwargs,
    )


@register_model
def slab_pvt_v2_b3(pretrained: bool = False, **kwargs: Any) -> SlabPvt:
    """SLAB-PVTv2-B3, which the authors defined and never trained: 38.30 M parameters, 7.282 G multiply-adds at 224 px.

    Trained with drop_path_rate=0.1.
    """
    return _pyramid(
        SlabPvt,
        "slab_pvt_v2_b3",
        pretrained,
        **dict(depths=(3, 4, 18, 3), overlapping=True, norm_layer=_PVT_NORM) | kwargs,
    )


@register_model
def slab_pvt_v2_b4(pretrained: bool = False, **kwargs: Any) -> SlabPvt:
    """SLAB-PVTv2-B4, which the authors defined and never trained: 51.88 M parameters, 10.675 G multiply-adds at 224 px.

    Trained with drop_path_rate=0.1.
    """
    return _pyramid(
        SlabPvt,
        "slab_pvt_v2_b4",
        pretrained,
        **dict(depths=(3, 8, 27, 3), overlapping=True, norm_layer=_PVT_NORM) | kwargs,
    )


@register_model
def slab_pvt_v2_b5(pretrained: bool = False, **kwargs: Any) -> SlabPvt:
    """SLAB-PVTv2-B5, which the authors defined and never trained: 67.11 M parameters, 12.433 G multiply-adds at 224 px.

    Trained with drop_path_rate=0.1.
    """
    return _pyramid(
        SlabPvt,
        "slab_pvt_v2_b5",
        pretrained,
        **dict(depths=(3, 6, 40, 3), mlp_ratios=(4, 4, 4, 4), overlapping=True, norm_layer=_PVT_NORM) | kwargs,
    )


@register_model
def swin_t_prepbn(pretrained: bool = False, **kwargs: Any) -> SlabSwin:
    """Swin-T with RepBN: 28.29 M parameters, 4.491 G multiply-adds at 224 px.

    81.4 % top-1 claimed, trained with drop_path_rate=0.1.
    """
    return _pyramid(SlabSwin, "swin_t_prepbn", pretrained, **dict(attn_type="SSSS", norm_layer=RepBN) | kwargs)


@register_model
def slab_swin_t(pretrained: bool = False, **kwargs: Any) -> SlabSwin:
    """SLAB-Swin-T: 29.22 M parameters, 4.483 G multiply-adds at 224 px.

    81.8 % top-1 claimed, trained with drop_path_rate=0.2.
    """
    return _pyramid(SlabSwin, "slab_swin_t", pretrained, **dict(norm_layer=_SWIN_NORM) | kwargs)


@register_model
def slab_swin_s(pretrained: bool = False, **kwargs: Any) -> SlabSwin:
    """SLAB-Swin-S: 50.55 M parameters, 8.734 G multiply-adds at 224 px.

    83.6 % top-1 claimed, trained with drop_path_rate=0.3.
    """
    return _pyramid(SlabSwin, "slab_swin_s", pretrained, **dict(depths=(2, 2, 18, 2), norm_layer=_SWIN_NORM) | kwargs)


@register_model
def slab_swin_b(pretrained: bool = False, **kwargs: Any) -> SlabSwin:
    """SLAB-Swin-B: 89.03 M parameters, 15.421 G multiply-adds at 224 px; trained with drop_path_rate=0.5."""
    return _pyramid(
        SlabSwin,
        "slab_swin_b",
        pretrained,
        **dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), norm_layer=_SWIN_NORM) | kwargs,
    )


@register_model
def slab_cswin_t(pretrained: bool = False, **kwargs: Any) -> SlabCswin:
    """SLAB-CSwin-T: 21.23 M parameters, 4.324 G multiply-adds at 224 px.

    82.8 % top-1 claimed, trained with drop_path_rate=0.1.
    """
    return _pyramid(SlabCswin, "slab_cswin_t", pretrained, **dict(norm_layer=_CSWIN_NORM) | kwargs)


@register_model
def slab_cswin_s(pretrained: bool = False, **kwargs: Any) -> SlabCswin:
    """SLAB-CSwin-S: 35.49 M parameters, 6.783 G multiply-adds at 224 px; trained with drop_path_rate=0.3."""
    return _pyramid(
        SlabCswin, "slab_cswin_s", pretrained, **dict(depths=(2, 4, 32, 2), norm_layer=_CSWIN_NORM) | kwargs
    )


_DENSE = {
    "swin_t_prepbn": dict(attn_type="SSSS"),
    "swin_s_prepbn": dict(depths=(2, 2, 18, 2), attn_type="SSSS"),
    "slab_swin_t": {},
    "slab_swin_s": dict(depths=(2, 2, 18, 2)),
}


def slab_swin_dense(variant: str = "slab_swin_t", **kwargs: Any) -> SlabSwinDense:
    """The authors' detection backbone, with PRepBN; `kwargs` are those of `SlabSwinDense`.

    The authors train with drop_path_rate 0.1 (T) and 0.2 (S; T with the 3x schedule).

    Raises:
        ValueError: no backbone of this name.
    """
    if variant not in _DENSE:
        raise ValueError(f"variant={variant!r}: the dense backbones are {', '.join(_DENSE)}")
    return SlabSwinDense(**dict(norm_layer=_DENSE_NORM) | _DENSE[variant] | kwargs)
