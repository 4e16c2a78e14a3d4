"""`zoo eval --compare`: claims beside measurements, said so that nobody mistakes the difference; the results file."""

import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import resolve_data_config

import zoo
from tests.train.conftest import CLOTHING, TINY_CRATE, copy_photos
from zoo.downloads import file_sha256
from zoo.manifest import Weights
from zoo.saving import save_model
from zoo.tools.comparison import Outcome, compare, standard_error
from zoo.tools.evaluate import _whole_split
from zoo.tools.evaluate_dense import apply_detector_settings
from zoo.tools.evaluate_sr import find_sets
from zoo.tools.main import main
from zoo.tools.records import Record, append_results, read_results
from zoo.tools.subject import Subject, load_subject
from zoo.train.data.errors import DataError
from zoo.train.real_labels import read_real_labels, real_scores

COCO = Path(__file__).parents[1] / "data" / "coco_ccby"
TINY_ASCAN = {"stem_width": 16, "widths": [32, 64, 128, 192], "patterns": ["C", "CC", "CC", "CT"]}
ENTRY = Weights(
    model="crate_tiny",
    tag="clothes",
    task="classification",
    access="unreleased",
    file="clothes.pth",
    source="https://example.org",
    options={**TINY_CRATE, "img_size": 32, "num_classes": 3},
    evaluation={
        "dataset": "clothes",
        "split": "val",
        "input_size": [3, 32, 32],
        "crop_pct": 0.8,
        "interpolation": "bilinear",
    },
    claimed={"top1": 50.0, "real_top1": 61.5},
)
RECORD = Record(
    model="crate_tiny",
    tag=None,
    task="classification",
    file=None,
    sha256=None,
    dataset="imagenet-1k",
    split="val",
    images=500,
    total=50_000,
    settings={"crop_pct": 0.875},
    metrics={"top1": 85.0},
)


@pytest.fixture
def know(monkeypatch):
    """Replaces the manifest by given entries."""

    def known(*entries):
        for module in ("zoo.manifest", "zoo.tools.subject", "zoo.tools.recognition"):
            monkeypatch.setattr(f"{module}.known_weights", lambda: entries)

    return known


def tiny():
    return timm.create_model("crate_tiny", **ENTRY.options)


def flags(tmp_path):
    return ["--workers", "0", "--device", "cpu", "--out", str(tmp_path / "out"), "--results", str(tmp_path / "r.jsonl")]


# ---- classification


def test_claim_measurement_and_difference(tmp_path, know, capsys):
    photos = copy_photos(tmp_path / "photos")
    file = save_model(
        tiny(),
        tmp_path / "m.safetensors",
        model_args={**TINY_CRATE, "img_size": 32},
        class_names=["dress", "hat", "pants"],
    )
    know(replace(ENTRY, sha256=file_sha256(file)))
    common = [str(file), "--data", str(photos), "--dataset", "clothes", "--compare", *flags(tmp_path)]
    assert main(["eval", *common]) == 0
    out = capsys.readouterr().out
    first = read_results(tmp_path / "r.jsonl")[0]
    row = next(line.split() for line in out.splitlines() if line.startswith("top1 ") and "50.00" in line)
    assert row[1:3] == ["50.00", f"{first.metrics['top1']:.2f}"]
    assert f"{first.metrics['top1'] - 50:+.2f}" in row
    assert "claimed and not measured here: real_top1 61.50" in out
    assert "differ from the claim" not in out
    # the manifest's settings, not the model's own
    assert (first.settings["crop_pct"], first.settings["interpolation"]) == (0.8, "bilinear")
    assert (first.tag, first.sha256, first.images, first.total) == ("clothes", file_sha256(file), 12, None)
    assert first.claims == {"top1": 50.0}

    assert main(["eval", *common, "--crop-pct", "1.0"]) == 0
    out = capsys.readouterr().out
    assert "these settings differ from the claim's: crop_pct 1.0 (claim: 0.8)" in out
    assert len(read_results(tmp_path / "r.jsonl")) == 2
    assert read_results(tmp_path / "r.jsonl")[1].differing == ["crop_pct 1.0 (claim: 0.8)"]


