"""Optional dependencies: imported where they are used, with an error that names the extra to install."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        ImportError: it is not installed; the message gives the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name and error.name.split(".")[0] != module.split(".")[0]:
            raise  # the package is there, something that it needs is not
        raise ImportError(
            f'{module} is needed here and not installed: pip install "zoo-vision[{extra}]"', name=module
        ) from error
