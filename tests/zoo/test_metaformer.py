"""What zoo adds to timm's MetaFormer: official heads and files, dense mode, v1's ablations, folds."""

import copy
import re
import subprocess
import sys

import pytest
import timm
import torch
from timm.layers import GroupNorm1
from timm.models.metaformer import Attention, MetaFormer, MlpHead, Pooling, SepConv
from timm.optim import param_groups_weight_decay
from torch import nn

import zoo
from zoo.metaformer import set_head_dropout
from zoo.metaformer_layers import BiasedAttention, FoldedBlock, MapNorm, RandomMixing, use_accurate_map_norms

TINY = dict(depths=(1, 1, 2, 1), dims=(16, 32, 64, 96), num_classes=5)
V1 = ("poolformerv1_s12", "metaformer_id_s12", "metaformer_pppa_s12_224", "metaformer_ppaa_s12_224")
FIXED = ("metaformer_pppf_s12_224", "metaformer_ppff_s12_224", "randformer_s12")
ALL = (*V1, *FIXED, "identityformer_s12")


def tiny(name, **kwargs):
    size = dict(img_size=64) if name in FIXED else {}
    return timm.create_model(name, **TINY | size | kwargs).eval()


def timm_tiny(kind, **kwargs):
    """timm's own classes as its entrypoints build them, small."""
    pool = dict(token_mixers=Pooling, use_mlp_head=False)
    v1 = dict(
        downsample_norm=None,
        mlp_act=nn.GELU,
        mlp_bias=True,
        norm_layers=GroupNorm1,
        layer_scale_init_values=0.1,
        res_scale_init_values=None,
    )
    metaformer = timm.models.metaformer
    tokens = [metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2
    options = {
        "poolformer": pool | v1,
        "poolformerv2": pool | dict(norm_layers=metaformer.GroupNorm1NoBias),
        "convformer": dict(token_mixers=SepConv),
        "caformer": dict(token_mixers=[SepConv, SepConv, Attention, Attention], norm_layers=tokens),
    }
    model = MetaFormer(**TINY | options[kind] | kwargs)
    model.pretrained_cfg = dict(classifier="head.fc.fc2" if model.use_mlp_head else "head.fc")
    return shake(model).eval()


def shake(model):
    """Give every vector and scalar another value than its initial one."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def official(model):
    """The state dict of a model under the official names of its code base."""
    v1 = "stem.norm.weight" not in model.state_dict()
    position = next((n for n in model.state_dict() if n.endswith("pos_embed")), None)
    after = int(position.split(".")[1]) if position else 9
    state = {}
    for name, value in model.state_dict().items():
        match = re.match(r"stages\.(\d)\.(blocks|downsample)\.(.*)", name)
        if match and v1:
            stage, part, rest = int(match[1]), match[2], match[3]
            entry = 2 * stage + (stage >= after)
            rest = re.sub(r"layer_scale([12]).scale", r"layer_scale_\1", rest)
            if rest == "pos_embed":
                name = f"network.{entry - 1}.pos_embed"
            elif part == "downsample":
                name = f"network.{2 * stage - 1 + (stage > after)}.{rest.replace('conv', 'proj')}"
            else:
                name = f"network.{entry}.{rest}"
        elif match:
            name = f"stages.{match[1]}.{match[3]}"
            if match[2] == "downsample":
                name = f"downsample_layers.{match[1]}.{match[3].replace('norm.', 'pre_norm.')}"
                value = value.clone()
        else:
            name = name.replace("out_norms.3", "norm6").replace("out_norms.2", "norm4").replace("out_norms.1", "norm2")
            name = name.replace("out_norms.0", "norm0").replace("head.norm.", "norm.").replace("head.fc.", "head.")
            stem = "patch_embed.proj." if v1 else "downsample_layers.0.conv."
            name = name.replace("stem.conv.", stem).replace("stem.norm.", "downsample_layers.0.post_norm.")
        if value.ndim == 4 and value.shape[2:] == (1, 1) and not v1:
            value = value.flatten(1)  # the official v2 code has linear layers
        state[name] = value
    return state


@pytest.fixture
def image():
    return torch.randn(2, 3, 64, 64)


def test_importing_zoo_changes_nothing_of_timm():
    program = """
import timm
def registry():
    models = timm.models
    return {n: (models.model_entrypoint(n), str(models.get_pretrained_cfg(n))) for n in timm.list_models()}, set(
        timm.list_models(pretrained=True))
before, pretrained = registry()
import zoo
after, pretrained_after = registry()
assert {n: after[n] for n in before} == before
assert pretrained <= pretrained_after
assert {n.split(".")[0] for n in pretrained_after - pretrained} <= set(zoo.list_models())
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=120)


