"""Classification data: layouts are recognised, indices are right, nothing is left out without a word."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform
from torch.utils.data import DataLoader

import zoo.train.data.transforms as transforms_module
from zoo.images import ImageError, read_image
from zoo.train.data.classification import (
    DataError,
    PathList,
    build_transforms,
    check_dataset,
    find_images,
    natural_key,
    open_classification,
)
from zoo.train.data.errors import DataNotFoundError

DATA = Path(__file__).parent.parent / "data"
CLOTHING = DATA / "clothing10"
ODD = DATA / "odd_images"
PHOTOS = sorted((CLOTHING / "train").glob("*/*.jpg"))[::40]


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def photo(path: Path, number: int = 0, size: tuple[int, int] = (20, 16)) -> Path:
    """A small JPEG that differs from that of any other number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def folders(root: Path, counts: dict[str, int], start: int = 0) -> Path:
    number = start
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            photo(root / name / f"img{i}.jpg", number)
            number += 1
    return root


# Folders


def test_the_packaged_set_opens_with_its_known_counts():
    train, val = open_classification(CLOTHING, "train"), open_classification(CLOTHING, "val")
    assert (len(train), len(val)) == (600, 186)
    assert train.classes == val.classes
    assert train.class_counts().tolist() == [60] * 10
    counts = dict(zip(val.classes, val.class_counts().tolist(), strict=True))
    assert (counts["hat"], counts["skirt"], counts["dress"]) == (14, 12, 20)
    image, target = train[0]
    assert image.mode == "RGB"
    assert train.paths[0].split(os.sep)[-2] == train.classes[target] == "dress"


def test_classes_and_files_are_in_natural_order(tmp_path):
    root = folders(tmp_path / "train", {"class 10": 11, "class 2": 1, "Class 1": 1})
    folders(tmp_path / "val", {"class 2": 1}, 50)
    data = open_classification(tmp_path)
    assert data.classes == ["Class 1", "class 2", "class 10"]
    names = [Path(path).name for path in data.paths if Path(path).parent == root / "class 10"]
    assert names == [f"img{i}.jpg" for i in range(11)]
    assert sorted(["²", "a", "10", "9"], key=natural_key) == ["9", "10", "a", "²"]


def test_a_class_missing_in_val_does_not_shift_the_indices(tmp_path):
    folders(tmp_path / "train", {"a": 2, "b": 2, "c": 2})
    folders(tmp_path / "val", {"a": 1, "c": 1}, 50)
    val = open_classification(tmp_path, "val")
    assert val.classes == ["a", "b", "c"]
    assert val.targets.tolist() == [0, 2]


def test_folders_without_splits_are_divided_once_and_for_all(tmp_path):
    folders(tmp_path, {"a": 10, "b": 20, "lonely": 1})
    train, val = open_classification(tmp_path, "train"), open_classification(tmp_path, "val")
    assert train.class_counts().tolist() == [8, 16, 1]
    assert val.class_counts().tolist() == [2, 4, 0]
    assert not set(train.paths) & set(val.paths)
    assert len(train) + len(val) == 31
    assert list(open_classification(tmp_path, "val").paths) == list(val.paths)
    assert list(open_classification(tmp_path, "val", seed=1).paths) != list(val.paths)
    half = open_classification(tmp_path, "val", val_fraction=0.5)
    assert half.class_counts().tolist() == [5, 10, 0]
    assert len(open_classification(tmp_path, "train", val_fraction=0)) == 31
    moved = shutil.copytree(tmp_path, tmp_path.parent / "elsewhere")
    again = open_classification(moved, "val")
    assert [Path(p).relative_to(moved) for p in again.paths] == [Path(p).relative_to(tmp_path) for p in val.paths]


def test_a_training_folder_alone_is_divided_too(tmp_path):
    folders(tmp_path / "train", {"a": 10, "b": 10})
    train, val = open_classification(tmp_path, "train"), open_classification(tmp_path, "val")
    assert (len(train), len(val)) == (16, 4)
    report = check_dataset(train, val=val)
    assert report.notes == (f"part of train/ is held out, there is no val/ in {tmp_path}",)
    assert f"note: {report.notes[0]}" in str(report)
    assert report.warnings == ()


