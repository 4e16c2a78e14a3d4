"""What FcaFormer promises beyond timm's suite: sizes, checkpoints, folds, windows, optimizer rules."""

import copy
import itertools

import pytest
import timm
import torch

import zoo
from zoo.fcaformer import FcaFormer, FcaFormerDense, fcaformer_dense
from zoo.fcaformer_recipe import (
    IMAGENET,
    MASK_RCNN_3X,
    UPERNET_160K,
    is_decayed,
    layer_index,
    learning_rate,
    optimizer_groups,
)

TINY = dict(embed_dims=(16, 24, 32, 64), depths=(1, 1, 4, 2), num_heads=(0, 0, 2, 4), num_classes=5)


def randomise(model):
    """Weights away from their start, so that no table, scale or norm is without effect."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            scale = 0.3 / max(1, tensor[0].numel()) ** 0.5 if tensor.ndim > 1 else 0.2
            tensor.copy_(1 + scale * noise if name.endswith(("gamma", "var", "norm.weight")) else 3 * scale * noise)
            if name.endswith("var"):
                tensor.abs_()
    return model


def tiny(cls=FcaFormer, **kwargs):
    if cls is FcaFormerDense:
        kwargs = {k: v for k, v in TINY.items() if k != "num_classes"} | dict(out_channels=(4, 6, 8, 10)) | kwargs
        return randomise(cls(dtype=torch.float64, **kwargs)).eval()
    return randomise(cls(dtype=torch.float64, **TINY | kwargs)).eval()


def image(h, w, batch=1):
    return torch.randn(batch, 3, h, w, dtype=torch.float64)


OFFICIAL = {
    "ls.gamma": "gamma",
    "conv_dw": "dwconv",
    "ls1.gamma": "gamma_1",
    "ls2.gamma": "gamma_2",
    "attn.offset_bias": "attention_biases",
    "attn.cross_bias": "s_token_bias",
    "attn.cross_scale": "s_scale_factors",
    "attn.cross_norm": "s_norm",
    "attn.qkv": "qkv",
    "attn.proj": "proj",
    "merge_conv": "dw_conv",
    "norm3": "mlp.norm",
    "head.norm": "norm_head",
    "head.fc": "head",
    "stem.conv1": "patch_embed.seq.0",
    "stem.conv2": "patch_embed.seq.2",
    ".conv.": ".c.",
}


def official_state(model):
    """The state dict as the official code would name and shape it."""
    state = {}
    for name, value in model.state_dict().items():
        for ours, theirs in OFFICIAL.items():
            name = name.replace(ours, theirs)
        if name.startswith("stages."):
            _, stage, *rest = name.split(".")
            if rest[0] == "downsample":
                stage = int(stage) - 1
            name = ".".join([f"layer_{stage}", *rest])
            if name.startswith(("layer_0.blocks", "layer_1.blocks")):
                name = name.replace("mlp.fc", "pwconv")
        if name.endswith("attention_biases"):
            value = value.flatten(1)
        elif name.endswith("s_token_bias"):
            value = value.flatten(1)[None, :, None]
        elif name.endswith("s_scale_factors"):
            value = value.reshape(1, -1, 1)
        state[name] = value
    return state


@pytest.mark.parametrize("size", [(224, 224), (1, 1), (33, 97), (70, 40)])
def test_any_image_size_gives_maps_of_rounded_up_strides(size):
    model = tiny(img_size=64)
    maps = model.forward_intermediates(image(*size), intermediates_only=True)
    assert [tuple(m.shape[2:]) for m in maps] == [(-(-size[0] // s), -(-size[1] // s)) for s in (4, 8, 16, 32)]
    assert model(image(*size)).isfinite().all()


@pytest.mark.parametrize("size", [(64, 64), (96, 70)])
def test_a_model_resized_once_equals_one_that_resamples_in_each_call(size):
    model, x = tiny(img_size=64), image(*size)
    resized = copy.deepcopy(model)
    resized.stages[2].blocks[1].attn.cross_bias.requires_grad_(False)
    resized.set_input_size(size)
    assert not resized.stages[2].blocks[1].attn.cross_bias.requires_grad
    assert resized.stages[2].blocks[0].attn.offset_bias.shape[1:] == (-(-size[0] // 16), -(-size[1] // 16))
    torch.testing.assert_close(resized(x), model(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("target", [64, (64, 96), (128, 160)])
def test_official_names_load_at_any_size_as_zoo_names_do(target):
    source = tiny(img_size=64)
    official, own = tiny(img_size=target), tiny(img_size=target)
    report = zoo.load_checkpoint(official, {"model": official_state(source)})
    zoo.load_checkpoint(own, {"state_dict": source.state_dict()})
    assert report.layout == "FcaFormer"
    assert bool(report.notes) == (target != 64)
    for name, value in official.state_dict().items():
        torch.testing.assert_close(value, own.state_dict()[name], rtol=0, atol=0, msg=name)
    x = image(70, 50)
    if target == 64:
        torch.testing.assert_close(official(x), source(x), rtol=0, atol=0)


def test_non_square_official_tables_are_recognised_by_their_cross_tokens():
    source = tiny(img_size=(64, 96))
    target = tiny(img_size=(64, 128))
    zoo.load_checkpoint(target, official_state(source))
    expected = copy.deepcopy(source)
    expected.set_input_size((64, 128))
    x = image(64, 128)
    torch.testing.assert_close(target(x), expected(x), rtol=0, atol=1e-10)


def test_tables_that_fit_no_map_are_refused_in_one_sentence():
    state = official_state(tiny(img_size=64))
    state["layer_2.blocks.0.attention_biases"] = torch.zeros(2, 17)
    with pytest.raises(zoo.CheckpointError, match="17 entries"):
        zoo.load_checkpoint(tiny(img_size=64), state)


@pytest.mark.parametrize("cls", [FcaFormer, FcaFormerDense])
@pytest.mark.parametrize("size", [(64, 64), (50, 90)])
def test_folded_model_equals_trained_model_in_float64(cls, size):
    model = tiny(cls, img_size=64) if cls is FcaFormer else tiny(cls, window_size=(3, 2))
    folded = zoo.fold(model)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    x = image(*size)
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-10)
    if cls is FcaFormer:
        folded.set_input_size(size)
        torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-10)
        again = zoo.fold(folded)  # folding twice changes nothing
        torch.testing.assert_close(again(x), folded(x), rtol=0, atol=1e-10)


def test_windows_of_the_whole_map_equal_global_attention():
    model = tiny(img_size=96)
    windowed = tiny(img_size=96, window_size=(6, 3))
    windowed.load_state_dict(model.state_dict())
    x = image(96, 96)
    torch.testing.assert_close(windowed(x), model(x), rtol=0, atol=1e-12)


def test_classifier_weights_fit_the_dense_backbone_but_for_its_outputs():
    classifier, dense = tiny(img_size=96), tiny(FcaFormerDense, window_size=(6, 3))
    report = zoo.load_checkpoint(dense, official_state(classifier), strict=False)
    assert {n.split(".")[0] for n in report.missing} == {"laterals", "norms"}
    assert not report.unexpected
    assert not report.mismatched
    x = image(96, 96)
    seen = []
    dense.stages[3].register_forward_hook(lambda m, i, y: seen.append(y))
    dense(x)
    torch.testing.assert_close(seen[0], classifier.forward_features(x), rtol=0, atol=1e-12)


def test_windows_exchange_nothing_unless_padding_moves_them():
    model = tiny(window_size=(4, 4), depths=(1, 1, 3, 1))
    stage = copy.deepcopy(model.stages[2])
    stage.downsample = torch.nn.Identity()
    for size, moves in ((8, False), (6, True)):
        x = torch.randn(1, 32, size, size, dtype=torch.float64)
        y = x.clone()
        y[..., -1, -1] += 1
        changed = (stage(x) != stage(y)).any(1)[0]
        assert changed[0, 0].item() is moves


def test_dense_backbone_is_a_feature_extractor_of_any_size():
    model = fcaformer_dense("fcaformer_l1", out_channels=None, device="meta")
    assert model.feature_info.channels() == [64, 128, 192, 320]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    maps = tiny(FcaFormerDense, window_size=(3, 2))(image(75, 50))
    assert [m.shape[1] for m in maps] == [4, 6, 8, 10]
    assert [tuple(m.shape[2:]) for m in maps] == [(19, 13), (10, 7), (5, 4), (3, 2)]
    with pytest.raises(ValueError, match="pass one of"):
        fcaformer_dense("fcaformer_l9")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(depths=(1, 1, 1)), "one of each for every stage"),
        (dict(window_size=(7,)), "one for each of the 2 stages"),
        (dict(num_heads=(0, 0, 3, 4)), "pass a divisor"),
    ],
)
def test_wrong_options_raise_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        FcaFormer(**TINY | options)


def test_a_limit_on_sources_leaves_the_oldest_out():
    model = tiny(img_size=64, max_sources=1)
    assert [b.attn.cross_scale is None for b in model.stages[2].blocks] == [True, False, False, False]
    assert model.stages[2].blocks[3].attn.cross_bias.shape[1] == 1
    assert model(image(64, 64)).isfinite().all()


def test_initial_weights_come_back_after_to_empty():
    model = FcaFormer(**TINY)
    with torch.device("meta"):
        empty = FcaFormer(**TINY)
    empty.to_empty(device="cpu")
    for tensor in empty.state_dict().values():
        tensor.fill_(7)
    empty.init_weights()
    for name, value in model.state_dict().items():
        restored = empty.state_dict()[name]
        if value.ndim > 1 and value.std() > 0:  # drawn at random, with std 0.02
            assert restored.abs().max() < 0.12, name
            assert restored.std() > 0.01, name
        else:
            assert torch.equal(restored, value), name


def test_checkpointing_changes_no_gradient():
    grads = []
    for enable in (False, True):
        model = tiny(img_size=64).train()
        model.set_grad_checkpointing(enable)
        x = torch.ones(2, 3, 64, 64, dtype=torch.float64).cumsum(2) / 64
        model(x).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad is not None, name
        torch.testing.assert_close(grad, grads[1][name], msg=name)


def test_plain_attention_equals_the_fused_one():
    model = tiny(img_size=64)
    timm.layers.set_fused_attn(False)
    try:
        plain = tiny(img_size=64)
    finally:
        timm.layers.set_fused_attn(True)
    assert not plain.stages[2].blocks[0].attn.fused_attn
    x = image(64, 64)
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{}, dict(window_size=(3, 2))])
def test_export_and_compile_without_graph_breaks(options):
    model, x = tiny(img_size=64, depths=(1, 1, 2, 1), **options), image(64, 64)
    expected = model(x)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)


def test_layers_and_decay_of_the_dense_recipes():
    assert layer_index("stages.2.blocks.3.attn.cross_scale", MASK_RCNN_3X) == 0
    assert layer_index("stages.2.downsample.conv1.conv.weight", MASK_RCNN_3X) == 2
    assert layer_index("stages.2.downsample.conv1.conv.weight", UPERNET_160K) == 0
    assert layer_index("laterals.0.weight", MASK_RCNN_3X) == 7
    assert is_decayed("stages.2.blocks.0.attn.offset_bias", 3, IMAGENET)
    assert not is_decayed("stages.2.blocks.0.attn.offset_bias", 3, UPERNET_160K)


def test_optimizer_groups_hold_each_trainable_parameter_once():
    detector = torch.nn.ModuleDict({"backbone": tiny(FcaFormerDense), "head": torch.nn.Linear(2, 2)})
    detector["head"].bias.requires_grad_(False)
    groups = optimizer_groups(detector, MASK_RCNN_3X)
    names = [n for g in groups for n in g["param_names"]]
    assert sorted(names) == sorted(n for n, p in detector.named_parameters() if p.requires_grad)
    torch.optim.AdamW(groups)
    assert {g["lr"] for g in optimizer_groups(detector["backbone"])} == {2e-3}
    with pytest.raises(ValueError, match="contains 0 FcaFormer"):
        optimizer_groups(torch.nn.Linear(2, 2))


def test_learning_rate_is_linear_then_a_cosine_and_ends_with_the_schedule():
    schedule = dict(steps_per_epoch=10, epochs=30, warmup_epochs=2)
    rates = [learning_rate(step, **schedule) for step in range(300)]
    assert rates[0] == 0
    assert rates[19] == rates[20] == max(rates) == 2e-3
    assert all(a > b for a, b in itertools.pairwise(rates[20:]))
    assert 1e-6 < rates[-1] < 1.1e-6
    with pytest.raises(ValueError, match="outside the schedule"):
        learning_rate(300, **schedule)
