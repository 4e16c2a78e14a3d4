"""From masks to maps: the merging rules, and tiles that change nothing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from zoo.heads.masks import decode_rle, encode_rle, mask_box
from zoo.heads.pem import postprocess
from zoo.heads.pem.postprocess import Geometry, PanopticSegment, find_instances, panoptic_map, semantic_map


def _direct(masks, geometry):
    """All masks at full size, as the official code resizes them."""
    x = F.interpolate(masks[None], size=geometry.padded, mode="bilinear", align_corners=False)
    x = x[..., : geometry.image[0], : geometry.image[1]]
    return F.interpolate(x, size=geometry.output, mode="bilinear", align_corners=False)[0]


def _inputs(queries=12, classes=4, sharp=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = sharp * torch.randn(queries, classes + 1, generator=generator, dtype=torch.float64)
    coarse = 4 * torch.randn(1, queries, 3, 4, generator=generator, dtype=torch.float64)
    return logits, F.interpolate(coarse, size=(16, 24), mode="bilinear")[0]


GEOMETRIES = [
    Geometry((64, 96), (60, 90), (131, 77)),
    Geometry((64, 96), (64, 96), (64, 96)),
    Geometry((64, 96), (61, 96), (9, 13)),
    Geometry((64, 96), (1, 1), (1, 1)),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda g: f"{g.image}-{g.output}")
def test_tiles_of_rows_equal_the_direct_form(geometry, monkeypatch):
    logits, masks = _inputs()
    full = _direct(masks, geometry)
    probability = logits.softmax(-1)[:, :-1]
    first = torch.einsum("qk,qhw->khw", probability, full.sigmoid())
    padded = F.interpolate(masks[None], size=geometry.padded, mode="bilinear")[0]
    last = torch.einsum("qk,qhw->khw", probability, padded.sigmoid())[:, : geometry.image[0], : geometry.image[1]]
    last = F.interpolate(last[None], size=geometry.output, mode="bilinear")[0]
    for tile in (1, 1 << 30):  # one row at a time, and all at once
        monkeypatch.setattr(postprocess, "_TILE", tile)
        for expected, resize_first in ((first, True), (last, False)):
            scores = postprocess.semantic_scores(logits, masks, geometry, resize_first)
            torch.testing.assert_close(scores, expected, rtol=1e-10, atol=1e-11)
            assert torch.equal(semantic_map(logits, masks, geometry, resize_first), scores.argmax(0))
        found = find_instances(logits, masks, geometry, topk=9)
        for i, query in enumerate(found.queries.tolist()):
            mask = full[query] > 0
            assert np.array_equal(found.mask(i), mask.numpy())
            assert int(found.areas[i]) == int(mask.sum())
            score = probability[query, found.labels[i]] * (full[query].sigmoid() * mask).sum() / (mask.sum() + 1e-6)
            torch.testing.assert_close(found.scores[i], score)
            x0, y0, x1, y1 = found.boxes[i].tolist()
            assert [x0, y0, x1 - x0, y1 - y0] == mask_box(mask.numpy())
        _check_panoptic(logits, full, panoptic_map(logits, masks, geometry, (0, 1), 0.5, 0.3))


def _check_panoptic(logits, full, found):
    """The official rules, written plainly."""
    scores, labels = logits.softmax(-1).max(-1)
    kept = (labels != logits.shape[1] - 1) & (scores > 0.5)
    scores, labels, masks = scores[kept], labels[kept], full[kept].sigmoid()
    ids = torch.zeros(full.shape[1:], dtype=torch.int32)
    segments, stuff = [], {}
    winner = (scores[:, None, None] * masks).argmax(0) if len(scores) else None
    for k in range(len(scores)):
        won, own = winner == k, masks[k] >= 0.5
        label = int(labels[k])
        if not (won.any() and own.any() and (won & own).any()) or won.sum() / own.sum() < 0.3:
            continue
        if label in stuff:
            ids[won & own] = stuff[label]
            continue
        segments.append((len(segments) + 1, label, label < 2))
        if label >= 2:
            stuff[label] = len(segments)
        ids[won & own] = len(segments)
    assert torch.equal(found.ids, ids)
    assert [s[:3] for s in found.segments] == segments
    assert [s.area for s in found.segments] == [int((ids == s.id).sum()) for s in found.segments]


def test_the_rules_of_merging_on_one_row():
    # query: class logit, mask logits above -3
    described = [
        ((0, 5), {0: 3, 1: 3, 2: 3}),  # a thing
        ((0, 4), {0: 2, 1: 2, 2: 2, 3: 2}),  # wins one of its four pixels: skipped
        ((1, 5), {4: 4, 5: 4}),  # stuff
        ((1, 4), {6: 4, 7: 4}),  # the same stuff: joined
        ((2, 6), {8: 1, 9: -0.5}),  # wins two pixels, one of them outside its mask
        ((3, 6), dict.fromkeys(range(10), 9)),  # no object
        ((2, 1), dict.fromkeys(range(10), 9)),  # not sure enough
    ]
    logits, masks = torch.zeros(7, 4), torch.full((7, 1, 10), -3.0)
    for q, ((label, value), pixels) in enumerate(described):
        logits[q, label] = value
        for x, logit in pixels.items():
            masks[q, 0, x] = logit
    row = (1, 10)
    ids, segments = panoptic_map(logits, masks, Geometry(row, row, row), thing_classes=[0])
    assert ids.tolist() == [[1, 1, 1, 0, 2, 2, 2, 2, 3, 0]]
    assert [s[:3] for s in segments] == [(1, 0, True), (2, 1, False), (3, 2, False)]
    assert [s.area for s in segments] == [3, 4, 1]
    assert isinstance(segments[0], PanopticSegment)


def test_nothing_sure_enough_gives_an_empty_map():
    logits, masks = _inputs()
    ids, segments = panoptic_map(logits, masks, GEOMETRIES[0], (0,), object_threshold=1.0)
    assert not segments
    assert not ids.any()
    found = find_instances(logits, masks, GEOMETRIES[0], min_score=1.0)
    assert len(found.scores) == 0


def test_memory_does_not_grow_with_queries_times_picture(monkeypatch):
    largest = 0
    original = postprocess.RowsOfMasks.at_output

    def watch(self, *arguments):
        nonlocal largest
        result = original(self, *arguments)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(postprocess.RowsOfMasks, "at_output", watch)
    logits, masks = _inputs(queries=60)
    big = Geometry((1024, 2048), (1024, 2048), (1024, 2048))
    semantic_map(logits.float(), masks.float(), big)
    assert largest <= postprocess._TILE


@pytest.mark.parametrize("output", [(80, 50), (20, 11), (37, 23), (38, 23), (1, 1)])
def test_scores_that_come_in_bands_are_resized_as_a_whole(output):
    x = torch.rand(5, 37, 23, dtype=torch.float64)
    bands = [x[:, :10], x[:, 10:12], x[:, 12:30], x[:, 30:]]
    resized = torch.cat(list(postprocess.resize_scores(bands, (37, 23), output)), 1)
    expected = F.interpolate(x[None], size=output, mode="bilinear")[0]
    torch.testing.assert_close(resized, expected, rtol=1e-12, atol=1e-13)


def test_sizes_that_cannot_be_are_refused():
    logits, masks = _inputs()
    with pytest.raises(ValueError, match="is not possible"):
        semantic_map(logits, masks, Geometry((64, 96), (65, 96), (65, 96)))


@pytest.mark.parametrize("mask", [np.zeros((3, 4), bool), np.ones((3, 4), bool), np.eye(5, dtype=bool)])
def test_run_lengths_are_cocos(mask):
    code = encode_rle(mask)
    assert np.array_equal(decode_rle(code), mask)
    coco = pytest.importorskip("pycocotools.mask")
    assert np.array_equal(coco.decode(coco.frPyObjects(code, *mask.shape)).astype(bool), mask)
    with pytest.raises(ValueError, match="expected 3 x 3"):
        decode_rle({"size": [3, 3], "counts": [4]})
