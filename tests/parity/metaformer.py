"""Golden cases of the poolformer and metaformer repositories: zoo's models, and timm's own where timm has them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import timm
import torch
from timm.models.metaformer import (
    Attention,
    LayerNorm2dNoBias,
    LayerNormNoBias,
    MetaFormer,
    Pooling,
    SepConv,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import zoo
from tests.parity.golden import Case, fill_input, output_error, relative_error
from tests.parity.runner import BARS, GRADIENT_BAR, Check, NotUnderstood
from zoo.metaformer import (
    AttentionPoolFormer,
    DensePoolFormer,
    IdentityFormer,
    PoolFormer,
    RandFormer,
    SpatialFcPoolFormer,
    rename_official,
)
from zoo.metaformer_layers import BiasedAttention, RandomMixing

V1_FAMILIES = ("poolformer v1", "poolformer-repo ablation")
V2_FAMILIES = ("identityformer", "randformer", "poolformerv2", "convformer", "caformer")


def claims(case: Case) -> bool:
    return (case.get("constructor") or {}).get("family") in V1_FAMILIES + V2_FAMILIES


def run(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    model = build(case).to(dtype)
    exact = dtype is torch.float64 and not folded
    if exact:
        yield from _counts(case, model)
    state = {name: value.to(dtype) for name, value in case.weights().items()}
    zoo.load_checkpoint(model, state)
    model.train(case.get("mode") == "train")
    if folded:
        model = zoo.fold(model)
    image = case.input().to(dtype).requires_grad_(bool(case.get("gradients")) and exact)
    with torch.set_grad_enabled(image.requires_grad):
        outputs = _outputs(model, image)
    for name, record in case["outputs"].items():
        if name not in outputs:
            raise NotUnderstood(f"an output called {name}")
        yield Check(name, output_error(record, outputs[name]), BARS[dtype])
    if image.requires_grad:
        yield from _gradients(case, model, image, outputs["logits"])


# ---- building


def build(case: Case, device: str | None = None) -> nn.Module:
    """The model that the case's constructor fields and entry shapes describe, not its name."""
    constructor = case["constructor"]
    shapes = {name: tuple(shape) for name, shape, _ in case["state_dict"]}
    stem = next((n for n in ("patch_embed.proj.weight", "downsample_layers.0.conv.weight") if n in shapes), None)
    if stem is None:
        raise NotUnderstood(f"entries such as {', '.join(list(shapes)[:3])}")
    heads = [shapes[n][0] for n in ("head.weight", "head.fc2.weight") if n in shapes]
    shared = dict(
        in_chans=shapes[stem][1],
        num_classes=heads[0] if heads else 0,
        depths=tuple(constructor["depths"]),
        dims=tuple(constructor["dims"]),
        device=device,
    )
    if constructor["family"] in V1_FAMILIES:
        return _build_v1(case, constructor, shapes, shared)
    return _build_v2(case, constructor, shapes, shared)


def _build_v1(case: Case, constructor: dict, shapes: dict, shared: dict) -> nn.Module:
    mixers = _mixers(constructor.get("mixers") or constructor.get("token_mixers") or "pool", len(shared["dims"]))
    classes = {"identity": nn.Identity, "pool": Pooling, "attention": BiasedAttention, "fc": nn.Identity}
    scale = constructor.get("layer_scale_init", 1e-5)
    hidden = [shapes[f"network.{n}.0.mlp.fc1.weight"] for n in range(12) if f"network.{n}.0.mlp.fc1.weight" in shapes]
    arguments = shared | dict(
        token_mixers=[classes[mixer] for mixer in mixers],
        pool_size=constructor.get("pool_size") or 3,
        mlp_ratios=[shape[0] / shape[1] for shape in hidden],
        channel_norm="GroupNorm" not in (constructor.get("norm") or "GroupNorm"),
        use_layer_scale=any("layer_scale" in name for name in shapes),
        layer_scale_init_value=scale if isinstance(scale, float) else 1e-5,
    )
    if constructor.get("fork_feat"):
        del arguments["num_classes"]
        levels = [level for level in range(len(mixers)) if f"norm{2 * level}.weight" in shapes]
        return DensePoolFormer(norm_levels=levels, **arguments)
    fc_stages = [stage for stage, mixer in enumerate(mixers) if mixer == "fc"]
    position = next((int(n.split(".")[1]) for n in shapes if n.endswith(".pos_embed")), None)
    size = tuple(case["input"]["shape"][2:])
    if fc_stages:
        return SpatialFcPoolFormer(fc_stages=fc_stages, img_size=size, **arguments)
    if position is None and "attention" not in mixers:
        return PoolFormer(**arguments)
    if position is not None:  # entries before it: blocks and downsamplings, one of each a stage
        position = sum(f"network.{entry}.proj.weight" in shapes for entry in range(position))
    return AttentionPoolFormer(position_stage=position, img_size=size, **arguments)


