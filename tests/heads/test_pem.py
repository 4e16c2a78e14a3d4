"""PEM's network: any backbone, any size, official files, equal inference forms, learning."""

import pytest
import timm
import torch
from torch import nn

import zoo
from tests.parity.golden import golden_cases
from zoo.heads.pem import checkpoint
from zoo.heads.pem.criterion import PemCriterion, Segments
from zoo.heads.pem.deform_conv import deform_conv, reference
from zoo.heads.pem.model import PemHead
from zoo.heads.pem.transformer_decoder import FoldedKeys, KeyProjection, resize_to, sine_position
from zoo.saving import load_model, save_model

_TINY_BACKBONE = dict(depths=(1, 1, 1), embed_dims=(8, 16, 24, 32))
_TINY_HEAD = dict(conv_dim=16, mask_dim=24, dim=32, num_heads=4, mlp_dim=48, depth=4, num_queries=9)


def tiny_segmenter(num_classes=5, **kwargs):
    """A segmenter of a few thousand parameters whose norms and offsets are not at their start."""
    model = zoo.create_segmenter(
        "pem", backbone="stdc1", num_classes=num_classes, backbone_args=_TINY_BACKBONE, **(_TINY_HEAD | kwargs)
    )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.3)
        for level in model.head.pixel_decoder.levels:
            level.offset.weight.normal_(std=0.05)
    return model


ONE_OF_EACH_FAMILY = (
    "poolformerv1_s12",
    "ascan_tiny",
    "fcaformer_l1",
    "ninformer_tiny_patch16_224",
    "activator_tiny_patch16_224",
    "slab_swin_t",
    "spartan_tiny",
    "crate_tiny",
    "vim2_tiny",
)


@pytest.mark.parametrize(
    "name", [*ONE_OF_EACH_FAMILY, "caformer_s18", "convnext_atto", "mobilenetv3_small_050", "vit_tiny_patch16_224"]
)
def test_every_family_and_timm_model_carries_the_head_at_odd_sizes(name):
    model = zoo.create_segmenter("pem", backbone=name, num_classes=3, **_TINY_HEAD).eval()
    with torch.no_grad():
        output = model(torch.randn(1, 3, 70, 101))
    assert output.class_logits.shape == (1, 9, 4)
    assert output.mask_logits.shape == (1, 9, 24, 32)
    assert output.mask_logits.isfinite().all()


@pytest.mark.parametrize("size", [(1, 1), (33, 40), (64, 160)])
def test_inference_forms_are_equal_in_float64(size):
    model = tiny_segmenter().double().eval()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    folded = zoo.fold(model)
    with torch.no_grad():
        full = model(images, auxiliary=True)
        assert len(full.auxiliary) == 4
        for other in (model(images), folded(images), folded(images, auxiliary=True)):
            torch.testing.assert_close(other.class_logits, full.class_logits, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(other.mask_logits, full.mask_logits, rtol=1e-9, atol=1e-10)
    with_grad = model(images)  # another operator computes the deformable convolution here
    torch.testing.assert_close(with_grad.mask_logits, full.mask_logits, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("size", [(2, 5), (3, 3), (7, 4)])
def test_constant_maps_of_folded_keys_are_right_at_borders(size):
    keys = KeyProjection(16).double().eval()
    with torch.no_grad():
        keys.norm.running_mean.normal_()
        keys.norm.weight.uniform_(-1, 1)
        keys.norm.bias.normal_()
    constant = torch.randn(16, dtype=torch.float64)
    x = torch.randn(2, 16, *size, dtype=torch.float64)
    with torch.no_grad():
        position = sine_position(*size, 16, dtype=torch.float64)
        expected = keys(x + constant[:, None, None] + position)
        torch.testing.assert_close(FoldedKeys(keys, constant)(x), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("factor", [2, 4, 8, 3])
def test_the_short_way_to_smaller_maps_is_bilinear(factor):
    x = torch.randn(2, 3, 5 * factor, 7 * factor, dtype=torch.float64)
    expected = nn.functional.interpolate(x, size=(5, 7), mode="bilinear")
    torch.testing.assert_close(resize_to(x, x[..., :5, :7]), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, 1), (5, 9)])
def test_the_gathering_convolution_equals_torchvisions(size, dtype):
    x, weight = torch.randn(2, 12, *size), torch.randn(7, 12, 3, 3)
    offset, mask, bias = 4 * torch.randn(2, 18, *size), torch.rand(2, 9, *size), torch.randn(7)
    offset[:, :2] = -1.0  # exactly one pixel out: nothing is left there
    arguments = [each.to(dtype) for each in (x, offset, mask, weight, bias)]
    tolerance = dict(rtol=1e-10, atol=1e-11) if dtype is torch.float64 else dict(rtol=0.05, atol=0.5)
    torch.testing.assert_close(deform_conv(*arguments), reference(*arguments), **tolerance)


def test_low_precision_runs_and_keeps_the_masks():
    model = tiny_segmenter().eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(images).mask_logits
        with torch.autocast("cpu", torch.bfloat16):
            under_autocast = model(images).mask_logits
            folded = zoo.fold(model)(images).mask_logits
        half = model.bfloat16()(images.bfloat16()).mask_logits
    for masks in (under_autocast, folded, half):
        assert masks.isfinite().all()
        assert torch.corrcoef(torch.stack((masks.float().flatten(), expected.flatten())))[0, 1] > 0.9


def test_maps_that_do_not_halve_are_refused():
    head = PemHead((4, 4, 4, 4), **_TINY_HEAD)
    maps = [torch.randn(1, 4, s, s) for s in (16, 8, 4, 3)]
    with pytest.raises(ValueError, match=r"16x16, 8x8, 4x4, 3x3 do not halve .* pad the image"):
        head(maps)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(name="mask2former"), "no segmenter is called 'mask2former'"),
        (dict(task="depth"), "task is 'depth', expected one of semantic, instance, panoptic"),
        (dict(num_classes=3, thing_classes=[0, 3]), r"do not lie in 0\.\.2"),
        (dict(num_classes=3, class_names=["a"]), "1 class names for 3 classes"),
        (dict(dim=30), "dim=30 is not a multiple"),
        (dict(backbone="no_such_model"), "no model is called"),
    ],
)
def test_wrong_arguments_are_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        zoo.create_segmenter(**({"name": "pem", "backbone": "stdc1", "backbone_args": None} | arguments))


