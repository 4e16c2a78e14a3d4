"""Data sets, metrics, recipes and the engine. Needs the extra: pip install "zoo-vision[train]"."""
