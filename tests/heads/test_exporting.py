"""Detectors, segmenters and upscalers through `zoo export` and `zoo predict`, at sizes that were not traced."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
from tests.heads.test_craft import lively
from tests.heads.test_detection_export import _detector
from tests.heads.test_pem import tiny_segmenter
from zoo.export_report import ExportError
from zoo.heads import exporting
from zoo.heads.craft import Craft
from zoo.heads.exporting import export_head, size_rule
from zoo.heads.onnx_model import OnnxDetector, OnnxSegmenter, OnnxUpscaler, open_model
from zoo.onnx_model import OnnxModel
from zoo.saving import save_model
from zoo.tools.main import main

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def _picture(width=90, height=70, seed=0):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def _segmenter(task):
    torch.manual_seed(0)
    model = tiny_segmenter(task=task, thing_classes=(0, 2), depth=2).eval()
    with torch.no_grad():  # classes and masks that differ, so that something is found
        for name, p in model.head.decoder.named_parameters():
            if "class" in name and p.ndim == 2:
                p.mul_(30)
    model.class_names = ["road", "car", "sky", "tree", "wall"]
    model.zoo_metadata = {
        "task": "segmentation",
        "test_size": [64, 128],
        "thresholds": {"object_threshold": 0.3, "overlap_threshold": 0.1},
    }
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def masks(folder):
    """A panoptic segmenter's file, whose graph is also an instance segmenter's."""
    model = _segmenter("panoptic")
    export_head(model, folder / "masks.onnx", source="streets")
    return model, folder / "masks.onnx"


@pytest.mark.slow
def test_panoptic_segments_are_the_models(masks):
    model, path = masks
    file = open_model(path)
    assert isinstance(file, OnnxSegmenter)
    assert (file.metadata["kind"], file.metadata["source"]) == ("panoptic", "streets")
    assert file.metadata["thing_classes"] == [0, 2]
    assert file.metadata["size_rule"]["text"] == "any size"
    assert file.metadata["preprocessing"]["size"] == 64
    assert file.metadata["difference"] < 1e-3
    for picture in (_picture(), _picture(61, 150, seed=1)):
        options = dict(object_threshold=0.3, overlap_threshold=0.1)
        expected, given = model.predict(picture, size=64, max_size=128, **options), file.predict(picture, **options)
        assert given.labels == expected.labels
        assert given.names == expected.names
        assert given.map.shape == (picture.height, picture.width)
        assert (given.map != expected.map).mean() < 1e-3
        assert given.scores == pytest.approx(expected.scores, abs=1e-4)
    assert expected.labels


@pytest.mark.slow
def test_instances_are_made_of_the_same_outputs(masks, folder, monkeypatch):
    """The graph of "instance" is that of "panoptic", only what the file says about it differs."""
    model, path = masks
    file = open_model(path)
    file.metadata = file.metadata | {"kind": "instance"}
    expected = model.predict(_picture(), task="instance", size=64, max_size=128, score_threshold=0.2)
    given = file.predict(_picture(), score_threshold=0.2)
    assert given.labels == expected.labels != ()
    assert set(given.labels) <= {0, 2}
    assert given.scores == pytest.approx(expected.scores, abs=1e-4)
    for index in range(len(given.labels)):
        assert (given.mask(index) != expected.mask(index)).mean() < 1e-3
    written = {}
    monkeypatch.setattr(torch.onnx, "export", lambda network, *a, **k: written.update(network=network) or _Nothing())
    described, _ = exporting._write_segmenter(_segmenter("instance"), folder / "none.onnx", 20, check=False)
    assert described["kind"] == "instance"
    assert isinstance(written["network"], exporting.MaskNetwork)


class _Nothing:
    def save(self, *args, **kwargs):
        pass


@pytest.mark.slow
def test_semantic_classes_are_the_models(folder):
    model = _segmenter("semantic")
    line = export_head(model, folder / "semantic.onnx")
    assert "segmentation, any size" in line
    file = open_model(folder / "semantic.onnx")
    for picture in (_picture(), _picture(61, 150, seed=1)):
        expected, given = model.predict(picture, size=64, max_size=128), file.predict(picture)
        assert (given.map != expected.map).mean() < 1e-3
        assert given.names == expected.names


@pytest.mark.slow
@pytest.mark.parametrize("head", ["fcos", "retinanet", "rt_detr"])
def test_boxes_are_the_detectors(head, folder):
    model = _detector(head)
    model.category_ids = [1, 3, 5, 7]
    model.class_names = ["a", "b", "c", "d"]
    path = folder / f"{head}.onnx"
    line = export_head(model, path)
    file = open_model(path)
    assert isinstance(file, OnnxDetector)
    assert file.metadata["head"] == head
    assert file.metadata["category_ids"] == [1, 3, 5, 7]
    rule = file.metadata["size_rule"]
    assert rule["text"] in line
    least = {"rt_detr": (160, 32, None)}.get(head, (129, 1, 1))
    assert (rule["least"], rule["multiple"], rule["batch"]) == least
    picture = _picture(448, 320)  # resized to 224x160, which needs no padding
    expected, given = model.predict(picture, threshold=0.06), file.predict(picture, threshold=0.06)
    assert len(expected.labels) > 5
    assert given.size == expected.size
    assert abs(len(given.labels) - len(expected.labels)) <= 1
    count = min(len(given.labels), len(expected.labels))
    np.testing.assert_allclose(given.scores[:count], expected.scores[:count], atol=1e-3)
    scores = np.array(expected.scores)
    gaps = np.abs(np.diff(scores, prepend=2, append=-1))
    for i in np.flatnonzero(np.minimum(gaps[:-1], gaps[1:]) > 2e-3)[: count - 1]:
        assert given.labels[i] == expected.labels[i]
        assert given.category_ids[i] == expected.category_ids[i]
        np.testing.assert_allclose(given.boxes[i], expected.boxes[i], atol=0.5)
    if head == "rt_detr":
        file.metadata["preprocessing"]["size"] = [128, 150]
        with pytest.raises(ValueError, match="at 128x150 px, and it takes sides from 160 px to 4096 px that are mult"):
            file.predict(picture)
    else:
        file.metadata["preprocessing"]["size"] = 64
        with pytest.raises(ValueError, match="takes sides from 129 px to 4096 px, 1 image at a time"):
            file.predict(picture)


@pytest.mark.slow
def test_pictures_are_enlarged_as_by_the_model(folder, tmp_path, capsys):
    model = lively(Craft(2, depths=(1,), embed_dim=32, num_heads=2))
    model.zoo_door = ("create_upscaler", {"name": "craft", "scale": 2})
    export_head(model, folder / "craft.onnx")
    file = open_model(folder / "craft.onnx")
    assert isinstance(file, OnnxUpscaler)
    for options in ({}, {"padding": "reflect", "tile": 16}):
        given, expected = (each.predict(_picture(21, 18), **options) for each in (file, model))
        assert given.picture.values.shape == expected.picture.values.shape == (36, 42, 3)
        assert np.abs(given.picture.values.astype(int) - expected.picture.values).max() <= 1
    _picture(21, 18).save(tmp_path / "in.png")
    arguments = ["predict", str(folder / "craft.onnx"), str(tmp_path / "in.png"), str(tmp_path / "out.png")]
    assert main(arguments) == 0
    assert Image.open(tmp_path / "out.png").size == (42, 36)
    assert main(arguments) == 2
    assert main([*arguments, "--force", "--scale", "3"]) == 2
    assert "enlarges by 2, and --scale is 3" in capsys.readouterr().err


@pytest.mark.slow
def test_the_commands_export_and_predict_a_segmenter(masks, tmp_path, capsys):
    _picture().save(tmp_path / "in.png")
    assert main(["predict", str(masks[1]), str(tmp_path / "in.png"), "--out", str(tmp_path / "out")]) == 0
    (record,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert record["task"] == "panoptic"
    assert Image.open(tmp_path / "out" / "in.png").size >= (90, 70)
    with pytest.raises(ValueError, match="use zoo predict"):
        OnnxModel(masks[1]).predict(_picture())


def test_a_detector_that_finds_nothing_is_not_called_checked(tmp_path, monkeypatch):
    model = _detector("retinanet")
    model.score_thresh = 0.9999

    import onnx

    def written(model, path, opset):
        graph = onnx.helper.make_graph([], "nothing", [], [])
        onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), str(path))

    monkeypatch.setattr(exporting, "export_detector", written)
    line = export_head(model, tmp_path / "d.onnx")
    assert "not checked, since the detector finds nothing in the test image" in line
    (entry,) = onnx.load(str(tmp_path / "d.onnx")).metadata_props
    assert "difference" not in json.loads(entry.value)


def test_what_has_no_export_says_so(tmp_path, monkeypatch, capsys):
    with pytest.raises(TypeError, match="Linear cannot be exported: detectors, PEM and CRAFT can"):
        export_head(torch.nn.Linear(2, 2), tmp_path / "x.onnx")
    monkeypatch.setattr(exporting, "_write", lambda *arguments: ({}, float("nan")))
    with pytest.raises(ExportError, match="was not written"):
        export_head(torch.nn.Linear(2, 2), tmp_path / "x.onnx")
    weights = save_model(zoo.create_upscaler("craft", scale=2, depths=(1,)), tmp_path / "craft.safetensors")
    for arguments, sentence in (
        (["--precision", "int8"], "in float32 alone"),
        (["--img-size", "64"], "--img-size is for classifiers"),
        (["--static-size"], "--static-size is for classifiers"),
    ):
        assert main(["export", str(weights), *arguments, "--out", str(tmp_path / "x.onnx")]) == 2
        assert sentence in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["craft.safetensors"]


def test_rules_say_what_they_take():
    assert size_rule(1, None)["text"] == "any size"
    assert size_rule(2, None)["text"] == "sides from 2 px"
    assert size_rule(160, 4096, 32)["text"] == "sides from 160 px to 4096 px that are multiples of 32"
