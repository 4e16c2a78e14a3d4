"""From a recipe to trained weights, a report and pictures."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm

from zoo.extras import require
from zoo.train.checkpoints import (
    CheckpointHook,
    DiskFullError,
    PlainHistoryHook,
    newest_readable_checkpoint,
    saved_checkpoints,
)
from zoo.train.classification import NonFiniteLossError
from zoo.train.engine import (
    BestWeightsHook,
    ExactTrainLoop,
    LearningRateHook,
    ProgressHook,
    QuietRunner,
    StepSeedHook,
    WarmEma,
    build_optim_wrapper,
    pick_device,
    unwrapped,
)
from zoo.train.loading import EpochSampler, seed_everything
from zoo.train.processes import StoppedError, clear_ends, start_processes, was_restarted
from zoo.train.recipe import Recipe
from zoo.train.sharding import GatheredValLoop, SplitCheckpointHook, is_sharded, shard, whole
from zoo.train.tasks.base import Task, find_task

require("mmengine", extra="train")

from mmengine.dist import barrier, get_dist_info, is_distributed, is_main_process  # noqa: E402
from mmengine.runner import Runner, ValLoop  # noqa: E402

# Fields that a resumed run may change: they do not change which weights come out.
_FREE_FIELDS = {"out", "workers", "device", "keep_checkpoints", "checkpoint_interval", "val_interval", "parallel"}


class TrainingError(RuntimeError):
    """A run that cannot go on. The message says why, what was kept, and what to do."""


@dataclass(frozen=True)
class TrainingResult:
    """What a run ended with: the evaluation of the best weights, where they are, and when they were reached."""

    evaluation: Any
    weights: Path
    best_epoch: int
    folder: Path
    table: str


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    say: Callable[[str], None] = print,
    quiet: bool = False,
) -> TrainingResult:
    """Train as the recipe says and evaluate the best weights.

    The folder `recipe.out` then holds: `recipe.json`; `checkpoints/` for `resume`; `best.safetensors` and
    `last.safetensors` (for `zoo.saving.load_model`); `history.jsonl`; `curves.png`; `results.md`, `results.json`,
    `per_class.csv`, `confusion.png`, `worst_mistakes.png`, `predictions.png`; `log/log.txt`.

    Args:
        recipe: every setting.
        resume: continue the run in `recipe.out` where its newest checkpoint stands. A job that its launcher
            restarted (torchrun's --max-restarts, Slurm's requeue) always does.
        say: takes the lines that a user reads.
        quiet: no progress bar and no line an epoch.

    Raises:
        ValueError: a setting does not fit (named).
        TrainingError: the loss became NaN, there is no room for a checkpoint, another process died, or the run was
            told to stop (SIGTERM); earlier checkpoints are intact.
        ImageError: an image could not be read; it is named.
    """
    folder = Path(recipe.out)
    start_processes()
    resume = resume or was_restarted()
    if not is_main_process():
        say, quiet = (lambda line: None), True
    _check_folder(folder, recipe, resume, say)
    device = pick_device(recipe.device)
    rank, world = get_dist_info()
    if recipe.batch_size % (world * recipe.accumulate):
        raise ValueError(
            f"batch_size is {recipe.batch_size}, expected a multiple of "
            f"processes x accumulate = {world * recipe.accumulate}"
        )
    forward_size = recipe.batch_size // (world * recipe.accumulate)

    task = find_task(recipe.task)(recipe, say)
    sampler = EpochSampler(
        len(task.train_set),
        forward_size,
        recipe.seed,
        rank,
        world,
        recipe.accumulate,
        task.repeats,
        epoch_steps=recipe.epoch_steps,
    )
    seed_everything(recipe.seed)
    objective = task.build(say)
    if recipe.channels_last:
        objective.model.to(memory_format=torch.channels_last)
    if recipe.sync_bn and world > 1:
        if not device.startswith("cuda"):
            raise ValueError(f"sync_bn needs CUDA devices, this run is on {device}: leave it off")
        objective.model = convert_sync_batchnorm(objective.model)
    sharded = recipe.parallel == "fsdp" and world > 1
    if sharded:
        shard(objective.model, device)
    optimizer = task.optimizer(objective.model)

    hooks = [
        StepSeedHook(recipe.seed),
        LearningRateHook(recipe),
        ProgressHook(folder, forward_size * world, task.metric, quiet),
        BestWeightsHook(
            task.metric,
            lambda model, scores, epoch: _save_weights(
                task, model, folder / "best.safetensors", scores=scores, epoch=epoch
            ),
            lower_is_better=task.lower_is_better,
        ),
        CheckpointHook(
            folder / "checkpoints",
            recipe.checkpoint_interval or sampler.batches,
            recipe.accumulate,
            recipe.keep_checkpoints,
        ),
        PlainHistoryHook(),
    ]
    if recipe.ema_decay is not None:
        from mmengine.hooks import EMAHook

        # buffers are averaged too: batch norm's statistics must belong to the averaged weights
        hooks.append(EMAHook(WarmEma, momentum=1 - recipe.ema_decay, interval=recipe.accumulate, update_buffers=True))
    if sharded:
        hooks.append(SplitCheckpointHook())
    hooks += task.hooks()
    if recipe.compile:
        objective.model.compile()  # in place: state dict and attributes stay as they are
    start_from = _checkpoint_to_resume(folder, resume, say)
    with _mmengine_device(device):
        runner = QuietRunner(
            model=objective,
            work_dir=str(folder / "log"),
            train_dataloader=task.train_loader(sampler, forward_size),
            val_dataloader=task.val_loader(forward_size),
            train_cfg=dict(
                type=ExactTrainLoop,
                max_epochs=recipe.total_epochs,
                val_interval=recipe.val_interval,
                **task.loop_options(),
            ),
            val_cfg=dict(type=GatheredValLoop if sharded else ValLoop),
            val_evaluator=[task.build_metric()],
            optim_wrapper=build_optim_wrapper(recipe, optimizer, device),
            default_hooks=dict(logger=None, checkpoint=None, param_scheduler=None, sampler_seed=None, timer=None),
            custom_hooks=hooks,
            resume=start_from is not None,
            load_from=str(start_from) if start_from else None,
            launcher="pytorch" if is_distributed() else "none",
            randomness=dict(seed=recipe.seed, deterministic=recipe.deterministic),
            # mmengine keeps one history for each name of an experiment: two runs must not share it
            experiment_name=f"{folder.name}_{uuid.uuid4().hex[:12]}",
            visualizer=dict(type="Visualizer", vis_backends=[]),
        )
        barrier()  # every process has looked at the folder before the first one claims it
        if is_main_process():
            (folder / "recipe.json").write_text(recipe.to_json())
        try:
            with clear_ends():
                runner.train()
        except StoppedError as error:
            raise TrainingError(f"{error}: {_what_is_kept(folder)}") from error
        except NonFiniteLossError as error:
            raise TrainingError(_explain_nan(error, runner, recipe, folder)) from error
        except DiskFullError as error:
            raise TrainingError(str(error)) from error

    result = None
    _save_weights(task, unwrapped(runner.model).model, folder / "last.safetensors", epoch=recipe.total_epochs)
    if is_main_process():
        best_epoch = runner.message_hub.runtime_info.get("best_epoch", recipe.total_epochs)
        weights = folder / "best.safetensors"
        evaluation, table = task.report(
            weights,
            folder,
            title=f"{recipe.model} on {Path(recipe.data).name}, epoch {best_epoch}",
            batch_size=forward_size,
            device=device,
            progress=not quiet,
        )
        result = TrainingResult(evaluation, weights, best_epoch, folder, table)
    return result


def _save_weights(task: Task, model: torch.nn.Module, path: Path, **metadata: Any) -> None:
    """Write a weight file on the main process; every process calls it, since a sharded model is gathered."""
    state = whole(model.state_dict()) if is_sharded(model) else None
    if is_main_process():
        task.save_weights(model, path, state_dict=state, **metadata)


def _check_folder(folder: Path, recipe: Recipe, resume: bool, say: Callable[[str], None]) -> None:
    saved = folder / "recipe.json"
    if resume and not saved.is_file():
        say(f"nothing to resume in {folder}: starting from the beginning")
    elif resume:
        old, new = (dataclasses.asdict(r) for r in (type(recipe).load(saved), recipe))
        changed = [f"{k} was {old[k]!r}, is {new[k]!r}" for k in new if old[k] != new[k] and k not in _FREE_FIELDS]
        if changed:
            raise ValueError(f"the run in {folder} had another recipe ({'; '.join(changed)}): give the same one")
    elif saved.is_file():
        raise ValueError(f"{folder} already holds a run: continue it with resume, or choose another folder")


def _checkpoint_to_resume(folder: Path, resume: bool, say: Callable[[str], None]) -> Path | None:
    if not resume:
        return None
    path, remarks = newest_readable_checkpoint(folder / "checkpoints")
    for remark in remarks:
        say(f"left out a damaged checkpoint: {remark}")
    if path is not None:
        say(f"resuming from {path}")
    return path


def _what_is_kept(folder: Path) -> str:
    saved = saved_checkpoints(folder / "checkpoints")
    if not saved:
        return "no checkpoint was written yet, start the same command again"
    step = int(saved[-1].stem.removeprefix("step_"))
    return f"the state after step {step} is in {saved[-1]}, continue with --resume"


class _mmengine_device:  # noqa: N801 - reads as a statement
    """Make mmengine use the device that was asked for; it has no argument for it."""

    def __init__(self, device: str):
        self.device = device

    def __enter__(self) -> None:
        from mmengine.device import utils

        self.previous, utils.DEVICE = utils.DEVICE, self.device.split(":")[0]

    def __exit__(self, *_) -> None:
        from mmengine.device import utils

        utils.DEVICE = self.previous


def _explain_nan(error: Exception, runner: Runner, recipe: Recipe, folder: Path) -> str:
    rate = max(g["lr"] for g in runner.optim_wrapper.optimizer.param_groups)
    remedies = [] if recipe.clip_grad else ["--clip-grad 1.0"]
    remedies += [
        "a lower --lr",
        "--precision float32" if recipe.precision != "float32" else "a longer --warmup-epochs",
    ]
    kept, _ = newest_readable_checkpoint(folder / "checkpoints")
    state = f"the state before it is in {kept}" if kept else "no checkpoint was written before it"
    return (
        f"{error} at epoch {runner.epoch + 1}, step {runner.iter + 1} (learning rate {rate:.2g}): "
        f"the weights were not updated with it, {state}; try {', '.join(remedies)}"
    )


def read_results(folder: str | Path) -> dict:
    """The scores that a finished run wrote."""
    return json.loads((Path(folder) / "results.json").read_text())
