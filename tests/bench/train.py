"""Images per second of `zoo train` against a train step as timm's script does it: same model, data and settings.

    python tests/bench/train.py [--rounds 3]

Both decode and augment clothing10 in the same number of worker processes and train in the main process; rounds
alternate. timm's side: `create_dataset`, `create_loader` (no prefetcher on a CPU), cross entropy, AdamW, clipping.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import timm
import torch
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.utils import dispatch_clip_grad

import zoo  # noqa: F401 - registers the models
from zoo.train.recipe import ClassificationRecipe
from zoo.train.trainer import train

DATA = Path(__file__).resolve().parents[1] / "data" / "clothing10"
CASES = {
    "crate, 64 px (data-bound)": (
        "crate_tiny",
        {"patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 2, "head_dim": 32},
        64,
    ),
    "crate_tiny, 96 px (compute-bound)": ("crate_tiny", {}, 96),
}


def zoo_rate(model: str, args: dict, size: int, workers: int) -> float:
    """Images per second of the second of three epochs: workers are up, and the checkpoint of the end is not in it."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = ClassificationRecipe(
            model=model, model_args=args, data=str(DATA), out=f"{folder}/run", img_size=size, epochs=3, batch_size=32,
            workers=workers, clip_grad=1.0, val_interval=3, checkpoint_interval=10**6, device="cpu", warmup_epochs=0,
        )  # fmt: skip
        train(recipe, quiet=True, say=lambda line: None)
        lines = [json.loads(line) for line in Path(f"{folder}/run/history.jsonl").read_text().splitlines()]
        return [line["images_per_second"] for line in lines if "loss" in line][1]


def timm_rate(name: str, args: dict, size: int, workers: int) -> float:
    """The same with timm's loader and step."""
    model = timm.create_model(name, num_classes=10, img_size=size, **args).train()
    dataset = create_dataset("", root=str(DATA), split="train", is_training=True)
    loader = create_loader(
        dataset,
        (3, size, size),
        32,
        is_training=True,
        num_workers=workers,
        use_prefetcher=False,
        persistent_workers=True,
        color_jitter=0.4,
        interpolation="bicubic",
        device=torch.device("cpu"),
        pin_memory=False,
    )
    optimizer = create_optimizer_v2(model, opt="adamw", lr=5e-4, weight_decay=0.05)
    for _ in range(2):
        images, start = 0, time.perf_counter()
        for inputs, targets in loader:
            loss = torch.nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            dispatch_clip_grad(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
            images += len(inputs)
        seconds = time.perf_counter() - start
    return images / seconds


def main() -> None:
    """Print a line a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for title, case in CASES.items():
        rates = [(zoo_rate(*case, args.workers), timm_rate(*case, args.workers)) for _ in range(args.rounds)]
        ours, theirs = (statistics.median(side) for side in zip(*rates))
        ratios = sorted(a / b for a, b in rates)
        print(
            f"{title}: zoo train {ours:.0f} images/s, timm {theirs:.0f} images/s, "
            f"ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
