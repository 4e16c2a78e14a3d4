"""What SLAB promises beyond the common suite: its schedule, its folds, its sizes and its files."""

import copy
import sys
import types
from functools import partial

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

import zoo
from zoo.checkpoint import CheckpointError
from zoo.prepbn import PRepBN, PRepBNSchedule, RepBN, gamma_at, recalibrate, set_gamma
from zoo.slab import slab_swin_dense
from zoo.slab_recipe import LearningRates, optimizer_groups
from zoo.slab_windows import Stripe, WindowAttention, shift_mask

STAGES = dict(depths=(2, 1, 2, 1))
TINY = {
    "deit_t_prepbn": dict(embed_dim=48, depth=2, num_heads=3),
    "slab_deit_t": dict(embed_dim=48, depth=2, num_heads=3),
    "pvt_t_prepbn": dict(embed_dims=(16, 24, 32, 40), num_heads=(1, 2, 4, 5), **STAGES),
    "slab_pvt_t": dict(embed_dims=(16, 24, 32, 40), num_heads=(1, 2, 4, 5), linear_sr_ratios=(8, 4, 2, 1), **STAGES),
    "slab_pvt_v2_b0": dict(embed_dims=(16, 24, 32, 40), num_heads=(1, 2, 4, 5), **STAGES),
    "swin_t_prepbn": dict(embed_dim=12, num_heads=(1, 2, 4, 8), **STAGES),
    "slab_swin_t": dict(embed_dim=12, num_heads=(1, 2, 4, 8), **STAGES),
    "slab_cswin_t": dict(embed_dim=16, num_heads=(2, 4, 8, 16), **STAGES),
}


