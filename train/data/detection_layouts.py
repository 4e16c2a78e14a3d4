"""Which detection data set a folder holds, and what its files say: COCO, YOLO or VOC, all as COCO's format.

COCO   annotations/instances_{train,val}*.json beside {train,val}2017/ or images/; {train,valid}/_annotations.coco.json
YOLO   data.yaml, images/{train,val}, labels/{train,val}: a text file an image, `class x y w h` or `class x y x y ...`
VOC    Annotations/*.xml, JPEGImages/, ImageSets/Main/{train,val}.txt
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from PIL import Image

from zoo.train.data.detection import DetectionData
from zoo.train.data.errors import DataError, DataNotFoundError

Split = Literal["train", "val"]
_SPLIT_NAMES = {"train": ("train", "trainval", "training"), "val": ("val", "valid", "validation", "minival", "test")}
_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_NOT_INSTANCES = ("panoptic", "captions", "keypoints", "stuff", "image_info")


def open_detection(
    root: str | Path,
    split: Split = "train",
    *,
    masks: bool = False,
    val_fraction: float = 0.2,
    seed: int = 42,
    classes: Sequence[str] | None = None,
) -> DetectionData:
    """One split of the data set in `root`, whose layout is recognised by its files.

    Args:
        root: folder of the data set.
        split: which part.
        masks: give masks beside boxes.
        val_fraction: part held out where the data set has no validation split of its own.
        seed: of that choice.
        classes: names that a model was trained with; they must be the data set's.

    Raises:
        DataNotFoundError: no such folder.
        DataError: none of these layouts, or files that do not follow them; the first fault is named.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataNotFoundError(f"no data set at {root}: give a folder")
    for recognise in (_open_coco, _open_yolo, _open_voc):
        splits = recognise(root)
        if splits:
            break
    else:
        raise DataError(
            f"{root} is no detection data set that zoo knows: expected annotations/instances_train*.json (COCO), "
            "data.yaml with images/ and labels/ (YOLO), or Annotations/ with JPEGImages/ (VOC)"
        )
    data = _choose(splits, split, val_fraction, seed, root)
    if classes is not None and list(classes) != data.classes:
        raise DataError(
            f"{data.source} has {len(data.classes)} classes ({', '.join(data.classes[:5])}, ...), the model was "
            f"trained with {len(classes)} others ({', '.join(list(classes)[:5])}, ...)"
        )
    data.masks = masks
    return data


def _choose(
    splits: dict[Split, Callable[[], DetectionData]], split: Split, val_fraction: float, seed: int, root: Path
) -> DetectionData:
    if "train" not in splits and "val" not in splits:
        raise DataError(f"{root} has neither a train nor a val split")
    if "val" in splits and "train" in splits:
        data = splits[split]()
        other = splits["train" if split == "val" else "val"]()
        if (data.classes, data.category_ids) != (other.classes, other.category_ids):
            raise DataError(
                f"{data.source} and {other.source} list different categories: "
                f"{_difference(data.classes, other.classes)}; a model has one list for both"
            )
        return data
    only = next(iter(splits.values()))()
    if "val" in splits:
        if split == "train":
            raise DataError(f"{root} has a val split only: there is nothing to train on")
        return only
    # a fixed share, chosen by name: the same images whatever else is in the folder
    keys = [hashlib.blake2b(f"{seed}:{path.name}".encode()).digest() for path in only.files]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    held_out = set(order[: max(1, round(val_fraction * len(order)))])
    chosen = [i for i in range(len(only)) if (i in held_out) == (split == "val")]
    if not chosen:
        raise DataError(f"{root} has {len(only)} images: too few to hold out a part for validation")
    return only.subset(chosen, f"no val split: {len(held_out)} of {len(only)} images are held out")


def _difference(a: list[str], b: list[str]) -> str:
    only = [*(name for name in a if name not in b), *(name for name in b if name not in a)]
    return ", ".join(only[:8]) if only else "the same names under other ids"


# --- COCO ------------------------------------------------------------------------------------------------


def _open_coco(root: Path) -> dict[Split, Callable[[], DetectionData]]:
    found: dict[Split, Path] = {}
    for split, names in _SPLIT_NAMES.items():
        for name in names:
            candidates = [*sorted((root / "annotations").glob(f"*{name}*.json")), *sorted(root.glob(f"*{name}*.json"))]
            candidates = [c for c in candidates if not any(word in c.name for word in _NOT_INSTANCES)]
            candidates.sort(key=lambda c: not c.name.startswith("instances"))
            if split == "val":
                candidates = [c for c in candidates if c != found.get("train")]
            candidates += [p for p in (root / name / "_annotations.coco.json",) if p.is_file()]
            if candidates:
                found[split] = candidates[0]
                break
    return {split: (lambda path=path: read_coco(path, root)) for split, path in found.items()}


