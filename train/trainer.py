"""From a recipe to trained weights, a report and pictures."""

from __future__ import annotations

import dataclasses
import json
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm.data import Mixup, resolve_data_config
from torch import nn

from zoo.extras import require
from zoo.saving import load_model, save_model
from zoo.train.checkpoints import CheckpointHook, DiskFullError, PlainHistoryHook, newest_readable_checkpoint
from zoo.train.classification import Classification, ClassificationPreprocessor, NonFiniteLossError
from zoo.train.data.classification import build_transforms, check_dataset, open_classification
from zoo.train.engine import (
    BestWeightsHook,
    ExactTrainLoop,
    LearningRateHook,
    PRepBNHook,
    ProgressHook,
    QuietRunner,
    StepSeedHook,
    WarmEma,
    build_optim_wrapper,
    build_optimizer,
    pick_device,
    unwrapped,
)
from zoo.train.evaluation import evaluate
from zoo.train.loading import EpochSampler, EvaluationDataset, SeededDataset, make_loader, seed_everything
from zoo.train.metrics import classification_scores, main_metric
from zoo.train.recipe import ClassificationRecipe
from zoo.train.reports import Evaluation, draw_curves, write_report

require("mmengine", extra="train")

from mmengine.dataset import DefaultSampler  # noqa: E402
from mmengine.dist import barrier, get_dist_info, init_dist, is_distributed, is_main_process  # noqa: E402
from mmengine.evaluator import BaseMetric  # noqa: E402
from mmengine.runner import Runner, ValLoop  # noqa: E402

# Fields that a resumed run may change: they do not change which weights come out.
_FREE_FIELDS = {"out", "workers", "device", "keep_checkpoints", "checkpoint_interval", "val_interval"}


class TrainingError(RuntimeError):
    """A run that cannot go on. The message says why, what was kept, and what to do."""


@dataclass(frozen=True)
class TrainingResult:
    """What a run ended with: the evaluation of the best weights, where they are, and when they were reached."""

    evaluation: Evaluation
    weights: Path
    best_epoch: int
    folder: Path
    table: str


class ClassificationMetric(BaseMetric):
    """Scores of all images of the validation set, each counted once however many processes there are."""

    default_prefix = ""

    def process(self, data_batch, data_samples) -> None:
        """Keep the logits of a batch."""
        self.results.extend((sample["logits"], sample["target"]) for sample in data_samples)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Metrics in percent."""
        logits, targets = zip(*results)
        return classification_scores(torch.stack(logits), torch.stack(targets))


def build_classifier(recipe: ClassificationRecipe, num_classes: int) -> tuple[nn.Module, list[str]]:
    """The model of a recipe with its initial weights, and remarks on how they were loaded.

    Raises:
        ValueError: an argument that the model does not have.
        CheckpointError: the weights do not fit.
    """
    from zoo.checkpoint import load_checkpoint

    arguments = dict(recipe.model_args)
    if recipe.drop_path:
        arguments["drop_path_rate"] = recipe.drop_path
    if recipe.drop_rate:
        arguments["drop_rate"] = recipe.drop_rate
    sized = arguments | ({"img_size": recipe.img_size} if recipe.img_size else {})
    build = dict(num_classes=num_classes, pretrained=recipe.pretrained)
    try:
        try:
            model = timm.create_model(recipe.model, **build, **sized)
            arguments = sized
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            model = timm.create_model(recipe.model, **build, **arguments)  # takes any size
    except TypeError as error:
        raise ValueError(f"{recipe.model} does not take these arguments: {error}") from error
    except RuntimeError as error:
        if "Unknown model" in str(error) or "Invalid" in str(error):
            raise ValueError(f"no model is called {recipe.model!r}: `zoo list` names them") from error
        raise
    remarks = []
    if recipe.checkpoint:
        report = load_checkpoint(model, recipe.checkpoint, head="fit")
        remarks = [f"{recipe.checkpoint}: {line}" for line in str(report).splitlines()]
        if "classifier of the file was left out" in str(report):
            _start_near_zero(model.get_classifier())
    if recipe.head_dropout:
        from zoo.metaformer import set_head_dropout

        set_head_dropout(model, recipe.head_dropout)
    if recipe.freeze_backbone:
        model.requires_grad_(False)
        model.get_classifier().requires_grad_(True)
    if recipe.grad_checkpointing:
        model.set_grad_checkpointing(True)
    model.zoo_model_args = {k: v for k, v in arguments.items() if k not in ("drop_path_rate", "drop_rate")}
    return model, remarks


def _start_near_zero(classifier: nn.Module) -> None:
    """Small weights for a new classifier: timm's own can give logits of +-10 (EfficientNet with few classes), whose
    gradients would wreck the trained features before the classifier has learnt anything."""
    if isinstance(classifier, nn.Linear):
        nn.init.trunc_normal_(classifier.weight, std=0.01)
        if classifier.bias is not None:
            nn.init.zeros_(classifier.bias)


def evaluation_settings(
    model: nn.Module,
    *,
    img_size: int | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
) -> dict:
    """How a model's images are prepared for evaluation: what is given, else what its file or timm says."""
    cfg = resolve_data_config({}, model=model)
    return dict(
        eval_size=img_size or cfg["input_size"][-1],
        crop_pct=crop_pct or cfg["crop_pct"],
        eval_interpolation=interpolation or cfg["interpolation"],
        mean=cfg["mean"],
        std=cfg["std"],
    )


