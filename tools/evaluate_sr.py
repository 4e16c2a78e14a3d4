"""`zoo eval` for super-resolution: PSNR and SSIM on the luma, as papers report them."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NamedTuple

from zoo.tools.comparison import Outcome
from zoo.tools.subject import Subject

_ALIASES = {"bsd100": "b100", "bsds100": "b100", "manga": "manga109"}


class PictureSet(NamedTuple):
    """A named folder of pictures, with the one of their small versions where there is one."""

    name: str
    high: Path
    low: Path | None


def find_sets(root: Path, scale: int) -> list[PictureSet]:
    """The sets of a folder: itself with HR/ and perhaps LR_bicubic/X2, folders of this kind in it, or pictures alone.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: several sets by one name.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no folder of pictures at {root}: check the path")
    folders = [root] if (root / "HR").is_dir() else [f for f in sorted(root.iterdir()) if (f / "HR").is_dir()]
    if not folders:
        return [PictureSet(_set_name(root), root, None)]
    found = []
    for folder in folders:
        low = folder / "LR_bicubic" / f"X{scale}"
        found.append(PictureSet(_set_name(folder), folder / "HR", low if low.is_dir() else None))
    names = [one.name for one in found]
    double = next((name for name in names if names.count(name) > 1), None)
    if double:
        raise ValueError(f"{root} has two sets called {double}: evaluate them one after the other")
    return found


def _set_name(folder: Path) -> str:
    name = re.sub(r"[^a-z0-9]+", "_", folder.resolve().name.lower()).strip("_") or "pictures"
    return _ALIASES.get(name, name)


def evaluate_sets(subject: Subject, args: argparse.Namespace) -> list[Outcome]:
    """An outcome for each set of pictures."""
    from zoo.train.data.superresolution import open_superresolution
    from zoo.train.engine import pick_device
    from zoo.train.sr_reports import write_report
    from zoo.train.superresolution import evaluate_superresolution

    model = subject.model.to(pick_device(args.device))
    if model.in_chans != 3:
        raise ValueError(f"{subject.title} takes {model.in_chans} channels, and sets of pictures are RGB")
    if args.precision != "float32":
        raise ValueError("--precision bf16 is not for super-resolution, whose differences are below its rounding")
    stated = subject.weights.evaluation if subject.weights else {}
    border = stated.get("border", model.scale)
    padding = args.padding or stated.get("padding", "official")
    ensemble = args.self_ensemble or stated.get("self_ensemble", False)
    sets = find_sets(Path(args.data), model.scale)
    if args.dataset:
        if len(sets) > 1:
            raise ValueError(f"{args.data} has the sets {', '.join(s.name for s in sets)}: leave --dataset out")
        sets = [sets[0]._replace(name=args.dataset)]
    outcomes = []
    for name, high, low in sets:
        data = open_superresolution(high, model.scale, low=low)
        made = "" if low else "; low-resolution pictures are made from them (MATLAB's bicubic)"
        print(f"{name}: {len(data)} pictures{made}")
        mean, scores = evaluate_superresolution(model, data, padding=padding, self_ensemble=ensemble, border=border)
        folder = Path(args.out) / name if len(sets) > 1 else Path(args.out)
        title = f"{subject.title} on {name}"
        print(write_report(model, data, scores, folder, title, border=border, column="model"))
        settings = {
            "scale": model.scale,
            "border": border,
            "colour": "y",
            "padding": padding,
            "self_ensemble": ensemble,
            "low_resolution": "given" if low else "made",
        }
        metrics = {f"{metric}_{name}": float(mean[f"{metric}_y"]) for metric in ("psnr", "ssim")}
        outcomes.append(Outcome(name, "test", len(data), metrics, settings))
    return outcomes