@pytest.mark.parametrize("name", ["valid", "validation", "Val", "test"])
def test_a_validation_folder_goes_by_many_names(tmp_path, name):
    folders(tmp_path / "train", {"a": 3, "b": 3})
    folders(tmp_path / name, {"a": 1, "b": 2}, 50)
    assert open_classification(tmp_path, "val").targets.tolist() == [0, 1, 1]
    assert len(open_classification(tmp_path, "train")) == 6


def test_a_class_called_train_is_a_class(tmp_path):
    folders(tmp_path, {"car": 4, "train": 4, "plane": 4})
    assert open_classification(tmp_path, "train", val_fraction=0).classes == ["car", "plane", "train"]


def test_classes_can_be_given_in_the_models_order(tmp_path):
    folders(tmp_path / "val", {"a": 1, "c": 2})
    data = open_classification(tmp_path, "val", classes=["c", "b", "a"])
    assert data.targets.tolist() == [2, 0, 0]
    with pytest.raises(DataError, match=r"folder 'c' in .* is none of the 2 classes: a, b"):
        open_classification(tmp_path, "val", classes=["a", "b"])
    with pytest.raises(DataError, match="the class 'a' is listed twice"):
        open_classification(tmp_path, "val", classes=["a", "c", "a"])


def test_what_is_not_used_is_listed_with_the_reason(tmp_path):
    folders(tmp_path / "train", {"a": 2})
    folders(tmp_path / "val", {"a": 1}, 9)
    (tmp_path / "train/a/.DS_Store").write_bytes(b"x")
    (tmp_path / "train/a/Thumbs.db").write_bytes(b"x")
    (tmp_path / "train/a/._img0.jpg").write_bytes(b"x")
    (tmp_path / "train/a/notes.txt").write_text("x")
    (tmp_path / "train/README.md").write_text("x")
    (tmp_path / "train/.ipynb_checkpoints").mkdir()
    data = open_classification(tmp_path)
    assert len(data) == 2
    assert data.classes == ["a"]
    assert {(Path(path).name, reason) for path, reason in data.left_out} == {
        (".DS_Store", "hidden"),
        ("Thumbs.db", "hidden"),
        ("._img0.jpg", "hidden"),
        ("notes.txt", "not a picture by its name"),
        ("README.md", "not in a class folder"),
        (".ipynb_checkpoints", "hidden"),
    }
    assert "6 other files ignored" in str(check_dataset(data))


def test_links_are_followed_but_not_in_circles(tmp_path):
    folders(tmp_path / "pool", {"a": 2})
    (tmp_path / "data/train").mkdir(parents=True)
    (tmp_path / "data/train/a").symlink_to(tmp_path / "pool/a", target_is_directory=True)
    (tmp_path / "pool/a/again").symlink_to(tmp_path / "pool/a", target_is_directory=True)
    (tmp_path / "pool/a/other.jpg").symlink_to(tmp_path / "pool/a/img0.jpg")
    found, left_out = find_images(tmp_path / "data/train/a")
    assert [Path(path).name for path in found] == ["img0.jpg", "img1.jpg", "other.jpg"]
    assert [bad.reason for bad in left_out] == ["a link to a folder above it"]


def test_pictures_in_folders_below_a_class_belong_to_it(tmp_path):
    photo(tmp_path / "train/a/x/1.jpg")
    photo(tmp_path / "train/a/y/z/2.JPEG", 1)
    photo(tmp_path / "val/a/3.jpg", 2)
    assert len(open_classification(tmp_path)) == 2


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda root: None, "{root} is empty: expected one folder a class, with its pictures"),
        (lambda root: photo(root / "1.jpg"), "{root} has 1 pictures and no class folders: put each into a folder"),
        (
            lambda root: (
                photo(root / "val/ILSVRC2012_val_00000001.JPEG") and (root / "train/n01440764").mkdir(parents=True)
            ),
            "has 1 pictures and no class folders: sort ImageNet's validation set into its WordNet ids",
        ),
        (lambda root: (root / "a").mkdir(), "no pictures for the split 'val' in {root}"),
        (
            lambda root: folders(root / "train", {"a": 1}) and folders(root / "val", {"a": 1, "b": 1}),
            "folder 'b' in {root}/val is not among the training classes (a): rename or remove it",
        ),
    ],
)
def test_a_layout_that_cannot_be_used_is_explained(tmp_path, build, sentence):
    build(tmp_path)
    with pytest.raises(DataError) as error:
        open_classification(tmp_path, "val")
    assert sentence.format(root=tmp_path) in str(error.value)


