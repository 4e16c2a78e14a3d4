"""The manifest lists checkpoints of models that exist, and `pretrained=True` says what can be done about each."""

import pytest
import timm
import torch

import zoo
from zoo.manifest import find_weights, known_weights, local_file_names

_ACCESS = {"url", "hub", "drive", "dead", "unreleased", "packaged"}
_METRICS = {"top1", "zero_shot_top1", "box_ap", "mask_ap", "miou"}
_METRICS |= {"psnr_set5", "ssim_set5", "psnr_set14", "ssim_set14", "psnr_b100", "psnr_urban100", "psnr_manga109"}


@pytest.mark.parametrize("weights", known_weights(), ids=lambda w: f"{w.model}.{w.tag}")
def test_an_entry_is_complete(weights):
    assert weights.access in _ACCESS
    assert set(weights.claimed) <= _METRICS
    assert not weights.measured or set(weights.measured) <= _METRICS
    if weights.access == "url":
        assert weights.url
        assert weights.file
    if weights.access == "hub":
        assert weights.hub_id
    if weights.access == "packaged":
        assert weights.file
    if weights.sha256 is not None:
        assert len(weights.sha256) == 64


def test_no_checkpoint_is_listed_twice():
    keys = [(w.model, w.tag) for w in known_weights()]
    assert len(keys) == len(set(keys))


def test_a_local_file_is_used_for_pretrained(tmp_path, monkeypatch):
    name = local_file_names("crate_small", find_weights("crate_small"))[-1]
    reference = timm.create_model("crate_small", depth=1)
    torch.save({"state_dict": {f"module.{k}": v for k, v in reference.state_dict().items()}}, tmp_path / name)
    monkeypatch.setenv("ZOO_WEIGHTS", str(tmp_path))
    model = timm.create_model("crate_small", pretrained=True, depth=1)
    assert all(torch.equal(v, reference.state_dict()[k]) for k, v in model.state_dict().items())
    assert "state_dict" not in model.pretrained_cfg
    smaller = timm.create_model("crate_small", pretrained=True, depth=1, num_classes=7, in_chans=1)
    assert smaller.get_classifier().out_features == 7


def test_weights_that_cannot_be_had_are_explained(monkeypatch):
    monkeypatch.delenv("ZOO_WEIGHTS", raising=False)
    with pytest.raises(RuntimeError, match=r"were never released by the authors: .*zoo\.load_checkpoint"):
        timm.create_model("crate_tiny", pretrained=True)
    with pytest.raises(RuntimeError, match=r"the authors' link is dead .*ZOO_WEIGHTS"):
        timm.create_model("crate_small", pretrained=True)


def test_an_incomplete_local_file_is_refused(tmp_path, monkeypatch):
    state = timm.create_model("crate_small", depth=1).state_dict()
    del state["blocks.0.ista.weight"]
    torch.save(state, tmp_path / local_file_names("crate_small", find_weights("crate_small"))[-1])
    monkeypatch.setenv("ZOO_WEIGHTS", str(tmp_path))
    with pytest.raises(zoo.CheckpointError, match=r"lacks 1 entries of Crate: blocks\.0\.ista\.weight"):
        timm.create_model("crate_small", pretrained=True, depth=1, num_classes=5)