def training_settings(recipe: ClassificationRecipe, model: nn.Module) -> dict:
    """`evaluation_settings` of a recipe, with the size and interpolation of training."""
    own = resolve_data_config({}, model=model)
    size = recipe.img_size or own["input_size"][-1]
    evaluation = evaluation_settings(
        model,
        img_size=recipe.eval_size or size,
        crop_pct=recipe.crop_pct,
        interpolation=None if recipe.interpolation == "random" else recipe.interpolation,
    )
    return evaluation | dict(train_size=size, interpolation=recipe.interpolation or own["interpolation"])


def evaluation_transform(settings: dict):
    """Picture -> uint8 (C, H, W), resized and cropped as `settings` say."""
    return build_transforms(
        train=False,
        input_size=settings["eval_size"],
        interpolation=settings["eval_interpolation"],
        crop_pct=settings["crop_pct"],
        normalize=False,
    )


def training_transform(recipe: ClassificationRecipe, settings: dict):
    """Picture -> uint8 (C, H, W) with the recipe's augmentation of single images."""
    return build_transforms(
        train=True,
        input_size=settings["train_size"],
        mean=settings["mean"],
        std=settings["std"],
        interpolation=settings["interpolation"],
        scale=recipe.scale,
        ratio=recipe.ratio,
        hflip=recipe.hflip,
        vflip=recipe.vflip,
        color_jitter=recipe.color_jitter,
        auto_augment=recipe.rand_augment,
        crop_padding=recipe.crop_padding,
        normalize=False,
    )


