"""What a run does and leaves behind."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import zoo
from tests.train.conftest import TINY_CRATE
from zoo.saving import load_model, read_metadata, save_model
from zoo.train.engine import build_optimizer
from zoo.train.trainer import train


def test_a_run_leaves_weights_report_and_pictures(recipe):
    result = train(recipe.replace(ema_decay=0.5), quiet=True)
    folder = Path(recipe.out)
    for name in (
        "recipe.json", "best.safetensors", "last.safetensors", "history.jsonl", "curves.png", "results.md",
        "results.json", "per_class.csv", "confusion.png", "predictions.png",
    ):  # fmt: skip
        assert (folder / name).stat().st_size > 0, name
    model = load_model(folder / "best.safetensors")
    assert model.class_names == ["dress", "hat", "pants"]
    assert read_metadata(folder / "best.safetensors")["input"]["input_size"] == [3, 32, 32]
    prediction = zoo.predict(model, result.evaluation.paths[0])
    assert prediction.names[0] in model.class_names
    rows = list(csv.DictReader((folder / "per_class.csv").open()))
    assert sum(int(row["images"]) for row in rows) == 12
    epochs = [json.loads(line)["epoch"] for line in (folder / "history.jsonl").read_text().splitlines()]
    assert epochs == [1, 1, 2, 2], "one line for training and one for the evaluation of each epoch"


def test_the_best_weights_are_the_ones_that_were_evaluated(recipe):
    # with a fast-moving average the weights in training and the averaged ones differ clearly
    result = train(recipe.replace(ema_decay=0.9, epochs=3), quiet=True)
    recorded = read_metadata(result.weights)["scores"]["top1"]
    assert result.evaluation.scores["top1"] == pytest.approx(recorded, abs=1e-3)
    best, last = load_file(result.weights), load_file(Path(recipe.out) / "last.safetensors")
    assert any(not torch.equal(best[name], last[name]) for name in best)


def test_accumulated_steps_equal_one_large_step(recipe, tmp_path):
    weights = []
    for accumulate in (1, 4):
        run = recipe.replace(accumulate=accumulate, out=str(tmp_path / f"a{accumulate}"), epochs=1, optimizer="sgd")
        train(run, quiet=True)
        weights.append(load_file(Path(run.out) / "last.safetensors"))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-6)


def test_training_learns(recipe):
    result = train(recipe.replace(epochs=20, lr=5e-3, scale=(0.8, 1.0), color_jitter=None), quiet=True)
    history = [json.loads(line) for line in (Path(recipe.out) / "history.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in history if "loss" in record]
    assert losses[-1] < 0.8 * losses[0]
    assert result.evaluation.scores["top1"] > 45  # chance is 33


def test_multi_label_csv(recipe, photos, tmp_path):
    rows = [("image", "labels", "split")]
    for split in ("train", "val"):
        for i, path in enumerate(sorted((photos / split).rglob("*.jpg"))):
            labels = [path.parent.name] + (["even"] if i % 2 == 0 else [])
            rows.append((str(path.relative_to(photos)), "|".join(labels), split))
    with (photos / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    result = train(recipe.replace(data=str(photos / "labels.csv"), epochs=1), quiet=True)
    assert set(result.evaluation.scores) == {"mAP", "f1"}
    assert result.evaluation.targets.shape == (12, 4)
    per_class = list(csv.DictReader((Path(recipe.out) / "per_class.csv").open()))
    assert {row["class"] for row in per_class} == {"dress", "hat", "pants", "even"}
    with pytest.raises(ValueError, match="mixup and cutmix need one label"):
        train(recipe.replace(data=str(photos / "labels.csv"), mixup=0.5, out=str(tmp_path / "other")), quiet=True)


def test_a_teacher_pulls_the_student_towards_its_own_answers(recipe, tmp_path):
    teacher = train(recipe.replace(epochs=8, lr=3e-3, out=str(tmp_path / "teacher")), quiet=True)
    student = recipe.replace(teacher=str(teacher.weights), distill_weight=1.0, epochs=8, lr=3e-3, seed=7)
    taught = train(student.replace(out=str(tmp_path / "taught")), quiet=True)
    assert not any("teacher" in name for name in load_file(taught.weights))
    probabilities = teacher.evaluation.logits.softmax(1)
    fresh = torch.full_like(probabilities, 1 / 3)

    def divergence(q):
        return (probabilities * (probabilities.log() - q.log())).sum(1).mean()

    assert divergence(taught.evaluation.logits.softmax(1)) < divergence(fresh)


def test_a_teacher_of_other_classes_is_refused(recipe, tmp_path):
    model = timm.create_model("crate_tiny", num_classes=2, img_size=32, **TINY_CRATE)
    path = save_model(
        model, tmp_path / "t.safetensors", model_args={**TINY_CRATE, "img_size": 32}, class_names=["a", "b"]
    )
    with pytest.raises(ValueError, match="train the teacher on the same data first"):
        train(recipe.replace(teacher=str(path)), quiet=True)


def test_bf16_on_a_cpu(recipe):
    result = train(recipe.replace(precision="bf16", epochs=1), quiet=True)
    assert result.evaluation.logits.isfinite().all()
    assert all(v.dtype == torch.float32 for v in load_file(result.weights).values())


def test_fp16_on_a_cpu_is_refused_with_a_remedy(recipe):
    with pytest.raises(ValueError, match="fp16 needs a CUDA device, this run is on cpu: use bf16"):
        train(recipe.replace(precision="fp16"), quiet=True)
    assert not (Path(recipe.out) / "recipe.json").exists(), "a run that did not start does not claim its folder"


def test_a_linear_probe_changes_the_classifier_only(recipe, tmp_path):
    model = timm.create_model("crate_tiny", num_classes=3, img_size=32, **TINY_CRATE)
    start = save_model(model, tmp_path / "start.safetensors")
    train(recipe.replace(checkpoint=str(start), freeze_backbone=True, epochs=1), quiet=True)
    after = load_file(Path(recipe.out) / "last.safetensors")
    changed = {name for name, value in model.state_dict().items() if not torch.equal(after[name], value)}
    assert changed == {"head.weight", "head.bias"}


def test_a_classifier_of_another_size_is_replaced_when_fine_tuning(recipe, tmp_path):
    model = timm.create_model("crate_tiny", num_classes=7, img_size=32, **TINY_CRATE)
    start = save_model(model, tmp_path / "start.safetensors")
    lines = []
    result = train(recipe.replace(checkpoint=str(start), epochs=1), quiet=True, say=lines.append)
    assert any("classifier of the file was left out" in line for line in lines)
    assert result.evaluation.logits.shape[1] == 3


def test_layer_decay_slows_early_layers(recipe):
    model = timm.create_model("crate_tiny", num_classes=3, img_size=32, **TINY_CRATE)
    optimizer = build_optimizer(recipe.replace(layer_decay=0.5), model)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert scale[id(named["head.weight"])] == 1.0
    assert (
        scale[id(named["pos_embed"])]
        < scale[id(named["blocks.0.ista.weight"])]
        < scale[id(named["blocks.1.ista.weight"])]
    )


def test_any_timm_model_trains(recipe):
    result = train(recipe.replace(model="test_resnet", model_args={}, epochs=1, img_size=64), quiet=True)
    assert result.evaluation.logits.shape == (12, 3)