def read_coco(path: Path, root: Path | None = None) -> DetectionData:
    """One COCO annotation file; images are looked for in the usual folders under `root`.

    Raises:
        DataError: not such a file; the first fault is named.
    """
    root = path.parent.parent if root is None else root
    try:
        coco = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a readable JSON file: {error}") from error
    missing = (
        [key for key in ("images", "annotations", "categories") if not isinstance(coco.get(key), list)]
        if (isinstance(coco, dict))
        else ["images"]
    )
    if missing:
        raise DataError(f"{path} has no list of {', '.join(missing)}: it is no COCO instances file")
    for image in coco["images"]:
        lacking = [key for key in ("id", "file_name", "width", "height") if key not in image]
        if lacking:
            raise DataError(f"image {image.get('id', image.get('file_name'))!r} in {path} has no {', '.join(lacking)}")
    categories = sorted(coco["categories"], key=lambda c: c["id"])
    ids = [c["id"] for c in categories]
    if len(set(ids)) != len(ids):
        raise DataError(f"two categories in {path} have the same id")
    notes = []
    if categories and categories[0].get("name", "").lower() in ("background", "__background__"):
        raise DataError(f"{path} lists {categories[0]['name']!r} as a category: the background is none, remove it")
    used = {a.get("category_id") for a in coco["annotations"]}
    if len(categories) > 1 and "supercategory" in categories[0] and ids[0] == 0 and 0 not in used:
        supers = {c.get("supercategory") for c in categories[1:]}
        if categories[0]["name"] in supers:  # Roboflow writes the group as a category of its own
            notes.append(f"category 0, {categories[0]['name']!r}, is the group of all others and not a class")
            categories, ids = categories[1:], ids[1:]
    folders = _image_folders(path, root)
    files = [_find_image(image["file_name"], folders) for image in coco["images"]]
    return DetectionData(coco, files, [c["name"] for c in categories], ids, path, "COCO", notes=notes)


def _image_folders(path: Path, root: Path) -> list[Path]:
    stem = path.stem.removeprefix("instances_").removeprefix("_annotations")
    split = next((s for s, names in _SPLIT_NAMES.items() if any(stem.startswith(n) for n in names)), "")
    names = [stem, split, *(f"{n}2017" for n in (split,) if n), "images", f"images/{stem}", f"images/{split}", "."]
    return [path.parent, *(root / name for name in dict.fromkeys(names) if name)]


def _find_image(name: str, folders: list[Path]) -> Path:
    """The first folder that has it; if none has, the second (the first beside the annotations), for the message."""
    found = next((folder / name for folder in folders if (folder / name).is_file()), None)
    return found or folders[min(1, len(folders) - 1)] / name


# --- YOLO ------------------------------------------------------------------------------------------------


def _open_yolo(root: Path) -> dict[Split, Callable[[], DetectionData]]:
    config_path = next((p for p in (*sorted(root.glob("*.yaml")), *sorted(root.glob("*.yml")))), None)
    config: dict[str, Any] = {}
    if config_path is not None:
        import yaml

        try:
            config = yaml.safe_load(config_path.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise DataError(f"{config_path} is not a readable YAML file: {error}") from error
    if not (root / "labels").is_dir() and not any((root / n / "labels").is_dir() for n in ("train", "valid", "val")):
        return {}
    names = config.get("names")
    if isinstance(names, dict):
        names = [names[key] for key in sorted(names)]
    if names is None and (root / "classes.txt").is_file():
        names = (root / "classes.txt").read_text(encoding="utf-8").split("\n")
        names = [name.strip() for name in names if name.strip()]
    if not names:
        raise DataError(f"{root} has labels/ but no class names: add data.yaml with `names: [...]`, or classes.txt")
    folders: dict[Split, Path] = {}
    for split, alternatives in _SPLIT_NAMES.items():
        given = config.get(split)
        candidates = []
        if isinstance(given, str):
            candidates = [root / str(config.get("path", ".")) / given, root / given, root / given.removeprefix("../")]
        for name in alternatives:
            candidates += [root / "images" / name, root / name / "images"]
        folder = next((c for c in candidates if c.is_dir()), None)
        if folder is not None:
            folders[split] = folder
    if not folders and (root / "images").is_dir():
        folders["train"] = root / "images"
    names = [str(name) for name in names]
    return {split: (lambda folder=folder: _read_yolo(folder, names)) for split, folder in folders.items()}


def _read_yolo(folder: Path, names: list[str]) -> DetectionData:
    parts = list(folder.parts)
    if "images" in parts:
        place = len(parts) - 1 - parts[::-1].index("images")
        parts[place] = "labels"
    labels = Path(*parts)
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _IMAGES)
    if not files:
        raise DataError(f"no images in {folder}")
    images, annotations = [], []
    for number, path in enumerate(files):
        width, height = _size(path)
        images.append({"id": number, "file_name": path.name, "width": width, "height": height})
        text = labels / path.relative_to(folder).with_suffix(".txt")
        if not text.is_file():
            continue
        for line_number, line in enumerate(text.read_text().splitlines(), 1):
            if line.strip():
                annotation = _yolo_annotation(line, width, height, len(names), f"{text}, line {line_number}")
                annotations.append(annotation | {"id": len(annotations) + 1, "image_id": number})
    coco = _as_coco(images, annotations, names)
    return DetectionData(coco, files, names, list(range(len(names))), labels, "YOLO")


