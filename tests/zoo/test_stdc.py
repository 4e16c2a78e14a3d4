"""STDC beyond the common suite: official files, odd sizes, folding."""

import pytest
import timm
import torch

import zoo
from zoo.stdc import official_to_zoo

_SMALL = dict(embed_dims=(8, 16, 32, 48), depths=(2, 1, 2))


def _official(model):
    """The state dict under the authors' names: numbered blocks, everything a second time, their own classifier."""
    depths = [len(stage.blocks) for stage in model.stages]
    state = {}
    for name, value in model.state_dict().items():
        for index in range(2 + sum(depths)):
            prefix = official_to_zoo(f"features.{index}.x", depths)[:-1]
            if name.startswith(prefix):
                rest = name[len(prefix) :].replace("down.conv.", "avd_layer.0.").replace("down.bn.", "avd_layer.1.")
                for i in range(4):
                    rest = rest.replace(f"conv{i + 1}.", f"conv_list.{i}.")
                state[f"features.{index}.{rest}"] = value
                state[f"x{2 ** min(5, index + 1)}.0.{index}.{rest}"] = value
    return state | {"conv_last.conv.weight": torch.zeros(8, 48, 1, 1), "linear.weight": torch.zeros(5, 8)}


def test_an_official_file_loads_without_its_classifier():
    model = timm.create_model("stdc1", num_classes=0, **_SMALL)
    other = timm.create_model("stdc1", num_classes=0, **_SMALL)
    report = zoo.load_checkpoint(other, {"state_dict": _official(model)})
    assert report.layout == "STDC"
    assert "classifier was left out (2 entries)" in report.notes[0]
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


def test_stages_follow_the_depths_of_the_variant():
    assert official_to_zoo("features.6.conv_list.3.bn.bias", (4, 5, 3)) == "stages.1.blocks.0.conv4.bn.bias"
    assert official_to_zoo("features.13.avd_layer.1.weight", (4, 5, 3)) == "stages.2.blocks.2.down.bn.weight"


@pytest.mark.parametrize("size", [(33, 65), (1, 1), (64, 96)])
def test_the_folded_model_equals_the_trained_one_at_any_size(size):
    model = timm.create_model("stdc2", num_classes=4, **_SMALL).double()
    model.train()(torch.randn(4, 3, 64, 64, dtype=torch.float64))  # statistics that are not 0 and 1
    model.eval()
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = model.forward_features(image)
    torch.testing.assert_close(zoo.fold(model).forward_features(image), expected, rtol=1e-11, atol=1e-13)
    assert expected.shape[-2:] == (-(-size[0] // 32), -(-size[1] // 32))


def test_the_stem_needs_a_width_of_its_own():
    with pytest.raises(ValueError, match="embed_dims has 3 entries for 3 stages"):
        timm.create_model("stdc1", embed_dims=(8, 16, 32))
