"""`zoo export`, `zoo predict model.onnx` and `zoo bench models` as a user meets them."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from PIL import Image

from tests.train.conftest import CLOTHING, TINY_CRATE
from zoo.saving import save_model
from zoo.tools import bench_models
from zoo.tools.bench_plot import plot
from zoo.tools.main import main
from zoo.tools.timing import in_turns, spread

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    model = timm.create_model("crate_tiny", num_classes=3, img_size=32, **TINY_CRATE)
    return save_model(
        model,
        tmp_path_factory.mktemp("weights") / "model.safetensors",
        model_args={**TINY_CRATE, "img_size": 32},
        class_names=["dress", "hat", "pants"],
        input_config={"input_size": (3, 32, 32)},
    )


def test_a_file_is_exported_and_predicts_as_its_source(weights, tmp_path, capsys):
    photo = next((CLOTHING / "val" / "hat").iterdir())
    assert main(["export", str(weights), "--out", str(tmp_path / "model.onnx"), "--images", str(photo)]) == 0
    assert "largest difference" in capsys.readouterr().out
    records = []
    for number, model in enumerate((weights, tmp_path / "model.onnx")):
        out = tmp_path / str(number)
        assert main(["predict", str(model), str(photo), "--topk", "2", "--out", str(out), "--device", "cpu"]) == 0
        records.append(json.loads((out / "predictions.json").read_text())[0]["predictions"])
        assert Image.open(out / f"{photo.stem}.png").width > 200
    for first, second in zip(*records, strict=True):
        assert first["name"] == second["name"]
        assert first["score"] == pytest.approx(second["score"], abs=1e-4)
    assert main(["predict", str(tmp_path / "model.onnx"), str(photo), "--task", "detection"]) == 2
    assert "is a model of classification" in capsys.readouterr().err


@pytest.fixture
def three_classes(tmp_path):
    folder = tmp_path / "photos" / "val"
    folder.mkdir(parents=True)
    for name in ("dress", "hat", "pants"):
        (folder / name).symlink_to((CLOTHING / "val" / name).resolve(), target_is_directory=True)
    return folder.parent


def test_a_file_is_evaluated_as_its_source(weights, three_classes, tmp_path, capsys):
    assert main(["export", str(weights), "--out", str(tmp_path / "model.onnx"), "--static-size"]) == 0
    found = []
    for number, file in enumerate((weights, tmp_path / "model.onnx")):
        out = tmp_path / str(number)
        arguments = ["eval", str(file), "--data", str(three_classes), "--out", str(out), "--workers", "0"]
        assert main([*arguments, "--record", "--results", str(tmp_path / "results.jsonl")]) == 0
        found.append([json.loads((out / "results.json").read_text())["scores"], (out / "per_class.csv").read_text()])
    assert "float32, 32x32 only, by ONNX Runtime" in capsys.readouterr().out
    assert found[0] == found[1]
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [r["settings"]["precision"] for r in records] == ["float32", "float32 in ONNX Runtime"]
    assert [r["file"] for r in records] == ["model.safetensors", "model.onnx"]

    for more, sentence in (
        (["--img-size", "40"], "takes images of 32x32 only, these are 40x40"),
        (["--fold"], "leave --fold and --precision out"),
        (["--model", "crate_tiny"], "holds its model whole"),
        (["--device", "cuda"], "runs on the CPU"),
    ):
        assert main([*arguments, *more]) == 2
        assert sentence in capsys.readouterr().err


def test_wrong_exports_are_one_sentence(weights, tmp_path, capsys):
    for arguments, sentence in (
        ([str(weights), "--format", "pt2", "--out", str(tmp_path / "m.onnx")], "is no name for pt2"),
        ([str(weights), "--precision", "fp16", "int8", "--out", str(tmp_path / "m.onnx")], "give a folder as --out"),
        (["crate_tiny"], "random weights: give --checkpoint"),
        (["crate_tinny"], "no file and no model is called 'crate_tinny'"),
        ([str(weights), "--batch-size", "0"], "pass at least 1"),
        (["none.safetensors"], "no checkpoint at none.safetensors"),
    ):
        assert main(["export", *arguments]) == 2
        assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_turns_begin_with_another_call_each_round():
    seen, now = [], iter(range(1000))
    calls = {name: lambda name=name: seen.append(name) for name in "abc"}
    times = in_turns(calls, 3, torch.device("cpu"), clock=lambda: float(next(now)), warm_up=0)
    assert "".join(seen) == "abcbcacab"
    assert times == {name: [1.0] * 3 for name in "abc"}
    assert spread([1.0, 2.0, 3.0]) == (2.0, 1.2, 2.8)
    assert spread([4.0]) == (4.0, 4.0, 4.0)


def test_models_are_measured_side_by_side(weights, tmp_path, capsys):
    file, picture = tmp_path / "rows.json", tmp_path / "plot.png"
    arguments = ["bench", "models", "stdc1", str(weights), "--forms", "eager,folded", "--img-size", "32"]
    arguments += ["--repeats", "2", "--batch-size", "2", "--no-memory", "--device", "cpu", "--json", str(file)]
    arguments += ["--plot", str(picture)]
    assert main(arguments) == 0
    assert "| stdc1 | folded | 32x32 |" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["rounds"] == 2
    assert [(row["model"], row["form"]) for row in found["rows"]] == [
        (name, form) for name in ("stdc1", str(weights)) for form in ("eager", "folded")
    ]
    first = found["rows"][0]
    assert first["speed_relative_to_first"] == {"median": 1, "p10": 1, "p90": 1}
    assert first["latency_ms"]["p10"] <= first["latency_ms"]["median"] <= first["latency_ms"]["p90"]
    assert first["parameters"] > 5e6
    assert first["images_per_second"] > 0
    assert first["memory_bytes"] is None
    assert Image.open(picture).width > 600


def test_memory_is_the_largest_sum_of_tensors_alive_at_once():
    number = 1_000_000
    assert bench_models.peak_of_tensors(lambda: torch.zeros(number).add(1)) == pytest.approx(8 * number, rel=1e-3)
    in_turn = bench_models.peak_of_tensors(lambda: [torch.zeros(number).sum() for _ in range(3)])
    assert in_turn == pytest.approx(4 * number, rel=1e-3)


def test_every_form_has_a_row_with_its_memory(weights, tmp_path):
    file = tmp_path / "rows.json"
    arguments = ["bench", "models", str(weights), "--forms", "eager,folded,onnx", "--repeats", "2", "--batch-size", "4"]
    assert main([*arguments, "--device", "cpu", "--json", str(file)]) == 0
    rows = {row["form"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == ["eager", "folded", "onnx"]
    image = 4 * 3 * 32 * 32  # bytes
    for form in ("eager", "folded"):
        assert image < rows[form]["memory_bytes"] < 1e8
    # the runtime's is read from the system, where that can be done
    assert rows["onnx"]["memory_bytes"] is None  # not a number that means something else
    assert all(row["latency_ms"]["median"] > 0 for row in rows.values())


@pytest.mark.slow
def test_the_compiled_form_has_a_row(weights):
    settings = bench_models.Settings(forms=("eager", "compiled"), repeats=2, batch_size=0)
    compiled = bench_models.measure([str(weights)], settings)[1]
    assert compiled.form == "compiled"
    assert compiled.latency[0] > 0
    assert compiled.memory > 0


def test_a_plot_has_every_model_with_a_claim(tmp_path):
    one = (0.01, 0.009, 0.011)
    rows = [
        bench_models.Row(name, form, (3, 224, 224), 1, 1, one, one, rate, None, claim)
        for name, claim in (("crate_tiny", 66.7), ("fcaformer_l1", 80.3), ("nobody", None))
        for form, rate in (("eager", 20.0), ("onnx", 30.0))
    ]
    plot(rows, tmp_path / "plot.png", "test")
    assert min(Image.open(tmp_path / "plot.png").size) > 600
    with pytest.raises(ValueError, match="nothing to plot"):
        plot(rows[-1:], tmp_path / "none.png", "test")
    assert bench_models.claimed_accuracy("crate_tiny") == 66.7
    assert bench_models.claimed_accuracy("nobody") is None


def test_names_and_settings_are_checked(tmp_path):
    assert bench_models.find_models(["crate_ti*", "stdc1", "crate_tiny"]) == ["crate_tiny", "stdc1"]
    for pattern in ("crate_tinny", "zzz*", str(tmp_path / "none.safetensors")):
        with pytest.raises(ValueError, match=r"no model is called|no file"):
            bench_models.find_models([pattern])
    cpu = torch.device("cpu")
    for settings, sentence in (
        (dict(forms=("fast",)), "form 'fast' is unknown"),
        (dict(forms=()), "no forms"),
        (dict(precision="int3"), "precision 'int3'"),
        (dict(repeats=0), "at least 1"),
        (dict(forms=("onnx",), precision="bf16"), "in float32"),
    ):
        with pytest.raises(ValueError, match=sentence):
            bench_models.measure(["stdc1"], bench_models.Settings(device=cpu, **settings))
