"""MetaFormers on CPU, one thread: zoo against timm's own models, side by side in one process.

    python tests/bench/metaformer.py [kind ...]      # poolformer poolformerv2 convformer caformer by default

Kinds are sizes of timm's (`caformer` is `caformer_s18`; a full name works too). "timm" is timm's model in eager
mode, "zoo" is `poolformerv1_*` in eager mode, "folded" is `zoo.fold` of zoo's model where zoo has one, else of
timm's. Outputs are compared first, in float64 (timm's PoolFormer with the official head). Times are CPU time
of this process, milliseconds an image: median (20th to 80th percentile).
"""

from __future__ import annotations

import copy
import platform
import statistics
import sys
import time
from collections.abc import Callable

import timm
import torch
from torch import nn

import zoo
from zoo.metaformer import norm_before_pooling

SIZES = {
    "poolformer": "poolformer_s12",
    "poolformerv2": "poolformerv2_s12",
    "convformer": "convformer_s18",
    "caformer": "caformer_s18",
}


def alternate(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds of each function, called in turns so that disturbances hit all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.process_time()
            function()
            times[name].append(1e3 * (time.process_time() - start))
    return times


def show(what: str, times: dict[str, list[float]], images: int) -> None:
    """One line: each side's median and spread, and how many times faster than timm it is."""
    base = statistics.median(times["timm"])
    parts = []
    for name, taken in times.items():
        low, *_, high = (t / images for t in statistics.quantiles(taken, n=5))
        median = statistics.median(taken)
        parts.append(f"{name} {median / images:.1f} ({low:.1f}-{high:.1f}), {base / median:.2f}x")
    print(f"{what:<28} " + "; ".join(parts), flush=True)


def shaken(model: nn.Module) -> nn.Module:
    """The model with vectors and scalars as training would leave them: none zero or one."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def sides(name: str) -> dict[str, nn.Module]:
    """The models that are compared, with equal weights."""
    models = {"timm": shaken(timm.create_model(name))}
    if name.startswith("poolformer_"):
        models["zoo"] = timm.create_model(name.replace("poolformer", "poolformerv1")).eval()
        models["zoo"].load_state_dict(models["timm"].state_dict())
    return models | {"folded": zoo.fold(list(models.values())[-1])}


def error_in_float64(models: dict[str, nn.Module], name: str) -> float:
    """Largest difference from timm's output in float64, in units of its std."""
    image = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    reference = copy.deepcopy(models["timm"]).double()
    if name.startswith("poolformer_"):
        norm_before_pooling(reference)
    expected = reference(image)
    unfolded = list(models.values())[-2]
    others = [copy.deepcopy(unfolded).double(), zoo.fold(copy.deepcopy(unfolded).double())]
    return max(float((model(image) - expected).abs().max() / expected.std()) for model in others)


def train_step(model: nn.Module, images: torch.Tensor) -> Callable[[], object]:
    """Forward and backward in train mode."""
    model = copy.deepcopy(model).train()
    return lambda: model(images).sum().backward()


def bench(name: str) -> None:
    """Inference at batch 1 and 8, and a training step of batch 4 where zoo has a model of its own."""
    models = sides(name)
    with torch.inference_mode():
        error = error_in_float64(models, name)
        print(f"{name}: float64 difference {error:.1e} std")
        assert error < 1e-10
        for batch, rounds in ((1, 20), (8, 6)):
            images = torch.randn(batch, 3, 224, 224)
            calls = {side: (lambda model=model, images=images: model(images)) for side, model in models.items()}
            show(f"{name}, batch {batch}", alternate(calls, rounds), batch)
    if "zoo" in models:
        images = torch.randn(4, 3, 224, 224)
        steps = {side: train_step(models[side], images) for side in ("timm", "zoo")}
        show(f"{name}, training step", alternate(steps, 5), 4)


def main(names: list[str]) -> None:
    """Run the benchmark over the given kinds or names."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, timm {timm.__version__}, 224 px")
    for name in names or SIZES:
        bench(SIZES.get(name, name))


if __name__ == "__main__":
    main(sys.argv[1:])
