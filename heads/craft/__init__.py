"""CRAFT: super-resolution by cross-refinement of attention and high-frequency maps (arXiv 2308.05022)."""

from zoo.heads.craft.backbone import CraftOnBackbone
from zoo.heads.craft.door import create_upscaler
from zoo.heads.craft.model import Craft, read_options

__all__ = ["Craft", "CraftOnBackbone", "create_upscaler", "read_options"]
