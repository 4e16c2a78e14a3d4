"""What CRAFT promises beyond the golden cases: options, checkpoints, sizes, strips, backbone form, export."""

import copy
import tempfile

import pytest
import torch

import zoo
from zoo.heads.craft import Craft, CraftOnBackbone, create_upscaler, read_options
from zoo.heads.craft.export import export_onnx
from zoo.heads.craft.padding import pad_image
from zoo.heads.craft.start import start_from_bicubic
from zoo.heads.craft.strips import Storage, Strips, forward_strips, total_work
from zoo.heads.craft.tiling import enlarge_tiled, self_ensemble, tile_origins
from zoo.heads.craft.windows import make_windows

SMALL = dict(depths=(1,), dtype=torch.float64)


def lively(model):
    """Weights that make every part matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model.eval()


def image(*shape, seed=0, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def recorded(model, x):
    with torch.enable_grad():
        return model(x).detach()


# Inference equals training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"shift_mask": True}, {"embed_dim": 96}, {"window": (6, 12)}], ids=str)
def test_strips_in_memory_or_files_equal_the_whole(options, tmp_path):
    model = lively(Craft(2, **SMALL, **options))
    m = model.multiple
    x = image(2, 3, 3 * m, 2 * m)
    whole = recorded(model, x)
    work = []
    for storage in (None, Storage(str(tmp_path))):
        work.clear()
        y = forward_strips(model, x, storage=storage, tokens=1, step=work.append)
        assert (y - whole).abs().max() <= 1e-9 * whole.std()
        assert sum(work) == pytest.approx(2 * total_work(model))
    assert not list(tmp_path.iterdir())  # the files had no names any more


def test_inference_keeps_its_input_and_gives_the_same_twice():
    model = lively(Craft(2, **SMALL))
    x = image(1, 3, 32, 48)
    before = x.clone()
    with torch.inference_mode():
        a, b = model(x), model(x)
    assert torch.equal(a, b)
    assert torch.equal(x, before)


def test_strips_differ_in_size_by_at_most_one_window():
    strips = Strips(208, 64, 16, tokens=64 * 48)
    assert strips.bounds[0][0] == 0
    assert strips.bounds[-1][1] == 208
    assert all(a[1] == b[0] and (a[1] - a[0]) % 16 == 0 for a, b in zip(strips.bounds, strips.bounds[1:]))


# Windows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "shift"), [((4, 16), (0, 0)), ((4, 16), (2, 8)), ((16, 4), (8, 2))])
def test_windows_are_those_of_a_rolled_map(window, shift):
    h, w = window
    tokens = torch.arange(32 * 48).reshape(32, 48).roll((-shift[0], -shift[1]), (0, 1))
    expected = tokens.reshape(32 // h, h, 48 // w, w).transpose(1, 2).flatten()
    windows = make_windows(32, 48, window, shift)
    assert torch.equal(windows.order, expected)
    assert torch.equal(windows.order[windows.inverse], torch.arange(32 * 48))


def test_the_mask_concerns_the_windows_that_wrap_around_only():
    windows = make_windows(32, 64, (4, 16), (2, 8), masked=True)
    assert windows.mask.shape == (8 + 4 - 1, 1, 64, 64)  # of 8 x 4 windows: the last row and the last column
    assert set(windows.mask.unique().tolist()) == {0.0, -100.0}


def test_the_masked_variant_takes_the_size_on_which_the_official_code_fails():
    model = lively(Craft(2, shift_mask=True, **SMALL))
    assert model(image(1, 3, 64, 64)).isfinite().all()


# Sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (7, 3), (16, 16), (17, 31)])
@pytest.mark.parametrize("padding", ["reflect", "official"])
def test_any_size_is_enlarged(size, padding):
    model = lively(Craft(3, **SMALL))
    with torch.no_grad():
        y = model.upscale(image(1, 3, *size), padding)
    assert y.shape == (1, 3, 3 * size[0], 3 * size[1])
    assert y.isfinite().all()


def test_paddings_mirror_with_and_without_the_last_pixel():
    x = torch.arange(5.0).reshape(1, 1, 1, 5)
    assert pad_image(x, 4, "reflect")[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 3, 2, 1]
    assert pad_image(x, 4, "official")[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 4, 3, 2]
    full = torch.arange(4.0).reshape(1, 1, 1, 4)
    assert pad_image(full, 4, "reflect").shape[3] == 4
    assert pad_image(full, 4, "official")[0, 0, 0].tolist() == [0, 1, 2, 3, 3, 2, 1, 0]
    with pytest.raises(ValueError, match="padding is 'zero'"):
        pad_image(x, 4, "zero")


def test_the_bare_network_refuses_parts_of_windows():
    model = Craft(2, **SMALL)
    with pytest.raises(ValueError, match="17 x 16"), torch.no_grad():
        model.forward_padded(image(1, 3, 17, 16))


def test_images_of_a_batch_do_not_see_each_other():
    model = lively(Craft(2, **SMALL))
    x = image(2, 3, 16, 32)
    with torch.no_grad():
        assert torch.allclose(model(x)[1:], model(x[1:]), atol=1e-12)


# Options and checkpoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scale": 0}, "scale is 0"),
        ({"num_heads": 5}, "num_heads 5"),
        ({"num_heads": (6,)}, "num_heads has 1 entries"),
        ({"embed_dim": 16}, "embed_dim is 16"),
        ({"resi_connection": "3conv"}, "resi_connection"),
        ({"window": (4,)}, "window"),
    ],
)
def test_options_that_do_not_fit_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        Craft(**options)


def official_file(model, folder):
    """What the authors' training saves: four tables more, under `params`."""
    h, w = model.window
    state = {name: value.float() for name, value in model.state_dict().items()}
    position = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")).flatten(1)
    offset = position[:, :, None] - position[:, None]
    for key, a, b in (("h", h, w), ("v", w, h)):
        state[f"relative_position_index_{key}"] = (offset[0] + h - 1) * (2 * w - 1) + offset[1] + w - 1
        state[f"biases_{key}"] = torch.zeros((2 * a - 1) * (2 * b - 1), 2)
    path = f"{folder}/CRAFT_MODEL_x{model.scale}.pth"
    torch.save({"params": state}, path)
    return path


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 2},
        {"scale": 3, "in_chans": 1},
        {"scale": 4, "embed_dim": 64, "num_heads": 4, "mlp_ratio": 1.5},
        {"scale": 1, "window": (6, 12), "qkv_bias": False, "resi_connection": "identity"},
    ],
    ids=str,
)
def test_options_are_read_off_an_official_file(options, tmp_path):
    model = lively(Craft(depths=(1, 2), **options))
    path = official_file(model, tmp_path)
    loaded = create_upscaler("craft", checkpoint=path)
    x = image(1, model.in_chans, 24, 24, dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(loaded(x), model(x), atol=1e-5)
    assert zoo.load_checkpoint(loaded, path).layout == "CRAFT"
    assert read_options(loaded.state_dict())["depths"] == (1, 2)  # zoo's own layout too


def test_a_file_of_another_scale_or_window_says_so(tmp_path):
    path = official_file(Craft(2, depths=(1,)), tmp_path)
    with pytest.raises(zoo.CheckpointError, match="scale 2, this one is for 4"):
        zoo.load_checkpoint(Craft(4, depths=(1,)), path)
    with pytest.raises(ValueError, match="scale 2, and scale=3"):
        create_upscaler("craft", scale=3, checkpoint=path)
    with pytest.raises(zoo.CheckpointError, match=r"window=\(4, 16\)"):
        zoo.load_checkpoint(Craft(2, depths=(1,), window=(6, 12)), path)


def test_a_saved_upscaler_is_rebuilt_from_its_file(tmp_path):
    from zoo.saving import load_model, save_model

    model = create_upscaler("craft", scale=3, depths=(1,))
    file = save_model(model, tmp_path / "craft.safetensors")
    again = load_model(file)
    x = image(1, 3, 16, 16, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_unknown_names_and_missing_weights_say_what_there_is():
    with pytest.raises(ValueError, match="'edsr'"):
        create_upscaler("edsr")
    with pytest.raises(RuntimeError, match="checkpoint="):
        create_upscaler("craft", scale=3, pretrained=True)


def test_weights_come_back_after_to_empty():
    model = Craft(2, depths=(1,), device="meta").to_empty(device="cpu")
    model.init_weights()
    assert model.mean.flatten().tolist() == pytest.approx([0.4488, 0.4371, 0.4040])
    assert model(image(1, 3, 16, 16, dtype=torch.float32)).isfinite().all()


# A bicubic start ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_start_enlarges_bicubically(scale):
    import numpy as np

    from zoo.imresize import imresize

    model = start_from_bicubic(Craft(scale, **SMALL)).eval()
    x = image(1, 3, 16, 32)
    with torch.no_grad():
        y = model(x)[0].permute(1, 2, 0).numpy()
    expected = imresize(x[0].permute(1, 2, 0).numpy(), scale)
    inner = np.s_[4 * scale : -4 * scale, 4 * scale : -4 * scale]
    assert np.abs(y - expected)[inner].max() < 1e-12


def test_the_start_needs_a_channel_for_each_phase():
    with pytest.raises(ValueError, match="75 or more"):
        start_from_bicubic(Craft(5, depths=(1,)))


# Tiles and views ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blend", [False, True])
def test_tiles_of_a_local_operation_give_the_whole(blend):
    x = image(1, 3, 50, 70)

    def double(t):
        return t.repeat_interleave(2, 2).repeat_interleave(2, 3)

    y = enlarge_tiled(double, x, 2, tile=32, overlap=8, blend=blend)
    assert torch.allclose(y, double(x), atol=1e-12)


def test_tiles_begin_where_the_published_ones_do():
    assert tile_origins(64, 32, 16) == [0, 16, 32]
    assert tile_origins(48, 32, 16) == [0, 16]
    assert tile_origins(20, 32, 16) == [0]
    with pytest.raises(ValueError, match="overlap is 32"):
        enlarge_tiled(lambda t: t, image(1, 3, 40, 40), 1, tile=32, overlap=32)


def test_self_ensemble_makes_the_model_equivariant():
    model = lively(Craft(2, **SMALL))
    x = image(1, 3, 16, 32)
    with torch.no_grad():
        y = self_ensemble(model, x)
        turned = self_ensemble(model, x.transpose(2, 3).flip(2))
        assert not torch.allclose(model(x.transpose(2, 3)), model(x).transpose(2, 3))
    assert torch.allclose(turned, y.transpose(2, 3).flip(2), atol=1e-10)


# With a backbone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_a_new_side_input_changes_nothing_and_then_learns(backbone):
    plain = lively(Craft(2, depths=(1, 1)))
    model = create_upscaler("craft", scale=2, backbone=backbone, depths=(1, 1))
    report = zoo.load_checkpoint(model, plain.state_dict())
    assert "side input" in str(report)
    x = image(1, 3, 20, 37, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
        assert model.predict(x[0]).image.size == (74, 40)
    model.train()
    model(x).square().mean().backward()
    assert model.gamma.grad.abs().sum() > 0
    with torch.no_grad():
        model.gamma.fill_(0.1)
    model.zero_grad()
    model(x).square().mean().backward()
    reached = [p.grad for p in model.pyramid.backbone.parameters() if p.grad is not None]
    assert sum(float(g.abs().sum()) for g in reached) > 0
    model.eval()
    with torch.no_grad():
        assert not torch.allclose(model(x), plain(x))
        assert torch.allclose(model(x), recorded(model, x), atol=1e-5)  # in strips too


def test_a_built_backbone_is_taken_and_grey_images_are_refused():
    import timm

    model = CraftOnBackbone(timm.create_model("convformer_s18"), scale=2, depths=(1,) * 4)
    assert [lateral.in_channels for lateral in model.laterals] == [64, 128, 320]
    assert model.sources == (0, 1, 2, 2)
    side = sum(p.numel() for n, p in model.named_parameters() if n.startswith(("laterals", "gamma")))
    assert side == 24_912  # as the design counts
    with pytest.raises(ValueError, match="in_chans is 1"):
        CraftOnBackbone("resnet18", in_chans=1)


# Tools --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_network_compiles_without_graph_breaks_and_exports():
    model = Craft(2, depths=(1,)).eval()
    x = image(1, 3, 16, 16, dtype=torch.float32)
    expected = recorded(model, x)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), expected, atol=1e-5)
    program = torch.export.export(model, (x,))
    assert torch.allclose(program.module()(x), expected, atol=1e-5)


def test_bf16_autocast_stays_close():
    model = start_from_bicubic(Craft(2, depths=(1,))).eval()
    x = image(1, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert (y.float() - recorded(model, x)).abs().mean() < 5e-3
    half = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        for y in (half(x.bfloat16()), recorded(half, x.bfloat16())):  # in strips, and whole
            assert y.dtype == torch.bfloat16
            assert (y.float() - recorded(model, x)).abs().mean() < 2e-2


@pytest.mark.slow
def test_onnx_takes_any_size():
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = lively(Craft(2, depths=(1,)))
    with tempfile.TemporaryDirectory() as folder:
        assert export_onnx(model, f"{folder}/craft.onnx").is_file()  # compares in ONNX Runtime


def test_some_steps_from_random_weights_overfit_one_crop():
    torch.manual_seed(0)
    model = start_from_bicubic(Craft(2, depths=(1,)))
    high = torch.nn.functional.interpolate(image(1, 3, 8, 8, dtype=torch.float32), scale_factor=4)
    low = torch.nn.functional.avg_pool2d(high, 2)
    with torch.no_grad():
        first = float((model(low) - high).abs().mean())
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(25):
        loss = (model(low) - high).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.8 * first
