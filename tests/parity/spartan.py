"""SpaRTAN: models, blocks, mixers, the wave gate, the dilated pair, folds, training steps, schedule and counts.

Multiply-adds follow the files: convolutions, linear layers and matrix products, one image.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, SqueezeExcite
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

import zoo
from tests.parity.fcaformer import count_checks, multiply_adds, official_state, output_checks, watch
from tests.parity.golden import Case, fill_input, output_error, relative_error
from tests.parity.runner import BARS, GRADIENT_BAR, Check, NoSuchForm, NotUnderstood
from zoo.kernels.wave_gate import strongest, wave_gate
from zoo.spartan import (
    SpaRTAN,
    block_name,
    learning_rate,
    mixer_name,
    name_map,
    reshape_entry,
    spartan_from_checkpoint,
)
from zoo.spartan_blocks import ChannelMixer, ConvNorm, FoldedBlock, SpartanBlock, SpatialMixer

Translation = Callable[[str], str]


def claims(case: Case) -> bool:
    return "SpaRTAN" in case.get("source", "")


def run(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    made = case.get("constructor") or {}
    if folded and case.get("mode") == "train":
        raise NoSuchForm("the folded form is not for training")
    if "layer_depths" in made:
        yield from _run_model(case, dtype, folded)
    elif "early" in made:
        yield from _run_block(case, dtype, folded)
    elif "in_dim" in made or "channels" in made:
        yield from _run_part(case, dtype, folded)
    elif folded:
        raise NoSuchForm("nothing to fold")
    elif "argmax" in (case.get("outputs") or {}):
        yield from _run_wave_gate(case, dtype)
    elif dtype is not torch.float64:
        raise NoSuchForm("numbers without a dtype")
    elif "lr_by_epoch" in case:
        yield from _run_schedule(case)
    elif "counts" in case:
        yield from _run_counts(case)
    else:
        raise NotUnderstood(f"a SpaRTAN case with {', '.join(case)}")


# Models


def arguments(made: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `SpaRTAN` for those of the official constructor."""
    stages = made.get("num_layer", len(made["layer_depths"]))
    dims = [made["init_dim"], *made["dims"]]
    if len(made["layer_depths"]) != stages or len(dims) != stages:
        raise NotUnderstood(f"{stages} layers of depths {made['layer_depths']} and widths {dims}")
    return dict(
        in_chans=made.get("in_chans", 3),
        num_classes=made.get("num_classes", 1000),
        embed_dims=dims,
        depths=made["layer_depths"],
        expand_ratios=made["expand_ratios"],
    )


