"""Images with boxes and masks, whatever the data set.

`open_detection` (in `detection_layouts`) reads COCO, YOLO and VOC layouts into one form, COCO's own: evaluation sees
the annotations exactly as COCO's tools do. Categories are mapped once, here: labels are 0..n-1 in the order of the
category ids, and `category_ids` leads back.

For training, as in COCO's tools and the papers' detectors: crowds are no targets, boxes are clipped to the image,
boxes without area are dropped, and so are (by default) images without any object. `check_detection` counts and
reports each of these before the first step, and names the first thing that is wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from zoo.extras import require
from zoo.images import ImageError, read_image
from zoo.train.data.errors import BadFile, DataError

_MIN_SIDE = 1e-3  # of a box in pixels, below which it has no area
SMALL, MEDIUM = 32**2, 96**2  # COCO's borders between small, medium and large areas, in pixels


class Objects(NamedTuple):
    """What is to be found in one image; crowds and boxes without area are left out.

    Attributes:
        boxes: float32 (N, 4), x0, y0, x1, y1 in pixels.
        labels: int64 (N,).
        masks: uint8 (N, H, W), or None.
        ids: annotation ids.
    """

    boxes: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None
    ids: tuple[int, ...]


@dataclass
class DetectionData:
    """One split of a data set.

    Attributes:
        coco: the split in COCO's format: `images`, `annotations`, `categories`; what evaluation reads.
        files: path of each image, in the order of `coco["images"]`.
        classes: names, in the order of the labels.
        category_ids: what the annotations call each label.
        source: the annotation file or folder, for messages.
        layout: "COCO", "YOLO" or "VOC".
        masks: give masks beside boxes.
        notes: how the layout was understood, and what was left out.
    """

    coco: dict[str, Any]
    files: list[Path]
    classes: list[str]
    category_ids: list[int]
    source: Path
    layout: Literal["COCO", "YOLO", "VOC"]
    masks: bool = False
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.label_of = {category: label for label, category in enumerate(self.category_ids)}
        self._of_image: dict[Any, list[dict]] = {image["id"]: [] for image in self.coco["images"]}
        for annotation in self.coco["annotations"]:
            if annotation.get("image_id") in self._of_image:
                self._of_image[annotation["image_id"]].append(annotation)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def paths(self) -> list[Path]:
        """The images' files."""
        return self.files

    @property
    def image_ids(self) -> list[Any]:
        """COCO's id of each image."""
        return [image["id"] for image in self.coco["images"]]

    def annotations(self, index: int) -> list[dict]:
        """The annotations of an image, as they are in the file."""
        return self._of_image[self.coco["images"][index]["id"]]

    def image(self, index: int) -> np.ndarray:
        """RGB uint8 (H, W, 3), upright.

        Raises:
            ImageError: it cannot be read; it is named.
        """
        return np.asarray(read_image(self.files[index]))

    def objects(self, index: int, masks: bool | None = None) -> Objects:
        """What is to be found in an image.

        Raises:
            DataError: an annotation has no mask where masks are asked for.
        """
        record = self.coco["images"][index]
        size = (record["height"], record["width"])
        kept = []
        for annotation in self.annotations(index):
            box = None if annotation.get("iscrowd") else clipped(annotation["bbox"], *size)
            if box is not None:
                kept.append((box, annotation))
        boxes = np.array([box for box, _ in kept], dtype=np.float32).reshape(-1, 4)
        labels = np.array([self.label_of[a["category_id"]] for _, a in kept], dtype=np.int64)
        drawn = None
        if self.masks if masks is None else masks:
            drawn = np.zeros((len(kept), *size), dtype=np.uint8)
            for canvas, (_, annotation) in zip(drawn, kept):
                canvas[:] = draw_mask(annotation, *size, self.source)
        return Objects(boxes, labels, drawn, tuple(a["id"] for _, a in kept))

    def subset(self, indices: Sequence[int], note: str = "") -> DetectionData:
        """The same data set with some of its images."""
        images = [self.coco["images"][i] for i in indices]
        ids = {image["id"] for image in images}
        coco = {
            **self.coco,
            "images": images,
            "annotations": [a for a in self.coco["annotations"] if a.get("image_id") in ids],
        }
        files = [self.files[i] for i in indices]
        notes = [*self.notes, *([note] if note else [])]
        return DetectionData(coco, files, self.classes, self.category_ids, self.source, self.layout, self.masks, notes)

    def with_objects(self) -> DetectionData:
        """Without the images that have nothing to be found."""
        kept = [i for i in range(len(self)) if any(not a.get("iscrowd") for a in self._usable(i))]
        dropped = len(self) - len(kept)
        return self if not dropped else self.subset(kept, f"{dropped} images without objects are not trained on")

    def _usable(self, index: int) -> list[dict]:
        record = self.coco["images"][index]
        size = (record["height"], record["width"])
        return [a for a in self.annotations(index) if clipped(a["bbox"], *size) is not None]


