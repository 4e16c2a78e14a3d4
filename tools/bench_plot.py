"""Claimed accuracy against measured speed, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zoo.extras import require
from zoo.tools.bench_models import Row

_MARKERS = {"eager": "o", "folded": "s", "compiled": "^", "onnx": "D"}


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Write a picture: images a second (logarithmic) against the papers' top-1; one colour a model, one mark a form.

    Raises:
        ValueError: no model has a claim or a measured throughput.
    """
    known = [row for row in rows if row.claim is not None and row.throughput]
    if not known:
        raise ValueError(
            "no model here has a claimed accuracy in the manifest and a measured throughput: nothing to plot"
        )
    matplotlib = require("matplotlib", extra="train")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", extra="train")
    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    names = list(dict.fromkeys(row.model for row in known))
    for number, name in enumerate(names):
        mine = sorted((row for row in known if row.model == name), key=lambda row: row.throughput)
        colour = f"C{number % 10}"
        axes.plot([r.throughput for r in mine], [r.claim for r in mine], "-", color=colour, linewidth=1, alpha=0.6)
        for row in mine:
            axes.plot(row.throughput, row.claim, _MARKERS[row.form], color=colour, markersize=8)
        label = Path(name).stem if name.endswith(".safetensors") else name
        axes.annotate(label, (mine[-1].throughput, mine[-1].claim), (8, 5), textcoords="offset points", fontsize=10)
    for form in dict.fromkeys(row.form for row in known):
        axes.plot([], [], _MARKERS[form], color="0.3", label=form)
    axes.set_xscale("log")
    axes.margins(x=0.18, y=0.1)
    axes.set_xlabel("images per second, measured")
    axes.set_ylabel("ImageNet top-1, %, claimed by the paper")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25, which="both")
    axes.legend(title="form")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
