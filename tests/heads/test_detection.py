import copy

import pytest
import timm
import torch
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.roi_heads import paste_masks_in_image

import zoo
from zoo.heads import list_heads
from zoo.heads.detection import create_detector, detector_classes
from zoo.heads.fpn import Anchors, RoiAlign, paste_masks
from zoo.heads.pyramid import create_backbone

FAMILIES = (
    "poolformerv1_s12",
    "ascan_tiny",
    "fcaformer_l1",
    "ninformer_tiny_patch16_224",
    "activator_tiny_patch16_224",
    "slab_swin_t",
    "spartan_xtiny",
    "crate_tiny",
    "vim2_tiny",
)
TIMM = ("resnet18", "vit_tiny_patch16_224", "convnext_atto")
ANCHORED = ("retinanet", "fcos", "faster_rcnn", "mask_rcnn")
SMALL = dict(min_size=64, max_size=96, out_channels=64)


def _target(h, w, n, classes=3):
    xy = torch.rand(n, 2) * torch.tensor([w, h]) * 0.5
    wh = torch.rand(n, 2) * torch.tensor([w, h]) * 0.4 + 4
    boxes = torch.cat([xy, xy + wh], 1)
    masks = torch.zeros(n, h, w, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.long().tolist()):
        mask[y0:y1, x0:x1] = 1
    return dict(boxes=boxes, labels=torch.randint(0, classes, (n,)), masks=masks)


def _batch():
    """Two images of odd sizes, one of them empty and in bytes."""
    images = [torch.rand(3, 53, 81), (torch.rand(3, 97, 60) * 255).byte()]
    return images, [_target(53, 81, 3), _target(97, 60, 0)]


def test_the_door_knows_every_head_of_the_list():
    assert sorted(detector_classes()) == list_heads("detection")
    assert zoo.create_detector is create_detector


@pytest.mark.slow
@pytest.mark.parametrize("backbone", FAMILIES + TIMM)
def test_every_backbone_trains_and_detects_under_every_head(backbone):
    built = create_backbone(backbone)
    images, targets = _batch()
    for head in detector_classes():
        torch.manual_seed(0)
        arguments = SMALL if head in ANCHORED else dict(size=64, hidden_dim=16, num_queries=20, num_decoder_layers=1)
        model = create_detector(head, copy.deepcopy(built), 3, **arguments).train()
        if head not in ("fcos", "faster_rcnn"):  # which train on the same maps as their neighbours
            losses = model(images, targets)
            assert all(v.ndim == 0 and v.isfinite() for v in losses.values())
            sum(losses.values()).backward()
            assert not [k for k, p in model.pyramid.named_parameters() if p.grad is None]
        with torch.no_grad():
            found = model.eval()(images)
        for image, one in zip(images, found):
            h, w = image.shape[-2:]
            assert set(one) == {"boxes", "labels", "scores"} | ({"masks"} if head == "mask_rcnn" else set())
            assert one["boxes"].shape == (len(one["scores"]), 4)
            assert ((one["labels"] >= 0) & (one["labels"] < 3)).all()
            assert (one["boxes"] >= 0).all()
            assert (one["boxes"] <= torch.tensor([w, h, w, h]) + 1e-3).all()
            if "masks" in one:
                assert one["masks"].dtype == torch.bool
                assert one["masks"].shape == (len(one["scores"]), h, w)


def _theirs(head, ours, num_classes):
    """torchvision's own detector around the same parts."""
    common = dict(min_size=64, max_size=96, image_mean=ours.pyramid.mean, image_std=ours.pyramid.std)
    if head == "retinanet":
        model = RetinaNet(ours.backbone, num_classes, **common, detections_per_img=100)
        ours.anchor_generator = model.anchor_generator  # without torchvision's rounding they are a pixel apart
    elif head == "fcos":
        model = FCOS(ours.backbone, num_classes, **common, score_thresh=0.05)
    else:
        cls = FasterRCNN if head == "faster_rcnn" else MaskRCNN
        model = cls(ours.backbone, num_classes + 1, **common, rpn_post_nms_top_n_train=1000)
        ours.rpn.anchor_generator = model.rpn.anchor_generator
        for name in ("box_roi_pool", "mask_roi_pool"):
            if hasattr(ours.roi_heads, name) and getattr(ours.roi_heads, name) is not None:
                theirs = getattr(model.roi_heads, name)
                setattr(
                    ours.roi_heads,
                    name,
                    RoiAlign(theirs.output_size[0], (4, 8, 16, 32), sampling_ratio=2, aligned=False),
                )
    model.load_state_dict(ours.state_dict())
    return model


