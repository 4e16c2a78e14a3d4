"""What CRATE promises beyond timm's suite: folds, sizes, checkpoints of every layout, CRATE-MAE."""

import copy

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

import zoo
from zoo.checkpoint import CheckpointError
from zoo.crate import Crate, learning_rate_factor
from zoo.crate_blocks import (
    CrateAlphaBlock,
    Ista,
    Odl,
    ista_step,
    resample_pos_embed,
    sincos_pos_embed,
)
from zoo.crate_mae import CrateMae, create_mae, random_mask
from zoo.manifest import find_weights

TINY = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=5)
KINDS = {
    "crate": {},
    "alpha": dict(block_fn=CrateAlphaBlock, patch_norm=False, norm_eps=1e-6),
    "mae": dict(patch_norm=False, final_norm=True, weight_init="mae", lambd=0.5, pos_mode="offset"),
}


def tiny(kind="crate", **options):
    return Crate(**TINY | KINDS[kind] | options)


def tiny_mae(**options):
    return CrateMae(tiny("mae", num_classes=0, **options))


OFFICIAL = {
    "pos_embed": "pos_embedding",
    "patch_embed.norm_in.": "to_patch_embedding.1.",
    "patch_embed.norm.": "to_patch_embedding.3.",
    "fc_norm.": "mlp_head.0.",
    "head.": "mlp_head.1.",
}
OFFICIAL_LAYER = {
    "norm1.": "0.norm.",
    "attn.qkv.": "0.fn.qkv.",
    "attn.proj.": "0.fn.to_out.0.",
    "norm2.": "1.norm.",
    "ista.weight": "1.fn.weight",
    "odl.dictionary": "1.fn.D",
    "odl.decoder": "1.fn.D1",
}


def official_crate(model):
    """The weights of a CRATE or CRATE-alpha under the official names and layouts."""
    conv = not hasattr(model.patch_embed, "norm_in")
    proj = {"patch_embed.proj.": "conv1." if conv else "to_patch_embedding.2."}
    state = {}
    for name, value in model.state_dict().items():
        if name == "patch_embed.proj.weight" and not conv:
            value = value.permute(0, 2, 3, 1).flatten(1)
        elif "norm_in" in name:
            value = value.view(model.in_chans, *model.patch_embed.patch_size).permute(1, 2, 0).flatten()
        start, names = "", OFFICIAL | proj
        if name.startswith("blocks."):
            _, layer, name = name.split(".", 2)
            start, names = f"transformer.layers.{layer}.", OFFICIAL_LAYER
        ours = next((n for n in names if name.startswith(n)), None)
        state[start + (name.replace(ours, names[ours]) if ours else name)] = value.clone()
    return state


# Numbers and folds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fold", [zoo.fold, reparameterize_model], ids=["zoo.fold", "timm"])
@pytest.mark.parametrize("kind", KINDS)
def test_folded_model_equals_trained_model_in_float64(kind, fold):
    model = tiny(kind).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    folded = fold(model)
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-12)
    has_ista = any(isinstance(module, Ista) for module in model.modules())
    assert not any(isinstance(module, Ista) for module in folded.modules())
    assert (sum(1 for m in folded.modules() if isinstance(m, nn.ReLU)) == 3) == has_ista


@pytest.mark.parametrize("tokens", [1, 5, 23, 24, 25, 400])
def test_every_training_form_of_ista_is_the_published_step(tokens):
    ista = Ista(24, step_size=0.2, lambd=0.3).double()
    x, grad = torch.randn(2, 1, tokens, 24, dtype=torch.float64)

    def results(training):
        leaf = x.clone().requires_grad_()
        ista.train(training).zero_grad()
        out = ista(leaf)
        out.backward(grad)
        return out.detach(), leaf.grad, ista.weight.grad.clone()

    for ours, published in zip(results(True), results(False)):
        torch.testing.assert_close(ours, published, rtol=0, atol=1e-11)
    assert (results(True)[0] >= 0).all()


