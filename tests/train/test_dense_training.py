"""Detectors and segmenters through the trainer: reports, resuming, averaging, several processes, and learning."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from zoo.saving import load_model
from zoo.tools.main import main
from zoo.train.data.segmentation_layouts import open_segmentation
from zoo.train.recipes import find_recipe
from zoo.train.segmentation_reports import evaluate_segmenter
from zoo.train.trainer import train

COCO = Path(__file__).parents[1] / "data" / "coco_ccby"
TINY_ASCAN = {"stem_width": 16, "widths": [32, 64, 128, 192], "patterns": ["C", "CC", "CC", "CT"]}


def _few(folder: Path, image_ids: set[int]) -> Path:
    """Some training images of coco_ccby as both splits of a data set of their own."""
    (folder / "annotations").mkdir(parents=True)
    for name in ("instances", "panoptic"):
        content = json.loads((COCO / "annotations" / f"{name}_train2017.json").read_text())
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in image_ids]
        content["images"] = [i for i in content["images"] if i["id"] in image_ids]
        for split in ("train", "val"):
            (folder / "annotations" / f"{name}_{split}2017.json").write_text(json.dumps(content))
            images = folder / f"{split}2017"
            images.mkdir(exist_ok=True)
            for image in content["images"]:
                shutil.copy(COCO / "train2017" / image["file_name"], images)
            if name == "panoptic":
                maps = folder / f"panoptic_{split}2017"
                maps.mkdir()
                for annotation in content["annotations"]:
                    shutil.copy(COCO / "panoptic_train2017" / annotation["file_name"], maps)
    return folder


@pytest.fixture
def recipes(tmp_path):
    data = str(_few(tmp_path / "data", {10444, 10303}))
    shared = dict(
        model="ascan_tiny",
        model_args=TINY_ASCAN,
        data=data,
        out=str(tmp_path / "run"),
        epochs=2,
        epoch_steps=2,
        batch_size=2,
        val_interval=1,
        workers=0,
        device="cpu",
        freeze_norm=False,
    )
    return {
        "detection": find_recipe("finetune_detection")(**shared, short_sides=(64,), test_short=64),
        "segmentation": find_recipe("finetune_segmentation")(
            **shared,
            kind="panoptic",
            crop_size=(64, 64),
            test_short=64,
            loss_points=64,
            backbone_lr=1.0,
            head_args={"num_queries": 8},
        ),
    }


FILES = {
    "detection": ("detections.json", "worst_misses.png"),
    "segmentation": ("results/panoptic.json", "worst.png", "per_class.csv"),
}


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_a_run_leaves_weights_that_evaluate_and_predict(recipes, task, tmp_path, capsys):
    recipe = recipes[task]
    result = train(recipe, quiet=True, say=lambda _: None)
    folder = Path(recipe.out)
    for name in ("recipe.json", "results.md", "curves.png", "predictions.png", *FILES[task]):
        assert (folder / name).is_file(), name
    scores = json.loads((folder / "results.json").read_text())["scores"]
    common = ["--workers", "0", "--device", "cpu"]
    assert main(["eval", str(result.weights), "--data", recipe.data, "--out", str(tmp_path / "eval"), *common]) == 0
    assert json.loads((tmp_path / "eval" / "results.json").read_text())["scores"] == pytest.approx(scores)
    photo = next((Path(recipe.data) / "val2017").iterdir())
    assert main(["predict", str(result.weights), str(photo), "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())[0]["file"] == str(photo)
    Image.open(tmp_path / "out" / f"{photo.stem}.png").load()
    assert main(["eval", str(result.weights), "--task", "classification", "--data", recipe.data]) == 2
    assert f"is a model of {task}" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_a_run_that_lost_its_last_steps_ends_with_the_same_weights(recipes, task):
    recipe = recipes[task].replace(ema_decay=0.9, checkpoint_interval=1, keep_checkpoints=4, val_interval=2)
    train(recipe, quiet=True, say=lambda _: None)
    folder = Path(recipe.out)
    reference = load_file(folder / "last.safetensors")
    saved = sorted((folder / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for path in saved[-3:]:
        path.unlink()
    train(recipe, resume=True, quiet=True, say=lambda _: None)
    resumed = load_file(folder / "last.safetensors")
    assert all(torch.equal(value, resumed[name]) for name, value in reference.items())


def test_bf16_trains_a_detector_on_a_cpu(recipes):
    recipe = recipes["detection"].replace(epochs=1, precision="bf16", head="mask_rcnn")
    result = train(recipe, quiet=True, say=lambda _: None)
    assert load_model(result.weights).has_masks


@pytest.mark.slow
def test_two_processes_train_as_one(recipes, tmp_path, monkeypatch):
    # one size, since a batch is padded to its largest image; no statistics of a batch
    monkeypatch.setattr(torch.nn.BatchNorm2d, "train", lambda self, mode=True: torch.nn.Module.train(self, False))
    sizes = dict(short_sides=(), jitter_scale=(1.0, 1.0), jitter_size=(64, 64))
    shared = dict(epochs=1, freeze_norm=True)
    chosen = {
        "detection": recipes["detection"].replace(**shared, **sizes),
        "segmentation": recipes["segmentation"].replace(**shared),
        "superresolution": find_recipe("finetune_sr")(
            data=str(COCO / "train2017"),
            val_data=f"{recipes['detection'].data}/val2017",
            epochs=1,
            epoch_steps=2,
            batch_size=4,
            patch=16,
            hr_shrink=6.0,
            head_args={"depths": [1]},
            workers=0,
            device="cpu",
        ),
    }
    for task, recipe in chosen.items():
        train(recipe.replace(out=str(tmp_path / f"{task}_one")), quiet=True, say=lambda _: None)
        parallel = "fsdp" if task == "segmentation" else "ddp"
        two = recipe.replace(out=str(tmp_path / f"{task}_two"), parallel=parallel)
        (tmp_path / f"{task}.json").write_text(two.to_json())
    script = tmp_path / "both.py"
    script.write_text(
        "import sys\nimport torch\nfrom zoo.train.recipes import load_recipe\nfrom zoo.train.trainer import train\n"
        "torch.nn.BatchNorm2d.train = lambda self, mode=True: torch.nn.Module.train(self, False)\n"
        "for file in sys.argv[1:]:\n    train(load_recipe(file), quiet=True)\n"
    )
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    files = [str(tmp_path / f"{task}.json") for task in chosen]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *launch, *files], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    for task in chosen:
        one, two = tmp_path / f"{task}_one", tmp_path / f"{task}_two"
        losses = [json.loads((f / "history.jsonl").read_text().splitlines()[0])["loss"] for f in (one, two)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4), task
        left, right = (load_file(folder / "last.safetensors") for folder in (one, two))
        for name, value in left.items():  # sums in another order: equal up to rounding
            torch.testing.assert_close(right[name], value, rtol=1e-3, atol=1e-4, msg=f"{task} {name}")


@pytest.mark.slow
def test_a_segmenter_learns_real_images(tmp_path):
    data = str(_few(tmp_path / "data", {10444, 10303, 10440}))
    recipe = find_recipe("finetune_segmentation")(
        model="ascan_tiny",
        model_args=TINY_ASCAN,
        kind="panoptic",
        data=data,
        out=str(tmp_path / "run"),
        epochs=2,
        epoch_steps=45,
        batch_size=3,
        lr=1e-3,
        min_lr=1e-5,
        warmup_epochs=0.1,
        weight_decay=0.0,
        backbone_lr=1.0,
        freeze_norm=False,
        crop_size=(128, 128),
        jitter_scale=(1.0, 1.0),
        hflip=0.0,
        color_distortion=False,
        test_short=128,
        loss_points=1024,
        clip_grad=5.0,
        val_interval=2,
        workers=0,
        head_args={"num_queries": 20},
    )
    result = train(recipe, quiet=True, say=lambda _: None)
    assert result.evaluation.scores["pq"] > 80
    semantic = open_segmentation(data, "val", "semantic")
    evaluation = evaluate_segmenter(
        load_model(result.weights), semantic, test_size=(128, 2048), workers=0, progress=False
    )
    assert evaluation.scores["miou"] > 80
