"""Inference of zoo's detectors against torchvision's own with the same backbone, side by side in one run.

    python tests/bench/detection.py [--size 320] [--repeats 5] [--heads retinanet mask_rcnn]

Both sides have one resnet50 of timm, the same image and no score limit, so that both decode, suppress and (Mask R-CNN)
draw 100 objects. The folded form is `zoo.fold`'s. Times are CPU time of one thread, so that a busy machine does less
harm; the ratio is of the best runs.
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
        model = RetinaNet(ours.backbone, 91, **common, detections_per_img=100, score_thresh=0.0)
    else:
        model = MaskRCNN(ours.backbone, 91, **common, box_score_thresh=0.0)
    return model.eval()


def enliven(model: torch.nn.Module) -> None:
    """Weights of the heads that give many detections to be decoded, suppressed and masked, as in a trained model."""
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if name.startswith(("backbone", "transform")):
            continue
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=(2 / p[0].numel()) ** 0.5)
        elif name.endswith("cls_logits.bias"):
            torch.nn.init.constant_(p, -4.6)
    for name, p in model.named_parameters():
        if name.endswith("bbox_pred.weight") or name.endswith("bbox_reg.weight"):
            torch.nn.init.normal_(p, std=0.01)


def seconds(model: torch.nn.Module, images: list[torch.Tensor]) -> tuple[float, int]:
    """Time of one call, and detections."""
    start = time.process_time()
    with torch.inference_mode():
        found = model(images)
    return time.process_time() - start, sum(len(one["scores"]) for one in found)


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
        limit = {"score_thresh" if head == "retinanet" else "box_score_thresh": 0.0}
        ours = create_detector(head, "resnet50", classes, min_size=args.size, max_size=2 * args.size, **limit).eval()
        theirs = torchvisions(head, ours, args.size)
        enliven(ours)
        enliven(theirs)
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
