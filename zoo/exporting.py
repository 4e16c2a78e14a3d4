"""Classifiers as ONNX files and as `torch.export` programs, checked against the model before they get their name.

    zoo.export_onnx(model, "model.onnx")
    zoo.export_program(model, "model.pt2")

Batch, height and width are free. A model that takes any size has a graph that takes any size and gives what the model
gives; one that takes multiples of a patch has a graph that first stretches the image to the next multiple, and one
that takes a single size (its weights mix the positions of one grid) stretches every image to that. Which of these it
is stands in the file: `size_rule`. The file carries a JSON text under the name "zoo", see `describe`.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoo import export_check
from zoo.export_report import ExportError, ExportReport, SizeRule
from zoo.exportable import exportable
from zoo.extras import require
from zoo.folding import fold
from zoo.images import ImageSource
from zoo.prediction import resolve_class_names
from zoo.preprocess import EvalTransform, eval_transform_for

Precision = Literal["float32", "fp16", "int8"]
METADATA_KEY = "zoo"
PROGRAM_FILE = "zoo.json"  # the metadata's name inside a .pt2 file
_LARGEST = 1_950_000_000  # bytes: a protocol buffer ends at 2 GiB


def export_onnx(
    model: nn.Module,
    path: str | PathLike,
    *,
    precision: Precision = "float32",
    img_size: int | tuple[int, int] | None = None,
    batch_size: int | None = None,
    dynamic_size: bool = True,
    folded: bool = True,
    opset: int = 20,
    tolerance: float = 1e-4,
    check: bool = True,
    images: Sequence[ImageSource] = (),
    class_names: Sequence[str] | None = None,
    **metadata: Any,
) -> ExportReport:
    """Write a classifier as ONNX: normalised images (B, C, H, W) -> logits (B, classes).

    Args:
        model: any classifier of zoo or timm; it is left as it is.
        path: file to write; it appears when it is complete and checked.
        precision: "fp16" has weights and arithmetic in half precision (inputs and outputs stay float32), "int8" has
            matrix products with 8-bit weights and activations that are quantised on the fly; for both the difference
            is measured and not judged.
        img_size: the images' nominal size; the model's own by default.
        batch_size: a fixed one; free by default.
        dynamic_size: off: images of `img_size` only.
        folded: export the inference form.
        opset: of ONNX, 18 or newer.
        tolerance: largest difference that the check accepts, in units of the outputs' standard deviation.
        check: run the file in ONNX Runtime on the CPU at traced and other sizes and compare.
        images: pictures that take part in the check; made-up ones are used besides.
        class_names: names of the outputs; those of the model by default.
        metadata: more entries of JSON type for the file.

    Raises:
        ValueError: an argument is out of range, or the model is no classifier.
        ExportError: the exporter failed, or the file's results differ; no file is left.
        ImportError: the packages of the extra `export` are missing.
    """
    onnx = require("onnx", extra="export")
    require("onnxscript", extra="export")
    require("onnxruntime", extra="export")
    if precision not in ("float32", "fp16", "int8"):
        raise ValueError(f"precision is {precision!r}: pass 'float32', 'fp16' or 'int8'")
    if opset < 18:
        raise ValueError(f"opset is {opset}: pass 18 or newer")
    path = Path(path)
    network, rule, transform = prepare(model, img_size, dynamic_size, folded)
    note = None
    try:
        built = _build(network, rule, batch_size, opset)
    except ExportError as error:
        if rule.kind not in ("any", "multiple"):
            raise
        # images of any size still run, stretched to the one that the model is built for
        note = str(error)
        rule = network.rule = SizeRule("resized", rule.size)
        built = _build(network, rule, batch_size, opset)
    described = describe(model, transform, rule, class_names, opset=opset, precision=precision, **metadata)
    with _beside(path) as temporary:
        if sum(p.numel() * 4 for p in network.parameters()) > _LARGEST:
            raise ExportError(f"{_name(model)} has more than 2 GB of weights, which one ONNX file cannot hold")
        built.save(str(temporary), external_data=False)
        if precision != "float32":
            _convert(temporary, precision)
        report = ExportReport(path, 0, rule, note=note, metadata=described)
        if check:
            from zoo.onnx_model import open_session

            session = open_session(temporary)
            export_check.check(
                report,
                network,
                lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]),
                transform,
                tolerance=tolerance if precision == "float32" else math.inf,
                batch_size=batch_size,
                images=images,
            )
            described |= {"difference": report.difference, "undecided": report.undecided}
        proto = onnx.load(str(temporary))
        del proto.metadata_props[:]
        onnx.helper.set_model_props(proto, {METADATA_KEY: json.dumps(described)})
        onnx.save(proto, str(temporary))
        report.bytes = temporary.stat().st_size
    return report


def export_program(
    model: nn.Module,
    path: str | PathLike,
    *,
    img_size: int | tuple[int, int] | None = None,
    batch_size: int | None = None,
    dynamic_size: bool = True,
    folded: bool = True,
    tolerance: float = 1e-4,
    check: bool = True,
    images: Sequence[ImageSource] = (),
    class_names: Sequence[str] | None = None,
    **metadata: Any,
) -> ExportReport:
    """Write a classifier as a `torch.export` program (.pt2): `torch.export.load(path).module()(images)`.

    Files of ViM2 hold zoo's scan operators: `import zoo` before loading one.

    Args and raises: those of `export_onnx`.
    """
    path = Path(path)
    network, rule, transform = prepare(model, img_size, dynamic_size, folded)
    program = _trace(network, rule, batch_size, onnx=False)
    described = describe(model, transform, rule, class_names, precision="float32", **metadata)
    with _beside(path) as temporary:
        report = ExportReport(path, 0, rule, metadata=described)
        if check:
            export_check.check(
                report,
                network,
                program.module(),
                transform,
                tolerance=tolerance,
                batch_size=batch_size,
                images=images,
            )
            described |= {"difference": report.difference, "undecided": report.undecided}
        torch.export.save(program, temporary, extra_files={PROGRAM_FILE: json.dumps(described)})
        report.bytes = temporary.stat().st_size
    return report


def describe(
    model: nn.Module, transform: EvalTransform, rule: SizeRule, class_names: Sequence[str] | None, **more: Any
) -> dict[str, Any]:
    """What a file says about itself: task, model, class names, preprocessing, sizes, versions."""
    recorded = getattr(model, "zoo_metadata", None) or {}
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return {
        "task": "classification",
        "model": cfg.get("architecture") or type(model).__name__,
        "multilabel": bool(recorded.get("multilabel")),
        "class_names": list(resolve_class_names(model, model.num_classes, class_names)),
        "preprocessing": {
            "input_size": list(transform.input_size),
            "mean": list(transform.mean),
            "std": list(transform.std),
            "interpolation": transform.interpolation,
            "crop_pct": transform.crop_pct,
            "crop_mode": transform.crop_mode,
        },
        "size_rule": asdict(rule) | {"text": str(rule)},
        "versions": versions(),
        **more,
    }


def versions() -> dict[str, str]:
    """Of zoo, PyTorch and timm."""
    import timm

    import zoo

    return {"zoo": zoo.__version__, "torch": torch.__version__, "timm": timm.__version__}


# What is exported


class ExportedClassifier(nn.Module):
    """A classifier behind the resizing that its rule asks for."""

    def __init__(self, model: nn.Module, rule: SizeRule):
        super().__init__()
        self.model = model
        self.rule = rule

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) -> logits (B, classes)."""
        if self.rule.kind == "multiple":
            m = self.rule.multiple
            sides = [m * ((side + m - 1) // m) for side in images.shape[2:]]
            images = F.interpolate(images, size=sides, mode="bilinear", align_corners=False)
        elif self.rule.kind == "resized":
            images = F.interpolate(
                images, size=list(self.rule.size), mode="bilinear", align_corners=False, antialias=True
            )
        return self.model(images)


def prepare(
    model: nn.Module, img_size: int | tuple[int, int] | None, dynamic_size: bool, folded: bool
) -> tuple[ExportedClassifier, SizeRule, EvalTransform]:
    """A copy of the model as it will be traced, which images it takes, and how they are made.

    Raises:
        ValueError: no classifier, or a size that the model does not take.
    """
    if not getattr(model, "num_classes", 0):
        raise ValueError(f"{_name(model)} has no classifier: build it with num_classes")
    model = copy.deepcopy(model).to("cpu", torch.float32).eval()
    if img_size is not None:
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if hasattr(model, "set_input_size"):
            model.set_input_size(img_size=size)
    transform = eval_transform_for(model)
    if img_size is not None:
        transform = EvalTransform(
            (transform.input_size[0], *size),
            mean=transform.mean,
            std=transform.std,
            interpolation=transform.interpolation,
            crop_pct=transform.crop_pct,
            crop_mode=transform.crop_mode,
        )
    if folded:
        model = fold(model, inplace=True)
    channels, *size = transform.input_size
    if dynamic_size:
        _free_size(model)
        rule = find_size_rule(model, channels, tuple(size))
    else:
        rule = SizeRule("static", tuple(size))
    return ExportedClassifier(model, rule), rule, transform


def find_size_rule(model: nn.Module, channels: int, size: tuple[int, int]) -> SizeRule:
    """Try images of other sizes."""
    height, width = size

    def takes(h: int, w: int) -> bool:
        try:
            with torch.no_grad():
                model(torch.zeros(1, channels, h, w))
        except Exception:  # models refuse in many ways
            return False
        return True

    if not takes(height, width):
        raise ValueError(f"{_name(model)} does not take images of {height}x{width} px: pass another img_size")
    if takes(height + 5, width + 3) and takes(height + 2, max(9, width * 3 // 4 + 1)):
        return SizeRule("any", size)
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    for multiple in dict.fromkeys([*([max(patch)] if isinstance(patch, tuple) else []), 4, 8, 14, 16, 28, 32, 64]):
        rows, columns = (-(-side // multiple) * multiple for side in size)
        if takes(rows + multiple, columns) and takes(rows, columns + 2 * multiple):
            return SizeRule("multiple", size, multiple)
    return SizeRule("resized", size)


def _free_size(model: nn.Module) -> None:
    """Let a model that was built for one size take others where it can adapt in each call."""
    from zoo.crate import Crate

    if isinstance(model, Crate) and model.pos_mode != "prefix":
        model.dynamic_img_size = True
        model.patch_embed.strict_img_size = False


def _build(network: ExportedClassifier, rule: SizeRule, batch_size: int | None, opset: int):
    """The ONNX program."""
    program = _trace(network, rule, batch_size, onnx=True)
    # the attention kernels differ in the memory order of their results: the exporter must see the same one throughout
    with _quiet(), sdpa_kernel(SDPBackend.MATH):
        try:
            return torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=opset,
                verbose=False,
                optimize=True,
                external_data=False,
                input_names=["images"],
                output_names=["logits"],
            )
        except Exception as error:  # the exporter has many types of its own
            raise ExportError(f"{_name(network.model)} has no ONNX form here: {_first_line(error)}") from error


def _trace(network: ExportedClassifier, rule: SizeRule, batch_size: int | None, *, onnx: bool):
    """The program, traced at a size that is special to no part of the model."""
    height, width = rule.size
    if rule.kind != "static":
        # larger than the nominal size and no multiple of anything: every table is resampled, every map padded
        height, width = 2 * height + 27, width * 3 // 2 + 11
    channels = getattr(network.model, "in_chans", 3)
    images = torch.zeros(batch_size or 3, channels, height, width)
    free: dict[int, Any] = {} if batch_size else {0: torch.export.Dim.DYNAMIC}
    if rule.kind != "static":
        free |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    kernels = sdpa_kernel(SDPBackend.MATH) if onnx else nullcontext()
    with exportable(onnx), torch.no_grad(), _quiet(), kernels:
        try:
            return torch.export.export(network, (images,), dynamic_shapes=(free,), strict=False)
        except Exception as error:  # the exporter has many types of its own
            raise ExportError(
                f"{_name(network.model)} cannot be traced ({rule}): {_first_line(error)}; "
                "--static-size (dynamic_size=False) asks for less"
            ) from error


# Precision


def _convert(path: Path, precision: Precision) -> None:
    onnx = require("onnx", extra="export")
    if precision == "fp16":
        float16 = require("onnxruntime.transformers.float16", extra="export")
        half = float16.convert_float_to_float16(onnx.load(str(path)), keep_io_types=True)
        onnx.save(half, str(path))
        return
    quantization = require("onnxruntime.quantization", extra="export")
    with _quiet():
        quantization.quantize_dynamic(
            str(path),
            str(path),
            op_types_to_quantize=["MatMul", "Gemm"],
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
        )


# Small things


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A name to write to; it becomes `path` if the block ends well and is removed if not."""
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is no folder: make it first")
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' warnings and log lines."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _name(model: nn.Module) -> str:
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
