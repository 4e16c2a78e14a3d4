"""The official checkpoint layouts of CRATE, its demonstration models, CRATE-alpha, CLIPA and CRATE-MAE."""

from __future__ import annotations

import math
import re

import torch
from torch import nn

from zoo.checkpoint import CheckpointError, Conversion, StateDict
from zoo.crate_blocks import absorb_affine, resample_pos_embed

LAYOUTS = {
    "CRATE": ("to_patch_embedding.1.weight", "transformer.layers.0.1.fn.weight"),
    "CRATE-alpha": ("conv1.weight", "transformer.layers.0.1.fn.D1"),
    "CRATE-alpha CLIPA": ("visual.class_embedding", "visual.transformer.resblocks.0.attn.in_proj_weight"),
    "CRATE-MAE": ("decoder_pos_embed", "blocks.0.layers.0.1.fn.weight"),
}

_LAYER_NAMES = {  # behind "transformer.layers.<i>." or CRATE-MAE's "blocks.<i>.layers.0."
    "0.norm.": "norm1.",
    "0.fn.qkv.": "attn.qkv.",
    "0.fn.to_out.0.": "attn.proj.",
    "1.norm.": "norm2.",
    "1.fn.weight": "ista.weight",
    "1.fn.D": "odl.dictionary",
    "1.fn.D1": "odl.decoder",
}
_DECODER_LAYER_NAMES = {
    "0.norm.": "norm1.",
    "0.fn.weight": "linear.weight",
    "1.norm.": "norm2.",
    "1.fn.qkv.": "attn.qkv.",
    "1.fn.to_out.0.": "attn.proj.",
}
_OTHER_NAMES = {
    "pos_embedding": "pos_embed",
    "to_patch_embedding.1.": "patch_embed.norm_in.",
    "to_patch_embedding.2.": "patch_embed.proj.",
    "to_patch_embedding.3.": "patch_embed.norm.",
    "conv1.": "patch_embed.proj.",
    "mlp_head.0.": "fc_norm.",
    "mlp_head.1.": "head.",
}
_LAYER = re.compile(r"(?:transformer\.layers\.(\d+)|blocks\.(\d+)\.layers\.0)\.(.*)")


def rename_layer(name: str, decoder: bool = False) -> str:
    """An official name of a layer of CRATE, CRATE-alpha or CRATE-MAE in zoo's terms; others stay."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return name
    rest = _replace_start(match[3], _DECODER_LAYER_NAMES if decoder else _LAYER_NAMES)
    return f"blocks.{match[1] or match[2]}.{rest}"


def _replace_start(name: str, names: dict[str, str]) -> str:
    for official, ours in names.items():
        if name == official or (official.endswith(".") and name.startswith(official)):
            return ours + name[len(official) :]
    return name


def convert_checkpoint(state_dict: StateDict, model: nn.Module) -> Conversion:
    """Official entries under zoo's names, the position table on the model's grid.

    Of a CRATE-MAE file the encoder is used. The demonstration file ends with two linear maps, which are
    merged into one. The visual tower of a CLIPA file gives a model whose "classes" are the dimensions of the
    joint space.
    """
    notes: list[str] = []
    state, layout = dict(state_dict), "zoo"
    if "visual.class_embedding" in state:
        state, layout = _from_clipa(state, model.num_classes), "CRATE-alpha CLIPA"
        notes.append("the text tower was left out; the official ln_post has epsilon 1e-6: pass head_norm_eps=1e-6")
    elif "decoder_pos_embed" in state:
        layout = "CRATE-MAE"
        kept = {n: v for n, v in state.items() if n.startswith(("cls_token", "patch_embed.", "blocks.", "norm."))}
        notes.append(f"the encoder was used, {len(state) - len(kept)} other entries were left out")
        notes.append("lambda is no part of the file: build the model with the lambd it was trained with (0.5 or 5)")
        state = kept | {"pos_embed": state["decoder_pos_embed"]}
    elif any(name.startswith("encoder.blocks.") for name in state):  # zoo's own CRATE-MAE
        kept = {n.removeprefix("encoder."): v for n, v in state.items() if n.startswith("encoder.")}
        notes.append(f"the encoder was used, {len(state) - len(kept)} other entries were left out")
        state = kept
    elif "pos_embedding" in state:
        layout = "CRATE-alpha" if "conv1.weight" in state else "CRATE"
        if "head.weight" in state:
            state = _merge_demo_head(state)
            notes.append("the file's two last linear maps were merged into one classifier")
    state = {rename_layer(_replace_start(name, _OTHER_NAMES)): value for name, value in state.items()}
    _channels_first(state, model)
    _fit_position(state, model, notes)
    return Conversion(state, layout, tuple(notes))


def _channels_first(state: StateDict, model: nn.Module) -> None:
    """The tokeniser's pixels from (row, column, channel) to (channel, row, column), in place.

    For another number of channels the norm's scales move into the kernel, which is what timm then adapts.
    """
    weight = state.get("patch_embed.proj.weight")
    if "patch_embed.norm_in.weight" not in state or weight is None:
        return
    area = math.prod(model.patch_embed.patch_size)
    if weight.ndim == 2 and weight.shape[1] % area == 0:
        shape = (*model.patch_embed.patch_size, weight.shape[1] // area)
        state["patch_embed.proj.weight"] = weight.reshape(-1, *shape).permute(0, 3, 1, 2)
        for leaf in ("weight", "bias"):
            name = f"patch_embed.norm_in.{leaf}"
            state[name] = state[name].reshape(shape).permute(2, 0, 1).flatten()
    weight = state["patch_embed.proj.weight"]
    if weight.ndim == 4 and weight.shape[1] != model.in_chans:
        names = [f"patch_embed.{leaf}" for leaf in ("proj.weight", "proj.bias", "norm_in.weight", "norm_in.bias")]
        state[names[0]], state[names[1]] = absorb_affine(*(state[name] for name in names))
        state[names[2]] = weight.new_ones(model.in_chans * area)
        state[names[3]] = weight.new_zeros(model.in_chans * area)


def _fit_position(state: StateDict, model: nn.Module, notes: list[str]) -> None:
    """Resample the position table to the model's grid, in place, if its number of rows is another."""
    table = state.get("pos_embed")
    if table is None or table.ndim != 3 or table.shape[1] == model.pos_embed.shape[1]:
        return
    side = math.isqrt(table.shape[1] - 1)
    if side * side != table.shape[1] - 1:
        return  # not square: reported as of another shape
    grid = model.patch_embed.grid_size
    mode = "offset" if model.pos_mode == "offset" else "resample"
    state["pos_embed"] = resample_pos_embed(table, list(grid), [side, side], mode)
    notes.append(f"the position table was resampled from {side}x{side} to {grid[0]}x{grid[1]} patches")


