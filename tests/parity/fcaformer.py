"""FcaFormer: classifiers, dense backbones, blocks, the attention operator, folds and the optimizer's rules.

Multiply-adds follow the files: convolutions, linear layers and matrix products, norms left out, and with the
queries that the official code projects from cross tokens and drops (zoo does not).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import zoo
from tests.parity.golden import Case, fill_input, output_error, relative_error
from tests.parity.runner import BARS, GRADIENT_BAR, Check, NoSuchForm, NotUnderstood
from zoo.fcaformer import FcaFormer, FcaFormerDense, block_name, zoo_name
from zoo.fcaformer_blocks import ConvNorm, CrossAttention, FcaBlock
from zoo.fcaformer_recipe import OptimizerRecipe, learning_rate, optimizer_groups
from zoo.kernels.attention import attention, attention_logits, mirror_offsets, relative_bias

_LAYERS = {"det": "detection", "seg": "segmentation", "cls": "none"}


def claims(case: Case) -> bool:
    return "FcaFormer" in case.get("source", "")


def run(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    made = case.get("constructor") or {}
    if "embed_dims" in made:
        yield from _run_classifier(case, dtype, folded)
    elif "dims" in made:
        yield from _run_dense(case, dtype, folded)
    elif "inner_depth" in made:
        yield from _run_block(case, dtype, folded)
    elif "bn_eps" in made:
        yield from _run_fold(case, dtype, folded)
    elif folded:
        raise NoSuchForm("nothing to fold")
    elif "cross_tokens" in made:
        yield from _run_operator(case, dtype)
    elif dtype is not torch.float64:
        raise NoSuchForm("numbers without a dtype")
    elif "steps_per_epoch" in case:
        yield from _run_schedule(case)
    elif any(_is_recipe(value) for value in case.values()):
        yield from _run_groups(case)
    else:
        raise NotUnderstood(f"an FcaFormer case with {', '.join(case)}")


# Models


def _run_classifier(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    made = case["constructor"]
    model = FcaFormer(
        img_size=_pair(made.get("img_size", 224)),
        in_chans=made.get("in_chans", 3),
        num_classes=made.get("num_classes", 1000),
        embed_dims=made["embed_dims"],
        depths=made["depths"],
        num_heads=made["num_heads"],
        max_sources=made.get("cab_max_d", 12),
        dtype=torch.float64,
    )
    yield from _run_model(case, model, dtype, folded, "logits")


def _run_dense(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    made = case["constructor"]
    model = FcaFormerDense(
        in_chans=made.get("in_chans", 3),
        embed_dims=made["dims"],
        depths=made["depths"],
        num_heads=made["num_heads"],
        window_size=[made[f"window_stage{i}"] for i, heads in enumerate(made["num_heads"]) if heads],
        out_channels=made.get("seg_head_dims"),
        dtype=torch.float64,
    )
    yield from _run_model(case, model, dtype, folded, "feat0")


def _run_model(case: Case, model: nn.Module, dtype, folded: bool, main: str) -> Iterator[Check]:
    zoo.load_checkpoint(model, official_state(case))
    if not folded:
        image = case["input"]["shape"]
        yield from count_checks(
            case, model, lambda m: m(torch.zeros(1, *image[1:], device="meta", dtype=torch.float64)), _dropped_queries
        )
    model = zoo.fold(model) if folded else model
    model = model.to(dtype).train(case.get("mode") == "train")
    if folded and model.training:
        raise NoSuchForm("the folded form is not for training")
    image = case.input().to(dtype).requires_grad_("input_grads" in case)
    seen = {}
    watch(seen, "stem", model.stem)
    for i, stage in enumerate(model.stages):
        watch(seen, f"stage{i}_raw" if isinstance(model, FcaFormerDense) else f"stage{i}", stage)
    with torch.set_grad_enabled(wants_gradients(case) and not folded):
        if isinstance(model, FcaFormerDense):
            outputs = {f"feat{i}": y for i, y in enumerate(model(image))}
        else:
            features = model.forward_features(image)
            outputs = {"logits": model.forward_head(features), "pooled": features.mean((2, 3))}
    outputs |= seen
    yield from output_checks(case, outputs, dtype)
    if not folded:
        yield from gradient_checks(case, model, outputs[main], {case["input"]["name"]: image}, zoo_name)


def _dropped_queries(model: nn.Module, attended: dict[str, int]) -> int:
    """Multiply-adds of the official queries of cross tokens; `attended` counts these in each attention."""
    return sum(
        attended.get(name, 0) * module.qkv.in_features**2
        for name, module in model.named_modules()
        if isinstance(module, CrossAttention)
    )


def _pair(size: int | list[int]) -> int | tuple[int, int]:
    return tuple(size) if isinstance(size, list) else size


# Blocks and operators


def _run_block(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    made = case["constructor"]
    h, w = made["input_resolution"]
    block = FcaBlock(
        made["dim"],
        made["num_heads"],
        (h, w),
        num_sources=min(made["inner_depth"], made.get("cab_max_d", 12)),
        merge=made.get("s_up", True),
        mlp_ratio=made.get("mlp_ratio", 4.0),
        dtype=torch.float64,
    )
    own = block.state_dict()
    state = {block_name(name): value for name, value in official_state(case).items()}
    # a model's loader gives the position tables their axes; a single block's fit as they are
    zoo.load_checkpoint(block, {n: v.reshape(own[n].shape) if n in own else v for n, v in state.items()})
    if not folded:
        yield from count_checks(case, block, None)
    block = (zoo.fold(block) if folded else block).to(dtype).train(case.get("mode") == "train")
    if folded and block.training:
        raise NoSuchForm("the folded form is not for training")
    gradients = wants_gradients(case) and not folded
    inputs = {i["name"]: case.input(i["name"], i["shape"]).to(dtype).requires_grad_(gradients) for i in case["inputs"]}
    seen = {}
    watch(seen, "after_local_conv", block.local_conv)
    block.attn.proj.register_forward_pre_hook(
        lambda module, args: seen.update(attn_out_before_proj=args[0].flatten(1, 2))
    )
    with torch.set_grad_enabled(gradients):
        x = inputs["x"].reshape(-1, h, w, made["dim"])
        y, merged = block(x, inputs.get("s"))
    outputs = {"x_out": y.flatten(1, 2), **seen} | ({} if merged is None else {"s_out": merged})
    yield from output_checks(case, outputs, dtype)
    if not folded:
        yield from gradient_checks(case, block, outputs["x_out"], inputs, block_name)


def _run_fold(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    made = case["constructor"]
    if made.get("padding", made["kernel"] // 2) != made["kernel"] // 2:
        raise NotUnderstood(f"padding {made['padding']} of a {made['kernel']}x{made['kernel']} convolution")
    layer = ConvNorm(
        made["in"],
        made["out"],
        made["kernel"],
        made.get("stride", 1),
        made.get("groups", 1),
        made["bn_eps"],
        dtype=torch.float64,
    )
    zoo.load_checkpoint(layer, {block_name(name): value for name, value in official_state(case).items()})
    if not folded:
        # the file's count is of the fused convolution, with its bias
        fused = layer.fuse()
        params = [p for m in (layer, fused) for p in [sum(t.numel() for t in m.parameters())]]
        yield Check("params", float(case["params"] not in params), 0)
    fused = copy.deepcopy(layer).eval().to(dtype).fuse()
    layer = (fused if folded else layer.eval()).to(dtype)
    x = case.input().to(dtype)
    with torch.no_grad():
        outputs = {"y": layer(x), "fused_weight": fused.weight, "fused_bias": fused.bias}
    yield from output_checks(case, outputs, dtype)


def _run_operator(case: Case, dtype: torch.dtype) -> Iterator[Check]:
    made = case["constructor"]
    given = {i["name"]: case.input(i["name"], i["shape"]).to(dtype) for i in case["inputs"]}
    grad_out = given.pop("grad_out", None)
    for value in given.values():
        value.requires_grad_()
    q, k, v = given["q"], given["k"], given["v"]
    table = given["rel"].reshape(-1, made["H"], made["W"])
    bias = relative_bias(mirror_offsets(table))
    key_bias2 = given["sbias"].flatten(0, -2) if "sbias" in given else None
    k2, v2 = given.get("ks"), given.get("vs")
    out = attention(q, k, v, bias=bias, k2=k2, v2=v2, key_bias2=key_bias2)
    lse = attention_logits(q, k, bias=bias, k2=k2, key_bias2=key_bias2).logsumexp(-1)
    outputs = {"out": out, "lse": lse}
    if grad_out is None:
        grad_out = fill_input("grad_out", out.shape, case.seed).to(dtype)
    names = list(given)
    grads = torch.autograd.grad(out, [given[n] for n in names], grad_out, allow_unused=True)
    outputs |= {f"d_{n}": g for n, g in zip(names, grads) if g is not None}
    yield from output_checks(case, outputs, dtype)
    if case.get("macs") is not None:
        macs = 2 * q.shape[0] * q.shape[1] * q.shape[2] * (k.shape[2] + (0 if k2 is None else k2.shape[2]))
        yield Check("macs", relative_error(macs * q.shape[3], case["macs"]), 0)


# The optimizer's rules


def _run_schedule(case: Case) -> Iterator[Check]:
    schedule = dict(
        steps_per_epoch=case["steps_per_epoch"],
        epochs=case["epochs"],
        warmup_epochs=case["warmup_epochs"],
        base=case["base"],
        minimum=case["min"],
        start=case.get("warmup_start", 0.0),
    )
    errors = [relative_error(learning_rate(step, **schedule), value) for step, value in case["values"]]
    yield Check("values", max(errors), BARS[torch.float64])
    if "len" in case:
        yield Check("len", abs(case["epochs"] * case["steps_per_epoch"] - case["len"]), 0)


def _is_recipe(value: Any) -> bool:
    return isinstance(value, dict) and "params" in value and "kind" in value


def _run_groups(case: Case) -> Iterator[Check]:
    for name, record in case.items():
        if not _is_recipe(record):
            continue
        if record["kind"] not in _LAYERS:
            raise NotUnderstood(f"optimizer groups of kind {record['kind']}")
        recipe = OptimizerRecipe(
            base_lr=record["base_lr"],
            weight_decay=record["weight_decay"],
            layers=_LAYERS[record["kind"]],
            layer_decay=record.get("decay_rate", 1.0),
            num_layers=record.get("num_layers_arg", 6),
        )
        official = record["params"]
        computed = {
            parameter: (group["layer"], group["lr_scale"], group["weight_decay"])
            for group in optimizer_groups(_detector(official), recipe)
            for parameter in group["param_names"]
        }
        prefix = "backbone."
        expected = {
            prefix + zoo_name(n.removeprefix(prefix)) if n.startswith(prefix) else n: value
            for n, value in official.items()
        }
        yield Check(f"{name}.names", float(len(expected.keys() ^ computed.keys())), 0)
        for i, what in enumerate(("layer", "lr_scale", "weight_decay")):
            errors = [relative_error(computed[n][i], expected[n][i]) for n in expected if n in computed]
            yield Check(f"{name}.{what}", max(errors), 1e-12)


def _detector(names: dict[str, Any]) -> nn.Module:
    """A module with a backbone of the depths that the official names show, and their other parameters."""
    blocks = [n.split(".")[1:4:2] for n in names if n.startswith("backbone.layer_") and ".blocks." in n]
    depths = [1 + max(int(j) for layer, j in blocks if layer == f"layer_{i}") for i in range(4)]
    backbone = FcaFormerDense(
        embed_dims=(32, 32, 32, 32),
        depths=depths,
        num_heads=(0, 0, 1, 1),
        out_channels=(8, 8, 8, 8) if "backbone.head0.weight" in names else None,
        device="meta",
    )
    model = nn.ModuleDict({"backbone": backbone})
    for name in names:
        if not name.startswith("backbone."):
            *path, leaf = name.split(".")
            module = model
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            shape = (2,) if leaf == "bias" or "norm" in name or "bn" in name else (2, 2)
            module.register_parameter(leaf, nn.Parameter(torch.empty(shape, device="meta")))
    return model


# What the files of this family and others like it have in common


def watch(seen: dict[str, Tensor], name: str, module: nn.Module) -> None:
    """Record the output of `module` under `name`."""
    module.register_forward_hook(lambda m, args, output: seen.update({name: output}))


def official_state(case: Case) -> dict[str, Tensor]:
    """The reference's whole state dict, with its integer entries (counters) at zero."""
    counters = [entry for entry in case["state_dict"] if "float" not in entry[2]]
    return case.weights() | {name: torch.zeros(shape, dtype=torch.int64) for name, shape, _ in counters}


