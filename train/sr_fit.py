"""A small training loop for super-resolution models: one process, any number of stops and starts, no engine.

    python -m zoo.train.sr_fit --high photos/ --scale 2 --out runs/craft_x2 --steps 3000

Every random draw depends on (seed, step, place in the batch) alone, so a run that was killed and started again ends
with the same weights. What is validated, kept and shipped is an exponential moving average of the weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from zoo.train.data.superresolution import SuperResolutionData, open_superresolution
from zoo.train.loading import derive_seed, seed_everything
from zoo.train.superresolution import evaluate_superresolution


def learning_rate(step: int, steps: int, peak: float, warmup: int, hold: float) -> float:
    """Linear warm-up, constant until the share `hold` of the steps, then half a cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = max(0.0, step / steps - hold) / (1 - hold)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def draw_batch(data: SuperResolutionData, size: int, seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs of one step in 0..1: pictures in a shuffled order for each pass over them."""
    lows, highs = [], []
    for place in range(step * size, (step + 1) * size):
        epoch, position = divmod(place, len(data))
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(derive_seed(seed, epoch)))
        index = int(order[position])
        seed_everything(derive_seed(seed, epoch, index))
        low, high = data[index]
        lows.append(low)
        highs.append(high)
    return torch.stack(lows).float() / 255, torch.stack(highs).float() / 255


def fit(
    model: nn.Module,
    data: SuperResolutionData,
    out: str | os.PathLike,
    *,
    steps: int,
    batch_size: int = 4,
    lr: float = 5e-4,
    warmup: int = 100,
    hold: float = 0.4,
    ema_decay: float = 0.998,
    bf16: bool = False,
    seed: int = 0,
    validation: SuperResolutionData | None = None,
    interval: int = 200,
    say: Callable[[str], None] = print,
) -> nn.Module:
    """Train with L1 and Adam; returns the averaged model, which `out/best.safetensors` holds at its best.

    Args:
        model: takes and gives images in 0..1; has `scale` and `upscale`.
        data: with a patch size.
        out: folder for `checkpoint.pth`, `best.safetensors` and `history.jsonl`; a run in it is continued.
        steps: optimiser steps; a continued run may have more or fewer.
        batch_size: pairs of a step.
        lr: peak of the learning rate.
        warmup: steps of linear warm-up.
        hold: share of the steps before the rate begins to fall.
        ema_decay: of the averaged weights, shorter at the start.
        bf16: autocast.
        seed: of everything random.
        validation: whole pictures; the best mean PSNR (Y) is kept. Without it, the last weights are.
        interval: steps between checkpoints, each with a validation.
        say: takes a line at each checkpoint.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99))
    average = copy.deepcopy(model).eval().requires_grad_(False)
    first, best = 0, -math.inf
    if (out / "checkpoint.pth").is_file():
        saved = torch.load(out / "checkpoint.pth", weights_only=True)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        first, best = saved["step"], saved["best"]
        say(f"continuing at step {first}")
    device = next(model.parameters()).device
    losses, start = [], time.perf_counter()
    for step in range(first, steps):
        low, high = (t.to(device) for t in draw_batch(data, batch_size, seed, step))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr, warmup, hold)
        model.train()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output = model(low)
        loss = F.l1_loss(output.float(), high)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is {losses[-1]} at step {step}: use a smaller lr than {lr}")
        decay = min(ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for a, b in zip(average.parameters(), model.parameters()):
                a.lerp_(b, 1 - decay)
        if (step + 1) % interval == 0 or step + 1 == steps:
            record = dict(step=step + 1, loss=sum(losses) / len(losses), seconds=time.perf_counter() - start)
            if validation is not None:
                record |= evaluate_superresolution(average, validation)[0]
            score = record.get("psnr_y", math.inf)
            if score >= best:
                best = score
                save_file({k: v.contiguous() for k, v in average.state_dict().items()}, out / "best.safetensors")
            state = dict(model=model.state_dict(), average=average.state_dict(), optimizer=optimizer.state_dict())
            torch.save(state | dict(step=step + 1, best=best), out / "checkpoint.part")
            os.replace(out / "checkpoint.part", out / "checkpoint.pth")
            with (out / "history.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
            say("  ".join(f"{name} {value:.4g}" for name, value in record.items()))
            losses, start = [], time.perf_counter()
    return average


def main() -> None:
    """Train CRAFT from its bicubic start on folders of photographs."""
    from zoo.heads.craft import Craft
    from zoo.heads.craft.start import start_from_bicubic

    parser = argparse.ArgumentParser(prog="python -m zoo.train.sr_fit", description=__doc__)
    parser.add_argument("--high", nargs="+", required=True, help="folders of photographs")
    parser.add_argument("--val", nargs="+", help="photographs or folders to validate on")
    parser.add_argument("--scale", type=int, default=2)
    parser.add_argument("--shrink", type=float, default=1.0, help="make photographs smaller first")
    parser.add_argument("--patch", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--interval", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    seed_everything(args.seed)
    options = dict(hr_shrink=args.shrink)
    data = open_superresolution(args.high, args.scale, patch=args.patch, **options)
    small = data.drop_small()
    print(f"{len(data)} photographs, {len(small)} left out as smaller than the patch", flush=True)
    validation = open_superresolution(args.val, args.scale, **options) if args.val else None
    model = start_from_bicubic(Craft(args.scale))
    fit(
        model,
        data,
        args.out,
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
        validation=validation,
        interval=args.interval,
        say=lambda line: print(line, flush=True),
    )


if __name__ == "__main__":
    main()
