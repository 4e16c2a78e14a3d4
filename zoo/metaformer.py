"""The metaformer family."""