def _merge_demo_head(state: StateDict) -> StateDict:
    """`mlp_head` = LayerNorm + Linear followed by `head` = Linear, as the former with one Linear."""
    state = dict(state)
    weight, bias = state.pop("head.weight"), state.pop("head.bias")
    first = state.pop("mlp_head.1.weight", None)
    if first is not None:
        bias = bias + weight @ state.pop("mlp_head.1.bias")
        weight = weight @ first
    return state | {"mlp_head.1.weight": weight, "mlp_head.1.bias": bias}


def _from_clipa(state: StateDict, num_classes: int) -> StateDict:
    """The visual tower of a CLIPA file under CRATE-alpha's official names.

    The projection to the joint space becomes the classifier of a model with as many classes.
    """
    tower = {n.removeprefix("visual."): v for n, v in state.items() if n.startswith("visual.")}
    kernel = tower["conv1.weight"]
    out = {
        "cls_token": tower["class_embedding"].reshape(1, 1, -1),
        "pos_embedding": tower["positional_embedding"].unsqueeze(0),
        "conv1.weight": kernel,
        "conv1.bias": tower.get("conv1.bias", kernel.new_zeros(len(kernel))),
        "mlp_head.0.weight": tower["ln_post.weight"],
        "mlp_head.0.bias": tower["ln_post.bias"],
    }
    if tower["proj"].shape[1] == num_classes:
        out["mlp_head.1.weight"] = tower["proj"].t()
        out["mlp_head.1.bias"] = kernel.new_zeros(num_classes)
    for name, value in tower.items():
        match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.*)", name)
        if match is None:
            continue
        layer, rest = f"transformer.layers.{match[1]}.", match[2]
        if rest == "attn.in_proj_weight":
            thirds = value.chunk(3)
            if not (torch.equal(thirds[0], thirds[1]) and torch.equal(thirds[0], thirds[2])):
                raise CheckpointError(
                    f"query, key and value of {name} differ, in CRATE they are one matrix: "
                    "this is a CLIP model of another kind"
                )
            out[layer + "0.fn.qkv.weight"] = thirds[0]
        elif rest in ("mlp.c_fc.weight", "mlp.c_fc", "mlp.c_proj.weight", "mlp.c_proj"):
            wide = value if value.shape[1] > value.shape[0] else value.t()  # (C, 4 C) in CRATE-alpha's files
            out[layer + ("1.fn.D" if "c_fc" in rest else "1.fn.D1")] = wide
        else:
            for clip, official in (
                ("attn.out_proj.", "0.fn.to_out.0."),
                ("ln_1.", "0.norm."),
                ("ln_2.", "1.norm."),
            ):
                rest = official + rest[len(clip) :] if rest.startswith(clip) else rest
            out[layer + rest] = value
    return out
