import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.train.data.detection import DetectionSamples, EvaluationImages, check_detection, collate_detection
from zoo.train.data.detection_layouts import open_detection
from zoo.train.data.detection_transforms import DetectionAugmentation, apply, resize
from zoo.train.data.errors import DataError, DataNotFoundError
from zoo.train.loading import SeededDataset

CCBY = Path(__file__).parent.parent / "data" / "coco_ccby"
SIDE = 40


def _coco(folder: Path, change=None, split="train") -> Path:
    """A data set of three images: two objects and a crowd; a box without area; nothing."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / f"{split}2017").mkdir(exist_ok=True)
    for i in range(3):
        Image.new("RGB", (SIDE, 30), (i * 60, 90, 120)).save(folder / f"{split}2017" / f"{i}.png")
    square = [5, 5, 15, 5, 15, 20, 5, 20]

    def entry(number, image, category, box, **more):
        w, h = box[2:]
        return dict(id=number, image_id=image, category_id=category, bbox=box, area=w * h, iscrowd=0, **more)

    coco = dict(
        images=[dict(id=10 + i, file_name=f"{i}.png", width=SIDE, height=30) for i in range(3)],
        categories=[dict(id=7, name="cat"), dict(id=3, name="dog")],
        annotations=[
            entry(1, 10, 7, [5, 5, 10, 15], segmentation=[square]),
            entry(2, 10, 3, [30, 20, 20, 20], segmentation=[[30, 20, 50, 20, 50, 40, 30, 40]]),
            entry(3, 10, 3, [0, 0, 9, 9]) | dict(iscrowd=1, segmentation=dict(size=[30, SIDE], counts=[0, 9, 1191])),
            entry(4, 11, 3, [4, 4, 0, 6], segmentation=[square]),
        ],
    )
    if change:
        change(coco)
    (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(coco))
    return folder


def test_ids_are_mapped_once_and_back(tmp_path):
    _coco(tmp_path)
    data = open_detection(_coco(tmp_path, split="val"), "val")
    # in the order of the ids, whatever the file's
    assert (data.classes, data.category_ids) == (["dog", "cat"], [3, 7])
    assert data.objects(0).labels.tolist() == [1, 0]
    assert [data.category_ids[label] for label in data.objects(0).labels] == [7, 3]


def test_crowds_empty_images_and_boxes_without_area_are_counted_and_not_trained_on(tmp_path):
    _coco(tmp_path)
    data = open_detection(_coco(tmp_path, split="val"), "val")
    data, report = check_detection(data)
    assert (report.images, report.objects, report.crowds, report.empty) == (3, 2, 1, 1)
    assert report.without_area == (4,)
    assert report.clipped == 1
    assert "1 crowds" in str(report)
    assert "dropped in training: 4" in str(report)
    objects = data.objects(0)
    assert objects.ids == (1, 2)
    assert objects.boxes.tolist() == [[5, 5, 15, 20], [30, 20, 40, 30]]
    assert len(data.objects(1).boxes) == 0
    assert len(data.with_objects()) == 1
    assert len(data.with_objects().coco["images"]) == 1
    # evaluation sees everything
    assert len(data.coco["annotations"]) == 4


def test_the_official_files_open(capsys):
    train, val = (check_detection(open_detection(CCBY, split, masks=True))[0] for split in ("train", "val"))
    assert (len(train), len(val)) == (36, 22)
    assert train.classes == val.classes
    assert len(train.classes) == 80
    assert train.category_ids[-1] == 90
    mask = train.objects(0).masks
    assert mask.shape[1:] == train.image(0).shape[:2]
    boxes = train.objects(0).boxes
    for one, box in zip(mask, boxes):
        rows, columns = one.nonzero()
        assert abs(columns.min() - box[0]) < 2
        assert abs(rows.max() + 1 - box[3]) < 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][1].pop("bbox"), "annotation 2 in .* has no bbox"),
        (lambda c: c["annotations"][1].update(category_id=99), "annotation 2 .* has category 99"),
        (lambda c: c["annotations"][1].update(image_id=99), "annotation 2 .* belongs to image 99"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, None, 4]), "annotation 2 .* expected four finite numbers"),
        (lambda c: c["annotations"][1].update(id=1), "annotation 1 .* another annotation has"),
        (lambda c: c["annotations"][1].pop("segmentation"), "annotation 2 .* has no segmentation"),
        (lambda c: c["annotations"][1].update(segmentation=[[1, 2, 3, 4]]), "annotation 2 .* polygon"),
        (lambda c: c["images"][2].update(file_name="9.png"), "9.png: image 12 .* is not there"),
        (lambda c: c["images"][2].update(width=41), "2.png: is 40x30 px, and .* says 41x30"),
        (lambda c: c["images"][2].update(id=10), "two images .* have the id 10"),
        (lambda c: c["images"][2].pop("width"), "image 12 .* has no width"),
        (lambda c: c["categories"][0].update(id=3), "two categories"),
        (lambda c: c["categories"][1].update(name="background"), "the background is none"),
        (lambda c: c.pop("categories"), "has no list of categories"),
    ],
)
def test_the_first_fault_is_named_before_the_first_step(tmp_path, change, message):
    _coco(tmp_path, change, "train")
    _coco(tmp_path, change, "val")
    with pytest.raises(DataError, match=message):
        check_detection(open_detection(tmp_path, "val", masks=True))


def test_images_that_cannot_be_read_are_left_out_where_that_is_wished(tmp_path):
    _coco(tmp_path)
    _coco(tmp_path, split="val")
    (tmp_path / "val2017" / "0.png").write_bytes(b"\x89PNG no picture")
    with pytest.raises(DataError, match=r"0.png: cannot be read"):
        check_detection(open_detection(tmp_path, "val"))
    data, report = check_detection(open_detection(tmp_path, "val"), on_bad="skip")
    assert len(data) == 2
    assert [Path(bad.path).name for bad in report.unreadable] == ["0.png"]
    assert report.objects == 2


def test_splits_with_other_categories_are_refused(tmp_path):
    _coco(tmp_path)
    _coco(tmp_path, lambda c: c["categories"].append(dict(id=9, name="owl")), "val")
    with pytest.raises(DataError, match="different categories: owl"):
        open_detection(tmp_path)
    shutil.rmtree(tmp_path / "annotations")
    with pytest.raises(DataError, match="no detection data set that zoo knows"):
        open_detection(tmp_path)
    with pytest.raises(DataNotFoundError):
        open_detection(tmp_path / "nothing")


def test_a_part_is_held_out_by_name_where_there_is_no_val_split(tmp_path):
    _coco(tmp_path)
    parts = [open_detection(tmp_path, split, val_fraction=0.34) for split in ("train", "val")]
    assert [len(p) for p in parts] == [2, 1]
    assert not {f.name for f in parts[0].files} & {f.name for f in parts[1].files}
    assert "held out" in parts[0].notes[0]


def test_roboflows_group_is_no_class(tmp_path):
    def change(c):
        c["categories"] = [dict(id=0, name="pets", supercategory="none")] + [
            {**own, "supercategory": "pets"} for own in c["categories"]
        ]

    _coco(tmp_path, change)
    assert open_detection(tmp_path).category_ids == [3, 7]


def _yolo(folder: Path, lines="1 0.25 0.5 0.1 0.2\n0 0.1 0.1 0.5 0.1 0.5 0.6\n", names="names: {0: cat, 1: dog}"):
    for split in ("train", "val"):
        (folder / "images" / split).mkdir(parents=True, exist_ok=True)
        (folder / "labels" / split).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (200, 100)).save(folder / "images" / split / "a.jpg")
        Image.new("RGB", (200, 100)).save(folder / "images" / split / "empty.jpg")
        (folder / "labels" / split / "a.txt").write_text(lines)
    (folder / "data.yaml").write_text(f"train: images/train\nval: images/val\n{names}\n")
    return folder


def test_yolo_folders_are_read(tmp_path):
    data, report = check_detection(open_detection(_yolo(tmp_path), "val"))
    assert data.layout == "YOLO"
    assert data.classes == ["cat", "dog"]
    assert report.empty == 1
    objects = data.objects(0)
    assert objects.labels.tolist() == [1, 0]
    np.testing.assert_allclose(objects.boxes, [[40, 40, 60, 60], [20, 10, 100, 60]], atol=1e-4)
    assert data.coco["annotations"][1]["area"] == pytest.approx(80 * 50 / 2)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("2 0.5 0.5 0.1 0.1\n", r"a.txt, line 1: class 2, expected 0..1"),
        ("0 0.5 0.5 0.1 0.1\n\n1 30 40 10 10\n", "a.txt, line 3: coordinates outside"),
        ("0 0.5 0.5 0.1\n", "a.txt, line 1: 3 coordinates"),
        ("cat 0.5 0.5 0.1 0.1\n", "is not a class number"),
    ],
)
def test_a_bad_line_of_a_yolo_file_is_named(tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        open_detection(_yolo(tmp_path, lines))


def test_voc_folders_are_read(tmp_path):
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / name).mkdir(parents=True)
    for stem, extra in (("one", ""), ("two", "<difficult>1</difficult>")):
        Image.new("RGB", (60, 50)).save(tmp_path / "JPEGImages" / f"{stem}.jpg")
        (tmp_path / "Annotations" / f"{stem}.xml").write_text(
            f"<annotation><filename>{stem}.jpg</filename><object><name>hat</name>{extra}<bndbox><xmin>1</xmin>"
            "<ymin>11</ymin><xmax>20</xmax><ymax>50</ymax></bndbox></object></annotation>"
        )
    (tmp_path / "ImageSets/Main/train.txt").write_text("one\n")
    (tmp_path / "ImageSets/Main/val.txt").write_text("two\n")
    train, val = open_detection(tmp_path), open_detection(tmp_path, "val")
    assert train.objects(0).boxes.tolist() == [[0, 10, 20, 50]]
    assert len(val.objects(0).boxes) == 0
    assert check_detection(val)[1].crowds == 1
    assert "difficult" in val.notes[0]


AUGMENTATIONS = dict(
    papers=dict(short_sides=(160, 200), max_long=260),
    crops=dict(short_sides=(160, 200), max_long=260, crop_policy=True),
    jitter=dict(jitter=(0.1, 2.0), jitter_size=(160, 192)),
    ssd=dict(size=160, zoom_out=0.5, iou_crop=0.8, color=0.8),
)


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_a_sample_depends_on_seed_draw_and_index_alone_and_boxes_follow_their_masks(kind):
    data = open_detection(CCBY, masks=True).with_objects()
    samples = SeededDataset(DetectionSamples(data, DetectionAugmentation(**AUGMENTATIONS[kind])), seed=3)
    several = 0
    for draw, index in ((0, 0), (0, 4), (1, 4), (2, 9)):
        image, target, _ = samples[(draw, index)]
        samples[(draw, index + 1)]
        again, same, _ = samples[(draw, index)]
        assert torch.equal(image, again)
        assert all(torch.equal(target[k], same[k]) for k in target)
        assert target["masks"].shape == (len(target["boxes"]), *image.shape[1:])
        for mask, (x0, y0, x1, y1) in zip(target["masks"], target["boxes"].tolist()):
            rows, columns = mask.nonzero().unbind(1)
            if len(rows) > 20:  # a mask of a few pixels may be a pixel from its box
                several += 1
                assert columns.min() >= x0 - 3
                assert columns.max() <= x1 + 3
                assert rows.min() >= y0 - 3
                assert rows.max() <= y1 + 3
    assert several > 5
    assert not torch.equal(samples[(0, 4)][0], samples[(1, 4)][0])


def test_sizes_are_the_papers():
    augment = DetectionAugmentation(short_sides=(80,), max_long=120, hflip=0)
    image = np.zeros((100, 200, 3), np.uint8)
    nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    assert augment(image, *nothing)[0].shape == (60, 120, 3)
    assert augment(image.transpose(1, 0, 2), *nothing)[0].shape == (120, 60, 3)
    assert DetectionAugmentation(size=(64, 96), hflip=0)(image, *nothing)[0].shape == (64, 96, 3)
    out = DetectionAugmentation(jitter=(0.1, 0.2), jitter_size=(64, 96))(image, *nothing, np.zeros((0, 100, 200)))
    assert out[0].shape == (64, 96, 3)
    assert out[3].shape == (0, 64, 96)
    with pytest.raises(ValueError, match="give one of"):
        DetectionAugmentation()


def test_a_flip_moves_boxes_and_masks_together():
    import albumentations as A

    image = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    masks = np.zeros((2, 20, 30), np.uint8)
    masks[0, 2:8, 3:9], masks[1, 5:9, 20:30] = 1, 1
    boxes = np.array([[3, 2, 9, 8], [20, 5, 30, 9]], np.float32)
    out = apply(A.HorizontalFlip(p=1), (image, boxes, np.array([4, 5]), masks))
    np.testing.assert_allclose(out[1], [[21, 2, 27, 8], [0, 5, 10, 9]], atol=1e-4)
    assert np.array_equal(out[3], masks[:, :, ::-1])
    small = resize((image, boxes, np.array([4, 5]), masks), 10, 15)
    np.testing.assert_allclose(small[1], [[1.5, 1, 4.5, 4], [10, 2.5, 15, 4.5]], atol=1e-4)
    assert small[3].shape == (2, 10, 15)


def test_batches_are_lists_of_images_of_their_own_size(tmp_path):
    data = open_detection(CCBY, "val")
    images = EvaluationImages(data)
    batch = collate_detection([images[0], images[1]])
    assert [tuple(i.shape) for i in batch["inputs"]] == [(3, *data.image(i).shape[:2]) for i in (0, 1)]
    assert batch["keys"].tolist() == [0, 1]
    assert batch["inputs"][0].dtype == torch.uint8
    assert copy.deepcopy(images.metainfo)["classes"][0] == "person"
