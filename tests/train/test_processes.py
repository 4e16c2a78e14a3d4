"""Several processes train as one, whole or sharded; a lost one ends the job with a sentence; files stay usable."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.conftest import command_line
from zoo.train.checkpoints import saved_checkpoints
from zoo.train.processes import set_slurm_environment, was_restarted
from zoo.train.trainer import train

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="looks into /proc")

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(recipe, folder: Path, *options: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    arguments = command_line(recipe, folder / "recipe_of_processes.json")
    command = [sys.executable, *TORCHRUN, *launcher, "-m", "zoo.tools.main", *arguments, "--quiet", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finished(process: subprocess.Popen) -> str:
    output, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors[-6000:]
    return output


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def assert_same_training(one: Path, other: Path, epochs: slice = slice(None)) -> None:
    assert losses(other)[epochs] == pytest.approx(losses(one)[epochs], rel=1e-4)
    left, right = load_file(one / "last.safetensors"), load_file(other / "last.safetensors")
    assert left.keys() == right.keys()
    for name, value in left.items():  # sums in another order: equal up to rounding
        torch.testing.assert_close(right[name], value, rtol=1e-3, atol=1e-5)


def wait_for_checkpoint(folder: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints").is_dir() or not saved_checkpoints(folder / "checkpoints"):
        assert process.poll() is None, process.stderr.read()[-2000:]
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.02)


def kill_rank(process: subprocess.Popen, number: int) -> None:
    """SIGKILL for the training process of that rank: torchrun's child, not one of its data workers."""
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if f"RANK={number}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            os.kill(int(child), signal.SIGKILL)
            return
    raise AssertionError(f"no process of rank {number}")


@pytest.mark.slow
def test_sharded_processes_end_with_the_weights_of_one_and_go_on_unsharded(recipe, tmp_path):
    recipe = recipe.replace(ema_decay=0.9, clip_grad=1.0, checkpoint_interval=3, keep_checkpoints=3)
    one, two = tmp_path / "one", tmp_path / "two"
    train(recipe.replace(out=str(one)), quiet=True)
    sharded = recipe.replace(out=str(two), parallel="fsdp")
    finished(torchrun(sharded, tmp_path))
    assert_same_training(one, two)
    # its checkpoints are whole: one process without shards continues from an earlier one
    early, *late = saved_checkpoints(two / "checkpoints")
    for path in late:
        path.unlink()
    content = torch.load(early, weights_only=True)
    assert content["optimizer"]["state"][0]["exp_avg"].shape == next(iter(content["state_dict"].values())).shape
    train(sharded.replace(parallel="ddp"), resume=True, quiet=True, say=lambda _: None)
    assert_same_training(one, two, slice(1, None))  # the resumed epoch's mean is over its later steps


@pytest.mark.slow
def test_a_killed_process_ends_the_job_with_a_sentence_and_one_alone_finishes_it(recipe, tmp_path):
    recipe = recipe.replace(epochs=12, val_interval=12, checkpoint_interval=3)
    out = Path(recipe.out)
    process = torchrun(recipe, tmp_path)
    wait_for_checkpoint(out, process)
    kill_rank(process, 1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "zoo train: process 0 of 2" in errors
    assert "continue with --resume" in errors
    lines: list[str] = []
    train(recipe, resume=True, quiet=True, say=lines.append)
    assert any("resuming from" in line for line in lines)
    train(recipe.replace(out=str(tmp_path / "one")), quiet=True)
    assert_same_training(tmp_path / "one", out, slice(-1, None))


@pytest.mark.slow
def test_torchrun_starts_a_job_again_that_goes_on_where_it_was_and_ends_as_one_process(recipe, tmp_path):
    recipe = recipe.replace(epochs=8, val_interval=8, checkpoint_interval=2)
    train(recipe.replace(out=str(tmp_path / "one")), quiet=True)
    two = recipe.replace(out=str(tmp_path / "two"))
    process = torchrun(two, tmp_path, launcher=("--max-restarts", "1"))
    wait_for_checkpoint(tmp_path / "two", process)
    kill_rank(process, 1)
    assert "resuming from" in finished(process)
    assert_same_training(tmp_path / "one", tmp_path / "two", slice(-1, None))


def test_sigterm_says_where_the_run_can_go_on(recipe, tmp_path):
    recipe = recipe.replace(epochs=200, checkpoint_interval=3)
    arguments = command_line(recipe, tmp_path / "recipe_of_processes.json")
    command = [sys.executable, "-m", "zoo.tools.main", *arguments, "--quiet"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_checkpoint(Path(recipe.out), process)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the run was stopped by SIGTERM" in errors
    assert "continue with --resume" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node[01-04,07]", "node01"), ("a12,b13", "a12"), ("gpu-3", "gpu-3"), ("rack[2-3]-ib,x", "rack2-ib")],
)
def test_slurms_variables_become_torchruns(nodes, first):
    environment = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "40123"}
    environment |= {"SLURM_JOB_NODELIST": nodes, "MASTER_PORT": "29555"}
    set_slurm_environment(environment)
    assert [environment[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["5", "8", "1"]
    assert environment["MASTER_ADDR"] == first
    assert environment["MASTER_PORT"] == "29555"  # what the user chose stays


def test_a_requeued_job_goes_on_by_itself(monkeypatch, recipe):
    assert not was_restarted()
    train(recipe.replace(epochs=1), quiet=True)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lines: list[str] = []
    train(recipe.replace(epochs=1), quiet=True, say=lines.append)
    assert any("resuming from" in line for line in lines)
