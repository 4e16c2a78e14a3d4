"""Super-resolution: scores, pairs of pictures, crops, the objective, and a training that can be killed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import zoo.saving
from tests.parity.craft import sr_data
from zoo.heads.craft import Craft
from zoo.heads.craft.start import start_from_bicubic
from zoo.images import read_image
from zoo.imresize import imresize, shrink, to_uint8
from zoo.train.data.superresolution import DataError, open_superresolution
from zoo.train.loading import EpochSampler, SeededDataset, make_loader
from zoo.train.recipes import find_recipe
from zoo.train.sr_metrics import luma, mean_scores, psnr, sr_scores, ssim
from zoo.train.superresolution import SuperResolution, evaluate_superresolution
from zoo.train.trainer import train

DATA = "tests/data/clothing10/train"


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


# Scores -------------------------------------------------------------------------------------------------------


def test_luma_is_studio_range_and_not_rounded():
    colours = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [1, 0, 0]]], dtype=np.uint8)
    assert luma(colours)[0].tolist() == pytest.approx([16, 235, 16 + 65.481, 16 + 65.481 / 255], rel=1e-6)
    grey = noise(4, 5)
    assert np.array_equal(luma(grey), luma(np.stack([grey] * 3, axis=2)))


def test_psnr_of_a_known_error():
    a = np.full((20, 20), 100, dtype=np.uint8)
    assert psnr(a, a + 5) == pytest.approx(20 * np.log10(255 / 5))
    assert psnr(a, a) == float("inf")


def test_ssim_is_that_of_windows_computed_one_by_one():
    a, b = noise(14, 13).astype(float), noise(14, 13, seed=1).astype(float)
    g = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    w = np.outer(g, g) / g.sum() ** 2
    values = []
    for r in range(4):
        for c in range(3):
            x, y = a[r : r + 11, c : c + 11], b[r : r + 11, c : c + 11]
            mx, my = (w * x).sum(), (w * y).sum()
            vx, vy, cov = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum(), (w * (x - mx) * (y - my)).sum()
            c1, c2 = 2.55**2, 7.65**2
            values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    assert ssim(a, b) == pytest.approx(np.mean(values), rel=1e-9)
    assert ssim(a, a) == pytest.approx(1)
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(a[:10], b[:10])


def test_the_border_does_not_count_and_the_truth_is_cut_to_the_output():
    truth = noise(43, 41, 3)
    output = truth[:42, :40].copy()
    output[:3] = 0  # inside a border of 3
    assert sr_scores(output, truth, 3)["psnr_y"] == float("inf")
    assert sr_scores(output, truth, 2)["psnr_y"] < 60
    with pytest.raises(ValueError, match="another picture or scale"):
        sr_scores(truth, output, 2)


@pytest.mark.skipif(sr_data() is None, reason="Set5 is not here (ZOO_SR_DATA)")
@pytest.mark.parametrize(
    ("scale", "expected", "bars"),
    [
        # this x2 row of the literature is of HR files with a row more (docs/results.md)
        (2, (33.66, 0.9299), (0.016, 0.0007)),
        (3, (30.39, 0.8682), (0.01, 0.0005)),
        (4, (28.42, 0.8104), (0.01, 0.0005)),
    ],
)
def test_bicubic_on_set5_is_that_of_the_literature(scale, expected, bars):
    folder, scores = sr_data() / "Set5", []
    for path in sorted((folder / "HR").glob("*.png")):
        low = np.asarray(read_image(folder / "LR_bicubic" / f"X{scale}" / f"{path.stem}x{scale}.png"))
        output = to_uint8(imresize(low, scale))
        scores.append(sr_scores(output, np.asarray(read_image(path)), scale, round_luma=True))
    mean = mean_scores(scores)
    assert mean["psnr_y"] == pytest.approx(expected[0], abs=bars[0])
    assert mean["ssim_y"] == pytest.approx(expected[1], abs=bars[1])


# Data ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    for name in ("hr", "lr"):
        (tmp_path / name).mkdir()
    for i in range(3):
        high = noise(50 + 4 * i, 64, 3, seed=i)
        Image.fromarray(high).save(tmp_path / f"hr/{i}.png")
        Image.fromarray(shrink(high, 2)).save(tmp_path / f"lr/{i}x2.png")
    return tmp_path


@pytest.mark.parametrize("cache", ["memory", None, "files"])
def test_pairs_and_high_resolution_alone_give_the_same(folders, cache):
    cache = str(folders / "cache") if cache == "files" else cache
    for _ in range(2):  # a second time from the cache
        paired = open_superresolution(folders / "hr", 2, low=folders / "lr", cache=cache)
        alone = open_superresolution(folders / "hr", 2, cache=cache)
        for (a, b), (c, d) in zip((paired[i] for i in range(3)), (alone[i] for i in range(3))):
            assert torch.equal(a, c)
            assert torch.equal(b, d)
            assert b.shape[1:] == (2 * a.shape[1], 2 * a.shape[2])


def test_crops_of_a_pair_belong_together(folders):
    data = open_superresolution(folders / "hr", 2, patch=12, repeat=20)
    assert len(data) == 60
    seen = set()
    for i in range(60):
        low, high = data[i]
        assert low.shape == (3, 12, 12)
        assert high.shape == (3, 24, 24)
        inner = shrink(high.permute(1, 2, 0).numpy(), 2)[3:-3, 3:-3].astype(int)
        # rounding after each pass makes a transposed crop differ by a grey level here and there
        assert np.abs(inner - low.permute(1, 2, 0).numpy()[3:-3, 3:-3]).mean() < 0.5
        seen.add(low.numpy().tobytes())
    assert len(seen) > 50


def test_a_sample_depends_on_its_draw_and_on_nothing_else(folders):
    data = SeededDataset(open_superresolution(folders / "hr", 2, patch=12, repeat=4), seed=3)

    def batches(workers):
        loader = make_loader(data, batch_size=2, workers=workers, sampler=EpochSampler(len(data), 2, seed=3))
        return list(loader)

    for a, b in zip(batches(0), batches(1)):
        assert torch.equal(a["inputs"], b["inputs"])
        assert torch.equal(a["targets"], b["targets"])


def test_data_that_do_not_fit_are_named(folders):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_superresolution(folders / "nowhere", 2)
    (folders / "lr/1x2.png").unlink()
    with pytest.raises(DataError, match=r"1 of 3 pictures have no partner.*1\.png"):
        open_superresolution(folders / "hr", 2, low=folders / "lr")
    Image.fromarray(noise(20, 20, 3)).save(folders / "lr/1.png")
    paired = open_superresolution(folders / "hr", 2, low=folders / "lr")
    with pytest.raises(DataError, match=r"1\.png has 20x20 pixels, expected 32x27"):
        paired[1]
    small = open_superresolution(folders / "hr", 2, patch=27)
    left_out = small.drop_small()
    assert [bad.path[-5:] for bad in left_out] == ["0.png"]
    assert len(small) == 2
    with pytest.raises(DataError, match="no picture is large enough"):
        open_superresolution(folders / "hr", 2, patch=40).drop_small()


# Training -----------------------------------------------------------------------------------------------------


def test_the_task_gives_l1_and_scores(folders):
    model = start_from_bicubic(Craft(2, depths=(1,)))
    task = SuperResolution(model)
    low, high = open_superresolution(folders / "hr", 2)[0]
    batch = task.data_preprocessor({"inputs": low[None], "targets": high[None]})
    assert float(batch["inputs"].max()) <= 1
    loss = task(**batch, mode="loss")["loss"]
    assert float(loss.detach()) == pytest.approx(
        float((model(batch["inputs"]) - batch["targets"]).abs().mean()), rel=1e-5
    )
    with torch.no_grad():
        (scores,) = task(**batch, mode="predict")
    assert set(scores) == {"psnr", "ssim", "psnr_y", "ssim_y"}


def short_run(folders, **changes):
    """The smallest recipe that trains on the pictures of `folders`."""
    return find_recipe("finetune-sr")(
        data=str(folders / "hr"),
        start="bicubic",
        head_args={"depths": [1]},
        patch=16,
        batch_size=2,
        epochs=1,
        workers=0,
        out=str(folders / "run"),
        **changes,
    )


def test_a_run_that_lost_its_last_step_ends_with_the_same_weights(folders):
    recipe = short_run(folders, epoch_steps=3, checkpoint_interval=1)
    train(recipe, quiet=True, say=lambda line: None)
    whole = load_file(folders / "run" / "last.safetensors")
    (folders / "run" / "checkpoints" / "step_00000003.pth").unlink()
    train(recipe, resume=True, quiet=True, say=lambda line: None)
    again = load_file(folders / "run" / "last.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_the_engine_trains_evaluates_and_reports(folders, capsys):
    recipe = short_run(folders, low=str(folders / "lr"), epoch_steps=1)
    result = train(recipe, quiet=True)
    assert "mean" in result.table
    assert {"best.safetensors", "results.md", "results.json", "prediction.png"} <= {
        p.name for p in (folders / "run").iterdir()
    }
    model = zoo.saving.load_model(result.weights)
    assert model.scale == 2
    assert model.depths == (1,)
    mean, _ = evaluate_superresolution(model, open_superresolution([folders / "hr/2.png"], 2))
    assert mean["psnr_y"] == pytest.approx(result.evaluation["psnr_y"], abs=0.05)


def test_recipes_are_the_published_ones():
    recipe = find_recipe("craft_x4")()
    assert recipe.epochs * recipe.epoch_steps == 500_000
    assert [m * recipe.epoch_steps for m in recipe.milestones] == [250_000, 400_000, 450_000, 475_000]
    assert (recipe.batch_size, recipe.lr, recipe.patch, recipe.seed) == (64, 2e-4, 64, 33)
    with pytest.raises(ValueError, match="patch"):
        find_recipe("craft_x4")(patch=20)


@pytest.mark.slow
def test_training_beats_bicubic_on_photographs_it_has_not_seen(tmp_path):
    photographs = sorted(Path(f"{DATA}/dress").iterdir())
    for name, part in (("train", photographs[4:]), ("val", photographs[:4])):
        (tmp_path / name).mkdir()
        for path in part:
            shutil.copy(path, tmp_path / name)
    recipe = find_recipe("craft_x2_small")(
        data=str(tmp_path / "train"),
        val_data=str(tmp_path / "val"),
        head_args={"depths": [1]},
        hr_shrink=1.0,
        patch=32,
        lr=1e-3,
        epochs=1,
        epoch_steps=60,
        warmup_epochs=0.1,
        workers=0,
        out=str(tmp_path / "run"),
    )
    train(recipe, quiet=True, say=lambda line: None)
    mean = json.loads((tmp_path / "run" / "results.json").read_text())["mean"]
    assert mean["trained"]["psnr_y"] > mean["bicubic"]["psnr_y"] + 0.2