def build(name, **kwargs):
    """A tiny model of the variant's kind, with parameters and statistics that are not the initial ones."""
    if name == "dense":
        model = slab_swin_dense(**TINY["slab_swin_t"] | kwargs)
    else:
        model = timm.create_model(name, **dict(num_classes=7) | TINY[name] | kwargs)
    generator = torch.Generator().manual_seed(0)

    def noise(tensor, scale):
        return scale * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise(parameter, 0.1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean += noise(module.running_mean, 0.3)
                module.running_var.mul_(1 + noise(module.running_var, 1.0).abs())
    return model


def images(*size, dtype=torch.float32, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_equal(a, b, bar=1e-10):
    pairs = zip(a, b) if isinstance(a, list) else [(a, b)]
    for x, y in pairs:
        assert (x - y).abs().max() <= bar * x.std()


# The inference form


@pytest.mark.parametrize("size", [(64, 64), (72, 104)], ids=str)
@pytest.mark.parametrize("name", [*TINY, "dense"])
def test_a_folded_model_equals_the_trained_one_in_float64(name, size):
    model = build(name).double().eval()
    image = images(*size, dtype=torch.float64)
    with torch.no_grad():
        assert_equal(model(image), zoo.fold(model)(image))


@pytest.mark.parametrize("name", list(TINY))
def test_no_norm_is_left_in_a_folded_model(name):
    folded = zoo.fold(build(name))
    left = {n for n, m in folded.named_modules() if isinstance(m, PRepBN | RepBN) and not n.endswith("norm2")}
    # zeros surround the map of PVTv2's next convolution, not the shift that a norm would leave there
    assert left == ({"stages.0.norm", "stages.1.norm", "stages.2.norm"} if "v2" in name else set())


@pytest.mark.parametrize("name", ["slab_deit_t", "slab_pvt_t", "slab_swin_t", "slab_cswin_t"])
def test_timms_own_reparameterization_gives_the_same(name):
    model = build(name).double().eval()
    image = images(64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert_equal(model(image), reparameterize_model(model)(image))


@pytest.mark.parametrize("pool", ["avg", ""])
@pytest.mark.parametrize("name", ["slab_deit_t", "slab_swin_t"])
def test_a_folded_model_without_classifier_gives_the_same_features(name, pool):
    model = build(name).double().eval()
    model.reset_classifier(0, pool)
    image = images(64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert_equal(model(image), zoo.fold(model)(image))


def test_a_folded_model_saves_and_loads_with_the_bias_that_padded_windows_need():
    folded = zoo.fold(build("dense").double())
    other = zoo.fold(slab_swin_dense(**TINY["slab_swin_t"]).double())
    zoo.load_checkpoint(other, folded.state_dict())
    image = images(72, 104, dtype=torch.float64)
    with torch.no_grad():
        assert_equal(folded(image), other(image), 0)


# The schedule


def prepbn(model):
    return [m for m in model.modules() if isinstance(m, PRepBN)]


def test_gamma_falls_linearly_once_a_forward_pass_and_stays_at_zero():
    norm = PRepBN(4, total_steps=3).train()
    seen = []
    for _ in range(5):
        norm(torch.randn(2, 3, 4))
        seen.append(int(norm.last))
    assert seen == [3, 2, 1, 0, 0]
    assert [gamma_at(step, 3) for step in range(5)] == pytest.approx([1, 2 / 3, 1 / 3, 0, 0])


def test_at_gamma_one_the_norm_is_its_layer_norm_and_the_statistics_move():
    norm = PRepBN(6, eps=1e-5, total_steps=10).train()
    x = 3 * torch.randn(4, 5, 6) + 1
    torch.testing.assert_close(norm(x), norm.norm1(x))
    assert norm.norm2.bn.num_batches_tracked == 1
    assert norm.norm2.bn.running_mean.abs().min() > 0


def test_during_the_warm_up_the_statistics_wait_and_a_saved_state_goes_on_from_there():
    norm = PRepBN(6, total_steps=10, warm_steps=2, initial_gamma=0.5).train()
    x = torch.randn(4, 5, 6)
    torch.testing.assert_close(norm(x), norm.norm1(x))
    assert norm.norm2.bn.num_batches_tracked == 0
    resumed = PRepBN(6, total_steps=10, initial_gamma=0.5).train()
    resumed.load_state_dict(norm.state_dict())
    torch.testing.assert_close(resumed(x), resumed.norm1(x))
    y = resumed(x)
    assert resumed.norm2.bn.num_batches_tracked == 1
    torch.testing.assert_close(y, 0.5 * resumed.norm1(x) + 0.5 * resumed.norm2.train()(x))


def test_the_layout_of_tokens_does_not_matter_to_the_statistics():
    norm = PRepBN(6, total_steps=2).double().train()
    other = copy.deepcopy(norm)
    x = torch.randn(2, 4, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(norm(x).flatten(1, 2), other(x.flatten(1, 2)))
    torch.testing.assert_close(norm.norm2.bn.running_var, other.norm2.bn.running_var)
    expected = 0.9 + 0.1 * x.flatten(0, 2).var(0)
    torch.testing.assert_close(norm.norm2.bn.running_var, expected)


@pytest.mark.parametrize("name", ["slab_deit_t", "slab_swin_t"])
def test_recomputed_blocks_count_once_and_give_the_same_step(name):
    model = build(name).double().train()
    again = copy.deepcopy(model)
    again.set_grad_checkpointing()
    image = images(64, 64, dtype=torch.float64)
    for _ in range(2):
        for m in (model, again):
            m.zero_grad()
            m(image).square().mean().backward()
    for (key, a), b in zip(model.state_dict().items(), again.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14, msg=key)
    for a, b in zip(model.parameters(), again.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-14)


def test_a_schedule_drives_every_norm_by_optimizer_steps_whatever_else_runs():
    model = build("slab_swin_t").train()
    schedule = PRepBNSchedule(total_steps=8, warm_steps=2)
    assert [schedule.gamma(step) for step in (0, 2, 6, 10, 99)] == [1, 1, 0.5, 0, 0]
    assert schedule.before_step(model, 6) == 0.5
    for _ in range(3):
        model(images(32, 32))
    assert {(int(n.warm), int(n.iter), int(n.total_step)) for n in prepbn(model)} == {(0, 4, 8)}
    schedule.before_step(model, 1)
    assert {(int(n.warm), int(n.iter)) for n in prepbn(model)} == {(1, 8)}
    assert PRepBNSchedule.of_training(1000, 0.8, warm_steps=100) == PRepBNSchedule(700, 100)


def test_set_gamma_fixes_the_blend():
    model = build("slab_deit_t").train()
    set_gamma(model, 0.25)
    for _ in range(2):
        model(images(32, 32))
    assert {int(n.iter) for n in prepbn(model)} == {15000}
    with pytest.raises(ValueError, match=r"gamma=1\.5"):
        set_gamma(model, 1.5)


def test_every_parameter_has_a_gradient_at_every_gamma():
    model = build("slab_cswin_t").train()
    for gamma in (1.0, 0.5, 0.0):
        set_gamma(model, gamma)
        model.zero_grad(set_to_none=True)
        model(images(64, 64)).sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_evaluation_ignores_gamma_and_counts_nothing():
    model = build("slab_deit_t").eval()
    before = [int(n.iter) for n in prepbn(model)]
    with torch.no_grad():
        y = model(images(64, 64))
        set_gamma(model, 0.0)
        torch.testing.assert_close(model(images(64, 64)), y)
    assert before == [60000] * len(before)


def test_recalibration_renews_statistics_and_nothing_else():
    model = build("slab_swin_t", drop_path_rate=0.5).train()
    model.stages[0].eval()
    before = copy.deepcopy(model.state_dict())
    assert recalibrate(model, [images(64, 64), images(32, 96)]) == 2
    changed = {n.rsplit(".", 1)[-1] for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}
    assert model.training
    assert not model.stages[0].blocks[0].norm1.norm2.bn.training
    assert model.stages[1].blocks[0].norm1.norm2.bn.training


# Sizes


@pytest.mark.parametrize("size", [(64, 64), (72, 104), (250, 33), (32, 32)], ids=str)
@pytest.mark.parametrize("name", list(TINY))
def test_any_size_works_and_set_input_size_changes_nothing_but_when_tables_are_resampled(name, size):
    model = build(name).double().eval()
    image = images(*size, dtype=torch.float64, batch=1)
    with torch.no_grad():
        y = model(image)
        assert y.isfinite().all()
        state = {n: p.requires_grad_(False) for n, p in model.named_parameters()}
        model.set_input_size(size)
        # DeiT's table passes through float32 on its way, as timm resamples it
        assert_equal(y, model(image), 1e-5 if "deit" in name else 1e-11)
        assert not any(p.requires_grad for p in model.parameters())
        assert state.keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("name", ["slab_deit_t", "slab_pvt_t", "slab_swin_t", "slab_cswin_t"])
def test_weights_of_another_size_load_resampled(name):
    source = build(name)
    target = timm.create_model(name, **TINY[name], num_classes=7, img_size=96).double().eval()
    report = zoo.load_checkpoint(target, source.state_dict())
    assert report.complete
    assert "resampled" in str(report)
    source.set_input_size(96)
    image = images(96, 96, dtype=torch.float64)
    with torch.no_grad():
        assert_equal(source.double().eval()(image), target(image), 1e-6)


def test_images_that_leave_no_map_are_refused_in_one_sentence():
    model = build("pvt_t_prepbn").eval()
    with pytest.raises(ValueError, match="32 px"):
        model(images(24, 24))
    with pytest.raises(ValueError, match="16x16 px"):
        model.set_input_size(16)


def test_tokens_from_opposite_ends_of_a_shifted_map_do_not_see_each_other():
    attn = WindowAttention(8, 2, (6, 6), 3, shifted=True).double()
    x = torch.randn(1, 6, 6, 8, dtype=torch.float64, requires_grad=True)
    attn(x)[0, 0, 0].sum().backward()
    reach = x.grad[0].abs().sum(-1) > 0
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[:1, :1] = True  # a corner that the shift leaves alone
    assert torch.equal(reach, expected)
    assert shift_mask(6, 6, 3, 3, 1, 1).float().mean() < 1


@pytest.mark.parametrize("linear", [False, True])
def test_padding_of_stripes_takes_no_part(linear):
    stripe = Stripe(8, 2, (6, 4), columns=4, linear=linear).double()
    rest = Stripe(8, 2, (6, 2), columns=2, linear=linear).double()
    for name, parameter in rest.named_parameters():
        if name != "positional_encoding":
            parameter.data.copy_(stripe.get_parameter(name).data)
    qkv = [torch.randn(2, 6, 10, 8, dtype=torch.float64) for _ in range(3)]
    with torch.no_grad():
        whole = stripe(*qkv)
        torch.testing.assert_close(whole[:, :, 8:], rest(*(x[:, :, 8:] for x in qkv)))


# Files


def test_files_with_prepbn_load_into_repbn_models_and_back():
    wide = build("slab_swin_t").eval()
    narrow = timm.create_model("slab_swin_t", **TINY["slab_swin_t"], num_classes=7, norm_layer=RepBN).eval()
    assert "left out" in str(zoo.load_checkpoint(narrow, wide.state_dict()))
    image = images(64, 64)
    with torch.no_grad():
        torch.testing.assert_close(narrow(image), wide(image))
        other = build("slab_swin_t").eval()
        assert "gamma is 0" in str(zoo.load_checkpoint(other, narrow.state_dict()))
        torch.testing.assert_close(other(image), wide(image))
    assert {int(n.iter) for n in prepbn(other)} == {0}


def test_a_file_without_some_norm_is_refused():
    model = build("slab_swin_t")
    state = {n: v for n, v in model.state_dict().items() if not n.startswith("stages.2.blocks.1.norm2.norm2.")}
    with pytest.raises(CheckpointError, match=r"stages\.2\.blocks\.1\.norm2\.norm2\.alpha"):
        zoo.load_checkpoint(build("slab_swin_t"), state)


def test_a_classifiers_file_loads_into_the_dense_backbone():
    classifier = build("slab_swin_t")
    dense = slab_swin_dense(**TINY["slab_swin_t"])
    report = zoo.load_checkpoint(dense, classifier.state_dict())
    assert report.complete
    assert "four maps" in str(report)
    torch.testing.assert_close(dense.stem.conv.weight, classifier.stem.conv.weight)


def test_released_files_need_no_code_for_the_configuration_in_them(tmp_path, monkeypatch):
    module = types.ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    model = build("slab_deit_t")
    config = module.CfgNode(MODEL=module.CfgNode(TYPE="slab"), LR=0.1)
    torch.save({"model": model.state_dict(), "config": config, "epoch": 299}, tmp_path / "slab.pth")
    monkeypatch.undo()
    assert zoo.load_checkpoint(build("slab_deit_t"), tmp_path / "slab.pth").complete


# timm's contract, and what its suite does not ask


@pytest.mark.parametrize("name", list(TINY))
def test_init_weights_restores_everything_after_to_empty(name):
    with torch.device("meta"):
        model = timm.create_model(name, **TINY[name])
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(77)
    model.init_weights()
    fresh = timm.create_model(name, **TINY[name])
    for (key, a), b in zip(model.named_buffers(), dict(fresh.named_buffers()).values()):
        assert torch.equal(a, b), key
    for (key, a), b in zip(model.named_parameters(), fresh.parameters()):
        assert a.abs().max() < 10, key
        if b.unique().numel() == 1:
            assert torch.equal(a, b), key


@pytest.mark.parametrize("name", ["slab_deit_t", "slab_pvt_v2_b0", "slab_swin_t", "slab_cswin_t", "dense"])
def test_exported_and_compiled_models_give_the_same(name):
    depths = dict(depth=1) if "deit" in name else dict(depths=(1, 1, 2, 1))
    model = build(name, **depths).eval()
    image = images(64, 64)
    with torch.no_grad():
        expected = model(image)
        assert_equal(expected, torch.export.export(model, (image,)).module()(image), 1e-5)
        assert_equal(expected, torch.compile(model, backend="eager", fullgraph=True)(image), 1e-5)


def test_training_compiles_without_graph_breaks_and_without_recompiling_each_step():
    model = build("slab_deit_t").train()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            compiled(images(32, 32)).sum().backward()
    assert {int(n.iter) for n in prepbn(model)} == {59997}


@pytest.mark.parametrize("name", list(TINY))
def test_bfloat16_channels_last_and_one_channel(name):
    model = build(name, in_chans=1).to(torch.bfloat16)
    image = images(64, 64)[:, :1].bfloat16().contiguous(memory_format=torch.channels_last)
    y = model(image)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert y.isfinite().all()


def test_features_have_the_strides_and_widths_that_they_say():
    for name in ("slab_pvt_t", "slab_swin_t", "slab_cswin_t"):
        model = timm.create_model(name, **TINY[name], features_only=True)
        for y, info in zip(model(images(64, 96)), model.feature_info):
            assert y.shape == (2, info["num_chs"], 64 // info["reduction"], 96 // info["reduction"])


def test_the_dense_backbones_batch_norm_stays_frozen_while_gamma_falls():
    model = build("dense").train()
    before = copy.deepcopy(model.state_dict())
    model(images(64, 64))
    changed = {n.rsplit(".", 1)[-1] for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {"iter"}


def test_mixed_stages_begin_linear():
    model = timm.create_model("slab_swin_t", **TINY["slab_swin_t"], attn_type="LMMS1")
    kinds = [[hasattr(b.attn, "dwc") for b in stage.blocks] for stage in model.stages]
    assert kinds == [[True, True], [True], [True, False], [False]]
    for wrong in ("LLS", "LLSX", "LMSS", "LLSS4", "LLSSx", "LMSSx"):
        with pytest.raises(ValueError, match="attn_type"):
            timm.create_model("slab_swin_t", **TINY["slab_swin_t"], attn_type=wrong)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="total_steps=0"):
        PRepBN(4, total_steps=0)
    with pytest.raises(ValueError, match="global_pool='token'"):
        build("slab_deit_t", global_pool="token")
    with pytest.raises(ValueError, match="num_heads 3"):
        build("slab_swin_t", num_heads=(1, 2, 4))
    with pytest.raises(ValueError, match="5 heads"):
        build("slab_deit_t", num_heads=5)
    with pytest.raises(ValueError, match="slab_swin_t, slab_swin_s"):
        slab_swin_dense("swin_x")


# The recipe


def test_what_is_decayed_and_what_is_not():
    decayed, plain = optimizer_groups(build("slab_swin_t"), 0.05)
    assert "stages.0.blocks.0.attn.positional_encoding" in decayed["param_names"]
    assert "stages.0.blocks.0.attn.dwc.weight" in decayed["param_names"]
    assert "stages.2.blocks.0.attn.relative_position_bias_table" in plain["param_names"]
    assert "stages.0.blocks.0.norm1.norm2.alpha" in plain["param_names"]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    torch.optim.AdamW([decayed, plain])


def test_learning_rates_scale_with_the_batch():
    rates = LearningRates(warmup_epochs=2, epochs=10).scaled(1024)
    assert rates.base == 1e-3
    assert rates.at(0, 100) == rates.start
    assert rates.at(200, 100) < rates.base
    assert rates.at(1000, 100) == rates.at(5000, 100) == rates.minimum


def test_the_official_option_gives_the_norm_of_the_paper():
    model = timm.create_model("swin_t_prepbn", **TINY["swin_t_prepbn"], norm_layer=partial(PRepBN, total_steps=9))
    assert {n.total_steps for n in prepbn(model)} == {9}