def _build_v2(case: Case, constructor: dict, shapes: dict, shared: dict) -> nn.Module:
    stages = range(len(shared["dims"]))
    mixers = _mixers(constructor["token_mixers"], len(stages))
    scales = dict(
        layer_scale_init_values=[_scale(shapes, stage, "layer_scale1") for stage in stages],
        res_scale_init_values=[_scale(shapes, stage, "res_scale1") for stage in stages],
    )
    random = [stage for stage in stages if mixers[stage] == "random"]
    if set(mixers) <= {"identity", "random"}:
        if not random:
            return IdentityFormer(**shared, **scales)
        size = tuple(case["input"]["shape"][2:])
        return RandFormer(random_stages=random, img_size=size, **shared, **scales)
    # timm has these under its own names, which set the rest
    name = next((n for n in timm.list_models(f"{constructor['family']}_*") if _table(n) == _sizes(shared)), None)
    window = re.search(r"(\d+)x\d+ average pool", constructor["token_mixers"])
    pool = {"pool_size": int(window[1])} if window and window[1] != "3" else {}
    if name is not None and (constructor["head"] == "mlp") == (constructor["family"] != "poolformerv2"):
        arguments = {k: v for k, v in shared.items() if k not in ("depths", "dims")}
        return timm.create_model(name, **arguments, **scales, **pool)
    classes = {"identity": nn.Identity, "pool": Pooling, "conv": SepConv, "attention": Attention}
    whole_map = "C,H,W" in constructor["norm"]
    map_norm = timm.models.metaformer.GroupNorm1NoBias if whole_map else LayerNorm2dNoBias
    return MetaFormer(
        token_mixers=[classes[mixer] for mixer in mixers],
        norm_layers=[LayerNormNoBias if mixer == "attention" else map_norm for mixer in mixers],
        use_mlp_head=constructor["head"] == "mlp",
        **shared,
        **scales,
        **pool,
    )


def _mixers(text: str, stages: int) -> list[str]:
    """One of identity, pool, conv, attention, fc, random for each stage, from a sentence of the record."""
    known = (("random", "random"), ("fc", "fc"), ("attention", "attention"), ("conv", "conv"), ("pool", "pool"))
    words = [word for word in re.sub(r"\([^)]*\)", "", text.lower()).split(",") if word.strip()]
    mixers = [next((m for key, m in (*known, ("identity", "identity")) if key in word), None) for word in words]
    mixers = mixers * stages if len(mixers) == 1 else mixers
    if None in mixers or len(mixers) != stages:
        raise NotUnderstood(f"token mixers {text!r}")
    return mixers


def _scale(shapes: dict, stage: int, name: str) -> float | None:
    return 1.0 if f"stages.{stage}.0.{name}.scale" in shapes else None


def _sizes(arguments: dict) -> tuple:
    return arguments["depths"], arguments["dims"]


def _table(name: str) -> tuple:
    model = timm.create_model(name, device="meta")
    return tuple(len(stage.blocks) for stage in model.stages), tuple(info["num_chs"] for info in model.feature_info)


