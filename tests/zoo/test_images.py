"""Reading pictures: every form of one photograph gives that photograph, every broken file gives a sentence."""

from __future__ import annotations

import io
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from zoo.images import ImageError, ImageNotFoundError, read_image

ODD = Path(__file__).parent.parent / "data" / "odd_images"
FACTS = json.loads((ODD / "facts.json").read_text())
GOOD = [fact for fact in FACTS if "error" not in fact]


def quarter(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    return pixels[: max(1, height // 2), : max(1, width // 2)].reshape(-1, 3)


@pytest.fixture
def photo() -> Image.Image:
    return read_image(ODD / "photo.bmp")


@pytest.mark.parametrize("fact", GOOD, ids=lambda fact: fact["file"])
def test_every_odd_file_reads_as_the_upright_rgb_photograph(fact):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_image(ODD / fact["file"])
    assert image.mode == "RGB"
    assert list(image.size) == fact["upright_size"]
    pixels = np.asarray(image, dtype=float)
    if fact["mode"] == "I;16":  # the recorded means are those of Pillow's clipping
        assert pixels.mean() == pytest.approx(127.46, abs=0.3)
        assert quarter(pixels).mean() == pytest.approx(129.64, abs=0.3)
    else:
        assert pixels.reshape(-1, 3).mean(0) == pytest.approx(fact["pil_rgb_mean"], abs=0.01)
        assert quarter(pixels).mean(0) == pytest.approx(fact["top_left_quarter_mean"], abs=0.01)


def test_the_folder_holds_the_29_files_of_the_facts():
    assert len(FACTS) == 29
    assert {fact["file"] for fact in FACTS} == {path.name for path in ODD.iterdir()} - {"facts.json", "README.md"}


def test_all_exif_orientations_show_the_same_picture(photo):
    expected = np.asarray(photo, dtype=float)
    for orientation in range(1, 9):
        turned = np.asarray(read_image(ODD / f"exif_{orientation}.jpg"), dtype=float)
        assert np.abs(turned - expected).mean() < 3, orientation  # JPEG coding, not another picture


def test_all_kinds_of_source_give_the_same_pixels(photo):
    path = ODD / "photo.bmp"
    pixels = np.asarray(photo)
    with path.open("rb") as file:
        sources = [str(path), path, path.read_bytes(), bytearray(path.read_bytes()), file, Image.open(path)]
        sources += [pixels, torch.from_numpy(pixels.copy()).permute(2, 0, 1), pixels[:, ::-1][:, ::-1]]
        sources += [pixels / 255, (pixels / 255).astype(np.float32), pixels.astype(np.uint16) * 257]
        sources += [torch.from_numpy(pixels / 255).permute(2, 0, 1).requires_grad_(), io.BytesIO(path.read_bytes())]
        for source in sources:
            assert np.array_equal(np.asarray(read_image(source)), pixels), type(source)


def test_half_precision_tensors_read_within_their_rounding(photo):
    tensor = torch.from_numpy(np.asarray(photo).copy()).permute(2, 0, 1) / 255
    for dtype, bound in ((torch.float16, 1), (torch.bfloat16, 1)):
        again = np.asarray(read_image(tensor.to(dtype)), dtype=int)
        assert np.abs(again - np.asarray(photo)).max() <= bound


def test_grey_alpha_and_boolean_arrays_become_rgb():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for source in (grey, grey[:, :, None], torch.from_numpy(grey), torch.from_numpy(grey)[None]):
        assert np.array_equal(np.asarray(read_image(source)), np.repeat(grey[:, :, None], 3, 2))
    rgba = np.random.default_rng(0).integers(0, 256, (5, 6, 4), dtype=np.uint8)
    assert np.array_equal(np.asarray(read_image(rgba)), rgba[:, :, :3])
    assert np.asarray(read_image(grey > 5)).max() == 255


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]
)
def test_every_mode_of_pillow_with_a_meaning_becomes_rgb(photo, mode):
    through = {"PA": "LA", "La": "LA", "RGBa": "RGBA"}.get(mode)
    image = (photo.convert(through) if through else photo).convert(mode)
    result = read_image(image)
    assert result.mode == "RGB"
    if mode not in ("1", "L", "LA", "La", "PA", "P"):
        assert np.abs(np.asarray(result, dtype=float) - np.asarray(photo)).mean() < 3


@pytest.mark.parametrize("values", ["<u2", ">u2"])
def test_16_bit_tiffs_of_both_byte_orders_are_scaled(tmp_path, values):
    ramp = np.linspace(0, 65535, 256).astype(values).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "ramp.tif")
    assert np.abs(np.asarray(read_image(tmp_path / "ramp.tif"))[:, :, 0].ravel() - np.arange(256)).max() == 0


