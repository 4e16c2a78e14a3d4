"""AsCAN, reading R1: models, C blocks and T blocks; the files are of a build of the same text, not of official code.

Multiply-adds follow the files: convolutions, linear layers and matrix products; norms are left out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

import zoo
from tests.parity.fcaformer import (
    count_checks,
    gradient_checks,
    official_state,
    output_checks,
    wants_gradients,
    watch,
)
from tests.parity.golden import Case
from tests.parity.runner import Check, NoSuchForm, NotUnderstood
from zoo.ascan import HEAD_NAMES, AsCan, ConvBlock, TransformerBlock

_ARGUMENTS = (
    "in_chans",
    "num_classes",
    "stem_width",
    "widths",
    "patterns",
    "conv_expansion",
    "mlp_ratio",
    "head_dim",
    "pos_bias",
)


def claims(case: Case) -> bool:
    return "specs/ascan.md" in case.get("source", "") or str(case.get("variant", "")).startswith("ascan_")


def run(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    made = case["constructor"]
    if "patterns" in made:
        given = {name: made[name] for name in _ARGUMENTS if name in made}
        model = AsCan(img_size=_image_size(case), dtype=torch.float64, **given)
    elif "in" in made:
        model = ConvBlock(
            made["in"], made["out"], made.get("stride", 1), made.get("conv_expansion", 4), dtype=torch.float64
        )
    elif "dim" in made:
        model = TransformerBlock(made["dim"], made.get("head_dim", 32), made.get("mlp_ratio", 4), dtype=torch.float64)
    else:
        raise NotUnderstood(f"an AsCAN case of {', '.join(made)}")
    zoo.load_checkpoint(model, official_state(case))
    record = case.get("input") or case["inputs"][0]
    if not folded:
        shape = (1, *record["shape"][1:])
        yield from count_checks(case, model, lambda m: m(torch.zeros(shape, device="meta", dtype=torch.float64)))
    train = case.get("mode") == "train"
    if folded and train:
        raise NoSuchForm("the folded form is not for training")
    model = (zoo.fold(model) if folded else model).to(dtype).train(train)
    gradients = wants_gradients(case) and not folded
    x = case.input(record["name"], record["shape"]).to(dtype).requires_grad_(gradients)
    outputs = {}
    if isinstance(model, AsCan):
        watch(outputs, "stem", model.stem)
        for i, stage in enumerate(model.stages):
            watch(outputs, f"stage{i}", stage)
    with torch.set_grad_enabled(gradients):
        y = model(x)
    outputs["logits" if isinstance(model, AsCan) else "y"] = y
    if isinstance(model, AsCan):
        outputs["pooled"] = outputs[f"stage{len(model.stages) - 1}"].mean((2, 3))
    yield from output_checks(case, outputs, dtype)
    if not folded:
        yield from gradient_checks(case, model, y, {record["name"]: x}, lambda n: HEAD_NAMES.get(n, n))


def _image_size(case: Case) -> tuple[int, int]:
    size = case["constructor"].get("img_size") or case["input"]["shape"][2:]
    return (size, size) if isinstance(size, int) else tuple(size)
