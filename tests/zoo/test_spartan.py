"""What SpaRTAN promises beyond timm's suite: sizes, checkpoints, folds, schedule, weight decay."""

import copy

import pytest
import torch
from timm.optim import param_groups_weight_decay
from timm.utils.model import reparameterize_model

import zoo
from zoo import spartan_blocks
from zoo.spartan import SpaRTAN, learning_rate, model_arguments, spartan_from_checkpoint
from zoo.spartan_blocks import ChannelMixer, FoldedBlock, SpartanBlock, SpatialMixer, turn_weight

TINY = dict(embed_dims=(16, 24, 32, 40), depths=(1, 2, 3, 1), expand_ratios=(4, 2, 2, 4), num_classes=5)


def randomise(module):
    """Weights away from their start, so that no norm, scale or gamma is without effect."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if name.endswith("rotation"):
                tensor.copy_(noise)
            elif tensor.ndim > 2 and not name.endswith("scale"):
                tensor.copy_(noise / tensor[0].numel() ** 0.5)
            elif name.endswith("var"):
                tensor.copy_(1 + noise.abs())
            else:
                tensor.copy_(0.3 * noise + (0.7 if "bias" not in name and "mean" not in name else 0))
    return module


def tiny(**kwargs):
    return randomise(SpaRTAN(dtype=torch.float64, **TINY | kwargs)).eval()


def image(h, w, batch=1):
    return torch.randn(batch, 3, h, w, dtype=torch.float64)


OFFICIAL = {
    "stem.conv1": "conv.0",
    "stem.conv2": "conv.1",
    "head.fc": "linear",
    "scale1.scale": "scale_1",
    "scale2.scale": "scale_2",
    "norm1": "norm_1",
    "norm2": "norm_2",
    "spatial": "smixer",
    "channel": "cmixer",
    "conv_near": "h_conv",
    "conv_far1": "l_conv.0.conv",
    "conv_far2": "l_conv.1",
    "se_near": "h_attn",
    "se_far": "l_attn",
    ".se.": ".attn.",
    "fc1": "squeeze",
    "fc2": "expand",
    "rotation": "complex",
    ".bn.": ".norm.",
}


def official_state(model):
    """The state dict as the official code would name, number and shape it."""
    layers, state = {}, {}
    for name, value in model.state_dict().items():
        if name.startswith("stages."):
            _, stage, kind, *rest = name.split(".")
            place = (int(stage), -1) if kind == "downsample" else (int(stage), int(rest.pop(0)))
            name = ".".join(["layers", str(layers.setdefault(place, len(layers))), *rest])
        for ours, theirs in OFFICIAL.items():
            name = name.replace(ours, theirs)
        if name.endswith(("scale_1", "scale_2")):
            value = value[None]
        elif name.endswith("gamma"):
            value = value.reshape(1, -1, 1, 1)
        elif name.endswith("complex"):
            value = value.reshape(1, 1, 1, -1, 2)
        state[name] = value
    return state


@pytest.mark.parametrize("size", [(64, 64), (29, 45), (150, 101)])
def test_maps_have_the_sizes_of_the_official_code(size):
    def sizes(n):
        n = -(-n // 4)
        return [n, n // 2, n // 4, n // 8]

    model = tiny()
    x = image(*size)
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert [tuple(m.shape[2:]) for m in maps] == list(zip(*map(sizes, size), strict=True))
    torch.testing.assert_close(model.forward_head(maps[-1]), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(28, 64), (64, 28), (1, 1)])
def test_an_image_without_a_pixel_in_the_last_stage_is_refused_by_name(size):
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} px leaves no pixel.*29 px or more"):
        tiny()(image(*size))


def test_a_pruned_model_takes_smaller_images():
    model = tiny()
    model.prune_intermediate_layers([1])
    assert model(image(5, 5)).shape == (1, 24, 1, 1)
    with pytest.raises(ValueError, match="5 px or more"):
        model(image(4, 5))


@pytest.mark.parametrize("wrapper", [lambda s: s, lambda s: {"epoch": 3, "model": s}])
def test_official_names_load_as_zoo_names_do(wrapper):
    source, target = tiny(), SpaRTAN(dtype=torch.float64, **TINY).eval()
    report = zoo.load_checkpoint(target, wrapper(official_state(source)))
    assert report.layout == "SpaRTAN"
    assert report.complete
    x = image(64, 64)
    torch.testing.assert_close(target(x), source(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(embed_dims=(8, 16, 32), depths=(2, 1, 4), expand_ratios=(2, 3, 4), num_classes=7),
        dict(in_chans=1, num_classes=0),
    ],
)
@pytest.mark.parametrize("translate", [official_state, lambda m: m.state_dict()])
def test_a_checkpoint_says_its_own_size(options, translate):
    source = tiny(**options)
    state = translate(source)
    made = model_arguments(state)
    assert made == {"in_chans": 3} | TINY | options
    model = spartan_from_checkpoint(state, dtype=torch.float64)
    x = image(64, 64)[:, : made["in_chans"]]
    torch.testing.assert_close(model(x), source(x), rtol=0, atol=0)


def test_other_checkpoints_have_no_size():
    with pytest.raises(zoo.CheckpointError, match="not of a SpaRTAN"):
        model_arguments({"patch_embed.proj.weight": torch.zeros(2, 3, 4, 4)})


def test_a_checkpoint_with_pickled_configuration_gives_its_model(tmp_path):
    class Configuration:  # stands for the OmegaConf object of official files
        pass

    Configuration.__qualname__ = "Configuration"
    globals()["Configuration"] = Configuration
    model = tiny()
    try:
        torch.save({"config": Configuration(), "model": official_state(model)}, tmp_path / "SpaRTAN_latest.pth")
    finally:
        del globals()["Configuration"]
    again = spartan_from_checkpoint(tmp_path / "SpaRTAN_latest.pth", dtype=torch.float64)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("size", [(64, 64), (29, 45), (100, 77)])
@pytest.mark.parametrize("fold", [zoo.fold, reparameterize_model], ids=["zoo", "timm"])
def test_folded_model_equals_trained_model_in_float64(size, fold):
    model = tiny()
    folded = fold(model)
    kept = {type(m) for m in folded.modules()}
    assert FoldedBlock in kept
    assert not kept & {torch.nn.BatchNorm2d, SpatialMixer, ChannelMixer}
    x = image(*size, batch=2)
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-11)
    torch.testing.assert_close(zoo.fold(folded)(x), model(x), rtol=0, atol=1e-11)  # folding twice changes nothing


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("ratio", [2, 3, 4, 5])
def test_every_form_of_block_folds_exactly(early, ratio):
    block = randomise(SpartanBlock(16, ratio, early, dtype=torch.float64)).eval()
    with torch.no_grad():  # factors that a division could stumble over, and a gamma that removes the map
        block.channel.rotation[:4] = torch.tensor([[0.0, 0.0], [0.0, 1.5], [-2.0, 0.0], [1.0, -1.0]])
        block.spatial.gamma[0] = -1.0
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64)
    folded = zoo.fold(block)
    assert isinstance(folded, FoldedBlock)
    torch.testing.assert_close(folded(x), block(x), rtol=0, atol=1e-12)


def test_a_few_images_at_a_time_give_what_all_at_once_give(monkeypatch):
    folded, x = zoo.fold(tiny()), image(64, 64, batch=5)
    monkeypatch.setattr(spartan_blocks, "CACHED_ELEMENTS", 2**40)
    expected = folded(x)
    monkeypatch.setattr(spartan_blocks, "CACHED_ELEMENTS", 2 * 64 * 16 * 16)  # two images in the first stage
    assert folded.stages[0].blocks[0].images_at_once(torch.empty(5, 16, 16, 16)) == 2 * torch.get_num_threads()
    torch.testing.assert_close(folded(x), expected, rtol=0, atol=1e-12)
    x = image(40, 50, batch=0)
    assert folded(x).shape == (0, 5)


def test_folded_model_keeps_gradients_of_its_input():
    model, x = tiny(), image(64, 64).requires_grad_()
    expected = torch.autograd.grad(model(x).square().sum(), x)[0]
    got = torch.autograd.grad(zoo.fold(model)(x).square().sum(), x)[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_factors_commute_into_the_weights_of_whole_pairs():
    weight, rotation = torch.randn(8, 4, 3, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    x = torch.randn(1, 8, 6, 5, dtype=torch.float64)
    turned = zoo.kernels.wave_gate.rotate(x, rotation)
    conv = torch.nn.functional.conv2d
    expected = conv(turned, weight, padding=1, groups=2)
    torch.testing.assert_close(conv(x, turn_weight(weight, rotation), padding=1, groups=2), expected)


@pytest.mark.parametrize("folded", [False, True])
def test_export_script_and_compile(folded):
    model, x = tiny(), image(45, 64)
    model = zoo.fold(model) if folded else model
    expected = model(x)
    for form in (
        torch.export.export(model, (x,)).module(),
        torch.jit.script(copy.deepcopy(model)),
        torch.fx.symbolic_trace(model),
        torch.compile(model, fullgraph=True, backend="eager"),
    ):
        torch.testing.assert_close(form(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("folded", [False, True])
def test_half_precision_and_autocast_run(folded):
    model = tiny().float()
    model = zoo.fold(model) if folded else model
    x = image(64, 64).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).isfinite().all()
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("folded", [False, True])
def test_memory_layout_changes_no_output(folded):
    model = zoo.fold(tiny()) if folded else tiny()
    x = image(64, 64, batch=2)
    expected = model(x)
    laid_out = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(laid_out, expected, rtol=0, atol=1e-11)


def test_weight_decay_of_timm_is_that_of_the_authors():
    model = tiny()
    names = {id(p): n for n, p in model.named_parameters()}
    groups = param_groups_weight_decay(model, 0.03, no_weight_decay_list=model.no_weight_decay())
    decayed = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    assert {n for n in names.values() if n.endswith(("scale1.scale", "scale2.scale", "rotation"))} <= decayed
    assert not {n for n in decayed if n.endswith(("bias", "gamma")) or "norm" in n or ".bn." in n}


def test_stochastic_depth_grows_over_all_blocks_and_stays_below_its_rate():
    model = SpaRTAN(**TINY, drop_path_rate=0.7, device="meta")
    rates = [getattr(b.drop_path2, "drop_prob", 0.0) for s in model.stages for b in s.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(7)])
    assert [getattr(b.drop_path1, "drop_prob", 0.0) for s in model.stages for b in s.blocks] == rates


def test_initial_weights_come_back_after_to_empty():
    model = SpaRTAN(**TINY)
    with torch.device("meta"):
        empty = SpaRTAN(**TINY)
    empty.to_empty(device="cpu")
    for tensor in empty.state_dict().values():
        tensor.fill_(7)
    empty.init_weights()
    for name, value in model.state_dict().items():
        restored = empty.state_dict()[name]
        if value.numel() > 1 and value.std() > 0:
            assert 0.5 < restored.std() / value.std() < 2, name
        else:
            assert torch.equal(restored, value), name


def test_checkpointing_changes_no_gradient():
    grads = []
    for enable in (False, True):
        model = tiny().train()
        model.set_grad_checkpointing(enable)
        x = torch.ones(2, 3, 64, 64, dtype=torch.float64).cumsum(2) / 64
        model(x).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad is not None, name
        torch.testing.assert_close(grad, grads[1][name], msg=name)


def test_the_learning_rate_lags_an_epoch_and_jumps_behind_the_warm_up():
    rates = [learning_rate(epoch) for epoch in range(1, 301)]
    assert rates[0] == rates[1] == 1e-4
    assert rates[2] == pytest.approx(2.2e-4)
    assert rates[20] == pytest.approx(2.38e-3)
    assert max(rates) == rates[21] == pytest.approx(2.4727e-3, abs=1e-7)
    assert 1e-6 < rates[-1] < 1.3e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(depths=(1, 1, 1)), "one of each for every stage"),
        (dict(depths=(1, 0, 1, 1)), "stage without blocks"),
        (dict(expand_ratios=(4, 4, 1, 2)), "an integer above 1"),
        (dict(embed_dims=(16, 20, 32, 40)), "multiples of 8"),
    ],
)
def test_wrong_options_raise_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        SpaRTAN(**TINY | options)