def train(
    recipe: ClassificationRecipe,
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
        resume: continue the run in `recipe.out` where its newest checkpoint stands.
        say: takes the lines that a user reads.
        quiet: no progress bar and no line an epoch.

    Raises:
        ValueError: a setting does not fit (named).
        TrainingError: the loss became NaN, or there is no room for a checkpoint; earlier weights are intact.
        ImageError: an image could not be read; it is named.
    """
    folder = Path(recipe.out)
    _start_processes()
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

    train_set, val_set, left_out = _open_data(recipe, say)
    sampler = EpochSampler(
        len(train_set), forward_size, recipe.seed, rank, world, recipe.accumulate, recipe.repeated_augmentation
    )
    seed_everything(recipe.seed)
    model, remarks = build_classifier(recipe, len(train_set.classes))
    for remark in remarks:
        say(remark)
    settings = training_settings(recipe, model)
    train_set.transform = training_transform(recipe, settings)
    val_set.transform = evaluation_transform(settings)
    task = _build_task(recipe, model, settings, train_set)

    train_loader = make_loader(
        SeededDataset(train_set, recipe.seed, recipe.distill_views if recipe.teacher else None),
        batch_size=forward_size,
        workers=recipe.workers,
        sampler=sampler,
    )
    evaluated = EvaluationDataset(val_set)
    val_loader = make_loader(
        evaluated,
        batch_size=max(forward_size, 32),
        workers=recipe.workers,
        sampler=DefaultSampler(evaluated, shuffle=False),
    )

    metric = main_metric(train_set.multilabel)

    def save_weights(trained: nn.Module, name: str, **metadata) -> Path:
        return save_model(
            trained,
            folder / name,
            model_args=model.zoo_model_args,
            class_names=list(train_set.classes),
            multilabel=train_set.multilabel,
            input_config=dict(
                input_size=(3, settings["eval_size"], settings["eval_size"]),
                crop_pct=settings["crop_pct"],
                interpolation=settings["eval_interpolation"],
            ),
            **metadata,
        )

    hooks = [
        StepSeedHook(recipe.seed),
        LearningRateHook(recipe),
        ProgressHook(folder, forward_size * world, metric, quiet),
        BestWeightsHook(
            metric, lambda m, scores, epoch: save_weights(m, "best.safetensors", scores=scores, epoch=epoch)
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
    if recipe.prepbn_share is not None:
        hooks.append(PRepBNHook(recipe))
    start_from = _checkpoint_to_resume(folder, resume, say)
    with _mmengine_device(device):
        runner = QuietRunner(
            model=task,
            work_dir=str(folder / "log"),
            train_dataloader=train_loader,
            val_dataloader=val_loader,
            train_cfg=dict(
                type=ExactTrainLoop,
                max_epochs=recipe.total_epochs,
                val_interval=recipe.val_interval,
                recalibrate_epochs=recipe.recalibrate_epochs,
            ),
            val_cfg=dict(type=ValLoop),
            val_evaluator=[ClassificationMetric()],
            optim_wrapper=build_optim_wrapper(recipe, build_optimizer(recipe, model), device),
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
            runner.train()
        except NonFiniteLossError as error:
            raise TrainingError(_explain_nan(error, runner, recipe, folder)) from error
        except DiskFullError as error:
            raise TrainingError(str(error)) from error

    result = None
    if is_main_process():
        save_weights(unwrapped(runner.model).model, "last.safetensors", epoch=recipe.total_epochs)
        best_epoch = runner.message_hub.runtime_info.get("best_epoch", recipe.total_epochs)
        best = load_model(folder / "best.safetensors")
        evaluation = evaluate(
            best,
            val_set,
            mean=settings["mean"],
            std=settings["std"],
            batch_size=max(forward_size, 32),
            workers=recipe.workers,
            device=device,
            left_out=left_out,
            progress=not quiet,
        )
        table = write_report(evaluation, folder, f"{recipe.model} on {Path(recipe.data).name}, epoch {best_epoch}")
        draw_curves(folder / "history.jsonl", folder / "curves.png", metric)
        result = TrainingResult(evaluation, folder / "best.safetensors", best_epoch, folder, table)
    return result


def _start_processes() -> None:
    """Join the other processes where torchrun or Slurm started several."""
    if is_distributed():
        return
    by_torchrun = int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ
    by_slurm = int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ
    if torch.cuda.is_available() and (by_torchrun or by_slurm):
        init_dist("pytorch" if by_torchrun else "slurm", backend="nccl")
    elif by_torchrun:
        torch.distributed.init_process_group("gloo")  # mmengine's own start needs a GPU


def _check_folder(folder: Path, recipe: ClassificationRecipe, resume: bool, say: Callable[[str], None]) -> None:
    saved = folder / "recipe.json"
    if resume and not saved.is_file():
        say(f"nothing to resume in {folder}: starting from the beginning")
    elif resume:
        old, new = (dataclasses.asdict(r) for r in (ClassificationRecipe.load(saved), recipe))
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


def _open_data(recipe: ClassificationRecipe, say: Callable[[str], None]):
    if not recipe.data:
        raise ValueError("data is not set: give a folder of class folders or a labels.csv")
    options = dict(val_fraction=recipe.val_fraction, seed=recipe.seed)
    train_set = open_classification(recipe.data, "train", **options)
    val_set = open_classification(recipe.data, "val", classes=train_set.classes, **options)
    report = check_dataset(train_set, val=val_set, on_bad=recipe.on_bad)
    for line in (*train_set.notes, *report.warnings):
        say(line)
    if report.unreadable:
        say(f"{len(report.unreadable)} unreadable pictures are left out, listed in {recipe.out}/left_out.txt")
    say(f"{len(train_set)} training and {len(val_set)} validation images, {len(train_set.classes)} classes")
    return train_set, val_set, [(bad.path, bad.reason) for bad in report.unreadable]


def _build_task(recipe: ClassificationRecipe, model: nn.Module, settings: dict, train_set) -> Classification:
    mixup = None
    if recipe.mixup or recipe.cutmix:
        if train_set.multilabel:
            raise ValueError("mixup and cutmix need one label an image, and this data has several: set both to 0")
        mixup = Mixup(
            mixup_alpha=recipe.mixup,
            cutmix_alpha=recipe.cutmix,
            prob=recipe.mixup_prob,
            switch_prob=recipe.mixup_switch_prob,
            label_smoothing=recipe.label_smoothing,
            num_classes=len(train_set.classes),
        )
    teacher = None
    if recipe.teacher:
        teacher = load_model(recipe.teacher)
        taught = getattr(teacher, "class_names", None)
        if taught is not None and list(taught) != list(train_set.classes):
            raise ValueError(
                f"the teacher {recipe.teacher} knows the classes {', '.join(taught[:5])}..., this data has "
                f"{', '.join(train_set.classes[:5])}...: train the teacher on the same data first"
            )
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    task = Classification(
        model,
        ClassificationPreprocessor(
            settings["mean"],
            settings["std"],
            mixup=mixup,
            random_erasing=recipe.random_erasing,
            erasing_mode=recipe.erasing_mode,
            channels_last=recipe.channels_last,
        ),
        multilabel=train_set.multilabel,
        label_smoothing=recipe.label_smoothing,
        teacher=teacher,
        distill_weight=recipe.distill_weight,
        distill_temperature=recipe.distill_temperature,
        remember_teacher=bool(recipe.distill_views),
    )
    if recipe.compile:
        model.compile()  # in place: state dict and attributes stay as they are
    return task


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


def _explain_nan(error: Exception, runner: Runner, recipe: ClassificationRecipe, folder: Path) -> str:
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