# ---- what a case records


def _outputs(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda _module, _args, output: outputs.update({name: output})

    hooks = [model.stem.register_forward_hook(keep("stem"))]
    hooks += [stage.register_forward_hook(keep(f"stage{i}")) for i, stage in enumerate(model.stages)]
    classifier = model.head.fc
    hooks.append(classifier.register_forward_pre_hook(lambda _m, args: outputs.update(pre_logits=args[0])))
    final = model(image)
    for hook in hooks:
        hook.remove()
    if isinstance(final, list):
        return outputs | {f"feat{level}": each for level, each in enumerate(final)}
    return outputs | {"logits": final}


def _gradients(case: Case, model: nn.Module, image: Tensor, logits: Tensor) -> Iterator[Check]:
    recorded = case["gradients"]
    probe = fill_input("gradprobe", (logits.numel(),), 0).to(logits.dtype)
    ((logits.reshape(-1) * probe).sum() / math.sqrt(logits.numel())).backward()
    if "input" in recorded:
        yield Check("gradient input", output_error(recorded["input"], image.grad), GRADIENT_BAR)
    norms = recorded.get("param_l2") or {}
    official = {name: torch.tensor(0) for name, _, _ in case["state_dict"]}
    names = dict(zip(official, rename_official(official)[1], strict=True))
    parameters = dict(model.named_parameters())
    for name, norm in norms.items():
        gradient = parameters[names[name]].grad
        if norm is None or gradient is None:
            error = 0.0 if norm is None and gradient is None else math.inf
        elif norm < 1e-9:  # mathematically zero: norm1.bias before pooling
            error = abs(float(gradient.norm()) - norm)
        else:
            error = relative_error(float(gradient.norm()), norm)
        yield Check(f"gradient {name}", error, GRADIENT_BAR)


def _counts(case: Case, model: nn.Module) -> Iterator[Check]:
    parameters = list(model.parameters())
    counts = dict(params=parameters, trainable_params=[p for p in parameters if p.requires_grad])
    for name, counted in counts.items():
        if case.get(name) is not None:
            yield Check(name, abs(sum(p.numel() for p in counted) - case[name]), 0.0)
    if case.get("macs") is not None:
        height, width = case["input"]["shape"][2:]
        # recorded "at the native square size": the input's where that is square, else 224
        size = height if height == width else 224
        yield Check("macs", abs(count_macs(case, size) - case["macs"]), 0.0)


def count_macs(case: Case, size: int) -> float:
    """Multiply-adds of one square image by fvcore's rules on the official code.

    Convolutions, linear layers and matrix products count one a multiply-add. Norms count 5 an element where
    the official code calls torch's function: v1's GroupNorm; v2's LayerNorm in the blocks of ConvFormer and
    CAFormer and in the heads. Norms that are written out there count nothing. fvcore reads the FLOPs of an
    einsum (random mixing) from numpy's report, which has four digits.
    """
    model = build(case, device="meta").eval()
    v1 = case["constructor"]["family"] in V1_FAMILIES
    extra = 0.0

    def count_norm(_module, args, _output):
        nonlocal extra
        extra += 5 * args[0].numel()

    def round_einsum(module, args, _output):
        nonlocal extra
        flops = 2 * args[0].numel() * module.random_matrix.shape[0]
        extra += (float(f"{flops:.3e}") - flops) / 2

    for name, module in model.named_modules():
        if isinstance(module, RandomMixing):
            module.register_forward_hook(round_einsum)
        elif (isinstance(module, nn.GroupNorm) and v1) or (
            isinstance(module, nn.LayerNorm) and not v1 and (".blocks." in name or name.startswith("head."))
        ):
            module.register_forward_hook(count_norm)
        elif isinstance(module, Attention):
            module.fused_attn = False
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.empty(1, model.in_chans, size, size, device="meta"))
    return counter.get_total_flops() / 2 + extra
