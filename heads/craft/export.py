"""CRAFT as ONNX, for images of any size."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch

from zoo.extras import require
from zoo.heads.craft.model import Craft


def export_onnx(model: Craft, path: str | PathLike, *, check: bool = True, tolerance: float = 1e-4) -> Path:
    """Write `model` (padding and cropping included) with dynamic batch, height and width.

    Args:
        model: the upscaler; exported in eval mode.
        path: file to write.
        check: run the file in ONNX Runtime on images of three other sizes and compare.
        tolerance: largest difference that the check accepts, of images in 0..1.

    Raises:
        RuntimeError: the file's results differ.
    """
    require("onnxscript", extra="export")
    path = Path(path)
    training = model.training
    model.eval()
    like = model.conv_first.weight
    example = torch.rand(2, model.in_chans, 37, 50, device=like.device, dtype=like.dtype)
    dim = torch.export.Dim
    sizes = {0: dim("batch", min=1), 2: dim("height", min=2), 3: dim("width", min=2)}
    try:
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            dynamic_shapes={"x": sizes},
            input_names=["image"],
            output_names=["enlarged"],
            verbose=False,
        )
    finally:
        model.train(training)
    program.save(str(path))
    if check:
        worst = check_onnx(model, path)
        if not worst <= tolerance:
            raise RuntimeError(f"{path} differs from the model by {worst:.2e}, more than {tolerance:.0e}")
    return path


@torch.no_grad()
def check_onnx(model: Craft, path: str | PathLike, sizes=((1, 16, 16), (1, 33, 20), (3, 24, 61))) -> float:
    """The largest difference between a file in ONNX Runtime and the model, over these (batch, height, width)."""
    runtime = require("onnxruntime", extra="export")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for seed, (batch, height, width) in enumerate(sizes):
        generator = torch.Generator().manual_seed(seed)
        image = torch.rand(batch, model.in_chans, height, width, generator=generator)
        (given,) = session.run(None, {"image": image.numpy()})
        expected = model(image.to(model.conv_first.weight)).float().cpu()
        if tuple(given.shape) != tuple(expected.shape):
            return float("inf")
        worst = max(worst, float((torch.from_numpy(given) - expected).abs().max()))
    return worst
