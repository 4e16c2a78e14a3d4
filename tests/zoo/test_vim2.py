"""What ViM2 promises beyond timm's suite: sizes, names, averaging, VMamba as a special case, export, memory."""

import pytest
import timm
import torch

import zoo
from zoo import vim2
from zoo.vim2 import ViM2, entry_name
from zoo.vim2_blocks import Average, ChannelMixer, TokenMixer, mixer_order

TINY = dict(
    dims=(8, 12, 16, 24),
    token_depths=(2, 1, 3, 1),
    channel_depths=(1, 1, 2, 0),
    channel_expand=(2, 2, 2, 1),
    d_state=4,
    num_classes=5,
)
VMAMBA = TINY | dict(channel_depths=(0, 0, 0, 0), averaging=False)
PARAMETERS = {
    "vim2_tiny": 19_849_561,
    "vim2_small": 43_597_143,
    "vim2_base": 74_242_199,
    "vim2_small_table8": 34_883_992,
    "vim2_base_table8": 59_413_592,
    "vanilla_vmamba_tiny": 22_893_448,
    "vanilla_vmamba_small": 44_417_416,
    "vanilla_vmamba_base": 76_254_056,
}


def randomise(model):
    """Weights away from their start, so that no scan, average or norm is without effect."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        scale = max(1, tensor[0].numel()) ** -0.5 if tensor.ndim > 1 else 0.2
        tensor.copy_(1 + 0.2 * noise if name.endswith(("norm.weight", "Ds")) else scale * noise)
    return model


def tiny(**options):
    return randomise(ViM2(dtype=torch.float64, **TINY | options)).eval()


def image(h, w, batch=1):
    return torch.randn(batch, 3, h, w, dtype=torch.float64)


def named_by_kind(model):
    """The state dict with mixers named by kind (token.i, channel.j), as the reference names them."""
    state = {}
    for name, value in model.state_dict().items():
        part = name.split(".")
        if part[0] == "stages" and part[2] == "blocks":
            order = model.mixer_orders()[int(part[1])]
            kind = "token" if order[int(part[3])] else "channel"
            index = order[: int(part[3])].count(order[int(part[3])])
            rest = part[4:]
            if rest[0] == "average":
                leaf = rest[1] if kind == "token" else {"alpha": "theta", "beta": "gamma"}[rest[1]]
                name = f"stages.{part[1]}.{kind}_mix.{index}.{leaf}"
            else:
                rest = rest[1:] if rest[0] == "mixer" else rest
                name = ".".join(["stages", part[1], kind, str(index), *rest])
        state[name.replace("head.fc.", "head.")] = value
    return state


def named_by_vmamba(model):
    state = {}
    for name, value in model.state_dict().items():
        part = name.split(".")
        if part[0] == "stages" and part[2] == "blocks":
            rest = ["op", *part[5:]] if part[4] == "mixer" else part[4:]
            name = ".".join(["layers", part[1], "blocks", part[3], *rest])
        elif part[0] == "stages":
            name = ".".join(["layers", str(int(part[1]) - 1), *part[2:]])
        for ours, theirs in {
            "stem.proj": "patch_embed.0",
            "stem.norm": "patch_embed.2",
            "head.fc": "classifier.head",
        }.items():
            name = name.replace(ours, theirs)
        state[f"classifier.{name}" if name.startswith("norm.") else name] = value
    return state


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_reading_and_of_vmamba(name):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_mlp_ablation_has_the_printed_40_million_parameters():
    model = timm.create_model("vim2_mlp", device="meta")
    assert abs(sum(p.numel() for p in model.parameters()) / 40e6 - 1) < 0.01
    assert not any(isinstance(m, (ChannelMixer, Average)) for m in model.modules())


def test_the_family_says_that_it_is_a_reading():
    assert "neither code nor weights" in vim2.READING
    assert "READING" in vim2.__doc__


@pytest.mark.parametrize("size", [(224, 224), (32, 32), (33, 97), (76, 44), (4, 4)])
def test_any_image_size_pads_odd_maps(size):
    model = tiny()
    maps = model.forward_intermediates(image(*size), intermediates_only=True)
    expected = [(size[0] // 4, size[1] // 4)]
    for _ in range(3):
        expected.append(tuple(-(-n // 2) for n in expected[-1]))
    assert [tuple(m.shape[2:]) for m in maps] == expected
    assert model(image(*size)).isfinite().all()


def test_no_weight_depends_on_the_image_size():
    model = tiny()
    before = {n: v.shape for n, v in model.state_dict().items()}
    model(image(96, 64))
    assert {n: v.shape for n, v in model.state_dict().items()} == before


@pytest.mark.parametrize(
    ("tokens", "channels", "order"),
    [(2, 1, "TTC"), (6, 3, "TTCTTCTTC"), (5, 2, "TTCTTCT"), (25, 12, "TTC" * 12 + "T"), (2, 0, "TT"), (1, 2, "CCT")],
)
def test_channel_mixers_are_spread_among_token_mixers(tokens, channels, order):
    assert "".join("T" if t else "C" for t in mixer_order(tokens, channels)) == order


@pytest.mark.parametrize("channel_mixer", ["grouped", "dense"])
def test_files_that_name_mixers_by_kind_load(channel_mixer):
    source, target = tiny(channel_mixer=channel_mixer), ViM2(dtype=torch.float64, **TINY, channel_mixer=channel_mixer)
    report = zoo.load_checkpoint(target, {"model": named_by_kind(source)})
    assert report.layout == "ViM2 by kind of mixer"
    x = image(40, 36)
    torch.testing.assert_close(target.eval()(x), source(x), rtol=0, atol=0)


def test_official_vmamba_files_load_into_the_special_case():
    source, target = tiny(**VMAMBA), ViM2(dtype=torch.float64, **VMAMBA)
    report = zoo.load_checkpoint(target, {"model": named_by_vmamba(source)})
    assert report.layout == "vanilla VMamba"
    x = image(64, 32)
    torch.testing.assert_close(target.eval()(x), source(x), rtol=0, atol=0)
    assert entry_name("classifier.norm.bias", []) == "norm.bias"


def test_a_file_of_another_depth_is_refused_with_the_names():
    deeper = tiny(token_depths=(2, 1, 4, 1))
    with pytest.raises(zoo.CheckpointError, match=r"stages\.2"):
        zoo.load_checkpoint(tiny(), named_by_kind(deeper))


def test_averaging_starts_as_a_residual_chain_and_equals_vmamba_without_channel_mixers():
    averaged = ViM2(dtype=torch.float64, **TINY | dict(channel_depths=(0, 0, 0, 0))).eval()
    plain = tiny(**VMAMBA)
    zoo.load_checkpoint(averaged, plain.state_dict(), strict=False)
    x = image(48, 48)
    torch.testing.assert_close(averaged(x), plain(x), rtol=0, atol=1e-12)


def test_each_mixer_reads_all_earlier_outputs_of_its_stage():
    average = Average(3, 2, latest_is_token=False)
    assert average.alpha.tolist() == [[0, 0, 0]]
    assert average.beta.tolist() == [[0, 1]]
    maps = [torch.randn(1, 2, 2, 3) for _ in range(4)]
    with torch.no_grad():
        average.alpha.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
        average.beta.copy_(torch.tensor([[4.0, 5.0]]))
    expected = 5 * maps[0] + 2 * maps[1] + 3 * maps[2] + 5 * maps[3]
    torch.testing.assert_close(average(maps[:3], [maps[0], maps[3]]), expected)
    counts = [(b.average.alpha.shape[1], b.average.beta.shape[1]) for b in tiny().stages[2].blocks]
    assert counts == [(1, 1), (2, 1), (2, 2), (3, 2), (3, 3)]  # T C T C T


@pytest.mark.parametrize("options", [{}, dict(channel_mixer="dense"), VMAMBA])
def test_export_compile_and_script_equal_eager(options):
    model, x = tiny(**options), image(40, 36)
    expected = model(x)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)


def test_export_with_a_free_batch_and_image_size():
    model = tiny()
    # multiples of 32, so that padding of odd maps needs no decision
    batch, rows, columns = (torch.export.Dim(n, min=1, max=8) for n in ("batch", "rows", "columns"))
    program = torch.export.export(
        model, (image(64, 96, 2),), dynamic_shapes=({0: batch, 2: 32 * rows, 3: 32 * columns},)
    )
    x = image(96, 64, 3)
    torch.testing.assert_close(program.module()(x), model(x))


def test_compiled_training_step_has_the_eager_gradients():
    two_stages = {n: TINY[n][:2] for n in ("dims", "token_depths", "channel_depths", "channel_expand")}
    model, x = tiny(**two_stages).train(), image(36, 40, 2)
    model(x).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")(x).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=name)


def test_checkpointing_changes_no_gradient():
    grads = []
    for enable in (False, True):
        model = tiny().train()
        model.set_grad_checkpointing(enable)
        x = torch.ones(2, 3, 40, 32, dtype=torch.float64).cumsum(2) / 40
        model(x).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad is not None, name
        torch.testing.assert_close(grad, grads[1][name], msg=name)


@pytest.mark.parametrize("cast", ["model", "autocast"])
def test_bfloat16_stays_near_float32(cast):
    model, x = tiny().float(), image(64, 64).float()
    expected = model(x)
    if cast == "model":
        y = model.bfloat16()(x.bfloat16())
        assert y.dtype == torch.bfloat16
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
    assert (y.float() - expected).abs().max() < 0.1 * expected.std() + 0.1


def test_initial_weights_come_back_after_to_empty():
    model = ViM2(**TINY)
    with torch.device("meta"):
        empty = ViM2(**TINY)
    empty.to_empty(device="cpu")
    for tensor in empty.state_dict().values():
        tensor.fill_(7)
    empty.init_weights()
    for name, value in model.state_dict().items():
        restored = empty.state_dict()[name]
        assert not (restored == 7).any(), name
        if name.endswith(("A_logs", "A_log", "Ds", ".D", "alpha", "beta", "norm.weight", "norm.bias")):
            assert torch.equal(restored, value), name
    mixers = [m for m in empty.modules() if isinstance(m, (TokenMixer, ChannelMixer))]
    for mixer in mixers:
        steps = torch.nn.functional.softplus(mixer.dt_projs_bias if isinstance(mixer, TokenMixer) else mixer.dt_bias)
        assert steps.min() > 0.9e-3
        assert steps.max() < 0.11


def test_decay_rates_averages_and_scan_biases_are_not_decayed():
    model = tiny()
    skipped = model.no_weight_decay()
    assert "stages.0.blocks.0.mixer.A_logs" in skipped
    assert "stages.0.blocks.1.average.alpha" in skipped
    assert "stages.0.blocks.2.mixer.out_bias" in skipped
    assert not any(n.endswith(("proj.weight", "in_x_weight", "x_proj_weight")) for n in skipped)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(token_depths=(1, 1, 1)), "one of each for every stage"),
        (dict(channel_mixer="sparse"), "'grouped', 'dense' or 'mlp'"),
        (dict(conv_kernel=4), "pass an odd number"),
    ],
)
def test_wrong_options_raise_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        ViM2(**TINY | options)


def test_channel_mixers_help_to_learn_what_a_pixel_is():
    """A few steps on images whose class is a product of their channels: the loss falls below chance."""
    torch.manual_seed(0)
    model = ViM2(**TINY | dict(num_classes=2)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        signs = torch.randint(0, 2, (16, 3)) * 2 - 1
        x = signs[:, :, None, None] + 0.1 * torch.randn(16, 3, 32, 32)
        loss = torch.nn.functional.cross_entropy(model(x), (signs[:, 0] * signs[:, 1] > 0).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
