"""PRepBN in a training run: gamma follows the recipe's schedule, and a resumed run continues it exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from zoo.prepbn import PRepBN, PRepBNSchedule
from zoo.saving import load_model
from zoo.train.checkpoints import saved_checkpoints
from zoo.train.trainer import train

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
STEPS = 8  # two epochs of 36 images in batches of 8


@pytest.fixture
def slab(recipe):
    """Four steps of the LayerNorm fading out, one before them with it alone, three with the BatchNorm alone."""
    return recipe.replace(
        model="deit_t_prepbn",
        model_args=TINY | {"norm_layer": "prepbn"},
        param_groups="family",
        prepbn_share=5 / STEPS,
        prepbn_warmup=1 / STEPS,
        recalibrate_epochs=1,
    )


@pytest.fixture
def gammas(monkeypatch):
    """(step, the schedule's gamma, what the first norm of the model computes from its counters) of each pass."""
    seen = []
    original = PRepBNSchedule.before_step

    def recorded(self, model, step):
        gamma = original(self, model, step)
        norm = next(module for module in model.modules() if isinstance(module, PRepBN))
        seen.append((step, gamma, norm.next_gamma().item()))
        return gamma

    monkeypatch.setattr(PRepBNSchedule, "before_step", recorded)
    return seen


def test_gamma_falls_from_one_to_zero_as_the_recipe_says(slab, gammas):
    result = train(slab, quiet=True)
    expected = [1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0] + [0.0] * 4  # four passes of the recalibration
    assert [step for step, _, _ in gammas] == list(range(12))
    assert [gamma for _, gamma, _ in gammas] == expected
    assert [gamma for _, _, gamma in gammas] == expected
    norm = next(m for m in load_model(result.weights).modules() if isinstance(m, PRepBN))
    assert norm.norm2.bn.running_mean.abs().sum() > 0


def test_passes_of_one_step_share_its_gamma(slab, gammas):
    train(slab.replace(accumulate=2, epochs=1, recalibrate_epochs=0), quiet=True)
    assert [step for step, _, _ in gammas] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("stop", [3, 10])  # inside the first epoch, and inside the recalibration
def test_a_resumed_run_ends_with_identical_weights(slab, stop):
    run = slab.replace(
        checkpoint_interval=1,
        keep_checkpoints=20,
        drop_path=0.2,
        mixup=0.2,
        random_erasing=0.3,
        repeated_augmentation=2,
        rand_augment="torchvision-n2-m7",
    )
    train(run, quiet=True)
    last = Path(run.out) / "last.safetensors"
    reference = load_file(last)
    last.unlink()
    checkpoints = saved_checkpoints(Path(run.out) / "checkpoints")
    for later in checkpoints[stop:]:
        later.unlink()
    lines: list[str] = []
    train(run, resume=True, quiet=True, say=lines.append)
    assert any(f"resuming from {checkpoints[stop - 1]}" in line for line in lines)
    resumed = load_file(last)
    assert resumed.keys() == reference.keys()
    assert not [name for name in reference if not torch.equal(reference[name], resumed[name])]


def test_averaged_weights_carry_the_counters_of_the_trained_ones(slab):
    result = train(slab.replace(recalibrate_epochs=0, ema_decay=0.9), quiet=True)
    best, last = load_file(result.weights), load_file(Path(slab.out) / "last.safetensors")
    steps = result.best_epoch * STEPS // 2
    counters = [name for name in last if name.endswith("num_batches_tracked")]
    assert {best[name].item() for name in counters} == {steps - 1}, "without the step of the LayerNorm alone"
    left = {best[name].item() for name in best if name.endswith(".iter")}
    assert left == {max(0, 5 - (steps - 1))}, "as set for the last step, the fade ends at step 5"


def test_recalibration_renews_the_statistics_and_nothing_else(slab, tmp_path):
    train(slab.replace(recalibrate_epochs=0, out=str(tmp_path / "without")), quiet=True)
    train(slab, quiet=True)
    without, renewed = (load_file(Path(folder) / "last.safetensors") for folder in (tmp_path / "without", slab.out))
    changed = {name.rsplit(".", 1)[-1] for name in without if not torch.equal(without[name], renewed[name])}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}
    history = [json.loads(line) for line in (Path(slab.out) / "history.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in history] == [1, 1, 2, 2, 3, 3]


def test_a_schedule_of_gamma_for_a_model_without_prepbn_is_refused(recipe):
    with pytest.raises(ValueError, match=r"prepbn_share is 0\.8, but crate_tiny has no PRepBN: leave it unset"):
        train(recipe.replace(prepbn_share=0.8), quiet=True)