def _run_model(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    made = arguments(case["constructor"])
    model = SpaRTAN(**made, dtype=torch.float64)
    state = official_state(case)
    report = zoo.load_checkpoint(model, state)
    names = name_map(list(state))
    exact = dtype is torch.float64 and not folded
    if exact:
        yield Check("layout", float(report.layout != "SpaRTAN" or not report.complete), 0)
        image = case["input"]["shape"]
        yield from count_checks(case, model, lambda m: m(_meta_image(image)))
        model.load_state_dict(spartan_from_checkpoint(state, dtype=torch.float64).state_dict())  # sizes are read
    model = zoo.fold(model) if folded else model
    model = model.to(dtype).train(case.get("mode") == "train")
    image = case.input().to(dtype).requires_grad_("input_grads" in case)
    seen: dict[str, Tensor] = {}
    watch(seen, "stem", model.stem)
    for i, stage in enumerate(model.stages):
        watch(seen, f"stage{i}", stage)
    with torch.set_grad_enabled(_has_gradients(case) and not folded):
        features = model.forward_features(image)
        outputs = {**seen, "logits": model.forward_head(features), "pooled": features.mean((2, 3))}
    yield from output_checks(case, outputs, dtype)
    if not folded and _has_gradients(case):
        yield from _gradient_checks(case, model, outputs["logits"], {case["input"]["name"]: image}, names.__getitem__)
        if "optimizer" in case and exact:  # Adam's first step is near the gradient's sign: float64 only
            yield from _step_checks(case, model, image, names)


def _meta_image(shape: list[int]) -> Tensor:
    return torch.zeros(1, *shape[1:], device="meta", dtype=torch.float64)


def _step_checks(case: Case, model: nn.Module, image: Tensor, names: dict[str, str]) -> Iterator[Check]:
    """Weights after a step of the official optimizer, with the groups that timm makes of zoo's parameters."""
    made = case["optimizer"]
    groups = param_groups_weight_decay(model, made["weight_decay"], no_weight_decay_list=model.no_weight_decay())
    optimizer = getattr(torch.optim, made["name"])(groups, lr=made["lr"], betas=made["betas"], eps=made["eps"])
    optimizer.step()
    bar = BARS[torch.float64]
    parameters = dict(model.named_parameters())
    for name, norm in case.get("params_after_step", {}).items():
        yield Check(f"after step {name}", relative_error(parameters[names[name]].detach().norm(), norm), bar)
    if "logits_after_step_eval" in case:
        with torch.no_grad():
            logits = model.eval()(image)
        yield Check("logits_after_step_eval", output_error(case["logits_after_step_eval"], logits), bar)


# Blocks, mixers, operators


def _load(case: Case, module: nn.Module, translate: Translation) -> None:
    state = {translate(name): value for name, value in official_state(case).items()}
    zoo.load_checkpoint(module, {name: reshape_entry(name, value) for name, value in state.items()})


def _run_block(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    made = case["constructor"]
    block = SpartanBlock(made["in_dim"], made["expand_ratio"], made["early"], dtype=torch.float64)
    _load(case, block, block_name)
    if not folded:
        yield from count_checks(case, block, None)
    unfolded = block.train(case.get("mode") == "train")
    block = (zoo.fold(block) if folded else copy.deepcopy(block)).to(dtype)
    gradients = _has_gradients(case) and not folded
    x = _inputs(case, dtype, gradients)["x"]
    seen: dict[str, Tensor] = {}
    for name in ("norm1", "norm2"):
        watch(seen, name.replace("norm", "norm_"), getattr(block, name))
    if not folded:
        watch(seen, "smixer", block.spatial)
        block.norm2.register_forward_pre_hook(lambda module, args: seen.update(after_smixer=args[0]))
    with torch.set_grad_enabled(gradients):
        outputs = {"y": block(x), **seen}
    yield from output_checks(case, outputs, dtype)
    if "argmax" in case["outputs"]:
        yield _index_check(case, strongest(seen["norm_2"]))
    if gradients:
        yield from _gradient_checks(case, block, outputs["y"], {"x": x}, block_name)
    elif folded:
        for name, tensor in _merged_tensors(unfolded.eval(), block, dtype).items():
            if name in (case.get("folded") or {}):
                yield Check(name, output_error(case["folded"][name], tensor), BARS[dtype])
                seen[name] = tensor
        left = (case.get("folded") or {}).keys() - seen.keys()
        if left:
            raise NotUnderstood(f"merged tensors {', '.join(sorted(left))}")


def _index_check(case: Case, index: Tensor) -> Check:
    record = case["outputs"]["argmax"]
    values = torch.tensor(record["values"])
    wrong = int((index.flatten()[: len(values)] != values).sum())
    if "sum" in record:
        wrong += int(index.sum()) != record["sum"]
    return Check("argmax", float(wrong), 0)


@torch.no_grad()
def _merged_tensors(block: SpartanBlock, folded: FoldedBlock, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the files record of a folded block.

    zoo does not fold the group norm, whose tensors are made here of the loaded ones. Its convolution of waves is
    read out by impulses, for the factors are not always in the weights.
    """
    spatial, channel = folded.spatial, folded.channel
    double = copy.deepcopy(block).to(dtype)
    merged = {}
    theta_and_proj = [
        torch.cat([getattr(m, k) for m in (double.channel.theta, double.channel.proj)]) for k in ("weight", "bias")
    ]
    for name, weight, bias, norm in (
        ("smixer.proj_in", double.spatial.proj_in.weight, double.spatial.proj_in.bias, "norm_1"),
        ("cmixer.[theta; proj]", *theta_and_proj, "norm_2"),
    ):
        layer = getattr(double, norm.replace("_", ""))
        merged[f"{name}.weight (columns times {norm}.weight)"] = weight.flatten(1) * layer.weight
        merged[f"{name} row sums r"] = weight.flatten(1) @ layer.weight
        for constant in ("constant c", "constant c = W beta + b"):
            merged[f"{name} {constant}"] = weight.flatten(1) @ layer.bias + bias
    merged["smixer.h_conv weight"], merged["smixer.h_conv bias"] = spatial.conv_near.weight, spatial.conv_near.bias
    merged["smixer.l_conv.1 weight"], merged["smixer.l_conv.1 bias"] = spatial.conv_far2.weight, spatial.conv_far2.bias
    merged["smixer.proj_out.weight (rows times scale_1)"] = spatial.proj_out.weight
    merged["smixer.proj_out.bias (times scale_1)"] = spatial.proj_out.bias
    merged["cmixer.conv weight (BN and rotation merged)"], merged["cmixer.conv bias"] = _impulse_response(channel)
    merged["cmixer.proj_out.weight (rows times scale_2)"] = channel.proj_out.weight[:, channel.outputs.argsort()]
    merged["cmixer.proj_out.bias (times scale_2)"] = channel.proj_out.bias
    return merged


def _impulse_response(channel: nn.Module) -> tuple[Tensor, Tensor]:
    """Weights and bias of the grouped convolution that a folded channel mixer applies to its waves."""
    n = channel.conv.out_channels
    impulses = torch.zeros(n + 1, 3, 3, n, dtype=channel.conv.weight.dtype)  # the last one stays zero
    impulses[range(n), 1, 1, range(n)] = 1
    impulses = impulses[..., channel.inputs]
    response = channel.turn_and_convolve(impulses)[..., channel.outputs.argsort()]
    bias = response[n, 1, 1]
    kernels = (response[:n] - bias).flip(1, 2).permute(3, 0, 1, 2)  # (out, in, 3, 3)
    width = max(2, channel.conv.weight.shape[1])
    groups = n // width
    blocks = kernels.reshape(groups, width, groups, width, 3, 3)
    return torch.cat([blocks[g, :, g] for g in range(groups)]), bias


class _DilatedPair(nn.Sequential):
    """The far branch of `SpatialMixer`, under its official names."""

    def __init__(self, channels: int, groups: int):
        first = nn.Conv2d(channels, channels, 3, padding=2, dilation=2, groups=groups, bias=False, dtype=torch.float64)
        super().__init__(first, ConvNorm(channels, channels, dilation=2, groups=groups, dtype=torch.float64))


def _part(made: dict[str, Any]) -> tuple[nn.Module, Translation]:
    if "channels" in made:
        return _DilatedPair(made["channels"], made["groups"]), lambda n: mixer_name(n.replace("0.conv.", "0."))
    dim = made["in_dim"]
    if "expand_ratio" not in made:
        if made["groups"] not in (1, dim // 2):
            raise NotUnderstood(f"a spatial mixer of {made['groups']} groups")
        return SpatialMixer(dim, made["groups"] > 1, dtype=torch.float64), mixer_name
    hidden = dim * made["expand_ratio"]
    groups = made.get("conv_groups") or (dim if made.get("groups_keyword", 1) > 1 else hidden)
    if groups not in (dim, hidden):
        raise NotUnderstood(f"a channel mixer of {groups} groups")
    return ChannelMixer(dim, made["expand_ratio"], groups == hidden, dtype=torch.float64), mixer_name


def _run_part(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    part, translate = _part(case["constructor"])
    _load(case, part, translate)
    if not folded:
        yield from count_checks(case, part, None)
    part = (zoo.fold(part) if folded else part).to(dtype).train(case.get("mode") == "train")
    gradients = _has_gradients(case) and not folded
    x = _inputs(case, dtype, gradients)["x"]
    with torch.set_grad_enabled(gradients):
        if folded and not isinstance(part, nn.Sequential):  # folded mixers add to a channels-last residual stream
            tokens = x.permute(0, 2, 3, 1).contiguous()
            y = part(tokens, torch.zeros_like(tokens)).permute(0, 3, 1, 2)
        else:
            y = part(x)
    yield from output_checks(case, {"y": y}, dtype)
    if gradients:
        yield from _gradient_checks(case, part, y, {"x": x}, translate)


def _run_wave_gate(case: Case, dtype: torch.dtype) -> Iterator[Check]:
    given = _inputs(case, dtype, True)
    if case.get("x_transform", "none") not in ("none", "round"):
        raise NotUnderstood(f"x_transform {case['x_transform']}")
    x = given["x"].detach().round() if case.get("x_transform") == "round" else given["x"].detach()
    y = wave_gate(x, given["theta"], given["amplitude"], given["complex"].reshape(-1, 2))
    yield _index_check(case, strongest(x))
    yield from output_checks(case, {"y": y}, dtype)
    yield from _gradient_checks(case, nn.Module(), y, given, str)


# The optimizer's rules and sizes


def _run_schedule(case: Case) -> Iterator[Check]:
    schedule = dict(
        epochs=case["t_initial"],
        warmup_epochs=case["warmup_t"],
        base=case["lr"],
        minimum=case["lr_min"],
        start=case["warmup_lr_init"],
    )
    rates = [learning_rate(epoch, **schedule) for epoch in range(1, len(case["lr_by_epoch"]) + 1)]
    errors = [relative_error(rate, value) for rate, value in zip(rates, case["lr_by_epoch"])]
    yield Check("lr_by_epoch", max(errors), BARS[torch.float64])


def _run_counts(case: Case) -> Iterator[Check]:
    for record in case["counts"]:
        what = f"{record['name']} {record['size']}"
        with torch.device("meta"):
            model = SpaRTAN(**arguments(record["constructor"]))
        count = sum(p.numel() for p in model.parameters())
        head = sum(p.numel() for p in model.head.parameters())
        yield Check(f"{what} params", relative_error(count, record["params"]), 0)
        yield Check(f"{what} params_without_head", relative_error(count - head, record["params_without_head"]), 0)
        inputs = _count_inputs(model)
        shape = (1, 3, record["size"], record["size"])
        macs = multiply_adds(model, lambda m, shape=shape: m(torch.zeros(shape, device="meta")))
        yield Check(f"{what} macs", relative_error(macs, record["macs"]), 0)
        # fvcore adds norms per element, batch norm by mode, and one for each element that is averaged
        others = macs + 5 * inputs["group norm"] + inputs["mean"]
        for mode, factor in (("train", 5), ("eval", 2)):
            counted = others + factor * inputs["batch norm"]
            yield Check(f"{what} fvcore_{mode}_mode", relative_error(counted, record[f"fvcore_{mode}_mode"]), 0)
    with torch.device("meta"):
        model = SpaRTAN()
    without, decayed = param_groups_weight_decay(model, 0.03, no_weight_decay_list=model.no_weight_decay())
    ours = {id(p): name for name, p in model.named_parameters()}
    for what, group in (("decay", decayed), ("no_decay", without)):
        tensors, record = group["params"], case[what]
        yield Check(f"{what} tensors", relative_error(len(tensors), record["tensors"]), 0)
        yield Check(f"{what} elements", relative_error(sum(t.numel() for t in tensors), record["elements"]), 0)
        expected = {name_map([n])[n] for n in record["block0"]}
        found = {ours[id(t)] for t in tensors if ours[id(t)].startswith("stages.0.blocks.0.")}
        yield Check(f"{what} block0", float(len(expected ^ found)), 0)


def _count_inputs(model: nn.Module) -> dict[str, int]:
    """Elements that enter norms and means in forward passes of `model` and of its copies from now on."""
    totals = {"batch norm": 0, "group norm": 0, "mean": 0}

    def count(module: nn.Module, kind: str) -> None:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            totals[kind] += args[0].numel()

        module.register_forward_pre_hook(add)

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            count(module, "batch norm")
        elif isinstance(module, nn.GroupNorm):
            count(module, "group norm")
        elif isinstance(module, SqueezeExcite | ClassifierHead):  # both begin with a mean over the map
            count(module, "mean")
        elif isinstance(module, SpatialMixer):  # so does the decomposition behind its first layer
            count(module.conv_near, "mean")
    return totals


# Gradients and buffers


_NORMS = ("param_grad_norms", "grad_norms", "param_l2")


def _inputs(case: Case, dtype: torch.dtype, gradients: bool) -> dict[str, Tensor]:
    given = case.get("inputs") or [case["input"]]
    return {i["name"]: case.input(i["name"], i["shape"]).to(dtype).requires_grad_(gradients) for i in given}


def _has_gradients(case: Case) -> bool:
    return any(key in case for key in ("input_grads", "param_grads", *_NORMS))


def _loss(case: Case, y: Tensor) -> Tensor:
    """What the gradients are of: cross entropy with hard or soft targets, or a weighted sum of the output."""
    targets = case.get("targets")
    if targets is None:
        return (y * fill_input("grad_out", y.shape, case.seed).to(y.dtype)).sum()
    if isinstance(targets, str):
        found = re.match(r"softmax\(([\d.]+) \* fill_input\('(\w+)'", targets)
        if not found:
            raise NotUnderstood(f"targets {targets}")
        target = (float(found[1]) * fill_input(found[2], y.shape, case.seed)).softmax(-1).to(y.dtype)
    else:
        target = torch.tensor(targets)
    return F.cross_entropy(y, target)


def _gradient_checks(
    case: Case, module: nn.Module, y: Tensor, inputs: dict[str, Tensor], translate: Translation
) -> Iterator[Check]:
    """The loss, gradients of inputs and parameters, and buffers after the forward pass, under official names."""
    dtype = y.dtype
    loss = _loss(case, y)
    loss.backward()
    if isinstance(case.get("loss"), float):
        yield Check("loss", relative_error(loss.detach(), case["loss"]), BARS[dtype])
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    for name, record in (case.get("input_grads") or {}).items():
        yield Check(f"grad {name}", output_error(record, inputs[name].grad), GRADIENT_BAR)
    norms = {name: record["norm"] for name, record in (case.get("param_grads") or {}).items()}
    for field in _NORMS:
        norms |= case.get(field) or {}
    # a bias that only a batch norm sees has no gradient: rounding is compared with the other gradients
    floor = 1e-8 * max(norms.values(), default=0.0)
    for name, norm in norms.items():
        grad = parameters[translate(name)].grad.flatten().double()
        unit = norm if norm > floor else floor / 1e-8
        deviation = abs(float(grad.norm()) - norm)
        if name in (case.get("param_grads") or {}):
            values = torch.tensor(case["param_grads"][name]["values"], dtype=torch.float64)
            deviation = max(deviation, float((grad[: len(values)] - values).norm()))
        yield Check(f"grad {name}", deviation / (unit or 1.0), GRADIENT_BAR)
    if "grad_norm_total" in case:
        total = torch.stack([p.grad.norm() for p in parameters.values()]).norm()
        yield Check("grad_norm_total", relative_error(total, case["grad_norm_total"]), GRADIENT_BAR)
    for name, record in (case.get("buffers_after") or {}).items():
        buffer = buffers[translate(name)].double().flatten()
        values = torch.tensor(record["values"], dtype=torch.float64)
        error = max(float((buffer[: len(values)] - values).abs().max()), relative_error(buffer.sum(), record["sum"]))
        yield Check(f"after {name}", error, BARS[dtype])
    for name, value in (case.get("buffer_sums_after") or {}).items():
        yield Check(f"after {name}", relative_error(buffers[translate(name)].sum(), value), BARS[dtype])