def clipped(bbox: Sequence[float], height: int, width: int) -> tuple[float, float, float, float] | None:
    """COCO's x, y, width, height as x0, y0, x1, y1 inside the image; None if nothing is left."""
    x, y, w, h = bbox
    x0, y0, x1, y1 = max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)
    return (x0, y0, x1, y1) if x1 - x0 >= _MIN_SIDE and y1 - y0 >= _MIN_SIDE else None


def draw_mask(annotation: dict, height: int, width: int, source: Path | str = "") -> np.ndarray:
    """uint8 (H, W) of an annotation's polygons or run lengths.

    Raises:
        DataError: it has neither, or they cannot be drawn; the annotation is named.
    """
    mask = require("pycocotools.mask", extra="train")
    segmentation = annotation.get("segmentation")
    if not segmentation:
        raise DataError(
            f"annotation {annotation.get('id')} in {source} has no segmentation, and masks are trained: use a head "
            "without masks, or add polygons"
        )
    try:
        if isinstance(segmentation, dict) and not isinstance(segmentation["counts"], list):
            return mask.decode(segmentation)
        return mask.decode(mask.merge(as_rles(segmentation, height, width)))
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"the segmentation of annotation {annotation.get('id')} in {source} is damaged: {error}"
        ) from error


def as_rles(segmentation: list | dict, height: int, width: int) -> list:
    """pycocotools' run lengths of polygons or of uncompressed run lengths."""
    mask = require("pycocotools.mask", extra="train")
    rles = mask.frPyObjects(segmentation, height, width)
    return rles if isinstance(rles, list) else [rles]


@dataclass(frozen=True)
class DetectionReport:
    """What one split holds.

    Attributes:
        images: usable images.
        objects: objects that are trained on.
        class_counts: of these, by name.
        sizes: of these, small, medium and large as COCO counts them.
        crowds: annotations of crowds: no targets, and in evaluation neither found nor missed.
        empty: images without any annotation.
        without_area: annotations whose box has no area inside the image: dropped in training.
        clipped: boxes that reach over the border of the image: cut off.
        unreadable: images that cannot be used, with the reason.
        notes: how the layout was understood.
    """

    images: int
    objects: int
    class_counts: dict[str, int]
    sizes: tuple[int, int, int]
    crowds: int
    empty: int
    without_area: tuple[Any, ...]
    clipped: int
    unreadable: tuple[BadFile, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        absent = [name for name, count in self.class_counts.items() if not count]
        small, medium, large = self.sizes
        lines = [
            f"{self.images} images, {self.objects} objects ({small} small, {medium} medium, {large} large) of "
            f"{len(self.class_counts) - len(absent)} classes"
        ]
        if absent:
            lines.append(f"no objects of {len(absent)} classes: {', '.join(absent[:8])}{' ...' * (len(absent) > 8)}")
        for count, what in (
            (self.crowds, "crowds, which are ignored"),
            (self.empty, "images without any annotation"),
            (len(self.without_area), f"boxes without area, dropped in training: {_some(self.without_area)}"),
            (self.clipped, "boxes cut off at the border of their image"),
            (len(self.unreadable), f"images that cannot be used: {_some([b.path for b in self.unreadable])}"),
        ):
            if count:
                lines.append(f"{count} {what}")
        return "\n".join([*lines, *self.notes])


def _some(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values[:5])) + (" ..." if len(values) > 5 else "")