# ---- official files in timm's models


def test_official_v1_file_gives_timm_s_poolformer_the_official_numbers(image):
    source = shake(tiny("poolformerv1_s12"))
    model = timm_tiny("poolformer")
    report = zoo.load_checkpoint(model, official(source))
    assert report.layout == "PoolFormer"
    assert any("before pooling" in note for note in report.notes)
    torch.testing.assert_close(model(image), source(image), rtol=0, atol=1e-5)
    assert model.state_dict().keys() == source.state_dict().keys()


def test_timm_s_own_file_keeps_timm_s_head(image):
    source, model = timm_tiny("poolformer"), timm_tiny("poolformer")
    zoo.load_checkpoint(model, {"state_dict": source.state_dict()})
    torch.testing.assert_close(model(image), source(image))
    exact = tiny("poolformerv1_s12")
    zoo.load_checkpoint(exact, source.state_dict())
    assert not torch.allclose(exact(image), source(image), atol=1e-3)


def test_reset_classifier_after_an_official_file(image):
    source = shake(tiny("poolformerv1_s12"))
    model = timm_tiny("poolformer")
    zoo.load_checkpoint(model, official(source))
    pooled = source.forward_head(source.forward_features(image), pre_logits=True)
    model.reset_classifier(7)
    assert model(image).shape == (2, 7)
    torch.testing.assert_close(model.forward_head(model.forward_features(image), pre_logits=True), pooled)
    model.reset_classifier(0)
    torch.testing.assert_close(model(image), pooled)
    model.reset_classifier(3, global_pool="avg")  # timm's order again, as the report says
    features = model.forward_features(image)
    normed = model.head.norm(features.mean((2, 3), keepdim=True)).flatten(1)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), normed)
    assert model(image).shape == (2, 3)


@pytest.mark.parametrize("kind", ["convformer", "caformer"])
def test_official_v2_file_sets_the_epsilon_of_the_mlp_head(kind):
    source, model = timm_tiny(kind), timm_tiny(kind)
    report = zoo.load_checkpoint(model, official(source))
    assert model.head.fc.norm.eps == 1e-5
    assert any("1e-5" in note for note in report.notes)
    untouched = timm_tiny(kind)
    zoo.load_checkpoint(untouched, source.state_dict())
    assert untouched.head.fc.norm.eps == 1e-6


def test_the_epsilon_survives_a_classifier_of_the_file_s_size():
    source, model = timm_tiny("caformer", num_classes=9), timm_tiny("caformer")
    zoo.load_checkpoint(model, official(source), head="file")
    assert model.num_classes == 9
    assert model.head.fc.norm.eps == 1e-5


@pytest.mark.parametrize("kind", ["poolformer", "caformer"])
def test_a_refused_file_leaves_the_model_as_it_was(kind, image):
    source = timm_tiny(kind, num_classes=9)
    model = timm_tiny(kind)
    before = model(image)
    with pytest.raises(zoo.CheckpointError, match="9 classes"):
        zoo.load_checkpoint(model, official(source))
    torch.testing.assert_close(model(image), before, rtol=0, atol=0)
    other = timm_tiny(kind)
    model.load_state_dict(other.state_dict())  # the refused file has no late effect
    torch.testing.assert_close(model(image), other(image), rtol=0, atol=0)
    copy.deepcopy(model)


def test_the_report_says_that_the_model_decides_the_mixer():
    source = tiny("poolformerv1_s12")
    model = tiny("metaformer_id_s12")
    report = zoo.load_checkpoint(model, official(source))
    assert any("the model does: Identity" in note for note in report.notes)
    assert all(isinstance(block.token_mixer, nn.Identity) for stage in model.stages for block in stage.blocks)


