"""What the trainer asks of a task: its data, its model with a loss, its metric, and a report at the end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import DataLoader

from zoo.extras import require
from zoo.train.engine import build_optimizer
from zoo.train.loading import EpochSampler
from zoo.train.recipe import Recipe

require("mmengine", extra="train")

from mmengine.evaluator import BaseMetric  # noqa: E402
from mmengine.hooks import Hook  # noqa: E402
from mmengine.model import BaseModel  # noqa: E402

Say = Callable[[str], None]


class Task(ABC):
    """A training run's knowledge of its task. Made from a recipe; opens and checks the data first.

    Attributes:
        recipe: every setting.
        train_set: training samples.
        val_set: validation samples.
        metric: key of the score, of those that `build_metric` gives, by which the best weights are chosen.
        lower_is_better: whether a smaller score is a better one.
    """

    recipe_class: ClassVar[type[Recipe]]
    metric: str
    lower_is_better: ClassVar[bool] = False
    train_set: Sized
    val_set: Sized

    def __init__(self, recipe: Recipe, say: Say):
        self.recipe = recipe
        self.open_data(say)

    @abstractmethod
    def open_data(self, say: Say) -> None:
        """Open `train_set` and `val_set` and check them whole; nothing random is drawn.

        Raises:
            ValueError: the data set is not usable; the first problem is named.
        """

    @abstractmethod
    def build(self, say: Say) -> BaseModel:
        """The objective: an mmengine model with `.model`, the network whose weights are saved."""

    @abstractmethod
    def train_loader(self, sampler: EpochSampler, batch_size: int) -> DataLoader:
        """Batches of the (draw, index) pairs that the sampler hands out."""

    @abstractmethod
    def val_loader(self, batch_size: int) -> DataLoader:
        """Batches of the validation set, split over the processes."""

    @abstractmethod
    def build_metric(self) -> BaseMetric:
        """Scores of the validation set, each sample counted once however many processes there are."""

    @abstractmethod
    def save_weights(self, model: nn.Module, path: Path, **metadata: Any) -> Path:
        """Write a file that `zoo.saving.load_model` rebuilds the model from."""

    @abstractmethod
    def report(
        self, weights: Path, folder: Path, *, title: str, batch_size: int, device: str, progress: bool
    ) -> tuple[Any, str]:
        """Evaluate a weight file and write tables and pictures; gives the results and the table to print."""

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The recipe's optimiser over the network's parameters."""
        return build_optimizer(self.recipe, model)

    def hooks(self) -> list[Hook]:
        """What the task does besides, during training."""
        return []

    def loop_options(self) -> dict[str, Any]:
        """Further arguments of the training loop."""
        return {}

    @property
    def repeats(self) -> int:
        """How often an image is drawn for a step."""
        return 1


def find_task(name: str) -> type[Task]:
    """The task of a recipe, imported when it is first used.

    Raises:
        ValueError: no such task.
    """
    import importlib

    modules = {
        "classification": "ImageClassification",
        "detection": "Detection",
        "segmentation": "Segmentation",
        "superresolution": "SuperResolution",
    }
    if name not in modules:
        raise ValueError(f"no task is called {name!r}, expected one of {', '.join(modules)}")
    return getattr(importlib.import_module(f"zoo.train.tasks.{name}"), modules[name])
