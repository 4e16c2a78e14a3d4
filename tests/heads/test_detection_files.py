"""Saving and loading detectors: zoo's files, mmdetection's layout, other class counts, classification weights."""

import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import zoo
from zoo.heads.detection import create_detector
from zoo.saving import load_model, save_model

SMALL = dict(min_size=64, max_size=96, out_channels=64)
TINY = dict(size=64, hidden_dim=32, num_heads=4, ffn_dim=32, num_queries=20, num_decoder_layers=1, depth=1)


def _randomised(head, backbone="stdc1", classes=3, **kwargs):
    torch.manual_seed(0)
    model = create_detector(head, backbone, classes, **{**(TINY if head == "rt_detr" else SMALL), **kwargs})
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return model.eval()


def _as_mmdetection(model):
    """A detector's weights as mmdetection names and orders them (its background is the last class)."""
    reverse = (
        (r"backbone\.fpn\.inner_blocks\.(\d)\.0\.", r"neck.lateral_convs.\1.conv."),
        (r"backbone\.fpn\.layer_blocks\.(\d)\.0\.", r"neck.fpn_convs.\1.conv."),
        (r"backbone\.fpn\.extra_blocks\.p6\.", "neck.fpn_convs.3.conv."),
        (r"backbone\.fpn\.extra_blocks\.p7\.", "neck.fpn_convs.4.conv."),
        (r"backbone\.body\.backbone\.", "backbone."),
        (r"head\.classification_head\.conv\.(\d)\.0\.", r"bbox_head.cls_convs.\1.conv."),
        (r"head\.regression_head\.conv\.(\d)\.0\.", r"bbox_head.reg_convs.\1.conv."),
        (r"head\.classification_head\.cls_logits\.", "bbox_head.retina_cls."),
        (r"head\.regression_head\.bbox_reg\.", "bbox_head.retina_reg."),
        (r"rpn\.head\.conv\.0\.0\.", "rpn_head.rpn_conv."),
        (r"rpn\.head\.cls_logits\.", "rpn_head.rpn_cls."),
        (r"rpn\.head\.bbox_pred\.", "rpn_head.rpn_reg."),
        (r"roi_heads\.box_head\.fc6\.", "roi_head.bbox_head.shared_fcs.0."),
        (r"roi_heads\.box_head\.fc7\.", "roi_head.bbox_head.shared_fcs.1."),
        (r"roi_heads\.box_predictor\.cls_score\.", "roi_head.bbox_head.fc_cls."),
        (r"roi_heads\.box_predictor\.bbox_pred\.", "roi_head.bbox_head.fc_reg."),
        (r"roi_heads\.mask_head\.(\d)\.0\.", r"roi_head.mask_head.convs.\1.conv."),
        (r"roi_heads\.mask_predictor\.conv5_mask\.", "roi_head.mask_head.upsample."),
        (r"roi_heads\.mask_predictor\.mask_fcn_logits\.", "roi_head.mask_head.conv_logits."),
    )
    state = {}
    first = model.strides[0] == 8
    for name, value in model.state_dict().items():
        for pattern, by in reverse:
            name = re.sub(f"^{pattern}", by, name)
        norm = re.fullmatch(r"backbone\.body\.norms\.(\d)\.(\w+)", name)
        if norm:
            name = f"backbone.norm{2 * (int(norm[1]) + first)}.{norm[2]}"
        if "fc_cls" in name:
            value = torch.cat([value[1:], value[:1]])
        elif "fc_reg" in name:
            value = value[4:]
        elif "conv_logits" in name:
            value = value[1:]
        state[name] = value
    return {"state_dict": state, "meta": {}}


@pytest.mark.parametrize(("head", "norm"), [("retinanet", "group"), ("faster_rcnn", None), ("mask_rcnn", "group")])
def test_mmdetections_layout_loads_and_finds_the_same(head, norm, tmp_path):
    backbone = "poolformerv1_s12" if head == "retinanet" else "stdc1"
    source = _randomised(head, backbone, norm=norm)
    torch.save(_as_mmdetection(source), tmp_path / "epoch_12.pth")
    model = create_detector(head, backbone, 3, norm=norm, **SMALL).eval()
    report = zoo.load_checkpoint(model, tmp_path / "epoch_12.pth")
    assert report.layout == "mmdetection"
    assert report.complete
    image = torch.rand(3, 64, 90)
    with torch.no_grad():
        a, b = source([image])[0], model([image])[0]
    assert len(a["scores"])
    for key in a:
        torch.testing.assert_close(a[key], b[key])


def test_a_norm_of_a_map_that_is_not_used_is_noted(tmp_path):
    source = _randomised("retinanet", "poolformerv1_s12", norm="group")
    content = _as_mmdetection(source)
    content["state_dict"]["backbone.norm0.weight"] = torch.ones(64)
    model = create_detector("retinanet", "poolformerv1_s12", 3, norm="group", **SMALL)
    report = zoo.load_checkpoint(model, content)
    assert any("norm0.weight" in note for note in report.notes)


@pytest.mark.parametrize("head", ["retinanet", "fcos", "mask_rcnn", "rt_detr"])
def test_a_saved_detector_is_rebuilt_whole(head, tmp_path):
    extra = {} if head == "rt_detr" else dict(min_size=[48, 64])
    model = _randomised(head, **extra, image_mean=(0.1, 0.2, 0.3))
    names = ["cat", "dog", "owl"]
    save_model(model, tmp_path / "best.safetensors", class_names=names, category_ids=[3, 7, 9], task="detection")
    again = load_model(tmp_path / "best.safetensors")
    assert type(again) is type(model)
    assert again.class_names == names
    image = torch.rand(3, 70, 90)
    with torch.no_grad():
        a, b = model([image])[0], again([image])[0]
    for key in a:
        assert torch.equal(a[key], b[key])
    picture = Image.fromarray((np.random.default_rng(0).random((70, 90, 3)) * 255).astype(np.uint8))
    found = again.predict(picture, threshold=0.0)
    assert set(found.category_ids) <= {3, 7, 9}
    assert set(found.names) <= set(names)


def test_another_number_of_classes_keeps_everything_but_the_classifier(tmp_path):
    for head in ("retinanet", "mask_rcnn", "rt_detr"):
        source = _randomised(head, classes=5)
        torch.save(source.state_dict(), tmp_path / "five.pth")
        model = create_detector(head, "stdc1", 3, **(TINY if head == "rt_detr" else SMALL))
        with pytest.raises(zoo.CheckpointError, match="another number of classes than the 3"):
            zoo.load_checkpoint(model, tmp_path / "five.pth")
        report = zoo.load_checkpoint(model, tmp_path / "five.pth", head="fit")
        assert report.complete
        assert any("classifier of the file was left out" in note for note in report.notes)
        own, theirs = model.pyramid.state_dict(), source.pyramid.state_dict()
        assert all(torch.equal(own[name], value) for name, value in theirs.items())


def test_classification_weights_load_into_a_detector(tmp_path):
    classifier = timm.create_model("spartan_xtiny", num_classes=7)
    torch.save(classifier.state_dict(), tmp_path / "trained.pth")
    model = create_detector("rt_detr", "spartan_xtiny", 3, **TINY)
    zoo.load_checkpoint(model.pyramid.backbone, tmp_path / "trained.pth", head="keep")
    own = model.pyramid.backbone.state_dict()
    assert all(torch.equal(value, classifier.state_dict()[name]) for name, value in own.items())