def test_a_released_file_is_recognised_with_its_entry(tmp_path, know):
    know(ENTRY)
    torch.save({"state_dict": tiny().state_dict()}, tmp_path / "clothes.pth")
    subject = load_subject(str(tmp_path / "clothes.pth"))
    assert (subject.name, subject.task, subject.weights) == ("crate_tiny", "classification", ENTRY)
    assert subject.sha256 == file_sha256(tmp_path / "clothes.pth")
    assert resolve_data_config({}, model=subject.model)["input_size"] == (3, 32, 32)
    know(replace(ENTRY, sha256="0" * 64))
    assert "it is not the authors' file" in load_subject(str(tmp_path / "clothes.pth")).notes[-1]


def test_wrong_questions_get_one_sentence(tmp_path, capsys):
    assert main(["eval", "nothing.pth", "--data", str(tmp_path)]) == 2
    assert "no checkpoint at nothing.pth, and no model is called so" in capsys.readouterr().err
    assert main(["eval", "crate_tiny.in22k", "--pretrained", "--data", str(tmp_path)]) == 2
    assert "no released weights are called crate_tiny.in22k" in capsys.readouterr().err
    assert main(["eval", "craft_x2", "--pretrained", "--data", str(tmp_path), "--real", "real.json"]) == 2
    assert "--real is for classifiers" in capsys.readouterr().err
    assert main(["eval", "craft_x2", "--pretrained", "--data", str(tmp_path), "--task", "detection"]) == 2
    assert "is a model of superresolution" in capsys.readouterr().err


def test_the_folder_of_a_split_is_that_split(tmp_path):
    photos = copy_photos(tmp_path / "photos", train=2, val=1)
    assert _whole_split(str(photos / "val"), "val") == (photos.resolve(), "val")
    assert _whole_split(str(photos), "val") == (str(photos), "val")
    assert _whole_split(str(photos / "val" / "hat"), "val")[0] == str(photos / "val" / "hat")


# ---- what a difference means


def subject(weights=None, task="classification"):
    return Subject(None, "crate_tiny", task, "the file", weights)


def test_a_subset_is_called_one_and_has_a_standard_error():
    outcome = Outcome("imagenet-1k", "val", 500, {"top1": 85.0, "mean_class": 85.0}, {})
    entry = replace(ENTRY, evaluation={"dataset": "imagenet-1k"})
    text = "\n".join(compare(subject(entry), outcome).lines())
    assert "a subset: 500 of the 50,000 images of imagenet-1k val (1 %)" in text
    assert "+35.00 ± 1.60" in text
    assert outcome.errors == pytest.approx({"top1": 100 * math.sqrt(0.85 * 0.15 / 500)})
    whole = replace(outcome, images=50_000)
    text = "\n".join(compare(subject(entry), whole).lines())
    assert "±" not in text
    assert "subset" not in text
    assert standard_error(100.0, 5) is None


def test_claims_of_other_data_or_of_the_whole_model_are_not_compared():
    def lines(entry, **other):
        outcome = Outcome(
            **{"dataset": "clothes", "split": "val", "images": 9, "metrics": {"top1": 40.0}} | other, settings={}
        )
        comparison = compare(subject(entry), outcome)
        assert not comparison.claims
        return "\n".join(comparison.lines())

    assert "is for clothes, and these images are cats: not compared" in lines(ENTRY, dataset="cats")
    assert "is for the split val, this is train: not compared" in lines(ENTRY, split="train")
    assert "of the paper's whole model (backbone)" in lines(replace(ENTRY, task="backbone"))
    assert "no claim is known for crate_tiny.clothes" in lines(replace(ENTRY, claimed={}))
    text = lines(None)
    assert "no claim is known for the file: the manifest does not list this file" in text
    assert "if it is crate_tiny.in1k, say so with --model" in text


