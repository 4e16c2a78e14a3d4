"""`zoo.predict` gives timm's scores for any picture, and pictures of predictions stay legible."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import nn

import zoo
import zoo.preprocess
from zoo.images import read_image
from zoo.pictures import contact_sheet, draw_scores
from zoo.prediction import resolve_class_names
from zoo.preprocess import EvalTransform

DATA = Path(__file__).parent.parent / "data"
ODD = DATA / "odd_images"
PHOTOS = sorted((DATA / "clothing10" / "val").glob("*/*.jpg"))[::31]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model("test_resnet", num_classes=7).eval()


def test_scores_are_those_of_timms_own_preprocessing(model):
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    predictions = zoo.predict(model, PHOTOS, topk=7)
    with torch.no_grad():
        expected = model(torch.stack([transform(Image.open(path).convert("RGB")) for path in PHOTOS])).softmax(1)
    assert [p.source for p in predictions] == [str(path) for path in PHOTOS]
    for prediction, scores in zip(predictions, expected, strict=True):
        assert list(prediction.labels) == scores.argsort(descending=True).tolist()
        assert prediction.scores == pytest.approx(scores[list(prediction.labels)].tolist(), abs=1e-6)


def test_a_zoo_model_predicts():
    name = zoo.list_models()[0]
    prediction = zoo.predict(timm.create_model(name, num_classes=3), PHOTOS[0], topk=2)
    assert prediction.task == "classification"
    assert len(prediction.labels) == len(prediction.names) == len(prediction.scores) == 2


def test_batches_change_nothing(model):
    one_by_one = [zoo.predict(model, path) for path in PHOTOS]
    for batch_size in (1, 4, 100):
        together = zoo.predict(model, iter(PHOTOS), batch_size=batch_size)
        for a, b in zip(one_by_one, together, strict=True):
            assert a.labels == b.labels
            assert a.scores == pytest.approx(b.scores, abs=1e-6)


def test_one_picture_gives_one_prediction_and_an_iterable_a_list(model):
    photo = read_image(PHOTOS[0])
    batch = torch.from_numpy(np.stack([np.asarray(photo)] * 2)).permute(0, 3, 1, 2)
    assert isinstance(zoo.predict(model, photo), zoo.Prediction)
    assert isinstance(zoo.predict(model, batch[0]), zoo.Prediction)
    assert len(zoo.predict(model, batch)) == 2
    assert len(zoo.predict(model, [photo])) == 1
    assert zoo.predict(model, []) == []


def test_every_odd_picture_has_a_prediction(model):
    good = [ODD / f["file"] for f in json.loads((ODD / "facts.json").read_text()) if "error" not in f]
    assert len(zoo.predict(model, good)) == len(good)
    with pytest.raises(zoo.ImageError, match=r"truncated\.jpg is truncated"):
        zoo.predict(model, [*good[:2], ODD / "truncated.jpg"])


def test_each_module_gets_its_own_mode_back_even_after_an_error(model):
    model.train()
    model.bn1.eval()  # a frozen norm inside a model in training
    before = {name: module.training for name, module in model.named_modules()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    zoo.predict(model, PHOTOS[0])
    with pytest.raises(zoo.ImageError):
        zoo.predict(model, ODD / "empty.jpg")
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    model.eval()


def test_the_live_input_size_type_and_channels_are_used():
    grey = timm.create_model("test_resnet", num_classes=4, in_chans=1).to(torch.bfloat16)
    seen = []
    grey.register_forward_pre_hook(lambda _, inputs: seen.append((tuple(inputs[0].shape), inputs[0].dtype)))
    zoo.predict(grey, PHOTOS[0])
    assert seen == [((1, 1, 160, 160), torch.bfloat16)]
    large = timm.create_model("test_vit", num_classes=4, img_size=192)
    seen.clear()
    large.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    zoo.predict(large, PHOTOS[0])
    assert seen == [(1, 3, 192, 192)]


def test_names_come_from_the_argument_then_the_model_then_imagenet_then_numbers(model):
    assert zoo.predict(model, PHOTOS[0]).names[0].startswith("class ")
    assert resolve_class_names(model, 7, list("abcdefg")) == tuple("abcdefg")
    named = timm.create_model("test_resnet", num_classes=2)
    named.class_names = ["cat", "dog"]
    assert set(zoo.predict(named, PHOTOS[0]).names) == {"cat", "dog"}
    assert zoo.predict(named, PHOTOS[0], class_names=["x", "y"]).names[0] in "xy"
    names = resolve_class_names(timm.create_model("test_resnet"), 1000)
    assert names == tuple(ImageNetInfo().label_descriptions())
    assert names[1] == "goldfish, Carassius auratus"


class Fixed(nn.Module):
    """A model that says the same of every picture."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.register_buffer("logits", torch.tensor(logits))

    def forward(self, x):
        return self.logits.expand(len(x), -1)


