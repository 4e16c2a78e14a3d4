"""The private helpers of timm that zoo needs, imported here and nowhere else.

timm is pinned to ``>=1.0.31,<1.1``; a release that moves one of these breaks this file only.
"""

from timm.models._features import feature_take_indices
from timm.models._input import get_model_input_config, get_pretrained_grid_size, update_model_input_size

__all__ = ["feature_take_indices", "get_model_input_config", "get_pretrained_grid_size", "update_model_input_size"]
