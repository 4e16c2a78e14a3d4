"""The measures are their formulas, see through folds, and leave the model as it was."""

import pytest
import timm
import torch

import zoo
from tests.zoo.test_crate import KINDS, tiny
from zoo.whitebox import (
    attention_maps,
    cls_attention,
    coding_rate,
    expansion_rate,
    layer_statistics,
    mass_mask,
    pca,
    pca_colors,
    shared_projection,
)

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("n", "d"), [(30, 8), (5, 16)])
def test_coding_rate_is_the_log_determinant_of_the_token_gram(n, d):
    x = torch.randn(2, 3, n, d, dtype=torch.float64)
    unit = x / x.norm(dim=-1, keepdim=True)
    gram = torch.eye(n, dtype=torch.float64) + d / (n * 0.01) * unit @ unit.mT
    torch.testing.assert_close(coding_rate(x), torch.logdet(gram).sum(1) / 2, rtol=1e-12, atol=0)


def test_coding_rate_is_smaller_for_tokens_in_a_subspace_and_nan_for_zero_tokens():
    x = torch.randn(1, 1, 40, 16)
    flat = x.clone()
    flat[..., 4:] = 0
    assert coding_rate(flat) < coding_rate(x)
    x[0, 0, 3] = 0
    assert coding_rate(x).isnan().all()


def test_expansion_rate_of_both_grams_agree():
    z = torch.randn(2, 6, 9, dtype=torch.float64)
    direct = torch.logdet(torch.eye(9, dtype=torch.float64) + 9 / (6 * 0.01) * z.mT @ z) / 2
    torch.testing.assert_close(expansion_rate(z), direct)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_have_a_value_for_each_layer_and_image(kind):
    model = tiny(kind).train()
    rate, zeros = layer_statistics(model, IMAGES)
    assert rate.shape == zeros.shape == (3, 2)
    assert torch.isfinite(rate).all()
    assert ((zeros > 0) & (zeros < 1)).all()
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_folded_model_has_the_same_measures(kind):
    model = tiny(kind).double()
    images = IMAGES.double()
    folded = zoo.fold(model)
    for ours, expected in zip(layer_statistics(folded, images), layer_statistics(model, images)):
        torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(attention_maps(folded, images, 1), attention_maps(model, images, 1))


def test_sparsity_counts_exact_zeros_of_the_tokens_behind_a_layer():
    model = tiny().eval()
    _, zeros = layer_statistics(model, IMAGES)
    tokens = model.forward_features(IMAGES)
    torch.testing.assert_close(zeros[-1], (tokens == 0).double().mean(dim=(1, 2)))


def test_attention_of_the_class_token_is_its_row_without_itself():
    model = tiny().eval()
    attention = attention_maps(model, IMAGES, 2)
    assert attention.shape == (2, 3, 17, 17)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 3, 17))
    maps = cls_attention(model, IMAGES, 2)
    torch.testing.assert_close(maps.flatten(2), attention[:, :, 0, 1:])
    projected = shared_projection(model, IMAGES, 2).unflatten(-1, (3, 8)).transpose(1, 2)
    torch.testing.assert_close(attention @ projected, zoo.kernels.tied_attention.tied_attention(projected))


def test_measures_work_at_other_sizes_of_a_dynamic_model():
    model = tiny(dynamic_img_size=True)
    images = torch.randn(1, 3, 48, 16)
    assert cls_attention(model, images).shape == (1, 3, 6, 2)
    assert pca_colors(model, images).foreground.shape == (1, 6, 2)


def test_mass_mask_holds_the_mass_with_the_fewest_patches():
    attention = torch.tensor([[[0.5, 0.1], [0.3, 0.1]]])
    assert mass_mask(attention, 0.6).tolist() == [[[True, False], [True, False]]]
    assert mass_mask(attention, 0.5).sum() == 1
    assert mass_mask(attention, 1.0).all()


def test_pca_reconstructs_and_orders_by_variance():
    x = torch.randn(20, 6, dtype=torch.float64) * torch.tensor([5, 4, 3, 2, 1, 0.5], dtype=torch.float64)
    found = pca(x, 6)
    torch.testing.assert_close(found.projection @ found.components + found.mean, x)
    torch.testing.assert_close(found.projection.var(dim=0), found.variance)
    assert (found.variance.diff() < 0).all()
    with pytest.raises(ValueError, match="7 components"):
        pca(x, 7)


def test_foreground_is_the_inner_object_with_its_holes_filled():
    """A model whose projection of a patch is its mean colour finds a ring in the middle and fills it."""
    model = tiny(img_size=56, dynamic_img_size=True).eval()
    image = torch.zeros(1, 3, 56, 56)
    image[..., 8:48, 8:48] = 1.0
    image[..., 24:32, 24:32] = 0.0
    pattern = image[:, 0, ::8, ::8].flatten(1).unsqueeze(-1)
    keys = torch.cat([torch.zeros(1, 1, 1), pattern + 0.01 * torch.randn(1, 49, 1)], dim=1) * torch.randn(24)
    keys[:, 1:] += 1e-3 * torch.randn(1, 49, 24)
    model.blocks[-1].attn.qkv.register_forward_hook(lambda module, inputs, output: keys)
    colors, foreground = pca_colors(model, image)
    assert torch.equal(foreground[0, 1:6, 1:6], torch.ones(5, 5, dtype=torch.bool))
    assert foreground.sum() == 25
    assert colors.min() >= 0
    assert colors.max() <= 1
    assert (colors[~foreground] == 0).all()


def test_other_models_and_layers_are_refused_with_a_sentence():
    with pytest.raises(TypeError, match="measures are of CRATE models, got VisionTransformer"):
        layer_statistics(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1), IMAGES)
    with pytest.raises(ValueError, match="layer=3 does not exist: the model has 3"):
        cls_attention(tiny(), IMAGES, 3)
