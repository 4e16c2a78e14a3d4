"""Official PEM files (detectron2 layout) under zoo's names: whole segmenters, heads, and their parts."""

from __future__ import annotations

import re

import torch
from torch import nn

from zoo.checkpoint import Conversion, StateDict, checkpoint_converter, find_converter
from zoo.heads.pem.model import Pem, PemHead
from zoo.heads.pem.pixel_decoder import PixelDecoder
from zoo.heads.pem.transformer_decoder import PrototypeAttention, TransformerDecoder

_PIXEL_DECODER = (
    (r"^in_projections\.(\d+)\.conv\.", r"projections.\1.conv."),
    (r"^in_projections\.(\d+)\.bn\.", r"projections.\1.norm."),
    (r"^conv_avg\.conv\.", "context.conv."),
    (r"^conv_avg\.bn\.", "context.norm."),
    (r"^csm\.(\d+)\.mlp\.0\.mlp\.0\.", r"gates.\1.reduce."),
    (r"^csm\.(\d+)\.mlp\.0\.mlp\.1\.", r"gates.\1.norm."),
    (r"^csm\.(\d+)\.mlp\.0\.mlp\.3\.", r"gates.\1.expand."),
    (r"^dcn\.(\d+)\.dcn_offset\.", r"levels.\1.offset."),
    (r"^dcn\.(\d+)\.dcn_bn\.", r"levels.\1.norm."),
    (r"^dcn\.(\d+)\.dcn\.", r"levels.\1.conv."),
    (r"^dcn\.(\d+)\.up_sample\.", r"levels.\1.up."),
    (r"^dcn\.(\d+)\.up_bn\.", r"levels.\1.up_norm."),
    (r"^out\.bn\.", "out.norm."),
)
_CROSS_ATTENTION = (
    (r"^feature_proj\.bn\.", "keys.norm."),
    (r"^feature_proj\.to_query_3x3\.", "keys.conv."),
    (r"^feature_proj\.out\.", "keys.linear."),
    (r"^query_proj\.0\.", "query_norm."),
    (r"^query_proj\.1\.", "query."),
)
_TRANSFORMER_DECODER = (
    (r"^transformer_self_attention_layers\.(\d+)\.self_attn\.in_proj_", r"layers.\1.self_attn.qkv."),
    (r"^transformer_self_attention_layers\.(\d+)\.self_attn\.out_proj\.", r"layers.\1.self_attn.proj."),
    (r"^transformer_self_attention_layers\.(\d+)\.norm\.", r"layers.\1.self_attn.norm."),
    (r"^transformer_ffn_layers\.(\d+)\.linear(\d)\.", r"layers.\1.mlp.fc\2."),
    (r"^transformer_ffn_layers\.(\d+)\.norm\.", r"layers.\1.mlp.norm."),
    (r"^decoder_norm\.", "norm."),
    (r"^(?:query_feat|static_query)\.weight$", "query_feat"),
    (r"^query_embed\.weight$", "query_pos"),
    (r"^level_embed\.weight$", "level_embed"),
    (r"^input_proj\.(\d+)\.", r"projections.\1."),
    (r"^class_embed\.", "class_head."),
    (r"^mask_embed\.layers\.(\d+)\.", lambda m: f"mask_head.{2 * int(m[1])}."),
)
_CROSS_PREFIX = r"^transformer_cross_attention_layers\.(\d+)\.(.*)$"
# detectron2's ResNet under timm's names
_RESNET = (
    (r"^stem\.conv1\.norm\.", "bn1."),
    (r"^stem\.conv1\.", "conv1."),
    (r"^res(\d)\.(\d+)\.shortcut\.norm\.", lambda m: f"layer{int(m[1]) - 1}.{m[2]}.downsample.1."),
    (r"^res(\d)\.(\d+)\.shortcut\.", lambda m: f"layer{int(m[1]) - 1}.{m[2]}.downsample.0."),
    (r"^res(\d)\.(\d+)\.conv(\d)\.norm\.", lambda m: f"layer{int(m[1]) - 1}.{m[2]}.bn{m[3]}."),
    (r"^res(\d)\.(\d+)\.conv(\d)\.", lambda m: f"layer{int(m[1]) - 1}.{m[2]}.conv{m[3]}."),
)


def _rename(name: str, rules: tuple) -> str:
    return next((re.sub(old, new, name) for old, new in rules if re.search(old, name)), name)


def rename_cross_attention(name: str) -> str:
    """zoo's name of an official entry of one cross-attention."""
    return _rename(name, _CROSS_ATTENTION)


def rename_pixel_decoder(name: str) -> str:
    """zoo's name of an official entry of the pixel decoder."""
    return _rename(name, _PIXEL_DECODER)