def _yolo_annotation(line: str, width: int, height: int, classes: int, where: str) -> dict[str, Any]:
    try:
        first, *numbers = line.split()
        label, values = int(float(first)), [float(v) for v in numbers]
    except ValueError as error:
        raise DataError(f"{where}: {line.strip()!r} is not a class number and coordinates") from error
    if not 0 <= label < classes:
        raise DataError(f"{where}: class {label}, expected 0..{classes - 1}: check the names in data.yaml")
    if any(not -0.1 <= v <= 1.1 for v in values):
        raise DataError(f"{where}: coordinates outside 0..1, expected parts of the image's width and height")
    if len(values) == 4:
        x, y, w, h = values
        box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
        return {"category_id": label, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
    if len(values) < 6 or len(values) % 2:
        raise DataError(f"{where}: {len(values)} coordinates, expected 4 of a box or 6 and more of a polygon")
    polygon = [v * (width, height)[i % 2] for i, v in enumerate(values)]
    xs, ys = polygon[::2], polygon[1::2]
    box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    area = abs(sum(xs[i - 1] * ys[i] - xs[i] * ys[i - 1] for i in range(len(xs)))) / 2
    return {"category_id": label, "bbox": box, "area": area, "iscrowd": 0, "segmentation": [polygon]}


# --- VOC -------------------------------------------------------------------------------------------------


def _open_voc(root: Path) -> dict[Split, Callable[[], DetectionData]]:
    nested = [p.parent for p in sorted(root.glob("*/Annotations")) + sorted(root.glob("*/*/Annotations"))]
    root = root if (root / "Annotations").is_dir() else next(iter(nested), root)
    folder = root / "Annotations"
    if not folder.is_dir() or not any(folder.glob("*.xml")):
        return {}
    lists: dict[Split, list[str]] = {}
    for split, names in _SPLIT_NAMES.items():
        for name in names:
            path = root / "ImageSets" / "Main" / f"{name}.txt"
            if path.is_file() and split not in lists:
                lists[split] = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    if not lists:
        lists["train"] = sorted(p.stem for p in folder.glob("*.xml"))
    stems = dict.fromkeys(stem for own in lists.values() for stem in own)
    trees = {stem: _voc_tree(folder / f"{stem}.xml") for stem in stems}
    classes = sorted({o.findtext("name", "").strip() for tree in trees.values() for o in tree.iter("object")})
    return {split: (lambda own=own: _read_voc(root, own, trees, classes)) for split, own in lists.items()}


def _voc_tree(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise DataError(f"{path} is not a readable VOC annotation: {error}") from error


def _read_voc(root: Path, stems: list[str], trees: dict[str, ElementTree.Element], classes: list[str]) -> DetectionData:
    files, images, annotations = [], [], []
    for number, stem in enumerate(stems):
        tree = trees[stem]
        name = tree.findtext("filename") or f"{stem}.jpg"
        path = root / "JPEGImages" / name
        if not path.is_file():
            path = next((p for s in _IMAGES if (p := root / "JPEGImages" / f"{stem}{s}").is_file()), path)
        width, height = _size(path)
        files.append(path)
        images.append({"id": number, "file_name": path.name, "width": width, "height": height})
        for place, item in enumerate(tree.iter("object")):
            where = f"object {place + 1} of {root / 'Annotations' / stem}.xml"
            box = item.find("bndbox")
            try:
                x0, y0, x1, y1 = (float(box.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax"))
            except (TypeError, ValueError, AttributeError) as error:
                raise DataError(f"{where} has no bndbox of xmin, ymin, xmax and ymax") from error
            bbox = [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1]  # VOC counts pixels from 1 and includes the last
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": classes.index(item.findtext("name", "").strip()),
                    "bbox": bbox,
                    "area": bbox[2] * bbox[3],
                    # "difficult" objects count neither as found nor as missed, as crowds in COCO
                    "iscrowd": int(item.findtext("difficult", "0").strip() == "1"),
                }
            )
    coco = _as_coco(images, annotations, classes)
    notes = []
    difficult = sum(a["iscrowd"] for a in annotations)
    if difficult:
        notes.append(f"{difficult} objects are marked as difficult and treated as crowds")
    return DetectionData(coco, files, classes, list(range(len(classes))), root / "Annotations", "VOC", notes=notes)


def _as_coco(images: list[dict], annotations: list[dict], names: list[str]) -> dict[str, Any]:
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
    }


def _size(path: Path) -> tuple[int, int]:
    """Width and height of a picture, upright."""
    try:
        with Image.open(path) as file:
            turned = file.getexif().get(0x0112, 1) >= 5
            return file.size[::-1] if turned else file.size
    except FileNotFoundError as error:
        raise DataError(f"there is no image {path}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