@pytest.mark.parametrize("head", ANCHORED)
def test_numbers_are_torchvisions_where_the_conventions_agree(head):
    torch.manual_seed(0)
    extra = dict(box_loss="smooth_l1") if "rcnn" in head else dict(relu_before_p7=True) if head == "retinanet" else {}
    ours = create_detector(head, "resnet18", 3, freeze_norm=True, **SMALL, **extra)
    theirs = _theirs(head, ours, 3)
    first = 1 if "rcnn" in head else 0
    image, target = torch.rand(3, 64, 96), _target(64, 96, 4)
    ours.train()
    theirs.train()
    ours.pyramid.eval()
    torch.manual_seed(1)
    a = ours([image], [target])
    torch.manual_seed(1)
    b = theirs([image], [{**target, "labels": target["labels"] + first}])
    assert set(a) == set(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        a, b = ours.eval()([image])[0], theirs.eval()([image])[0]
    assert len(a["scores"]) == len(b["scores"])
    torch.testing.assert_close(a["scores"], b["scores"])
    torch.testing.assert_close(a["boxes"], b["boxes"])
    assert torch.equal(a["labels"] + first, b["labels"])


def test_p7_is_anchored_at_its_stride_where_the_image_is_no_multiple_of_it():
    anchors = Anchors([[32.0], [64.0]], (1.0,), (64, 128))
    maps = [torch.zeros(1, 1, 13, 17), torch.zeros(1, 1, 7, 9)]
    centres = [(b[:, :2] + b[:, 2:]) / 2 for b in anchors.per_level(maps)]
    assert centres[1].max(0).values.tolist() == [8 * 128, 6 * 128]
    assert centres[0][:2].tolist() == [[0, 0], [64, 0]]


def test_rois_of_small_images_are_read_at_the_scale_of_their_map():
    # maps that hold their own x coordinate in pixels: the mean over a box is its centre
    strides = (4, 8, 16, 32)
    maps = {
        str(i): (torch.arange(64 // s) * s + s / 2).float().expand(1, 1, 64 // s, 64 // s)
        for i, s in enumerate(strides)
    }
    box = torch.tensor([[8.0, 8.0, 20.0, 40.0]])
    out = RoiAlign(7, strides)(maps, [box])
    assert out.mean().item() == pytest.approx(14.0, abs=0.2)


def test_masks_are_pasted_where_their_boxes_are():
    torch.manual_seed(0)
    mask = torch.zeros(1, 28, 28)
    mask[:, 14:] = 1  # the lower half
    box = torch.tensor([[10.3, 20.0, 40.9, 60.0]])
    pasted = paste_masks(mask, box, (70, 50))[0]
    rows, columns = pasted.nonzero().unbind(1)
    assert (rows.min().item(), rows.max().item()) == (40, 59)
    assert (columns.min().item(), columns.max().item()) == (10, 40)
    # and nearly where torchvision, which rounds, puts them
    theirs = paste_masks_in_image(
        torch.rand(6, 1, 28, 28).round(), torch.tensor([[5.0, 5.0, 45.0, 65.0]] * 6), (70, 50)
    )
    assert theirs.shape == (6, 1, 70, 50)
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (9, 9)).shape == (0, 9, 9)
    assert not paste_masks(torch.ones(1, 28, 28), torch.tensor([[80.0, 80, 90, 90]]), (70, 50)).any()


def test_normalisation_is_the_backbones():
    model = create_detector("fcos", "vit_tiny_patch16_224", 2, **SMALL)
    cfg = timm.get_pretrained_cfg("vit_tiny_patch16_224")
    assert tuple(model.transform.image_mean) == cfg.mean
    assert create_detector("fcos", "resnet18", 2, image_mean=(0, 0, 0), **SMALL).transform.image_mean == [0, 0, 0]


def test_frozen_statistics_stay_frozen_and_have_no_gradient():
    model = create_detector("retinanet", "resnet18", 3, freeze_norm=True, **SMALL).train()
    before = model.pyramid.backbone.bn1.running_mean.clone()
    sum(model(*_batch()).values()).backward()
    assert torch.equal(before, model.pyramid.backbone.bn1.running_mean)
    assert model.pyramid.backbone.bn1.weight.grad is None
    assert copy.deepcopy(model).train().pyramid.backbone.bn1.training is False


def test_two_halves_of_a_batch_weigh_as_the_whole(monkeypatch):
    # what two processes compute: the mean of their losses is the loss of one process with both images
    import zoo.heads.anchor_detectors as module

    torch.manual_seed(0)
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    targets = [_target(64, 64, 1), _target(64, 64, 6)]
    for head in ("retinanet", "fcos"):
        model = create_detector(head, "resnet18", 3, freeze_norm=True, **SMALL).train()
        whole = sum(model(images, targets).values())
        counts = []
        monkeypatch.setattr(module, "batch_mean_count", lambda n, c=counts: c.append(n) or torch.tensor(1.0))
        unscaled = [sum(model([i], [t]).values()) for i, t in zip(images, targets)]
        monkeypatch.undo()
        torch.testing.assert_close(sum(unscaled) / sum(counts), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(labels=torch.tensor([0, 3, 1])), "target 0 has box 1 .* label 3 of a class outside 0..2"),
        (dict(boxes=torch.tensor([[0.0, 0, 9, 9], [5, 5, 5, 9], [0, 0, 1, 1]])), "box 1 .*without area"),
        (dict(boxes=torch.full((3, 4), float("nan"))), "box 0 .*without area"),
        (dict(boxes=torch.zeros(3, 5)), "expected float"),
        (dict(labels=torch.zeros(2, dtype=torch.int64)), "expected int64"),
        (dict(masks=torch.zeros(3, 9, 9)), "masks of target 0"),
    ],
)
def test_a_bad_target_is_named(change, message):
    model = create_detector("mask_rcnn", "resnet18", 3, **SMALL).train()
    images, targets = _batch()
    targets[0].update(change)
    with pytest.raises(ValueError, match=message):
        model(images, targets)