def check_detection(
    data: DetectionData, *, on_bad: Literal["error", "skip"] = "error", decode: bool = False
) -> tuple[DetectionData, DetectionReport]:
    """Look at every annotation and every image file of a split before the first step.

    Args:
        data: the split.
        on_bad: what to do about images that cannot be read or have another size than the annotations say: name the
            first and stop, or leave them out and list them. Faults of annotations always stop.
        decode: decode every image to its last pixel instead of reading its header.

    Returns:
        The split without what was left out, and what it holds.

    Raises:
        DataError: the first fault, by file and annotation id.
    """
    crowds, cut, without_area = 0, 0, []
    counts: Counter[int] = Counter()
    sizes = [0, 0, 0]
    known = {image["id"]: image for image in data.coco["images"]}
    if len(known) != len(data.coco["images"]):
        twice = next(i for i, n in Counter(image["id"] for image in data.coco["images"]).items() if n > 1)
        raise DataError(f"two images in {data.source} have the id {twice!r}: ids must differ")
    seen: set[Any] = set()
    for number, annotation in enumerate(data.coco["annotations"]):
        name = f"annotation {annotation.get('id', f'number {number}')} in {data.source}"
        _check_annotation(annotation, name, known, data, seen)
        image = known[annotation["image_id"]]
        box = clipped(annotation["bbox"], image["height"], image["width"])
        x, y, w, h = annotation["bbox"]
        if annotation.get("iscrowd"):
            crowds += 1
        elif box is None:
            without_area.append(annotation["id"])
        else:
            cut += min(x, y) < -0.5 or x + w > image["width"] + 0.5 or y + h > image["height"] + 0.5
            counts[data.label_of[annotation["category_id"]]] += 1
            area = annotation.get("area") or w * h
            sizes[(area >= SMALL) + (area >= MEDIUM)] += 1
    bad = [fault for i in range(len(data)) if (fault := _image_fault(data, i, decode)) is not None]
    if bad and on_bad == "error":
        raise DataError(
            f"{bad[0].path}: {bad[0].reason}" + (f"; and {len(bad) - 1} more images" if len(bad) > 1 else ""), bad
        )
    if bad:
        names = {fault.path for fault in bad}
        data = data.subset([i for i, path in enumerate(data.files) if str(path) not in names])
    if not len(data):
        raise DataError(f"no usable image in {data.source}")
    report = DetectionReport(
        images=len(data),
        objects=sum(counts.values()),
        class_counts={name: counts[label] for label, name in enumerate(data.classes)},
        sizes=tuple(sizes),
        crowds=crowds,
        empty=sum(not data.annotations(i) for i in range(len(data))),
        without_area=tuple(without_area),
        clipped=cut,
        unreadable=tuple(bad),
        notes=tuple(data.notes),
    )
    return data, report


