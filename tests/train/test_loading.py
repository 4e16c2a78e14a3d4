from collections import Counter

import pytest

from zoo.train.loading import EpochSampler


def _epoch(sampler, epoch, start=0):
    sampler.set_epoch(epoch, start)
    return list(sampler)


def test_epochs_counted_in_steps_run_through_the_data_again_and_again():
    sampler = EpochSampler(10, batch_size=4, seed=1, epoch_steps=4)
    assert len(sampler) == 16
    drawn = [key for epoch in range(5) for key in _epoch(sampler, epoch)]
    # 80 samples are 8 whole passes over 10 images, each with its own draw number and order
    for number in range(8):
        assert sorted(i for d, i in drawn if d == number) == list(range(10))
    assert len({tuple(i for d, i in drawn if d == number) for number in range(8)}) == 8
    assert max(Counter(drawn).values()) == 1


def test_epochs_counted_in_steps_may_be_longer_than_the_data_and_resume_anywhere():
    sampler = EpochSampler(3, batch_size=4, seed=1, epoch_steps=5)
    whole = _epoch(sampler, 2)
    assert _epoch(sampler, 2, start=3) == whole[12:]


def test_processes_share_the_steps_of_an_epoch():
    one = _epoch(EpochSampler(10, batch_size=4, seed=1, epoch_steps=4), 1)
    two = [_epoch(EpochSampler(10, 2, 1, rank, 2, epoch_steps=4), 1) for rank in range(2)]
    assert sorted(one) == sorted(two[0] + two[1])
    for step in range(4):
        assert set(one[4 * step : 4 * step + 4]) == {k for part in two for k in part[2 * step : 2 * step + 2]}


def test_too_few_images_for_a_step_are_named():
    with pytest.raises(ValueError, match="3 training images are fewer than batch_size 4"):
        EpochSampler(3, batch_size=4, seed=1)