def output_checks(case: Case, outputs: dict[str, Tensor], dtype: torch.dtype) -> Iterator[Check]:
    """Compare every recorded output that was computed."""
    for name, record in case["outputs"].items():
        if name in outputs:
            bar = GRADIENT_BAR if name.startswith("d_") and dtype is torch.float32 else BARS[dtype]
            yield Check(name, output_error(record, outputs[name]), bar)


def count_checks(
    case: Case,
    model: nn.Module,
    forward: Callable | None,
    extra: Callable[[nn.Module, dict[str, int]], int] | None = None,
) -> Iterator[Check]:
    """Compare the numbers of parameters and multiply-adds with the file, exactly."""
    if case.get("params") is not None:
        yield Check("params", relative_error(sum(p.numel() for p in model.parameters()), case["params"]), 0)
    if case.get("trainable_params") is not None:
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        yield Check("trainable_params", relative_error(count, case["trainable_params"]), 0)
    if case.get("macs") is not None and forward is not None:
        yield Check("macs", relative_error(multiply_adds(model, forward, extra), case["macs"]), 0)


def multiply_adds(model: nn.Module, forward: Callable, extra: Callable | None = None) -> int:
    """Multiply-adds of convolutions, linear layers and matrix products, counted on the meta device."""
    model = copy.deepcopy(model).to("meta").eval()
    attended: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, CrossAttention) and module.cross_norm is not None:
            module.cross_norm.register_forward_pre_hook(
                lambda m, args, name=name: attended.update({name: args[0].shape[0] * args[0].shape[1]})
            )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward(model)
    return counter.get_total_flops() // 2 + (extra(model, attended) if extra else 0)