@pytest.mark.parametrize("name", ALL)
def test_official_names_round_trip(name, image):
    source, model = shake(tiny(name)), tiny(name)
    zoo.load_checkpoint(model, official(source))
    torch.testing.assert_close(model(image), source(image))


def test_a_file_of_the_other_paper_is_refused():
    with pytest.raises(zoo.CheckpointError, match="layer_scale"):
        zoo.load_checkpoint(tiny("identityformer_s12"), official(tiny("metaformer_id_s12")))


# ---- models


def test_no_parameter_without_use_and_one_head_norm_before_pooling(image):
    model = tiny("poolformerv1_s12")
    normed = model.head.norm(model.forward_features(image)).mean((2, 3))
    torch.testing.assert_close(model(image), model.head.fc(normed))


def test_v1_switches(image):
    assert not any("layer_scale" in n for n, _ in tiny("poolformerv1_s12", use_layer_scale=False).named_parameters())
    assert tiny("poolformerv1_s12", layer_scale_init_value=0.5).stages[0].blocks[0].layer_scale1.scale[0] == 0.5
    assert tiny("poolformerv1_s12", pool_size=5).stages[0].blocks[0].token_mixer.pool.kernel_size == 5
    wide = tiny("poolformerv1_s12", mlp_ratios=(2, 4, 4, 3))
    widths = [stage.blocks[0].mlp.fc1.weight.shape[:2] for stage in wide.stages]
    assert [hidden // channels for hidden, channels in widths] == [2, 4, 4, 3]
    channel = tiny("poolformerv1_s12", channel_norm=True)
    assert not any(isinstance(module, nn.GroupNorm) for module in channel.modules())
    assert channel.head.norm.eps == channel.stages[0].blocks[0].norm1.eps == 1e-5
    assert channel(image).shape == wide(image).shape == (2, 5)
    with pytest.raises(ValueError, match="odd"):
        tiny("poolformerv1_s12", pool_size=4)
    with pytest.raises(ValueError, match="channel_norm=True"):
        tiny("poolformerv1_s12", token_mixers=BiasedAttention)


def test_v1_convolutions_between_stages_keep_torch_s_initialisation():
    torch.manual_seed(0)
    model = timm.create_model("poolformerv1_s12")
    bound = 1 / (3 * 49) ** 0.5
    assert 0.9 * bound < model.stem.conv.weight.abs().max() <= bound
    assert model.stem.conv.bias.abs().max() > 0
    assert model.stages[1].downsample.conv.bias.abs().max() > 0
    fc1 = model.stages[0].blocks[0].mlp.fc1
    assert fc1.bias.abs().max() == 0
    assert 0.015 < fc1.weight.std() < 0.025


@pytest.mark.parametrize("name", ALL)
def test_init_weights_restores_a_model_that_was_built_empty(name):
    model = timm.create_model(name, **TINY, device="meta", **dict(img_size=64) if name in FIXED else {})
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    model.init_weights()
    expected = tiny(name)
    for (key, got), wanted in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.isfinite(got).all(), key
        if got.ndim < 2 and "conv.bias" not in key:
            torch.testing.assert_close(got, wanted, msg=key)
        elif "random_matrix" in key:
            torch.testing.assert_close(got.sum(-1), torch.ones(len(got)))


def test_random_matrices_are_frozen_rows_of_probabilities_and_stay_out_of_the_optimiser(image):
    model = tiny("randformer_s12").train()
    matrices = [m.random_matrix for m in model.modules() if isinstance(m, RandomMixing)]
    assert [len(m) for m in matrices] == [16, 16, 4]
    for matrix in matrices:
        assert not matrix.requires_grad
        torch.testing.assert_close(matrix.sum(-1), torch.ones(len(matrix)))
    model(image).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} == {
        n for n in model.state_dict() if n.endswith("random_matrix")
    }
    optimised = {id(p) for group in param_groups_weight_decay(model) for p in group["params"]}
    assert not optimised & {id(m) for m in matrices}


@pytest.mark.parametrize("name", FIXED)
def test_another_image_size_is_refused_in_one_sentence(name):
    model = tiny(name)
    with pytest.raises(ValueError, match=r"built for images of 64x64 px .* img_size=\(height, width\)"):
        model(torch.randn(1, 3, 96, 96))
    model = tiny(name, img_size=(96, 64))
    assert model(torch.randn(1, 3, 96, 64)).shape == (1, 5)
    with pytest.raises(ValueError, match="96x64"):
        model(torch.randn(1, 3, 64, 96))