def test_multilabel_returns_all_classes_at_or_above_the_threshold():
    model = Fixed(3.0, -3.0, 0.0, 1.0, 2.0, 4.0, 5.0)
    prediction = zoo.predict(model, PHOTOS[0], multilabel=True, topk=2)
    assert prediction.task == "multilabel"
    assert prediction.labels == (6, 5, 0, 4, 3, 2)
    assert prediction.scores == pytest.approx([1 / (1 + np.exp(-x)) for x in (5, 4, 3, 2, 1, 0)], abs=1e-6)
    none = zoo.predict(model, PHOTOS[0], multilabel=True, threshold=1.0)
    assert none.labels == ()
    assert none.draw(PHOTOS[0]).size[0] > 0


def test_topk_beyond_the_classes_gives_all_and_ties_keep_the_order_of_the_classes():
    prediction = zoo.predict(Fixed(1.0, 1.0, 1.0), PHOTOS[0], topk=10)
    assert prediction.labels == (0, 1, 2)


def test_to_dict_is_plain_json_and_the_prediction_is_frozen(model):
    prediction = zoo.predict(model, PHOTOS[0], topk=2)
    content = json.loads(json.dumps(prediction.to_dict()))
    assert content["task"] == "classification"
    assert content["source"] == str(PHOTOS[0])
    assert [set(entry) for entry in content["predictions"]] == [{"label", "name", "score"}] * 2
    with pytest.raises(AttributeError):
        prediction.task = "other"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"topk": 0}, "topk is 0, expected at least 1"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"threshold": 1.5}, "threshold is 1.5, expected a score between 0 and 1"),
        ({"class_names": ["a"]}, "1 class names for 7 classes: pass one for each output of the model"),
    ],
)
def test_wrong_arguments_are_named(model, options, sentence):
    with pytest.raises(ValueError) as error:
        zoo.predict(model, PHOTOS[0], **options)
    assert str(error.value) == sentence


def test_models_that_do_not_classify_are_told_apart():
    with pytest.raises(ValueError, match=r"ResNet has no classifier \(num_classes=0\)"):
        zoo.predict(timm.create_model("test_resnet", num_classes=0), PHOTOS[0])
    with pytest.raises(ValueError, match=r"returned list for 1 picture\(s\), expected logits \(1, num_classes\)"):
        zoo.predict(timm.create_model("test_resnet", features_only=True), PHOTOS[0])
    with pytest.raises(ValueError, match=r"Fixed gives non-finite scores for .*\.jpg: its weights are damaged"):
        zoo.predict(Fixed(float("nan"), 1.0), PHOTOS[0])


# Preprocessing


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("input_size", [(3, 224, 224), (3, 96, 160), (3, 160, 96)])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0, 1.1])
def test_ordinary_pictures_get_timms_tensor_to_the_last_bit(monkeypatch, crop_mode, input_size, crop_pct):
    options = dict(crop_mode=crop_mode, crop_pct=crop_pct, interpolation="bicubic")
    ours = EvalTransform(input_size, **options)
    theirs = create_transform(input_size, is_training=False, **options)
    for path in PHOTOS[:3]:
        image = read_image(path)
        expected = theirs(image)
        assert torch.equal(ours(image), expected)
        with monkeypatch.context() as patch:  # cropping first is the same picture up to the filter's rounding
            patch.setattr(zoo.preprocess, "_MAX_ENLARGEMENT", 0)
            assert (ours(image) - expected).abs().mean() < 5e-3  # 0.3 of a grey level


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(1000, 8), (6, 900), (1, 1), (1, 30_000), (30_000, 1)])
def test_extreme_pictures_are_cropped_before_they_are_resized(monkeypatch, crop_mode, size):
    largest = 0
    resize = Image.Image.resize

    def watched(image, size, *args, **kwargs):
        nonlocal largest
        largest = max(largest, size[0] * size[1])
        return resize(image, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", watched)
    transform = EvalTransform((3, 224, 224), crop_mode=crop_mode)
    colour = (10, 200, 90)
    tensor = transform(Image.new("RGB", size, colour))
    assert tensor.shape == (3, 224, 224)
    assert largest <= 16 * 256 * 256
    std, mean = torch.tensor([0.229, 0.224, 0.225]), torch.tensor([0.485, 0.456, 0.406])
    seen = (tensor.flatten(1).T * std + mean) * 255
    assert (seen - torch.tensor(colour)).abs().amax(1).min() < 0.5  # "border" shows the strip between borders


def test_the_centre_of_a_strip_is_what_the_model_sees():
    strip = Image.new("RGB", (4000, 8), (255, 0, 0))
    strip.paste((0, 0, 255), (1996, 0, 2004, 8))
    seen = EvalTransform(224, crop_pct=1.0, normalize=False)(strip)
    assert seen[2].float().mean() > 240


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"input_size": (4, 224, 224)}, "input_size (4, 224, 224) has 4 channels, pictures have 3 (RGB) or 1 (grey)"),
        ({"input_size": (3, 0, 224)}, "input_size is (3, 0, 224), expected a side, (H, W) or (C, H, W) of positive"),
        ({"interpolation": "cubic"}, "interpolation is 'cubic', expected one of nearest, bilinear, bicubic"),
        ({"crop_mode": "middle"}, "crop_mode is 'middle', expected one of center, squash, border"),
        ({"crop_pct": 0.0}, "crop_pct is 0.0, expected the crop's share of the resized picture"),
    ],
)
def test_wrong_preprocessing_is_named(options, sentence):
    with pytest.raises(ValueError) as error:
        EvalTransform(**options)
    assert sentence in str(error.value)


