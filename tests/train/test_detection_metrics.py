import json

import pytest
import torch

from tests.parity.detection_metrics import detections
from zoo.train.data.detection_layouts import open_detection
from zoo.train.detection_metrics import (
    STATS,
    Collected,
    class_table,
    coco_metric,
    evaluate_results,
    score_table,
    to_results,
    write_results,
)

from .test_detection_data import CCBY


@pytest.fixture(scope="module")
def data():
    return open_detection(CCBY, "val", masks=True)


@pytest.fixture(scope="module")
def results(data):
    return detections(data.coco, 0)


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_both_evaluators_give_the_same_numbers(data, results, iou_type):
    pytest.importorskip("faster_coco_eval")
    slow = evaluate_results(data.coco, results, iou_type, evaluator="pycocotools")
    fast = evaluate_results(data.coco, results, iou_type, evaluator="faster-coco-eval")
    assert fast.evaluator == "faster-coco-eval"
    for name in STATS:
        assert fast.stats[name] == pytest.approx(slow.stats[name], abs=1e-14)
    assert [c.ap for c in fast.classes] == pytest.approx([c.ap for c in slow.classes], abs=1e-14)


def test_the_labels_themselves_score_one(data):
    found = []
    for i, image_id in enumerate(data.image_ids):
        objects = data.objects(i)
        own = dict(
            boxes=torch.from_numpy(objects.boxes),
            labels=torch.from_numpy(objects.labels),
            scores=torch.ones(len(objects.labels)),
            masks=torch.from_numpy(objects.masks).bool(),
        )
        found += to_results(own, image_id, data.category_ids)
    json.dumps(found)
    for iou_type in ("bbox", "segm"):
        scores = evaluate_results(data.coco, found, iou_type)
        assert scores.stats["AP"] == pytest.approx(1, abs=1e-6)
        present = [c for c in scores.classes if c.objects]
        assert len(present) == 31
        assert all(c.ap50 == pytest.approx(1, abs=1e-6) for c in present)
        assert all(c.ap == -1 for c in scores.classes if not c.objects)


def test_the_mean_over_classes_is_the_overall_ap(data, results):
    scores = evaluate_results(data.coco, results)
    present = [c.ap for c in scores.classes if c.ap >= 0]
    assert sum(present) / len(present) == pytest.approx(scores.stats["AP"])


def test_finding_nothing_scores_zero_and_foreign_detections_are_refused(data):
    assert evaluate_results(data.coco, []).stats["AP"] == 0
    wrong = dict(image_id=1, category_id=1, bbox=[0, 0, 1, 1], score=1.0)
    with pytest.raises(ValueError, match="a detection of image 1"):
        evaluate_results(data.coco, [wrong])
    mine = dict(image_id=data.image_ids[0], category_id=1, bbox=[0, 0, 1, 1], score=1.0)
    with pytest.raises(ValueError, match="no segmentation"):
        evaluate_results(data.coco, [mine], "segm")


def test_tables_and_result_file(data, results, tmp_path):
    scores = [evaluate_results(data.coco, results, kind) for kind in ("bbox", "segm")]
    table = score_table(scores)
    assert "| boxes | 49.0 | 84.7 |" in table
    assert "| masks | 64.1 |" in table
    classes = class_table(scores)
    assert "| person |" in classes
    assert "No objects of 49 classes" in classes
    path = write_results(tmp_path / "results.json", results)
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = data.coco
    coco.createIndex()
    assert len(coco.loadRes(str(path)).anns) == len(results)


def test_every_image_counts_once_and_a_missing_one_is_an_error(data):
    metric = coco_metric(data.coco, data.category_ids, ["bbox"])

    def sample(index):
        objects = data.objects(index)
        boxes, labels = torch.from_numpy(objects.boxes), torch.from_numpy(objects.labels)
        return dict(index=torch.tensor(index), boxes=boxes, labels=labels, scores=torch.ones(len(labels)))

    for index in range(len(data)):
        metric.process({}, [sample(index)])
    metric.process({}, [sample(0)])  # a sampler that fills up the last batch
    scores = metric.compute_metrics(metric.results)
    assert scores["AP"] == pytest.approx(100, abs=1e-4)
    with pytest.raises(ValueError, match="21 of 22 images"):
        metric.compute_metrics([r for r in metric.results if r[0] != 3])


def test_results_come_in_one_order_whoever_found_them():
    a, b = Collected(), Collected()
    for collected, order in ((a, (2, 0, 1)), (b, (0, 1, 2))):
        for image in order:
            collected.add(image, [dict(image_id=image)])
    assert a.results == b.results
