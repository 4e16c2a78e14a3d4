"""NiNformer: official files both ways, other grids of tokens, inference form, and what timm's users expect."""

import io
import math

import pytest
import timm
import torch
import torch.nn.functional as F

import zoo
from zoo.checkpoint import CheckpointError
from zoo.ninformer import NinFormer, constructor_arguments, rename
from zoo.ninformer_blocks import FourierGate, resize_map

TINY = dict(img_size=24, patch_size=4, num_classes=5, embed_dim=16, depth=3, token_dim=20, channel_dim=28)
OFFICIAL = {
    "patch_embed.proj": "patcher",
    "head": "classifier",
    "gate.norm_tokens": "mgu.Mixer.token_mix.0",
    "gate.mlp_tokens.fc1": "mgu.Mixer.token_mix.2.net.0",
    "gate.mlp_tokens.fc2": "mgu.Mixer.token_mix.2.net.3",
    "gate.norm_channels": "mgu.Mixer.channel_mix.0",
    "gate.mlp_channels.fc1": "mgu.Mixer.channel_mix.1.net.0",
    "gate.mlp_channels.fc2": "mgu.Mixer.channel_mix.1.net.3",
    "value": "mgu.proj",
    "mlp.fc1": "ffn.net.0",
    "mlp.fc2": "ffn.net.3",
    "norm": "norm",
}


def tiny(**options) -> NinFormer:
    model = NinFormer(**TINY | options).double().eval()
    for p in model.parameters():  # norms and biases that matter
        torch.nn.init.normal_(p, std=0.3)
    return model


def image(*size, batch=2):
    return torch.randn(batch, 3, *size, dtype=torch.float64)


def official_names(model) -> dict[str, torch.Tensor]:
    state = {}
    for name, value in model.state_dict().items():
        body, leaf = name.rsplit(".", 1)
        block, rest = ("", body) if not body.startswith("blocks.") else body.removeprefix("blocks.").split(".", 1)
        state[(f"model.{block}." if block else "") + f"{OFFICIAL[rest]}.{leaf}"] = value
    return state


