"""ReaL (Beyer et al., 2020, "Are we done with ImageNet?"): several right labels for an image of ImageNet's validation
set, or none.

The file is `real.json` of the authors: a list with one list of class indices (0..999) for each of the 50,000 images,
in the order of their names. An image without labels is left out; a prediction is right if it is among the labels.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence

from torch import Tensor

from zoo.train.data.errors import DataError, DataNotFoundError

_OFFICIAL = re.compile(r"ILSVRC2012_val_(\d{8})(\.\w+)?$", re.IGNORECASE)


def read_real_labels(path: str | os.PathLike) -> list[list[int]]:
    """The lists of `real.json`.

    Raises:
        DataNotFoundError: no such file.
        DataError: not a list of lists of class indices.
    """
    if not os.path.isfile(path):
        raise DataNotFoundError(
            f"no ReaL labels at {path}: get real.json of the authors (google-research/reassessed-imagenet)"
        )
    try:
        with open(path, encoding="utf-8") as file:
            labels = json.load(file)
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}") from error
    if not isinstance(labels, list) or not labels:
        raise DataError(f"{path} is no list of lists of class indices, one for each image of ImageNet's validation set")
    for number, own in enumerate(labels, 1):
        if not isinstance(own, list) or any(type(label) is not int or not 0 <= label < 1000 for label in own):
            raise DataError(f"{path}: the labels of image {number} are {str(own)[:60]}, expected a list of 0..999")
    return labels


def image_number(path: str | os.PathLike) -> int | None:
    """The number in the official name of an image of ImageNet's validation set; None for any other name."""
    found = _OFFICIAL.search(re.split(r"[/\\]", str(path))[-1])
    return int(found[1]) if found else None


def labels_of(paths: Iterable[str], labels: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """The right labels of each image, by its name.

    Raises:
        DataError: a name that is not the official one, or a number that the labels do not have.
    """
    found = []
    for path in paths:
        number = image_number(path)
        if number is None:
            raise DataError(
                f"ReaL labels go by the official names, and {path} has another: expected names such as "
                "ILSVRC2012_val_00000001.JPEG"
            )
        if not 1 <= number <= len(labels):
            raise DataError(f"{path} has the number {number}, and the ReaL labels are of {len(labels)} images")
        found.append(labels[number - 1])
    return found


def real_scores(logits: Tensor, paths: Iterable[str], labels: Sequence[Sequence[int]]) -> tuple[dict[str, float], int]:
    """`real_top1` in percent, and the number of images that have labels.

    Args:
        logits: (N, 1000).
        paths: the N files.
        labels: of `read_real_labels`.

    Raises:
        DataError: other file names than the official ones, or no image with labels.
    """
    own = labels_of(paths, labels)
    right = [int(predicted) in allowed for predicted, allowed in zip(logits.argmax(1), own, strict=True) if allowed]
    if not right:
        raise DataError(f"none of the {len(own)} images has a ReaL label: evaluate without --real")
    return {"real_top1": 100 * sum(right) / len(right)}, len(right)
