"""The super-resolution part of `make demo`: bicubic, zoo's x2 weights and the original side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


def draw_upscaling(photograph: Path, out: Path, crop: tuple[int, int, int, int] | None = None, zoom: int = 3) -> str:
    """Shrink a photograph, enlarge it twice, draw the three beside each other; gives a line with their PSNR.

    Args:
        photograph: the original.
        out: picture to write.
        crop: left, top, right, bottom of the part that is shown.
        zoom: how much larger the part is drawn.
    """
    import zoo
    from zoo.imresize import imresize, shrink, to_uint8
    from zoo.train.sr_metrics import sr_scores

    model = zoo.create_upscaler("craft", scale=2, pretrained=True)
    original = np.asarray(zoo.read_image(photograph))
    original = original[: original.shape[0] // 2 * 2, : original.shape[1] // 2 * 2]
    low = shrink(original, 2)
    plain = to_uint8(imresize(low, 2))
    ours = np.asarray(model.predict(low).image)
    scores = {name: sr_scores(x, original, 2)["psnr_y"] for name, x in (("bicubic", plain), ("CRAFT x2", ours))}
    panels = [
        (f"bicubic {scores['bicubic']:.2f} dB", plain),
        (f"CRAFT x2 (ours) {scores['CRAFT x2']:.2f} dB", ours),
        ("original", original),
    ]
    left, top, right, bottom = crop or (0, 0, original.shape[1], original.shape[0])
    width, height, gap = (right - left) * zoom, (bottom - top) * zoom, 8
    sheet = Image.new("RGB", (3 * width + 4 * gap, height + 2 * gap + 16), "white")
    for i, (title, values) in enumerate(panels):
        part = (
            Image.fromarray(values).crop((left, top, right, bottom)).resize((width, height), Image.Resampling.NEAREST)
        )
        x = gap + i * (width + gap)
        ImageDraw.Draw(sheet).text((x, gap // 2), title, fill="black")
        sheet.paste(part, (x, gap + 16))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
    return f"x2 of {photograph.name}: bicubic {scores['bicubic']:.2f} dB, CRAFT {scores['CRAFT x2']:.2f} dB (Y); {out}"
