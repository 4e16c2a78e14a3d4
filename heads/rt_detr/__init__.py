"""RT-DETR: hybrid encoder, query selection, deformable decoder, denoising and losses."""

from zoo.heads.rt_detr.model import RtDetr

__all__ = ["RtDetr"]
