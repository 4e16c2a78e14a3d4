import pytest
import timm
import torch
from torch import nn

import zoo
from zoo.heads.pyramid import Pyramid, create_backbone

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
TIMM = ("resnet18", "convnext_atto", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "vit_small_patch14_dinov2")


def _ceil_sizes(h, w, strides):
    return [(-(-h // s), -(-w // s)) for s in strides]


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY + TIMM)
def test_every_backbone_gives_maps_at_exact_strides_and_all_of_it_learns(name):
    pyramid = Pyramid(name)
    maps = pyramid(torch.randn(1, 3, 75, 101))
    assert [m.shape[1] for m in maps] == pyramid.channels
    assert [tuple(m.shape[2:]) for m in maps] == _ceil_sizes(75, 101, (4, 8, 16, 32))
    sum((m * torch.randn_like(m)).sum() for m in maps).backward()
    assert not [k for k, p in pyramid.named_parameters() if p.grad is None]


def test_cells_stand_for_the_pixels_that_the_stride_says():
    # a model that averages patches shows the geometry: the map of a ramp is the ramp of the cells' centres
    class Averages(nn.Module):
        feature_info = [dict(num_chs=1, reduction=s) for s in (4, 8)]

        def prune_intermediate_layers(self, *args, **kwargs):
            pass

        def forward_intermediates(self, x, **kwargs):
            return [nn.functional.avg_pool2d(x, s) for s in (4, 8)]

    ramp = torch.arange(50.0).expand(1, 1, 30, 50)
    fine, coarse = Pyramid(Averages(), strides=(4, 8))(ramp)
    assert fine.shape[-2:] == (8, 13)
    assert coarse.shape[-2:] == (4, 7)
    torch.testing.assert_close(fine[0, 0, 0, :12], torch.arange(12.0) * 4 + 1.5)
    torch.testing.assert_close(coarse[0, 0, 0, :6], torch.arange(6.0) * 8 + 3.5)


def test_an_image_of_a_whole_number_of_strides_is_not_changed():
    torch.manual_seed(0)
    model = timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    pyramid = Pyramid("resnet18").eval()
    pyramid.backbone.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(1, 3, 64, 96)
    for ours, theirs in zip(pyramid(x), model(x)):
        assert torch.equal(ours, theirs)


def test_classification_weights_load_into_the_backbone(tmp_path):
    classifier = timm.create_model("spartan_xtiny", num_classes=7)
    torch.save(classifier.state_dict(), tmp_path / "trained.pth")
    pyramid = Pyramid("spartan_xtiny", strides=(8, 16, 32))
    report = zoo.load_checkpoint(pyramid.backbone, tmp_path / "trained.pth")
    assert "2 entries of the file were left out" in str(report)
    own = pyramid.backbone.state_dict()
    assert all(torch.equal(v, classifier.state_dict()[k]) for k, v in own.items())
    assert pyramid.channels == [64, 96, 192]


def test_dynamic_sizes_survive_export():
    pyramid = Pyramid("spartan_xtiny").eval()
    h, w = torch.export.Dim("h", min=65, max=2048), torch.export.Dim("w", min=65, max=2048)
    program = torch.export.export(pyramid, (torch.randn(1, 3, 70, 90),), dynamic_shapes=({2: h, 3: w},))
    x = torch.randn(1, 3, 101, 66)
    for ours, theirs in zip(program.module()(x), pyramid(x)):
        torch.testing.assert_close(ours, theirs)


def test_norms_belong_to_the_maps():
    pyramid = Pyramid("spartan_xtiny", norm="layer")
    for m in pyramid(torch.randn(1, 3, 64, 64)):
        torch.testing.assert_close(m.mean(dim=1), torch.zeros_like(m[:, 0]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(backbone="no_such_model"), "no model is called 'no_such_model'"),
        (dict(backbone="spartan_xtiny", strides=(4, 12)), "ascending powers of two"),
        (dict(backbone="spartan_xtiny", strides=(2, 4)), "no stage of stride 2: it has 4, 8, 16, 32"),
        (dict(backbone="spartan_xtiny", no_such_argument=1), "does not take these arguments"),
        (dict(backbone="spartan_xtiny", norm="batch"), "norm='batch'"),
    ],
)
def test_wrong_arguments_are_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        Pyramid(**arguments)


def test_a_module_without_maps_is_refused():
    with pytest.raises(TypeError, match="no forward_intermediates"):
        Pyramid(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="img_size given for a backbone that is built already"):
        Pyramid(create_backbone("spartan_xtiny"), img_size=64)