@pytest.mark.parametrize("head", list_heads("detection"))
def test_mixed_precision_trains_and_keeps_boxes_in_float32(head):
    torch.manual_seed(0)
    small = dict(size=96, hidden_dim=32, num_queries=20, num_decoder_layers=1) if head == "rt_detr" else SMALL
    model = create_detector(head, "stdc1", 3, **small)
    images, targets = _batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model.train()(images, targets)
        assert all(v.isfinite() for v in losses.values())
        sum(losses.values()).backward()
        with torch.no_grad():
            found = model.eval()(images)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert all(one["boxes"].dtype == torch.float32 for one in found)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="expected one of faster_rcnn, fcos"):
        create_detector("yolo", "resnet18")
    with pytest.raises(ValueError, match="fcos does not take anchor_sizes: it takes class_names"):
        create_detector("fcos", "resnet18", anchor_sizes=[[8]])
    with pytest.raises(ValueError, match="2 class names for 3 classes"):
        create_detector("fcos", "resnet18", 3, class_names=["a", "b"])
    with pytest.raises(ValueError, match="targets are needed"):
        create_detector("fcos", "resnet18", 3).train()([torch.rand(3, 32, 32)])


def test_groups_reach_the_backbone_through_its_prefix():
    from timm.models import group_parameters

    model = create_detector("retinanet", "resnet18", 3, **SMALL)
    groups = group_parameters(model, model.group_matcher())
    assert "backbone.body.backbone.conv1.weight" in groups[0]
    last = groups[max(groups)]
    assert "head.classification_head.cls_logits.weight" in last
