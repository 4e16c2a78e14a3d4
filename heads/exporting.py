"""Detectors, segmenters and upscalers as ONNX files that say what they are: one door to each head's own exporter."""

from __future__ import annotations

import copy
import json
import os
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.exporting import METADATA_KEY, ExportError
from zoo.extras import require
from zoo.heads.craft.model import Craft
from zoo.heads.detection_export import ExportedDetector
from zoo.heads.detection_export import export_onnx as export_detector
from zoo.heads.pem.export import PanopticNetwork, SemanticNetwork
from zoo.heads.pem.model import Pem
from zoo.heads.rt_detr import RtDetr


def export_head(
    model: nn.Module, path: str | PathLike, *, opset: int = 20, check: bool = True, tolerance: float = 1e-3, **more: Any
) -> str:
    """Write a detector, segmenter or upscaler as ONNX; one line about the file.

    The file has the head's own inputs and outputs (`zoo.heads.detection_export`, `zoo.heads.pem.export`,
    `zoo.heads.craft.export`) and a JSON text under "zoo": task, class names, sizes that it takes.

    Args:
        model: what one of zoo's doors built.
        path: file to write; it appears when it is complete and checked.
        opset: of ONNX, at least 20 for segmenters.
        check: compare the scores with the model's at a size that was not traced.
        tolerance: largest difference of scores (probabilities) that the check accepts.
        more: entries of JSON type for the file.

    Raises:
        TypeError: a head without an exporter.
        ExportError: the file's results differ; no file is left.
    """
    onnx = require("onnx", extra="export")
    path = Path(path)
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True)
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        described, worst = _write(model, temporary, opset, check)
        if check and not worst <= tolerance:
            raise ExportError(f"{path} was not written: its results differ from the model's by {worst:.1e}")
        described |= {"class_names": list(getattr(model, "class_names", None) or []), "opset": opset, **more}
        if check:
            described["difference"] = worst
        proto = onnx.load(str(temporary))
        onnx.helper.set_model_props(proto, {METADATA_KEY: json.dumps(described)})
        onnx.save(proto, str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    checked = f"largest difference {worst:.1e} at a size that was not traced" if check else "not checked"
    return f"{path}: {path.stat().st_size / 1e6:.1f} MB, {described['task']}, {described['size_rule']}; {checked}"


def _write(model: nn.Module, path: Path, opset: int, check: bool) -> tuple[dict[str, Any], float]:
    if isinstance(model, Craft):
        from zoo.heads.craft.export import check_onnx, export_onnx

        export_onnx(model, path, check=False)
        described = {"task": "superresolution", "scale": model.scale, "size_rule": "any size", "input": "0..1"}
        return described, check_onnx(model.eval(), path) if check else 0.0
    if isinstance(model, Pem):
        network = (SemanticNetwork if model.task == "semantic" else PanopticNetwork)(copy.deepcopy(model)).eval()
        free = torch.export.Dim.DYNAMIC
        images = torch.randn(2, 3, 64, 96)
        with torch.no_grad():
            program = torch.onnx.export(
                network,
                (images,),
                dynamo=True,
                dynamic_shapes=({0: free, 2: free, 3: free},),
                opset_version=max(20, opset),
                input_names=["images"],
                verbose=False,
            )
        program.save(str(path))
        described = {
            "task": "segmentation",
            "kind": model.task,
            "outputs": "class scores" if model.task == "semantic" else "scores, labels, winner, inside, own",
            "size_rule": "any size",
            "input": "normalised",
        }
        return described, _difference(network, path, torch.randn(1, 3, 70, 90), 0) if check else 0.0
    export_detector(model, path, opset=opset)
    detr = isinstance(model, RtDetr)
    described = {
        "task": "detection",
        "size_rule": "sides that are multiples of 32 from 160 to 4096" if detr else "sides from 129 to 4096, one image",
        "input": "0..1",
    }
    images = torch.rand(1, 3, 192, 256)
    return described, _difference(ExportedDetector(copy.deepcopy(model)).eval(), path, images, 2) if check else 0.0


def _difference(network: nn.Module, path: Path, images: Tensor, output: int) -> float:
    """Largest difference of one output from the runtime's."""
    from zoo.onnx_model import open_session

    with torch.no_grad():
        expected = network(images)
    expected = expected[output] if isinstance(expected, tuple) else expected
    given = open_session(path).run(None, {"images": images.numpy()})[output]
    return float((torch.from_numpy(given) - expected).abs().max())
