"""ONNX files that zoo wrote, run by ONNX Runtime: `OnnxModel("model.onnx").predict("photo.jpg")`.

Pictures are prepared as the file says; no model of PyTorch is built.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.extras import require
from zoo.images import ImageSource, describe_source, read_image
from zoo.prediction import Prediction, _batches, _choose, _is_several
from zoo.preprocess import EvalTransform


def open_session(path: str | PathLike, threads: int | None = None):
    """An inference session on the CPU, with as many threads as PyTorch has."""
    runtime = require("onnxruntime", extra="export")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class OnnxModel:
    """A file and what it says about itself.

    Attributes:
        metadata: see `zoo.exporting.describe`.
        class_names: names of the outputs.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an ONNX file, or not one that zoo wrote.
    """

    def __init__(self, path: str | PathLike, threads: int | None = None):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no model at {path}")
        require("onnxruntime", extra="export")
        try:
            self.session = open_session(path, threads)
        except Exception as error:  # the runtime's types cannot be imported by name
            raise ValueError(f"{path} is not an ONNX file that ONNX Runtime can read: {error}") from error
        text = self.session.get_modelmeta().custom_metadata_map.get("zoo")
        if text is None:
            raise ValueError(
                f"{path} does not say how its pictures are prepared and what its outputs mean: write it with zoo export"
            )
        self.metadata: dict[str, Any] = json.loads(text)
        self.task: str = self.metadata["task"]
        self.class_names: list[str] = self.metadata.get("class_names") or []
        batch = self.session.get_inputs()[0].shape[0]
        self.batch_size = batch if isinstance(batch, int) else None

    def logits(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) -> logits (B, classes); parts of a fixed batch are filled up."""
        size = self.batch_size or len(images)
        found = []
        for part in images.split(size):
            full = part if len(part) == size else torch.cat([part, part.new_zeros(size - len(part), *part.shape[1:])])
            (scores,) = self.session.run(None, {self.session.get_inputs()[0].name: full.numpy()})
            found.append(torch.from_numpy(scores)[: len(part)].float())
        return torch.cat(found)

    def transform(self) -> EvalTransform:
        """From a picture to the input of a classifier."""
        how = self.metadata["preprocessing"]
        return EvalTransform(
            tuple(how["input_size"]),
            mean=tuple(how["mean"]),
            std=tuple(how["std"]),
            interpolation=how["interpolation"],
            crop_pct=how["crop_pct"],
            crop_mode=how["crop_mode"],
        )

    def predict(
        self,
        image: ImageSource | Iterable[ImageSource],
        *,
        topk: int = 5,
        threshold: float = 0.5,
        batch_size: int = 32,
    ) -> Prediction | list[Prediction]:
        """Classify one picture, or each of several; see `zoo.predict`.

        Raises:
            ImageError, TypeError: a picture cannot be read.
            ValueError: the file is no classifier, an argument is out of range, or the scores are not finite.
        """
        if self.task != "classification":
            raise ValueError(
                f"{self.path} is a model of {self.task}: use zoo predict, or zoo.heads.onnx_model.open_model"
            )
        if topk < 1:
            raise ValueError(f"topk is {topk}, expected at least 1")
        transform, multilabel = self.transform(), bool(self.metadata.get("multilabel"))
        several = _is_several(image)
        found = []
        for sources in _batches(image if several else [image], batch_size):
            logits = self.logits(torch.stack([transform(read_image(source)) for source in sources]))
            for source, row in zip(sources, logits, strict=True):
                if not row.isfinite().all():
                    raise ValueError(f"{self.path} gives non-finite scores for {describe_source(source)}")
                name = os.fspath(source) if isinstance(source, str | os.PathLike) else None
                found.append(_choose(row, tuple(self.class_names), topk, multilabel, threshold, name))
        return found if several else found[0]


class OnnxClassifier(nn.Module):
    """An `OnnxModel` where a classifier of PyTorch is expected: with timm's attributes and without parameters.

    It runs on the CPU, whichever device its inputs are on.

    Raises:
        ValueError: the file is no classifier.
    """

    def __init__(self, file: OnnxModel):
        super().__init__()
        if file.task != "classification":
            raise ValueError(f"{file.path} is a model of {file.task}: only classifiers are evaluated as ONNX")
        self.file = file
        self.class_names = file.class_names
        self.num_classes = len(file.class_names)
        self.in_chans = file.metadata["preprocessing"]["input_size"][0]
        self.pretrained_cfg = self.default_cfg = {
            **file.metadata["preprocessing"],
            "architecture": file.metadata["model"],
            "num_classes": self.num_classes,
        }

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) -> logits (B, classes).

        Raises:
            ValueError: the file takes images of another size only.
        """
        rule = self.file.metadata["size_rule"]
        if rule["kind"] == "static" and list(images.shape[2:]) != list(rule["size"]):
            raise ValueError(
                f"{self.file.path} takes images of {rule['text']}, these are {images.shape[2]}x{images.shape[3]}: "
                "export it without --static-size, or at this size"
            )
        return self.file.logits(images.detach().cpu()).to(images.device)
