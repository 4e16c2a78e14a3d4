"""Activator: official files both ways, a bag of patches exactly, inference form, and what timm's users expect."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

import zoo
from zoo.activator import Activator, constructor_arguments, rename
from zoo.checkpoint import CheckpointError

TINY = dict(img_size=16, patch_size=4, num_classes=5, embed_dim=16, depth=3, hidden_dim=24)
LAYOUTS = {
    "Activator": {},
    "Activator GEGLU-only": dict(mlp=False),
    "Uniform Activator": dict(mlp=False, gate_norm=False, hidden_dim=16),
}
OFFICIAL = {
    "patch_embed.proj": "patcher",
    "head": "classifier",
    "glu.fc1_g": "actgu.proj_1",
    "glu.fc1_x": "actgu.proj_2",
    "glu.fc2": "actgu.proj_3",
    "glu.norm": "actgu.norm",
    "mlp.fc1": "ffn.net.0",
    "mlp.fc2": "ffn.net.3",
    "norm": "norm",
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def tiny(layout="Activator", **options) -> Activator:
    model = Activator(**TINY | LAYOUTS[layout] | options).double().eval()
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
    "activator_patch4_32": 2_650_890,
    "activator_geglu_patch4_32": 1_599_242,
    "activator_patch4_32.cifar100": 2_674_020,
    "activator_geglu_patch4_32.cifar100": 1_622_372,
    "uniform_activator_patch4_32": 806_666,
    "activator_tiny_patch16_224": 4_796_584,
    "activator_small_patch16_224": 18_439_528,
    "activator_base_patch16_224": 72_267_496,
    "activator_geglu_tiny_patch16_224": 5_692_840,
    "activator_geglu_small_patch16_224": 22_001_512,
    "activator_geglu_base_patch16_224": 86_469_352,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_official_class(name):
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == PARAMETERS[name]


@layouts
def test_official_files_load_and_their_shapes_tell_the_constructor(layout):
    model = tiny(layout)
    official = official_names(model)
    assert {rename(name) for name in official} == set(model.state_dict())
    other = Activator(**constructor_arguments(official)).double()
    report = zoo.load_checkpoint(other, {"state_dict": official})
    assert report.layout == layout
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_file_of_the_other_layout_is_refused_by_its_names():
    with pytest.raises(CheckpointError, match=r"mlp\.fc1"):
        zoo.load_checkpoint(tiny(), official_names(tiny("Activator GEGLU-only")))


# A bag of patches


@layouts
def test_logits_are_the_mean_of_the_class_map_and_of_single_patches(layout):
    model, x = tiny(layout), image(12, 20)
    logits = model(x)
    class_map = model.class_map(x)
    assert class_map.shape == (2, 5, 3, 5)
    torch.testing.assert_close(class_map.mean((2, 3)), logits, rtol=0, atol=1e-12)
    alone = model(x[..., 4:8, 8:12])  # one patch as an image
    torch.testing.assert_close(alone, class_map[:, :, 1, 2], rtol=0, atol=1e-12)


def test_shuffled_patches_give_the_same_logits():
    model, x = tiny(), image(16, 16)
    patches = x.reshape(2, 3, 4, 4, 4, 4).transpose(3, 4).flatten(2, 3)  # (B, 3, 16 patches, 4, 4)
    shuffled = patches[:, :, torch.randperm(16)].reshape(2, 3, 4, 4, 4, 4).transpose(3, 4).reshape(2, 3, 16, 16)
    assert not torch.equal(shuffled, x)
    torch.testing.assert_close(model(shuffled), model(x), rtol=0, atol=1e-12)


def test_tiles_of_a_large_image_give_its_logits():
    model, x = tiny(), image(40, 24)
    total = sum(model.class_map(tile).sum((2, 3)) for rows in x.split(16, 2) for tile in rows.split(16, 3))
    torch.testing.assert_close(total / 60, model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("indices", [[0], [2]])
def test_dense_features_see_their_patch_and_nothing_else(indices):
    model, x = tiny(), image(16, 16).requires_grad_()
    features = model.forward_intermediates(x, indices, intermediates_only=True)[0]
    assert features.shape == (2, 16, 4, 4)
    features[0, :, 2, 1].square().sum().backward()
    seen = x.grad[0].abs().sum(0) > 0
    assert seen[8:12, 4:8].any()
    seen[8:12, 4:8] = False
    assert not seen.any()


def test_one_norm_serves_both_factors_and_one_both_halves():
    model = tiny()
    names = [n for n, _ in model.named_parameters() if n.startswith("blocks.0.") and "norm" in n]
    assert names == ["blocks.0.norm.weight", "blocks.0.norm.bias", "blocks.0.glu.norm.weight", "blocks.0.glu.norm.bias"]


@pytest.mark.parametrize(("act", "function"), [("silu", F.silu), ("relu", F.relu), ("gelu", F.gelu)])
@pytest.mark.parametrize("gate_norm", [True, False])
def test_the_gate_has_the_activation_that_was_asked_for(act, function, gate_norm):
    unit = tiny(act_layer=act, gate_norm=gate_norm).blocks[0].glu
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    gate, value = function(unit.fc1_g(x)), unit.fc1_x(x)
    if gate_norm:
        gate, value = unit.norm(gate), unit.norm(value)
    torch.testing.assert_close(unit(x), unit.fc2(gate * value), rtol=0, atol=1e-12)


def test_wrong_arguments_are_refused_with_a_remedy():
    with pytest.raises(ValueError, match="'silu'"):
        tiny(act_layer="tanh")
    with pytest.raises(ValueError, match="'avg' or ''"):
        tiny(global_pool="token")
    with pytest.raises(ValueError, match=r"17x16 px and patches of 4x4.*dynamic_img_pad"):
        tiny()(image(17, 16))


def test_padding_equals_zeros_at_the_right_and_at_the_bottom():
    model, x = tiny(dynamic_img_pad=True), image(14, 17)
    plain = tiny()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), plain(F.pad(x, (0, 3, 0, 2))), rtol=0, atol=1e-12)
    assert model.class_map(x).shape == (2, 5, 4, 5)


# Inference form and timm


@layouts
@pytest.mark.parametrize("options", [{}, dict(global_pool="")])
def test_folded_model_equals_the_trained_one_in_float64(layout, options):
    model = tiny(layout, **options)
    folded = zoo.fold(model)
    x = image(16, 24)
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-12)
    assert folded.pooled_tail
    assert torch.equal(folded.forward_features(x), model.forward_features(x))


def test_dropout_is_in_the_mlp_only():
    x = image(16, 16)
    with_mlp, without = tiny(proj_drop_rate=0.5).train(), tiny("Activator GEGLU-only", proj_drop_rate=0.5).train()
    assert not torch.equal(with_mlp(x), with_mlp(x))
    assert torch.equal(without(x), without(x))


def test_other_patches_resample_the_kernel_at_load_and_in_place():
    model, large = tiny(), tiny(patch_size=8)
    report = zoo.load_checkpoint(large, official_names(model))
    assert "(4, 4) to (8, 8)" in report.notes[0]
    model.set_input_size(img_size=(24, 40), patch_size=8)
    torch.testing.assert_close(large.patch_embed.proj.weight, model.patch_embed.proj.weight)
    assert model.feature_info[0]["reduction"] == 8
    assert model(image(24, 40)).shape == (2, 5)


def test_features_only_gives_maps_at_the_patch_stride_for_any_size():
    model = timm.create_model("activator_geglu_patch4_32", features_only=True, embed_dim=32, hidden_dim=24, depth=8)
    assert model.feature_info.module_name() == ["blocks.1", "blocks.3", "blocks.5", "blocks.7"]
    assert model.feature_info.reduction() == [4] * 4
    assert [tuple(f.shape) for f in model(torch.randn(1, 3, 40, 24))] == [(1, 32, 10, 6)] * 4


def test_unreleased_weights_are_explained_and_a_file_of_ones_own_is_found(monkeypatch, tmp_path):
    monkeypatch.delenv("ZOO_WEIGHTS", raising=False)
    with pytest.raises(RuntimeError, match=r"never released .*zoo weights add FILE --model activator_patch4_32"):
        timm.create_model("activator_patch4_32", pretrained=True)
    source = timm.create_model("activator_patch4_32")
    torch.save(official_names(source), tmp_path / "ACTIVATORImageClassification_cifar10.pth")
    monkeypatch.setenv("ZOO_WEIGHTS", str(tmp_path))
    model = timm.create_model("activator_patch4_32", pretrained=True, num_classes=3)
    assert torch.equal(model.blocks[3].glu.fc2.weight, source.blocks[3].glu.fc2.weight)


def test_init_weights_restores_everything_after_to_empty():
    model = Activator(**TINY, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(math.nan)
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())
    assert model.blocks[0].glu.norm.weight.eq(1).all()
    assert 0 < model.head.weight.abs().max() <= 1 / math.sqrt(16)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("form", ["script", "fx", "export", "compile"])
@layouts
@pytest.mark.parametrize("folded", [False, True], ids=["eager", "folded"])
def test_every_capture_gives_the_same_numbers(form, layout, folded):
    model = tiny(layout, depth=2)
    if folded:
        model = zoo.fold(model)
    x = image(16, 24)
    torch.compiler.reset()  # sizes seen by earlier cases would be compiled as symbols
    captured = {
        "script": torch.jit.script,
        "fx": torch.fx.symbolic_trace,
        "export": lambda m: torch.export.export(m, (x,)).module(),
        "compile": lambda m: torch.compile(m, fullgraph=True, backend="eager"),
    }[form](model)
    with torch.no_grad():
        torch.testing.assert_close(captured(x), model(x), rtol=0, atol=0 if form == "fx" else 1e-12)


@layouts
def test_checkpointing_drop_path_and_every_parameter_get_gradients(layout):
    model, x = tiny(layout, drop_path_rate=0.1).train(), image(16, 16)
    grads = []
    for enable in (True, False):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(g.abs().sum() > 0 for g in grads[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-12)


def test_bf16_autocast_channels_last_and_grey_images():
    model = Activator(**TINY | dict(in_chans=1)).eval()
    x = torch.randn(2, 1, 16, 24)
    expected = model(x)
    channels_last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(channels_last, expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x).float(), expected, rtol=0, atol=0.1)
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
