"""`zoo predict --task sr`."""

import argparse
from pathlib import Path

import pytest
import torch
from PIL import Image

import zoo
from zoo.heads.craft.start import start_from_bicubic
from zoo.saving import save_model
from zoo.tools.main import main
from zoo.tools.predict_sr import memory_size, plan_files

ODD = Path(__file__).parents[1] / "data" / "odd_images"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    model = start_from_bicubic(zoo.create_upscaler("craft", scale=2, depths=(1,)))
    return str(save_model(model, tmp_path_factory.mktemp("weights") / "craft.safetensors"))


def run(weights, *arguments):
    return main(["predict", "--task", "sr", "--checkpoint", weights, *map(str, arguments)])


def test_one_picture_to_one_file_and_never_over_another(weights, tmp_path, capsys):
    out = tmp_path / "out.png"
    assert run(weights, ODD / "photo.bmp", out) == 0
    assert Image.open(out).size == (240, 320)
    before = out.read_bytes()
    assert run(weights, ODD / "rgba.png", out) == 2
    assert "--force" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert run(weights, ODD / "rgba.png", out, "--force") == 0
    assert Image.open(out).mode == "RGBA"


def test_folders_keep_their_sub_folders_and_bad_pictures_are_named(weights, tmp_path, capsys):
    (tmp_path / "in/sub").mkdir(parents=True)
    for name, target in (("gray16.png", "a.png"), ("photo.bmp", "sub/b.bmp"), ("gray.jpg", "sub/b.jpg")):
        (tmp_path / "in" / target).write_bytes((ODD / name).read_bytes())
    (tmp_path / "in/broken.jpg").write_bytes((ODD / "truncated.jpg").read_bytes())
    assert run(weights, tmp_path / "in", tmp_path / "out") == 1
    assert "broken.jpg is truncated" in capsys.readouterr().err
    made = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*"))
    assert made == ["a.png", "sub/b.jpg.png", "sub/b.png"]
    assert Image.open(tmp_path / "out/a.png").mode.startswith("I")


def test_arguments_that_do_not_fit_are_said(weights, tmp_path, capsys):
    assert run(weights, ODD / "photo.bmp", ODD / "rgba.png", tmp_path / "out.png") == 2
    assert "give a folder" in capsys.readouterr().err
    copy = tmp_path / "photo.png"
    copy.write_bytes((ODD / "rgba.png").read_bytes())
    assert run(weights, copy, copy, "--force") == 2
    assert "over its own source" in capsys.readouterr().err
    assert run(weights, tmp_path / "no.png", tmp_path / "out.png") == 1
    assert "no picture at" in capsys.readouterr().err
    assert run(weights, ODD / "photo.bmp", tmp_path / "out.png", "--scale", 3) == 2
    assert "scale 2" in capsys.readouterr().err
    assert run(weights, ODD / "photo.bmp", tmp_path / "out.png", "--max-memory", "1MB") == 2
    assert "too small" in capsys.readouterr().err


def test_other_ways_run(weights, tmp_path):
    assert run(weights, ODD / "photo.bmp", tmp_path / "tiles.png", "--tile", 64, "--overlap", 16) == 0
    assert run(weights, ODD / "tall.jpg", tmp_path / "views.png", "--self-ensemble", "--padding", "reflect") == 0
    assert Image.open(tmp_path / "tiles.png").size == (240, 320)


def test_memory_is_read_with_its_unit():
    assert memory_size("2GB") == 2_000_000_000
    assert memory_size("1.5 M") == 1_500_000
    assert memory_size("4096") == 4096
    with pytest.raises(argparse.ArgumentTypeError, match="lots"):
        memory_size("lots")


def test_a_folder_is_written_to_even_with_one_picture(tmp_path):
    assert plan_files([ODD / "photo.bmp"], tmp_path) == [(ODD / "photo.bmp", tmp_path / "photo.png")]