PARAMETERS = {
    "ninformer_patch4_32": 2_652_170,
    "ninformer_patch4_32.cifar100": 2_675_300,
    "fourier_ninformer_patch4_32": 1_331_978,
    "ninformer_tiny_patch16_224": 6_165_208,
    "ninformer_small_patch16_224": 20_289_688,
    "ninformer_base_patch16_224": 72_426_520,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_official_class(name):
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == PARAMETERS[name]


def test_official_files_load_and_their_names_are_translated_back_and_forth():
    model, other = tiny(), tiny()
    official = official_names(model)
    assert {rename(name) for name in official} == set(model.state_dict())
    report = zoo.load_checkpoint(other, {"state_dict": official})
    assert report.layout == "NiNformer"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


@pytest.mark.parametrize("gate", [{}, dict(gate_layer=FourierGate, img_size=24)])
def test_a_files_shapes_tell_the_constructor(gate):
    model = tiny(**gate)
    arguments = constructor_arguments(official_names(model))
    rebuilt = NinFormer(**arguments)
    assert [p.shape for p in rebuilt.parameters()] == [p.shape for p in model.parameters()]


def test_both_halves_of_a_block_share_one_norm():
    model = tiny()
    assert sum(name.startswith("blocks.0.norm") for name, _ in model.named_parameters()) == 2
    calls = []
    model.blocks[0].norm.register_forward_hook(lambda *_: calls.append(1))
    model(image(24, 24))
    assert len(calls) == 2


# Other grids


@pytest.mark.parametrize(("new", "old"), [([12, 12], [8, 8]), ([6, 10], [8, 8]), ([3, 5], [7, 2]), ([1, 4], [4, 1])])
def test_resize_maps_are_torchs_antialiased_bicubic_resize(new, old):
    tokens = torch.randn(old[0] * old[1], 6, dtype=torch.float64)
    ours = torch.kron(*resize_map(new, old, tokens)) @ tokens
    # width and height of 1 doubled: torch's resize of a map of width 1 is not to be trusted
    grid = tokens.t().reshape(1, 6, *old)
    pad = [n if n > 1 else 2 for n in old]
    grid = grid.expand(1, 6, *old) if pad == old else grid.repeat(1, 1, pad[0] // old[0], pad[1] // old[1])
    theirs = F.interpolate(grid, size=new, mode="bicubic", antialias=True)
    torch.testing.assert_close(ours.t().reshape(1, 6, *new), theirs, rtol=0, atol=1e-12)


def test_resize_maps_keep_constants_and_are_the_identity_between_equal_grids():
    like = torch.zeros(1, dtype=torch.float64)
    for matrix in resize_map([9, 4], [5, 7], like):
        torch.testing.assert_close(matrix.sum(1), torch.ones(len(matrix), dtype=torch.float64))
    for matrix in resize_map([5, 7], [5, 7], like):
        assert torch.equal(matrix, torch.eye(len(matrix), dtype=torch.float64))


def test_enlarged_tokens_give_enlarged_outputs_under_nearest_up_and_mean_down(monkeypatch):
    def nearest(new, old, like):
        maps = []
        for n, o in zip(new, old):
            ones = torch.ones(max(n // o, 1), max(o // n, 1), dtype=like.dtype)
            maps.append(torch.kron(torch.eye(min(n, o), dtype=like.dtype), ones / ones.shape[1]))
        return maps

    monkeypatch.setattr("zoo.ninformer_blocks.resize_map", nearest)
    model = tiny(dynamic_img_size=True)
    tokens = torch.randn(1, 36, 16, dtype=torch.float64)

    def enlarge(x):
        return x.reshape(1, 6, 6, 16).repeat_interleave(2, 1).repeat_interleave(2, 2).reshape(1, 144, 16)

    large = enlarge(tokens)
    maps = model.grid_maps(48, 48, large)
    for block in model.blocks:
        tokens, large = block(tokens), block(large, maps)
    torch.testing.assert_close(large, enlarge(tokens), rtol=0, atol=1e-10)
    torch.testing.assert_close(model.forward_head(large), model.forward_head(tokens), rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", [(32, 20), (16, 16), (48, 24)])
def test_native_grid_folded_weights_and_loading_at_another_size_agree(size):
    model, x = tiny(dynamic_img_size=True), image(*size)
    expected = model(x)
    state = official_names(model)
    loaded = tiny(img_size=size)
    report = zoo.load_checkpoint(loaded, state)
    assert "resampled from 6x6" in report.notes[0]
    torch.testing.assert_close(loaded(x), expected, rtol=0, atol=1e-10)
    model.set_input_size(size)
    assert model.blocks[0].gate.mlp_tokens.fc1.in_features == size[0] * size[1] // 16
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-10)


def test_the_built_grid_takes_the_official_path_bit_for_bit():
    model, dynamic = tiny(), tiny(dynamic_img_size=True)
    dynamic.load_state_dict(model.state_dict())
    x = image(24, 24)
    assert torch.equal(model(x), dynamic(x))


@pytest.mark.parametrize("wrapped", [False, True])
def test_zoos_own_file_is_resampled_too(wrapped):
    model, loaded = tiny(), tiny(img_size=(32, 20))
    state = model.state_dict()
    zoo.load_checkpoint(loaded, {"state_dict": state} if wrapped else state)
    model.set_input_size((32, 20))
    x = image(32, 20)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=1e-10)


def test_a_rectangular_file_loads_where_it_fits_and_is_refused_elsewhere():
    model = tiny(img_size=(24, 40))
    state = official_names(model)
    zoo.load_checkpoint(tiny(img_size=(24, 40)), state)
    with pytest.raises(CheckpointError, match="60 tokens, no square grid"):
        zoo.load_checkpoint(tiny(), state)


def test_resizing_keeps_frozen_weights_frozen_and_changes_the_default_size():
    model = tiny()
    model.blocks[1].requires_grad_(False)
    model.set_input_size(img_size=(32, 24), patch_size=8)
    assert not any(p.requires_grad for p in model.blocks[1].parameters())
    assert all(p.requires_grad for p in model.blocks[0].parameters())
    assert model.grid == [4, 3]
    assert model.feature_info[0]["reduction"] == 8
    assert model(image(32, 24)).shape == (2, 5)


def test_wrong_sizes_are_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"set_input_size\(\(32, 24\)\)"):
        tiny()(image(32, 24))
    with pytest.raises(ValueError, match="dynamic_img_pad"):
        tiny(img_size=26)
    with pytest.raises(ValueError, match="25x24 px and patches of 4x4"):
        tiny(dynamic_img_size=True)(image(25, 24))
    with pytest.raises(ValueError, match="no multiple"):
        tiny().set_input_size(26)
    with pytest.raises(ValueError, match="'avg' or ''"):
        tiny(global_pool="token")


@pytest.mark.parametrize("options", [dict(img_size=(22, 23)), dict(dynamic_img_size=True)])
def test_padding_equals_zeros_at_the_right_and_at_the_bottom(options):
    model = tiny(dynamic_img_pad=True, **options)
    x = image(22, 23)
    plain = tiny()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), plain(F.pad(x, (0, 1, 0, 2))), rtol=0, atol=1e-12)
    assert model.forward_intermediates(x, [0], intermediates_only=True)[0].shape == (2, 16, 6, 6)