def rename_transformer_decoder(name: str) -> str:
    """zoo's name of an official entry of the transformer decoder ("predictor")."""
    cross = re.match(_CROSS_PREFIX, name)
    if cross:
        return f"layers.{cross[1]}.cross_attn.{rename_cross_attention(cross[2])}"
    return _rename(name, _TRANSFORMER_DECODER)


def rename_head(name: str) -> str:
    """zoo's name of an official entry of the head (`sem_seg_head`)."""
    part, _, rest = name.partition(".")
    if part == "pixel_decoder":
        return f"pixel_decoder.{rename_pixel_decoder(rest)}"
    return f"decoder.{rename_transformer_decoder(rest)}" if part == "predictor" else name


def rename_resnet(name: str) -> str:
    """timm's name of an entry of detectron2's ResNet."""
    return _rename(name, _RESNET)


def _convert_part(state_dict: StateDict, model: nn.Module, rename, layout: str) -> Conversion:
    own = model.state_dict()
    if not any(name not in own and rename(name) in own for name in state_dict):
        return Conversion(_with_counters(state_dict, own))
    state = {rename(name): value for name, value in state_dict.items()}
    for name in state:  # the authors' alpha is (1, 1, C)
        if name.endswith("alpha"):
            state[name] = state[name].reshape(-1)
    return Conversion(_with_counters(state, own), layout)


def _with_counters(state: StateDict, own: StateDict) -> StateDict:
    """Batch norms' counters, which frozen norms lack and which nothing depends on, as the model has them."""
    counter = ".num_batches_tracked"
    state = {name: value for name, value in state.items() if name in own or not name.endswith(counter)}
    for name in own:
        if name.endswith(counter) and name not in state:
            state[name] = torch.zeros_like(own[name])
    return state


@checkpoint_converter(PrototypeAttention, layouts={})
def convert_cross_attention(state_dict: StateDict, model: PrototypeAttention) -> Conversion:
    """One cross-attention of the official code."""
    return _convert_part(state_dict, model, rename_cross_attention, "PEM cross-attention")


@checkpoint_converter(PixelDecoder, layouts={})
def convert_pixel_decoder(state_dict: StateDict, model: PixelDecoder) -> Conversion:
    """The official pixel decoder alone."""
    return _convert_part(state_dict, model, rename_pixel_decoder, "PEM pixel decoder")


@checkpoint_converter(TransformerDecoder, layouts={})
def convert_transformer_decoder(state_dict: StateDict, model: TransformerDecoder) -> Conversion:
    """The official transformer decoder alone."""
    return _convert_part(state_dict, model, rename_transformer_decoder, "PEM transformer decoder")


@checkpoint_converter(PemHead, layouts={})
def convert_head(state_dict: StateDict, model: PemHead) -> Conversion:
    """The official head (`sem_seg_head`) alone."""
    return _convert_part(state_dict, model, rename_head, "PEM head")


@checkpoint_converter(
    Pem, layouts={"PEM": ("sem_seg_head.pixel_decoder.csm.*", "sem_seg_head.predictor.transformer_cross_attention_*")}
)
def convert_checkpoint(state_dict: StateDict, model: Pem) -> Conversion:
    """A whole official segmenter: `backbone.*`, `sem_seg_head.*` and the criterion's class weights."""
    own = model.state_dict()
    if not any(name.startswith("sem_seg_head.") for name in state_dict):
        return Conversion(_with_counters(state_dict, own))
    parts: dict[str, StateDict] = {"backbone": {}, "sem_seg_head": {}}
    rest: StateDict = {}
    for name, value in state_dict.items():
        part, _, entry = name.partition(".")
        if part in parts:
            parts[part][entry] = value
        else:
            rest[name] = value
    rest.pop("criterion.empty_weight", None)  # a constant that the criterion makes itself
    backbone, notes = _convert_backbone(parts["backbone"], model.backbone.backbone)
    head = convert_head(parts["sem_seg_head"], model.head).state_dict
    state = rest | {f"backbone.backbone.{name}": value for name, value in backbone.items()}
    state |= {f"head.{name}": value for name, value in head.items()}
    return Conversion(_with_counters(state, own), "PEM", notes)


def _convert_backbone(state: StateDict, backbone: nn.Module) -> tuple[StateDict, tuple[str, ...]]:
    if any(re.match(r"(stem\.conv1|res2\.)", name) for name in state):
        return {rename_resnet(name): value for name, value in state.items()}, ()
    converter = find_converter(backbone)
    if converter is None:
        return state, ()
    conversion = converter(state, backbone)
    return conversion.state_dict, conversion.notes
