"""Which of timm's registered models are zoo's, and how each of them is built."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from timm.models import list_models as _timm_list_models
from timm.models import model_entrypoint
from torch import nn


def is_zoo_model(name: str) -> bool:
    """Whether the registered timm name `name` (a tag after a dot is ignored) was registered by zoo."""
    try:
        return model_entrypoint(name.split(".")[0]).__module__.startswith("zoo.")
    except KeyError:
        return False
    except RuntimeError:
        return False


def list_models(filter: str | Iterable[str] = "", *, pretrained: bool = False) -> list[str]:
    """Names of the models that zoo registers with timm, sorted naturally.

    Args:
        filter: shell-style pattern or patterns; empty for all, as in `timm.list_models`.
        pretrained: only names with released weights that can be downloaded, with their tags.
    """
    patterns = [filter] if isinstance(filter, str) else list(filter)
    names = _timm_list_models(pretrained=pretrained)
    return [
        name
        for name in names
        if is_zoo_model(name)
        and (
            not any(patterns)
            or any(fnmatch.fnmatch(name, p) or fnmatch.fnmatch(name.split(".")[0], p) for p in patterns)
        )
    ]


def model_family(model: nn.Module | str) -> str:
    """The family ("crate", "metaformer", ...) of a zoo model: the name of the file that defines it."""
    module = model_entrypoint(model.split(".")[0]).__module__ if isinstance(model, str) else type(model).__module__
    return module.rsplit(".", 1)[-1]