def test_position_maps_are_resampled_to_other_images(image):
    model = tiny("metaformer_ppaa_s12_224")
    nn.init.normal_(model.stages[2].downsample.pos_embed)
    small = model(image)
    resized = copy.deepcopy(model)
    resized.set_input_size(64)
    assert resized.stages[2].downsample.pos_embed.shape == (1, 64, 4, 4)
    torch.testing.assert_close(resized(image), small)
    loaded = tiny("metaformer_ppaa_s12_224", img_size=64)
    report = zoo.load_checkpoint(loaded, official(model))
    assert any("from 14x14 to 4x4" in note for note in report.notes)
    torch.testing.assert_close(loaded(image), small)


def test_head_dropout_reaches_the_last_layer():
    assert tiny("identityformer_s12", head_dropout=0.4).head.drop.p == 0.4
    model = timm_tiny("caformer")
    set_head_dropout(model, 0.5)
    assert isinstance(model.head.fc, MlpHead)
    assert model.head.fc.head_drop.p == 0.5
    with pytest.raises(ValueError, match="rate"):
        set_head_dropout(model, 1.0)


def test_layers_are_grouped_by_depth():
    model = tiny("poolformerv1_s12")
    groups = timm.models.group_parameters(model, model.group_matcher(coarse=False))
    assert len(groups) == 1 + 5 + 1  # stem, blocks (the first one of a stage with its entry), head
    assert "head.fc.weight" in groups[max(groups)]


# ---- dense mode