def wants_gradients(case: Case) -> bool:
    """Whether the file records gradients."""
    return any(key in case for key in ("input_grads", "param_grads", *_NORM_FIELDS))


_NORM_FIELDS = ("grad_norms", "param_l2", "param_grad_norms", "grad_l2_norm")


def gradient_checks(
    case: Case, model: nn.Module, output: Tensor, inputs: dict[str, Tensor], translate: Callable[[str], str]
) -> Iterator[Check]:
    """Gradients of inputs and parameters, and buffers after a step in train mode, under official names."""
    if wants_gradients(case):
        gradient_loss(case, output).backward()
        parameters = dict(model.named_parameters())
        for name, record in (case.get("input_grads") or {}).items():
            yield Check(f"grad {name}", output_error(record, inputs[name].grad), GRADIENT_BAR)
        for name, record in (case.get("param_grads") or {}).items():
            grad = parameters[translate(name)].grad.flatten().double()
            if "shape" in record:
                yield Check(f"grad {name}", output_error(record, grad.reshape(record["shape"])), GRADIENT_BAR)
                continue
            values = torch.tensor(record["values"], dtype=torch.float64)
            deviation = (grad[: len(values)] - values).norm() / (values.norm() or 1.0)
            norm = relative_error(grad.norm(), record["norm"]) if "norm" in record else 0.0
            yield Check(f"grad {name}", max(float(deviation), norm), GRADIENT_BAR)
        for field in _NORM_FIELDS:
            for name, norm in (case.get(field) or {}).items():
                grad = parameters[translate(name)].grad
                yield Check(f"grad {name}", relative_error(grad.norm(), norm), GRADIENT_BAR)
    buffers = dict(model.named_buffers())
    for field in ("buffers_after", "running_stats_after_one_forward"):
        for name, record in (case.get(field) or {}).items():
            buffer = buffers[translate(name)]
            if isinstance(record, dict):
                error = output_error({"shape": list(buffer.shape), **record}, buffer)
            else:
                values = torch.tensor(record, dtype=torch.float64).flatten()
                error = float((buffer.double().flatten()[: len(values)] - values).abs().max())
            yield Check(f"after {name}", error, BARS[buffer.dtype] if buffer.is_floating_point() else 0)


def gradient_loss(case: Case, output: Tensor) -> Tensor:
    """What a file's gradients are of: cross entropy with `targets`, or a weighted sum of the output."""
    if "targets" in case:
        return nn.functional.cross_entropy(output, torch.tensor(case["targets"]))
    return (output * fill_input("grad_out", output.shape, case.seed).to(output.dtype)).sum()
