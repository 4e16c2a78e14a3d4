"""The list of known checkpoints (`weights/manifest.json`) and how each one can be had."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from zoo.checkpoint import StateDict, read_checkpoint, unwrap_state_dict

Access = Literal["url", "hub", "drive", "dead", "unreleased", "packaged"]


@dataclass(frozen=True)
class Weights:
    """One released (or promised) checkpoint of a paper.

    `model` is a registered name, `tag` its timm tag. `access` says how the file can be had: `url` (direct),
    `hub` (huggingface), `drive` (a Google Drive or Baidu link, by hand, through a browser), `dead` (the link is
    gone), `unreleased`, `packaged` (inside zoo). `claimed` and `measured` map metric names to values; `measured` stays
    empty until zoo measured it.
    """

    model: str
    tag: str
    access: Access
    file: str | None = None
    url: str | None = None
    hub_id: str | None = None
    size: int | None = None
    sha256: str | None = None
    license: str | None = None
    source: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    claimed: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    note: str | None = None


@functools.cache
def known_weights() -> tuple[Weights, ...]:
    """Every entry of the manifest."""
    text = files("zoo.weights").joinpath("manifest.json").read_text()
    return tuple(Weights(**entry) for entry in json.loads(text)["weights"])


def find_weights(model: str, tag: str | None = None) -> Weights | None:
    """The manifest's entry for a registered name, the first one if no tag is given."""
    return next((w for w in known_weights() if w.model == model and tag in (None, "", w.tag)), None)


def local_weights_folder() -> Path | None:
    """The user's folder of checkpoints, `$ZOO_WEIGHTS`, if it is set."""
    value = os.environ.get("ZOO_WEIGHTS")
    return Path(value).expanduser() if value else None


def local_file_names(model: str, weights: Weights | None) -> list[str]:
    """Names under which a file in `$ZOO_WEIGHTS` is found, in this order."""
    stem = f"{model}.{weights.tag}" if weights else model
    released = [weights.file] if weights and weights.file else []
    return [f"{stem}.safetensors", *released, f"{stem}.pth"]


def pretrained_state_dict(variant: str, cfg: Mapping[str, Any]) -> StateDict:
    """The official weights behind `pretrained=True`, unwrapped, still under their official names.

    A file of the manifest's name, or `<model>.<tag>.safetensors` or `.pth`, under `$ZOO_WEIGHTS` is used before
    any download.

    Raises:
        RuntimeError: there is no such file and none that can be downloaded; says where the weights are.
    """
    model, _, tag = variant.partition(".")
    weights = find_weights(model, tag or cfg.get("tag"))
    folder = local_weights_folder()
    if folder is not None:
        for name in local_file_names(model, weights):
            if (folder / name).is_file():
                return unwrap_state_dict(read_checkpoint(folder / name))
    if weights is not None and weights.access == "packaged":
        return unwrap_state_dict(read_checkpoint(str(files("zoo.weights").joinpath(weights.file))))
    if weights is not None and weights.access == "hub":
        from huggingface_hub import hf_hub_download

        return unwrap_state_dict(read_checkpoint(hf_hub_download(weights.hub_id, weights.file)))
    if weights is not None and weights.access == "url":
        from torch.hub import download_url_to_file, get_dir

        target = Path(get_dir()) / "checkpoints" / weights.file
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            download_url_to_file(weights.url, str(target), hash_prefix=weights.sha256)
        return unwrap_state_dict(read_checkpoint(target))
    raise RuntimeError(_unavailable(model, weights))


_REASONS = {
    "drive": "can be had through a browser only ({where})",
    "dead": "are gone: the authors' link is dead ({where})",
    "unreleased": "were never released by the authors",
}


def _unavailable(model: str, weights: Weights | None) -> str:
    reason = "are not known" if weights is None else _REASONS[weights.access].format(where=weights.url or "no address")
    remedy = f"pass a file of your own with zoo.load_checkpoint(model, path) after create_model({model!r})"
    remedy += f", or put it as {local_file_names(model, weights)[1]} into a folder and set ZOO_WEIGHTS to that"
    return f"pretrained weights of {model} {reason}: {remedy}"
