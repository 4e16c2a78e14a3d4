"""How many pictures a second one worker decodes and augments, and where the time goes.

    python -m tests.bench.data                     # thumbnails and camera-size pictures made of them
    python -m tests.bench.data --folder photos     # any folder of class folders

Three pipelines over the same files, interleaved in one process: torchvision's ImageFolder and timm's ImageDataset
under timm's transform, and zoo's. Before anything is timed, zoo's tensors must equal timm's for the same seed
(with reduced decoding off). The last lines say what share of zoo's time each stage takes.
"""

from __future__ import annotations

import argparse
import platform
import random
import tempfile
import time
from pathlib import Path
from statistics import quantiles

import numpy as np
import PIL
import timm
import torch
import torchvision
from PIL import Image
from timm.data import ImageDataset, create_transform
from torchvision.datasets import ImageFolder

from zoo.images import open_encoded, read_image, to_rgb
from zoo.train.data.classification import build_transforms, open_classification

THUMBNAILS = Path(__file__).parent.parent / "data" / "clothing10" / "train"
RECIPES = {"crop, flip, jitter": {}, "RandAugment": {"auto_augment": "rand-m5-mstd0.5-inc1"}}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="folder of class folders; default: the packaged thumbnails")
    parser.add_argument("--pictures", type=int, default=120, help="pictures a pass")
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--size", type=int, default=224)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{platform.machine()}, 1 thread, Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, timm {timm.__version__}, Pillow {PIL.__version__}"
    )
    if options.folder:
        compare(options.folder, options)
        return
    compare(THUMBNAILS, options)
    with tempfile.TemporaryDirectory() as folder:
        enlarge(THUMBNAILS, Path(folder), count=12, long_side=3000)
        options.pictures = 12
        compare(Path(folder), options)


def enlarge(source: Path, target: Path, *, count: int, long_side: int) -> None:
    """Camera-size JPEGs: pictures enlarged, with the noise that makes a sensor's files large."""
    noise = np.random.default_rng(0)
    for path in sorted(source.rglob("*.jpg"))[:: 600 // count][:count]:
        image = read_image(path)
        scale = long_side / max(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        pixels = np.asarray(image) + noise.normal(0, 6, (image.height, image.width, 1))
        place = target / path.parent.name
        place.mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / path.name, quality=90)


def compare(folder: Path, options: argparse.Namespace) -> None:
    """Time the pipelines on the first pictures of a folder."""
    zoo_data = open_classification(folder, "train", kind="folder", val_fraction=0)
    stride = max(1, len(zoo_data) // options.pictures)
    indices = range(0, len(zoo_data), stride)[: options.pictures]
    sizes = [Image.open(zoo_data.paths[i]).size for i in indices]
    width, height = np.median(sizes, axis=0).astype(int)
    print(
        f"\n{len(indices)} pictures of {width} x {height} (median) to {options.size} px: pictures/s, median (p20-p80)"
    )
    vision_data, timm_data = ImageFolder(folder), ImageDataset(folder)
    paths = {Path(path): i for i, (path, _) in enumerate(vision_data.samples)}
    vision = [paths[Path(zoo_data.paths[i])] for i in indices]
    paths = {Path(path): i for i, (path, _) in enumerate(timm_data.reader.samples)}
    timms = [paths[Path(zoo_data.paths[i])] for i in indices]
    for name, recipe in RECIPES.items():
        common = dict(input_size=options.size, interpolation="bicubic", **recipe)
        theirs = create_transform(is_training=True, **common)
        exact = build_transforms(train=True, reduced_decoding=False, **common)
        ours = build_transforms(train=True, **common)
        bytes_out = build_transforms(train=True, normalize=False, **common)
        for index in list(indices)[:5]:
            seed(index)
            expected = theirs(read_image(zoo_data.paths[index]))
            seed(index)
            if not torch.equal(expected, exact.from_file(zoo_data.paths[index])):
                raise SystemExit(f"zoo's transform differs from timm's on {zoo_data.paths[index]}")
        vision_data.transform = timm_data.transform = theirs
        sides = {
            "torchvision ImageFolder": lambda: [vision_data[i] for i in vision],
            "timm ImageDataset": lambda: [timm_data[i] for i in timms],
            "zoo, full decoding": lambda t=exact: run(zoo_data, t, indices),
            "zoo": lambda t=ours: run(zoo_data, t, indices),
            "zoo, uint8 out": lambda t=bytes_out: run(zoo_data, t, indices),
        }
        rates: dict[str, list[float]] = {side: [] for side in sides}
        for attempt in range(options.passes + 1):
            for side, function in sides.items():
                seed(attempt)
                start = time.perf_counter()
                function()
                if attempt:  # the first pass warms the caches
                    rates[side].append(len(indices) / (time.perf_counter() - start))
        base = quantiles(rates["torchvision ImageFolder"], n=10)[4]
        print(f"  {name}")
        for side, values in rates.items():
            cuts = quantiles(values, n=10)
            print(f"    {side:26} {cuts[4]:7.1f} ({cuts[1]:.1f}-{cuts[7]:.1f})  {cuts[4] / base:.2f}x")
        print("    " + shares([zoo_data.paths[i] for i in indices], exact))


def run(data, transform, indices) -> list:
    data.transform = transform
    return [data[i] for i in indices]


def shares(paths: list[str], transform) -> str:
    """The stages of the full-decoding pipeline, in milliseconds a picture."""
    spent = dict.fromkeys(("read", "decode", "crop and resize", "augment", "to tensor"), 0.0)
    split = next(i for i, step in enumerate(transform.then.transforms) if "ToTensor" in type(step).__name__)
    for path in paths:
        clock = [time.perf_counter()]
        image, name = open_encoded(path)
        clock.append(time.perf_counter())
        image = to_rgb(image, name)
        clock.append(time.perf_counter())
        image = transform.crop(image)
        clock.append(time.perf_counter())
        for step in transform.then.transforms[:split]:
            image = step(image)
        clock.append(time.perf_counter())
        for step in transform.then.transforms[split:]:
            image = step(image)
        clock.append(time.perf_counter())
        for stage, begin, end in zip(spent, clock, clock[1:], strict=False):
            spent[stage] += (end - begin) / len(paths) * 1e3
    slowest = max(spent, key=spent.get)
    listed = ", ".join(f"{stage} {value:.2f}" for stage, value in spent.items())
    return f"ms a picture, full decoding: {listed}; the bottleneck is {slowest!r}"


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


if __name__ == "__main__":
    main()
