"""`model.predict` of segmenters, and their deployment forms."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.heads.test_pem import tiny_segmenter
from zoo.heads.masks import decode_rle
from zoo.heads.pem.export import PanopticNetwork, SemanticNetwork
from zoo.heads.pem.postprocess import Geometry, paint_segments, panoptic_map, semantic_map


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = tiny_segmenter(task="panoptic", thing_classes=(0, 1)).eval()
    with torch.no_grad():
        model.head.decoder.class_head.weight.mul_(8)
    return model


_OPTIONS = dict(size=48, object_threshold=0.3, overlap_threshold=0.1, score_threshold=0.05)


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
@pytest.mark.parametrize("shape", [(40, 57, 3), (1, 1, 3), (5, 90)])
def test_pictures_of_any_shape_give_maps_of_their_size(model, task, shape):
    picture = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    found = model.predict(picture, task=task, **_OPTIONS)
    assert found.map.shape == shape[:2]
    assert len(found.labels) == len(found.names) == len(found.scores) == len(found.ids) == len(found.areas)
    described = json.loads(json.dumps(found.to_dict()))
    for i, region in enumerate(described["predictions"]):
        mask = decode_rle(region["segmentation"])
        assert np.array_equal(mask, found.mask(i))
        assert mask.sum() == region["area"] == found.areas[i]
    drawn = found.draw(picture)
    assert drawn.width >= 1
    assert drawn.mode == "RGB"


def test_several_pictures_and_files_keep_their_names(model, tmp_path):
    path = tmp_path / "grey.png"
    Image.new("L", (30, 20), 90).save(path)
    found = model.predict([path, np.zeros((8, 9, 3), np.uint8)], task="semantic", size=32, class_names=list("abcde"))
    assert [f.source for f in found] == [str(path), None]
    assert set(found[0].names) <= set("abcde")
    assert model.class_names is None


def test_one_window_over_the_whole_is_the_whole(model):
    picture = np.random.default_rng(1).integers(0, 255, (64, 96, 3), np.uint8)
    whole = model.predict(picture, task="semantic", size=None)
    assert np.array_equal(model.predict(picture, task="semantic", size=None, window=(64, 96)).map, whole.map)
    sliding = model.predict(picture, task="semantic", size=None, window=48, overlap=0.5)
    assert sliding.map.shape == whole.map.shape


def test_the_model_keeps_its_modes(model):
    model.train()
    model.predict(np.zeros((8, 8, 3), np.uint8), size=32)
    assert all(module.training for module in model.modules())
    model.eval()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(task="depth"), "task is 'depth'"),
        (dict(window=8), "a sliding window joins class scores"),
        (dict(size=4096), "expected 0 < size <= max_size"),
        (dict(object_threshold=2), "object_threshold is 2"),
        (dict(task="semantic", overlap=1), "overlap is 1"),
        (dict(class_names=["a"]), "1 class names for 5 classes"),
    ],
)
def test_wrong_options_are_named(model, options, said):
    with pytest.raises(ValueError, match=said):
        model.predict(np.zeros((8, 8, 3), np.uint8), **options)


def test_damaged_weights_are_named(model):
    broken = tiny_segmenter().eval()
    with torch.no_grad():
        broken.head.decoder.class_head.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="non-finite numbers for array of shape"):
        broken.predict(np.zeros((8, 8, 3), np.uint8), size=32)


def test_a_picture_of_another_size_cannot_be_drawn_on(model):
    found = model.predict(np.zeros((8, 8, 3), np.uint8), size=32)
    with pytest.raises(ValueError, match="pass the picture that was segmented"):
        found.draw(np.zeros((8, 9, 3), np.uint8))


def _same_as_postprocessing(model, network_outputs, images):
    H, W = images.shape[-2:]
    with torch.no_grad():
        output = model(images)
    padded = tuple(4 * side for side in output.mask_logits.shape[-2:])
    geometry = Geometry(padded, (H, W), (H, W))
    logits, masks = output.class_logits[0], output.mask_logits[0]
    if len(network_outputs) == 1:
        labels = network_outputs[0][0].argmax(0)
        assert (labels != semantic_map(logits, masks, geometry)).float().mean() < 1e-3
    else:
        painted = paint_segments(*(each[0] for each in network_outputs), model.thing_classes, 0.1)
        expected = panoptic_map(logits, masks, geometry, model.thing_classes, 0.3, 0.1)
        assert (painted.ids != expected.ids).float().mean() < 1e-3
        assert [s[1:3] for s in painted.segments] == [s[1:3] for s in expected.segments]


def test_deployed_networks_agree_with_post_processing(model):
    images = torch.randn(1, 3, 50, 77)
    with torch.no_grad():
        _same_as_postprocessing(model, (SemanticNetwork(model)(images),), images)
        _same_as_postprocessing(model, PanopticNetwork(model, 0.3)(images), images)


def test_torch_compile_sees_one_graph(model):
    images = torch.randn(1, 3, 50, 77)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images).mask_logits, model(images).mask_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["semantic", "panoptic"])
def test_onnx_runtime_agrees_at_another_size(model, kind, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network = SemanticNetwork(model) if kind == "semantic" else PanopticNetwork(model, 0.3)
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.onnx.export(
        network.eval(),
        (torch.randn(2, 3, 64, 96),),
        dynamo=True,
        dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},),
        opset_version=20,
        verbose=False,
    )
    program.save(tmp_path / "network.onnx")
    session = runtime.InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
    images = torch.randn(1, 3, 70, 41)
    outputs = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    _same_as_postprocessing(model, tuple(torch.from_numpy(each) for each in outputs), images)
