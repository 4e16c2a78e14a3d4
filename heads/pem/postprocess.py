"""From the network's classes and masks to label maps, panoptic segments and instances, at the image's own size.

Masks come at a quarter of the padded image's size; officially all of them are resized (bilinearly, first to the padded
size, then cropped and resized to the output size) before anything is decided: 839 MB for 100 queries at
1024 x 2048, several times over. Here the same numbers are made for a tile of rows at a time, and decisions that need
the whole image are taken from counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_TILE = 1 << 21  # numbers of resized masks that exist at a time

Size = tuple[int, int]


class Geometry(NamedTuple):
    """The sizes, (height, width) each, between a mask and the picture.

    Attributes:
        padded: the network's input.
        image: the part of it that is the picture, at the top left.
        output: the size that is asked for.
    """

    padded: Size
    image: Size
    output: Size


class PanopticSegment(NamedTuple):
    """One segment of a panoptic map."""

    id: int
    label: int
    is_thing: bool
    score: float
    area: int


class PanopticMap(NamedTuple):
    """`ids` (H, W) int32, 0 where nothing was found, and the segments by ascending id, which begin at 1."""

    ids: Tensor
    segments: list[PanopticSegment]


class Instances(NamedTuple):
    """Detections of one image, best first.

    Attributes:
        scores: (N,) in 0..1.
        labels: (N,).
        boxes: (N, 4), (x0, y0, x1, y1) of the masks' outermost pixels, x1 and y1 exclusive; zeros if empty.
        areas: (N,) pixels.
        queries: (N,); one query may be found under several labels, with one and the same mask.
        bits: uint8 (M, H, ceil(W / 8)), the masks of the M distinct queries, eight pixels a byte.
        rows: (N,), which of them is whose.
        width: of the picture.
    """

    scores: Tensor
    labels: Tensor
    boxes: Tensor
    areas: Tensor
    queries: Tensor
    bits: np.ndarray
    rows: Tensor
    width: int

    def mask(self, index: int) -> np.ndarray:
        """The mask of one detection, bool (H, W)."""
        return np.unpackbits(self.bits[int(self.rows[index])], axis=-1, count=self.width).astype(bool)


class RowsOfMasks:
    """Masks (Q, h, w) at the picture's size, made row by row."""

    def __init__(self, masks: Tensor, geometry: Geometry):
        self.masks = masks
        self.geometry = geometry
        for inner, outer in ((geometry.image, geometry.padded), ((1, 1), geometry.output)):
            if inner[0] > outer[0] or inner[1] > outer[1] or min(inner) < 1:
                raise ValueError(f"{geometry} is not possible: the image lies in the padded one, sizes are positive")

    def at_image(self, rows: Tensor) -> Tensor:
        """The given rows of the (unpadded) input image: (Q, rows, image width)."""
        (padded_height, padded_width), (_, width), _ = self.geometry
        x = _pick_rows(self.masks, rows, padded_height)
        return _resize_width(x, padded_width)[..., :width]

    def at_output(self, start: int, stop: int, between: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Rows [start, stop) of the output; `between` is applied at the image's size, before the last resizing."""
        _, image, output = self.geometry
        rows = torch.arange(start, stop, device=self.masks.device)
        if image == output:
            x = self.at_image(rows)
            return x if between is None else between(x)
        first, second, share = _row_shares(rows, image[0], output[0], self.masks.dtype)
        needed, places = torch.stack((first, second)).unique(return_inverse=True)
        x = self.at_image(needed)
        if between is not None:
            x = between(x)
        x = torch.lerp(x[:, places[0]], x[:, places[1]], share[:, None])
        return _resize_width(x, output[1])

    def tiles(self, maps: int | None = None) -> Iterator[tuple[int, int]]:
        """Ranges of output rows of which the largest tensor, `maps` or Q of them, stays within the tile's size."""
        _, image, output = self.geometry
        # a row of the output may need several of the image, and the other way round
        pixels = output[1] + image[1] * max(1.0, image[0] / output[0])
        height = max(1, int(_TILE // (max(maps or 0, len(self.masks), 1) * pixels)))
        for start in range(0, output[0], height):
            yield start, min(start + height, output[0])


def _row_shares(rows: Tensor, source: int, target: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The two source rows of each target row, and the share of the second (bilinear, align_corners off)."""
    place = ((rows.to(dtype) + 0.5) * (source / target) - 0.5).clamp_(min=0)
    first = place.long().clamp_(max=source - 1)
    return first, (first + 1).clamp_(max=source - 1), place - first


def _pick_rows(x: Tensor, rows: Tensor, height: int) -> Tensor:
    """Rows of `x` (Q, h, w) resized to `height`: (Q, rows, w)."""
    if x.shape[1] == height:
        return x[:, rows]
    first, second, share = _row_shares(rows, x.shape[1], height, x.dtype)
    return torch.lerp(x[:, first], x[:, second], share[:, None])


def _resize_width(x: Tensor, width: int) -> Tensor:
    if x.shape[2] == width:
        return x
    return F.interpolate(x[None], size=(x.shape[1], width), mode="bilinear", align_corners=False)[0]


# ---- semantic


def semantic_rows(
    class_logits: Tensor, masks: Tensor, geometry: Geometry, resize_first: bool
) -> Iterator[tuple[int, Tensor]]:
    """Class scores, sum over queries of class probability times mask, in tiles: first row and (K, rows, W).

    Args:
        class_logits: (Q, K + 1).
        masks: logits (Q, h, w).
        geometry: sizes.
        resize_first: masks are resized to the output before the sum, as the official code does where it also
            makes panoptic or instance results; otherwise scores are computed at the image's size and then resized.
    """
    probability = class_logits.softmax(-1)[:, :-1].t()
    rows = RowsOfMasks(masks, geometry)

    def score(x: Tensor) -> Tensor:
        return (probability @ x.sigmoid().flatten(1)).unflatten(1, x.shape[1:])

    for start, stop in rows.tiles(len(probability)):
        yield start, score(rows.at_output(start, stop)) if resize_first else rows.at_output(start, stop, score)


def semantic_scores(class_logits: Tensor, masks: Tensor, geometry: Geometry, resize_first: bool = False) -> Tensor:
    """Class scores (K, H, W) of one image; see `semantic_rows`. For large images take `semantic_map`."""
    tiles = [tile for _, tile in semantic_rows(class_logits, masks, geometry, resize_first)]
    return torch.cat(tiles, 1)


def semantic_map(class_logits: Tensor, masks: Tensor, geometry: Geometry, resize_first: bool = False) -> Tensor:
    """The best class of each pixel, (H, W) int64, with memory for a few rows of scores only."""
    tiles = [tile.argmax(0) for _, tile in semantic_rows(class_logits, masks, geometry, resize_first)]
    return torch.cat(tiles)


def resize_scores(bands: Iterable[Tensor], source: Size, output: Size) -> Iterator[Tensor]:
    """Score maps that come in bands of rows, resized bilinearly to the output, in bands again.

    Args:
        bands: (K, rows, W), consecutive, of a map (K, *source).
        source, output: sizes.
    """
    if source == output:
        yield from bands
        return
    held: Tensor | None = None
    begin = made = 0  # first source row that is held, output rows that are made
    for band in bands:
        held = band if held is None else torch.cat((held, band), 1)
        first, second, share = _row_shares(
            torch.arange(output[0], device=band.device), source[0], output[0], band.dtype
        )
        ready = int((second < begin + held.shape[1]).sum())
        if ready == made:
            continue
        upper, lower = first[made:ready] - begin, second[made:ready] - begin
        yield _resize_width(torch.lerp(held[:, upper], held[:, lower], share[made:ready, None]), output[1])
        made = ready
        if made < output[0]:
            keep = min(int(first[made]) - begin, held.shape[1])
            held, begin = held[:, keep:], begin + keep


# ---- panoptic


def panoptic_map(
    class_logits: Tensor,
    masks: Tensor,
    geometry: Geometry,
    thing_classes: Sequence[int],
    object_threshold: float = 0.8,
    overlap_threshold: float = 0.8,
) -> PanopticMap:
    """Segments that do not overlap, of one image.

    Queries that are surer than `object_threshold` of a class compete for each pixel with score times mask. A query
    becomes a segment if it wins at least `overlap_threshold` times as many pixels as its own mask has; of the won
    pixels those inside its mask are painted. Stuff of one class is one segment.

    Args:
        class_logits: (Q, K + 1).
        masks: logits (Q, h, w).
        geometry: sizes.
        thing_classes: classes whose objects are told apart.
        object_threshold: smallest class score of a segment.
        overlap_threshold: see above.
    """
    scores, labels = class_logits.softmax(-1).max(-1)
    kept = (labels != class_logits.shape[-1] - 1) & (scores > object_threshold)
    scores, labels = scores[kept], labels[kept]
    count = len(scores)
    if count == 0:
        return PanopticMap(torch.zeros(geometry.output, dtype=torch.int32, device=masks.device), [])
    rows = RowsOfMasks(masks[kept], geometry)  # resizing the others would change nothing
    winners, inside = [], []
    own = torch.zeros(count, dtype=torch.long, device=masks.device)
    for start, stop in rows.tiles():
        mask = rows.at_output(start, stop).sigmoid()
        own += (mask >= 0.5).sum((1, 2))
        winner = (scores[:, None, None] * mask).argmax(0)
        inside.append(mask.gather(0, winner[None])[0] >= 0.5)
        winners.append(winner.to(torch.int16 if count < 1 << 15 else torch.int32))
    winner, inside = torch.cat(winners), torch.cat(inside)
    return paint_segments(scores, labels, winner, inside, own, thing_classes, overlap_threshold)


def paint_segments(
    scores: Tensor,
    labels: Tensor,
    winner: Tensor,
    inside: Tensor,
    own: Tensor,
    thing_classes: Sequence[int],
    overlap_threshold: float = 0.8,
) -> PanopticMap:
    """The last step of `panoptic_map`, from maps that a deployed network gives (`zoo.heads.pem.export`).

    Args:
        scores, labels: (Q,), best class of each query and its probability.
        winner: (H, W), the query that wins each pixel.
        inside: bool (H, W), whether the pixel is in the winner's mask.
        own: (Q,), pixels of each query's mask; 0 for queries that are not to become segments.
        thing_classes, overlap_threshold: as for `panoptic_map`.
    """
    count = len(scores)
    won = torch.bincount(winner.flatten(), minlength=count)
    both = torch.bincount(winner[inside], minlength=count)
    ids, segments = _choose_segments(scores, labels, won, own, both, set(thing_classes), overlap_threshold)
    ids = torch.tensor(ids, dtype=torch.int32, device=winner.device)
    return PanopticMap(ids[winner.int()] * inside, segments)


def _choose_segments(
    scores: Tensor, labels: Tensor, won: Tensor, own: Tensor, both: Tensor, things: set[int], overlap: float
) -> tuple[list[int], list[PanopticSegment]]:
    """The segment id of each query (0: none) and the segments."""
    ids = [0] * len(labels)
    segments: list[PanopticSegment] = []
    stuff: dict[int, int] = {}
    columns = (each.tolist() for each in (scores, labels, won, own, both))
    for query, (score, label, wins, size, area) in enumerate(zip(*columns, strict=True)):
        if not (wins and size and area) or wins / size < overlap:
            continue
        if label in stuff:
            ids[query] = stuff[label]
            old = segments[stuff[label] - 1]
            segments[stuff[label] - 1] = old._replace(area=old.area + area, score=max(old.score, score))
            continue
        ids[query] = len(segments) + 1
        if label not in things:
            stuff[label] = ids[query]
        segments.append(PanopticSegment(ids[query], label, label in things, score, area))
    return ids, segments


# ---- instances


def find_instances(
    class_logits: Tensor,
    masks: Tensor,
    geometry: Geometry,
    topk: int = 100,
    classes: Sequence[int] | None = None,
    min_score: float = 0.0,
) -> Instances:
    """The `topk` best pairs of query and class of one image.

    The score is the class probability times the mean of the mask's probabilities inside the mask.

    Args:
        class_logits: (Q, K + 1).
        masks: logits (Q, h, w).
        geometry: sizes.
        topk: pairs that are looked at.
        classes: of these, only those of the given classes are kept (the official code: things, in a panoptic model).
        min_score: smallest class probability of a pair whose mask is made at all.
    """
    probability = class_logits.softmax(-1)[:, :-1]
    K = probability.shape[1]
    best, place = probability.flatten().topk(min(topk, probability.numel()))
    keep = best >= min_score
    if classes is not None:
        keep &= torch.isin(place % K, torch.tensor(sorted(classes), device=place.device, dtype=place.dtype))
    best, place = best[keep], place[keep]
    labels, queries = place % K, place // K
    distinct, rows = queries.unique(return_inverse=True)
    areas, means, boxes, bits = _measure_masks(masks[distinct], geometry)
    scores = best * means[rows]
    order = scores.argsort(descending=True, stable=True)
    rows = rows[order]
    return Instances(
        scores[order], labels[order], boxes[rows], areas[rows], queries[order], bits, rows, geometry.output[1]
    )


def _measure_masks(masks: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
    """Area, mean probability inside, box and packed pixels of each mask."""
    count, device = len(masks), masks.device
    height, width = geometry.output
    areas = torch.zeros(count, dtype=torch.long, device=device)
    sums = masks.new_zeros(count)
    in_row = torch.zeros(count, height, dtype=torch.bool, device=device)
    in_column = torch.zeros(count, width, dtype=torch.bool, device=device)
    bits = np.zeros((count, height, -(-width // 8)), np.uint8)
    rows = RowsOfMasks(masks, geometry)
    for start, stop in rows.tiles() if count else ():
        x = rows.at_output(start, stop)
        mask = x > 0
        areas += mask.sum((1, 2))
        sums += (x.sigmoid() * mask).sum((1, 2))
        in_row[:, start:stop] = mask.any(2)
        in_column |= mask.any(1)
        bits[:, start:stop] = np.packbits(mask.cpu().numpy(), axis=-1)
    edges = []
    for line in (in_column, in_row):
        line = line.int()
        edges.append((line.argmax(1), line.shape[1] - line.flip(1).argmax(1)))
    (x0, x1), (y0, y1) = edges
    boxes = torch.stack((x0, y0, x1, y1), 1) * (areas > 0)[:, None]
    return areas, sums / (areas + 1e-6), boxes, bits
