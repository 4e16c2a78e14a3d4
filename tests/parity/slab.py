"""SLAB: classifiers of four hosts, dense backbones, attention modules, the norm, folds, training and its rules.

Multiply-adds follow the files: convolutions, linear layers and matrix products at batch 1, norms left out, in the
authors' order of linear attention's products, with the linear layers over padding and the separate 3x3
convolution of CSwin that the authors compute and zoo does not. Parameters count the authors' without effect.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import zoo
import zoo.slab_attention
import zoo.slab_windows
from tests.parity.golden import Case, fill_input, output_error, relative_error
from tests.parity.runner import BARS, GRADIENT_BAR, Check, NoSuchForm, NotUnderstood
from zoo.kernels.linear_attention import linear_attention
from zoo.prepbn import PRepBN, RepBN, recalibrating
from zoo.slab import slab_swin_dense, zoo_name
from zoo.slab_attention import (
    SpatialReductionAttention,
    SpatialReductionLinearAttention,
    resample_position,
    resample_relative,
)
from zoo.slab_blocks import PatchMerging
from zoo.slab_deit import SlabDeit
from zoo.slab_pyramids import SlabCswin, SlabPvt
from zoo.slab_recipe import RECIPES, learning_rate, optimizer_groups
from zoo.slab_swin import SlabSwin, SlabSwinDense
from zoo.slab_windows import Stripe, WindowAttention, WindowLinearAttention, split_windows

# measured noise of the authors' own train steps in float32: their worst tensor is at 9e-4
STEP_BAR = {torch.float64: 1e-9, torch.float32: 5e-3}
OPERATOR_GRADIENT_BAR = {torch.float64: 1e-9, torch.float32: GRADIENT_BAR}


def claims(case: Case) -> bool:
    return "SLAB" in case.get("source", "")


def run(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    made = case.get("constructor") or {}
    if "derived_buffers" in case:  # pairs of name and shape in this family's files
        case["derived_buffers"] = [name if isinstance(name, str) else name[0] for name in case["derived_buffers"]]
    if "grad_norms" in case:
        runner = _run_train_step
    elif "some_running_stats_after" in case or "logits_during" in case.get("outputs", ()):
        runner = _run_recalibration
    elif "keys_after_official_merge" in case:
        runner = _run_model_fold
    elif "keys_after" in case:
        runner = _run_merging_fold
    elif "steps" in case:
        runner = _run_norm_steps
    elif "layernorm_eps" in made:
        runner = _run_norm
    elif "tokens" in made and "head_dim" in made:
        runner = _run_operator
    elif "sr_ratio" in made or "idx" in made or isinstance(made.get("window_size"), list):
        runner = _run_module
    elif "state_dict" in case and "variant" in case:
        runner = _run_model
    elif "schedules" in case:
        runner = _run_schedules
    elif "groups" in case:
        runner = _run_groups
    elif "variants" in case:
        runner = _run_counts
    elif "positional_encoding" in case.get("outputs", ()):
        runner = _run_resampling
    else:
        raise NotUnderstood(f"a SLAB case with {', '.join(case)}")
    yield from runner(case, dtype, folded)


def _only_eager(folded: bool) -> None:
    if folded:
        raise NoSuchForm("nothing to fold")


# Models: built from what the official state dict's shapes and the constructor say


def build(case: Case, drop: float = 0.0) -> nn.Module:
    """The float64 model that a case describes, with its official weights."""
    shapes = {name: list(shape) for name, shape, _ in case["state_dict"]}
    made = case.get("constructor") or {}
    if "absolute_pos_embed" in shapes:
        raise NotUnderstood("absolute position tables in Swin")
    if "stage1_conv_embed.0.weight" in shapes:
        model = _build_cswin(shapes, made)
    elif "patch_embed1.proj.weight" in shapes:
        model = _build_pvt(shapes, made)
    elif any(name.startswith("layers.0.") for name in shapes):
        model = _build_swin(shapes, made, dense="norm0.weight" in shapes)
    elif any(name.startswith("blocks.0.") for name in shapes):
        model = _build_deit(shapes, made)
    else:
        raise NotUnderstood(f"a SLAB model with entries such as {', '.join(list(shapes)[:3])}")
    zoo.load_checkpoint(model, official_state(case))
    return model


def official_state(case: Case) -> dict[str, Tensor]:
    """The reference's whole state dict; its integer entries (counters, indices) at zero, `total_step` at one."""
    counters = [entry for entry in case["state_dict"] if "float" not in entry[2]]
    fill = {"total_step": torch.ones}
    return case.weights() | {
        name: fill.get(name.rsplit(".", 1)[-1], torch.zeros)(shape, dtype=torch.int64) for name, shape, _ in counters
    }


def _norm_layer(shapes: dict[str, list[int]], eps: float) -> Callable[..., nn.Module]:
    prepbn = any(name.endswith(".norm2.alpha") and f"{name[:-11]}norm1.weight" in shapes for name in shapes)
    return partial(PRepBN, eps=eps) if prepbn else RepBN


