"""`zoo inspect` writes numbers and a picture, and names what it cannot use."""

import argparse
import json

import pytest
import torch
from PIL import Image

from zoo.tools import inspect as tool


def parse(*arguments):
    parser = argparse.ArgumentParser()
    tool.add_arguments(parser)
    return parser.parse_args([str(a) for a in arguments])


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, size in enumerate([(60, 40), (33, 70)]):
        noise = (torch.rand(size[1], size[0], 3) * 255).byte().numpy()
        Image.fromarray(noise).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("name", ["crate_tiny", "mae_crate_tiny"])
def test_numbers_and_picture_are_written(name, pictures, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    assert tool.run(parse(name, pictures, "--img-size", 64, "--layer", 3, "--out", out)) == 0
    result = json.loads((out / "layers.json").read_text())
    assert len(result["layers"]) == 12
    assert result["layers"][0]["coding_rate_std"] >= 0
    assert 0 < result["layers"][5]["zeros_mean"] < 1
    assert result["weights"] == "random weights"
    assert len(result["files"]) == 2
    with Image.open(out / "inspect.png") as picture:
        assert min(picture.size) > 400
    assert "coding rate" in capsys.readouterr().out


def test_unreadable_picture_is_named_and_gives_status_one(pictures, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (pictures / "broken.png").write_bytes(b"not a picture")
    assert tool.run(parse("crate_tiny", pictures, "--img-size", 32, "--out", tmp_path / "out")) == 1
    assert "broken.png" in capsys.readouterr().err


def test_other_models_and_layers_are_refused(pictures, tmp_path):
    with pytest.raises(ValueError, match="no CRATE model"):
        tool.run(parse("resnet18", pictures, "--out", tmp_path))
    with pytest.raises(ValueError, match="no model is called"):
        tool.run(parse("crate_giant", pictures, "--out", tmp_path))
    with pytest.raises(ValueError, match="--layer 12 does not exist"):
        tool.run(parse("crate_tiny", pictures, "--layer", 12, "--out", tmp_path))
