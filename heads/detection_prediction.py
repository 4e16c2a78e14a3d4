"""From pictures of any kind and size to named boxes (and masks): `model.predict(image)` of every detector.

found = model.predict("street.jpg")
found.draw("street.jpg").save("boxes.png")
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from zoo.heads.masks import encode_rle
from zoo.images import ImageSource, describe_source, read_image
from zoo.prediction import Prediction, _batches, _is_several, evaluating, resolve_class_names
from zoo.preprocess import model_placement, to_channels

if TYPE_CHECKING:
    from zoo.heads.detection import Detector


@dataclass(frozen=True)
class DetectionPrediction(Prediction):
    """What a detector finds in one picture, best first.

    Attributes:
        labels: class index of each object.
        names: their names.
        scores: their scores in 0..1.
        boxes: x0, y0, x1, y1 of each, in the picture's pixels.
        size: height and width of the picture.
        category_ids: what the training data call each object's class; the label where that is not known.
        packed: the pixels of each object, eight a byte, for `mask`; empty for heads without masks.
    """

    boxes: tuple[tuple[float, float, float, float], ...] = ()
    size: tuple[int, int] = (0, 0)
    category_ids: tuple[int, ...] = ()
    packed: tuple[np.ndarray, ...] = field(default=(), repr=False)

    def mask(self, index: int) -> np.ndarray:
        """The pixels of one object, bool (H, W).

        Raises:
            ValueError: the head finds no masks.
        """
        if not self.packed:
            raise ValueError("this prediction has boxes only: mask_rcnn and pem find masks")
        return np.unpackbits(self.packed[index], axis=-1, count=self.size[1]).astype(bool)

    def draw(self, image: ImageSource) -> Image.Image:
        """The picture with a box, a tag and (where there is one) a mask for each object."""
        from zoo.box_pictures import Mark, draw_marks, object_colour

        seen: Counter[int] = Counter()
        marks = []
        for i, (box, label, name, score) in enumerate(zip(self.boxes, self.labels, self.names, self.scores)):
            colour = object_colour(label, seen[label])
            seen[label] += 1
            marks.append(Mark(box, f"{name} {score:.0%}", colour, self.mask(i) if self.packed else None))
        return draw_marks(read_image(image), marks)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; each object has COCO's `category_id`, `bbox`, and with masks `area` and `segmentation`."""
        predictions = []
        for i, (x0, y0, x1, y1) in enumerate(self.boxes):
            entry = {
                "label": self.labels[i],
                "name": self.names[i],
                "score": self.scores[i],
                "category_id": self.category_ids[i],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
            }
            if self.packed:
                mask = self.mask(i)
                entry |= {"area": int(mask.sum()), "segmentation": encode_rle(mask)}
            predictions.append(entry)
        return {"task": self.task, "source": self.source, "size": list(self.size), "predictions": predictions}


def predict(
    model: Detector,
    image: ImageSource | Iterable[ImageSource],
    *,
    threshold: float = 0.5,
    topk: int = 100,
    class_names: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    batch_size: int = 1,
) -> DetectionPrediction | list[DetectionPrediction]:
    """Find objects in one picture, or in each of several.

    Args:
        model: the detector; it is in evaluation mode during the call.
        image: what `zoo.read_image` takes, or an iterable of these: then the answer is a list.
        threshold: smallest score; scores below the head's own limit (0.05 by default) are never found.
        topk: objects to return at most.
        class_names: one for each class; default: the model's.
        device: move the model there first, where it stays.
        batch_size: pictures a forward pass; those of one pass are padded to one size, which may change scores a little.

    Raises:
        ImageError, TypeError: a picture cannot be read.
        ValueError: an argument is out of range, or the network gives non-finite numbers.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}, expected a score between 0 and 1")
    if min(topk, batch_size) < 1:
        raise ValueError(f"topk is {topk} and batch_size {batch_size}, expected at least 1")
    if device is not None:
        model.to(device)
    names = resolve_class_names(model, model.num_classes, class_names)
    ids = getattr(model, "category_ids", None) or (getattr(model, "zoo_metadata", None) or {}).get("category_ids")
    where, dtype = model_placement(model)
    channels = getattr(model.pyramid.backbone, "in_chans", 3)
    several = _is_several(image)
    answers = []
    with evaluating(model), torch.no_grad():
        for sources in _batches(image if several else [image], batch_size):
            pictures = [to_channels(read_image(source), channels) for source in sources]
            pixels = [
                torch.from_numpy(np.array(picture).reshape(picture.height, picture.width, -1)).permute(2, 0, 1)
                for picture in pictures
            ]
            found = model([p.to(where).to(dtype).div_(255) for p in pixels])
            for source, picture, one in zip(sources, pictures, found, strict=True):
                if not (one["boxes"].isfinite().all() and one["scores"].isfinite().all()):
                    raise ValueError(
                        f"{type(model).__name__} gives non-finite numbers for {describe_source(source)}: its weights "
                        f"are damaged, or {str(dtype).removeprefix('torch.')} overflows (try float32)"
                    )
                kept = (one["scores"] >= threshold).nonzero()[:, 0][:topk]
                labels = one["labels"][kept].tolist()
                masks = one["masks"][kept].cpu().numpy() if "masks" in one else ()
                answers.append(
                    DetectionPrediction(
                        task="detection",
                        labels=tuple(labels),
                        names=tuple(names[label] for label in labels),
                        scores=tuple(one["scores"][kept].tolist()),
                        source=os.fspath(source) if isinstance(source, str | os.PathLike) else None,
                        boxes=tuple(map(tuple, one["boxes"][kept].tolist())),
                        size=(picture.height, picture.width),
                        category_ids=tuple(ids[label] for label in labels) if ids else tuple(labels),
                        packed=tuple(np.packbits(mask, axis=-1) for mask in masks),
                    )
                )
    return answers if several else answers[0]