def _count(shapes: dict[str, list[int]], pattern: str) -> int:
    found = [int(match[1]) for name in shapes if (match := re.match(pattern, name))]
    return 1 + max(found, default=-1)


def _kinds(shapes: dict[str, list[int]], block: Callable[[int, int], str], depths: list[int]) -> str:
    """The attention of each stage as the official string: letters, and how many of a mixed stage are linear."""
    letters, count = "", ""
    for i, depth in enumerate(depths):
        prefixes = [block(i, j) for j in range(depth)]
        linear = sum(any(n.startswith(p) and n.endswith(".positional_encoding") for n in shapes) for p in prefixes)
        if linear in (0, depth):
            letters += "S" if linear == 0 else "L"
        else:
            letters, count = letters + "M", str(linear)
    return letters + count


def _kernel(shapes: dict[str, list[int]]) -> int:
    return next((shape[-1] for name, shape in shapes.items() if name.endswith("dwc.weight")), 5)


def _pair(size: int | list[int]) -> int | tuple[int, int]:
    return tuple(size) if isinstance(size, list) else size


def _classes(shapes: dict[str, list[int]]) -> int:
    return shapes["head.weight"][0] if "head.weight" in shapes else 0


def _build_deit(shapes: dict[str, list[int]], made: dict) -> SlabDeit:
    dim, in_chans, patch, _ = shapes["patch_embed.proj.weight"]
    linear = "blocks.0.attn.positional_encoding" in shapes
    side = math.isqrt(shapes["pos_embed"][1] - (not linear)) * patch
    head_dim = shapes["blocks.0.attn.dwc.weight"][0] if linear else 64
    return SlabDeit(
        img_size=_pair(made.get("img_size", side)),
        patch_size=patch,
        in_chans=in_chans,
        num_classes=_classes(shapes),
        embed_dim=dim,
        depth=_count(shapes, r"blocks\.(\d+)\."),
        num_heads=made.get("num_heads", dim // head_dim),
        mlp_ratio=shapes["blocks.0.mlp.fc1.weight"][0] / dim,
        qkv_bias="blocks.0.attn.qkv.bias" in shapes,
        linear=linear,
        kernel_size=_kernel(shapes),
        norm_layer=_norm_layer(shapes, 1e-6),
        dtype=torch.float64,
    )


def _build_pvt(shapes: dict[str, list[int]], made: dict) -> SlabPvt:
    stages = _count(shapes, r"block(\d+)\.") - 1
    depths = [_count(shapes, rf"block{i + 1}\.(\d+)\.") for i in range(stages)]
    dims = [shapes[f"patch_embed{i + 1}.proj.weight"][0] for i in range(stages)]
    kinds = _kinds(shapes, lambda i, j: f"block{i + 1}.{j}.", depths)
    head_dims = [shapes.get(f"block{i + 1}.0.attn.dwc.weight", [0])[0] for i in range(stages)]
    known = next((d for d in head_dims if d), dims[0])
    ratios = [shapes.get(f"block{i + 1}.0.attn.sr.weight", [1])[-1] for i in range(stages)]
    overlapping = "block1.0.mlp.dwconv.dwconv.weight" in shapes
    table = shapes.get("pos_embed1") or shapes.get("block1.0.attn.positional_encoding")
    tokens = table[1] * (1 if "pos_embed1" in shapes else ratios[0] ** 2)
    sr_norm = None
    if "block1.0.attn.norm.weight" in shapes:
        sr_norm = partial(nn.LayerNorm, eps=1e-5)
    elif overlapping:
        sr_norm = _norm_layer(shapes, 1e-6)
    return SlabPvt(
        img_size=_pair(made.get("img_size", 4 * math.isqrt(tokens))),
        in_chans=shapes["patch_embed1.proj.weight"][1],
        num_classes=_classes(shapes),
        embed_dims=dims,
        depths=depths,
        num_heads=made.get("num_heads", [dim // (d or known) for dim, d in zip(dims, head_dims)]),
        mlp_ratios=[shapes[f"block{i + 1}.0.mlp.fc1.weight"][0] / dims[i] for i in range(stages)],
        sr_ratios=ratios,
        linear_sr_ratios=ratios,
        attn_type=kinds,
        overlapping=overlapping,
        qkv_bias="block1.0.attn.q.bias" in shapes,
        kernel_size=_kernel(shapes),
        norm_layer=_norm_layer(shapes, 1e-6),
        sr_norm_layer=sr_norm,
        dtype=torch.float64,
    )


def _build_swin(shapes: dict[str, list[int]], made: dict, dense: bool) -> nn.Module:
    dim, in_chans, patch, _ = shapes["patch_embed.proj.weight"]
    depths = [_count(shapes, rf"layers\.{i}\.blocks\.(\d+)\.") for i in range(_count(shapes, r"layers\.(\d+)\."))]
    tables = [shape[0] for name, shape in shapes.items() if name.endswith("relative_position_bias_table")]
    common = dict(
        patch_size=patch,
        in_chans=in_chans,
        embed_dim=dim,
        depths=depths,
        num_heads=made["num_heads"],
        softmax_window_size=(math.isqrt(max(tables, default=169)) + 1) // 2,
        attn_type=_kinds(shapes, lambda i, j: f"layers.{i}.blocks.{j}.", depths),
        mlp_ratio=shapes["layers.0.blocks.0.mlp.fc1.weight"][0] / dim,
        qkv_bias="layers.0.blocks.0.attn.qkv.bias" in shapes,
        kernel_size=_kernel(shapes),
        norm_layer=_norm_layer(shapes, 1e-5),
        patch_norm=any(name.startswith("patch_embed.norm.") for name in shapes),
        dtype=torch.float64,
    )
    if dense:
        sizes = [56, 28, 7, 7]
        for i in range(len(depths)):
            table = shapes.get(f"layers.{i}.blocks.0.attn.positional_encoding")
            sizes[i] = math.isqrt(table[1]) if table else sizes[i]
        return SlabSwinDense(window_sizes=sizes[: len(depths)], **common)
    img_size = _pair(made.get("img_size", 224))
    return SlabSwin(img_size=img_size, num_classes=_classes(shapes), window_size=made.get("window_size", 56), **common)


def _build_cswin(shapes: dict[str, list[int]], made: dict) -> SlabCswin:
    dim, in_chans = shapes["stage1_conv_embed.0.weight"][:2]
    stages = _count(shapes, r"stage(\d+)\.") - 1
    depths = [_count(shapes, rf"stage{i + 1}\.(\d+)\.") for i in range(stages)]
    linear = [int(s) for s in str(made.get("la_split_size", "56-28-14-7")).split("-")]
    softmax = made.get("split_size", [1, 2, 7, 7])
    striped = [f"stage{i + 1}.0.attns.1.get_v.weight" in shapes for i in range(stages)]
    heads = made.get("num_heads")
    if heads is None:
        channels = next((s[0] for name, s in shapes.items() if name.endswith("dwc.weight")), 32)
        heads = [dim * 2**i // channels for i in range(stages)]
    return SlabCswin(
        img_size=_pair(made.get("img_size", 224)),
        in_chans=in_chans,
        num_classes=_classes(shapes),
        embed_dim=dim,
        depths=depths,
        num_heads=heads,
        split_size=[s if striped[i] else None for i, s in enumerate(softmax[:stages])],
        linear_split_size=[s if striped[i] else None for i, s in enumerate(linear[:stages])],
        attn_type=_kinds(shapes, lambda i, j: f"stage{i + 1}.{j}.", depths),
        mlp_ratio=shapes["stage1.0.mlp.fc1.weight"][0] / dim,
        qkv_bias="stage1.0.qkv.bias" in shapes,
        kernel_size=_kernel(shapes),
        norm_layer=_norm_layer(shapes, 1e-5),
        dtype=torch.float64,
    )


def _run_model(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    training = case.get("mode", "eval").startswith("train")
    if training and folded:
        raise NoSuchForm("the folded form is not for training")
    model = build(case)
    if not folded:
        yield from _model_counts(case, model)
    _set_counters(case, model)
    model = (zoo.fold(model) if folded else model).to(dtype).train(training)
    with torch.no_grad():
        outputs = watched(case, model, case.input().to(dtype))
    for name, record in case["outputs"].items():
        if name in outputs and not (folded and name == "norm"):  # which the fold moves into the classifier
            yield Check(name, output_error(record, outputs[name]), BARS[dtype])


def watched(case: Case, model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Run the model and return what `outputs` names, in the layout of the record."""
    seen: dict[str, Tensor] = {}
    handles = []

    def watch(name: str, module: nn.Module, read: Callable[[Tensor], Tensor]) -> None:
        shape = case["outputs"][name]["shape"]
        handles.append(module.register_forward_hook(lambda m, args, y: seen.update({name: read(y).reshape(shape)})))

    def watch_windows(name: str, attn: nn.Module) -> None:
        def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
            windows = module.geometry(args[0].shape[1], args[0].shape[2])[:2]
            seen[name] = module.proj(split_windows(module.attend(args[0]), *windows))

        handles.append(attn.register_forward_hook(hook))

    tokens, maps = _tokens, lambda y: y
    stages = getattr(model, "stages", None)
    for name, record in case["outputs"].items():
        match re.findall(r"[a-z_]+|\d+", name):
            case ["block", i]:
                watch(name, model.blocks[int(i)], tokens)
            case ["attn", i] if stages is None:
                watch(name, model.blocks[int(i)].attn, tokens)
            case ["attn", i, j]:
                watch(name, stages[int(i) - 1].blocks[int(j)].attn, tokens)
            case ["patch_embed"] if stages is None:
                watch(name, model.patch_embed, tokens)
            case ["patch_embed", *index] | ["stage", *index, "_conv_embed"]:
                i = int(index[0]) - 1 if index else 0
                module = stages[i].downsample if i else model.stem
                watch(name, module, maps if len(record["shape"]) == 4 else tokens_of_maps)
            case ["stage", i, "_attn", j]:
                watch_windows(name, stages[int(i)].blocks[int(j)].attn)
            case ["stage", i]:
                first = 0 if isinstance(model, SlabSwin | SlabSwinDense) else 1
                watch(name, stages[int(i) - first].blocks[-1], tokens)
            case ["downsample", i]:
                watch(name, stages[int(i) + 1].downsample, tokens_of_maps)
            case ["merge", i]:
                watch(name, stages[int(i)].downsample, tokens_of_maps)
            case ["norm"]:
                watch(name, model.norm, tokens)
    y = model(image)
    if isinstance(model, SlabSwinDense):
        seen |= {f"out{i}": y_i for i, y_i in enumerate(y)}
    else:
        seen["logits"] = y
    for handle in handles:
        handle.remove()
    return seen


def _tokens(y: Tensor) -> Tensor:
    return y.flatten(1, 2) if y.ndim == 4 else y


def tokens_of_maps(y: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H W, C)."""
    return y.flatten(2).transpose(1, 2)


# Counts


def _dead(names: dict[str, list[int]] | list, model: nn.Module) -> dict[str, int]:
    """The official parameters without effect, which zoo's model does not have: name to number of elements."""
    return {
        name: math.prod(shape)
        for name, shape, *_ in names
        if zoo_name(name, model) is None and name.rsplit(".", 1)[-1] in ("cls_token", "scale")
    }


def _model_counts(case: Case, model: nn.Module) -> Iterator[Check]:
    dead = sum(_dead(case["state_dict"], model).values())
    for field in ("params", "trainable_params"):
        if case.get(field) is not None:
            yield Check(field, float(abs(_parameters(model) + dead - case[field])), 0)
    if case.get("macs") is not None:
        yield Check("macs", float(abs(multiply_adds(model, case["input"]["shape"][1:]) - case["macs"])), 0)


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def multiply_adds(model: nn.Module, image: list[int]) -> int:
    """Multiply-adds for one image, by the files' convention, counted on the meta device."""
    model = copy.deepcopy(model).to("meta").eval()
    extra = 0

    def count_linear(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-6) -> Tensor:
        nonlocal extra
        batch, n, m, d, e = q.shape[0] * q.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3]
        keys_first = n * m * (d + e) > d * e * (n + m)
        extra += batch * ((n + m) * d * e if keys_first else n * m * (d + e)) + batch * n * d
        return q.new_empty(*q.shape[:3], e)

    def count_softmax(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        nonlocal extra
        extra += math.prod(q.shape[:3]) * k.shape[2] * (q.shape[3] + v.shape[3])
        return q.new_empty(*q.shape[:3], v.shape[3])

    def count_padding(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal extra
        H, W, dim = args[0].shape[1:]
        h, w, _, _ = module.geometry(H, W)
        extra += ((H + -H % h) * (W + -W % w) - H * W) * 4 * dim * dim

    def count_lepe(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal extra
        extra += 9 * args[0].numel()

    for module in model.modules():
        if isinstance(module, WindowAttention | WindowLinearAttention):
            module.register_forward_pre_hook(count_padding)
        elif isinstance(module, Stripe) and module.linear:
            module.register_forward_pre_hook(count_lepe)
    softmax = dict(attention=count_softmax, reference=count_softmax)
    with (
        torch.no_grad(),
        patch.multiple(zoo.slab_attention, linear_attention=count_linear, **softmax),
        patch.multiple(zoo.slab_windows, **softmax),
        FlopCounterMode(display=False) as counter,
    ):
        model(torch.zeros(1, *image, device="meta", dtype=next(model.parameters()).dtype))
    return counter.get_total_flops() // 2 + extra


def variant(name: str, **kwargs: Any) -> nn.Module:
    """The model of a row of the files' tables: "slab_swin_t", "pvt_l_prepbn (no config)", "det slab_swin_s"."""
    name = name.split(" (")[0]
    if name.startswith("det "):
        return slab_swin_dense(name.removeprefix("det "), **kwargs)
    return timm.create_model(name, **kwargs)


def _run_counts(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    _only_eager(folded)
    if dtype is not torch.float64:
        raise NoSuchForm("numbers without a dtype")
    for name, row in case["variants"].items():
        with torch.device("meta"):
            model = variant(name)
        dead = _dead_parameters(model)
        prepbn = [m for m in model.modules() if isinstance(m, PRepBN)]
        indices = sum(isinstance(m, WindowAttention) for m in model.modules())
        found = {
            "params": _parameters(model) + sum(dead.values()),
            "trainable_params": _parameters(model) + sum(dead.values()),
            "dead_param_elements": sum(dead.values()),
            "params_in_layernorm_branches": sum(_parameters(m.norm1) for m in prepbn),
            "macs_224": multiply_adds(model, [3, 224, 224]),
            "prepbn_modules": len(prepbn),
            "repbn_modules": sum(isinstance(m, RepBN) for m in model.modules()),
            # the detectors' norm has no `warm`
            "state_dict_entries": len(model.state_dict())
            + len(dead)
            + indices
            - len(prepbn) * isinstance(model, SlabSwinDense),
        }
        for field, value in found.items():
            if field in row:
                yield Check(f"{name} {field}", float(abs(value - row[field])), 0)
        for field, values in (
            ("prepbn_steps", {m.total_steps for m in prepbn}),
            ("layernorm_eps", {m.norm1.eps for m in prepbn}),
        ):
            if field in row:
                yield Check(f"{name} {field}", float(sorted(values) != sorted(row[field])), 0)


def _dead_parameters(model: nn.Module) -> dict[str, int]:
    if isinstance(model, SlabDeit):
        return {"cls_token": model.embed_dim} if model.cls_token is None else {}
    stripes = {name: m for name, m in model.named_modules() if isinstance(m, Stripe) and m.linear}
    return {f"{name}.scale": stripe.get_v.out_channels for name, stripe in stripes.items()}


# Training


def _run_train_step(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    _only_eager(folded)
    model = build(case).to(dtype).train()
    norms, total = _set_counters(case, model)
    logits = model(case.input().to(dtype))
    smoothing = re.search(r"label smoothing ([\d.]+)", case.get("loss", ""))
    loss = nn.functional.cross_entropy(
        logits, torch.tensor(case["targets"]), label_smoothing=float(smoothing[1]) if smoothing else 0.0
    )
    loss.backward()
    bar = STEP_BAR[dtype]
    yield Check("loss_value", relative_error(loss.item(), case["loss_value"]), BARS[dtype])
    parameters = dict(model.named_parameters())
    for name, record in case["outputs"].items():
        if name == "logits":
            yield Check(name, output_error(record, logits), BARS[dtype])
        else:
            yield Check(name, output_error(record, _gradient(parameters, model, name[2:])), bar)
    largest = max(norm for _, norm in case["grad_norms"] if norm is not None)
    for name, norm in case["grad_norms"]:
        if norm is not None:
            gradient = _gradient(parameters, model, name).norm()
            # what cancels is measured against the step's other gradients, whose rounding it carries
            error = abs(float(gradient) - norm) / max(norm, 1e-6 * largest)
            yield Check(f"grad {name}", error, bar)
        elif (new := zoo_name(name, model)) is not None:
            yield Check(f"grad {name}", float(parameters[new].grad is not None), 0)
    buffers = dict(model.named_buffers())
    for name, mean, std in case.get("running_stats_mean_std", ()):
        buffer = buffers[zoo_name(name, model)].double()
        error = max(abs(float(buffer.mean()) - mean), abs(float(buffer.std(correction=0)) - std))
        yield Check(f"after {name}", error / (std or 1.0), BARS[dtype])
    for field, values in (("iter_after", {int(n.iter) for n in norms}), ("total_step", {total} if norms else set())):
        if field in (case.get("counters") or {}):
            yield Check(field, float(sorted(values) != sorted(case["counters"][field])), 0)


def _set_counters(case: Case, model: nn.Module) -> tuple[list[PRepBN], int]:
    """Set gamma as recorded, the same in every norm; returns the norms and their `total_step`."""
    norms = [m for m in model.modules() if isinstance(m, PRepBN)]
    total = ((case.get("counters") or {}).get("total_step") or [norms[0].total_steps if norms else 1])[0]
    for norm in norms:
        norm.total_step.fill_(total)
        norm.iter.fill_(round((case.get("gamma") or 0.0) * total))
        norm.warm.zero_()
    return norms, total


def _gradient(parameters: dict[str, Tensor], model: nn.Module, official: str) -> Tensor:
    return parameters[zoo_name(official, model)].grad


def _run_recalibration(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    _only_eager(folded)
    model = build(case).to(dtype).eval()
    image = case.input().to(dtype)
    with recalibrating(model):
        during = model(image)
    buffers = dict(model.named_buffers())
    for name, record in case.get("some_running_stats_after", ()):
        yield Check(f"after {name}", output_error(record, buffers[zoo_name(name, model)]), BARS[dtype])
    with torch.no_grad():
        outputs = {"logits_during": during, "logits_after": model(image)}
    for name, record in case["outputs"].items():
        yield Check(name, output_error(record, outputs[name]), BARS[dtype])


# Folds


def _run_model_fold(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    model = build(case)
    image = case.input().to(dtype)
    merged = zoo.fold(model).to(dtype)
    faulty = copy.deepcopy(merged)  # the official merge leaves alpha * bias out of the patch embedding's bias
    faulty.stem.conv.bias.data -= (model.stem.norm.alpha * model.stem.conv.bias).to(dtype).data
    model.to(dtype).eval()
    with torch.no_grad():
        outputs = {"logits_unfolded": (merged if folded else model)(image), "logits_official_merge": faulty(image)}
    state = merged.state_dict()
    for name, record in case["outputs"].items():
        if name.startswith("folded "):
            official = name.removeprefix("folded ")
            yield Check(name, output_error(record, state[zoo_name(official, merged)]), BARS[dtype])
        else:
            yield Check(name, output_error(record, outputs[name]), BARS[dtype])
    expected = {zoo_name(name, merged): tuple(shape) for name, shape in case["keys_after_official_merge"]}
    # padded windows need the bias from before the fold, which the official merge does not know
    found = {name: tuple(value.shape) for name, value in state.items() if not name.endswith(".pad_qkv")}
    yield Check("keys_after_official_merge", float(expected != found), 0)
    if "params_after" in case:
        yield Check("params_after", float(abs(_parameters(merged) - case["params_after"])), 0)


def _run_merging_fold(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    made = case["constructor"]
    layer = PatchMerging(made["dim"], _norm_layer({n: s for n, s, _ in case["state_dict"]}, 1e-5), dtype=torch.float64)
    zoo.load_checkpoint(layer, official_state(case))
    merged = zoo.fold(layer).to(dtype)
    layer = merged if folded else layer.eval().to(dtype)
    H, W = made["input_resolution"]
    x = case.input().to(dtype)
    with torch.no_grad():
        y = layer(x.transpose(1, 2).unflatten(2, (H, W)))
    outputs = {"y": tokens_of_maps(y)} | {f"{name} after": value for name, value in merged.state_dict().items()}
    for name, record in case["outputs"].items():
        yield Check(name, output_error(record, outputs[name]), BARS[dtype])
    expected = {name: tuple(shape) for name, shape in case["keys_after"]}
    found = {name: tuple(value.shape) for name, value in merged.state_dict().items()}
    yield Check("keys_after", float(expected != found), 0)


# Operators and modules


def _edited(case: Case, name: str, value: Tensor) -> Tensor:
    edit = case.get("input_edit")
    if not edit:
        return value
    if match := re.match(r"(\w+)\[:, ::(\d+)\] = -abs", edit):
        if match[1] == name:
            value[:, :: int(match[2])] = -value[:, :: int(match[2])].abs()
        return value
    raise NotUnderstood(f"input_edit {edit}")


def _run_operator(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    _only_eager(folded)
    made = case["constructor"]
    given = {
        i["name"]: _edited(case, i["name"], case.input(i["name"], i["shape"])).to(dtype).requires_grad_()
        for i in case["inputs"]
    }
    heads = {name: x.unflatten(-1, (made["heads"], made["head_dim"])).transpose(1, 2) for name, x in given.items()}
    y = linear_attention(heads["q"], heads["k"], heads["v"]).transpose(1, 2).flatten(2)
    y.backward(fill_input("grad_out", y.shape, case.seed).to(dtype))
    outputs = {"y": y} | {f"d{name}": x.grad for name, x in given.items()}
    for name, record in case["outputs"].items():
        bar = BARS[dtype] if name == "y" else OPERATOR_GRADIENT_BAR[dtype]
        yield Check(name, output_error(record, outputs[name]), bar)
    if "normaliser" in case:
        q, k = heads["q"].relu(), heads["k"].relu()
        z = (q @ k.sum(-2).unsqueeze(-1)).detach().double()  # recorded without epsilon
        for what, value in (("min", z.min()), ("mean", z.mean()), ("max", z.max())):
            recorded = case["normaliser"][what]
            yield Check(f"normaliser {what}", abs(float(value) - recorded) / float(z.mean()), BARS[dtype])


def _module_forward(case: Case) -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor], Callable[[str], str | None]]:
    """The float64 module of a case, how to call it on the recorded tokens, and its names of official entries."""
    made = case["constructor"]
    shapes = {name: list(shape) for name, shape, _ in case["state_dict"]}
    dim, heads, kernel = made["dim"], made["num_heads"], made.get("kernel_size", _kernel(shapes))
    if "idx" in made:
        linear = "dwc.weight" in shapes
        grid, split = (made["resolution"],) * 2, made["split_size"]
        rows, columns = {-1: (0, 0), 0: (0, split), 1: (split, 0)}[made["idx"]]
        module = Stripe(dim, heads, grid, rows, columns, linear, kernel, dtype=torch.float64)
        forward = lambda m, x: m(*x.unflatten(1, grid).chunk(3, dim=-1)).flatten(1, 2)  # noqa: E731
        return module, forward, lambda name: None if name == "scale" else name
    if "sr_ratio" in made:
        grid = (math.isqrt(made["num_patches"]),) * 2
        plain = "norm.weight" in shapes
        norm = partial(nn.LayerNorm, eps=1e-5) if plain else _norm_layer({f"a.{n}": s for n, s in shapes.items()}, 1e-6)
        common = (dim, heads, made["sr_ratio"], made.get("qkv_bias", True), norm)
        if "positional_encoding" in shapes:
            module = SpatialReductionLinearAttention(*common, grid, kernel, dtype=torch.float64)
        else:
            module = SpatialReductionAttention(*common, dtype=torch.float64)
    else:
        grid = tuple(made["window_size"])
        bias = made.get("qkv_bias", True)
        if "positional_encoding" in shapes:
            module = WindowLinearAttention(dim, heads, grid, qkv_bias=bias, kernel_size=kernel, dtype=torch.float64)
        else:
            module = WindowAttention(dim, heads, grid, grid[0], qkv_bias=bias, dtype=torch.float64)
    derived = ("relative_position_index", "attn_mask")
    forward = lambda m, x: m(x.unflatten(1, grid)).flatten(1, 2)  # noqa: E731
    return module, forward, lambda name: None if name in derived else name


def _run_module(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    module, forward, translate = _module_forward(case)
    state = {new: value for name, value in official_state(case).items() if (new := translate(name)) is not None}
    zoo.load_checkpoint(module, state)
    dead = sum(math.prod(shape) for name, shape, _ in case["state_dict"] if name == "scale")
    if case.get("params") is not None and not folded:
        yield Check("params", float(abs(_parameters(module) + dead - case["params"])), 0)
    if folded:
        merged = zoo.fold(module)
        if merged.state_dict().keys() == module.state_dict().keys():
            raise NoSuchForm("nothing to fold")
        with torch.no_grad():
            y = forward(merged.to(dtype), case.input().to(dtype))
        yield Check("y", output_error(case["outputs"]["y"], y), BARS[dtype])
        return
    module = module.to(dtype).train(case.get("mode") == "train")
    x = case.input().to(dtype).requires_grad_()
    y = forward(module, x)
    y.backward(fill_input("grad_out", y.shape, case.seed).to(dtype))
    parameters = dict(module.named_parameters())
    for name, record in case["outputs"].items():
        if record is None:  # no gradient
            new = translate(name[2:])
            yield Check(name, float(new is not None and parameters[new].grad is not None), 0)
        elif name == "y":
            yield Check(name, output_error(record, y), BARS[dtype])
        else:
            gradient = x.grad if name == "dx" else parameters[translate(name[2:])].grad
            if gradient is None:  # the LayerNorm in eval mode, whose recorded gradient is zero
                gradient = torch.zeros(record["shape"])
            yield Check(name, output_error(record, gradient), OPERATOR_GRADIENT_BAR[dtype])


# The norm


def _build_norm(case: Case) -> PRepBN:
    made = case["constructor"]
    norm = PRepBN(
        made["dim"],
        eps=made["layernorm_eps"],
        total_steps=made["step"],
        warm_steps=made.get("warm", 0),
        initial_gamma=made.get("r0", 1.0),
        bn_eps=made.get("batchnorm_eps", 1e-5),
        momentum=made.get("batchnorm_momentum", 0.1),
        dtype=torch.float64,
    )
    counters = {"warm": made.get("warm", 0), "iter": made["step"], "total_step": made["step"]}
    counters |= {k: v for k, v in (case.get("counters_before") or {}).items() if k in counters}
    state = official_state(case) | {name: torch.tensor(value) for name, value in counters.items()}
    zoo.load_checkpoint(norm, state)
    return norm


def _counters(case: Case, norm: PRepBN) -> Iterator[Check]:
    found = {
        "warm": norm.warm,
        "iter": norm.iter,
        "total_step": norm.total_step,
        "norm2.bn.num_batches_tracked": norm.norm2.bn.num_batches_tracked,
    }
    for name, value in (case.get("counters_after") or {}).items():
        yield Check(f"after {name}", float(abs(int(found[name]) - value)), 0)


def _run_norm(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    _only_eager(folded)
    norm = _build_norm(case).to(dtype).train(case.get("mode", "train") == "train")
    if "BatchNorm is put in eval mode" in case.get("what", ""):
        norm.norm2.bn.eval()
    x = case.input()
    if edit := case["input"].get("edit"):
        match = re.fullmatch(r"x = ([\d.]+)\*fill_input \+ ([\d.]+)", edit)
        if match is None:
            raise NotUnderstood(f"input edit {edit}")
        x = float(match[1]) * x + float(match[2])
    x = x.to(dtype).requires_grad_()
    y = norm(x)
    y.backward(fill_input("grad_out", y.shape, case.seed).to(dtype))
    outputs = {"y": y, "dx": x.grad} | {f"d {name}": p.grad for name, p in norm.named_parameters()}
    with torch.no_grad():
        outputs["y_eval_after_this_step"] = norm.eval()(x)
    for name, record in case["outputs"].items():
        bar = OPERATOR_GRADIENT_BAR[dtype] if name.startswith("d") else BARS[dtype]
        yield Check(name, output_error(record, outputs[name]), bar)
    for name, record in (case.get("buffers_after") or {}).items():
        yield Check(f"after {name}", output_error(record, getattr(norm.norm2.bn, name)), BARS[dtype])
    yield from _counters(case, norm)


def _run_norm_steps(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    _only_eager(folded)
    norm = _build_norm(case).to(dtype).train()
    bn = norm.norm2.bn
    inputs = {i["name"]: case.input(i["name"], i["shape"]).to(dtype) for i in case["inputs"]}
    for step in case["steps"]:
        t = step["step"]
        for field, counter in (("warm_before", norm.warm), ("iter_before", norm.iter)):
            yield Check(f"step {t} {field}", float(abs(int(counter) - step[field])), 0)
        with torch.no_grad():
            y = norm(inputs[f"x{t}"])
        yield Check(f"step {t} gamma", abs(float(norm._gamma(norm.last)) - step["gamma"]), 1e-6)
        yield Check(f"step {t} y", output_error(step["y"], y), BARS[dtype])
        for name in ("running_mean", "running_var"):
            yield Check(f"step {t} {name}", output_error(step[name], getattr(bn, name)), BARS[dtype])
        yield Check(f"step {t} batches", float(abs(int(bn.num_batches_tracked) - step["num_batches_tracked"])), 0)
    norm.eval()
    for name, record in case["outputs"].items():
        with torch.no_grad():
            yield Check(name, output_error(record, norm(inputs[name.rsplit("_", 1)[-1]])), BARS[dtype])
    yield from _counters(case, norm)


# Loading and the optimizer's rules


def _run_resampling(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    _only_eager(folded)
    for given in case["inputs"]:
        name = given["name"]
        record = case["outputs"][name]
        table = case.input(name, given["shape"]).to(getattr(torch, case.get("compute_dtype", "float64")))
        if name == "positional_encoding":
            source, side = (math.isqrt(n) for n in (given["shape"][1], record["shape"][1]))
            found = resample_position(table, (source, source), side, side)
        else:
            source, side = ((math.isqrt(n) + 1) // 2 for n in (given["shape"][0], record["shape"][0]))
            found = resample_relative(table, (source, source), side, side)
        yield Check(name, output_error(record, found), 1e-6)


def _run_schedules(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    _only_eager(folded)
    if dtype is not torch.float64:
        raise NoSuchForm("numbers without a dtype")
    for name, row in case["schedules"].items():
        host = next((host for host in ("cswin", "swin", "deit", "pvt") if host in name), None)
        if host is None:
            raise NotUnderstood(f"the schedule of {name}")
        rates = RECIPES[host].scaled(row["batch_per_gpu"] * row["gpus"])
        for field, value in (
            ("base_lr_scaled", rates.base),
            ("min_lr_scaled", rates.minimum),
            ("warmup_lr_scaled", rates.start),
            ("warmup_epochs", rates.warmup_epochs),
            ("epochs", rates.epochs),
            ("cooldown_epochs", rates.cooldown_epochs),
        ):
            yield Check(f"{name} {field}", relative_error(value, row[field]), 1e-12)
        arguments = (
            row["epochs"],
            row["warmup_epochs"],
            row["base_lr_scaled"],
            row["min_lr_scaled"],
            row["warmup_lr_scaled"],
        )
        for update, value in row["points_update_lr"]:
            found = learning_rate(update, row["iterations_per_epoch"], *arguments)
            yield Check(f"{name} {update}", relative_error(found, value), 1e-12)


def _run_groups(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    _only_eager(folded)
    if dtype is not torch.float64:
        raise NoSuchForm("numbers without a dtype")
    for name, row in case["groups"].items():
        with torch.device("meta"):
            model = variant(name)
        groups = {bool(g["weight_decay"]): g for g in optimizer_groups(model, case.get("weight_decay", 0.05))}
        dead = _dead_parameters(model)
        for decayed, kind in ((True, "decay"), (False, "no_decay")):
            # of the parameters without effect, the authors decay `scale` and not the class token
            idle = [size for n, size in dead.items() if (n == "cls_token") != decayed]
            group = groups[decayed]
            counts = {
                f"{kind}_count": len(group["param_names"]) + len(idle),
                f"{kind}_elements": sum(p.numel() for p in group["params"]) + sum(idle),
            }
            for field, value in counts.items():
                yield Check(f"{name} {field}", float(abs(value - row[field])), 0)
            listed = [zoo_name(n, model) for n in row.get(f"{kind}_first_block_and_outside", ())]
            missing = [n for n in listed if n is not None and n not in group["param_names"]]
            yield Check(f"{name} {kind} names", float(len(missing)), 0)
