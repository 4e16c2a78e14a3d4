"""A start for short trainings: the official architecture with weights that compute bicubic enlargement.

Each row of pixels between the low-resolution ones is a 4-tap filter of them. Its z-transform, a cubic, factors into two
real polynomials of degree 2 or less, so that two 3-tap filters in a row give exactly the bicubic one: the first is
`conv_first`, the second `upsample.0`, one channel for each colour and phase, and the body begins by adding nothing.
"""

import numpy as np
import torch

from zoo.heads.craft.model import Craft
from zoo.imresize import cubic


def phase_filters(scale: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each of the `scale` output positions in a pixel, two 3-tap filters that give the bicubic one in a row."""
    filters = []
    for phase in range(scale):
        center = (phase + 0.5) / scale - 0.5
        taps = cubic(center - np.arange(-2, 3))  # of the pixels at offsets -2 ... 2
        used = np.flatnonzero(np.abs(taps) > 1e-12)
        first, taps = used[0] - 2, taps[used[0] : used[-1] + 1]
        roots = np.roots(taps)
        if len(roots) > 2:
            real = roots[np.argmin(np.abs(roots.imag))].real
            quadratic = np.polydiv(taps, [1, -real])[0]
            # the quadratic takes the offsets -1, 0, 1, the linear factor what is left
            linear = np.zeros(3)
            linear[first + 2 : first + 4] = [1, -real]
        else:
            quadratic, linear = np.zeros(3), np.array([0.0, 1.0, 0.0])
            quadratic[first + 1 : first + 1 + len(taps)] = taps
        gain = np.sqrt(np.abs(quadratic).sum() / np.abs(linear).sum())  # the same size for both
        filters.append((linear * gain, quadratic / gain))
    return filters


@torch.no_grad()
def start_from_bicubic(model: Craft) -> Craft:
    """Give a new model weights with which it enlarges bicubically (away from the border); returns the model.

    Raises:
        ValueError: the model is too narrow for one channel for each colour and phase.
    """
    scale, colours = model.scale, model.in_chans
    if colours * scale**2 > model.embed_dim:
        raise ValueError(
            f"embed_dim is {model.embed_dim}: a bicubic start for scale {scale} needs {colours * scale**2} or more"
        )
    first, last, body = model.conv_first, model.upsample[0], model.conv_after_body
    filters = phase_filters(scale)
    last.weight.zero_()
    last.bias.zero_()
    used = colours * scale**2
    first.weight[:used].zero_()
    first.bias[:used].zero_()
    for colour in range(colours):
        for i, (row_first, row_last) in enumerate(filters):
            for j, (column_first, column_last) in enumerate(filters):
                channel = (colour * scale + i) * scale + j  # as pixel shuffling orders them
                first.weight[channel, colour] = torch.from_numpy(np.outer(row_first, column_first))
                last.weight[channel, channel] = torch.from_numpy(np.outer(row_last, column_last))
    if isinstance(body, torch.nn.Conv2d):
        body.weight.zero_()
        body.bias.zero_()
    return model