def test_training_step_of_ista_keeps_its_base_point_under_autocast():
    weight = torch.zeros(16, 16)
    x = torch.randn(2, 50, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ista_step(x, weight, 0.1, 0.0), x.relu())


def test_odl_is_two_proximal_steps():
    odl = Odl(12, ratio=3).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    z = (0.1 * x @ odl.dictionary - 0.01).relu()
    z = (z - 0.1 * (z @ odl.dictionary.T - x) @ odl.dictionary - 0.01).relu()
    torch.testing.assert_close(odl(x), z @ odl.decoder.T, rtol=0, atol=1e-13)


def test_supervised_tokens_are_sparse_and_not_normed_by_forward_features():
    model = tiny().eval()
    x = torch.randn(1, 3, 32, 32)
    tokens = model.forward_features(x)
    assert (tokens >= 0).all()
    assert 0.2 < (tokens == 0).float().mean() < 0.9
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), model.fc_norm(tokens[:, 0]))


def test_average_pooling_includes_the_class_token():
    model = tiny(global_pool="avg").eval()
    tokens = torch.randn(2, 17, 24)
    torch.testing.assert_close(model.forward_head(tokens), model.head(model.fc_norm(tokens.mean(dim=1))))


def test_one_head_as_wide_as_the_tokens_has_no_output_map():
    model = tiny(num_heads=1)
    assert not any("attn.proj" in name for name in model.state_dict())
    assert any("attn.proj" in name for name in tiny(num_heads=1, head_dim=8).state_dict())


def test_attention_dropout_acts_in_training_only():
    model = tiny(attn_drop_rate=0.5)
    x = torch.randn(1, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("kind", KINDS)
def test_plain_attention_equals_fused(kind):
    model = tiny(kind).double().eval()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    expected = model(x)
    for block in model.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_learning_rate_is_the_smaller_of_warmup_and_cosine():
    factors = [learning_rate_factor(epoch, 200) for epoch in range(200)]
    assert max(factors) == pytest.approx(0.978, abs=1e-3)
    assert factors[0] == pytest.approx(0.05)


# Sizes --------------------------------------------------------------------------------------------------------


def test_another_size_fails_with_the_remedy():
    with pytest.raises(ValueError, match=r"built for 32x32 px, got 48x40: pass img_size=\(48, 40\)"):
        tiny()(torch.randn(1, 3, 48, 40))
    with pytest.raises(ValueError, match="multiple of the patch"):
        tiny(dynamic_img_size=True)(torch.randn(1, 3, 33, 32))
    with pytest.raises(ValueError, match="pass a multiple"):
        tiny(img_size=30)


@pytest.mark.parametrize("kind", KINDS)
def test_dynamic_size_equals_a_model_set_to_that_size(kind):
    model = tiny(kind, dynamic_img_size=True).eval()
    x = torch.randn(1, 3, 48, 16)
    expected = model(x)
    model.set_input_size((48, 16))
    torch.testing.assert_close(model(x), expected)
    assert model.pos_embed.shape[1] == 13


@pytest.mark.parametrize("kind", KINDS)
def test_set_input_size_keeps_frozen_tables_frozen_and_can_change_the_patch(kind):
    model = tiny(kind).requires_grad_(False).eval()
    smooth = torch.nn.functional.interpolate(torch.randn(1, 3, 4, 4), size=(32, 32), mode="bicubic")
    before = model.patch_embed(smooth).mean()
    model.set_input_size(img_size=64, patch_size=16)
    assert not any(p.requires_grad for p in model.parameters())
    larger = torch.nn.functional.interpolate(smooth, size=(64, 64), mode="bicubic")
    assert model(larger).shape == (1, 5)
    assert torch.isfinite(before)
    assert model.feature_info[0]["reduction"] == 16


def test_prefix_mode_takes_the_first_rows_of_the_table():
    model = tiny(dynamic_img_size=True, pos_mode="prefix").eval()
    x = torch.randn(1, 3, 16, 24)
    tokens = model.patch_embed(x)
    first = torch.cat([model.cls_token, tokens], dim=1) + model.pos_embed[:, :7]
    torch.testing.assert_close(model.embed(x), first)
    with pytest.raises(ValueError, match="has 16 positions and the image has 24 patches"):
        model(torch.randn(1, 3, 48, 32))


def test_offset_mode_leaves_the_grid_of_the_table_alone_and_row_zero_always():
    table = torch.randn(1, 17, 6)
    assert torch.equal(resample_pos_embed(table, [4, 4], [4, 4], "offset"), table)
    other = resample_pos_embed(table, [7, 3], [4, 4], "offset")
    assert other.shape == (1, 22, 6)
    assert torch.equal(other[:, 0], table[:, 0])


def test_mae_table_encodes_columns_first():
    table = sincos_pos_embed((2, 3), 8)[0]
    assert torch.equal(table[0], torch.zeros(8))
    assert torch.equal(table[1, :4], table[4, :4])  # same column
    assert torch.equal(table[1, 4:], table[2, 4:])  # same row
    assert table[2, 0] == pytest.approx(0.841471, abs=1e-6)


# Checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}, "epoch": 3}]
)
@pytest.mark.parametrize("kind", ["crate", "alpha"])
def test_official_file_gives_the_same_model(kind, wrap):
    source, target = tiny(kind).eval(), tiny(kind).eval()
    official = official_crate(source)
    assert not set(official) & {"pos_embed", "fc_norm.weight"}
    report = zoo.load_checkpoint(target, wrap(official))
    assert report.layout == ("CRATE" if kind == "crate" else "CRATE-alpha")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(target(x), source(x))