@pytest.mark.parametrize("size", [(24, 24), (16, 36)])
def test_the_fourier_gate_takes_any_size_and_is_a_two_dimensional_transform(size):
    model = tiny(gate_layer=FourierGate)
    assert model(image(*size)).shape == (2, 5)
    x = torch.randn(1, 6, 4, dtype=torch.float64)
    angles = [2 * math.pi * torch.outer(torch.arange(n), torch.arange(n)).double() / n for n in (6, 4)]
    expected = angles[0].cos() @ x @ angles[1].cos() - angles[0].sin() @ x @ angles[1].sin()
    torch.testing.assert_close(model.blocks[0].gate(x), expected, rtol=0, atol=1e-12)


# Inference form and timm


@pytest.mark.parametrize("options", [{}, dict(final_norm=True), dict(dynamic_img_size=True), dict(global_pool="")])
def test_folded_model_equals_the_trained_one_in_float64(options):
    model = tiny(**options)
    folded = zoo.fold(model)
    x = image(24, 24)
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-12)
    assert torch.equal(folded.forward_features(x), model.forward_features(x))
    assert folded.pooled_tail == (not options.get("final_norm", False))


def test_dropout_acts_in_every_mlp_in_training_only():
    model = tiny(proj_drop_rate=0.5)
    x = image(24, 24)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    for part in (model.blocks[0].gate.mlp_tokens, model.blocks[0].gate.mlp_channels, model.blocks[0].mlp):
        shape = (2, 36, 16)
        assert not torch.equal(part(torch.ones(shape).double()), part(torch.ones(shape).double()))


def test_other_activations_reach_every_mlp():
    gelu, relu = tiny(), tiny(act_layer=torch.nn.ReLU)
    relu.load_state_dict(gelu.state_dict())
    x = torch.randn(1, 36, 16, dtype=torch.float64)
    for name in ("gate.mlp_tokens", "gate.mlp_channels", "mlp"):
        part = relu.blocks[0].get_submodule(name)
        assert not torch.allclose(part(x), gelu.blocks[0].get_submodule(name)(x))


def test_features_only_gives_maps_at_the_patch_stride():
    model = timm.create_model("ninformer_patch4_32", features_only=True, depth=8, embed_dim=32, hidden_dim=24)
    assert model.feature_info.module_name() == ["blocks.1", "blocks.3", "blocks.5", "blocks.7"]
    assert [tuple(f.shape) for f in model(torch.randn(1, 3, 32, 32))] == [(1, 32, 8, 8)] * 4
    dense = timm.create_model(
        "ninformer_patch4_32", features_only=True, depth=4, embed_dim=32, dynamic_img_size=True, out_indices=(1, 3)
    )
    assert [tuple(f.shape) for f in dense(torch.randn(1, 3, 48, 36))] == [(1, 32, 12, 9)] * 2
    assert model.feature_info.reduction() == [4] * 4


