"""Golden cases: what a reference implementation computed, for weights and inputs that are rebuilt by a rule.

A case is a JSON file. It records neither weights nor inputs: both are functions of (seed, name, shape). The rule and
the comparison are here, `zoo verify --golden` uses them on a weight file; the project's tests, on whole families.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.checkpoint import CheckpointError, StateDict

# deviation in units of the recorded std
BARS = {torch.float64: 1e-9, torch.float32: 1e-4}


def _normal(key: str, shape: Iterable[int]) -> np.ndarray:
    digest = hashlib.sha256(key.encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))
    return generator.standard_normal(tuple(shape))


def fill_input(name: str, shape: Iterable[int], seed: int) -> Tensor:
    """The standard-normal float64 input called `name`."""
    return torch.from_numpy(np.asarray(_normal(f"{seed}:input:{name}", shape)))


def fill_weight(name: str, shape: Iterable[int], seed: int) -> Tensor:
    """The float64 values of the weight called `name`; the rule looks at name and rank only."""
    shape = tuple(shape)
    normal = np.asarray(_normal(f"{seed}:{name}", shape))
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "running_var":
        values = 1.0 + 0.5 * np.abs(normal)
    elif leaf == "running_mean":
        values = 0.1 * normal
    elif len(shape) >= 2:
        values = normal / math.sqrt(max(1, math.prod(shape[1:])))
    elif leaf == "bias":
        values = 0.1 * normal
    else:
        values = 1.0 + 0.1 * normal
    return torch.from_numpy(np.asarray(values))


def output_error(record: dict, output: Tensor) -> float:
    """Largest deviation of `output` from a record: its values, mean, std and random projections.

    In units of the recorded std (of 1 where that is zero). Records sample the flat tensor: its first
    elements, every `stride`-th, or `indices` start / step / count. A NaN is an infinite deviation.

    Raises:
        ValueError: the shapes differ.
    """
    if list(output.shape) != list(record["shape"]):
        raise ValueError(f"shape {list(output.shape)}, recorded {record['shape']}")
    flat = output.detach().double().reshape(-1).numpy()
    recorded = np.asarray(record["values"], dtype=np.float64).reshape(-1)
    if "indices" in record:
        sampled = flat[record["indices"]["start"] :: record["indices"]["step"]]
    elif "stride" in record:
        sampled = flat[:: record["stride"]]
    else:
        sampled = flat
    deviations = [float(np.abs(sampled[: recorded.size] - recorded).max(initial=0.0))]
    if sampled.size < recorded.size:
        raise ValueError(f"{sampled.size} sampled elements, {recorded.size} recorded")
    if "mean" in record:
        deviations.append(abs(float(flat.mean()) - record["mean"]))
    if "std" in record:
        deviations.append(abs(float(flat.std()) - record["std"]))
    for k, expected in enumerate(record.get("checksum", [])):
        probe = fill_input(f"probe{k}", (flat.size,), 0).numpy()
        deviations.append(abs(float(flat @ probe) / math.sqrt(flat.size) - expected))
    worst = max(d if math.isfinite(d) else math.inf for d in deviations)
    return worst / (record.get("std") or 1.0)


def read_case(path: Path) -> dict[str, Any]:
    """The fields of a case of a whole model in evaluation mode.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a case.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no golden case at {path}")
    try:
        case = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    wanted = {"state_dict", "outputs", "input"}
    if not isinstance(case, dict) or not wanted <= case.keys():
        raise ValueError(f"{path} is no golden case of a whole model: it needs {', '.join(sorted(wanted))}")
    if case.get("mode", "eval") != "eval":
        raise ValueError(f"{path} is a case of mode {case['mode']!r}: a weight file is verified in evaluation")
    return case


def case_weights(case: Mapping[str, Any]) -> StateDict:
    """The floating-point entries of the case's state dict, in float64; without what its model derives itself."""
    derived = [*(case.get("derived_buffers") or ()), *(case.get("kept_entries") or ())]
    left_out = {entry if isinstance(entry, str) else entry[0] for entry in derived}
    seed = case.get("seed", 0)
    state = {n: fill_weight(n, shape, seed) for n, shape, kind in case["state_dict"] if "float" in kind}
    state = {name: value for name, value in state.items() if name not in left_out}
    for leaf, factor in case.get("weight_edits") or ():
        for name in state:
            if name.rsplit(".", 1)[-1] == leaf:
                state[name] = state[name] * factor
    return state


def check_weights(case: Mapping[str, Any], state: Mapping[str, Tensor], path: Path) -> None:
    """Whether a file's official entries are those that the case was computed with.

    Raises:
        CheckpointError: they are others: the recorded outputs say nothing about them.
    """
    for name, value in case_weights(case).items():
        if name not in state or state[name].shape != value.shape:
            raise CheckpointError(
                f"{path} is of another model than the golden case: {name} is missing or has another shape"
            )
        if not torch.equal(value.to(state[name].dtype), state[name]):
            raise CheckpointError(
                f"{path} holds other weights than the golden case was computed with (first: {name}): its outputs say "
                "nothing about them"
            )


def compare(case: Mapping[str, Any], model: nn.Module, dtype: torch.dtype) -> dict[str, float]:
    """Run the case's input and compare what the model returns: record -> deviation in units of the recorded std."""
    image = fill_input(case["input"]["name"], case["input"]["shape"], case.get("seed", 0)).to(dtype)
    with torch.no_grad():
        output = model.to(dtype).eval()(image)
    records = case["outputs"]
    if hasattr(output, "class_logits"):
        named = {"pred_logits": output.class_logits, "pred_masks": output.mask_logits}
    elif isinstance(output, Tensor):
        named = dict.fromkeys(("logits", "sr"), output)
    else:
        named = {f"{kind}{i}": value for kind in ("feat", "out") for i, value in enumerate(output)}
    return {name: output_error(records[name], value) for name, value in named.items() if name in records}