def test_classification_weights_load_into_the_backbone():
    classifier = timm.create_model("stdc1", num_classes=4, **_TINY_BACKBONE)
    model = tiny_segmenter()
    zoo.load_checkpoint(model.backbone.backbone, classifier.state_dict())
    assert torch.equal(model.backbone.backbone.stem[0].conv.weight, classifier.stem[0].conv.weight)


def test_frozen_norms_are_neither_trained_nor_updated():
    model = zoo.create_segmenter("pem", "resnet10t", 3, freeze_norm=True, **_TINY_HEAD).train()
    before = {k: v.clone() for k, v in model.backbone.named_buffers()}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.backbone.modules())
    model(torch.randn(2, 3, 64, 64)).mask_logits.sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.named_buffers())


def test_official_names_of_every_kind_have_their_place():
    model = zoo.create_segmenter("pem", "resnet10t", 3, **_TINY_HEAD)
    own = model.head.state_dict()
    for official, zoos in {
        "pixel_decoder.in_projections.2.bn.weight": "pixel_decoder.projections.2.norm.weight",
        "pixel_decoder.csm.1.mlp.0.mlp.3.weight": "pixel_decoder.gates.1.expand.weight",
        "pixel_decoder.dcn.0.up_sample.weight": "pixel_decoder.levels.0.up.weight",
        "predictor.static_query.weight": "decoder.query_feat",
        "predictor.transformer_cross_attention_layers.3.feature_proj.to_query_3x3.bias": (
            "decoder.layers.3.cross_attn.keys.conv.bias"
        ),
        "predictor.mask_embed.layers.2.weight": "decoder.mask_head.4.weight",
        "predictor.transformer_ffn_layers.1.linear2.bias": "decoder.layers.1.mlp.fc2.bias",
    }.items():
        assert checkpoint.rename_head(official) == zoos
        assert zoos in own
    assert checkpoint.rename_resnet("res3.1.shortcut.norm.bias") == "layer2.1.downsample.1.bias"
    assert checkpoint.rename_resnet("res5.0.conv2.weight") == "layer4.0.conv2.weight"
    assert checkpoint.rename_resnet("stem.conv1.norm.weight") == "bn1.weight"


def test_a_training_file_of_the_official_layout_loads(tmp_path):
    case = next(c for c in golden_cases("pem") if "stdc2" in c.path.stem)
    state = case.weights() | {"criterion.empty_weight": torch.ones(20)}
    torch.save({"model": state, "iteration": 89999}, tmp_path / "model_final.pth")
    model = zoo.create_segmenter("pem", "stdc2", 19)
    report = zoo.load_checkpoint(model, tmp_path / "model_final.pth")
    assert report.complete
    assert report.layout == "PEM"
    old = {k.replace("query_feat", "static_query"): v for k, v in state.items()}
    assert zoo.load_checkpoint(model, old).complete
    with pytest.raises(zoo.CheckpointError, match="of another shape"):
        zoo.load_checkpoint(zoo.create_segmenter("pem", "stdc2", 19, num_queries=7), state)


def test_a_saved_segmenter_is_rebuilt(tmp_path):
    model = tiny_segmenter(task="panoptic", thing_classes=(1, 2)).eval()
    path = save_model(model, tmp_path / "model.safetensors", class_names=list("abcde"))
    other = load_model(path)
    assert (other.task, other.thing_classes, other.class_names) == ("panoptic", (1, 2), list("abcde"))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images).mask_logits, other(images).mask_logits)


def test_one_batch_is_learned():
    torch.manual_seed(0)
    model = tiny_segmenter(num_classes=2).train()
    images = torch.zeros(2, 3, 64, 64)
    masks = torch.zeros(2, 2, 64, 64, dtype=torch.bool)
    masks[0, 0, :, :32] = masks[1, 0, :32] = True
    masks[:, 1] = ~masks[:, 0]
    images[masks[:, :1].expand(-1, 3, -1, -1)] = 1.0
    targets = [Segments(torch.tensor([0, 1]), each) for each in masks]
    criterion = PemCriterion(2, num_points=256)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        loss = sum(criterion(model(images), targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    assert losses[-1] < 0.5 * losses[0]


def test_names_without_weight_decay_exist_and_checkpointing_changes_nothing():
    model = tiny_segmenter()
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()
    images = torch.randn(2, 3, 64, 64)
    model.eval()
    expected = model(images).mask_logits
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(images).mask_logits, expected)


def test_a_backbone_file_loads_into_a_backbone_with_frozen_norms():
    source = timm.create_model("resnet10t", num_classes=0)
    model = zoo.create_segmenter("pem", "resnet10t", 3, freeze_norm=True, **_TINY_HEAD)
    report = zoo.load_checkpoint(model.backbone.backbone, source.state_dict())
    assert report.complete
    assert "these batch norms are frozen" in str(report)
    torch.testing.assert_close(model.backbone.backbone.layer1[0].bn1.weight, source.layer1[0].bn1.weight)
