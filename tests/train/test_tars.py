"""Tar files are data sets like folders: the same pictures, classes, order and shares, read at their places."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from zoo.images import read_image
from zoo.train.data.classification import check_dataset, open_classification
from zoo.train.data.errors import DataError, DataNotFoundError
from zoo.train.data.tars import TarPicture
from zoo.train.loading import EpochSampler, SeededDataset, collate
from zoo.train.trainer import train

CLASSES = ("dress", "hat", "pants")


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def pictures(folder: Path) -> list[tuple[str, Path]]:
    return [(p.parent.name, p) for p in sorted(folder.glob("*/*"))]


def shards(photos: Path, target: Path, count: int = 3) -> Path:
    """WebDataset's layout: samples of all classes spread over shards."""
    target.mkdir()
    for split in ("train", "val"):
        samples = list(enumerate(pictures(photos / split)))
        for shard in range(count):
            with tarfile.open(target / f"clothes-{split}-{shard:04d}.tar", "w") as archive:
                for number, (name, path) in samples[shard::count]:
                    add(archive, f"{number:06d}.jpg", path.read_bytes())
                    add(archive, f"{number:06d}.cls", str(CLASSES.index(name)).encode())
                    add(archive, f"{number:06d}.json", json.dumps({"filename": path.name}).encode())
    (target / "classes.txt").write_text("\n".join(CLASSES))
    return target


def class_folder_tars(photos: Path, target: Path) -> Path:
    target.mkdir()
    for split in ("train", "val"):
        with tarfile.open(target / f"{split}.tar", "w") as archive:
            archive.add(photos / split, arcname=split)
    return target


def content(data) -> set[tuple[bytes, str]]:
    return {(read_image(path).tobytes(), data.classes[data.target(i)]) for i, path in enumerate(data.paths)}


@pytest.mark.parametrize("make", [shards, class_folder_tars])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_tar_holds_the_pictures_and_classes_of_the_folder(photos, tmp_path, make, split):
    root = make(photos, tmp_path / "tars")
    data, folder = open_classification(root, split), open_classification(photos, split)
    assert data.classes == list(CLASSES)
    assert content(data) == content(folder)
    assert data.class_counts().tolist() == folder.class_counts().tolist()
    # a second time from the index, whose places are the same
    assert (root / ".zoo_index").is_dir()
    again = open_classification(root, split)
    assert [p.read_bytes() for p in again.paths] == [p.read_bytes() for p in data.paths]
    report = check_dataset(data)
    assert report.splits[0].pictures == len(folder)


def test_a_changed_tar_is_indexed_anew(photos, tmp_path):
    root = class_folder_tars(photos, tmp_path / "tars")
    before = len(open_classification(root, "train"))
    with tarfile.open(root / "train.tar", "a") as archive:
        add(archive, "train/hat/more.jpg", pictures(photos / "train")[0][1].read_bytes())
    assert len(open_classification(root, "train")) == before + 1


def test_every_picture_comes_exactly_once_an_epoch_over_ranks_and_workers(photos, tmp_path):
    data = open_classification(shards(photos, tmp_path / "tars"), "train", transform=lambda image: np.zeros((3, 1, 1)))
    seen: list[int] = []
    for rank in range(2):
        sampler = EpochSampler(len(data), 3, seed=1, rank=rank, world_size=2)
        sampler.set_epoch(4)
        loader = DataLoader(SeededDataset(data, 1), 3, sampler=sampler, num_workers=2, collate_fn=collate)
        seen += [int(key) % len(data) for batch in loader for key in batch["keys"]]
    assert sorted(seen) == list(range(len(data)))


def test_training_from_shards_is_training_from_the_folder(recipe, photos, tmp_path):
    root = class_folder_tars(photos, tmp_path / "tars")
    results = [
        train(recipe.replace(data=str(source), out=str(tmp_path / name), epochs=1), quiet=True, say=lambda _: None)
        for name, source in (("a", photos), ("b", root))
    ]
    assert results[0].evaluation.scores == results[1].evaluation.scores
    assert (tmp_path / "b" / "worst_mistakes.png").is_file()


