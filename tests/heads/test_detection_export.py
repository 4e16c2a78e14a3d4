import numpy as np
import pytest
import torch

from zoo.heads.detection import create_detector
from zoo.heads.detection_export import ExportedDetector, export_onnx

ARGUMENTS = dict(
    retinanet=dict(min_size=160, max_size=224, out_channels=64, topk_candidates=100),
    fcos=dict(min_size=160, max_size=224, out_channels=64, topk_candidates=100),
    rt_detr=dict(
        size=(160, 224),
        hidden_dim=32,
        ffn_dim=64,
        num_heads=4,
        num_queries=40,
        num_decoder_layers=1,
        expansion=0.5,
        depth=1,
        detections_per_img=20,
    ),
)


def _detector(head):
    """Random weights, large enough that detections differ."""
    torch.manual_seed(0)
    model = create_detector(head, "stdc1", 4, **ARGUMENTS[head]).eval()
    for name, p in model.named_parameters():
        if p.ndim > 1 and not name.startswith("backbone.body") and "fpn" not in name:
            torch.nn.init.normal_(p, std=(2 / p[0].numel()) ** 0.5)
        elif p.ndim == 1 and ("cls_logits" in name or "score_head" in name):
            torch.nn.init.zeros_(p)
    return model


@pytest.mark.parametrize("head", ARGUMENTS)
def test_the_graph_finds_what_the_detector_finds(head):
    model = _detector(head)
    image = torch.rand(3, 160, 224)
    with torch.no_grad():
        expected = model([image])[0]
        boxes, labels, scores = (out[0] for out in ExportedDetector(model)(image[None]))
    count = len(expected["scores"])
    assert count > 10
    torch.testing.assert_close(scores[:count], expected["scores"])
    assert (scores[count:] == 0).all()
    # equal scores may stand in another order
    clear = expected["scores"].diff().abs().gt(1e-5)
    clear = torch.cat([clear, torch.tensor([False])]) & torch.cat([torch.tensor([True]), clear])
    assert clear.sum() > 5
    torch.testing.assert_close(boxes[:count][clear], expected["boxes"][clear], rtol=1e-4, atol=1e-2)
    assert torch.equal(labels[:count][clear], expected["labels"][clear])


@pytest.mark.slow
@pytest.mark.parametrize("head", ARGUMENTS)
def test_onnx_runtime_finds_the_same_at_other_sizes(head, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = _detector(head)
    path = export_onnx(model, tmp_path / "detector.onnx", size=(160, 224))
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    sizes = ((1, 160, 224), (2, 256, 192)) if head == "rt_detr" else ((1, 160, 224), (1, 171, 301))
    for batch, height, width in sizes:
        images = torch.rand(batch, 3, height, width)
        with torch.no_grad():
            expected = [out.numpy() for out in ExportedDetector(model)(images)]
        boxes, labels, scores = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(scores, expected[2], atol=1e-4)
        for i in range(batch):
            gaps = np.abs(np.diff(expected[2][i]))
            clear = np.concatenate([gaps > 1e-3, [False]]) & np.concatenate([[True], gaps > 1e-3])
            assert clear.sum() >= 3
            np.testing.assert_allclose(boxes[i][clear], expected[0][i][clear], atol=0.05)
            assert np.array_equal(labels[i][clear], expected[1][i][clear])


def test_what_cannot_be_exported_says_so(tmp_path):
    model = create_detector("faster_rcnn", "stdc1", 3, min_size=64, max_size=64, out_channels=32)
    with pytest.raises(TypeError, match="retinanet, fcos and rt_detr can"):
        export_onnx(model, tmp_path / "x.onnx")
    with pytest.raises(ValueError, match="multiples of 32"):
        export_onnx(_detector("rt_detr"), tmp_path / "x.onnx", size=(161, 224))