def test_missing_folders_splits_and_wrong_arguments_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data set at .*nowhere: check the path"):
        open_classification(tmp_path / "nowhere")
    folders(tmp_path / "val", {"a": 1})
    with pytest.raises(DataNotFoundError, match=r"no split 'train' in .*, which has val/"):
        open_classification(tmp_path, "train")
    with pytest.raises(DataNotFoundError, match=r"no split 'test' in .*, which has val/"):
        open_classification(tmp_path, "test")
    with pytest.raises(DataError, match="kind is 'wds', expected auto, folder, imagenet or csv"):
        open_classification(tmp_path, kind="wds")
    with pytest.raises(DataError, match=r"val_fraction is 1\.0, expected a share"):
        open_classification(tmp_path, val_fraction=1.0)
    (tmp_path / "train.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"train\.zip is a file: pass a folder of class folders or a CSV"):
        open_classification(tmp_path / "train.zip")


# ImageNet


def test_wordnet_folders_keep_imagenets_indices(tmp_path):
    wnids = ImageNetInfo().label_names()
    folders(tmp_path / "val", {wnids[998]: 1, wnids[2]: 2})
    data = open_classification(tmp_path, "val")
    assert len(data.classes) == 1000
    assert data.targets.tolist() == [2, 2, 998]
    assert data.keys[998] == wnids[998]
    assert data.classes[1] == "goldfish, Carassius auratus"
    own = open_classification(tmp_path, "val", kind="folder")
    assert own.classes == [wnids[2], wnids[998]]
    subset = open_classification(tmp_path, "val", classes=[wnids[998], wnids[5], wnids[2]])
    assert subset.targets.tolist() == [2, 2, 0]
    assert open_classification(tmp_path, "val", classes=ImageNetInfo().label_descriptions()).targets.tolist() == [
        2,
        2,
        998,
    ]


def test_other_wordnet_ids_are_ordinary_folders_unless_imagenet_is_asked_for(tmp_path):
    folders(tmp_path / "val", {"n00000001": 1, "n01440764": 1})
    assert open_classification(tmp_path, "val").classes == ["n00000001", "n01440764"]
    with pytest.raises(DataError, match=r"folder 'n00000001' in .* is no class of ImageNet-1k: expected WordNet ids"):
        open_classification(tmp_path, "val", kind="imagenet")
    folders(tmp_path / "set/val", {"n01440764": 1})
    with pytest.raises(DataError, match="10 class names for ImageNet's 1000 classes"):
        open_classification(tmp_path / "set", "val", kind="imagenet", classes=list("abcdefghij"))


# CSV


def listing(root: Path, text: str, names: tuple[str, ...] = ("a.jpg", "b.jpg", "c.jpg", "d.jpg")) -> Path:
    for number, name in enumerate(names):
        photo(root / name, number)
    (root / "labels.csv").write_text(text)
    return root


def test_a_column_label_makes_a_single_label_set(tmp_path):
    listing(tmp_path, "image,label,split\na.jpg,dog,train\nb.jpg,cat,train\nc.jpg,dog,val\n")
    train, val = open_classification(tmp_path, "train"), open_classification(tmp_path, "val")
    assert train.classes == val.classes == ["cat", "dog"]
    assert not train.multilabel
    assert [(Path(p).name, t) for p, t in zip(train.paths, train.targets, strict=True)] == [("a.jpg", 1), ("b.jpg", 0)]
    assert val[0][1] == 1


def test_a_column_labels_makes_a_multi_label_set(tmp_path):
    listing(tmp_path, "image,labels,split\na.jpg,dog|cat,train\nb.jpg,,train\nc.jpg,bird | cat,train\n")
    data = open_classification(tmp_path, "train")
    assert data.multilabel
    assert data.classes == ["bird", "cat", "dog"]
    assert data.targets.tolist() == [[0, 1, 1], [0, 0, 0], [1, 1, 0]]
    target = data[2][1]
    assert target.dtype == torch.float32
    assert target.tolist() == [1, 1, 0]
    assert data.class_counts().tolist() == [1, 2, 1]


def test_columns_of_0_and_1_make_a_multi_label_set_with_spreadsheet_habits(tmp_path):
    listing(tmp_path / "images", "")
    (tmp_path / "labels.csv").write_text(
        "\ufefffilename;red;blue\r\na.jpg;1;0\r\nb.jpg;0;0\r\nc.jpg;1;1\r\n\r\n", newline=""
    )
    data = open_classification(tmp_path, "train", val_fraction=0)
    assert data.classes == ["red", "blue"]
    assert data.targets.tolist() == [[1, 0], [0, 0], [1, 1]]
    assert data[0][0].size == (20, 16)


def test_one_file_a_split_shares_the_training_classes(tmp_path):
    listing(tmp_path, "")
    (tmp_path / "labels.csv").unlink()
    (tmp_path / "train.csv").write_text("image,label\na.jpg,x\nb.jpg,y\n")
    (tmp_path / "val.csv").write_text("image,label\nc.jpg,y\n")
    assert len(open_classification(tmp_path, "train")) == 2
    val = open_classification(tmp_path, "val")
    assert (val.classes, val.targets.tolist()) == (["x", "y"], [1])


def test_a_list_without_splits_is_divided_and_rare_classes_stay_on_both_sides(tmp_path):
    names = tuple(f"{i}.jpg" for i in range(40))
    rows = [f"{name},{'common|rare' if i < 5 else 'common'}" for i, name in enumerate(names)]
    listing(tmp_path, "\n".join(["image,labels", *rows]), names)
    train, val = open_classification(tmp_path, "train"), open_classification(tmp_path, "val")
    assert sorted([*train.paths, *val.paths]) == sorted(str(tmp_path / name) for name in names)
    assert train.class_counts().tolist() == [32, 4]
    assert val.class_counts().tolist() == [8, 1]
    assert open_classification(tmp_path / "labels.csv", "val").paths == val.paths


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no rows: expected a header and one row a picture"),
        ("name,label\na.jpg,x\n", "has no column 'image'; its columns are: name, label"),
        ("image\na.jpg\n", "has no labels: add a column 'label', 'labels' (a|b), or one 0/1 column a class"),
        ("image,label\na.jpg,x\nb.jpg\n", "line 3 has 1 values for 2 columns"),
        ("image,label\na.jpg,\n", "line 2 has no label in the column 'label'"),
        ("image,label\n,x\n", "line 2 names no picture"),
        ("image,label\na.jpg,x\na.jpg,y\n", "names a.jpg twice, in lines 2 and 3: keep one row a picture"),
        ("image,x,y\na.jpg,1,-1\n", "line 2 has '-1' in the class column 'y', expected 0 or 1"),
        ("image,x,x\na.jpg,1,1\n", "has two columns named 'x'"),
        ("image,labels\na.jpg,\n", "has no label in any row"),
        ("image,label,split\na.jpg,x,test\n", "whose column 'split' has test"),
    ],
)
def test_a_wrong_list_is_named_with_its_line(tmp_path, text, sentence):
    listing(tmp_path, text)
    with pytest.raises(DataError) as error:
        open_classification(tmp_path, "train")
    assert str(tmp_path / "labels.csv") in str(error.value)
    assert sentence in str(error.value)