def test_demo_file_with_two_linear_maps_gives_their_composition():
    source = tiny().double().eval()
    state = official_crate(source)
    first, last = nn.Linear(24, 24).double(), nn.Linear(24, 5).double()
    state |= {"mlp_head.1.weight": first.weight, "mlp_head.1.bias": first.bias}
    state |= {"head.weight": last.weight, "head.bias": last.bias}
    target = tiny().double().eval()
    report = zoo.load_checkpoint(target, {"model": {k: v.detach() for k, v in state.items()}})
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = last(first(source.forward_head(source.forward_features(x), pre_logits=True)))
    torch.testing.assert_close(target(x), expected, rtol=0, atol=1e-12)
    assert any("merged" in note for note in report.notes)


def test_file_of_another_image_size_loads_with_a_resampled_table():
    source, target = tiny(), tiny(img_size=(48, 32))
    report = zoo.load_checkpoint(target, official_crate(source))
    assert any("from 4x4 to 6x4" in note for note in report.notes)
    source.set_input_size((48, 32))
    torch.testing.assert_close(target.pos_embed, source.pos_embed)


def test_one_channel_model_computes_what_the_file_computes_on_grey_images():
    """timm sums the kernel over the channels; the norm's scales, one a pixel and channel, must be inside."""
    source, target = tiny().double().eval(), tiny(in_chans=1).double().eval()
    with torch.no_grad():
        source.patch_embed.norm_in.weight.normal_(1, 0.3)
        source.patch_embed.norm_in.bias.normal_(0, 0.3)
    converted = zoo.checkpoint.find_converter(target)(official_crate(source), target).state_dict
    converted["patch_embed.proj.weight"] = converted["patch_embed.proj.weight"].sum(dim=1, keepdim=True)
    target.load_state_dict(converted)
    grey = torch.randn(1, 1, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(target(grey), source(grey.expand(-1, 3, -1, -1)), rtol=0, atol=1e-11)


def clipa_tower(model):
    """The visual tower that a CLIPA file would have for a tiny CRATE-alpha."""
    state = {
        "visual.class_embedding": model.cls_token[0, 0],
        "visual.positional_embedding": model.pos_embed[0],
        "visual.conv1.weight": model.patch_embed.proj.weight,
        "visual.ln_post.weight": model.fc_norm.weight,
        "visual.ln_post.bias": model.fc_norm.bias,
        "visual.proj": model.head.weight.T,
        "positional_embedding": torch.zeros(3, 3),
    }
    for i, block in enumerate(model.blocks):
        prefix = f"visual.transformer.resblocks.{i}."
        state |= {
            prefix + "attn.in_proj_weight": block.attn.qkv.weight.repeat(3, 1),
            prefix + "attn.out_proj.weight": block.attn.proj.weight,
            prefix + "mlp.c_fc.weight": block.odl.dictionary.T,
            prefix + "mlp.c_proj.weight": block.odl.decoder,
            prefix + "ln_1.weight": block.norm1.weight,
            prefix + "ln_1.bias": block.norm1.bias,
            prefix + "ln_2.weight": block.norm2.weight,
            prefix + "ln_2.bias": block.norm2.bias,
        }
    return {name: value.detach().clone() for name, value in state.items()}


def test_clipa_tower_becomes_a_crate_alpha_and_untied_attention_is_refused():
    source, target = tiny("alpha").eval(), tiny("alpha").eval()
    with torch.no_grad():
        source.patch_embed.proj.bias.zero_()
        source.head.bias.zero_()
    state = clipa_tower(source)
    zoo.load_checkpoint(target, state)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(target(x), source(x))
    state["visual.transformer.resblocks.1.attn.in_proj_weight"][0] += 1
    with pytest.raises(CheckpointError, match="CLIP model of another kind"):
        zoo.load_checkpoint(target, state)


def test_file_of_another_model_is_named():
    with pytest.raises(CheckpointError, match="looks like a checkpoint of CRATE-alpha"):
        zoo.load_checkpoint(nn.Linear(2, 2), official_crate(tiny("alpha")))


# CRATE-MAE ----------------------------------------------------------------------------------------------------


def test_mask_removes_the_patches_of_largest_noise():
    mask = random_mask(torch.tensor([[0.3, 0.9, 0.1, 0.5]]), 0.5)
    assert mask.tolist() == [[0, 1, 0, 1]]
    with pytest.raises(ValueError, match="leaves no patch"):
        random_mask(torch.rand(1, 4), 1.0)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_loss_is_the_error_of_removed_patches_only(norm_pix_loss):
    model = tiny_mae().eval()
    model.norm_pix_loss = norm_pix_loss
    images = torch.randn(2, 3, 32, 32)
    out = model(images)
    target = model.patchify(images)
    if norm_pix_loss:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    removed = out.mask.bool()
    torch.testing.assert_close(out.loss, (out.pred - target)[removed].square().mean())
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_pixels_of_removed_patches_do_not_reach_the_prediction():
    model = tiny_mae().eval()
    images, noise = torch.randn(1, 3, 32, 32), torch.rand(1, 16)
    _, pred, mask = model(images, noise=noise)
    hidden = model.unpatchify(model.patchify(images).masked_fill(mask.unsqueeze(-1).bool(), 9.0), (4, 4))
    torch.testing.assert_close(model(hidden, noise=noise).pred, pred)


def test_reconstruction_keeps_visible_pixels_for_any_shape():
    model = tiny_mae(dynamic_img_size=True).eval()
    images = torch.randn(2, 3, 48, 16)
    torch.testing.assert_close(model.unpatchify(model.patchify(images), (6, 2)), images)
    image, masked, mask = model.reconstruct(images, 0.5)
    visible = model.unpatchify((1 - mask).unsqueeze(-1).expand(-1, -1, 192), (6, 2)).bool()
    assert torch.equal(image[visible], images[visible])
    assert torch.equal(masked == 0, ~visible)


def test_pretrained_autoencoder_becomes_a_classifier():
    source = tiny_mae().eval()
    target = tiny("mae").eval()
    target.pretrained_cfg = {"classifier": "head"}
    report = zoo.load_checkpoint(target, source.state_dict(), head="keep")
    assert any("other entries were left out" in note for note in report.notes)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(target.forward_features(x), source.encoder.forward_features(x))


def test_choosing_lambda_sets_the_better_one():
    model = tiny_mae()
    losses = model.choose_lambda(torch.randn(2, 3, 32, 32), candidates=(0.1, 0.5, 50.0))
    assert len(losses) == 3
    assert {b.ista.lambd for b in model.encoder.blocks} == {min(losses, key=losses.get)}
    with pytest.raises(ValueError, match=r"before zoo\.fold"):
        zoo.fold(model).set_lambda(0.5)


def test_gradient_checkpointing_of_the_autoencoder_changes_nothing():
    model = tiny_mae()
    images, noise = torch.randn(1, 3, 32, 32), torch.rand(1, 16)
    model(images, noise=noise).loss.backward()
    expected = model.encoder.blocks[0].ista.weight.grad.clone()
    model.zero_grad()
    model.set_grad_checkpointing()
    model(images, noise=noise).loss.backward()
    torch.testing.assert_close(model.encoder.blocks[0].ista.weight.grad, expected)


def test_registered_autoencoder_has_the_published_size():
    model = create_mae("mae_crate_tiny", device="meta")
    assert sum(p.numel() for p in model.parameters()) == 11_404_032 - 384 * 385  # without the unread decoder_embed


# timm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_init_weights_restores_everything_after_to_empty(kind):
    model = tiny(kind, device="meta", dtype=torch.float64).to_empty(device="cpu").eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(float("nan"))
    model.init_weights()
    assert all(torch.isfinite(t).all() for t in [*model.parameters(), *model.buffers()])
    if kind == "mae":
        assert torch.equal(model.pos_embed, sincos_pos_embed((4, 4), 24).double())


@pytest.mark.parametrize("kind", KINDS)
def test_final_intermediate_is_forward_features(kind):
    model = tiny(kind).eval()
    x = torch.randn(1, 3, 32, 32)
    final, taps = model.forward_intermediates(x, norm=True)
    assert torch.equal(final, model.forward_features(x))
    assert torch.equal(taps[-1], final[:, 1:].transpose(1, 2).reshape(1, 24, 4, 4))
    (tokens, prefix), *_ = model.forward_intermediates(x, 1, return_prefix_tokens=True, intermediates_only=True)
    assert tokens.shape == (1, 24, 4, 4)
    assert prefix.shape == (1, 1, 24)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_to_one_graph_and_exports(kind, training):
    model = tiny(kind).train(training)
    x = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    if not training:
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
        larger = torch.randn(5, 3, 32, 32)
        torch.testing.assert_close(program.module()(larger), model(larger))


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_and_channels_last_work(kind):
    model = tiny(kind).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), model(x))
    out = model.bfloat16()(x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert torch.isfinite(out).all()


def test_features_only_gives_maps_of_the_chosen_layers():
    model = timm.create_model(
        "crate_tiny", features_only=True, out_indices=(1, 3), img_size=32, embed_dim=24, num_heads=3
    )
    maps = model(torch.randn(1, 3, 32, 32))
    assert [tuple(m.shape) for m in maps] == [(1, 24, 2, 2)] * 2


def test_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match="global_pool='max'"):
        tiny(global_pool="max")
    with pytest.raises(ValueError, match="pos_mode='bilinear'"):
        tiny(pos_mode="bilinear")
    with pytest.raises(ValueError, match="no multiple of num_heads=5"):
        tiny(num_heads=5)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("crate_tiny", 6090856),
        ("crate_small", 13116328),
        ("crate_base", 22796008),
        ("crate_large", 77641192),
        ("crate_small_p8", 13122088),
        ("crate_base_demo", 38831570),
        ("crate_small_p8_21k", 14118482),
    ],
)
def test_variant_has_the_published_size(name, params):
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == params


@pytest.mark.parametrize("name", ["crate_tiny", "crate_small", "crate_base_demo", "mae_crate_base"])
def test_weights_without_an_address_say_how_to_load_them(name):
    assert find_weights(name) is not None
    with pytest.raises(RuntimeError, match=r"zoo\.load_checkpoint"):
        timm.create_model(name, pretrained=True)
