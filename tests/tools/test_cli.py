"""The `zoo` command as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import timm
from PIL import Image

import zoo
from tests.train.conftest import CLOTHING, TINY_CRATE, copy_photos
from zoo.saving import save_model
from zoo.tools.main import COMMANDS, main


@pytest.fixture
def weights(tmp_path):
    model = timm.create_model("crate_tiny", num_classes=3, img_size=32, **TINY_CRATE)
    return save_model(
        model,
        tmp_path / "model.safetensors",
        model_args={**TINY_CRATE, "img_size": 32},
        class_names=["dress", "hat", "pants"],
        input_config={"input_size": (3, 32, 32)},
    )


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_has_complete_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "usage: zoo" in capsys.readouterr().out


def test_an_unknown_command_gives_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["dance"])
    assert stop.value.code == 2


def test_list_shows_what_is_registered(capsys):
    assert main(["list", "crate_*", "--names"]) == 0
    names = capsys.readouterr().out.split()
    assert names == zoo.list_models("crate_*")
    assert "crate_tiny" in names
    assert main(["list", "nothing_like_this*"]) == 1


def test_info_counts_parameters_as_the_paper_does(capsys):
    assert main(["info", "crate_tiny"]) == 0
    out = capsys.readouterr().out
    assert "6,090,856" in out
    assert "2.16 G" in out


def test_info_of_an_unknown_model_gives_status_2_and_a_sentence(capsys):
    assert main(["info", "crate_tinny"]) == 2
    assert "no model is called 'crate_tinny'" in capsys.readouterr().err


def test_eval_writes_the_report(weights, tmp_path, capsys):
    photos = copy_photos(tmp_path / "photos")
    status = main(["eval", str(weights), "--data", str(photos), "--workers", "0", "--out", str(tmp_path / "report")])
    assert status == 0
    assert "top1" in capsys.readouterr().out
    report = json.loads((tmp_path / "report" / "results.json").read_text())
    assert report["images"] == 12
    assert (tmp_path / "report" / "confusion.png").is_file()
    sheet = Image.open(tmp_path / "report" / "worst_mistakes.png")
    assert min(sheet.size) > 100


def test_eval_of_the_folded_model_gives_the_same_scores(weights, tmp_path):
    photos = copy_photos(tmp_path / "photos")
    scores = []
    for flags in ([], ["--fold"]):
        out = tmp_path / f"report{len(flags)}"
        assert main(["eval", str(weights), "--data", str(photos), "--workers", "0", "--out", str(out), *flags]) == 0
        scores.append(json.loads((out / "results.json").read_text())["scores"])
    assert scores[0] == scores[1]


def test_eval_with_another_class_count_says_so(weights, tmp_path, capsys):
    photos = copy_photos(tmp_path / "photos", classes=("dress", "hat", "pants", "shoes"))
    assert main(["eval", str(weights), "--data", str(photos), "--workers", "0"]) == 2
    assert "shoes" in capsys.readouterr().err


def test_eval_without_weights_is_refused(tmp_path, capsys):
    assert main(["eval", "--data", str(tmp_path), "--model", "crate_tiny"]) == 2
    assert "random weights: give --checkpoint or --pretrained" in capsys.readouterr().err


def test_predict_names_and_draws(weights, tmp_path, capsys):
    photo = next((CLOTHING / "val" / "hat").iterdir())
    assert main(["predict", str(weights), str(photo), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert any(name in capsys.readouterr().out for name in ("dress", "hat", "pants"))
    (record,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(record["predictions"]) == 3
    assert Image.open(tmp_path / "out" / f"{photo.stem}.png").width > 200


def test_predict_goes_on_after_an_unreadable_picture_and_reports_it(weights, tmp_path, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    photo = next((CLOTHING / "val" / "hat").iterdir())
    (folder / "a_good.jpg").write_bytes(photo.read_bytes())
    (folder / "b_bad.jpg").write_text("no picture")
    (folder / "c_good.jpg").write_bytes(photo.read_bytes())
    assert main(["predict", str(weights), str(folder), "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert "a_good.jpg" in captured.out
    assert "c_good.jpg" in captured.out
    assert "b_bad.jpg" in captured.err


def test_the_command_is_installed():
    result = subprocess.run(
        [sys.executable, "-m", "zoo.tools.main", "--version"], capture_output=True, text=True, cwd="/"
    )
    assert result.stdout.strip() == f"zoo {zoo.__version__}"


def test_an_unknown_preset_is_named(capsys):
    assert main(["train", "--recipe", "no-such-preset", "--data", "x"]) == 2
    assert "no recipe is called 'no-such-preset'" in capsys.readouterr().err


def test_a_flag_means_what_the_task_says(capsys):
    assert main(["train", "--task", "sr", "--scale", "4", "--show"]) == 0
    assert json.loads(capsys.readouterr().out)["scale"] == 4
    assert main(["train", "--scale", "0.5,1.0", "--show"]) == 0
    assert json.loads(capsys.readouterr().out)["scale"] == [0.5, 1.0]
    assert main(["train", "--task", "detection", "--mixup", "0.2", "--show"]) == 2
    assert "a recipe of detection has no field mixup" in capsys.readouterr().err
    assert main(["train", "--scale", "4", "--show"]) == 2
    assert "--scale: expected 2 values" in capsys.readouterr().err
    assert main(["train", "--task", "segmentation", "--recipe", "finetune"]) == 2
    assert "is one of classification" in capsys.readouterr().err


def test_a_recipe_of_json_says_its_task(tmp_path, capsys):
    assert main(["train", "--recipe", "linear-probe", "--epochs", "3", "--show"]) == 0
    shown = capsys.readouterr().out
    assert '"task": "classification"' in shown
    (tmp_path / "recipe.json").write_text(shown)
    assert main(["train", "--recipe", str(tmp_path / "recipe.json"), "--lr", "0.5", "--show"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(shown) | {"lr": 0.5}
    (tmp_path / "bad.json").write_text("[1]")
    assert main(["train", "--recipe", str(tmp_path / "bad.json")]) == 2
    assert "is not a recipe that zoo train wrote" in capsys.readouterr().err
