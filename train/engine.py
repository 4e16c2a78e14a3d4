"""mmengine's Runner with what it lacks: exact resume, atomic checkpoints, bf16 on any device, quiet logs."""

from __future__ import annotations

import json
import logging
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn
from tqdm import tqdm

from zoo.extras import require
from zoo.prepbn import PRepBN, PRepBNSchedule, recalibrating
from zoo.schedules import learning_rate
from zoo.train.loading import derive_seed, seed_everything
from zoo.train.recipe import DenseRecipe
from zoo.train.sharding import is_sharded, whole

require("mmengine", extra="train")

from mmengine.device import get_device  # noqa: E402
from mmengine.dist import all_reduce, get_rank, is_main_process  # noqa: E402
from mmengine.hooks import Hook  # noqa: E402
from mmengine.logging import MMLogger  # noqa: E402
from mmengine.model import ExponentialMovingAverage, MMDistributedDataParallel, is_model_wrapper  # noqa: E402
from mmengine.optim import OptimWrapper  # noqa: E402
from mmengine.runner import EpochBasedTrainLoop, Runner, save_checkpoint  # noqa: E402


class ExactTrainLoop(EpochBasedTrainLoop):
    """An epoch loop that continues at the very step where the checkpoint was taken.

    mmengine begins the interrupted epoch again; here the sampler skips the batches that were already used,
    and an evaluation that was due when the run died is made up for. The last `recalibrate_epochs` update no
    weights, they renew BatchNorm's statistics on the augmented, unmixed images (see `zoo.prepbn.recalibrating`).
    """

    def __init__(self, *args, recalibrate_epochs: int = 0, **kwargs):
        super().__init__(*args, **kwargs)
        self.recalibrate_epochs = recalibrate_epochs

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch of one process."""
        return len(self.dataloader)

    def run(self) -> nn.Module:
        """Train to the last epoch."""
        self.runner.call_hook("before_train")
        self._epoch, start = divmod(self._iter, self.steps_per_epoch)
        if start == 0 and self._epoch > self.runner.message_hub.runtime_info.get("validated_epoch", 0):
            self._validate()
        while self._epoch < self._max_epochs and not self.stop_training:
            self._run_epoch(start)
            start = 0
            self._validate()
        self.runner.call_hook("after_train")
        return self.runner.model

    def _run_epoch(self, start: int) -> None:
        self.dataloader.sampler.set_epoch(self._epoch, start)
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        for offset, batch in enumerate(self.dataloader):
            self.run_iter(start + offset, batch)
            if start + offset + 1 == self.steps_per_epoch:
                break
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1

    def run_iter(self, idx: int, data_batch: dict) -> None:
        """One forward pass, and an update after `accumulate` of them."""
        if self._epoch < self._max_epochs - self.recalibrate_epochs:
            return super().run_iter(idx, data_batch)
        self.runner.call_hook("before_train_iter", batch_idx=idx, data_batch=data_batch)
        outputs = {"loss": self._renew_statistics(data_batch)}
        self.runner.call_hook("after_train_iter", batch_idx=idx, data_batch=data_batch, outputs=outputs)
        self._iter += 1

    def _renew_statistics(self, data_batch: dict) -> torch.Tensor:
        task = unwrapped(self.runner.model)
        batch = task.data_preprocessor(data_batch, training=True, mix=False)
        with self.runner.optim_wrapper.optim_context(self.runner.model), recalibrating(task.model):
            return task(**batch, mode="loss")["loss"]

    def _validate(self) -> None:
        due = self._epoch % self.val_interval == 0 or self._epoch == self._max_epochs
        if self.runner.val_loop is not None and due:
            self.runner.val_loop.run()
        self.runner.message_hub.update_info("validated_epoch", self._epoch)


def unwrapped(model: nn.Module) -> nn.Module:
    """The task itself, without the wrapper of distributed training."""
    return model.module if is_model_wrapper(model) else model


class AutocastOptimWrapper(OptimWrapper):
    """bfloat16 autocast on any device; needs no loss scaling. (mmengine's wrapper refuses CPUs.)"""

    @contextmanager
    def optim_context(self, model: nn.Module):
        """Forward pass under autocast, gradients synchronised as in the base class."""
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, dtype=torch.bfloat16):
            yield


