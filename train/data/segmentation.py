"""Images with labelled pixels, whatever the data set.

`open_segmentation` (in `segmentation_layouts`) recognises ADE20K, Cityscapes, COCO and plain folders. An annotation is
a few layers of segment ids and a list that says what each id is: one layer where segments cannot overlap, more where
instances do. A transform moves ids, not one mask after another.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from zoo.images import read_image
from zoo.train.data.errors import BadFile, DataError

Kind = Literal["semantic", "panoptic", "instance"]
KINDS = ("semantic", "panoptic", "instance")
IGNORED = 255
_IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


class SegmentInfo(NamedTuple):
    """What an id of a layer is: its class (0..n-1) and whether it stands for a crowd of objects."""

    id: int
    label: int
    crowd: bool = False


class Annotation(NamedTuple):
    """The labelled pixels of an image.

    Attributes:
        layers: int32 (L, H, W), ids of segments, 0 where there is none; a segment lies in one layer.
        segments: what the ids are.
    """

    layers: np.ndarray
    segments: tuple[SegmentInfo, ...]


@dataclass(frozen=True)
class Record:
    """An image and where its annotation comes from."""

    image: Path
    image_id: int | str
    labels: Path | None = None
    infos: tuple[dict[str, Any], ...] = ()


@dataclass
class SegmentationData:
    """One split of a data set.

    Attributes:
        kind: what the annotations are made into: one segment a class ("semantic"), things and stuff ("panoptic"), or
            things alone ("instance").
        classes: names, in the order of the labels 0..n-1.
        things: labels of which objects are told apart.
        category_ids: what the files call each label.
        records: the images.
        source: "masks" (label images), "panoptic" (COCO's coding) or "instances" (COCO's polygons).
        lookup: label images: value -> label, `IGNORED` for none, -1 for values that must not occur.
        annotation_file: the JSON of a COCO-style set.
        notes: how the layout was understood, and what was left out.
    """

    kind: Kind
    classes: list[str]
    things: tuple[int, ...]
    category_ids: list[int]
    records: list[Record]
    source: Literal["masks", "panoptic", "instances"]
    lookup: np.ndarray | None = None
    annotation_file: Path | None = None
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def paths(self) -> list[Path]:
        """The images' files."""
        return [record.image for record in self.records]

    def image(self, index: int) -> np.ndarray:
        """RGB uint8 (H, W, 3), upright.

        Raises:
            ImageError: it cannot be read; it is named.
        """
        return np.asarray(read_image(self.records[index].image))

    def annotation(self, index: int) -> Annotation:
        """The labelled pixels of an image.

        Raises:
            DataError: the label file is not usable; it and the value are named.
        """
        record = self.records[index]
        if self.source == "masks":
            return read_label_image(record.labels, self.lookup)
        if self.source == "instances":
            return draw_instances(record)
        return read_panoptic(record, self.kind)


def read_label_image(path: Path, lookup: np.ndarray) -> Annotation:
    """One segment a class, from an image whose values `lookup` turns into labels; raises as `annotation` does."""
    with Image.open(path) as file:
        if file.mode not in ("L", "P", "I;16", "I", "1"):
            raise DataError(
                f"the mask {path} is a {file.mode} image, expected one channel with a class number for each pixel: "
                "save it as a palette or grey PNG"
            )
        values = np.asarray(file).astype(np.int64)
    wrong = (values < 0) | (values >= len(lookup))
    if not wrong.any():
        labels = lookup[values]
        wrong = labels < 0
    if wrong.any():
        allowed = np.flatnonzero(lookup >= 0)
        raise DataError(
            f"the mask {path} has the value {int(values[wrong][0])} in {int(wrong.sum())} pixels, expected "
            f"{_ranges(allowed)}: correct the mask, or the list of classes"
        )
    present = [int(label) for label in np.unique(labels) if label != IGNORED]
    ids = np.where(labels == IGNORED, 0, labels + 1).astype(np.int32)
    return Annotation(ids[None], tuple(SegmentInfo(label + 1, label) for label in present))


def _ranges(values: np.ndarray) -> str:
    groups = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    return ", ".join(f"{g[0]}..{g[-1]}" if len(g) > 1 else str(g[0]) for g in groups)


def read_panoptic(record: Record, kind: Kind) -> Annotation:
    """Segments from a PNG in COCO's coding, id = R + 256 G + 65536 B; for "semantic" those of a class are one."""
    with Image.open(record.labels) as file:
        if file.mode not in ("RGB", "RGBA", "P"):
            raise DataError(f"the panoptic PNG {record.labels} is a {file.mode} image, expected RGB ids")
        rgb = np.asarray(file.convert("RGB")).astype(np.int32)
    raw = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
    found, inverse = np.unique(raw, return_inverse=True)
    described = {info["id"]: info for info in record.infos}
    unknown = [int(i) for i in found if i and int(i) not in described]
    if unknown:
        raise DataError(
            f"the panoptic PNG {record.labels} has pixels of segment {unknown[0]}, which its JSON does not describe"
        )
    new_ids, segments = np.zeros(len(found), dtype=np.int32), {}
    for position, old in enumerate(found.tolist()):
        info = described.get(old)
        if info is None or info["label"] is None:  # void, or stuff where only things are wanted
            continue
        if kind == "semantic":
            segment = SegmentInfo(info["label"] + 1, info["label"])
        else:
            segment = SegmentInfo(position + 1, info["label"], info["crowd"])
        new_ids[position] = segment.id
        segments[segment.id] = segment
    return Annotation(new_ids[inverse].reshape(raw.shape)[None], tuple(segments[k] for k in sorted(segments)))


