"""PSNR and SSIM as super-resolution papers report them.

The protocol: the output is rounded to uint8, `border` pixels (the scale) are cut off on each side, and the error is
that of the luma Y of BT.601 in its studio range, not rounded. Figures on RGB are about 2 dB lower and not comparable.
SSIM is MATLAB's: an 11 x 11 Gaussian window with sigma 1.5, the region where it fits, K = 0.01 and 0.03, in float64.
"""

from __future__ import annotations

import numpy as np

_Y = (np.array([65.481, 128.553, 24.966]) / 255).reshape(3, 1)


def luma(image: np.ndarray, rounded: bool = False) -> np.ndarray:
    """Y of BT.601, 16 to 235, as float32 (H, W), of uint8 RGB (H, W, 3) or grey (H, W).

    `rounded` to whole numbers, as MATLAB's rgb2ycbcr gives it for uint8 pictures: older tables were made with it, those
    of CRAFT and its contemporaries without.
    """
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    y = (image.astype(np.float64) @ _Y + 16)[..., 0]
    return (np.floor(y + 0.5) if rounded else y).astype(np.float32)


def crop_border(image: np.ndarray, border: int) -> np.ndarray:
    """Without `border` pixels on each side."""
    return image[border : image.shape[0] - border, border : image.shape[1] - border]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two pictures in 0..255, infinite for equal ones."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity (Wang et al., 2004) of two pictures in 0..255, the mean over channels.

    Raises:
        ValueError: smaller than the 11 x 11 window.
    """
    if min(a.shape[:2]) < 11:
        raise ValueError(f"SSIM needs 11 x 11 pixels at least, got {a.shape[1]}x{a.shape[0]} after cutting the border")
    if a.ndim == 2:
        a, b = a[..., None], b[..., None]
    return float(
        np.mean([_ssim(a[..., c].astype(np.float64), b[..., c].astype(np.float64)) for c in range(a.shape[2])])
    )


def _ssim(a: np.ndarray, b: np.ndarray) -> float:
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = _blur(a), _blur(b)
    aa, bb, ab = mean_a * mean_a, mean_b * mean_b, mean_a * mean_b
    var_a, var_b, cov = _blur(a * a) - aa, _blur(b * b) - bb, _blur(a * b) - ab
    values = (2 * ab + c1) * (2 * cov + c2) / ((aa + bb + c1) * (var_a + var_b + c2))
    return values.mean()


def _blur(x: np.ndarray) -> np.ndarray:
    window = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window /= window.sum()
    rows = sum(w * x[i : x.shape[0] - 10 + i] for i, w in enumerate(window))
    return sum(w * rows[:, i : rows.shape[1] - 10 + i] for i, w in enumerate(window))


def sr_scores(output: np.ndarray, truth: np.ndarray, border: int, round_luma: bool = False) -> dict[str, float]:
    """Scores of one picture: `psnr_y` and `ssim_y` (those of the papers' tables), `psnr` and `ssim` of RGB.

    Args:
        output: uint8 (H, W, 3) or (H, W).
        truth: uint8; cut at the right and bottom to the size of `output`.
        border: pixels left out on each side, the scale.
        round_luma: see `luma`.

    Raises:
        ValueError: the truth is smaller than the output, or nothing is left.
    """
    if truth.shape[0] < output.shape[0] or truth.shape[1] < output.shape[1]:
        raise ValueError(
            f"the true picture has {truth.shape[1]}x{truth.shape[0]} pixels, fewer than the output's "
            f"{output.shape[1]}x{output.shape[0]}: is this the pair of another picture or scale?"
        )
    output, truth = (x if x.ndim == 3 else np.repeat(x[..., None], 3, axis=2) for x in (output, truth))
    truth = truth[: output.shape[0], : output.shape[1]]
    output, truth = crop_border(output, border), crop_border(truth, border)
    y, true_y = luma(output, round_luma), luma(truth, round_luma)
    return {
        "psnr_y": psnr(y, true_y),
        "ssim_y": ssim(y, true_y),
        "psnr": psnr(output, truth),
        "ssim": ssim(output, truth),
    }


def mean_scores(scores: list[dict[str, float]]) -> dict[str, float]:
    """The mean over pictures of each score."""
    return {name: float(np.mean([s[name] for s in scores])) for name in scores[0]}
