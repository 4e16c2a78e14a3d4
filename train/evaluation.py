"""Run a classifier over a data set and collect its logits; one process or many."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import nn
from tqdm import tqdm

from zoo.train.classification import ClassificationPreprocessor
from zoo.train.loading import EvaluationDataset, make_loader
from zoo.train.reports import Evaluation


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    dataset,
    *,
    mean: Iterable[float],
    std: Iterable[float],
    batch_size: int = 32,
    workers: int = 2,
    device: str = "cpu",
    precision: str = "float32",
    channels_last: bool = False,
    left_out: Iterable[tuple[str, str]] = (),
    progress: bool = True,
) -> Evaluation:
    """Logits for every image of `dataset`, in its order.

    Args:
        model: classifier; it is put into eval mode and returned to the mode it was in.
        dataset: `ClassificationData` with a transform that gives uint8 (C, H, W) of one size.
        mean: of the channels, in 0..1.
        std: of the channels, in 0..1.
        batch_size: images of one forward pass.
        workers: decoding processes.
        device: where to compute.
        precision: float32 or bf16 autocast.
        channels_last: NHWC memory order.
        left_out: files that were dropped before, for the report.
        progress: show a bar on a terminal.

    Raises:
        ImageError: a file could not be decoded; it is named.
    """
    training = model.training
    prepare = ClassificationPreprocessor(tuple(mean), tuple(std), channels_last=channels_last).to(device)
    model = model.eval().to(device)
    loader = make_loader(EvaluationDataset(dataset), batch_size=batch_size, workers=workers)
    logits, targets = [], []
    start = time.perf_counter()
    for batch in tqdm(loader, unit="batch", disable=None if progress else True, leave=False, dynamic_ncols=True):
        data = prepare(batch)
        with torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=precision == "bf16"):
            logits.append(model(data["inputs"]).float().cpu())
        targets.append(batch["targets"])
    seconds = time.perf_counter() - start
    model.train(training)
    return Evaluation(
        torch.cat(logits).clone(),
        torch.cat(targets).clone(),
        list(dataset.paths),
        list(dataset.classes),
        list(left_out),
        seconds,
    )