def test_timm_builds_it_at_another_size_and_loads_files_of_the_built_one(tmp_path):
    small = dict(embed_dim=16, depth=2)
    source = timm.create_model("ninformer_patch4_32", **small).eval()
    path = tmp_path / "official.pth"
    torch.save(official_names(source), path)
    overlay = dict(file=str(path))
    model = timm.create_model(
        "ninformer_patch4_32", pretrained=True, pretrained_cfg_overlay=overlay, img_size=48, num_classes=7, **small
    ).eval()
    source.set_input_size(48)
    x = torch.randn(1, 3, 48, 48)
    torch.testing.assert_close(model.forward_features(x), source.forward_features(x), rtol=0, atol=1e-5)
    assert model(x).shape == (1, 7)


def test_unreleased_weights_are_explained(monkeypatch):
    monkeypatch.delenv("ZOO_WEIGHTS", raising=False)
    with pytest.raises(RuntimeError, match="never released"):
        timm.create_model("ninformer_patch4_32", pretrained=True)


def test_init_weights_restores_everything_after_to_empty():
    model = NinFormer(**TINY, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(math.nan)
    torch.manual_seed(3)
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())
    assert model.blocks[0].norm.weight.eq(1).all()
    torch.testing.assert_close(
        model.blocks[0].gate.mlp_tokens.fc1.weight.std(), torch.tensor(1 / math.sqrt(3 * 36)), rtol=0.1, atol=0
    )


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("form", ["script", "fx", "export", "compile"])
@pytest.mark.parametrize(
    "options",
    [{}, dict(dynamic_img_size=True), dict(dynamic_img_size=True, dynamic_img_pad=True), dict(gate_layer=FourierGate)],
    ids=["built", "dynamic", "padded", "fourier"],
)
@pytest.mark.parametrize("folded", [False, True], ids=["eager", "folded"])
def test_every_capture_gives_the_same_numbers(form, options, folded):
    model = tiny(depth=2, **options)
    if folded:
        model = zoo.fold(model)
    x = image(32, 20) if options else image(24, 24)
    torch.compiler.reset()  # sizes seen by earlier cases would be compiled as symbols
    captured = {
        "script": torch.jit.script,
        "fx": torch.fx.symbolic_trace,
        "export": lambda m: torch.export.export(m, (x,)).module(),
        "compile": lambda m: torch.compile(m, fullgraph=True, backend="eager"),
    }[form](model)
    with torch.no_grad():
        torch.testing.assert_close(captured(x), model(x), rtol=0, atol=0 if form == "fx" else 1e-12)


@pytest.mark.parametrize("options", [{}, dict(dynamic_img_size=True)])
def test_checkpointing_drop_path_and_every_parameter_get_gradients(options):
    model = tiny(drop_path_rate=0.1, **options).train()
    x = image(24, 24) if not options else image(32, 20)
    model.set_grad_checkpointing()
    torch.manual_seed(0)
    model(x).square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    assert all(g.abs().sum() > 0 for g in grads)
    model.zero_grad()
    model.set_grad_checkpointing(False)
    torch.manual_seed(0)
    model(x).square().sum().backward()
    for p, g in zip(model.parameters(), grads):
        torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dynamic", [False, True])
def test_bf16_autocast_channels_last_grey_and_a_second_file_round(dynamic):
    model = NinFormer(**TINY | dict(in_chans=1), dynamic_img_size=dynamic).eval()
    x = torch.randn(2, 1, 32, 20) if dynamic else torch.randn(2, 1, 24, 24)
    expected = model(x)
    channels_last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(channels_last, expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), expected, rtol=0, atol=0.1)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = NinFormer(**TINY | dict(in_chans=1), dynamic_img_size=dynamic).eval()
    zoo.load_checkpoint(again, torch.load(file, weights_only=True))
    assert torch.equal(again(x), model(x))
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