def test_a_float_tiff_in_0_to_1_is_read_and_another_range_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "half.tif")
    assert np.asarray(read_image(tmp_path / "half.tif")).max() == 128
    Image.fromarray(np.full((4, 4), 812.0, np.float32)).save(tmp_path / "depth.tif")
    with pytest.raises(ImageError, match=r"depth\.tif has floats from 812 to 812, expected 0\.\.1"):
        read_image(tmp_path / "depth.tif")


def test_reading_leaves_the_given_picture_as_it_was():
    with Image.open(ODD / "exif_6.jpg") as image:
        before = image.size, image.mode, image.getexif().get(0x0112)
        upright = read_image(image)
        assert (image.size, image.mode, image.getexif().get(0x0112)) == before
        assert upright.size == image.size[::-1]
        assert read_image(upright).size == upright.size  # not turned twice


def test_broken_exif_does_not_cost_the_picture(photo, tmp_path):
    photo.save(tmp_path / "odd.jpg", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x05garbage")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read_image(tmp_path / "odd.jpg").size == photo.size


def test_no_file_stays_open(tmp_path):
    path = tmp_path / "photo.gif"
    path.write_bytes((ODD / "animated.gif").read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        image = read_image(path)
        path.unlink()
        assert image.getpixel((0, 0))


# Bad input: the sentence that the user sees


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("empty.jpg", "empty.jpg is empty (0 bytes): copy or download it again"),
        ("text.jpg", "text.jpg is not a picture: it is text ('this is not an image')"),
        ("truncated.jpg", "truncated.jpg is truncated: it ends or breaks before its last pixel; copy it again"),
    ],
)
def test_a_broken_file_is_named_with_its_fault(name, sentence):
    with pytest.raises(ImageError) as error:
        read_image(ODD / name)
    assert str(error.value) == f"{ODD}{os.sep}{sentence}"


def test_a_missing_file_is_also_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no picture at .*cat\.jpg: check the path"):
        read_image(tmp_path / "cat.jpg")
    assert issubclass(ImageNotFoundError, ImageError)
    assert issubclass(ImageError, ValueError)


def test_an_address_is_not_opened():
    with pytest.raises(ImageError, match=r"no picture at https://example\.org/a\.jpg: download it first"):
        read_image("https://example.org/a.jpg")


def test_a_folder_is_no_picture(tmp_path):
    with pytest.raises(ImageError, match="is a folder: pass one picture, or a list of the pictures in it"):
        read_image(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer, run `git lfs pull`"),
        (b"<!DOCTYPE html><html></html>", "it is a web page, the download was redirected"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it is XML or SVG, convert it to PNG"),
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00", "it is HEIC, convert it to JPEG"),
        (b"PK\x03\x04rest", "it is an archive, unpack it"),
        (bytes(4096), "it holds zeros only"),
        (b"\x93\xfe\x01\x02\x03\x04\x05\x06", "no format that Pillow reads begins with 93 fe 01 02 03 04 05 06"),
    ],
)
def test_what_is_no_picture_is_recognised(tmp_path, content, reason):
    path = tmp_path / "thing.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError) as error:
        read_image(path)
    assert str(error.value).startswith(f"{path} is not a picture: ")
    assert reason in str(error.value)