def test_an_unknown_label_and_another_encoding_are_named(tmp_path):
    listing(tmp_path, "image,label\na.jpg,x\nb.jpg,z\n")
    with pytest.raises(DataError, match="line 3 has the label 'z', none of the 2 classes: x, y"):
        open_classification(tmp_path, classes=["x", "y"])
    (tmp_path / "labels.csv").write_bytes("image,label\na.jpg,é\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"labels\.csv is not UTF-8 text \(byte 18\): save it as UTF-8"):
        open_classification(tmp_path)
    with pytest.raises(DataNotFoundError, match=r"no labels\.csv or train\.csv in"):
        open_classification(CLOTHING, kind="csv")


# The check before the first step


@pytest.fixture
def damaged(tmp_path) -> Path:
    folders(tmp_path / "train", {"a": 3, "b": 3})
    folders(tmp_path / "val", {"a": 1, "b": 1}, 50)
    for name in ("truncated.jpg", "empty.jpg", "text.jpg"):
        shutil.copy(ODD / name, tmp_path / "train" / "b" / name)
    (tmp_path / "train/b/gone.jpg").symlink_to(tmp_path / "deleted.jpg")
    return tmp_path


@pytest.mark.parametrize("decode", [False, True])
def test_unreadable_pictures_stop_the_run_with_the_first_and_the_count(damaged, decode):
    data = open_classification(damaged)
    with pytest.raises(DataError) as error:
        check_dataset(data, decode=decode)
    first = damaged / "train/b/empty.jpg"
    assert str(error.value) == (
        f"{first} is empty (0 bytes): copy or download it again (4 of 10 pictures cannot be read); "
        "or pass on_bad='skip' to leave such out"
    )
    assert [Path(bad.path).name for bad in error.value.unreadable] == [
        "empty.jpg",
        "gone.jpg",
        "text.jpg",
        "truncated.jpg",
    ]
    assert len(data) == 10


@pytest.mark.parametrize("decode", [False, True])
def test_skipped_pictures_are_counted_and_listed(damaged, decode):
    data = open_classification(damaged)
    report = check_dataset(data, val=open_classification(damaged, "val"), on_bad="skip", decode=decode)
    assert len(data) == 6
    assert data.class_counts().tolist() == [3, 3]
    assert [data[i][1] for i in range(6)] == [0, 0, 0, 1, 1, 1]
    assert len(report.unreadable) == len(data.skipped) == 4
    assert report.splits[0].pictures == 6
    text = str(report)
    assert "4 pictures left out:" in text
    assert "truncated.jpg is truncated" in text
    json.dumps(report.to_dict())


def test_a_set_without_any_readable_picture_is_refused_even_when_skipping(tmp_path):
    (tmp_path / "train/a").mkdir(parents=True)
    shutil.copy(ODD / "empty.jpg", tmp_path / "train/a/x.jpg")
    with pytest.raises(DataError, match=r"none of the 1 pictures of train can be read: .*x\.jpg is empty"):
        check_dataset(open_classification(tmp_path, val_fraction=0), on_bad="skip")


def test_every_odd_picture_passes_the_quick_check_or_is_named(tmp_path):
    shutil.copytree(ODD, tmp_path / "train" / "odd")
    data = open_classification(tmp_path, val_fraction=0)
    report = check_dataset(data, on_bad="skip")
    assert len(data) == 26
    assert {Path(bad.path).name for bad in report.unreadable} == {"empty.jpg", "text.jpg", "truncated.jpg"}
    assert report.splits[0].smallest.endswith("one_pixel.png")
    assert report.splits[0].width[0] == 1
    assert report.splits[0].width[2] == 1000


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's about TIFF directories
@pytest.mark.parametrize("format", ["jpg", "png", "gif", "webp", "bmp", "tif", "ppm"])
def test_the_quick_check_notices_a_file_cut_short(tmp_path, format):
    path = tmp_path / "train" / "a" / f"x.{format}"
    photo(path, size=(90, 70))
    photo(tmp_path / "train/a/y.jpg", 1)
    whole = path.read_bytes()
    assert not check_dataset(open_classification(tmp_path, val_fraction=0)).unreadable
    for content in (whole[: len(whole) * 3 // 4], whole[:40]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"x\.{format} "):
            check_dataset(open_classification(tmp_path, val_fraction=0))


def test_the_report_of_a_sound_set_has_counts_sizes_and_no_warning():
    train, val = open_classification(CLOTHING), open_classification(CLOTHING, "val")
    seen = []
    report = check_dataset(train, val=val, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (786, 786)
    assert report.warnings == ()
    assert report.unreadable == ()
    first, second = report.splits
    assert (first.pictures, second.pictures) == (600, 186)
    assert first.class_counts == dict.fromkeys(train.classes, 60)
    assert first.width == (144, 144, 216)
    assert first.formats == {"JPEG": 600}
    assert str(report).startswith("train: 600 pictures, 10 classes (600 JPEG)\n  size: 144-216 x 144-216 px")


def test_what_is_suspicious_is_a_warning(tmp_path):
    folders(tmp_path / "train", {"a": 2, "T-shirt": 2, "t shirt": 2, "only in train": 2, "none": 0, "only in val": 0})
    folders(tmp_path / "val", {"a": 1, "T-shirt": 1, "t shirt": 1, "only in val": 1}, 50)
    shutil.copy(tmp_path / "train/a/img0.jpg", tmp_path / "val/a/copy.jpg")
    shutil.copy(tmp_path / "train/a/img0.jpg", tmp_path / "train/T-shirt/copy.jpg")
    report = check_dataset(open_classification(tmp_path), val=open_classification(tmp_path, "val"))
    text = "\n".join(report.warnings)
    assert "2 of 6 classes without a picture in train: 'none', 'only in val'" in text
    assert "the classes 't shirt', 'T-shirt' differ in spelling only: are they the same?" in text
    assert "1 class without a picture in val: 'only in train'" in text
    assert "1 class of val without a picture in train: 'only in val'" in text
    assert "1 picture more than once in train" in text
    assert "1 picture of train in more than one class" in text
    assert "1 picture of val also in train" in text
    assert report.shared == ((str(tmp_path / "train/a/img0.jpg"), str(tmp_path / "val/a/copy.jpg")),)


def test_a_wrong_policy_is_named():
    with pytest.raises(DataError, match="on_bad is 'ignore', expected 'error' or 'skip'"):
        check_dataset(open_classification(CLOTHING), on_bad="ignore")


# The data set as an object


def test_a_file_that_breaks_during_training_is_named_by_the_worker(damaged):
    data = open_classification(damaged)
    data.transform = build_transforms(train=True, input_size=32)
    loader = DataLoader(data, batch_size=2, num_workers=1)
    with pytest.raises(ImageError, match=r"empty\.jpg is empty"):
        list(loader)


def test_workers_receive_the_set_by_pickle_and_give_the_same(tmp_path):
    data = open_classification(CLOTHING, transform=build_transforms(train=False, input_size=32)).select(
        range(0, 600, 100)
    )
    again = pickle.loads(pickle.dumps(data))
    assert again.paths == data.paths
    for i in range(len(data)):
        assert torch.equal(again[i][0], data[i][0])
        assert again[i][1] == data[i][1]
    batches = list(DataLoader(data, batch_size=3, num_workers=1))
    assert batches[1][1].tolist() == data.targets[3:].tolist()


def test_paths_of_any_script_survive_their_buffer():
    paths = ["a.jpg", "", "größe/写真.jpg", os.fsdecode(b"bad\xff.jpg")]
    stored = PathList(paths)
    assert list(stored) == paths
    assert stored[-1] == paths[-1]
    assert stored[1:3] == paths[1:3]
    with pytest.raises(IndexError):
        stored[4]
    assert list(PathList([])) == []


# Transforms


RECIPES = [
    {},
    {"auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.5, "interpolation": "random"},
    {"input_size": (3, 64, 96), "vflip": 0.5, "color_jitter": None, "scale": (0.3, 0.9), "ratio": (0.5, 2.0)},
    {"normalize": False, "interpolation": "bilinear"},
]


def timm_options(recipe: dict) -> dict:
    options = {"interpolation": "bicubic", "input_size": 224} | recipe
    if "random_erasing" in options:
        options |= {"re_prob": options.pop("random_erasing"), "re_mode": "pixel"}
    return options


@pytest.mark.parametrize("recipe", RECIPES, ids=range(len(RECIPES)))
def test_training_tensors_are_timms_for_the_same_random_numbers(recipe, monkeypatch):
    import timm.data.auto_augment as policies

    theirs = create_transform(is_training=True, **timm_options(recipe))
    monkeypatch.setattr("PIL.ImageOps.posterize", patched_posterize(policies.ImageOps.posterize))
    ours = build_transforms(train=True, **recipe)
    for number, path in enumerate(PHOTOS):
        image = read_image(path)
        results = []
        for function, argument in ((theirs, image), (ours, image), (ours.from_file, path)):
            seed(number)
            results.append(function(argument))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def patched_posterize(original):
    """Pillow's posterize as it was before version 13, which refuses to keep no bits."""
    return lambda image, bits: original(image, bits) if bits else Image.new(image.mode, image.size)


def test_the_strongest_posterize_does_not_end_a_training_run():
    transform = build_transforms(train=True, input_size=32, auto_augment="rand-m10-n8-mstd0-inc1")
    image = read_image(PHOTOS[0])
    for number in range(60):
        seed(number)
        transform(image)
    augmix = build_transforms(train=True, input_size=32, auto_augment="augmix-m10-w3")
    for number in range(30):
        seed(number)
        augmix(image)


@pytest.mark.parametrize("size", [(1000, 8), (6, 900), (1, 1), (2, 1), (1, 5000)])
def test_training_crops_exist_for_pictures_of_any_shape(size):
    transform = build_transforms(train=True, input_size=48)
    for number in range(40):
        seed(number)
        assert transform(Image.new("RGB", size)).shape == (3, 48, 48)


def test_grey_models_get_one_channel_in_training_and_evaluation():
    for train in (True, False):
        transform = build_transforms(train=train, input_size=(1, 32, 32), mean=(0.5,), std=(0.5,))
        assert transform(read_image(PHOTOS[0])).shape == (1, 32, 32)


@pytest.fixture(scope="module")
def camera(tmp_path_factory) -> Path:
    """A large smooth photograph as a JPEG in each EXIF orientation, all of them upright the same picture."""
    folder = tmp_path_factory.mktemp("camera")
    large = read_image(PHOTOS[0]).resize((1203, 1601), Image.Resampling.BICUBIC)
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpose that stores the picture so
    for orientation in range(1, 9):
        stored = large.transpose(Image.Transpose(inverse[orientation])) if orientation > 1 else large
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored.save(folder / f"{orientation}.jpg", quality=92, exif=exif)
    return folder


@pytest.mark.parametrize("orientation", range(1, 9))
def test_reduced_decoding_shows_the_same_crop_within_its_bound(camera, orientation, monkeypatch):
    options = dict(train=True, input_size=(3, 64, 96), color_jitter=None, normalize=False, interpolation="bilinear")
    full = build_transforms(reduced_decoding=False, **options)
    reduced = build_transforms(**options)
    decoded = []
    monkeypatch.setattr(
        transforms_module,
        "decode_rgb",
        lambda image, name, original=transforms_module.decode_rgb, **kw: (
            decoded.append(image.size) or original(image, name, **kw)
        ),
    )
    path = camera / f"{orientation}.jpg"
    for number in range(12):
        seed(number)
        expected = full.from_file(path).float()
        seed(number)
        found = reduced.from_file(path).float()
        assert 10 * torch.log10(255**2 / (expected - found).square().mean().clamp(min=1e-3)) > 40
    assert any(width < 700 for width, _ in decoded)  # some really were decoded at a lower resolution
    shutil.copy(path, path.with_name("cut.jpg"))
    os.truncate(path.with_name("cut.jpg"), path.stat().st_size // 2)
    with pytest.raises(ImageError, match=r"cut\.jpg is truncated"):
        reduced.from_file(path.with_name("cut.jpg"))


def test_evaluation_never_decodes_at_a_lower_resolution(camera, monkeypatch):
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", lambda *_: pytest.fail("draft in evaluation"))
    root = camera.parent / "set" / "val" / "a"
    root.mkdir(parents=True)
    shutil.copy(camera / "1.jpg", root)
    data = open_classification(root.parent.parent, "val", transform=build_transforms(train=False, input_size=32))
    assert data[0][0].shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"scale": (0.0, 1.0)}, "scale is (0.0, 1.0), expected (least, most) with 0 < least <= most <= 1"),
        ({"ratio": (2.0, 1.0)}, "ratio is (2.0, 1.0), expected (least, most) with 0 < least <= most"),
        ({"hflip": 1.5}, "hflip is 1.5, expected a probability between 0 and 1"),
        ({"random_erasing": 0.2, "normalize": False}, "random_erasing needs normalize=True"),
        ({"auto_augment": "rond-m9"}, "auto_augment is 'rond-m9', expected a timm policy such as"),
        ({"interpolation": "cubic"}, "interpolation is 'cubic', expected one of nearest, bilinear"),
        ({"input_size": (2, 8, 8)}, "input_size (2, 8, 8) has 2 channels, pictures have 3 (RGB) or 1 (grey)"),
    ],
)
def test_wrong_settings_are_named(options, sentence):
    with pytest.raises(ValueError) as error:
        build_transforms(train=True, **options)
    assert sentence in str(error.value)
