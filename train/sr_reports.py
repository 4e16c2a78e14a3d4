"""What an evaluation of super-resolution leaves behind: scores of each picture beside bicubic ones, and a picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from torch import nn

from zoo.imresize import imresize, to_uint8
from zoo.train.data.superresolution import SuperResolutionData
from zoo.train.sr_metrics import mean_scores, sr_scores


def bicubic_scores(data: SuperResolutionData, border: int | None = None) -> list[dict[str, float]]:
    """Scores of bicubic enlargement, picture by picture."""
    scores = []
    for i in range(len(data.pairs)):
        low, high = data.picture(i)
        enlarged = to_uint8(imresize(np.asarray(low), data.scale))
        scores.append(sr_scores(enlarged, np.asarray(high), data.scale if border is None else border))
    return scores


def write_report(
    model: nn.Module,
    data: SuperResolutionData,
    scores: list[dict[str, float]],
    folder: Path,
    title: str,
    *,
    border: int | None = None,
    column: str = "trained",
) -> str:
    """Write `results.md`, `results.json` and `prediction.png`, and return the table's last line under its heading.

    Args:
        model: the upscaler, for the picture.
        data: the pictures.
        scores: the model's, one for each of them.
        folder: where to write.
        title: of the Markdown page.
        border: pixels that the scores leave out; the scale by default.
        column: what the model is called.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plain = bicubic_scores(data, border)
    rows = [(Path(pair.high).name, b, s) for pair, b, s in zip(data.pairs, plain, scores, strict=True)]
    rows.append(("mean", mean_scores(plain), mean_scores(scores)))
    lines = [f"| picture | bicubic PSNR / SSIM (Y) | {column} |", "|---|---|---|"]
    lines += [
        f"| {name} | {b['psnr_y']:.2f} / {b['ssim_y']:.4f} | {s['psnr_y']:.2f} / {s['ssim_y']:.4f} |"
        for name, b, s in rows
    ]
    (folder / "results.md").write_text(f"# {title}\n\n" + "\n".join(lines) + "\n")
    results = {name: {"bicubic": b, column: s} for name, b, s in rows}
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    low, _ = data.picture(0)
    model.predict(np.asarray(low)).draw(np.asarray(low)).save(folder / "prediction.png")
    return "\n".join([*lines[:2], lines[-1]])