class WarmEma(ExponentialMovingAverage):
    """An exponential moving average that follows closely at first: decay min(d, (1 + t) / (10 + t)) at step t.

    With a fixed decay the first, untrained weights would still count after hundreds of steps. Counters (batches seen
    by BatchNorm, steps of PRepBN) are copied: they have no average.
    """

    def update_parameters(self, model: nn.Module) -> None:
        """Take a step."""
        super().update_parameters(model)
        for averaged, source in zip(self.module.buffers(), model.buffers()):
            if not averaged.is_floating_point():
                averaged.copy_(source)

    def avg_func(self, averaged_param: torch.Tensor, source_param: torch.Tensor, steps: int) -> None:
        """Move the average towards the source."""
        steps = int(steps) // self.interval
        averaged_param.lerp_(source_param, max(self.momentum, 1 - (1 + steps) / (10 + steps)))


def build_optimizer(recipe, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimiser for a recipe, with timm's or the family's rules for weight decay and learning rates."""
    options = {}
    if isinstance(recipe, DenseRecipe):
        options["param_group_fn"] = lambda model: dense_groups(recipe, model)
    elif getattr(recipe, "param_groups", "timm") == "family":
        options["param_group_fn"] = lambda model: family_groups(recipe, model)
    if recipe.betas is not None:
        options["betas"] = tuple(recipe.betas)
    if recipe.eps is not None:
        options["eps"] = recipe.eps
    return create_optimizer_v2(
        model,
        opt=recipe.optimizer,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        momentum=recipe.momentum,
        layer_decay=None if isinstance(recipe, DenseRecipe) else recipe.layer_decay,
        **options,
    )


def family_groups(recipe, model: nn.Module) -> list[dict]:
    """Parameter groups as the `optimizer_groups` of the model's family makes them, with the recipe's weight decay.

    Raises:
        ValueError: the family has no rules of its own.
    """
    family = sys.modules[timm.model_entrypoint(recipe.model).__module__]
    if not hasattr(family, "optimizer_groups"):
        raise ValueError(f"param_groups is 'family', but {recipe.model} has no rules of its own: use timm")
    return [
        dict(
            params=group["params"],
            weight_decay=recipe.weight_decay if group["weight_decay"] else 0.0,
            lr_scale=group.get("lr_scale", 1.0),
        )
        for group in family.optimizer_groups(model)
    ]


def dense_groups(recipe, model: nn.Module) -> list[dict]:
    """Parameter groups of a head on a backbone: the backbone's factor of the rate, and no decay for norms.

    Norms and embeddings never decay; biases and scales do with the recipe's `decay_bias`. `layer_decay` concerns the
    backbone alone.
    """
    from timm.optim import param_groups_layer_decay

    from zoo.heads.pyramid import Pyramid

    kept = set()
    for name, module in model.named_modules():
        if "Norm" in type(module).__name__ or isinstance(module, nn.Embedding):
            kept |= {f"{name}.{own}" for own, _ in module.named_parameters(recurse=False)}
    pyramids = {f"{name}." if name else "": m for name, m in model.named_modules() if isinstance(m, Pyramid)}
    scales: dict[str, float] = {}
    for prefix, pyramid in pyramids.items():
        kept |= {prefix + name for name in pyramid.no_weight_decay()}
        own = dict(pyramid.backbone.named_parameters())
        scales |= {f"{prefix}backbone.{name}": recipe.backbone_lr for name in own}
        if recipe.layer_decay is not None:
            names = {id(p): name for name, p in own.items()}
            for group in param_groups_layer_decay(pyramid.backbone, layer_decay=recipe.layer_decay):
                for parameter in group["params"]:
                    scales[f"{prefix}backbone.{names[id(parameter)]}"] *= group["lr_scale"]
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        free = name in kept or (parameter.ndim <= 1 and not recipe.decay_bias)
        key = (scales.get(name, 1.0), 0.0 if free else recipe.weight_decay)
        groups.setdefault(key, []).append(parameter)
    return [dict(params=params, weight_decay=decay, lr_scale=scale) for (scale, decay), params in groups.items()]


def build_optim_wrapper(recipe, optimizer: torch.optim.Optimizer, device: str) -> OptimWrapper:
    """mmengine's wrapper for the recipe's precision, accumulation and clipping.

    Raises:
        ValueError: fp16 on a device that has no loss scaling.
    """
    options = dict(
        optimizer=optimizer,
        accumulative_counts=recipe.accumulate,
        clip_grad=dict(max_norm=recipe.clip_grad) if recipe.clip_grad else None,
    )
    if recipe.precision == "bf16":
        return AutocastOptimWrapper(**options)
    if recipe.precision == "fp16":
        if not device.startswith("cuda"):
            raise ValueError(f"precision fp16 needs a CUDA device, this run is on {device}: use bf16")
        from mmengine.optim import AmpOptimWrapper

        return AmpOptimWrapper(dtype="float16", **options)
    return OptimWrapper(**options)


class StepSeedHook(Hook):
    """Seeds every random draw of a step (mixup, dropout, drop path) with the step's number and the rank."""

    priority = "VERY_HIGH"

    def __init__(self, seed: int):
        self.seed = seed

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Seed the step."""
        seed_everything(derive_seed(self.seed, runner.iter, get_rank()))


class LearningRateHook(Hook):
    """Sets the learning rate of every group from the recipe's schedule; layer-wise factors stay."""

    priority = "HIGH"

    def __init__(self, recipe):
        self.recipe = recipe

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Set the rate of the coming step."""
        first_pass = runner.iter - runner.iter % self.recipe.accumulate  # one rate for all passes of a step
        passes = runner.train_loop.steps_per_epoch
        rate = learning_rate(self.recipe, first_pass / passes, passes / self.recipe.accumulate)
        for group in runner.optim_wrapper.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)


class PRepBNHook(Hook):
    """Sets gamma of every PRepBN ahead of each forward pass: a function of the step, so nothing needs resuming."""

    priority = "HIGH"

    def __init__(self, recipe):
        self.recipe = recipe

    def before_train(self, runner) -> None:
        """Turn shares of the epochs into optimiser steps.

        Raises:
            ValueError: the model has no such norm.
        """
        if not any(isinstance(module, PRepBN) for module in runner.model.modules()):
            raise ValueError(
                f"prepbn_share is {self.recipe.prepbn_share}, but {self.recipe.model} has no PRepBN: leave it unset, "
                'or give a model of SLAB --model-args \'{"norm_layer": "prepbn"}\''
            )
        steps = self.recipe.epochs * runner.train_loop.steps_per_epoch // self.recipe.accumulate
        warm = round(self.recipe.prepbn_warmup * steps)
        self.schedule = PRepBNSchedule.of_training(steps, self.recipe.prepbn_share, warm)

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Set gamma of the coming step."""
        self.schedule.before_step(runner.model, runner.iter // self.recipe.accumulate)


class BestWeightsHook(Hook):
    """Keeps the weights of the best evaluation. Runs before the EMA hook swaps the trained weights back.

    `save` is called on every process: what is sharded must be gathered.
    """

    priority = "HIGH"

    def __init__(self, metric: str, save, *, lower_is_better: bool = False):
        self.metric = metric
        self.save = save
        self.lower_is_better = lower_is_better

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        """Save if this is the best score so far."""
        score = metrics[self.metric]
        best = runner.message_hub.runtime_info.get("best_score")
        if best is None or (score < best if self.lower_is_better else score > best):
            scores = {k: round(float(v), 4) for k, v in metrics.items()}
            self.save(unwrapped(runner.model).model, scores, runner.epoch)
            runner.message_hub.update_info("best_score", float(score))
            runner.message_hub.update_info("best_epoch", runner.epoch)


class ProgressHook(Hook):
    """A progress bar, a line an epoch, and `history.jsonl` with what the curves are drawn from."""

    priority = "LOW"

    def __init__(self, folder: Path, batch_size: int, metric: str, quiet: bool = False):
        self.path = Path(folder) / "history.jsonl"
        self.batch_size = batch_size
        self.metric = metric
        self.quiet = quiet
        self.bar = None

    def before_train(self, runner) -> None:
        """Drop the lines of epochs and evaluations that a resumed run will repeat."""
        if not is_main_process():
            return
        kept = []
        if self.path.is_file():
            done = runner.iter // runner.train_loop.steps_per_epoch
            validated = runner.message_hub.runtime_info.get("validated_epoch", 0)
            for line in self.path.read_text().splitlines():
                epoch, trained = _epoch_of(line)
                if epoch <= (done if trained else validated):
                    kept.append(line)
        self.path.write_text("".join(f"{line}\n" for line in kept))
        if not self.quiet:
            total, start = runner.max_iters, runner.iter
            self.bar = tqdm(total=total, initial=start, unit="step", disable=None, leave=False, dynamic_ncols=True)

    def before_train_epoch(self, runner) -> None:
        """Start the clock."""
        self.losses, self.start = [], time.perf_counter()

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Advance the bar."""
        self.losses.append(outputs["loss"].item())
        if self.bar is not None:
            self.bar.set_postfix_str(f"epoch {runner.epoch + 1}/{runner.max_epochs} loss {self.losses[-1]:.3f}")
            self.bar.update()

    def after_train_epoch(self, runner) -> None:
        """Record the epoch, with the mean loss of all processes."""
        seconds = time.perf_counter() - self.start
        loss = torch.tensor(sum(self.losses) / max(1, len(self.losses)), dtype=torch.float64)
        all_reduce(loss, op="mean")
        self.mean_loss = loss.item()
        self._write(
            {
                "epoch": runner.epoch + 1,
                "loss": self.mean_loss,
                "lr": max(g["lr"] for g in runner.optim_wrapper.optimizer.param_groups),
                "images_per_second": len(self.losses) * self.batch_size / seconds,
            }
        )

    def after_val_epoch(self, runner, metrics: dict | None = None) -> None:
        """Record the evaluation and print a line."""
        scores = {k: float(v) for k, v in metrics.items()}
        self._write({"epoch": runner.epoch, **scores})
        if is_main_process() and not self.quiet:
            loss = f"loss {self.mean_loss:.3f}  " if getattr(self, "losses", None) else ""
            shown = "  ".join(f"{name} {value:.1f}" for name, value in scores.items())
            tqdm.write(f"epoch {runner.epoch:>3}/{runner.max_epochs}  {loss}{shown}", file=sys.stdout)
            sys.stdout.flush()

    def after_train(self, runner) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()

    def _write(self, record: dict) -> None:
        if is_main_process():
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")


def _epoch_of(line: str) -> tuple[int, bool]:
    """The epoch of a line, and whether it tells of training and not of an evaluation."""
    try:
        record = json.loads(line)
        return int(record["epoch"]), "loss" in record
    except (ValueError, KeyError, TypeError):
        return sys.maxsize, True  # a line that a killed run wrote half


class QuietRunner(Runner):
    """mmengine's Runner with its long reports in `log.txt` and only errors on the console."""

    def build_logger(self, log_level: int | str = "INFO", log_file: str | None = None, **kwargs) -> MMLogger:
        """The logger of this run."""
        logger = super().build_logger(log_level, str(Path(self.work_dir) / "log.txt"), **kwargs)
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:
                handler.setLevel(logging.ERROR)
        return logger

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """DDP where there are several processes; mmengine itself names a GPU to it even on a CPU."""
        if is_sharded(model):
            return model.to(get_device())
        if self.distributed and get_device() == "cpu":
            return MMDistributedDataParallel(module=model, broadcast_buffers=False)
        return super().wrap_model(model_wrapper_cfg, model)

    def _init_model_weights(self) -> None:
        """mmengine would send whole parameters to all processes here; a sharded model has none, and needs none."""
        if not is_sharded(self.model):
            super()._init_model_weights()

    def save_checkpoint(self, out_dir: str, filename: str, *, meta: dict, backend: str) -> None:
        """Write a checkpoint; the main process does, while every one hands over its shards.

        Args:
            out_dir: folder.
            filename: name in it.
            meta: `epoch` and `iter` of the state.
            backend: mmengine's file backend.
        """
        sharded = is_sharded(self.model)
        if not (sharded or is_main_process()):
            return
        checkpoint = {
            "meta": {**meta, "seed": self.seed, "dataset_meta": self.train_dataloader.dataset.metainfo},
            "state_dict": dict(unwrapped(self.model).state_dict()),
            "message_hub": self.message_hub.state_dict(),
            "optimizer": self.optim_wrapper.state_dict(),
        }
        self.call_hook("before_save_checkpoint", checkpoint=checkpoint)
        checkpoint = whole(checkpoint)
        if is_main_process():
            save_checkpoint(checkpoint, str(Path(out_dir) / filename), backend_args={"backend": backend})

    def dump_config(self) -> None:
        """Nothing: the recipe is the configuration, and it is saved already."""


def pick_device(requested: str | None) -> str:
    """The device to train on.

    Raises:
        ValueError: the requested one is not there.
    """
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if requested is None:
        return best
    if requested.split(":")[0] not in ("cpu", best):
        raise ValueError(f"device is {requested!r}, this machine has {best}")
    return requested
