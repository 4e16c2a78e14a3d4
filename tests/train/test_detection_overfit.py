"""A handful of images learned by heart: data, heads, losses and evaluation fit together."""

from __future__ import annotations

import pytest
import torch

from zoo.heads.detection import create_detector
from zoo.train.data.detection import DetectionData, DetectionSamples, EvaluationImages, collate_detection
from zoo.train.data.detection_layouts import open_detection
from zoo.train.data.detection_transforms import DetectionAugmentation
from zoo.train.detection import DetectorObjective
from zoo.train.detection_metrics import coco_metric

from .test_detection_data import CCBY

SIZE = 96
FPN = dict(min_size=SIZE, max_size=2 * SIZE, out_channels=64)
STRIDES = (8, 16, 32, 64, 128)
HEADS = dict(
    retinanet=(dict(**FPN, anchor_sizes=[[2 * s * 2 ** (i / 3) for i in range(3)] for s in STRIDES]), 2e-3),
    mask_rcnn=(
        dict(
            **FPN,
            anchor_sizes=[[2 * s] for s in STRIDES],
            rpn_pre_nms_top_n_train=200,
            rpn_post_nms_top_n_train=100,
            rpn_post_nms_top_n_test=100,
            box_batch_size_per_image=16,
        ),
        2e-3,
    ),
    rt_detr=(
        dict(
            size=SIZE,
            hidden_dim=64,
            ffn_dim=128,
            num_heads=4,
            num_queries=20,
            num_decoder_layers=2,
            expansion=0.5,
            depth=1,
            num_denoising=20,
        ),
        1e-3,
    ),
)


def few_images(masks: bool) -> DetectionData:
    """Three images with few and large objects, and the six categories that they have."""
    data = open_detection(CCBY, masks=masks)

    def is_easy(index: int) -> bool:
        boxes = data.objects(index, masks=False).boxes
        sides = boxes[:, 2:] - boxes[:, :2]
        return 1 <= len(boxes) <= 4 and sides.min() > 0.12 * max(data.image(index).shape)

    data = data.subset([i for i in range(len(data)) if is_easy(i)][:3])
    used = sorted({a["category_id"] for a in data.coco["annotations"]})
    coco = {**data.coco, "categories": [c for c in data.coco["categories"] if c["id"] in used]}
    names = [data.classes[data.label_of[category]] for category in used]
    return DetectionData(coco, data.files, names, used, data.source, "COCO", masks)


def learn_by_heart(head: str, backbone: str, steps: int = 160) -> dict[str, float]:
    """AP50 in percent of a detector that sees the same batch again and again."""
    torch.manual_seed(0)
    arguments, rate = HEADS[head]
    data = few_images(masks=head == "mask_rcnn")
    square = dict(size=SIZE) if head == "rt_detr" else dict(short_sides=(SIZE,), max_long=2 * SIZE)
    samples = DetectionSamples(data, DetectionAugmentation(**square, hflip=0))
    batch = collate_detection([(*samples[i], i) for i in range(len(data))])
    images = EvaluationImages(data)
    whole = collate_detection([images[i] for i in range(len(data))])
    model = create_detector(head, backbone, len(data.classes), resize_in_training=False, **arguments)
    objective = DetectorObjective(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step in range(1, steps + 1):
        objective.train()
        loss, _ = objective.parse_losses(objective(**objective.data_preprocessor(batch, True), mode="loss"))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5)
        optimizer.step()
        schedule.step()
        if step >= 60 and step % 20 == 0:
            objective.eval()
            metric = coco_metric(data.coco, data.category_ids, ["bbox", "segm"] if model.has_masks else ["bbox"])
            with torch.no_grad():
                metric.process(whole, objective(**objective.data_preprocessor(whole), mode="predict"))
            scores = metric.compute_metrics(metric.results)
            if min(scores["AP50"], scores.get("mask_AP50", 100)) > 90:
                break
    return scores


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_a_handful_of_images_is_learned_by_heart(head):
    scores = learn_by_heart(head, "stdc1")
    assert scores["AP50"] > 90
    assert scores.get("mask_AP50", 100) > 90