def draw_instances(record: Record) -> Annotation:
    """COCO's polygons and run lengths as layers; each mask takes the first layer where it overlaps with none."""
    from pycocotools import mask as coco_mask

    if not record.infos:
        with Image.open(record.image) as file:
            return Annotation(np.zeros((1, file.height, file.width), dtype=np.int32), ())
    H, W = record.infos[0]["size"]
    layers: list[np.ndarray] = []
    segments = []
    for info in record.infos:
        shape = info["segmentation"]
        if not shape:
            continue
        try:
            if isinstance(shape, list):
                rle = coco_mask.merge(coco_mask.frPyObjects(shape, H, W))
            else:
                rle = coco_mask.frPyObjects(shape, H, W) if isinstance(shape["counts"], list) else shape
            mask = coco_mask.decode(rle).astype(bool)
        except Exception as error:  # pycocotools raises whatever its C code meets
            raise DataError(
                f"annotation {info['annotation']} of {record.image} has no readable mask: {error}"
            ) from error
        if mask.shape != (H, W):
            raise DataError(
                f"the mask of annotation {info['annotation']} of {record.image} is {mask.shape[1]}x{mask.shape[0]} px, "
                f"the image is {W}x{H}"
            )
        if not mask.any():
            continue
        layer = next((each for each in layers if not each[mask].any()), None)
        if layer is None:
            layer = np.zeros((H, W), dtype=np.int32)
            layers.append(layer)
        layer[mask] = info["id"]
        segments.append(SegmentInfo(info["id"], info["label"], info["crowd"]))
    return Annotation(np.stack(layers) if layers else np.zeros((1, H, W), dtype=np.int32), tuple(segments))


# ---- checks


class SegmentationReport(NamedTuple):
    """What `check_segmentation` found.

    Attributes:
        segments: annotated segments in all.
        empty: images without a segment.
        unreadable: images that cannot be read, with the reason.
        warnings: sentences for people.
    """

    segments: int
    empty: int
    unreadable: tuple[BadFile, ...]
    warnings: tuple[str, ...]


def check_segmentation(
    data: SegmentationData, *, on_bad: Literal["error", "skip"] = "error", drop_empty: bool = False
) -> SegmentationReport:
    """Look at every image and annotation before the first step.

    Args:
        data: is changed: unreadable images (with `on_bad="skip"`) and empty ones (with `drop_empty`) leave it.
        on_bad: whether an unreadable image is an error or left out and listed.
        drop_empty: leave out images without any segment, as training does.

    Raises:
        DataError: a label image of another size than its picture, or with a value that is no class; the first such file
            is named.
    """

    def look(index: int) -> tuple[int, str | None]:
        record = data.records[index]
        try:
            with Image.open(record.image) as file:
                file.draft("RGB", (1, 1))
                size = (file.height, file.width) if file.getexif().get(0x0112, 1) < 5 else (file.width, file.height)
                if data.source != "panoptic":
                    file.load()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return 0, f"{error}".strip() or type(error).__name__
        with Image.open(record.image) as file:  # draft mode changed what the first one said of its size
            size = (file.height, file.width) if file.getexif().get(0x0112, 1) < 5 else (file.width, file.height)
        annotation = data.annotation(index)
        if annotation.layers.shape[1:] != size:
            h, w = annotation.layers.shape[1:]
            raise DataError(
                f"the labels of {record.image} are {w}x{h} px ({record.labels or data.annotation_file}), the image is "
                f"{size[1]}x{size[0]} px: they must be equal"
            )
        return len(annotation.segments), None

    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(look, range(len(data))))
    unreadable = tuple(BadFile(str(data.records[i].image), why) for i, (_, why) in enumerate(seen) if why)
    if unreadable and on_bad == "error":
        raise DataError(
            f"{len(unreadable)} of {len(data)} images cannot be read, the first is {unreadable[0].path} "
            f"({unreadable[0].reason}): repair or remove them, or pass on_bad=skip",
            unreadable,
        )
    empty = sum(not n and not why for n, why in seen)
    keep = [i for i, (n, why) in enumerate(seen) if not why and (n or not drop_empty)]
    if not keep:
        raise DataError(
            f"none of the {len(data)} images can be used: {empty} have no segment, {len(unreadable)} are unreadable"
        )
    data.records[:] = [data.records[i] for i in keep]
    warnings = []
    if empty:
        warnings.append(f"{empty} images have no segment{' and are left out' if drop_empty else ''}")
    return SegmentationReport(sum(n for n, _ in seen), empty, unreadable, tuple(warnings))


# ---- what training sees

Transform = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


class TrainingSegments:
    """Map-style view of a data set for training: (image uint8 (3, H, W), {"labels", "masks"}).

    Args:
        data: annotated images.
        transform: (image, layers) -> (image, layers), drawing from Python's and NumPy's global generators.
    """

    def __init__(self, data: SegmentationData, transform: Transform):
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return self.data.classes

    def __getitem__(self, index: int):
        annotation = self.data.annotation(index)
        image, layers = self.transform(self.data.image(index), annotation.layers)
        labels, masks = [], []
        for segment in annotation.segments:
            if segment.crowd:
                continue
            mask = (layers == segment.id).any(axis=0)
            if mask.any():
                labels.append(segment.label)
                masks.append(mask)
        return np.ascontiguousarray(image.transpose(2, 0, 1)), {
            "labels": np.asarray(labels, dtype=np.int64),
            "masks": np.stack(masks) if masks else np.zeros((0, *image.shape[:2]), dtype=bool),
        }