def test_imagenets_archives_are_read_as_they_come(photos, tmp_path, monkeypatch):
    wnids = ("n01440764", "n01443537", "n02084071")  # the last one is no class of ImageNet-1k's
    root = tmp_path / "imagenet"
    root.mkdir()
    source = pictures(photos / "train")
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid, name in zip(wnids[:2], CLASSES):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for own, path in source:
                    if own == name:
                        add(archive, f"{wnid}_{path.stem}.JPEG", path.read_bytes())
            add(outer, f"{wnid}.tar", inner.getvalue())
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as archive:
        for number, (_, path) in enumerate(source[:3], start=1):
            add(archive, f"ILSVRC2012_val_{number:08d}.JPEG", path.read_bytes())
    data = open_classification(root, "train")
    assert len(data.classes) == 1000
    assert np.bincount(data.targets)[:2].tolist() == [12, 12]
    assert data.paths[0].read_bytes() == source[0][1].read_bytes()
    with pytest.raises(DataError, match=r"ILSVRC2012_devkit_t12\.tar\.gz beside it"):
        open_classification(root, "val")

    from scipy.io import savemat

    table = np.array([(i + 1, wnids[i]) for i in range(2)], dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")])
    meta = io.BytesIO()
    savemat(meta, {"synsets": table})
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        add(archive, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        add(archive, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", b"2\n1\n2\n")
    assert open_classification(root, "val").targets.tolist() == [1, 0, 1]


def test_a_place_reads_seeks_and_travels_to_workers(photos, tmp_path):
    data = open_classification(class_folder_tars(photos, tmp_path / "tars"), "train")
    place = data.paths[5]
    assert isinstance(place, TarPicture)
    copied = pickle.loads(pickle.dumps(place))
    assert (copied, copied.read_bytes()) == (place, place.read_bytes())
    with place.open() as file:
        file.seek(-2, io.SEEK_END)
        assert file.read() == b"\xff\xd9"  # a JPEG's end, not the tar's padding
        assert file.read() == b""


def test_a_part_is_held_out_where_no_tar_says_its_split(photos, tmp_path):
    file = tmp_path / "clothes.tar"
    with tarfile.open(file, "w") as archive:
        archive.add(photos / "train", arcname="")
    parts = [{str(p) for p in open_classification(file, split).paths} for split in ("train", "val")]
    assert not parts[0] & parts[1]
    assert len(parts[0] | parts[1]) == 36


def test_unpacked_folders_count_before_the_archive_beside_them(photos):
    with tarfile.open(photos / "photos.tar", "w") as archive:
        archive.add(photos / "train", arcname="train")
    assert not any(isinstance(p, TarPicture) for p in open_classification(photos, "train").paths)


def test_bad_tar_files_get_one_sentence(photos, tmp_path):
    root = class_folder_tars(photos, tmp_path / "tars")
    whole = (root / "train.tar").read_bytes()
    (root / "train.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"train\.tar is truncated"):
        open_classification(root, "train")
    (root / "train.tar").write_bytes(gzip.compress(whole))
    with pytest.raises(DataError, match=r"train\.tar is compressed"):
        open_classification(root, "train")
    with tarfile.open(root / "train.tar", "w") as archive:
        add(archive, "picture.jpg", pictures(photos / "val")[0][1].read_bytes())
    with pytest.raises(DataError, match=r"train\.tar/picture\.jpg has no class: .*picture\.cls"):
        open_classification(root, "train")
    shutil.rmtree(root / ".zoo_index")
    (root / "train.tar").rename(root / "test.tar")
    with pytest.raises(DataNotFoundError, match="no tar file of the split 'train'"):
        open_classification(root, "train")


def test_a_picture_that_is_broken_inside_a_tar_is_named(photos, tmp_path):
    bad = pictures(photos / "train")[0][1]
    bad.write_bytes(bad.read_bytes()[:300])
    root = class_folder_tars(photos, tmp_path / "tars")
    with pytest.raises(DataError, match=f"train.tar/train/dress/{bad.name}"):
        check_dataset(open_classification(root, "train"))
