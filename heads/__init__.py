"""Task heads over the backbones."""
