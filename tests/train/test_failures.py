"""What goes wrong in training ends with one sentence, and nothing that was written before is lost."""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import zoo
from tests.train.conftest import command_line
from zoo.tools.main import main
from zoo.train.checkpoints import saved_checkpoints
from zoo.train.trainer import TrainingError, train


def test_a_nan_loss_stops_before_the_weights_and_says_where_the_last_good_ones_are(recipe, monkeypatch):
    from zoo.train.classification import Classification

    original = Classification.loss
    calls = []

    def poisoned(self, logits, inputs, targets, keys=None):
        calls.append(1)
        return original(self, logits, inputs, targets, keys) * (float("nan") if len(calls) == 7 else 1.0)

    monkeypatch.setattr(Classification, "loss", poisoned)
    with pytest.raises(TrainingError, match=r"the loss is nan at epoch 2, step 7 .*--clip-grad") as failure:
        train(recipe, quiet=True)
    (kept,) = saved_checkpoints(Path(recipe.out) / "checkpoints")
    assert str(kept) in str(failure.value)
    state = torch.load(kept, weights_only=True)["state_dict"]
    assert all(v.isfinite().all() for v in state.values() if v.is_floating_point())


def test_a_real_divergence_is_reported_too(recipe):
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf)"):
        train(recipe.replace(optimizer="sgd", lr=1e30, warmup_epochs=0, epochs=4), quiet=True)


def test_a_full_disk_keeps_earlier_checkpoints_and_says_so(recipe, tmp_path):
    train(recipe.replace(epochs=1), quiet=True)
    (checkpoint,) = saved_checkpoints(Path(recipe.out) / "checkpoints")
    before = checkpoint.read_bytes()
    # continue for one more epoch where no file may become as large as a checkpoint
    longer = recipe.replace(epochs=2)
    (Path(recipe.out) / "recipe.json").write_text(longer.to_json())
    limit = len(before) // 2

    def small_disk():
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails with an error, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [
        sys.executable,
        "-m",
        "zoo.tools.main",
        *command_line(longer, tmp_path / "r.json"),
        "--resume",
        "--quiet",
    ]
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_disk, env=os.environ)
    assert result.returncode == 1, result.stderr
    assert "no room to write" in result.stderr
    assert "--resume" in result.stderr
    assert "Traceback" not in result.stderr
    assert checkpoint.read_bytes() == before
    assert not list(checkpoint.parent.glob(".*.partial"))


def test_a_truncated_photo_is_named_before_the_first_step(recipe, photos):
    bad = next((photos / "train" / "hat").iterdir())
    bad.write_bytes(bad.read_bytes()[:500])
    with pytest.raises(ValueError, match=bad.name):
        train(recipe, quiet=True)
    assert not (Path(recipe.out) / "checkpoints").exists()


def test_unreadable_photos_can_be_left_out_and_are_counted_and_listed(recipe, photos):
    names = []
    for split in ("train", "val"):
        bad = next((photos / split / "hat").iterdir())
        bad.write_text("this is no picture")
        names.append(bad.name)
    lines = []
    train(recipe.replace(on_bad="skip", epochs=1), quiet=True, say=lines.append)
    assert any("2 unreadable" in line for line in lines)
    listed = (Path(recipe.out) / "left_out.txt").read_text()
    assert all(name in listed for name in names)


def test_an_empty_class_folder_is_reported(recipe, photos):
    (photos / "train" / "zebra").mkdir()
    lines = []
    train(recipe.replace(epochs=1), quiet=True, say=lines.append)
    assert any("zebra" in line for line in lines)


def test_a_checkpoint_of_another_model_is_refused_with_a_sentence(recipe, tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"conv.weight": torch.zeros(4, 3, 3, 3), "fc.weight": torch.zeros(2, 4)}, path)
    with pytest.raises(zoo.CheckpointError, match="does not fit crate_tiny: it is a checkpoint of another model"):
        train(recipe.replace(checkpoint=str(path)), quiet=True)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_checkpoint_with_a_pickled_object_runs_no_code(recipe, tmp_path):
    trap = tmp_path / "executed"
    path = tmp_path / "evil.pth"
    with path.open("wb") as file:
        pickle.dump({"state_dict": Payload(str(trap))}, file)
    with pytest.raises(zoo.CheckpointError):
        train(recipe.replace(checkpoint=str(path)), quiet=True)
    torch.save({"state_dict": {"x": torch.zeros(1)}, "args": Payload(str(trap))}, path)
    with pytest.raises(zoo.CheckpointError, match="does not fit"):
        zoo.load_checkpoint(torch.nn.Linear(1, 1), path)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--lr", "-1"], "lr is -1.0, expected above 0"),
        (["--model", "crate_tiny_typo"], "no model is called 'crate_tiny_typo'"),
        (["--recipe", "finetun"], "did you mean finetune"),
        (["--data", "/nowhere/photos"], "/nowhere/photos"),
        (["--batch-size", "7", "--accumulate", "2"], "a divisor of batch_size"),
        (["--batch-size", "4096"], "fewer than batch_size"),
        (["--model-args", '{"dept": 3}'], "does not take these arguments"),
        (["--pretrained"], "pretrained weights of crate_tiny"),
    ],
)
def test_bad_arguments_end_with_status_2_and_a_sentence(flags, sentence, photos, tmp_path, capsys):
    base = ["train", "--data", str(photos), "--model", "crate_tiny", "--img-size", "32", "--out", str(tmp_path / "run")]
    status = main([*base, "--workers", "0", "--quiet", *flags])
    error = capsys.readouterr().err
    assert status in (1, 2)
    assert sentence in error
    assert len(error.strip().splitlines()) == 1


def test_the_disk_error_of_a_full_device_is_recognised(tmp_path):
    from zoo.train.checkpoints import AtomicBackend, DiskFullError

    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    target = tmp_path / "step_00000001.pth"
    (tmp_path / f".{target.name}.partial").symlink_to(full)
    with pytest.raises(DiskFullError, match="No space left"):
        AtomicBackend().put(b"x" * 10_000_000, target)
    assert not target.exists()