# ---- ReaL


def test_real_labels_by_hand(tmp_path):
    labels = [[3], [], [5, 7], [1]]
    (tmp_path / "real.json").write_text(json.dumps(labels))
    assert read_real_labels(tmp_path / "real.json") == labels
    # in another order than the names; image 2 has no label and is left out
    paths = [f"val/n01440764/ILSVRC2012_val_0000000{n}.JPEG" for n in (4, 3, 2, 1)]
    logits = torch.nn.functional.one_hot(torch.tensor([1, 7, 0, 4]), 1000).float()
    scores, count = real_scores(logits, paths, labels)
    assert count == 3
    assert scores["real_top1"] == pytest.approx(200 / 3)


def test_real_labels_need_official_names_and_a_sound_file(tmp_path):
    with pytest.raises(DataError, match=r"tench\.jpg has another: expected names such as ILSVRC2012_val_00000001"):
        real_scores(torch.zeros(1, 1000), ["val/n01440764/tench.jpg"], [[1]])
    with pytest.raises(DataError, match="number 2, and the ReaL labels are of 1 images"):
        real_scores(torch.zeros(1, 1000), ["ILSVRC2012_val_00000002.JPEG"], [[1]])
    with pytest.raises(DataError, match="none of the 1 images has a ReaL label"):
        real_scores(torch.zeros(1, 1000), ["ILSVRC2012_val_00000001.JPEG"], [[]])
    for wrong, message in (
        ("{", "no JSON"),
        ("{}", "no list of lists"),
        ("[[1], 4]", "labels of image 2"),
        ("[[1000]]", "0..999"),
    ):
        (tmp_path / "real.json").write_text(wrong)
        with pytest.raises(DataError, match=message):
            read_real_labels(tmp_path / "real.json")
    with pytest.raises(FileNotFoundError, match="get real"):
        read_real_labels(tmp_path / "none.json")


def test_real_labels_of_a_subset_of_imagenet(tmp_path, capsys):
    photos = sorted((CLOTHING / "val" / "hat").iterdir())
    # folders 0 and 389 of ImageNet's order, not 0 and 1
    for number, wnid in ((1, "n01440764"), (2, "n02514041"), (3, "n02514041")):
        folder = tmp_path / "imagenet" / "val" / wnid
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos[number], folder / f"ILSVRC2012_val_{number:08d}.JPEG")
    model = timm.create_model("crate_tiny", **{**ENTRY.options, "num_classes": 1000})
    with torch.no_grad():  # every picture is class 389
        model.get_classifier().weight.zero_()
        model.get_classifier().bias.copy_(torch.nn.functional.one_hot(torch.tensor(389), 1000))
    file = save_model(
        model,
        tmp_path / "m.safetensors",
        model_args={**TINY_CRATE, "img_size": 32},
        input_config={"input_size": (3, 32, 32)},
    )
    (tmp_path / "real.json").write_text(json.dumps([[389, 1], [], [7], [3]]))
    arguments = [str(file), "--real", str(tmp_path / "real.json"), "--record", *flags(tmp_path)]
    assert main(["eval", *arguments, "--data", str(tmp_path / "imagenet" / "val")]) == 0
    assert "real_top1   50.00 % of 2 images" in capsys.readouterr().out
    (record,) = read_results(tmp_path / "r.jsonl")
    assert (record.dataset, record.split, record.images, record.total) == ("imagenet-1k", "val", 3, 50_000)
    assert record.metrics["top1"] == pytest.approx(200 / 3)
    assert record.metrics["real_top1"] == 50.0
    assert record.errors["real_top1"] == pytest.approx(100 * math.sqrt(0.25 / 2))
    assert record.settings["real_images"] == 2


# ---- dense tasks


