import json

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.box_pictures import Mark, draw_marks
from zoo.heads.detection import create_detector
from zoo.heads.detection_prediction import DetectionPrediction
from zoo.heads.masks import decode_rle


def _detector(head="retinanet", **kwargs):
    """A detector that finds the same three objects in every picture, and the shapes that it was shown."""
    model = create_detector(head, "stdc1", 3, min_size=64, max_size=96, out_channels=32, **kwargs)
    found = dict(
        boxes=torch.tensor([[2.0, 3, 20, 30], [5, 5, 9, 9], [0, 0, 1, 1]]),
        labels=torch.tensor([2, 0, 1]),
        scores=torch.tensor([0.9, 0.6, 0.2]),
    )
    seen = []

    def run(images, targets):
        seen.append([tuple(image.shape) for image in images])
        out = []
        for image in images:
            one = {k: v.clone() for k, v in found.items()}
            one["labels"] += model._first_label
            if model.has_masks:
                one["masks"] = torch.zeros(3, *image.shape[1:], dtype=torch.bool)
                one["masks"][0, 3:30, 2:20] = True
            out.append(one)
        return out

    model._run = run
    return model, seen


def test_predictions_have_names_scores_and_boxes_of_the_picture():
    model, seen = _detector(class_names=["cat", "dog", "owl"])
    model.category_ids = [3, 7, 9]
    model.train()
    found = model.predict(np.zeros((50, 40, 3), np.uint8))
    assert isinstance(found, DetectionPrediction)
    assert seen == [[(3, 50, 40)]]
    assert found.names == ("owl", "cat")
    assert found.scores == pytest.approx((0.9, 0.6))
    assert found.boxes[0] == (2, 3, 20, 30)
    assert found.size == (50, 40)
    assert model.training  # as it was
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["predictions"][0]["bbox"] == [2, 3, 18, 27]
    assert plain["predictions"][0]["category_id"] == 9
    with pytest.raises(ValueError, match="boxes only"):
        found.mask(0)


def test_several_pictures_of_any_kind_give_a_list(tmp_path):
    Image.new("L", (33, 44)).save(tmp_path / "grey.png")
    model, seen = _detector()
    pictures = [tmp_path / "grey.png", np.zeros((60, 40, 3), np.uint8), torch.rand(3, 41, 70)]
    found = model.predict(pictures, threshold=0.1, topk=2, batch_size=2)
    assert [f.size for f in found] == [(44, 33), (60, 40), (41, 70)]
    assert [len(s) for s in seen] == [2, 1]
    assert found[0].source == str(tmp_path / "grey.png")
    assert all(len(f.scores) == 2 for f in found)
    assert found[0].names == ("class 2", "class 0")


def test_masks_travel_packed_and_come_back_whole():
    model, _ = _detector("mask_rcnn")
    found = model.predict(np.zeros((50, 43, 3), np.uint8))
    mask = found.mask(0)
    assert mask.shape == (50, 43)
    assert mask.sum() == 27 * 18
    entry = found.to_dict()["predictions"][0]
    assert entry["area"] == mask.sum()
    assert np.array_equal(decode_rle(entry["segmentation"]), mask)


@pytest.mark.parametrize("size", [(50, 40), (300, 900), (2000, 1000)])
def test_drawn_boxes_are_where_they_belong(size):
    model, _ = _detector("mask_rcnn")
    picture = np.full((*size, 3), 255, np.uint8)
    drawn = np.asarray(model.predict(picture).draw(picture)).astype(int)
    scale = drawn.shape[1] / size[1]
    inside = drawn[round(16 * scale), round(14 * scale)]
    assert (inside != 255).any()  # the mask's colour
    assert (drawn[round(0.8 * len(drawn)) :, round(0.8 * drawn.shape[1]) :] == 255).all()
    left = drawn[round(25 * scale), max(0, round(2 * scale)) : round(2 * scale) + 2]
    assert (left != 255).any()


def test_a_mask_of_another_picture_is_refused():
    mark = Mark((0, 0, 5, 5), "x", (1, 2, 3), np.zeros((4, 4), bool))
    with pytest.raises(ValueError, match="a mask is 4 x 4 pixels and the picture 10 x 8"):
        draw_marks(Image.new("RGB", (10, 8)), [mark])
    drawn = draw_marks(
        Image.new("RGB", (400, 300)), [Mark((-5, -5, 900, 20), "name " * 30, (250, 250, 0), dashed=True)]
    )
    assert drawn.size == (400, 300)


def test_wrong_options_and_broken_weights_are_named():
    model, _ = _detector()
    with pytest.raises(ValueError, match="threshold is 2"):
        model.predict(np.zeros((9, 9, 3), np.uint8), threshold=2)
    with pytest.raises(ValueError, match="topk is 0"):
        model.predict(np.zeros((9, 9, 3), np.uint8), topk=0)
    model._run = lambda images, targets: [
        dict(boxes=torch.full((1, 4), float("nan")), labels=torch.zeros(1, dtype=torch.int64), scores=torch.ones(1))
    ]
    with pytest.raises(ValueError, match="non-finite numbers"):
        model.predict(np.zeros((9, 9, 3), np.uint8))
