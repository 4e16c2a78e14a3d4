"""Detectors, segmenters and upscalers as ONNX files that say what they are: one door to each head's own exporter.

`zoo.heads.onnx_model` reads them.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.export_report import ExportError
from zoo.exporting import METADATA_KEY, _quiet, versions
from zoo.extras import require
from zoo.heads.craft.model import Craft
from zoo.heads.detection import Detector
from zoo.heads.detection_export import ExportedDetector
from zoo.heads.detection_export import export_onnx as export_detector
from zoo.heads.pem.export import MaskNetwork, SemanticNetwork
from zoo.heads.pem.model import Pem
from zoo.heads.rt_detr import RtDetr
from zoo.prediction import resolve_class_names


def export_head(
    model: nn.Module, path: str | PathLike, *, opset: int = 20, check: bool = True, tolerance: float = 1e-3, **more: Any
) -> str:
    """Write a detector, segmenter or upscaler as ONNX; one line about the file.

    Inputs and outputs are
    - of detectors, those of `zoo.heads.detection_export.ExportedDetector`: boxes, labels and scores, best first;
    - of PEM for "semantic", those of `zoo.heads.pem.export.SemanticNetwork`: scores of every class and pixel; for
      "panoptic" and "instance", those of `MaskNetwork`: the two tasks have one network and differ in what is made of
      its queries, which depends on counts of each image and stays outside the graph;
    - of CRAFT, images in 0..1 and the enlarged ones.

    Beside them the file has a JSON text under the name "zoo": task, class names, preprocessing, thresholds and
    `size_rule`, the sizes and the batch that it takes (`kind`, `multiple`, `least`, `most`, `batch`, `text`).

    Args:
        model: what one of zoo's doors built; it is left as it is.
        path: file to write; it appears when it is complete and checked.
        opset: of ONNX, at least 20 for segmenters. Upscalers have the exporter's own.
        check: compare the scores with the model's at a size that was not traced.
        tolerance: largest difference of scores (probabilities; of panoptic and instance masks: logits in units of
            their standard deviation) that the check accepts.
        more: entries of JSON type for the file.

    Raises:
        TypeError: a head without an exporter.
        ExportError: the file's results differ; no file is left.
    """
    onnx = require("onnx", extra="export")
    require("onnxscript", extra="export")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    model = copy.deepcopy(model).to("cpu", torch.float32).eval()
    try:
        with _quiet():
            described, worst = _write(model, temporary, opset, check)
        if worst is not None and not worst <= tolerance:
            raise ExportError(f"{path} was not written: its results differ from the model's by {worst:.1e}")
        proto = onnx.load(str(temporary))
        used = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
        described |= {"precision": "float32", "opset": used, "versions": versions(), **more}
        if worst is not None:
            described["difference"] = worst
        onnx.helper.set_model_props(proto, {METADATA_KEY: json.dumps(described)})
        onnx.save(proto, str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if worst is not None:
        checked = f"largest difference {worst:.1e} at a size that was not traced"
    else:
        checked = "not checked, since the detector finds nothing in the test image" if check else "not checked"
    return (
        f"{path}: {path.stat().st_size / 1e6:.1f} MB, {described['task']}, {described['size_rule']['text']}; {checked}"
    )


def size_rule(least: int, most: int | None, multiple: int = 1, batch: int | None = None) -> dict[str, Any]:
    """Which images a graph takes: sides from `least` to `most` that are multiples of `multiple`; `batch` None: any."""
    kind = "any" if (least, most, multiple) == (1, None, 1) else "range"
    text = "any size" if kind == "any" else f"sides from {least} px"
    text += f" to {most} px" if most else ""
    text += f" that are multiples of {multiple}" if multiple > 1 else ""
    text += f", {batch} image at a time" if batch else ""
    return {"kind": kind, "least": least, "most": most, "multiple": multiple, "batch": batch, "text": text}


def _write(model: nn.Module, path: Path, opset: int, check: bool) -> tuple[dict[str, Any], float | None]:
    """What the file says about itself, and the difference found; None where nothing was compared."""
    if isinstance(model, Craft):
        return _write_upscaler(model, path, check)
    if isinstance(model, Pem):
        return _write_segmenter(model, path, opset, check)
    if not isinstance(model, Detector):
        raise TypeError(f"{type(model).__name__} cannot be exported: detectors, PEM and CRAFT can")
    return _write_detector(model, path, opset, check)


def _write_upscaler(model: Craft, path: Path, check: bool) -> tuple[dict[str, Any], float | None]:
    from zoo.heads.craft.export import check_onnx, export_onnx

    export_onnx(model, path, check=False)
    described = {
        "task": "superresolution",
        "scale": model.scale,
        "in_chans": model.in_chans,
        "multiple": model.multiple,  # what `zoo.heads.craft.padding` pads to
        "size_rule": size_rule(2, None),
    }
    return described, check_onnx(model, path) if check else None


def _write_segmenter(model: Pem, path: Path, opset: int, check: bool) -> tuple[dict[str, Any], float | None]:
    semantic = model.task == "semantic"
    network = (SemanticNetwork if semantic else MaskNetwork)(model).eval()
    channels, free = getattr(model.backbone.backbone, "in_chans", 3), torch.export.Dim.DYNAMIC
    with torch.no_grad():
        program = torch.onnx.export(
            network,
            (torch.zeros(2, channels, 64, 96),),
            dynamo=True,
            dynamic_shapes=({0: free, 2: free, 3: free},),
            opset_version=max(20, opset),
            input_names=["images"],
            output_names=["scores"] if semantic else ["class_logits", "mask_logits"],
            verbose=False,
        )
    program.save(str(path), external_data=False)
    recorded = getattr(model, "zoo_metadata", None) or {}
    short, long = recorded.get("test_size", (512, 2048))
    described = {
        "task": "segmentation",
        "kind": model.task,
        "class_names": list(resolve_class_names(model, model.num_classes)),
        "thing_classes": list(model.thing_classes),
        "thresholds": dict(recorded.get("thresholds") or {}),
        "preprocessing": {
            "in_chans": channels,
            "mean": list(model.backbone.mean),
            "std": list(model.backbone.std),
            "size": short,
            "max_size": long,
        },
        "divisor": model.divisor,
        "size_rule": size_rule(1, None),
    }
    if not check:
        return described, None
    images = torch.randn(1, channels, 70, 90, generator=torch.Generator().manual_seed(0))
    return described, max(_differences(network, path, images, () if semantic else (0, 1)))


def _write_detector(model: Detector, path: Path, opset: int, check: bool) -> tuple[dict[str, Any], float | None]:
    export_detector(model, path, opset=opset)
    channels = getattr(model.pyramid.backbone, "in_chans", 3)
    if isinstance(model, RtDetr):
        rule, resize = size_rule(160, 4096, 32), {"kind": "stretched", "size": list(model.size)}
    else:
        rule = size_rule(129, 4096, batch=1)
        resize = {
            "kind": "shorter side",
            "size": _last(model.transform.min_size),
            "max_size": model.transform.max_size,
            "divisor": model.transform.size_divisible,  # padded to a multiple of it, with the mean colour
            "mean": list(model.transform.image_mean),
        }
    recorded = getattr(model, "zoo_metadata", None) or {}
    described = {
        "task": "detection",
        "head": model.head_name,
        "class_names": list(resolve_class_names(model, model.num_classes)),
        "category_ids": getattr(model, "category_ids", None) or recorded.get("category_ids"),
        "preprocessing": {"in_chans": channels, **resize},
        "size_rule": rule,
    }
    if not check:
        return described, None
    images = torch.rand(1, channels, 192, 256, generator=torch.Generator().manual_seed(0))
    network = ExportedDetector(copy.deepcopy(model)).eval()
    with torch.no_grad():
        if not network(images)[2].any():  # no score above the threshold: nothing to compare
            return described, None
    return described, _differences(network, path, images)[2]


def _last(sides: int | Sequence[int]) -> int:
    """The one of several sides that evaluation takes."""
    return sides if isinstance(sides, int) else sides[-1]


def _differences(network: nn.Module, path: Path, images: Tensor, scaled: Sequence[int] = ()) -> list[float]:
    """Largest difference of each output from the runtime's; those of `scaled` in units of its standard deviation."""
    from zoo.onnx_model import open_session

    with torch.no_grad():
        expected = network(images)
    expected = expected if isinstance(expected, tuple) else (expected,)
    given = open_session(path).run(None, {"images": images.numpy()})
    found = []
    for number, (own, other) in enumerate(zip(expected, given, strict=True)):
        other = torch.from_numpy(other)
        if own.shape != other.shape:
            found.append(float("inf"))
            continue
        scale = float(own.std()) if number in scaled else 1.0
        found.append(float((other - own).abs().max()) / scale)
    return found
