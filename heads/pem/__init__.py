"""PEM, the prototype-based efficient MaskFormer (arXiv 2402.19422), on any backbone.

Differs from the official code: deformable convolution and batch norms are torchvision's and PyTorch's; sizes are
padded by the model; masks that only steer the attention are computed at the size where they are used; folding
(`zoo.fold`) merges norms and constant maps. Outputs are equal.
"""

from zoo.heads.pem.checkpoint import convert_checkpoint
from zoo.heads.pem.model import Pem, PemHead, PemOutput

__all__ = ["Pem", "PemHead", "PemOutput", "convert_checkpoint"]
