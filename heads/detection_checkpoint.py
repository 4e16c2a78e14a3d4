"""Detection checkpoints in mmdetection's layout, which the papers' detectors were trained and released in.

RetinaNet, Faster and Mask R-CNN. mmdetection lists the background last and torchvision first; the boxes and masks of
the background, which torchvision has and never reads, are zeros.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from zoo.checkpoint import Conversion, StateDict, checkpoint_converter, find_converter
from zoo.heads.detection import Detector

_NECK = (
    (r"neck\.lateral_convs\.(\d+)\.conv\.", r"backbone.fpn.inner_blocks.\1.0."),
    (r"neck\.fpn_convs\.(\d+)\.conv\.", r"backbone.fpn.layer_blocks.\1.0."),
)
_RETINANET = (
    (r"bbox_head\.cls_convs\.(\d)\.conv\.", r"head.classification_head.conv.\1.0."),
    (r"bbox_head\.reg_convs\.(\d)\.conv\.", r"head.regression_head.conv.\1.0."),
    (r"bbox_head\.retina_cls\.", "head.classification_head.cls_logits."),
    (r"bbox_head\.retina_reg\.", "head.regression_head.bbox_reg."),
)
_RCNN = (
    (r"rpn_head\.rpn_conv\.", "rpn.head.conv.0.0."),
    (r"rpn_head\.rpn_cls\.", "rpn.head.cls_logits."),
    (r"rpn_head\.rpn_reg\.", "rpn.head.bbox_pred."),
    (r"roi_head\.bbox_head\.shared_fcs\.0\.", "roi_heads.box_head.fc6."),
    (r"roi_head\.bbox_head\.shared_fcs\.1\.", "roi_heads.box_head.fc7."),
    (r"roi_head\.bbox_head\.fc_cls\.", "roi_heads.box_predictor.cls_score."),
    (r"roi_head\.bbox_head\.fc_reg\.", "roi_heads.box_predictor.bbox_pred."),
    (r"roi_head\.mask_head\.convs\.(\d)\.conv\.", r"roi_heads.mask_head.\1.0."),
    (r"roi_head\.mask_head\.upsample\.", "roi_heads.mask_predictor.conv5_mask."),
    (r"roi_head\.mask_head\.conv_logits\.", "roi_heads.mask_predictor.mask_fcn_logits."),
)


@checkpoint_converter(
    Detector,
    layouts={
        "mmdetection RetinaNet": ("neck.lateral_convs.*", "bbox_head.retina_cls.weight"),
        "mmdetection Faster or Mask R-CNN": ("neck.lateral_convs.*", "roi_head.bbox_head.fc_cls.weight"),
    },
)
def convert_checkpoint(state_dict: StateDict, model: Detector) -> Conversion:
    """zoo's own files as they are; mmdetection's with names, backgrounds and the backbone's own layout translated."""
    if not any(name.startswith("neck.") for name in state_dict):
        return Conversion(state_dict)
    levels = len(model.strides)
    state: StateDict = {}
    backbone: StateDict = {}
    for name, value in state_dict.items():
        if name.startswith("backbone."):
            backbone[name.removeprefix("backbone.")] = value
            continue
        for pattern, by in (*_NECK, *_RETINANET, *_RCNN):
            if re.match(pattern, name):
                name = re.sub(pattern, by, name)
                break
        coarse = re.match(r"backbone\.fpn\.layer_blocks\.(\d+)\.0\.(\w+)", name)
        if coarse and int(coarse[1]) >= levels:
            name = f"backbone.fpn.extra_blocks.p{6 + int(coarse[1]) - levels}.{coarse[2]}"
        state[name] = _with_background(name, value)
    body, notes = _convert_backbone(backbone, model)
    state |= {f"backbone.body.{name}": value for name, value in body.items()}
    return Conversion(state, "mmdetection", notes)


def _with_background(name: str, value: Tensor) -> Tensor:
    if name.startswith("roi_heads.box_predictor.cls_score."):
        return value.roll(1, 0)
    rows = 4 if name.startswith("roi_heads.box_predictor.bbox_pred.") else 1
    if rows == 4 or name.startswith("roi_heads.mask_predictor.mask_fcn_logits."):
        return torch.cat([value.new_zeros(rows, *value.shape[1:]), value])
    return value


def _convert_backbone(state: StateDict, model: Detector) -> tuple[StateDict, tuple[str, ...]]:
    """The backbone by its family's own translation, and the norms behind its maps."""
    pyramid, notes = model.pyramid, []
    norms = {name: value for name, value in state.items() if re.fullmatch(r"norm\d\.(weight|bias)", name)}
    rest = {name: value for name, value in state.items() if name not in norms}
    converter = find_converter(pyramid.backbone)
    if converter is not None:
        conversion = converter(rest, pyramid.backbone)
        rest, notes = conversion.state_dict, [*conversion.notes]
    pruned = getattr(pyramid.backbone, "pruned_entries", ())
    own = pyramid.backbone.state_dict()
    unused = [name for name in rest if name not in own and name in pruned]
    if unused:
        notes.append(f"{len(unused)} entries of the backbone that no map depends on were left out")
    body = {f"backbone.{name}": value for name, value in rest.items() if name not in unused}
    # PoolFormer numbers its norms 0, 2, 4, 6, all others 0, 1, 2, 3; a detector may not use the finest map
    step = 2 if any(name.startswith(("norm4.", "norm6.")) for name in norms) else 1
    first = {4: 0, 8: 1}[model.strides[0]]
    for name, value in norms.items():
        level = int(name[4]) // step - first
        if level < 0:
            notes.append(f"{name} belongs to a map that this detector does not use")
        else:
            body[f"norms.{level}.{name.partition('.')[2]}"] = value
    return body, tuple(notes)
