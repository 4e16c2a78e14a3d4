"""Inference of zoo's detectors against torchvision's own with the same backbone, side by side in one run.

    python tests/bench/detection.py [--size 320] [--repeats 5] [--heads retinanet mask_rcnn]

Both sides have timm's resnet50 with the same random weights (torchvision's gets it as its `backbone`), the same image
and the same anchors and thresholds; the numbers of detections show that both do the same work. The folded form is
`zoo.fold`'s. Times are of the CPU with one thread: on a shared machine only the ratio means something.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torchvision
from torchvision.models.detection import MaskRCNN, RetinaNet

import zoo
from zoo.heads.detection import create_detector


def torchvisions(head: str, ours: torch.nn.Module, size: int) -> torch.nn.Module:
    """torchvision's detector around a copy of the same backbone and heads."""
    common = dict(min_size=size, max_size=2 * size)
    if head == "retinanet":
        model = RetinaNet(ours.backbone, 91, **common, detections_per_img=100)
    else:
        model = MaskRCNN(ours.backbone, 91, **common)
    return model.eval()


def equalise(model: torch.nn.Module) -> None:
    """Head weights large enough that there are detections to be suppressed, as in a trained model."""
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if name.endswith(("cls_logits.weight", "cls_score.weight")):
            torch.nn.init.normal_(p, std=0.05)
        elif name.endswith("cls_logits.bias"):
            torch.nn.init.constant_(p, -4.6)


def seconds(model: torch.nn.Module, images: list[torch.Tensor]) -> tuple[float, int]:
    """Time of one call, and detections."""
    start = time.perf_counter()
    with torch.inference_mode():
        found = model(images)
    return time.perf_counter() - start, sum(len(one["scores"]) for one in found)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=320, help="shorter side")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--heads", nargs="+", default=["retinanet", "mask_rcnn"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, CPU, 1 thread, {args.size} px")
    print(f"{'head':<12} {'torchvision':>12} {'zoo':>9} {'folded':>9} {'ratio':>7} {'folded':>7}  detections")
    image = [torch.rand(3, args.size, args.size * 4 // 3)]
    for head in args.heads:
        torch.manual_seed(0)
        classes = 91 if head == "retinanet" else 90
        ours = create_detector(head, "resnet50", classes, min_size=args.size, max_size=2 * args.size).eval()
        theirs = torchvisions(head, ours, args.size)
        equalise(ours)
        equalise(theirs)
        folded = zoo.fold(ours)
        models = (theirs, ours, folded)
        counts = [seconds(model, image)[1] for model in models]
        times: list[list[float]] = [[], [], []]
        for _ in range(args.repeats):  # interleaved: what slows one down slows all
            for own, model in zip(times, models):
                own.append(seconds(model, image)[0])
        a, b, c = (statistics.median(own) for own in times)
        best = [min(own) for own in times]
        print(
            f"{head:<12} {a:>10.3f} s {b:>7.3f} s {c:>7.3f} s {best[0] / best[1]:>6.2f}x {best[0] / best[2]:>6.2f}x  "
            f"{counts[0]}, {counts[1]}, {counts[2]}"
        )


if __name__ == "__main__":
    main()