FORMATS = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("PNG", {}),
    ("GIF", {}),
    ("WEBP", {}),
    ("BMP", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("PPM", {}),
]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's about TIFF directories
@pytest.mark.parametrize(("format", "options"), FORMATS, ids=lambda value: str(value))
def test_half_a_file_is_never_a_picture(photo, format, options):
    buffer = io.BytesIO()
    photo.save(buffer, format, **options)
    whole = buffer.getvalue()
    assert read_image(whole).size == photo.size
    for share in (0.3, 0.5, 0.9):
        with pytest.raises(ImageError, match=r"^picture of \d+ bytes (is|cannot)"):
            read_image(whole[: int(share * len(whole))])


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP"])
def test_a_download_filled_up_with_zeros_is_never_a_picture(photo, format):
    buffer = io.BytesIO()
    photo.save(buffer, format)
    whole = buffer.getvalue()
    half = len(whole) // 2
    with pytest.raises(ImageError, match=r"is (truncated|damaged|incomplete)"):
        read_image(whole[:half] + bytes(len(whole) - half))
    assert read_image(whole + bytes(512)).size == photo.size  # padding behind a complete picture is harmless


def test_truncated_files_are_refused_even_where_another_package_told_pillow_to_fill_them_up(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ImageError, match="truncated"):
        read_image(ODD / "truncated.jpg")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.parametrize(("limit", "kind"), [(5_000, "error"), (10_000, "warning")])
def test_a_decompression_bomb_is_refused_with_its_size(monkeypatch, limit, kind):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=r"photo\.bmp is too large: 19,200 pixels, beyond Pillow's limit"):
            read_image(ODD / "photo.bmp")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (np.zeros((3, 4, 5), np.uint8), "array of shape (3, 4, 5) is not a picture: expected (H, W), (H, W, 3)"),
        (np.zeros((3, 8, 8), np.uint8), "call .transpose(1, 2, 0)"),
        (np.zeros((2, 8, 8, 3), np.uint8), "array of shape (2, 8, 8, 3) is a batch: pass its pictures one by one"),
        (np.zeros((0, 8, 3), np.uint8), "array of shape (0, 8, 3) has no pixels"),
        (np.zeros((8, 8), np.int64), "array of shape (8, 8) has type int64, expected uint8 (0..255), uint16"),
        (np.full((8, 8), 200.0), "array of shape (8, 8) has floats from 200 to 200, expected 0..1"),
        (np.full((8, 8), np.nan), "has floats from nan to nan, expected 0..1"),
        (torch.zeros(1, 3, 8, 8), "tensor of shape (1, 3, 8, 8) is a batch"),
        (torch.zeros(8, 8, 3), "tensor of shape (8, 8, 3) is not a picture: expected (3, H, W), (1, H, W) or (H, W); "),
        (torch.full((3, 8, 8), -2.1), "tensor of shape (3, 8, 8) has floats from -2.1 to -2.1, expected 0..1"),
        (io.StringIO("text"), "picture was opened as text: open it with mode 'rb'"),
        (b"", "picture of 0 bytes is empty"),
    ],
)
def test_an_object_that_is_no_picture_is_described(source, sentence):
    with pytest.raises(ImageError) as error:
        read_image(source)
    assert sentence in str(error.value)


def test_another_type_is_a_type_error():
    with pytest.raises(TypeError, match=r"a picture is a path, bytes, a file object, .*, got dict"):
        read_image({})


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs file permissions that bind")
def test_a_file_without_permission_is_named(tmp_path):
    path = tmp_path / "secret.jpg"
    path.write_bytes(b"x")
    path.chmod(0)
    with pytest.raises(ImageError, match=r"secret\.jpg cannot be read: .*[Pp]ermission"):
        read_image(path)