# Pictures


@pytest.mark.parametrize(
    "size", [(1, 1), (8, 8), (1000, 8), (6, 900), (224, 224), (640, 480), (3000, 4000), (5000, 40)]
)
def test_names_and_scores_are_legible_beside_a_picture_of_any_size(size):
    drawn = draw_scores(Image.new("RGB", size, (0, 0, 0)), ["shirt", "a name " * 40], [0.87, 0.004])
    assert drawn.mode == "RGB"
    assert max(drawn.size) <= 2300
    # rows of the panel with dark ink on white: letters of at least 9 px
    pixels = np.asarray(drawn.convert("L")).astype(int)
    panel = pixels[:, -200:] if size[0] < 1.2 * size[1] else pixels[-60:]
    assert (panel < 90).any()
    assert (panel > 240).mean() > 0.5


def test_a_bar_is_as_long_as_its_score():
    drawn = np.asarray(draw_scores(Image.new("RGB", (600, 300)), ["a", "b"], [0.5, 0.25])).astype(int)
    widths = [int((np.abs(drawn - colour).sum(2) == 0).sum(1).max()) for colour in ((92, 148, 214), (170, 198, 232))]
    assert widths[0] == pytest.approx(0.5 * 571, abs=12)
    assert widths[1] == pytest.approx(0.25 * 571, abs=12)


def test_a_contact_sheet_frames_right_and_wrong():
    images = [Image.new("RGB", size, (128, 128, 128)) for size in ((50, 80), (300, 40), (1, 1), (224, 224))]
    sheet = np.asarray(
        contact_sheet(images, ["a", "b\nc", "d " * 99, ""], [True, False, None, True], columns=2, title="T")
    )
    green = (sheet == (38, 140, 76)).all(2).sum()
    red = (sheet == (206, 56, 48)).all(2).sum()
    assert green > 1.5 * red > 2000
    assert sheet.shape[1] < 2 * 208 + 100


def test_captions_of_any_script_and_length_are_drawn_within_their_cell():
    captions = ["Überlange Straßenbeschriftung für Kleidung", "кошка", "x" * 500, "tab\tand\x00control\n\nlines\nmore"]
    sheet = contact_sheet([Image.new("RGB", (9, 9))] * 4, captions, columns=4)
    white = np.asarray(sheet)[-15:]
    assert (white == 255).all()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (([], []), "contact_sheet got no pictures"),
        ((["a", "b"], ["x"]), "contact_sheet got 2 pictures but 1 captions: pass one for each picture"),
        ((["a"], ["x"], [True, False]), "contact_sheet got 1 pictures but 2 correct: pass one for each picture"),
    ],
)
def test_lists_that_do_not_match_are_named(arguments, sentence):
    with pytest.raises(ValueError) as error:
        contact_sheet(*arguments)
    assert str(error.value) == sentence


def test_prediction_needs_no_optional_package():
    code = (
        "import sys, zoo; zoo.predict, zoo.read_image; import zoo.pictures; heavy = {'matplotlib', 'mmengine', "
        "'albumentations', 'cv2', 'scipy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
