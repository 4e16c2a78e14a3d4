"""Which data set a folder holds, and what its files say: COCO, ADE20K, Cityscapes, or images/ with masks/."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from zoo.train.data.errors import DataError, DataNotFoundError
from zoo.train.data.segmentation import IGNORED, KINDS, Kind, Record, SegmentationData

_IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


def open_segmentation(
    root: str | Path,
    split: Literal["train", "val"] = "train",
    kind: Kind = "semantic",
    *,
    val_fraction: float = 0.2,
    seed: int = 42,
    classes: Sequence[str] | None = None,
) -> SegmentationData:
    """One split of the data set in `root`, whose layout is recognised by its folders.

    - COCO: `annotations/panoptic_{split}*.json` with its PNGs, or `annotations/instances_{split}*.json`, beside
      `{split}2017/`.
    - ADE20K (SceneParsing): `images/{training,validation}`, `annotations/{training,validation}`, `objectInfo150.txt`;
      panoptic with `ade20k_panoptic_{train,val}.json` and the folder of the same name.
    - Cityscapes: `leftImg8bit/{split}` and `gtFine/{split}`; panoptic with `gtFine/cityscapes_panoptic_{split}.json`.
    - your own: `images/` and `masks/` (or both inside `train/` and `val/`), a mask for each image with the same stem:
      one channel, values 0..n-1, 255 for pixels that do not count; names in `classes.txt`, a line each.

    Args:
        root: folder of the data set.
        split: which part.
        kind: what to make of the annotations.
        val_fraction: part held out where the data set has no validation split of its own.
        seed: of that choice.
        classes: names that a model was trained with; they must be the data set's.

    Raises:
        DataNotFoundError: no such folder.
        DataError: none of these layouts, or one that has no annotations of this kind.
    """
    root = Path(root)
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    if not root.is_dir():
        raise DataNotFoundError(f"no data set at {root}: give a folder")
    for recognise in (_open_coco, _open_cityscapes, _open_ade20k, _open_plain):
        data = recognise(root, split, kind, val_fraction, seed)
        if data is not None:
            break
    else:
        raise DataError(
            f"{root} holds none of the layouts of COCO (annotations/*.json), ADE20K (annotations/training), Cityscapes "
            "(leftImg8bit, gtFine) and images/ with masks/: arrange it as one of these"
        )
    if not data.records:
        raise DataError(f"{root} has no {split} images with annotations: check its folders")
    if classes is not None and list(classes) != data.classes:
        raise DataError(
            f"{root} has the classes {_some(data.classes)}, the model knows {_some(classes)}: use the data set that it "
            "was trained on, or train a new model"
        )
    return data


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return f"{', '.join(map(str, names[:5]))}{', ...' if len(names) > 5 else ''} ({len(names)})"


# ---- label images


def _open_ade20k(root: Path, split: str, kind: Kind, val_fraction: float, seed: int) -> SegmentationData | None:
    folder = {"train": "training", "val": "validation"}[split]
    if not (root / "annotations" / "training").is_dir() and not (root / "annotations" / "validation").is_dir():
        return None
    if kind != "semantic":
        for name in (f"ade20k_panoptic_{split}", f"ade20k_panoptic_{folder}"):
            if (root / f"{name}.json").is_file():
                return _open_panoptic_file(root / f"{name}.json", [root / name], [root / "images" / folder], kind)
        raise DataError(
            f"{root} has label images only, and {kind} segmentation needs ade20k_panoptic_{split}.json with its "
            "folder: prepare them, or train with semantic"
        )
    names = _ade20k_names(root)
    lookup = np.full(256, -1, dtype=np.int64)
    lookup[0], lookup[1 : len(names) + 1] = IGNORED, np.arange(len(names))
    records, notes = _pair(root / "images" / folder, root / "annotations" / folder)
    ids = list(range(1, len(names) + 1))
    return SegmentationData("semantic", names, (), ids, records, "masks", lookup, notes=["ADE20K SceneParsing", *notes])


def _ade20k_names(root: Path) -> list[str]:
    path = root / "objectInfo150.txt"
    if not path.is_file():
        return [f"class {i}" for i in range(1, 151)]
    lines = [line.rstrip("\n").split("\t") for line in path.read_text().splitlines()[1:] if line.strip()]
    return [line[-1].split(",")[0].strip() for line in lines]


# the 19 evaluated classes of Cityscapes: label id, name, whether objects are told apart
_CITYSCAPES = (
    (7, "road", False),
    (8, "sidewalk", False),
    (11, "building", False),
    (12, "wall", False),
    (13, "fence", False),
    (17, "pole", False),
    (19, "traffic light", False),
    (20, "traffic sign", False),
    (21, "vegetation", False),
    (22, "terrain", False),
    (23, "sky", False),
    (24, "person", True),
    (25, "rider", True),
    (26, "car", True),
    (27, "truck", True),
    (28, "bus", True),
    (31, "train", True),
    (32, "motorcycle", True),
    (33, "bicycle", True),
)


def _open_cityscapes(root: Path, split: str, kind: Kind, val_fraction: float, seed: int) -> SegmentationData | None:
    images = root / "leftImg8bit" / split
    if not images.is_dir() or not (root / "gtFine").is_dir():
        return None
    if kind != "semantic":
        path = root / "gtFine" / f"cityscapes_panoptic_{split}.json"
        if not path.is_file():
            raise DataError(
                f"{path} is missing, which {kind} segmentation needs: make it with cityscapesscripts "
                "(createPanopticImgs), or train with semantic"
            )
        return _open_panoptic_file(
            path, [path.with_suffix("")], sorted(p for p in images.iterdir() if p.is_dir()), kind
        )
    lookup = np.full(256, IGNORED, dtype=np.int64)
    lookup[34:] = -1
    lookup[255] = IGNORED
    lookup[[label for label, _, _ in _CITYSCAPES]] = np.arange(len(_CITYSCAPES))
    records, missing = [], []
    for image in sorted(images.rglob("*_leftImg8bit.png")):
        stem = image.name.removesuffix("_leftImg8bit.png")
        labels = root / "gtFine" / split / image.parent.name / f"{stem}_gtFine_labelIds.png"
        (records if labels.is_file() else missing).append(Record(image, stem, labels))
    notes = ["Cityscapes, 19 classes"]
    if missing:
        notes.append(f"{len(missing)} images have no labels and are left out, the first is {missing[0].image}")
    return SegmentationData(
        "semantic",
        [name for _, name, _ in _CITYSCAPES],
        (),
        [label for label, _, _ in _CITYSCAPES],
        records,
        "masks",
        lookup,
        notes=notes,
    )


def _open_plain(root: Path, split: str, kind: Kind, val_fraction: float, seed: int) -> SegmentationData | None:
    own_splits = (root / "train" / "images").is_dir() and (root / "train" / "masks").is_dir()
    base = root / split if own_splits else root
    if own_splits and not (base / "images").is_dir():
        raise DataError(
            f"{root} has a train folder and no {split}/images: add it, or put images/ and masks/ into {root}"
        )
    if not (base / "images").is_dir() or not (base / "masks").is_dir():
        return None
    if kind != "semantic":
        raise DataError(
            f"{root} has masks of classes, and {kind} segmentation needs objects that are told apart: give COCO "
            "annotations, or train with semantic"
        )
    records, notes = _pair(base / "images", base / "masks")
    if not own_splits:
        order = np.random.default_rng(seed).permutation(len(records))
        held_out = set(order[: max(1, round(val_fraction * len(records)))].tolist()) if len(records) > 1 else set()
        records = [r for i, r in enumerate(records) if (i in held_out) == (split == "val")]
        notes.append(f"{len(held_out)} of {len(order)} images are held out for validation (seed {seed})")
    names = _plain_names(root, base)
    lookup = np.full(65536, -1, dtype=np.int64)
    lookup[: len(names)], lookup[IGNORED] = np.arange(len(names)), IGNORED
    return SegmentationData(
        "semantic", names, (), list(range(len(names))), records, "masks", lookup, notes=["images/ and masks/", *notes]
    )


def _plain_names(root: Path, base: Path) -> list[str]:
    path = root / "classes.txt"
    if path.is_file():
        names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        if not names or len(set(names)) < len(names) or len(names) > IGNORED:
            raise DataError(f"{path} has {len(names)} names, expected 1 to 255 different ones, a line each")
        return names
    # without names, every split must still find the same number of classes
    top = 0
    for masks in sorted({*root.glob("*/masks"), *root.glob("masks"), base / "masks"}):
        for path in sorted(masks.iterdir()):
            if path.suffix.lower() in _IMAGES:
                with Image.open(path) as file:
                    values = np.unique(np.asarray(file)) if len(file.getbands()) == 1 else np.zeros(1)
                top = max(top, int(max((v for v in values.tolist() if v != IGNORED), default=0)))
    return [f"class {i}" for i in range(top + 1)]


def _pair(images: Path, masks: Path) -> tuple[list[Record], list[str]]:
    """Images and masks of the same stem; what has no partner is counted."""
    if not images.is_dir() or not masks.is_dir():
        raise DataNotFoundError(f"no folder {images if not images.is_dir() else masks}")
    labels = {p.stem: p for p in sorted(masks.iterdir()) if p.suffix.lower() in _IMAGES}
    pictures = [p for p in sorted(images.iterdir()) if p.suffix.lower() in _IMAGES]
    records = [Record(p, p.stem, labels[p.stem]) for p in pictures if p.stem in labels]
    notes = []
    alone = [p for p in pictures if p.stem not in labels]
    if alone:
        notes.append(f"{len(alone)} images have no mask and are left out, the first is {alone[0]}")
    unused = labels.keys() - {p.stem for p in pictures}
    if unused:
        notes.append(f"{len(unused)} masks have no image, the first is {labels[min(unused)]}")
    return records, notes


# ---- COCO


def _open_coco(root: Path, split: str, kind: Kind, val_fraction: float, seed: int) -> SegmentationData | None:
    folder = root / "annotations"
    panoptic = sorted(folder.glob(f"panoptic_{split}*.json"))
    instances = sorted(folder.glob(f"instances_{split}*.json"))
    if not panoptic and not instances:
        return None
    if kind == "instance" and instances:
        return _open_instances(instances[0], _coco_images(root, instances[0]))
    if not panoptic:
        raise DataError(
            f"{folder} has {instances[0].name} only, and {kind} segmentation needs panoptic_{split}*.json: get it, or "
            "train with instance"
        )
    path = panoptic[0]
    return _open_panoptic_file(path, [root / path.stem, path.with_suffix("")], _coco_images(root, path), kind)


def _coco_images(root: Path, annotations: Path) -> list[Path]:
    name = annotations.stem.split("_", 1)[1]
    return [root / name, root / "images" / name, root / "images", root]


def _read_json(path: Path, *fields: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    missing = [f for f in fields if f not in content] if isinstance(content, dict) else list(fields)
    if missing:
        raise DataError(f"{path} has no {', '.join(missing)}: it is no annotation file of COCO")
    return content


def _locate(name: str, folders: Sequence[Path], path: Path) -> Path:
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise DataNotFoundError(f"{path} names the file {name}, which is not in {', '.join(map(str, folders))}")


def _open_panoptic_file(
    path: Path, png_folders: Sequence[Path], image_folders: Sequence[Path], kind: Kind
) -> SegmentationData:
    content = _read_json(path, "images", "annotations", "categories")
    # things first, as COCO orders its categories; each file category has one label
    categories = sorted(content["categories"], key=lambda c: c["id"])
    if kind == "instance":
        categories = [c for c in categories if c.get("isthing", 1)]
    labels = {c["id"]: i for i, c in enumerate(categories)}
    known = {c["id"] for c in content["categories"]}
    by_id = {image["id"]: image for image in content["images"]}
    records, notes = [], [f"COCO panoptic annotations of {path.name}"]
    for annotation in content["annotations"]:
        for info in annotation["segments_info"]:
            if info["category_id"] not in known:
                raise DataError(
                    f"{path}: segment {info['id']} of {annotation['file_name']} has category_id {info['category_id']}, "
                    "which is not in its categories"
                )
        image = by_id.get(annotation["image_id"])
        if image is None:
            raise DataError(f"{path}: annotation of {annotation['file_name']} has image_id {annotation['image_id']}, "
                            "which is not in its images")  # fmt: skip
        infos = tuple(
            {"id": s["id"], "label": labels.get(s["category_id"]), "crowd": bool(s.get("iscrowd", 0))}
            for s in annotation["segments_info"]
        )
        records.append(
            Record(
                _locate_image(image, annotation, image_folders, path),
                annotation["image_id"],
                _locate(annotation["file_name"], png_folders, path),
                infos,
            )
        )
    return SegmentationData(
        kind,
        [c["name"] for c in categories],
        tuple(i for i, c in enumerate(categories) if c.get("isthing", 1)) if kind != "semantic" else (),
        [c["id"] for c in categories],
        records,
        "panoptic",
        annotation_file=path,
        notes=notes,
    )


def _locate_image(image: dict, annotation: dict, folders: Sequence[Path], path: Path) -> Path:
    name = image.get("file_name") or Path(annotation["file_name"]).with_suffix(".jpg").name
    try:
        return _locate(name, folders, path)
    except DataNotFoundError:
        # Cityscapes' file calls the images gtFine
        return _locate(name.replace("_gtFine_leftImg8bit", "_leftImg8bit"), folders, path)


def _open_instances(path: Path, image_folders: Sequence[Path]) -> SegmentationData:
    content = _read_json(path, "images", "categories")
    categories = sorted(content["categories"], key=lambda c: c["id"])
    labels = {c["id"]: i for i, c in enumerate(categories)}
    grouped: dict[Any, list[dict]] = {}
    for annotation in content.get("annotations", []):
        if annotation["category_id"] not in labels:
            raise DataError(
                f"{path}: annotation {annotation['id']} has category_id {annotation['category_id']}, which is not in "
                "its categories"
            )
        grouped.setdefault(annotation["image_id"], []).append(annotation)
    records = [
        Record(
            _locate(image["file_name"], image_folders, path),
            image["id"],
            None,
            tuple(
                {
                    "id": n + 1,
                    "label": labels[a["category_id"]],
                    "crowd": bool(a.get("iscrowd", 0)),
                    "segmentation": a.get("segmentation"),
                    "size": (image["height"], image["width"]),
                    "annotation": a["id"],
                }
                for n, a in enumerate(grouped.get(image["id"], []))
            ),
        )
        for image in content["images"]
    ]
    return SegmentationData(
        "instance",
        [c["name"] for c in categories],
        tuple(range(len(categories))),
        [c["id"] for c in categories],
        records,
        "instances",
        annotation_file=path,
        notes=[f"COCO instances of {path.name}"],
    )
