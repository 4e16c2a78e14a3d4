"""A run that was killed at any step and resumed ends with the very weights of one that was not."""

from __future__ import annotations

import os
import random
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
from zoo.train.loading import EpochSampler
from zoo.train.trainer import train


def weights_of(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "last.safetensors")


def assert_identical(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, f"{len(different)} of {len(left)} tensors differ: {different[:5]}"


@pytest.mark.slow
def test_killed_and_resumed_ends_with_identical_weights(recipe, tmp_path):
    # everything random is on: augmentation in two workers, mixup, drop path, dropout; and everything with a
    # state: AdamW's moments, the average, accumulation over two forward passes
    recipe = recipe.replace(
        epochs=6,
        workers=2,
        accumulate=2,
        mixup=0.2,
        cutmix=1.0,
        rand_augment="rand-m5",
        random_erasing=0.3,
        drop_path=0.2,
        drop_rate=0.1,
        ema_decay=0.9,
        clip_grad=1.0,
        checkpoint_interval=2,
    )
    whole = recipe.replace(out=str(tmp_path / "whole"))
    train(whole, quiet=True)

    killed = recipe.replace(out=str(tmp_path / "killed"))
    command = [sys.executable, "-m", "zoo.tools.main", *command_line(killed, tmp_path / "killed.json"), "--quiet"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    checkpoints = Path(killed.out) / "checkpoints"
    waited = random.Random()
    wanted = waited.randrange(1, 8)  # how many saves to see before the kill: another step in every run
    seen: set[Path] = set()
    deadline = time.monotonic() + 300
    while len(seen) < wanted and process.poll() is None:
        assert time.monotonic() < deadline, "no checkpoint appeared"
        seen.update(saved_checkpoints(checkpoints) if checkpoints.is_dir() else [])
        time.sleep(0.005)
    time.sleep(waited.random() * 0.1)
    finished = process.poll() is not None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not finished or process.returncode == 0, process.stderr.read().decode()[-2000:]

    lines: list[str] = []
    train(killed, resume=True, quiet=True, say=lines.append)
    assert any("resuming from" in line for line in lines)
    assert_identical(weights_of(whole.out), weights_of(killed.out))


def test_a_resumed_epoch_begins_with_the_batch_that_was_next():
    sampler = EpochSampler(20, batch_size=4, seed=3)
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.set_epoch(2, start_batch=3)
    assert list(sampler) == whole[12:]


def test_every_process_gets_its_own_share_of_each_epoch():
    shares = []
    for rank in range(3):
        sampler = EpochSampler(31, batch_size=2, seed=0, rank=rank, world_size=3)
        sampler.set_epoch(1)
        shares.append([index for _, index in sampler])
    assert len({len(share) for share in shares}) == 1
    used = [index for share in shares for index in share]
    assert len(used) == len(set(used)) == 30  # the incomplete batch is left out


def test_the_order_changes_with_the_epoch_and_not_with_the_number_of_workers():
    sampler = EpochSampler(40, batch_size=8, seed=0)
    sampler.set_epoch(0)
    first = [index for _, index in sampler]
    sampler.set_epoch(1)
    second = [index for _, index in sampler]
    assert first != second
    assert sorted(first) == sorted(second) == list(range(40))


def test_same_seed_gives_same_weights_whatever_the_number_of_workers(recipe, tmp_path):
    results = []
    for workers in (0, 1):
        run = recipe.replace(workers=workers, out=str(tmp_path / f"workers{workers}"), epochs=1)
        train(run, quiet=True)
        results.append(weights_of(run.out))
    assert_identical(*results)


def test_an_evaluation_that_the_kill_prevented_is_made_up_for(recipe, tmp_path):
    train(recipe, quiet=True)
    folder = Path(recipe.out)
    reference, history = ((folder / name).read_text() for name in ("results.json", "history.jsonl"))
    # the state right after the last step: checkpoint written, nothing evaluated yet
    for name in ("last.safetensors", "results.json"):
        (folder / name).unlink()
    newest = saved_checkpoints(folder / "checkpoints")[-1]
    content = torch.load(newest, weights_only=True)
    assert content["message_hub"]["runtime_info"].get("validated_epoch", 0) == recipe.epochs - 1
    train(recipe, resume=True, quiet=True, say=lambda _: None)
    assert (folder / "results.json").read_text() == reference
    assert (folder / "history.jsonl").read_text() == history, "no evaluation stands there twice"


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(recipe, tmp_path):
    train(recipe.replace(checkpoint_interval=3), quiet=True)
    checkpoints = saved_checkpoints(Path(recipe.out) / "checkpoints")
    assert len(checkpoints) == 2, "the last two are kept"
    newest = checkpoints[-1]
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    reference = weights_of(recipe.out)
    lines: list[str] = []
    train(recipe.replace(checkpoint_interval=3), resume=True, quiet=True, say=lines.append)
    assert any("damaged" in line and newest.name in line for line in lines)
    assert any(f"resuming from {checkpoints[0]}" in line for line in lines)
    assert_identical(reference, weights_of(recipe.out))


def test_resuming_with_another_recipe_is_refused_with_what_changed(recipe):
    train(recipe.replace(epochs=1), quiet=True)
    with pytest.raises(ValueError, match=r"lr was 0\.002, is 0\.1"):
        train(recipe.replace(epochs=1, lr=0.1), resume=True, quiet=True)


def test_a_folder_that_holds_a_run_is_not_overwritten(recipe):
    train(recipe.replace(epochs=1), quiet=True)
    with pytest.raises(ValueError, match="already holds a run"):
        train(recipe.replace(epochs=1), quiet=True)


def test_checkpoints_hold_no_pickled_objects(recipe):
    train(recipe.replace(epochs=1, ema_decay=0.9), quiet=True)
    for path in saved_checkpoints(Path(recipe.out) / "checkpoints"):
        content = torch.load(path, weights_only=True)
        assert content["message_hub"]["log_scalars"]["train/loss"]["values"].dtype == torch.float64