def test_dense_mode_returns_four_maps_with_norms_of_their_own(image):
    model = shake(tiny("poolformerv1_s12", dense=True))
    maps = model(image)
    assert [tuple(m.shape) for m in maps] == [(2, 16, 16, 16), (2, 32, 8, 8), (2, 64, 4, 4), (2, 96, 2, 2)]
    final, raw = model.forward_intermediates(image)
    for level, (normed, each) in enumerate(zip(maps, raw, strict=True)):
        norm = model.out_norms[level]
        expected = nn.functional.group_norm(each, 1, norm.weight, norm.bias, 1e-5)
        torch.testing.assert_close(normed, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(final, raw[-1])
    sum(m.square().sum() for m in maps).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_dense_mode_without_the_norm_of_the_first_level(image):
    model = tiny("poolformerv1_s12", dense=True, norm_levels=(1, 2, 3))
    assert isinstance(model.out_norms[0], nn.Identity)
    raw = model.forward_intermediates(image, intermediates_only=True)
    torch.testing.assert_close(model(image)[0], raw[0])


def test_features_of_the_dense_mode_are_its_normed_maps(image):
    dense = shake(tiny("poolformerv1_s12", dense=True))
    features = timm.create_model("poolformerv1_s12", **TINY, dense=True, features_only=True, out_indices=(1, 3)).eval()
    features.model.load_state_dict(dense.state_dict(), strict=False)
    assert features.feature_info.channels() == [32, 96]
    got, maps = features(image), dense(image)
    torch.testing.assert_close(got[0], maps[1])
    torch.testing.assert_close(got[1], maps[3])
    got[0].sum().backward(retain_graph=True)
    got[1].square().sum().backward()
    assert all(p.grad is not None for p in features.parameters())


def test_dense_files_and_imagenet_files_load_into_the_dense_mode(image):
    source, model = shake(tiny("poolformerv1_s12", dense=True)), tiny("poolformerv1_s12", dense=True)
    detector = {f"backbone.{name}": value for name, value in official(source).items()} | {"neck.weight": torch.ones(1)}
    zoo.load_checkpoint(model, {"state_dict": detector, "meta": {}})
    torch.testing.assert_close(model(image)[2], source(image)[2])
    report = zoo.load_checkpoint(model, official(tiny("poolformerv1_s12")))
    assert any("stay as they are" in note for note in report.notes)
    torch.testing.assert_close(model.out_norms[3].weight, source.out_norms[3].weight)


# ---- inference forms


@pytest.mark.parametrize("name", ALL)
def test_folded_model_equals_trained_model_in_float64(name, image):
    model = shake(tiny(name)).double()
    folded = zoo.fold(model)
    assert sum(isinstance(module, FoldedBlock) for module in folded.modules()) == 5
    expected = model(image.double())
    assert (folded(image.double()) - expected).abs().max() <= 1e-12 * expected.std()


@pytest.mark.parametrize("kind", ["poolformer", "poolformerv2", "convformer", "caformer"])
@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_folded_timm_model_equals_trained_model_in_float64(kind, layer_scale, image):
    model = timm_tiny(kind, layer_scale_init_values=layer_scale).double()
    folded = zoo.fold(model)
    expected = model(image.double())
    assert (folded(image.double()) - expected).abs().max() <= 1e-12 * expected.std()
    gradient_input = image.double().requires_grad_()
    folded(gradient_input).sum().backward()  # nothing that autograd needs is overwritten
    other = image.double().requires_grad_()
    model(other).sum().backward()
    torch.testing.assert_close(gradient_input.grad, other.grad)


def test_fold_handles_a_star_relu_whose_scale_is_zero(image):
    model = timm_tiny("convformer").double()
    with torch.no_grad():
        model.stages[0].blocks[0].token_mixer.act1.scale.zero_()
        model.stages[0].blocks[0].mlp.act.scale.zero_()
    expected = model(image.double())
    assert (zoo.fold(model)(image.double()) - expected).abs().max() <= 1e-12 * expected.std()


def test_fold_leaves_other_mixers_alone(image):
    class Shift(nn.Module):
        def __init__(self, dim, proj_drop=0.0, device=None, dtype=None):
            super().__init__()

        def forward(self, x):
            return x.roll(1, dims=2) + 1

    model = tiny("poolformerv1_s12", token_mixers=[Shift] * 4)
    torch.testing.assert_close(zoo.fold(model)(image), model(image))


@pytest.mark.parametrize("form", ["eager", "folded"])
@pytest.mark.parametrize("name", ["poolformerv1_s12", "metaformer_ppaa_s12_224", "randformer_s12", "caformer"])
def test_scripts_traces_exports_and_compiles_without_graph_breaks(name, form, image):
    model = timm_tiny(name) if name == "caformer" else tiny(name)
    model = zoo.fold(model) if form == "folded" else model
    with torch.no_grad():
        expected = model(image)
        assert torch.equal(torch.fx.symbolic_trace(model)(image), expected)
        batch = torch.export.Dim("batch", min=2, max=16)
        exported = torch.export.export(model, (image,), dynamic_shapes=({0: batch},)).module()
        torch.testing.assert_close(exported(image), expected, rtol=1e-4, atol=1e-5)
        assert exported(torch.randn(3, 3, 64, 64)).shape == (3, 5)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(image), expected)
        with pytest.warns(FutureWarning):
            scripted = torch.jit.script(model)
        torch.testing.assert_close(scripted(image), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_bfloat16_and_memory_order_do_not_change_the_answer(name, image):
    model = shake(tiny(name))
    expected = model(image)
    for folded in (model, zoo.fold(model)):
        got = folded(image.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
        low = copy.deepcopy(folded).bfloat16()(image.bfloat16())
        assert low.dtype == torch.bfloat16
        assert (low.float() - expected).abs().max() < 0.2 * expected.std()


# ---- norms over whole maps


@pytest.mark.parametrize("bias", [True, False])
def test_map_norm_is_accurate_in_channels_last_order(bias):
    x = torch.randn(2, 96, 28, 28, dtype=torch.float64) + 0.3
    x[0, 3, 0, 0] = 3000  # squared ReLUs make such outliers
    norm = shake(MapNorm(96, bias=bias))
    expected = nn.functional.group_norm(x, 1, norm.weight.double(), norm.bias.double() if bias else None, norm.eps)
    for order in (torch.contiguous_format, torch.channels_last):
        got = norm(x.float().contiguous(memory_format=order)).double()
        assert ((got - expected).abs() / (1 + expected.abs())).max() < 2e-6


def test_accurate_norms_keep_the_parameters(image):
    model = timm_tiny("poolformerv2")
    parameters = {id(p) for p in model.parameters()}
    expected = model(image)
    assert use_accurate_map_norms(model) == 10
    assert {id(p) for p in model.parameters()} == parameters
    torch.testing.assert_close(model(image), expected)
