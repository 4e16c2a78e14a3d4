"""Loaders whose every random draw is a function of (seed, draw, index), a draw being an epoch or a part of one.

The sampler hands out (draw, index) pairs and the data set seeds itself for each of them, so a sample does
not depend on which worker decodes it, on how many workers there are, or on what was drawn before: a run that
was killed continues, even inside an epoch, with exactly the samples that it would have seen.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler


def derive_seed(*parts: int) -> int:
    """A 32-bit seed that depends on every part and on nothing else."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators, those of the devices included."""
    seed_cpu(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


def seed_cpu(seed: int) -> None:
    """Seed what a data worker draws from.

    `torch.manual_seed` would do, but for every device that is not initialised it notes the whole call stack for
    later, which takes 0.2 ms: a sixth of what decoding and augmenting a small picture does.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


class EpochSampler(Sampler):
    """A shuffled order for each epoch, the same in every process, of which each process takes its share.

    Yields (draw, index) pairs. A draw is the epoch's number; with repeated augmentation (Hoffer et al., 2020) an
    image comes `repeats` times in a row under as many draws, and an epoch has a part of the images only. Every
    process gets the same number of samples; the incomplete last step of an epoch is left out (the next epoch has
    another order).

    Args:
        size: samples in the data set.
        batch_size: samples of one batch of one process.
        seed: seed of the order.
        rank: this process.
        world_size: number of processes.
        accumulate: batches of one optimiser step, which an epoch never splits.
        repeats: how often an image is drawn, each time augmented differently.
        epoch_steps: optimiser steps of an epoch; the data set begins anew in another order as often as they need it.
            By default an epoch is one pass.

    Raises:
        ValueError: the data set is smaller than one optimiser step, and `epoch_steps` is not given.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        repeats: int = 1,
        epoch_steps: int | None = None,
    ):
        self.size, self.batch_size, self.seed, self.rank, self.world_size = size, batch_size, seed, rank, world_size
        self.repeats = repeats
        step = batch_size * world_size * accumulate
        if size < step and epoch_steps is None:
            raise ValueError(f"{size} training images are fewer than batch_size {step}: use a smaller batch_size")
        self.passes_run_on = epoch_steps is not None
        self.batches = (epoch_steps or size // step) * accumulate
        self.epoch = 0
        self.start_batch = 0

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch, and the batch of it to begin with (for a run that continues inside an epoch)."""
        self.epoch, self.start_batch = epoch, start_batch

    def _order(self, number: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, number))
        return torch.randperm(self.size, generator=generator).tolist()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        # a step's images are consecutive in the order, whatever the number of processes and of passes
        places = range(self.rank, self.batches * self.batch_size * self.world_size, self.world_size)
        if self.passes_run_on:
            yield from self._run_on(places[self.start_batch * self.batch_size :])
            return
        images = self._order(self.epoch)
        for place in places[self.start_batch * self.batch_size :]:
            image, repeat = divmod(place, self.repeats)
            yield self.epoch * self.repeats + repeat, images[image]

    def _run_on(self, places: range) -> Iterator[tuple[int, int]]:
        """Epochs that end anywhere in a pass over the data: a draw is the number of the pass."""
        first = self.epoch * self.batches * self.batch_size * self.world_size
        current, images = None, []
        for place in places:
            image, repeat = divmod(first + place, self.repeats)
            number, index = divmod(image, self.size)
            if number != current:
                current, images = number, self._order(number)
            yield number * self.repeats + repeat, images[index]


class SeededDataset(Dataset):
    """A data set whose random transform is seeded for each (draw, index); gives (image, target, key).

    The key is the same for the same image under the same random transform.

    Args:
        dataset: map-style, with its transform; gives (image, target).
        seed: of the run.
        views: how many random transforms an image has before they repeat; endless if None.
    """

    def __init__(self, dataset: Sized, seed: int, views: int | None = None):
        self.dataset, self.seed, self.views = dataset, seed, views

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def metainfo(self) -> dict[str, Any]:
        """What a checkpoint remembers of the data: the class names."""
        return {"classes": list(self.dataset.classes)}

    def __getitem__(self, key: tuple[int, int]):
        draw, index = key
        view = draw % self.views if self.views else draw
        seed_cpu(derive_seed(self.seed, view, index))
        image, target = self.dataset[index]
        return image, target, view * len(self.dataset) + index


class EvaluationDataset(Dataset):
    """A data set with a fixed transform; gives (image, target, index)."""

    def __init__(self, dataset: Sized):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def metainfo(self) -> dict[str, Any]:
        """The class names."""
        return {"classes": list(self.dataset.classes)}

    def __getitem__(self, index: int):
        image, target = self.dataset[index]
        return image, target, index


def collate(samples: list[tuple]) -> dict[str, torch.Tensor]:
    """A batch: `inputs` uint8 or float (B, 3, H, W), `targets` (B,) int64 or (B, classes) float, `keys` (B,) int64.

    Images stay uint8 on their way between processes, a quarter of the bytes; they are normalised on the device.
    """
    images, targets, keys = zip(*samples)
    inputs = torch.stack([torch.as_tensor(image) for image in images])
    first = targets[0]
    if isinstance(first, (int, np.integer)):
        labels = torch.tensor(targets, dtype=torch.int64)
    else:
        labels = torch.stack([torch.as_tensor(t, dtype=torch.float32) for t in targets])
    return {"inputs": inputs, "targets": labels, "keys": torch.tensor(keys)}


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def make_loader(
    dataset: Dataset,
    *,
    batch_size: int,
    workers: int,
    sampler: Sampler | None = None,
    drop_last: bool = False,
    collate_fn: Callable = collate,
) -> DataLoader:
    """A loader with workers that live as long as it does."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate_fn,
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_one_thread if workers else None,
    )