def _check_annotation(annotation: dict, name: str, images: dict, data: DetectionData, seen: set) -> None:
    missing = [key for key in ("id", "image_id", "category_id", "bbox") if key not in annotation]
    if missing:
        raise DataError(f"{name} has no {', '.join(missing)}")
    if annotation["id"] in seen:
        raise DataError(f"{name} has an id that another annotation has, too: evaluation needs them to differ")
    seen.add(annotation["id"])
    if annotation["image_id"] not in images:
        raise DataError(
            f"{name} belongs to image {annotation['image_id']!r}, which is not in the file's list of images"
        )
    if annotation["category_id"] not in data.label_of:
        raise DataError(
            f"{name} has category {annotation['category_id']!r}, which is not one of the file's {len(data.classes)} "
            "categories"
        )
    box = annotation["bbox"]
    numbers = isinstance(box, Sequence) and len(box) == 4 and all(isinstance(v, int | float) for v in box)
    if not numbers or not np.isfinite(box).all():
        raise DataError(f"{name} has the box {box!r}, expected four finite numbers: x, y, width, height")
    if data.masks and not annotation.get("iscrowd"):
        segmentation = annotation.get("segmentation")
        image = images[annotation["image_id"]]
        if clipped(box, image["height"], image["width"]) is not None:
            if not segmentation:
                raise DataError(
                    f"{name} has no segmentation, and masks are trained: use a head without masks, or add polygons"
                )
            if isinstance(segmentation, list) and any(len(p) < 6 or len(p) % 2 for p in segmentation):
                raise DataError(f"{name} has a polygon of fewer than three points or with half a point")


def _image_fault(data: DetectionData, index: int, decode: bool) -> BadFile | None:
    path, record = data.files[index], data.coco["images"][index]
    if not path.is_file():
        return BadFile(str(path), f"image {record['id']!r} of {data.source} is not there")
    try:
        if decode:
            size = read_image(path).size
        else:
            with Image.open(path) as file:
                size = file.size
                turned = file.getexif().get(0x0112, 1) >= 5
            size = size[::-1] if turned else size
    except (ImageError, OSError, SyntaxError, ValueError) as error:
        return BadFile(str(path), f"cannot be read: {error}")
    if size != (record["width"], record["height"]):
        return BadFile(
            str(path),
            f"is {size[0]}x{size[1]} px, and {data.source.name} says {record['width']}x{record['height']}: its boxes "
            "would be elsewhere",
        )
    return None


class DetectionSamples(Dataset):
    """A split with a transform; gives (image uint8 (3, H, W), target).

    A target has `boxes`, `labels`, `masks` (where the data has them) and `index`, the image's place in the split.

    Args:
        data: the split.
        transform: (image, boxes, labels, masks) -> the same; None for the whole image as it is.
    """

    def __init__(self, data: DetectionData, transform: Callable | None = None):
        self.data, self.transform = data, transform

    @property
    def classes(self) -> list[str]:
        """Names of the labels."""
        return self.data.classes

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image = self.data.image(index)
        objects = self.data.objects(index)
        boxes, labels, masks = objects.boxes, objects.labels, objects.masks
        if self.transform is not None:
            image, boxes, labels, masks = self.transform(image, boxes, labels, masks)
        target = {
            "boxes": torch.from_numpy(np.ascontiguousarray(boxes)),
            "labels": torch.from_numpy(np.ascontiguousarray(labels)),
            "index": torch.tensor(index),
        }
        if masks is not None:
            target["masks"] = torch.from_numpy(np.ascontiguousarray(masks))
        return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy()), target


class EvaluationImages(Dataset):
    """The whole images of a split, without targets: evaluation reads the annotations themselves.

    Gives (image uint8 (3, H, W), {"index": ...}, index).
    """

    def __init__(self, data: DetectionData):
        self.data = data

    @property
    def metainfo(self) -> dict[str, Any]:
        """The class names."""
        return {"classes": list(self.data.classes)}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor], int]:
        image = torch.from_numpy(self.data.image(index).transpose(2, 0, 1).copy())
        return image, {"index": torch.tensor(index)}, index


def collate_detection(samples: list[tuple]) -> dict[str, Any]:
    """A batch: `inputs` and `targets` are lists, one entry for each image; `keys` (B,) int64."""
    images, targets, keys = zip(*samples)
    return {"inputs": list(images), "targets": list(targets), "keys": torch.tensor(keys)}
