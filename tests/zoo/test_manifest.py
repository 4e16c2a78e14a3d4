"""The manifest lists checkpoints of models that exist, and `pretrained=True` says what can be done about each."""

import inspect
import json

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg, is_model, model_entrypoint

import zoo
from zoo.manifest import find_weights, known_weights, local_file_names, read_manifest
from zoo.registry import is_zoo_model

ENTRIES = pytest.mark.parametrize("weights", known_weights(), ids=lambda w: w.name)


@ENTRIES
def test_an_entry_names_a_model_that_exists(weights):
    if weights.door is None:
        assert is_model(weights.model) or weights.model == "spartan_small"
    elif weights.door == "create_upscaler":
        assert weights.options["scale"] == int(weights.model[-1])
    else:
        assert weights.model in zoo.list_heads(weights.task)
        assert is_model(weights.options["backbone"])
    assert find_weights(weights.name) == find_weights(weights.model, weights.tag) == weights


@ENTRIES
def test_an_entry_agrees_with_the_registered_cfg(weights):
    if weights.task != "classification" or not is_model(weights.model):
        return
    cfg = get_pretrained_cfg(weights.name, allow_unregistered=False) if _has_tag(weights) else None
    cfg = cfg or get_pretrained_cfg(weights.model)
    stated = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), **weights.evaluation}
    for name in ("input_size", "crop_pct", "interpolation", "mean", "std"):
        if name in stated:
            expected = getattr(cfg, name)
            assert (tuple(stated[name]) if isinstance(expected, tuple) else stated[name]) == expected, name
    if _has_tag(weights):
        assert weights.options.get("num_classes", cfg.num_classes) == cfg.num_classes
    if weights.access == "url" and cfg.url:
        assert cfg.url == weights.url or not is_zoo_model(weights.model)
    if weights.claimed:
        assert {"dataset", "input_size", "crop_pct", "interpolation"} <= weights.evaluation.keys()


def _has_tag(weights):
    return any(name == weights.name for name in timm.models.list_models(f"{weights.model}.*", include_tags=True)) or (
        get_pretrained_cfg(weights.model) is not None and get_pretrained_cfg(weights.model).tag == weights.tag
    )


def test_the_default_tag_of_a_model_with_released_weights_is_listed():
    for name in zoo.list_models():
        cfg = get_pretrained_cfg(name)
        if find_weights(name) is not None and cfg.tag != "untrained":
            assert find_weights(name, cfg.tag) is not None, name


@ENTRIES
def test_options_are_arguments_of_the_constructor(weights):
    if not weights.options:
        return
    if weights.door is None:
        return _build_small(weights)
    door = inspect.signature(getattr(zoo, weights.door)).parameters
    inner = {
        "create_upscaler": lambda: zoo.heads.craft.Craft,
        "create_segmenter": lambda: zoo.heads.pem.model.Pem,
        "create_detector": lambda: zoo.heads.detection.detector_classes()[weights.model],
    }[weights.door]()
    known = {*door, *inspect.signature(inner).parameters}
    assert set(weights.options) <= known


_built = set()


def _build_small(weights):
    key = (model_entrypoint(weights.model), tuple(sorted(weights.options)))
    if key in _built:
        return
    _built.add(key)
    with torch.device("meta"):
        weights.build()


def test_an_entry_builds_its_model():
    assert find_weights("craft_x3").build(depths=(1,), num_heads=(6,)).scale == 3
    assert find_weights("convformer_s18.sail_in22k").options == {"num_classes": 21841}
    with pytest.raises(ValueError, match="can be built from its file only"):
        find_weights("spartan_small").build()


GOOD = {"model": "crate_tiny", "tag": "in1k", "task": "classification", "access": "unreleased"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tag": "in1k/x"}, "tag='in1k/x', expected letters"),
        ({"task": "detect"}, r"crate_tiny\.in1k: task='detect', expected one of classification"),
        ({"access": "ftp"}, "access='ftp'"),
        ({"access": "url", "file": "a.pth"}, "url=None, access 'url' needs it"),
        ({"access": "url", "file": "a.pth", "url": "http://x.org/a.pth"}, "begins with https"),
        ({"access": "hub", "hub_id": "a/b"}, "file=None, access 'hub' needs it"),
        ({"size": "12"}, "size='12', expected a number of bytes"),
        ({"sha256": "ABC"}, "64 lower-case hexadecimal digits"),
        ({"claimed": {"top_1": 3}}, "'top_1' is no metric"),
        ({"measured": {"top1": "80"}}, "'top1' is no metric with a number"),
        ({"evaluation": {"border": 2}}, "'border' says nothing about classification"),
        ({"licence": "mit"}, r"entry 0 \(crate_tiny\.in1k\): unknown field 'licence'"),
    ],
)
def test_a_bad_entry_gives_one_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        read_manifest(json.dumps({"weights": [GOOD | change]}))
    assert "\n" not in str(caught.value)


def test_missing_fields_and_doubles_are_named():
    with pytest.raises(ValueError, match="no 'access'"):
        read_manifest(json.dumps({"weights": [{k: v for k, v in GOOD.items() if k != "access"}]}))
    with pytest.raises(ValueError, match=r"crate_tiny\.in1k is listed twice"):
        read_manifest(json.dumps({"weights": [GOOD, GOOD]}))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_WEIGHTS", str(tmp_path))
    return tmp_path


def test_a_local_file_is_used_for_pretrained(folder):
    name = local_file_names("crate_small", find_weights("crate_small"))[-1]
    reference = timm.create_model("crate_small", depth=1)
    torch.save({"state_dict": {f"module.{k}": v for k, v in reference.state_dict().items()}}, folder / name)
    model = timm.create_model("crate_small", pretrained=True, depth=1)
    assert all(torch.equal(v, reference.state_dict()[k]) for k, v in model.state_dict().items())
    assert "state_dict" not in model.pretrained_cfg
    smaller = timm.create_model("crate_small", pretrained=True, depth=1, num_classes=7, in_chans=1)
    assert smaller.get_classifier().out_features == 7


def test_the_cache_folder_is_used_without_the_variable(tmp_path, monkeypatch):
    monkeypatch.delenv("ZOO_WEIGHTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    reference = timm.create_model("crate_small", depth=1)
    (tmp_path / "zoo" / "weights").mkdir(parents=True)
    torch.save(reference.state_dict(), tmp_path / "zoo" / "weights" / "crate_small.in1k.pth")
    model = timm.create_model("crate_small", pretrained=True, depth=1)
    assert torch.equal(model.cls_token, reference.cls_token)


def test_weights_that_cannot_be_had_are_explained(folder):
    with pytest.raises(RuntimeError, match=r"were never released by the authors: .*zoo\.load_checkpoint"):
        timm.create_model("crate_tiny", pretrained=True)
    with pytest.raises(RuntimeError, match=r"the authors' link is dead .*ZOO_WEIGHTS"):
        timm.create_model("crate_small", pretrained=True)
    with pytest.raises(RuntimeError, match=r"through a browser only .*zoo\.create_upscaler\('craft', scale=3"):
        zoo.create_upscaler("craft", scale=3, pretrained=True)


def test_an_incomplete_local_file_is_refused(folder):
    state = timm.create_model("crate_small", depth=1).state_dict()
    del state["blocks.0.ista.weight"]
    torch.save(state, folder / local_file_names("crate_small", find_weights("crate_small"))[-1])
    with pytest.raises(zoo.CheckpointError, match=r"lacks 1 entries of Crate: blocks\.0\.ista\.weight"):
        timm.create_model("crate_small", pretrained=True, depth=1, num_classes=5)
