"""What the AsCAN reading promises beyond timm's suite: configurations, sizes, folds, position tables, its mark."""

import copy

import pytest
import timm
import torch

import zoo
from zoo import ascan
from zoo.ascan import AsCan, ConvBlock, TransformerBlock

TINY = dict(stem_width=8, widths=(8, 16, 32, 32), patterns=("C", "CT", "CCT", "CTT"), head_dim=8, num_classes=5)


def tiny(**kwargs):
    model = AsCan(dtype=torch.float64, **TINY | kwargs).eval()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_mean", "bias", "table")):
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
        elif name.endswith("running_var") or (tensor.ndim == 1 and tensor.is_floating_point()):
            tensor.copy_(1 + 0.2 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64))
    return model


def image(h, w, batch=1):
    return torch.randn(batch, 3, h, w, dtype=torch.float64)


def test_patterns_and_widths_decide_every_block():
    model = tiny()
    kinds = [["C" if isinstance(b, ConvBlock) else "T" for b in stage.blocks] for stage in model.stages]
    assert ["".join(k) for k in kinds] == list(TINY["patterns"])
    assert [f["num_chs"] for f in model.feature_info] == list(TINY["widths"])
    wider = tiny(conv_expansion=2, mlp_ratio=3, widths=(8, 24, 40, 48), patterns=("CC", "C", "CT", "CT"))
    assert wider.stages[2].blocks[0].conv_exp.weight.shape[:2] == (48, 24)  # expansion counts from the input
    assert wider.stages[3].blocks[1].mlp.fc1.out_features == 144


@pytest.mark.parametrize("pos_bias", ["none", "relative"])
@pytest.mark.parametrize("size", [(224, 224), (1, 1), (33, 97), (64, 40)])
def test_any_image_size_gives_maps_of_rounded_up_strides(size, pos_bias):
    model = tiny(img_size=64, pos_bias=pos_bias)
    maps = model.forward_intermediates(image(*size), intermediates_only=True)
    assert [tuple(m.shape[2:]) for m in maps] == [(-(-size[0] // s), -(-size[1] // s)) for s in (4, 8, 16, 32)]
    assert model(image(*size)).isfinite().all()


@pytest.mark.parametrize("pos_bias", ["none", "relative"])
@pytest.mark.parametrize("size", [(64, 64), (50, 90)])
def test_folded_model_equals_trained_model_in_float64(size, pos_bias):
    model, x = tiny(img_size=64, pos_bias=pos_bias), image(*size)
    folded = zoo.fold(model)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(zoo.fold(folded)(x), folded(x), rtol=0, atol=1e-10)


def test_a_table_of_relative_positions_matters_and_can_be_resampled_in_place_or_on_loading():
    model, x = tiny(img_size=64, pos_bias="relative"), image(96, 64)
    expected = model(x)
    resized = copy.deepcopy(model)
    resized.set_input_size((96, 64))
    torch.testing.assert_close(resized(x), expected, rtol=0, atol=1e-10)
    loaded = tiny(img_size=(96, 64), pos_bias="relative")
    report = zoo.load_checkpoint(loaded, {"state_dict": model.state_dict()})
    assert report.notes
    torch.testing.assert_close(loaded(x), expected, rtol=0, atol=1e-10)
    assert loaded.no_weight_decay() == {n for n in model.state_dict() if n.endswith("table")} != set()
    for name in loaded.no_weight_decay():
        loaded.get_parameter(name).data.zero_()
    assert not torch.allclose(loaded(x), expected)


def test_a_table_moves_attention_by_signed_offsets():
    block = TransformerBlock(8, 8, grid_size=(2, 3), dtype=torch.float64)
    table = block.attn.relative_position_bias_table
    table.data[1 * 5 + 3] = 50.0  # row offset 0, column offset +1: each query looks at its left neighbour
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64)
    values = block.attn.qkv(x)[..., 16:]
    expected = block.attn.proj(values[:, :, :2])
    torch.testing.assert_close(block.attn(x)[:, :, 1:], expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(patterns=("C", "TC", "C", "C")), "begins with C"),
        (dict(patterns=("C", "CX", "C", "C")), "string of C and T"),
        (dict(patterns=("C", "C")), "for every stage"),
        (dict(head_dim=12), "no multiple of head_dim=12"),
        (dict(pos_bias="rotary"), "'none' or 'relative'"),
    ],
)
def test_wrong_configurations_raise_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        AsCan(**TINY | options)


def test_it_is_marked_as_a_reading_everywhere():
    assert "neither code nor weights" in ascan.READING
    assert "not a reproduction" in ascan.__doc__
    for name in zoo.list_models("ascan*"):
        model = timm.create_model(name, device="meta")
        assert any("reading" in note for note in model.pretrained_cfg["notes"])
    with pytest.raises(RuntimeError, match="never released"):
        timm.create_model("ascan_tiny", pretrained=True)


@pytest.mark.parametrize(
    ("name", "parameters"), [("ascan_tiny", 54735176), ("ascan_base", 98209256), ("ascan_large", 172182888)]
)
def test_variants_have_the_readings_parameters(name, parameters):
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == parameters


def test_initial_weights_come_back_after_to_empty():
    model = AsCan(pos_bias="relative", **TINY)
    with torch.device("meta"):
        empty = AsCan(pos_bias="relative", **TINY)
    empty.to_empty(device="cpu")
    for tensor in empty.state_dict().values():
        tensor.fill_(7)
    empty.init_weights()
    for name, value in model.state_dict().items():
        restored = empty.state_dict()[name]
        if value.ndim > 1 and value.std() > 0:  # drawn at random
            assert 0.5 < restored.std() / value.std() < 2, name
        else:
            assert torch.equal(restored, value), name


def test_checkpointing_changes_no_gradient():
    grads, start = [], tiny().train()
    for enable in (False, True):
        model = copy.deepcopy(start)
        model.set_grad_checkpointing(enable)
        model(torch.ones(2, 3, 64, 64, dtype=torch.float64).cumsum(2) / 64).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], msg=name)


@pytest.mark.parametrize("pos_bias", ["none", "relative"])
def test_export_and_compile_without_graph_breaks(pos_bias):
    model, x = tiny(img_size=64, pos_bias=pos_bias), image(64, 64)
    expected = model(x)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
