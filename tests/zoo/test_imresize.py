"""MATLAB's imresize, and the recipe of the published low-resolution files."""

import numpy as np
import pytest

from tests.parity.craft import sr_data
from zoo.images import read_image
from zoo.imresize import cubic, imresize, shrink, to_uint8


def ramp(*shape):
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def test_the_kernel_is_interpolating_and_sums_to_one():
    assert cubic(np.array([0.0, 1.0, 2.0, 3.0])).tolist() == [1, 0, 0, 0]
    offsets = np.arange(-3, 4)
    for shift in (0.1, 0.25, 0.5):
        assert cubic(offsets - shift).sum() == pytest.approx(1)


@pytest.mark.parametrize("scale", [0.5, 1 / 3, 2, 3.0, 1.5])
def test_constants_stay_and_sizes_round_up(scale):
    x = np.full((13, 10, 3), 7.5)
    y = imresize(x, scale)
    assert y.shape == (int(np.ceil(13 * scale)), int(np.ceil(10 * scale)), 3)
    assert np.allclose(y, 7.5)


def test_doubling_uses_the_known_weights():
    # the phases of a factor of 2 are at -1/4 and 1/4 of a pixel
    weights = np.array([-3, 29, 111, -9]) / 128
    x = np.array([10.0, 20.0, 80.0, 40.0, 0.0, 90.0])
    y = imresize(x[None], size=(1, 12))[0]
    assert y[6] == pytest.approx(weights @ x[1:5])
    assert y[5] == pytest.approx(weights[::-1] @ x[1:5])


def test_borders_are_mirrored_or_repeated():
    x = ramp(6, 6).astype(float)
    mirrored = imresize(np.pad(x, 4, mode="symmetric"), 2)[8:-8, 8:-8]
    repeated = imresize(np.pad(x, 4, mode="edge"), 2)[8:-8, 8:-8]
    assert np.allclose(imresize(x, 2), mirrored)
    assert np.allclose(imresize(x, 2, border="repeat"), repeated)


def test_shrinking_cuts_what_is_left_over_and_rounds_after_each_pass():
    x = ramp(15, 20, 3)
    y = shrink(x, 4)
    assert y.shape == (3, 5, 3)
    assert y.dtype == np.uint8
    rows = to_uint8(imresize(x[:12].astype(float), size=(3, 20), border="repeat"))
    assert np.array_equal(y, to_uint8(imresize(rows.astype(float), size=(3, 5), border="repeat")))
    assert np.array_equal(shrink(x[..., 0], 4), y[..., 0])


def test_what_cannot_be_resized_is_said():
    with pytest.raises(ValueError, match="3x2 cannot be made 4 times smaller"):
        shrink(ramp(2, 3, 3), 4)
    with pytest.raises(ValueError, match="uint8"):
        shrink(np.zeros((8, 8)), 2)
    with pytest.raises(ValueError, match="either a scale or a size"):
        imresize(np.zeros((8, 8)))


@pytest.mark.skipif(sr_data() is None, reason="Set5 is not here (ZOO_SR_DATA)")
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_published_files_are_reproduced_bit_for_bit(scale):
    folder = sr_data() / "Set5"
    for path in sorted((folder / "HR").glob("*.png")):
        low = np.asarray(read_image(folder / "LR_bicubic" / f"X{scale}" / f"{path.stem}x{scale}.png"))
        assert np.array_equal(shrink(np.asarray(read_image(path)), scale), low), path.stem
