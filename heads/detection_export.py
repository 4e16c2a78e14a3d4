"""Detectors as ONNX: an image of any size in, a fixed number of boxes, labels and scores out, suppression included."""

from __future__ import annotations

import copy
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, clip_boxes_to_image, nms

from zoo.extras import require
from zoo.heads.anchor_detectors import Fcos, RetinaNet
from zoo.heads.rt_detr import RtDetr

if TYPE_CHECKING:
    from zoo.heads.detection import Detector


class ExportedDetector(nn.Module):
    """RetinaNet, FCOS or RT-DETR as one graph without data-dependent shapes.

    (B, 3, H, W) floats in 0..1 -> boxes (B, K, 4) in pixels of this image, labels (B, K) and scores (B, K), best first.
    Nothing is resized: give images of the size that the model works at (RT-DETR: stretched to 640 x 640; the others:
    the shorter side 800). K is the detector's `detections_per_img`; places that are not needed have score 0. RetinaNet
    and FCOS take one image at a time (B = 1).

    Raises:
        TypeError: another detector.
    """

    def __init__(self, model: Detector):
        super().__init__()
        if not isinstance(model, RetinaNet | Fcos | RtDetr):
            raise TypeError(f"{type(model).__name__} cannot be exported: retinanet, fcos and rt_detr can")
        self.model = model
        if not isinstance(model, RtDetr):
            for name in ("mean", "std"):
                value = torch.tensor(getattr(model.transform, f"image_{name}")).view(-1, 1, 1)
                self.register_buffer(name, value, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, labels and scores."""
        if isinstance(self.model, RtDetr):
            return self._queries(images)
        return self._dense(images)

    def _queries(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        model, (h, w) = self.model, images.shape[-2:]
        found = model.network(images)
        scores = found.logits[-1].sigmoid()
        classes = scores.shape[-1]
        count = min(model.detections_per_img, model.decoder.num_queries * classes)
        best, place = scores.flatten(1).topk(count, dim=1)
        boxes = box_convert(found.boxes[-1], "cxcywh", "xyxy").clamp(0, 1)
        boxes = boxes.gather(1, (place // classes)[..., None].expand(-1, -1, 4))
        x0, y0, x1, y1 = boxes.unbind(-1)
        return torch.stack([x0 * w, y0 * h, x1 * w, y1 * h], dim=-1), place % classes, best

    def _dense(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        model, size = self.model, (images.shape[-2], images.shape[-1])
        maps = list(model.backbone((images - self.mean) / self.std).values())
        anchors = model.anchor_generator.per_level(maps)
        boxes, scores, labels = [], [], []
        for level, prior in zip(maps, anchors):
            out = model.head([level])
            probability = out["cls_logits"][0].sigmoid()
            if "bbox_ctrness" in out:
                probability = (probability * out["bbox_ctrness"][0].sigmoid()).sqrt()
            classes = probability.shape[-1]
            flat = probability.flatten()
            # a level with fewer candidates than asked for is filled up with some of score -1
            filled = torch.cat([flat, flat.new_full((model.topk_candidates,), -1.0)])
            score, place = filled.topk(model.topk_candidates)
            cell = (place // classes).clamp(max=prior.shape[0] - 1)
            delta, prior = out["bbox_regression"][0][cell], prior[cell]
            coder = model.box_coder
            box = coder.decode(delta, prior) if isinstance(model, Fcos) else coder.decode_single(delta, prior)
            boxes.append(clip_boxes_to_image(box, size))
            scores.append(score)
            labels.append(place % classes)
        box, score, label = torch.cat(boxes), torch.cat(scores), torch.cat(labels)
        score = torch.where(score > model.score_thresh, score, -1.0)
        # classes apart, so that one suppression serves them all
        offset = label.to(box.dtype) * (max(size) + 1)
        kept = nms(box + offset[:, None], score, model.nms_thresh)
        final = torch.zeros_like(score).scatter(0, kept, score[kept]).clamp(min=0)
        best, place = final.topk(model.detections_per_img)
        return box[place][None], label[place][None], best[None]


def export_onnx(model: Detector, path: str | PathLike, *, size: tuple[int, int] = (320, 416), opset: int = 20) -> Path:
    """Write a detector as ONNX with dynamic height and width (RT-DETR: multiples of 32; and batch).

    Args:
        model: `retinanet`, `fcos` or `rt_detr`; it is left as it is.
        path: file to write.
        size: of the image that is traced; any other works, too.
        opset: of ONNX.

    Raises:
        TypeError: another detector.
        ValueError: a size that RT-DETR's graph does not take.
        ImportError: the packages of the extra `export` are missing.
    """
    require("onnx", extra="export")
    require("onnxscript", extra="export")
    graph = ExportedDetector(copy.deepcopy(model)).eval()
    batched = isinstance(model, RtDetr)
    device = next(model.parameters()).device
    example = torch.rand(2 if batched else 1, 3, *size, device=device)
    if batched:
        if any(side % 32 for side in size):
            raise ValueError(f"size={size}, expected multiples of 32: RT-DETR's graph takes such sides only")
        sides = [32 * torch.export.Dim(name, min=5, max=128) for name in ("rows", "columns")]
        dynamic = {0: torch.export.Dim("batch", min=1, max=1024), 2: sides[0], 3: sides[1]}
    else:
        dynamic = {2: torch.export.Dim("height", min=129, max=4096), 3: torch.export.Dim("width", min=129, max=4096)}
    with torch.no_grad():
        program = torch.export.export(graph, (example,), dynamic_shapes=(dynamic,), strict=False)
        torch.onnx.export(
            program,
            (),
            str(path),
            input_names=["images"],
            output_names=["boxes", "labels", "scores"],
            opset_version=opset,
            dynamo=True,
            external_data=False,
        )
    return Path(path)
