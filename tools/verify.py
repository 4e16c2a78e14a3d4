"""Check a weight file: which model it is, whether every entry fits, its hash, and a golden input where there is one."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zoo.tools.convert import json_object


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `zoo verify`."""
    parser.add_argument("path", metavar="FILE", help="weight file, official or zoo's")
    parser.add_argument("--model", help="what the file is, as NAME or NAME.TAG: recognised by default")
    parser.add_argument("--model-args", type=json_object, default={}, help="JSON object of arguments of the model")
    parser.add_argument("--golden", metavar="CASE.json", help="golden case whose input is run and outputs compared")


def run(args: argparse.Namespace) -> int:
    """Print what was found; status 1 if the golden outputs are missed."""
    good = True
    for line, passed in verify_file(Path(args.path), args.model, args.model_args, args.golden):
        print(line, flush=True)
        good &= passed
    return 0 if good else 1


def verify_file(
    path: Path,
    model: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    golden: str | None = None,
) -> Iterator[tuple[str, bool]]:
    """Lines about a file, each with whether it is good news.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: unreadable, of no model or another one, or with values that are not finite.
        ValueError: bad arguments.
    """
    import torch

    from zoo.checkpoint import CheckpointError, load_checkpoint, read_checkpoint
    from zoo.downloads import file_sha256
    from zoo.tools.recognition import recognise

    content = read_checkpoint(path)
    sha256 = file_sha256(path)
    found = recognise(path, content, model=model, arguments=arguments, sha256=sha256)
    network = found.build()
    with torch.no_grad():
        report = load_checkpoint(network, content)
    bad = [n for n, v in network.state_dict().items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
    if bad:
        raise CheckpointError(f"{path} has values that are not finite in {len(bad)} entries, such as {bad[0]}")
    yield f"model       {found.name} (known by {found.how})", True
    yield f"layout      {report.layout}, {report.loaded} entries loaded, all finite", True
    for note in report.notes:
        yield f"note        {note}", True
    yield f"parameters  {sum(p.numel() for p in network.parameters()):,}", True
    yield from _hash_lines(path, sha256, found.weights)
    if golden is not None:
        yield from _golden_lines(path, content, found, report.layout, Path(golden))


def _hash_lines(path: Path, sha256: str, weights: Any) -> Iterator[tuple[str, bool]]:
    yield f"sha256      {sha256}", True
    if weights is None:
        return
    if weights.sha256 is None:
        yield f"manifest    {weights.name}; its hash is not recorded", True
    elif weights.sha256 == sha256:
        yield f"manifest    {weights.name}, the hash agrees", True
    else:
        from zoo.checkpoint import CheckpointError

        if path.suffix != ".safetensors" or str(weights.file).endswith(".safetensors"):
            raise CheckpointError(f"{path} has another SHA-256 than {weights.name} of the manifest: {weights.sha256}")
        yield f"manifest    {weights.name}, converted", True


def _golden_lines(path: Path, content: Any, found: Any, layout: str, golden: Path) -> Iterator[tuple[str, bool]]:
    import torch

    from zoo.checkpoint import load_checkpoint, unwrap_state_dict
    from zoo.saving import read_metadata, restore_official_numerics
    from zoo.tools.conversion import official_entries
    from zoo.tools.golden import BARS, check_weights, compare, read_case

    case = read_case(golden)
    official = unwrap_state_dict(content)
    described = read_metadata(path) if path.suffix == ".safetensors" else {}
    if described.get("official"):
        official, _ = official_entries(path, content)
    check_weights(case, official, path)
    stored = {v.dtype for v in official.values() if v.is_floating_point()}
    compared: set[str] = set()
    for dtype, bar in BARS.items():
        network = found.build().to(dtype)
        with torch.no_grad():
            load_checkpoint(network, content)
        restore_official_numerics(network, described)
        # float32 weights differ from those of the case by their rounding
        bar = bar if stored == {torch.float64} else max(bar, BARS[torch.float32])
        for name, error in compare(case, network, dtype).items():
            compared.add(name)
            kind = str(dtype).removeprefix("torch.")
            verdict = "good" if error <= bar else "WRONG"
            yield f"golden      {name} in {kind}: {error:.1e} of its deviation, bar {bar:.0e}: {verdict}", error <= bar
    if not compared:
        yield f"golden      nothing in {golden} is an output of this model: {', '.join(case['outputs'])[:100]}", False
    elif len(case["outputs"]) > len(compared):
        yield (
            f"golden      {len(case['outputs']) - len(compared)} intermediate values of the case were not compared",
            True,
        )
