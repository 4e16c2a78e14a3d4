"""Exported files in ONNX Runtime and PyTorch, at sizes and batches that were not traced."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F

import zoo
from tests.bench.export import MODELS, build
from zoo import exporting, ninformer_blocks
from zoo.export_report import ExportError, SizeRule
from zoo.exportable import exportable
from zoo.exporting import find_size_rule
from zoo.onnx_model import OnnxClassifier, OnnxModel, open_session
from zoo.preprocess import eval_transform_for

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

# one of each family, and what its file says about images; the others are in tests/bench/export.py
RULES = {
    "crate_tiny": "multiple",
    "mae_crate_tiny": "multiple",
    "ninformer_patch4_32": "resized",
    "fourier_ninformer_patch4_32": "multiple",
    "activator_geglu_patch4_32": "multiple",
    "stdc1": "any",
}
_SLOW = ("poolformerv1_s12", "fcaformer_l1", "slab_swin_t", "ascan_tiny", "spartan_xtiny", "vim2_tiny")


def _classes(name):
    return {"num_classes": 7} if name != "stdc1" else {}


def _run(path, images):
    return torch.from_numpy(open_session(path).run(None, {"images": images.numpy()})[0])


def _agrees(name, rule, tmp_path):
    model = build(name, True, **_classes(name))
    small = None if hasattr(model, "set_input_size") else 64  # the nominal size, where nothing is built for one
    report = zoo.export_onnx(model, tmp_path / "model.onnx", check=False, img_size=small)
    assert report.rule.kind == rule
    side, p = report.rule.size[0], report.rule.multiple
    # the built size, one that suits every model's patches, and an odd one
    for batch, height, width in ((1, side, side), (2, side - 4 * p, side + 8 * p), (5, side + 3, side // 2 + 1)):
        images = torch.randn(batch, 3, height, width)
        size = (side, side) if rule == "resized" else (-(-height // p) * p, -(-width // p) * p)
        direct = F.interpolate(images, size=size, mode="bilinear", antialias=rule == "resized")
        own = copy.deepcopy(model)
        if "crate" in name:  # a model of one size, whose table is resampled here once and in the graph in each call
            own.set_input_size(img_size=size)
        with torch.no_grad():
            expected = zoo.fold(own)(direct)
        error = (_run(report.path, images) - expected).abs().max() / expected.std()
        assert error < 1e-4, (name, tuple(images.shape), float(error))


@pytest.mark.parametrize("name", RULES)
def test_onnx_runtime_gives_what_the_model_gives_at_other_sizes(name, tmp_path):
    _agrees(name, RULES[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", _SLOW)
def test_onnx_runtime_gives_what_the_model_gives_at_other_sizes_slow(name, tmp_path):
    _agrees(name, "any", tmp_path)


@pytest.mark.parametrize("name", ["swin_t_prepbn", "slab_swin_t", "slab_cswin_t", "vim2_tiny", "vanilla_vmamba_tiny"])
def test_exportable_forms_equal_the_models_own(name):
    model = zoo.fold(build(name, True, num_classes=5)).double()
    for size in ((64, 96), (75, 33)):
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            expected = model(images)
            with exportable(onnx=True):
                given = model(images)
        torch.testing.assert_close(given, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(2, 64, 16), (1, 99, 7)])
def test_the_exportable_fourier_gate_equals_the_models_own(shape):
    x = torch.randn(shape, dtype=torch.float64)
    expected = ninformer_blocks.fourier_real(x)
    with exportable(onnx=True):
        torch.testing.assert_close(ninformer_blocks.fourier_real(x), expected, rtol=1e-9, atol=1e-9)


def test_the_offset_table_of_crate_mae_is_resampled_alike():
    model = build("mae_crate_tiny", True, num_classes=5, dynamic_img_size=True).double()
    for size in ((224, 224), (160, 96), (320, 224)):
        images = torch.randn(1, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            expected = model(images)
            with exportable(onnx=False):
                torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return timm.create_model("stdc1", num_classes=3).eval()


@pytest.fixture(scope="module")
def crate():
    torch.manual_seed(0)
    model = timm.create_model("crate_tiny", num_classes=3, img_size=32, patch_size=8, **MODELS["crate_tiny"]).eval()
    model.class_names = ["dress", "hat", "pants"]
    return model


@pytest.fixture(scope="module")
def exported(crate, tmp_path_factory):
    return zoo.export_onnx(crate, tmp_path_factory.mktemp("exported") / "model.onnx", source="photos")


def test_the_check_reports_and_the_file_describes_itself(exported):
    report = exported
    assert report.difference < 1e-4
    assert report.agreement == 1
    assert {size[0] for size in report.checked} == {1, 2, 3}
    assert (32, 32) in {size[1:] for size in report.checked}
    assert len({size[1:] for size in report.checked}) >= 3
    model = OnnxModel(report.path)
    assert model.class_names == ["dress", "hat", "pants"]
    assert model.metadata["preprocessing"]["input_size"] == [3, 32, 32]
    assert model.metadata["size_rule"]["kind"] == "multiple"
    assert model.metadata["source"] == "photos"
    assert model.metadata["difference"] == report.difference
    assert model.metadata["undecided"] == report.undecided == 0
    assert json.dumps(model.metadata)
    assert "resized" not in str(report)


def test_a_file_stands_in_for_a_classifier(crate, exported):
    classifier = OnnxClassifier(OnnxModel(exported.path))
    images = torch.randn(3, 3, 40, 32)
    assert (classifier.num_classes, classifier.in_chans, classifier.class_names) == (3, 3, ["dress", "hat", "pants"])
    assert torch.equal(classifier(images), _run(exported.path, images))
    assert str(eval_transform_for(classifier)) == str(eval_transform_for(crate))
    with pytest.raises(ValueError, match="is a model of detection: only classifiers are evaluated"):
        OnnxClassifier(SimpleNamespace(task="detection", path="boxes.onnx"))


def test_a_picture_gets_the_scores_of_the_model(crate, exported):
    picture = torch.rand(3, 50, 70)
    expected, (given, again) = zoo.predict(crate, picture), OnnxModel(exported.path).predict([picture, picture], topk=3)
    assert given.names == expected.names == again.names
    assert given.scores == pytest.approx(expected.scores, abs=1e-5)


def test_fixed_batch_and_size(crate, tmp_path):
    report = zoo.export_onnx(crate, tmp_path / "model.onnx", batch_size=2, dynamic_size=False)
    assert {tuple(size) for size in report.checked} == {(2, 32, 32)}
    assert str(report.rule) == "32x32 only"
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = crate(images)
    torch.testing.assert_close(OnnxModel(report.path).logits(images), expected, rtol=1e-4, atol=1e-4)


def test_an_image_size_of_ones_own(tmp_path):
    model = build("ninformer_patch4_32", True, num_classes=3)
    report = zoo.export_onnx(model, tmp_path / "model.onnx", img_size=(24, 40))
    assert report.rule == SizeRule("resized", (24, 40))
    assert model.patch_embed.img_size == (32, 32)  # a copy was changed
    with pytest.raises(ValueError, match="does not take images of 7x7 px"):
        zoo.export_onnx(build("activator_geglu_patch4_32", True), tmp_path / "x.onnx", img_size=7)


def test_a_failed_check_leaves_no_file(crate, tmp_path):
    with pytest.raises(ExportError, match="more than the tolerance of 1e-12"):
        zoo.export_onnx(crate, tmp_path / "model.onnx", tolerance=1e-12, dynamic_size=False)
    with pytest.raises(ExportError, match="more than the tolerance of"):
        zoo.export_program(crate, tmp_path / "model.pt2", tolerance=-1.0)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_traced_for_any_size_is_stretched_to_one(crate, tmp_path, monkeypatch):
    own = exporting._build

    def build_for_one_size(network, rule, *others):
        if rule.kind != "resized":
            raise ExportError("no symbols today")
        return own(network, rule, *others)

    monkeypatch.setattr(exporting, "_build", build_for_one_size)
    report = zoo.export_onnx(crate, tmp_path / "model.onnx")
    assert report.rule == SizeRule("resized", (32, 32))
    assert "since no symbols today" in str(report)
    assert OnnxModel(report.path).logits(torch.randn(2, 3, 50, 41)).shape == (2, 3)


def test_half_and_eight_bits(crate, exported, tmp_path):
    sizes = {"float32": exported.bytes}
    for precision in ("fp16", "int8"):
        report = zoo.export_onnx(crate, tmp_path / f"{precision}.onnx", precision=precision)
        sizes[precision] = report.bytes
        assert report.difference < {"fp16": 0.05, "int8": 0.5}[precision]
        assert OnnxModel(report.path).metadata["precision"] == precision
    assert sizes["fp16"] < sizes["float32"]


def test_a_program_runs_at_other_sizes(small, tmp_path):
    report = zoo.export_program(small, tmp_path / "model.pt2", check=False)
    extra = {"zoo.json": ""}
    program = torch.export.load(report.path, extra_files=extra).module()
    assert json.loads(extra["zoo.json"])["size_rule"]["kind"] == report.rule.kind == "any"
    for batch, height, width in ((1, 224, 224), (3, 150, 97)):
        images = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            torch.testing.assert_close(program(images), small(images), rtol=1e-4, atol=1e-4)


def test_size_rules_are_found_by_trying():
    class Fixed(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, : 3 * 32 * 32].reshape(-1, 3, 32, 32) if x.shape[2:] == (32, 32) else 1 / 0

    assert find_size_rule(Fixed(), 3, (32, 32)) == SizeRule("resized", (32, 32))
    assert find_size_rule(torch.nn.PixelUnshuffle(8), 3, (32, 32)) == SizeRule("multiple", (32, 32), 8)
    assert find_size_rule(torch.nn.AdaptiveAvgPool2d(1), 3, (32, 32)) == SizeRule("any", (32, 32))


def test_errors_are_one_sentence(crate, tmp_path):
    with pytest.raises(ValueError, match="no classifier: build it with num_classes"):
        zoo.export_onnx(timm.create_model("stdc1", num_classes=0), tmp_path / "x.onnx")
    with pytest.raises(ValueError, match="make it first"):
        zoo.export_program(crate, tmp_path / "none" / "x.pt2")
    with pytest.raises(ValueError, match="pass 18 or newer"):
        zoo.export_onnx(crate, tmp_path / "x.onnx", opset=11)
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    with pytest.raises(ValueError, match="is not an ONNX file"):
        OnnxModel(tmp_path / "bad.onnx")
    import onnx

    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> f (float[N] x) => (float[N] y) {y = Abs(x)}'
    )
    onnx.save(proto, str(tmp_path / "foreign.onnx"))
    with pytest.raises(ValueError, match="write it with zoo export"):
        OnnxModel(tmp_path / "foreign.onnx")
