"""PEM with its post-processing as one graph, for `torch.export` and ONNX with any image size and batch.

    network = PanopticNetwork(model).eval()
    torch.onnx.export(network, (images,), dynamo=True, dynamic_shapes=({0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC},), ...)

Masks of all queries exist at full size here, since a graph has no loop over tiles. Opset 20 has the deformable
convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.heads.pem.model import Pem


class SemanticNetwork(nn.Module):
    """Normalised images (B, C, H, W) -> class scores (B, K, H, W); the best class of a pixel is their argmax."""

    def __init__(self, model: Pem):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        class_logits, masks = _full_size(self.model, images)
        probability = class_logits.softmax(-1)[..., :-1].transpose(1, 2)
        return (probability @ masks.flatten(2)).unflatten(2, masks.shape[-2:])


class PanopticNetwork(nn.Module):
    """Normalised images to what `zoo.heads.pem.postprocess.paint_segments` makes segments of.

    Choosing segments depends on counts of each image and stays outside; everything that looks at pixels and
    queries is in the graph.

    Args:
        model: the segmenter.
        object_threshold: smallest class score of a query that competes for pixels.
    """

    def __init__(self, model: Pem, object_threshold: float = 0.8):
        super().__init__()
        self.model = model
        self.object_threshold = object_threshold

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(B, C, H, W) -> scores (B, Q), labels (B, Q), winner (B, H, W), inside (B, H, W), own (B, Q)."""
        class_logits, masks = _full_size(self.model, images)
        scores, labels = class_logits.softmax(-1).max(-1)
        competes = (labels != self.model.num_classes) & (scores > self.object_threshold)
        weight = torch.where(competes, scores, 0.0)[..., None, None]
        winner = (weight * masks).argmax(1)
        in_mask = (masks >= 0.5) & competes[..., None, None]
        inside = in_mask.gather(1, winner[:, None])[:, 0]
        return scores, labels, winner, inside, in_mask.sum((2, 3))


class MaskNetwork(nn.Module):
    """Normalised images (B, C, H, W) -> class logits (B, Q, K + 1) and mask logits (B, Q, h, w) of the padded images.

    What `zoo.heads.pem.postprocess` makes instances and panoptic maps of at the picture's own size. The masks are as
    small as the network makes them.
    """

    def __init__(self, model: Pem):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        output = self.model(images)
        return output.class_logits, output.mask_logits


def _full_size(model: Pem, images: Tensor) -> tuple[Tensor, Tensor]:
    """Class logits and mask probabilities (B, Q, H, W) at the images' size."""
    H, W = images.shape[-2:]
    images = model.pad(images)
    output = model(images)
    masks = F.interpolate(output.mask_logits, size=images.shape[-2:], mode="bilinear", align_corners=False)
    return output.class_logits, masks[..., :H, :W].sigmoid()
