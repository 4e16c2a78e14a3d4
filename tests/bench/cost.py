"""What 300 epochs of ImageNet-1k cost, per family: a measured training step, and the formulas that extend it.

    python tests/bench/cost.py [NAME ...] [--batch-size 4] [--devices 8] [--peak 989e12] [--utilisation 0.2] [...]

A step is forward, backward and AdamW in float32 at 224 px. One thread's processor time counts, so that other work on
the machine disturbs little. An image's training takes about 6 x multiply-adds operations: 2 for a multiply-add, once
forward and twice backward. Then, with N = 1,281,167 images and E = 300 epochs,

    measured machine:   hours = N E / (3600 rate)
    other devices:      hours = the larger of   arithmetic  6 N E multiply-adds / (3600 devices peak utilisation)
                                          and   pictures    N E / (3600 cores pictures-a-second-of-a-core)

`--peak` is a device's peak in the precision used (operations a second), `--utilisation` the part of it that a training
reaches: an assumption until it is measured there. The rate of a core is measured here: photographs of 640 x 480
decoded, cropped to 224 px and RandAugmented.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import timm
import torch

import zoo  # noqa: F401 - registers the models
from zoo.tools.info import multiply_adds
from zoo.train.data.transforms import build_transforms

NAMES = (
    "poolformerv1_s12",
    "crate_tiny",
    "fcaformer_l1",
    "slab_deit_t",
    "ascan_tiny",
    "ninformer_tiny_patch16_224",
    "activator_tiny_patch16_224",
    "spartan_tiny",
    "vim2_tiny",
)
IMAGES, EPOCHS = 1_281_167, 300


def step_rate(model: torch.nn.Module, batch_size: int, size: int, steps: int = 2) -> float:
    """Images a second of one thread's processor time, the best of a few steps after the first."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    inputs, targets = torch.randn(batch_size, 3, size, size), torch.randint(0, 1000, (batch_size,))
    seconds = []
    for _ in range(steps + 1):
        start = time.process_time()
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
    return batch_size / min(seconds[1:])


def picture_rate() -> float:
    """Pictures a second that one core decodes and augments."""
    transform = build_transforms(train=True, input_size=224, auto_augment="rand-m9-mstd0.5-inc1", normalize=False)
    paths = sorted((Path(__file__).resolve().parents[1] / "data" / "coco_ccby" / "train2017").glob("*.jpg"))
    best = 0.0
    for _ in range(3):
        start = time.process_time()
        for path in paths:
            transform.from_file(path)
        best = max(best, len(paths) / (time.process_time() - start))
    return best


def main() -> None:
    """Print a row a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--peak", type=float, default=989e12, help="operations a second of one device")
    parser.add_argument("--utilisation", type=float, default=0.2)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--cores", type=int, default=128, help="of all the machines together")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    machine = platform.processor() or platform.machine()
    print(f"{machine}, one thread, torch {torch.__version__}, batch {args.batch_size}")
    pictures = picture_rate()
    reading = IMAGES * EPOCHS / (args.cores * pictures) / 3600
    print(f"one core decodes and augments {pictures:.0f} pictures/s: {reading:.1f} hours with {args.cores} cores")
    print(f"arithmetic: {args.devices} devices of {args.peak:.3g} operations/s, {args.utilisation:.0%} of it used\n")
    print("| model | multiply-adds | images/s | GFLOP/s | days on this core | hours, arithmetic | hours, larger |")
    print("|---|---|---|---|---|---|---|")
    for name in args.names:
        model = timm.create_model(name)
        size = model.pretrained_cfg["input_size"][-1]
        adds = multiply_adds(model.eval(), (1, 3, size, size))
        rate = step_rate(model, args.batch_size, size)
        days = IMAGES * EPOCHS / rate / 86400
        hours = 6 * IMAGES * EPOCHS * adds / (args.devices * args.peak * args.utilisation) / 3600
        cells = f"{adds / 1e9:.2f} G | {rate:.2f} | {6 * adds * rate / 1e9:.0f} | {days:.0f} | {hours:.1f}"
        print(f"| `{name}` | {cells} | {max(hours, reading):.1f} |", flush=True)


if __name__ == "__main__":
    main()
