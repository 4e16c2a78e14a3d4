"""Operators shared by the models: one file each, a plain-torch reference beside every fast form.

`set_backend`, `get_backend`, `use_backend` and `explain` (dispatch.py) say whether Triton kernels or plain torch run.
"""

from zoo.kernels.dispatch import explain, get_backend, set_backend, use_backend

__all__ = ["explain", "get_backend", "set_backend", "use_backend"]
