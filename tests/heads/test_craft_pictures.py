"""Pictures of any kind are enlarged as what they are, in the memory that they are given."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.heads.craft import Craft
from zoo.heads.craft.pictures import (
    ImageError,
    Picture,
    check_format,
    enlarge,
    make_plan,
    read_picture,
    strip_bytes,
    upscale_picture,
    whole_bytes,
)
from zoo.heads.craft.start import start_from_bicubic
from zoo.heads.craft.strips import forward_strips

ODD = Path(__file__).parents[1] / "data" / "odd_images"
FACTS = {fact["file"]: fact for fact in json.loads((ODD / "facts.json").read_text())}
BAD = {"empty.jpg", "text.jpg", "truncated.jpg"}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return start_from_bicubic(Craft(2, depths=(1,))).eval()


@pytest.mark.parametrize("name", sorted(set(FACTS) - BAD))
def test_odd_pictures_keep_what_they_are(model, name, tmp_path):
    picture = read_picture(ODD / name)
    width, height = FACTS[name]["upright_size"]
    assert picture.values.shape[:2] == (height, width)
    result = upscale_picture(model, picture)
    assert result.values.shape == (2 * height, 2 * width, *picture.values.shape[2:])
    assert result.values.dtype == picture.values.dtype
    assert (result.alpha is None) == (picture.alpha is None)
    top = np.iinfo(picture.values.dtype).max
    if min(width, height) >= 8:
        difference = result.values.mean(dtype=float) - picture.values.mean(dtype=float)
        assert abs(difference) < 0.02 * top, "the colours changed"
    result.save(tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as saved:
        assert saved.size == (2 * width, 2 * height)
        assert saved.getexif().get(0x0112, 1) == 1
        assert np.array_equal(np.asarray(saved), np.asarray(result.to_image()))


@pytest.mark.parametrize("name", sorted(BAD))
def test_pictures_that_cannot_be_read_are_named(model, name):
    with pytest.raises(ImageError, match=name):
        upscale_picture(model, ODD / name)


def test_kinds_are_told_apart():
    kinds = {name: read_picture(ODD / name) for name in ("gray.jpg", "gray16.png", "la.png", "rgba.png", "palette.png")}
    assert kinds["gray.jpg"].values.ndim == 2
    assert kinds["gray16.png"].values.dtype == np.uint16
    assert kinds["la.png"].values.ndim == 2
    assert kinds["la.png"].alpha is not None
    assert kinds["rgba.png"].alpha is not None
    assert kinds["palette.png"].values.shape[2] == 3
    assert read_picture(ODD / "palette_transparent.png").alpha is not None
    assert read_picture(ODD / "cmyk.jpg").values.shape[2] == 3


def test_rotation_is_applied_and_the_rest_of_exif_and_the_profile_stay(model, tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"
    Image.fromarray(np.zeros((12, 20, 3), np.uint8)).save(tmp_path / "in.jpg", exif=exif, icc_profile=b"a profile")
    for suffix in (".png", ".jpg", ".webp", ".tif"):
        upscale_picture(model, tmp_path / "in.jpg").save(tmp_path / f"out{suffix}")
        with Image.open(tmp_path / f"out{suffix}") as saved:
            assert saved.size == (24, 40)
            assert saved.info["icc_profile"] == b"a profile"
            assert saved.getexif()[0x010F] == "a camera"
            assert saved.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize(
    ("name", "values", "alpha", "match"),
    [
        ("out.xyz", np.zeros((4, 4, 3), np.uint8), None, "use one of .bmp"),
        ("out.jpg", np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8), "transparency"),
        ("out.webp", np.zeros((4, 4), np.uint16), None, "16 bits"),
        ("out.webp", np.zeros((1, 16384, 3), np.uint8), None, "16383"),
    ],
)
def test_formats_that_cannot_hold_a_picture_are_refused_in_a_sentence(name, values, alpha, match):
    with pytest.raises(ImageError, match=match):
        check_format(Path(name), Picture(values, alpha))


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(self, file, **options):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        Picture(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "out.png")
    assert not list(tmp_path.iterdir())


def test_less_memory_gives_the_same_picture_through_files(model, tmp_path):
    x = torch.rand(1, 3, 90, 50, generator=torch.Generator().manual_seed(0))
    budget = (strip_bytes(model, 64, tokens=1) + whole_bytes(model, 96, 64)) // 2
    said, work = [], []
    y = enlarge(model, x, max_memory=budget, folder=str(tmp_path), say=said.append, step=work.append)
    assert "exact" in said[0]
    assert sum(work) == pytest.approx(1)
    with torch.no_grad():
        assert (y - model.upscale(x)).abs().max() < 1e-5
    assert not list(tmp_path.iterdir())


def test_plans_follow_the_memory(model, monkeypatch):
    assert make_plan(model, 100, 100).how == "memory"
    assert make_plan(model, 100, 100, tile=64).tile == 64
    assert make_plan(model, 2000, 2000, max_memory=200_000_000).how == "files"
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 0}))
    plan = make_plan(model, 2000, 2000, max_memory=200_000_000)
    assert plan.how == "tiles"
    assert plan.peak < 200_000_000
    with pytest.raises(ValueError, match="too small for 4032x4032 pixels"):
        make_plan(model, 2000, 2000, max_memory=2_000_000)


def test_the_estimate_covers_what_is_used(model):

    from tests.bench.craft import PeakMemory

    x = torch.rand(1, 3, 160, 208)
    with torch.inference_mode(), PeakMemory() as trace:
        forward_strips(model, x)
    assert trace.peak < whole_bytes(model, 160, 208) < 3 * trace.peak


def test_grey_models_take_colours_one_by_one():
    grey = start_from_bicubic(Craft(2, in_chans=1, depths=(1,))).eval()
    colour = read_picture(ODD / "photo.bmp")
    result = upscale_picture(grey, colour)
    red = upscale_picture(grey, Picture(colour.values[..., 0].copy()))
    assert np.array_equal(result.values[..., 0], red.values)
    with pytest.raises(ValueError, match="4 channels"):
        upscale_picture(Craft(2, in_chans=4, depths=(1,)), colour)


def test_predict_takes_lists_and_draws(model):
    predictions = model.predict([ODD / "photo.bmp", np.zeros((5, 6, 3), np.uint8)])
    assert [p.image.size for p in predictions] == [(240, 320), (12, 10)]
    assert predictions[0].draw(ODD / "photo.bmp").size == (480, 320)
    assert predictions[0].to_dict()["scale"] == 2
    assert "240x320" in str(predictions[0])
