"""Layouts, label images and their faults, and what augmentation does to ids."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pycocotools.coco as pycoco
import pytest
from PIL import Image

from zoo.train.data.errors import DataError, DataNotFoundError
from zoo.train.data.segmentation import TrainingSegments, check_segmentation
from zoo.train.data.segmentation_layouts import open_segmentation
from zoo.train.data.segmentation_transforms import SegmentationAugmentation, distort_colors, resize

COCO = Path(__file__).parents[1] / "data" / "coco_ccby"


def _photo(path, width=40, height=30):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)


def _mask(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(path)


@pytest.fixture
def plain(tmp_path):
    values = np.zeros((30, 40))
    values[:, 20:] = 1
    values[:5] = 255
    for stem in ("a", "b", "c", "d"):
        _photo(tmp_path / "images" / f"{stem}.jpg")
        _mask(tmp_path / "masks" / f"{stem}.png", values)
    (tmp_path / "classes.txt").write_text("ground\ntree\n")
    return tmp_path


def test_a_plain_folder_is_split_and_its_labels_are_what_the_masks_say(plain):
    train, val = (open_segmentation(plain, split) for split in ("train", "val"))
    assert sorted(r.image.stem for r in [*train.records, *val.records]) == ["a", "b", "c", "d"]
    assert len(val) == 1
    assert train.classes == ["ground", "tree"]
    annotation = train.annotation(0)
    assert [s.label for s in annotation.segments] == [0, 1]
    assert (annotation.layers[0, :5] == 0).all()  # 255 does not count
    report = check_segmentation(train)
    assert (report.segments, report.empty) == (6, 0)


def test_a_value_that_is_no_class_is_named_with_its_file(plain):
    values = np.zeros((30, 40))
    values[0, :3] = 7
    data = open_segmentation(plain, "train")
    _mask(data.records[0].labels, values)
    with pytest.raises(DataError, match=r"\.png has the value 7 in 3 pixels, expected 0\.\.1, 255"):
        check_segmentation(data)


def test_a_mask_of_another_size_is_an_error(plain):
    for stem in "abcd":
        _mask(plain / "masks" / f"{stem}.png", np.zeros((10, 10)))
    with pytest.raises(DataError, match=r"10x10 px .* the image is 40x30 px: they must be equal"):
        check_segmentation(open_segmentation(plain, "train"))


def test_a_mask_with_colours_is_an_error(plain):
    for stem in "abcd":
        Image.new("RGBA", (40, 30)).save(plain / "masks" / f"{stem}.png")
    with pytest.raises(DataError, match="is a RGBA image, expected one channel"):
        check_segmentation(open_segmentation(plain, "train"))


def test_images_without_segments_are_counted_and_can_be_left_out(plain):
    data = open_segmentation(plain, "train")
    _mask(data.records[0].labels, np.full((30, 40), 255))
    assert check_segmentation(data).empty == 1
    assert len(data) == 3
    assert check_segmentation(data, drop_empty=True).empty == 1
    assert len(data) == 2


def test_an_unreadable_image_stops_or_is_left_out_and_listed(plain):
    data = open_segmentation(plain, "train")
    data.records[1].image.write_bytes(b"no image")
    with pytest.raises(DataError, match="1 of 3 images cannot be read, the first is"):
        check_segmentation(data)
    assert len(check_segmentation(data, on_bad="skip").unreadable) == 1
    assert len(data) == 2


def test_a_one_pixel_image_is_an_image(tmp_path):
    _photo(tmp_path / "train" / "images" / "dot.png", 1, 1)
    _mask(tmp_path / "train" / "masks" / "dot.png", [[0]])
    data = open_segmentation(tmp_path, "train")
    image, target = TrainingSegments(data, SegmentationAugmentation((32, 32), jitter=(0.5, 2.0)))[0]
    assert image.shape == (3, 32, 32)
    assert target["labels"].tolist() == [0]


def test_ade20k_numbers_its_classes_from_one(tmp_path):
    for split in ("training", "validation"):
        _photo(tmp_path / "images" / split / "x.jpg")
        values = np.zeros((30, 40))
        values[:, 10:20], values[:, 20:] = 1, 150
        _mask(tmp_path / "annotations" / split / "x.png", values)
    data = open_segmentation(tmp_path, "train")
    assert len(data.classes) == 150
    assert [s.label for s in data.annotation(0).segments] == [0, 149]
    with pytest.raises(DataError, match=r"ade20k_panoptic_train\.json"):
        open_segmentation(tmp_path, "train", "panoptic")


def test_cityscapes_keeps_nineteen_of_its_labels(tmp_path):
    _photo(tmp_path / "leftImg8bit" / "train" / "ulm" / "ulm_0_leftImg8bit.png")
    values = np.zeros((30, 40))
    values[:, 10:20], values[:, 20:30], values[:, 30:] = 7, 33, 9
    _mask(tmp_path / "gtFine" / "train" / "ulm" / "ulm_0_gtFine_labelIds.png", values)
    data = open_segmentation(tmp_path, "train")
    assert len(data.classes) == 19
    assert [s.label for s in data.annotation(0).segments] == [0, 18]


def test_coco_panoptic_things_stuff_and_the_semantic_view():
    panoptic = open_segmentation(COCO, "val", "panoptic")
    assert len(panoptic.classes) == 133
    assert len(panoptic.things) == 80
    semantic = open_segmentation(COCO, "val", "semantic")
    for i in range(3):
        a, b = panoptic.annotation(i), semantic.annotation(i)
        lookup = {s.id: s.label for s in a.segments}
        classes = np.vectorize(lambda v, lookup=lookup: lookup.get(v, -1))(a.layers[0])
        assert ((b.layers[0] - 1) == classes).all()


def test_instances_that_overlap_keep_their_whole_masks():
    data = open_segmentation(COCO, "val", "instance")
    coco = pycoco.COCO(str(data.annotation_file))
    seen = 0
    for index, record in enumerate(data.records):
        annotation = data.annotation(index)
        official = coco.loadAnns(coco.getAnnIds(imgIds=record.image_id))
        masks = [coco.annToMask(a) for a in official]
        ours = [(annotation.layers == s.id).any(0) for s in annotation.segments]
        assert len(ours) == sum(m.any() for m in masks)
        for mask, own in zip([m for m in masks if m.any()], ours):
            assert (mask.astype(bool) == own).all()
            seen += 1
    assert seen > 100


def test_a_png_that_its_json_does_not_describe_is_named(tmp_path):
    shutil.copytree(COCO, tmp_path / "coco")
    path = tmp_path / "coco" / "annotations" / "panoptic_val2017.json"
    content = json.loads(path.read_text())
    gone = content["annotations"][0]["segments_info"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"pixels of segment {gone['id']}, which its JSON does not describe"):
        check_segmentation(open_segmentation(tmp_path / "coco", "val", "panoptic"))


def test_folders_that_are_no_data_set_are_explained(tmp_path):
    with pytest.raises(DataNotFoundError, match="no data set at"):
        open_segmentation(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds none of the layouts"):
        open_segmentation(tmp_path)


def test_augmentation_moves_labels_with_their_pixels_and_is_a_function_of_the_seed():
    H, W = 60, 90
    layers = (np.arange(H)[:, None] // 20 * 3 + np.arange(W)[None] // 30 + 1).astype(np.int32)[None]
    image = np.repeat((layers[0] * 20)[..., None], 3, -1).astype(np.uint8)
    augment = SegmentationAugmentation((64, 64), short_sides=(48, 60, 96), color=False)
    for seed in range(20):
        random.seed(seed)
        moved, ids = augment(image, layers)
        assert moved.shape == (64, 64, 3)
        known = ids[0] > 0
        agree = np.abs(moved[..., 0][known].astype(int) - 20 * ids[0][known]) <= 10
        assert agree.mean() > 0.85  # all but the blurred seams
        random.seed(seed)
        again, same = augment(image, layers)
        assert (again == moved).all()
        assert (same == ids).all()


def test_colours_change_and_labels_of_resized_maps_stay_labels():
    image = np.random.default_rng(1).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    random.seed(3)
    assert any((distort_colors(image) != image).any() for _ in range(5))
    layers = np.random.default_rng(2).integers(0, 5, (1, 20, 30)).astype(np.int32)
    _, resized = resize(image, layers, 7, 71)
    assert resized.shape == (1, 7, 71)
    assert set(np.unique(resized)) <= set(range(5))
