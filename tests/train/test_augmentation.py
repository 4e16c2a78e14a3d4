"""Augmentation beyond timm's: repeated draws, CIFAR's padded crop, torchvision's RandAugment, erasing by zeros."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandAugment

from zoo.train.classification import ClassificationPreprocessor
from zoo.train.data.transforms import build_transforms
from zoo.train.loading import EpochSampler, SeededDataset, seed_everything


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(1, 256, (32, 32, 3), dtype=np.uint8))


def test_repeated_augmentation_draws_an_image_several_times_in_a_row_and_differently():
    sampler = EpochSampler(30, batch_size=6, seed=0, repeats=3)
    sampler.set_epoch(4)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == 30, "an epoch has as many steps as without"
    assert set(Counter(index for _, index in drawn).values()) == {3}
    assert [draw for draw, _ in drawn[:6]] == [12, 13, 14] * 2, "another draw each time, none of another epoch"
    sampler.set_epoch(4, start_batch=2)
    assert list(sampler) == drawn[12:]


def test_each_draw_of_an_image_has_its_own_random_numbers():
    class Noise:
        classes = ["a"]

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return torch.rand(1).item(), index

    dataset = SeededDataset(Noise(), seed=0)
    values = [dataset[draw, 1][0] for draw in (0, 1, 2)]
    assert len(set(values)) == 3
    assert dataset[1, 1][0] == values[1]


def test_processes_share_the_repeats_of_an_image():
    shares = []
    for rank in range(3):
        sampler = EpochSampler(12, batch_size=2, seed=0, rank=rank, world_size=3, repeats=3)
        sampler.set_epoch(0)
        shares.append(list(sampler))
    for one, two, three in zip(*shares):
        assert one[1] == two[1] == three[1]
        assert (one[0], two[0], three[0]) == (0, 1, 2)


def test_a_padded_crop_shifts_the_picture_over_black(picture):
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    options = dict(train=True, input_size=32, hflip=0.0, color_jitter=None, normalize=False)
    transform = build_transforms(crop_padding=4, **options)
    padded = torch.nn.functional.pad(pixels, (4, 4, 4, 4))
    windows = {padded[:, y : y + 32, x : x + 32].numpy().tobytes() for y in range(9) for x in range(9)}
    seed_everything(0)
    crops = [transform(picture) for _ in range(20)]
    assert all(crop.numpy().tobytes() in windows for crop in crops)
    assert len({crop.numpy().tobytes() for crop in crops}) > 10
    assert torch.equal(build_transforms(crop_padding=0, **options)(picture), pixels)
    assert build_transforms(crop_padding=4, **options)(picture.resize((50, 20))).shape == (3, 32, 32)


def test_torchvisions_rand_augment_takes_the_place_of_timms(picture):
    options = dict(train=True, input_size=32, normalize=False, interpolation="bilinear")
    transform = build_transforms(auto_augment="torchvision-n2-m7", vflip=0.5, **options)
    kinds = [type(step).__name__ for step in transform.then.transforms]
    assert kinds[:3] == ["RandomHorizontalFlip", "RandomVerticalFlip", "RandAugment"]
    assert "ColorJitter" not in kinds
    augment = next(step for step in transform.then.transforms if isinstance(step, RandAugment))
    assert (augment.num_ops, augment.magnitude, augment.num_magnitude_bins) == (2, 7, 31)
    assert transform(picture).shape == (3, 32, 32)
    with pytest.raises(ValueError, match="expected torchvision-n2-m7 or the like"):
        build_transforms(auto_augment="torchvision-m7", **options)


def test_erasing_by_zeros_leaves_the_mean_colour():
    images = torch.randint(1, 256, (8, 3, 32, 32), dtype=torch.uint8)
    data = {"inputs": images, "targets": torch.zeros(8, dtype=torch.int64), "keys": torch.arange(8)}
    prepare = ClassificationPreprocessor((0.0,) * 3, (1.0,) * 3, random_erasing=1.0, erasing_mode="const")
    erased = prepare(data, training=True)["inputs"]
    assert ((erased == 0).all(1).flatten(1).sum(1) > 0).all()
    assert not (prepare(data, training=False)["inputs"] == 0).any()