def test_a_detector_is_compared_on_coco(tmp_path, know, capsys):
    data = tmp_path / "coco"
    (data / "annotations").mkdir(parents=True)
    content = json.loads((COCO / "annotations" / "instances_val2017.json").read_text())
    content["images"] = content["images"][:2]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    (data / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    (data / "val2017").mkdir()
    for image in content["images"]:
        shutil.copy(COCO / "val2017" / image["file_name"], data / "val2017")
    model = zoo.create_detector("retinanet", "ascan_tiny", num_classes=80, backbone_args=TINY_ASCAN)
    file = save_model(model, tmp_path / "d.safetensors")
    entry = Weights(
        model="retinanet",
        tag="coco",
        task="detection",
        access="unreleased",
        sha256=file_sha256(file),
        evaluation={"dataset": "coco", "split": "val2017", "short_side": 64, "max_side": 100, "nms_threshold": 0.45},
        claimed={"box_ap": 36.2},
    )
    know(entry)
    assert main(["eval", str(file), "--data", str(data), "--compare", *flags(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "retinanet.coco on coco val" in out
    assert "a subset: 2 of the 5,000 images of coco val (0.04 %), so that a difference says little" in out
    record = read_results(tmp_path / "r.jsonl")[0]
    assert record.claims == {"box_ap": 36.2}
    assert record.metrics["box_ap"] < 5
    assert (record.settings["short_side"], record.settings["max_side"]) == (64, 100)
    assert record.settings["nms_threshold"] == 0.45
    assert not record.differing


def test_a_segmenter_is_compared_on_ade20k(tmp_path, know, capsys):
    data = tmp_path / "ade"
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (data / kind / split).mkdir(parents=True)
    for number, photo in enumerate(sorted((CLOTHING / "val" / "hat").iterdir())[:2]):
        picture = Image.open(photo).convert("RGB")
        picture.save(data / "images" / "validation" / f"ADE_val_{number}.jpg")
        labels = np.full(picture.size[::-1], number + 1, dtype=np.uint8)
        Image.fromarray(labels).save(data / "annotations" / "validation" / f"ADE_val_{number}.png")
    model = zoo.create_segmenter("pem", "ascan_tiny", num_classes=150, backbone_args=TINY_ASCAN, num_queries=4)
    file = save_model(model, tmp_path / "s.safetensors")
    entry = Weights(
        model="pem",
        tag="ade20k",
        task="segmentation",
        access="unreleased",
        sha256=file_sha256(file),
        evaluation={"dataset": "ade20k", "split": "val", "short_side": 64, "max_side": 128},
        claimed={"miou": 39.6},
    )
    know(entry)
    common = ["eval", str(file), "--data", str(data), *flags(tmp_path)]
    assert main([*common, "--compare"]) == 0
    assert "a subset: 2 of the 2,000 images of ade20k val" in capsys.readouterr().out
    (record,) = read_results(tmp_path / "r.jsonl")
    assert record.claims == {"miou": 39.6}
    assert (record.settings["short_side"], record.settings["max_side"], record.settings["kind"]) == (
        64,
        128,
        "semantic",
    )
    assert 0 <= record.metrics["miou"] < 60


def test_a_detector_of_one_size_gets_the_size_of_the_claim():
    model = SimpleNamespace(size=(512, 512), detections_per_img=100)
    stated = {"input_size": [3, 640, 640], "max_detections": 300}
    settings = apply_detector_settings(model, stated, None)
    assert settings == {"input_size": [3, 640, 640], "keep_aspect": False, "max_detections": 300}
    assert apply_detector_settings(model, stated, 320)["input_size"] == [3, 320, 320]
    assert (model.size, model.detections_per_img) == ((320, 320), 300)


# ---- super-resolution


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "Set5" / "HR"
    folder.mkdir(parents=True)
    for number, photo in enumerate(sorted((CLOTHING / "val" / "hat").iterdir())[:2]):
        Image.open(photo).convert("RGB").crop((10, 20, 74, 76)).save(folder / f"{number}.png")
    return folder.parent


def test_super_resolution_on_small_pictures(tmp_path, pictures, capsys):
    common = ["eval", "craft_x2", "--pretrained", "--data", str(pictures), *flags(tmp_path)]
    assert main([*common, "--compare"]) == 0
    out = capsys.readouterr().out
    assert "set5: 2 pictures; low-resolution pictures are made from them" in out
    assert "the manifest has as measured with craft_x2.zoo: psnr_set5 36.83, ssim_set5 0.9557" in out
    assert "no claim is known for craft_x2.zoo" in out
    assert "a subset: 2 of the 5 images of set5" in out
    # given low-resolution pictures that are the same give the same numbers, and --record says nothing of claims
    low = pictures / "LR_bicubic" / "X2"
    low.mkdir(parents=True)
    for path in (pictures / "HR").iterdir():
        small = zoo.imresize.shrink(np.asarray(Image.open(path)), 2)
        Image.fromarray(small).save(low / f"{path.stem}x2.png")
    assert main([*common, "--record"]) == 0
    assert "claim" not in capsys.readouterr().out
    made, given = read_results(tmp_path / "r.jsonl")
    assert (made.settings["low_resolution"], given.settings["low_resolution"]) == ("made", "given")
    assert given.metrics == pytest.approx(made.metrics)
    assert (given.model, given.tag, given.dataset, given.split) == ("craft_x2", "zoo", "set5", "test")
    assert (tmp_path / "out" / "prediction.png").is_file()


def test_sets_are_found_in_every_layout(tmp_path, pictures):
    (tmp_path / "BSD100" / "HR").mkdir(parents=True)
    (pictures / "LR_bicubic" / "X3").mkdir(parents=True)
    found = find_sets(tmp_path, 3)
    assert [(s.name, s.low is not None) for s in found] == [("b100", False), ("set5", True)]
    assert find_sets(pictures, 2) == [("set5", pictures / "HR", None)]
    assert find_sets(pictures / "HR", 2)[0].high == pictures / "HR"
    with pytest.raises(FileNotFoundError, match="no folder of pictures"):
        find_sets(tmp_path / "none", 2)


# ---- the results file


def test_lines_of_several_runs_do_not_mix(tmp_path):
    path = tmp_path / "deep" / "results.jsonl"

    def one(number):
        append_results(path, [replace(RECORD, images=number, settings={"long": "x" * 5000})] * 2)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(1, 101)))
    records = read_results(path)
    assert len(records) == 200
    numbers = [record.images for record in records]
    assert numbers[::2] == numbers[1::2]
    assert sorted(numbers[::2]) == list(range(1, 101))
    assert set(records[0].versions) == {"zoo", "torch", "timm"}


def test_a_line_that_was_cut_is_named_and_takes_no_other_with_it(tmp_path):
    path = tmp_path / "results.jsonl"
    append_results(path, [RECORD])
    with path.open("a") as file:
        file.write('{"model": "cra')
    append_results(path, [RECORD])
    with pytest.raises(ValueError, match=r"results.jsonl line 2 is no result"):
        read_results(path)
    path.write_text("\n".join(path.read_text().splitlines()[::2]) + "\n")
    assert read_results(path) == [RECORD, RECORD]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": {"top1": "85"}}, "top1 is '85', expected a finite number"),
        ({"metrics": {"top1": float("nan")}}, "expected a finite number"),
        ({"metrics": {}}, "metrics is empty"),
        ({"images": 0}, "images is 0"),
        ({"sha256": "abc"}, "sha256 is 'abc'"),
        ({"task": "dance"}, "task is 'dance'"),
        ({"date": "yesterday"}, "date is 'yesterday'"),
        ({"extra": 1}, "unknown field 'extra'"),
    ],
)
def test_a_line_that_is_no_result_is_refused(tmp_path, change, message):
    append_results(tmp_path / "r.jsonl", [RECORD])
    content = json.loads((tmp_path / "r.jsonl").read_text()) | change
    (tmp_path / "r.jsonl").write_text(json.dumps(content) + "\n")
    with pytest.raises(ValueError, match=f"line 1 is no result: .*{message}"):
        read_results(tmp_path / "r.jsonl")
