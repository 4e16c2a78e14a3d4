"""Official weight files as zoo's own, and back.

A converted file is safetensors with the model's own names and, beside them, what is needed to build the model again
and to write the official file again: names, shapes and types of the official entries. Going back needs no second
translation table: the official entries are numbered, the numbers go through the family's own translation, and then
each number of the model says which official number it is. What a translation computes or leaves out cannot be
recovered in this way; such entries are kept aside in the file under their official names, or, where another entry
holds the same numbers, named as its copies.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from zoo.checkpoint import (
    ASIDE,
    CheckpointError,
    StateDict,
    read_checkpoint,
    translate,
    unwrap_state_dict,
)
from zoo.downloads import file_sha256
from zoo.manifest import Weights
from zoo.saving import load_model, read_metadata, save_model
from zoo.tools.recognition import Recognised, recognise

_FIRST = 2.0**40  # numbers of official elements begin here: no weight is as large, and float64 holds all of them


def describe_entries(state: Mapping[str, Tensor]) -> list[list]:
    """Names, types and shapes, in order: [["conv.weight", "float32", [8, 3, 3, 3]], ...]."""
    return [[name, str(value.dtype).removeprefix("torch."), list(value.shape)] for name, value in state.items()]


def to_official(model: nn.Module, weights: Mapping[str, Tensor], entries: list[list]) -> tuple[StateDict, list[str]]:
    """The official entries that `weights` (under the model's names) determine, and the names of the others."""
    # most entries are renamed or given another shape only: the translation returns the memory that it was given
    blank = {name: torch.empty(shape) for name, _, shape in entries}  # memory that is never touched costs nothing
    owners = {value.data_ptr(): name for name, value in blank.items() if value.numel()}
    with torch.no_grad():
        places = translate(model, blank).state_dict
    types = {name: getattr(torch, kind) for name, kind, _ in entries}
    found: StateDict = {}
    for name, place in places.items():
        owner = owners.get(place.data_ptr())
        value = weights.get(name)
        if owner is None or value is None or not place.is_contiguous() or place.shape != value.shape:
            continue
        if place.numel() == blank[owner].numel():
            found.setdefault(owner, value.detach().cpu().reshape(blank[owner].shape).to(types[owner]).clone())
    rest = [entry for entry in entries if entry[0] not in found]
    if rest:
        found |= _gather(model, weights, rest, blank)
    state = {name: found[name] for name, _, _ in entries if name in found}
    return state, [name for name, _, _ in entries if name not in found]


def _gather(model: nn.Module, weights: Mapping[str, Tensor], entries: list[list], blank: StateDict) -> StateDict:
    """Those of the given official entries of which every number is somewhere among the weights."""
    numbered, starts, total = dict(blank), {}, 0
    for name, _, shape in entries:
        count = torch.Size(shape).numel()
        numbered[name] = torch.arange(total, total + count, dtype=torch.float64).add_(_FIRST).reshape(shape)
        starts[name] = total
        total += count
    with torch.no_grad():
        places = translate(model, numbered).state_dict
    flat: dict[torch.dtype, Tensor] = {}
    known = torch.zeros(total, dtype=torch.bool)
    for name, numbers in places.items():
        value = weights.get(name)
        if value is None or numbers.dtype != torch.float64 or value.shape != numbers.shape:
            continue
        index = numbers.reshape(-1) - _FIRST
        whole = (index >= 0) & (index < total) & (index == index.round())
        index = index[whole].long()
        target = flat.setdefault(value.dtype, torch.zeros(total, dtype=value.dtype))
        target[index] = value.detach().cpu().reshape(-1)[whole]
        known[index] = True
    found = {}
    for name, kind, shape in entries:
        part = slice(starts[name], starts[name] + torch.Size(shape).numel())
        dtype = getattr(torch, kind)
        holder = dtype if dtype in flat else next(iter(flat), None)
        if holder is not None and bool(known[part].all()):
            found[name] = flat[holder][part].to(dtype).reshape(shape).clone()
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, except that nan is nan."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a, b) or (a.is_floating_point() and torch.equal(a.nan_to_num(), b.nan_to_num()))


def convert_file(
    path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    source: str | None = None,
    license: str | None = None,
) -> dict[str, Any]:
    """Write an official file as zoo's safetensors.

    Args:
        path: the official file.
        out: the file to write; it appears when it is complete.
        model, model_args: what it is, where that is not to be recognised, see `recognise`.
        source, license: for the metadata, those of the manifest by default.

    Returns:
        What was done: `model`, `layout`, `entries`, `aside`, `notes`, `how`.

    Raises:
        CheckpointError: the file cannot be used or fits no model, or several.
        ValueError: bad arguments.
    """
    path, out = Path(path), Path(out)
    content = read_checkpoint(path)
    sha256 = file_sha256(path)
    found = recognise(path, content, model=model, arguments=model_args, sha256=sha256)
    official = unwrap_state_dict(content)
    with torch.no_grad():
        network = found.build()
        conversion = translate(network, official)
    if any("resampled" in note for note in conversion.notes) and "img_size" not in found.arguments:
        raise CheckpointError(
            f"{path} was trained at another image size than {found.model} has by default: pass it as --model-args "
            "'{\"img_size\": [height, width]}', or the size that the tables are to be resampled to"
        )
    state = _checked(path, network, conversion.state_dict)
    aside, copies = _not_recovered(network, state, official)
    listed: Weights | None = found.weights
    metadata = {
        "task": _task(found),
        "weights": listed.name if listed else None,
        "source": source or (listed.source if listed else None),
        "license": license or (listed.license if listed else None),
        "converted_from": {"file": path.name, "sha256": sha256, "size": path.stat().st_size},
        "official": {"layout": conversion.layout, "entries": describe_entries(official), "copies": copies},
    }
    _save(network, out, found, state, aside, metadata)
    return dict(
        model=found.name,
        how=found.how,
        layout=conversion.layout,
        entries=len(state),
        aside=sorted(aside),
        notes=list(conversion.notes),
        weights=listed.name if listed else None,
    )


def _task(found: Recognised) -> str:
    tasks = {"create_detector": "detection", "create_segmenter": "segmentation", "create_upscaler": "sr"}
    return tasks.get(found.door or "", "classification")


def _checked(path: Path, network: nn.Module, state: StateDict) -> StateDict:
    """The entries of the model among what its translation gave; refuses numbers that are none."""
    own = network.state_dict()
    state = {name: value for name, value in state.items() if name in own}
    bad = [n for n, v in state.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
    if bad:
        raise CheckpointError(f"{path} has values that are not finite in {len(bad)} entries, such as {bad[0]}")
    return state


def _not_recovered(network: nn.Module, state: StateDict, official: StateDict) -> tuple[StateDict, dict[str, str]]:
    """Official entries that the converted ones do not determine: to keep, and those that are copies of others."""
    back, _ = to_official(network, state, describe_entries(official))
    lost = [name for name, value in official.items() if name not in back or not _same(back[name], value)]
    good: dict[tuple, list[str]] = {}
    for name in official:
        if name not in lost:
            good.setdefault((official[name].dtype, tuple(official[name].shape)), []).append(name)
    aside, copies = {}, {}
    for name in lost:
        value = official[name]
        twins = good.get((value.dtype, tuple(value.shape)), ())
        twin = next((other for other in twins if torch.equal(official[other], value)), None)
        if twin is not None:
            copies[name] = twin
        else:
            aside[name] = value
            good.setdefault((value.dtype, tuple(value.shape)), []).append(name)
    return aside, copies


def _save(
    network: nn.Module, out: Path, found: Recognised, state: StateDict, aside: StateDict, metadata: dict[str, Any]
) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    arguments = {k: v for k, v in found.arguments.items() if k not in ("num_classes", "in_chans")}
    kept = {f"{ASIDE}{name}": value for name, value in aside.items()}
    save_model(network, out, model_args=arguments, state_dict={**state, **kept}, **metadata)


def official_entries(
    path: Path, content: Mapping[str, Tensor], *, like: str | os.PathLike | None = None
) -> tuple[StateDict, list[str]]:
    """The official entries behind a zoo file, and which of them were taken from `like`.

    Raises:
        CheckpointError: the layout is not known, or asks for entries that the file does not determine.
    """
    described = read_metadata(path) if path.suffix == ".safetensors" else {}
    if not described:
        raise CheckpointError(f"{path} was not written by zoo: convert an official file first, or use zoo train's")
    recorded = described.get("official") or {}
    copies: Mapping[str, str] = {}
    if like is not None:
        filled = unwrap_state_dict(read_checkpoint(like))
        entries = describe_entries(filled)
    elif recorded.get("entries"):
        entries, copies = recorded["entries"], recorded.get("copies") or {}
        with safe_open(path, "pt") as file:
            aside = [name for name in list(file.keys()) if name.startswith(ASIDE)]
            filled = {name.removeprefix(ASIDE): file.get_tensor(name) for name in aside}
    else:
        raise CheckpointError(f"{path} remembers no official layout: pass --like OFFICIAL, a file of the authors")
    network = load_model(path)
    try:
        state, unknown = to_official(network, content, entries)
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"{like or path} has another layout than {path} has a model for: {error}") from error
    if like is not None and len(unknown) > 0.5 * len(entries):
        raise CheckpointError(
            f"{like} is of another model than {path}: {len(unknown)} of its entries are not determined"
        )
    state |= {name: value for name, value in filled.items() if like is None or name in unknown}
    state |= {name: state[twin].clone() for name, twin in copies.items() if twin in state}
    lacking = [name for name, _, _ in entries if name not in state]
    if lacking:
        raise CheckpointError(
            f"{len(lacking)} official entries are not determined by {path}, such as {lacking[0]}: pass --like OFFICIAL"
        )
    taken = [name for name in unknown if name in filled] if like is not None else []
    return {name: state[name].contiguous() for name, _, _ in entries}, taken


def write_official(path: str | os.PathLike, out: str | os.PathLike, *, like: str | os.PathLike | None = None) -> dict:
    """Write a zoo file with the official code's names: what it was converted from, or the layout of another file.

    Args:
        path: a file of `convert_file`, or one that `zoo train` wrote.
        out: `.safetensors`, or anything else for `torch.save`.
        like: an official file of the same model, for files that do not remember a layout. Entries that no weight of
            the model determines (tables of indices, say) are taken from it.

    Raises:
        CheckpointError: the layout is not known, or asks for entries that the file does not determine.
    """
    path, out = Path(path), Path(out)
    state, taken = official_entries(path, read_checkpoint(path), like=like)
    described = read_metadata(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.partial")
    try:
        if out.suffix == ".safetensors":
            save_file(state, temporary, metadata={"format": "pt"})
        else:
            torch.save(state, temporary)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return dict(model=described.get("model") or described.get("door"), entries=len(state), taken=taken)
