"""A recipe: every setting of a training run in one frozen dataclass, printed, saved and reproducible.

There is no inheritance between recipe files and no hidden default: a preset is a function that returns a
recipe of its task (`ClassificationRecipe`, `DetectionRecipe`, ...), and what a run used is written to `recipe.json`
in its folder. `Recipe` holds the fields that all tasks share.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

Schedule = Literal["cosine", "cosine_after_warmup", "late_cosine", "min_cosine", "constant", "step", "poly"]
Precision = Literal["float32", "bf16", "fp16"]


def option(default: Any, help: str, **kwargs: Any) -> Any:
    """A field of a recipe: its default and the help text of its flag."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help, **kwargs})
    return field(default=default, metadata={"help": help, **kwargs})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every task has. `zoo train` has one flag for each field."""

    task: ClassVar[str]

    # --- model -----------------------------------------------------------------------------------------
    model: str = option("poolformerv1_s12", "name of a registered model or backbone (zoo's or any of timm's)")
    model_args: dict[str, Any] = option({}, "further arguments of the model's constructor, as JSON")
    pretrained: bool = option(False, "start from the released weights of the model or backbone")
    checkpoint: str | None = option(None, "start from this file (any layout; another class count is fine)")
    drop_path: float = option(0.0, "stochastic depth rate of the last block")
    # --- data ------------------------------------------------------------------------------------------
    data: str = option("", "folder of the data set")
    on_bad: Literal["error", "skip"] = option("error", "unreadable images: stop and name them, or leave out and list")
    workers: int = option(2, "data loading processes of each training process")
    epoch_steps: int | None = option(
        None, "optimiser steps of an epoch, for recipes that count iterations; one pass over the data by default"
    )
    # --- optimisation ----------------------------------------------------------------------------------
    epochs: int = option(30, "passes over the training set, warm-up included, cool-down not")
    cooldown_epochs: int = option(0, "further epochs at the final learning rate")
    batch_size: int = option(32, "images of one optimiser step, over all processes")
    accumulate: int = option(1, "split a batch into this many forward passes to save memory")
    optimizer: str = option("adamw", "timm optimiser: adamw, lamb, lion, sgd, ...")
    lr: float = option(5e-4, "peak learning rate at this batch size")
    betas: tuple[float, float] | None = option(None, "momentum terms; the optimiser's own by default")
    eps: float | None = option(None, "epsilon of the optimiser; its own by default")
    momentum: float = option(0.9, "momentum of SGD")
    weight_decay: float = option(0.05, "decoupled weight decay; biases, norms and scales are exempt")
    layer_decay: float | None = option(None, "factor of the learning rate from one layer to the one below it")
    schedule: Schedule = option(
        "cosine",
        "cosine (timm's: it runs under the warm-up); cosine_after_warmup (ConvNeXt's); late_cosine (SpaRTAN's: an "
        "epoch late); min_cosine (CRATE's: the lower of warm-up and cosine); constant; step; poly (power 0.9)",
    )
    milestones: tuple[float, ...] | None = option(
        None, "step: epochs after which the rate falls; 2/3 and 11/12 of all by default"
    )
    step_factor: float = option(0.1, "step: what the rate is multiplied by at each milestone")
    warmup_epochs: float = option(5.0, "epochs of linear warm-up")
    warmup_lr: float = option(1e-6, "learning rate at the first step of the warm-up")
    min_lr: float = option(1e-5, "learning rate at the end of the cosine")
    lr_update: Literal["step", "epoch"] = option("step", "follow the schedule at each step, or hold it over an epoch")
    clip_grad: float | None = option(None, "clip the global gradient norm to this value")
    ema_decay: float | None = option(None, "evaluate and save an exponential moving average with this decay")
    # --- machine ---------------------------------------------------------------------------------------
    precision: Precision = option("float32", "float32, bf16 (any device) or fp16 (CUDA)")
    device: str | None = option(None, "cpu, cuda, mps; the best one found by default")
    channels_last: bool = option(False, "NHWC memory format")
    compile: bool = option(False, "torch.compile the model")
    parallel: Literal["ddp", "fsdp"] = option(
        "ddp", "several processes: a whole model on each, or weights, gradients and optimiser states split over them"
    )
    sync_bn: bool = option(False, "batch norms take the statistics of all processes' images (CUDA)")
    grad_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    deterministic: bool = option(False, "CUDA: deterministic algorithms only (slower); a CPU always is")
    seed: int = option(42, "seed of everything random; same seed, same machine, same weights")
    # --- output ----------------------------------------------------------------------------------------
    out: str = option("runs/train", "folder of this run")
    checkpoint_interval: int | None = option(None, "steps between checkpoints; once an epoch by default")
    keep_checkpoints: int = option(2, "how many checkpoints stay")
    val_interval: int = option(1, "epochs between evaluations")

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check every value that can be wrong on its own.

        Raises:
            ValueError: one sentence with the field, its value and what is allowed.
        """
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if typing.get_origin(hints[f.name]) is Literal and value not in typing.get_args(hints[f.name]):
                choices = ", ".join(map(str, typing.get_args(hints[f.name])))
                raise ValueError(f"{f.name} is {value!r}, expected one of {choices}")
        for name in ("epochs", "batch_size", "accumulate", "keep_checkpoints", "val_interval"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        check(
            self.batch_size % self.accumulate == 0,
            "accumulate",
            self.accumulate,
            f"a divisor of batch_size ({self.batch_size})",
        )
        check(self.epoch_steps is None or self.epoch_steps >= 1, "epoch_steps", self.epoch_steps, "at least 1, or none")
        check(self.lr > 0, "lr", self.lr, "above 0")
        check(self.workers >= 0, "workers", self.workers, "0 or more")
        check(0 <= self.drop_path <= 1, "drop_path", self.drop_path, "between 0 and 1")
        check(self.warmup_epochs >= 0, "warmup_epochs", self.warmup_epochs, "0 or more")
        check(self.ema_decay is None or 0 < self.ema_decay < 1, "ema_decay", self.ema_decay, "between 0 and 1")
        check(
            not (self.pretrained and self.checkpoint),
            "checkpoint",
            self.checkpoint,
            "unset while pretrained is on: a model starts from one set of weights",
        )

    @property
    def total_epochs(self) -> int:
        """Epochs of the whole run, cool-down included."""
        return self.epochs + self.cooldown_epochs

    def replace(self, **changes: Any) -> Self:
        """A copy with other values."""
        unknown = changes.keys() - {f.name for f in dataclasses.fields(self)}
        if unknown:
            raise ValueError(f"a recipe of {self.task} has no field {', '.join(sorted(unknown))}")
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """All fields and the task, as JSON."""
        return json.dumps({"task": self.task, **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The recipe that `to_json` wrote.

        Raises:
            ValueError: a recipe of another task, an unknown field or a wrong value.
        """
        values = json.loads(text)
        task = values.pop("task", "classification")
        if task != cls.task:
            raise ValueError(f"this is a recipe of {task}, expected one of {cls.task}")
        hints = typing.get_type_hints(cls)
        unknown = values.keys() - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"a recipe of {task} has no field {', '.join(sorted(unknown))}")
        return cls(**{name: convert(hints[name], value) for name, value in values.items()})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read `recipe.json`."""
        return cls.from_json(Path(path).read_text())


@dataclass(frozen=True, kw_only=True)
class ClassificationRecipe(Recipe):
    """Image classification, single-label or multi-label."""

    task: ClassVar[str] = "classification"

    # --- model -----------------------------------------------------------------------------------------
    drop_rate: float = option(0.0, "dropout before the classifier")
    head_dropout: float = option(0.0, "dropout inside the MLP head of ConvFormer and CAFormer")
    # --- data ------------------------------------------------------------------------------------------
    data: str = option(
        "", "folder: train/ and val/ of class folders, one folder of class folders, tar shards, or a labels.csv"
    )
    val_fraction: float = option(0.2, "part held out, stratified, where the data has no val/ of its own")
    # --- input -----------------------------------------------------------------------------------------
    img_size: int | None = option(None, "training size in pixels; the model's own by default")
    eval_size: int | None = option(None, "evaluation size; the training size by default")
    crop_pct: float | None = option(None, "part of the resized image that the evaluation crop covers")
    interpolation: str | None = option(None, "bilinear, bicubic or random (training); the model's own by default")
    scale: tuple[float, float] = option((0.08, 1.0), "area range of the random crop")
    ratio: tuple[float, float] = option((3 / 4, 4 / 3), "aspect range of the random crop")
    crop_padding: int | None = option(
        None, "instead of that crop: resize to the input size, pad by so many black pixels, crop at random (CIFAR)"
    )
    hflip: float = option(0.5, "probability of a horizontal flip")
    vflip: float = option(0.0, "probability of a vertical flip")
    color_jitter: float | None = option(0.4, "colour jitter; off while rand_augment is on, as in timm")
    rand_augment: str | None = option(None, "timm's policy, as rand-m9-mstd0.5-inc1, or torchvision-n2-m7")
    random_erasing: float = option(0.0, "probability of erasing a rectangle")
    erasing_mode: Literal["pixel", "rand", "const"] = option("pixel", "erase with noise, one random colour, or zeros")
    repeated_augmentation: int = option(1, "draw an image so often for a step, each time augmented differently")
    # --- objective -------------------------------------------------------------------------------------
    label_smoothing: float = option(0.0, "label smoothing of the cross entropy")
    mixup: float = option(0.0, "mixup alpha, 0 for none")
    cutmix: float = option(0.0, "CutMix alpha, 0 for none")
    mixup_prob: float = option(1.0, "probability that a batch is mixed")
    mixup_switch_prob: float = option(0.5, "probability of CutMix where both are on")
    teacher: str | None = option(None, "distil from this zoo weight file (any model trained on the same classes)")
    distill_weight: float = option(0.7, "weight of the teacher's soft labels against the true labels")
    distill_temperature: float = option(2.0, "temperature of the soft labels")
    distill_views: int | None = option(
        None, "draw only so many different crops of an image, and ask the teacher about each once (no mixup)"
    )
    # --- optimisation ----------------------------------------------------------------------------------
    param_groups: Literal["timm", "family"] = option(
        "timm", "which parameters weight decay leaves alone: timm's rules, or the model family's own"
    )
    freeze_backbone: bool = option(False, "train the classifier only (linear probe)")
    prepbn_share: float | None = option(
        None, "PRepBN: share of the epochs after which only the BatchNorm is left; by default each norm counts itself"
    )
    prepbn_warmup: float = option(0.0, "PRepBN: share of the epochs with the LayerNorm alone before it fades")
    recalibrate_epochs: int = option(0, "further epochs, without updates, that renew BatchNorm's statistics")

    def validate(self) -> None:
        """Check every value that can be wrong on its own.

        Raises:
            ValueError: one sentence with the field, its value and what is allowed.
        """
        super().validate()
        check(0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "between 0 and 1")
        for name in (
            "drop_rate",
            "head_dropout",
            "hflip",
            "vflip",
            "random_erasing",
            "label_smoothing",
            "distill_weight",
            "prepbn_warmup",
        ):
            check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")
        check(
            self.crop_padding is None or self.crop_padding >= 0, "crop_padding", self.crop_padding, "0 or more, or none"
        )
        check(self.repeated_augmentation >= 1, "repeated_augmentation", self.repeated_augmentation, "at least 1")
        check(
            not (self.param_groups == "family" and self.layer_decay is not None),
            "layer_decay",
            self.layer_decay,
            "unset while param_groups is family: the family's groups have rates of their own",
        )
        check(
            self.prepbn_share is None or self.prepbn_warmup < self.prepbn_share <= 1,
            "prepbn_share",
            self.prepbn_share,
            f"above prepbn_warmup ({self.prepbn_warmup}) and at most 1",
        )
        check(
            self.prepbn_share is not None or not self.prepbn_warmup,
            "prepbn_warmup",
            self.prepbn_warmup,
            "0 while prepbn_share is unset",
        )
        check(self.recalibrate_epochs >= 0, "recalibrate_epochs", self.recalibrate_epochs, "0 or more")
        check(
            not (self.recalibrate_epochs and self.ema_decay is not None),
            "recalibrate_epochs",
            self.recalibrate_epochs,
            "0 while ema_decay is set: the statistics would be those of the weights in training, not of the average",
        )
        check(
            not (self.distill_views and (self.mixup or self.cutmix)),
            "distill_views",
            self.distill_views,
            "unset while mixup or cutmix is on: mixed images are never seen twice",
        )

    @property
    def total_epochs(self) -> int:
        """Epochs of the whole run, cool-down and recalibration included."""
        return super().total_epochs + self.recalibrate_epochs


@dataclass(frozen=True, kw_only=True)
class DenseRecipe(Recipe):
    """What detection and segmentation share: a head on a backbone, whose weights often come from ImageNet."""

    backbone_checkpoint: str | None = option(None, "weights of the backbone alone (any classification file)")
    head_args: dict[str, Any] = option({}, "further arguments of the head, as JSON")
    freeze_norm: bool = option(False, "the backbone's batch norms keep their statistics (for small batches)")
    backbone_lr: float = option(1.0, "factor of the learning rate for the backbone")
    decay_bias: bool = option(False, "let biases and scales decay; norms and embeddings never do")
    hflip: float = option(0.5, "probability of a horizontal flip")
    jitter_scale: tuple[float, float] | None = option(None, "large-scale jitter: range of sizes, as 0.1,2.0")
    val_fraction: float = option(0.2, "part held out where the data has no validation split of its own")

    def validate(self) -> None:
        """Check every value that can be wrong on its own.

        Raises:
            ValueError: one sentence with the field, its value and what is allowed.
        """
        super().validate()
        check(self.backbone_lr >= 0, "backbone_lr", self.backbone_lr, "0 or more")
        check(0 <= self.hflip <= 1, "hflip", self.hflip, "between 0 and 1")
        check(0 < self.val_fraction < 1, "val_fraction", self.val_fraction, "between 0 and 1")
        check(
            not (self.backbone_checkpoint and self.checkpoint),
            "backbone_checkpoint",
            self.backbone_checkpoint,
            "unset while checkpoint is given: that file has the backbone, too",
        )


@dataclass(frozen=True, kw_only=True)
class SegmentationRecipe(DenseRecipe):
    """Semantic, panoptic or instance segmentation by PEM on any backbone."""

    task: ClassVar[str] = "segmentation"

    kind: Literal["semantic", "panoptic", "instance"] = option("semantic", "what to segment")
    data: str = option("", "folder: ADE20K, Cityscapes, COCO, or images/ and masks/ of your own")
    crop_size: tuple[int, int] = option((512, 512), "height and width of the training crop")
    short_sides: tuple[int, ...] = option((), "training sizes of the shorter side, one at random; empty for jitter")
    max_long: int = option(2048, "limit of the longer side in training")
    color_distortion: bool = option(True, "SSD's colour distortion")
    pad_to_crop: bool = option(True, "pad smaller images to the crop's size")
    test_short: int = option(512, "shorter side in evaluation")
    test_long: int = option(2048, "limit of the longer side in evaluation")
    object_threshold: float = option(0.8, "panoptic: smallest class score of a segment")
    overlap_threshold: float = option(0.8, "panoptic: smallest visible part of a segment")
    loss_points: int = option(12544, "points of a mask at which the loss compares it")

    def validate(self) -> None:
        """Check every value that can be wrong on its own.

        Raises:
            ValueError: one sentence with the field, its value and what is allowed.
        """
        super().validate()
        check(self.loss_points >= 1, "loss_points", self.loss_points, "at least 1")
        check(min(self.crop_size) >= 32, "crop_size", self.crop_size, "at least 32,32")
        check(
            bool(self.short_sides) != (self.jitter_scale is not None),
            "short_sides",
            self.short_sides,
            "set where jitter_scale is not, and the other way round",
        )
        for name in ("object_threshold", "overlap_threshold"):
            check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class DetectionRecipe(DenseRecipe):
    """Boxes, with masks where the head has them, on any backbone."""

    task: ClassVar[str] = "detection"

    head: Literal["retinanet", "fcos", "faster_rcnn", "mask_rcnn", "rt_detr"] = option("retinanet", "the detector")
    data: str = option("", "folder: COCO, YOLO or VOC")
    map_norm: Literal["layer", "group"] | None = option(None, "a norm behind each of the backbone's maps")
    short_sides: tuple[int, ...] = option((), "training sizes of the shorter side, one at random")
    max_long: int = option(1333, "limit of the longer side in training")
    crop_policy: bool = option(False, "DETR's: crop half of the images before they are resized")
    jitter_size: tuple[int, int] = option((1024, 1024), "height and width that large-scale jitter fills")
    train_size: int | None = option(None, "instead of these: stretch training images to this side (RT-DETR)")
    zoom_out: float = option(0.0, "probability of a larger canvas around the image (SSD)")
    iou_crop: float = option(0.0, "probability of a crop that keeps objects in view (SSD)")
    color: float = option(0.0, "probability of distorted colours (SSD)")
    test_short: int = option(800, "shorter side in evaluation; the side of the square for rt_detr")
    test_long: int = option(1333, "limit of the longer side in evaluation")

    def validate(self) -> None:
        """Check every value that can be wrong on its own.

        Raises:
            ValueError: one sentence with the field, its value and what is allowed.
        """
        super().validate()
        for name in ("zoom_out", "iou_crop", "color"):
            check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")
        sizes = [bool(self.short_sides), self.jitter_scale is not None, self.train_size is not None]
        check(sum(sizes) == 1, "short_sides", self.short_sides, "one of short_sides, jitter_scale and train_size")
        check(
            not (self.crop_policy and not self.short_sides), "crop_policy", self.crop_policy, "off without short_sides"
        )


def convert(hint: Any, value: Any) -> Any:
    """A JSON value or a command-line string as the type of a recipe's field.

    Raises:
        ValueError: it cannot be read as that type.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        return convert(next(a for a in arguments if a is not type(None)), value)
    if origin is Literal:
        return value
    if origin is tuple:
        parts = value.split(",") if isinstance(value, str) else list(value)
        if arguments[-1] is Ellipsis:
            return tuple(convert(arguments[0], p) for p in parts)
        if len(parts) != len(arguments):
            raise ValueError(f"expected {len(arguments)} values separated by commas, got {value!r}")
        return tuple(convert(a, p) for a, p in zip(arguments, parts))
    if origin is dict or hint is dict:
        result = json.loads(value) if isinstance(value, str) else value
        if not isinstance(result, dict):
            raise ValueError(f"expected a JSON object, got {value!r}")
        return result
    if hint is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "yes", "1", "on"):
            return True
        if str(value).lower() in ("false", "no", "0", "off"):
            return False
        raise ValueError(f"expected true or false, got {value!r}")
    return hint(value)


def check(good: bool, name: str, value: Any, expected: str) -> None:
    """Raise the error of a field whose value is not good."""
    if not good:
        raise ValueError(f"{name} is {value!r}, expected {expected}")
