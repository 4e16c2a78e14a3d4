"""`zoo.predict`: a classifier of zoo or timm, and pictures of any kind, to named and scored classes.

prediction = zoo.predict(model, "cat.jpg")
prediction.names[0], prediction.scores[0]
prediction.draw("cat.jpg").save("out.png")
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from zoo.images import ImageSource, describe_source, read_image
from zoo.preprocess import eval_transform_for, model_placement


@dataclass(frozen=True)
class Prediction:
    """What a model says about one picture: classes with scores, best first.

    Heads derive from it (boxes, masks) and override `draw` and `to_dict`; `labels`, `names` and `scores` mean
    the same everywhere: one entry for each thing found.

    Attributes:
        task: "classification" (scores are softmax probabilities), "multilabel" (sigmoid), or a head's task.
        labels: class indices.
        names: their names.
        scores: their scores in 0..1.
        source: the picture's path, where it has one.
    """

    task: str
    labels: tuple[int, ...]
    names: tuple[str, ...]
    scores: tuple[float, ...]
    source: str | None = None

    def draw(self, image: ImageSource) -> Image.Image:
        """The picture with a panel of names, bars and scores beside or below it, legible at any size."""
        from zoo.pictures import draw_scores

        return draw_scores(read_image(image), self.names, self.scores)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: `{"task", "source", "predictions": [{"label", "name", "score"}, ...]}`."""
        return {
            "task": self.task,
            "source": self.source,
            "predictions": [
                {"label": label, "name": name, "score": score}
                for label, name, score in zip(self.labels, self.names, self.scores, strict=True)
            ],
        }

    def __str__(self) -> str:
        found = ", ".join(f"{name} {score:.1%}" for name, score in zip(self.names, self.scores, strict=True))
        return f"{self.source + ': ' if self.source else ''}{found or 'nothing above the threshold'}"


def predict(
    model: nn.Module,
    image: ImageSource | Iterable[ImageSource],
    *,
    topk: int = 5,
    class_names: Sequence[str] | None = None,
    multilabel: bool = False,
    threshold: float = 0.5,
    device: torch.device | str | None = None,
    batch_size: int = 32,
) -> Prediction | list[Prediction]:
    """Classify one picture, or each of several.

    The preprocessing is that of the live model (`timm.data.resolve_input_data_config`). The model is put into
    evaluation mode for the call, each of its modules back into its own mode afterwards; no gradients are
    kept.

    Args:
        model: any classifier built by timm or zoo, or a module that returns logits (B, num_classes).
        image: what `zoo.read_image` takes, or an iterable of these (also a 4-D array or tensor): then the
            answer is a list.
        topk: classes to return, best first; not used with `multilabel`.
        class_names: one name for each class. Default: the model's attribute `class_names`, the label names of
            its pretrained cfg, ImageNet's names where the class count is ImageNet's, else "class 3".
        multilabel: classes are independent (sigmoid); all of those with a score of at least `threshold` are
            returned, possibly none.
        threshold: see `multilabel`.
        device: move the model there first, where it stays; default: where it is.
        batch_size: pictures a forward pass; no more are held in memory as tensors.

    Raises:
        ImageError, TypeError: a picture cannot be read (the message names it).
        ValueError: the model has no classifier or returns non-finite scores, or an argument is out of range.
    """
    if topk < 1:
        raise ValueError(f"topk is {topk}, expected at least 1")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected at least 1")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}, expected a score between 0 and 1")
    if getattr(model, "num_classes", None) == 0:
        raise ValueError(
            f"{type(model).__name__} has no classifier (num_classes=0): build it with num_classes, or call "
            "reset_classifier and train it"
        )
    if device is not None:
        model.to(device)
    where, dtype = model_placement(model)
    transform = eval_transform_for(model)
    several = _is_several(image)
    predictions: list[Prediction] = []
    names: tuple[str, ...] | None = None
    with evaluating(model), torch.no_grad():
        for sources in _batches(image if several else [image], batch_size):
            batch = torch.stack([transform(read_image(source)) for source in sources])
            logits = _check_logits(model(batch.to(where, dtype)), model, len(sources))
            if names is None:
                names = resolve_class_names(model, logits.shape[1], class_names)
            for source, row in zip(sources, logits, strict=True):
                path = os.fspath(source) if isinstance(source, str | os.PathLike) else None
                if not row.isfinite().all():
                    raise ValueError(
                        f"{type(model).__name__} gives non-finite scores for {describe_source(source)}: its "
                        f"weights are damaged, or {str(dtype).removeprefix('torch.')} overflows (try float32)"
                    )
                predictions.append(_choose(row, names, topk, multilabel, threshold, path))
    return predictions if several else predictions[0]


def resolve_class_names(
    model: nn.Module, num_classes: int, class_names: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Names of a model's classes: the given ones, the model's own, ImageNet's, or "class 0", "class 1", ...

    Raises:
        ValueError: `class_names` has another length than the model has classes.
    """
    if class_names is not None:
        if len(class_names) != num_classes:
            raise ValueError(
                f"{len(class_names)} class names for {num_classes} classes: pass one for each output of the model"
            )
        return tuple(str(name) for name in class_names)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    described = cfg.get("label_descriptions")
    labels = cfg.get("label_names")
    if isinstance(described, dict) and labels:
        described = [described.get(label, label) for label in labels]
    for known in (getattr(model, "class_names", None), described, labels):
        if known is not None and not isinstance(known, dict | str) and len(known) == num_classes:
            return tuple(str(name) for name in known)
    return _imagenet_names(num_classes) or tuple(f"class {index}" for index in range(num_classes))


@functools.cache
def _imagenet_names(num_classes: int) -> tuple[str, ...] | None:
    subset = infer_imagenet_subset({"num_classes": num_classes})
    return tuple(ImageNetInfo(subset).label_descriptions()) if subset else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards each module is in the mode in which it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _choose(
    logits: Tensor, names: tuple[str, ...], topk: int, multilabel: bool, threshold: float, source: str | None
) -> Prediction:
    scores = logits.sigmoid() if multilabel else logits.softmax(0)
    best, order = scores.sort(descending=True, stable=True)
    count = int((best >= threshold).sum()) if multilabel else min(topk, len(names))
    labels = order[:count].tolist()
    return Prediction(
        task="multilabel" if multilabel else "classification",
        labels=tuple(labels),
        names=tuple(names[label] for label in labels),
        scores=tuple(best[:count].tolist()),
        source=source,
    )


def _check_logits(output: Any, model: nn.Module, count: int) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[0] != count:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"{type(model).__name__} returned {shape} for {count} picture(s), expected logits ({count}, "
            "num_classes): zoo.predict is for classifiers, detectors and segmenters have their own predict"
        )
    return output.float().cpu()


def _is_several(image: Any) -> bool:
    if isinstance(image, np.ndarray | Tensor):
        return image.ndim == 4
    if isinstance(image, str | bytes | bytearray | memoryview | os.PathLike | Image.Image) or hasattr(image, "read"):
        return False
    return isinstance(image, Iterable)


def _batches(images: Iterable[ImageSource], size: int) -> Iterator[list[ImageSource]]:
    batch: list[ImageSource] = []
    for image in images:
        batch.append(image)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
