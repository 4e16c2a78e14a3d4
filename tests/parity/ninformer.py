"""Golden cases of NiNformer and Fourier_NiNformer: classifiers, other grids, blocks, token mixing, training steps.

Multiply-adds are those of convolutions, linear maps and matrix products of one image (half of what
torch.utils.flop_counter counts); norms, activations, products by element, pooling and Fourier transforms are free.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import zoo
from tests.parity.golden import Case, fill_input, output_error, relative_error
from tests.parity.runner import BARS, GRADIENT_BAR, Check, NoSuchForm, NotUnderstood
from zoo.ninformer import NinFormer, constructor_arguments, rename
from zoo.ninformer_blocks import FourierGate, MixerGate, NinBlock, resize_map

REPOSITORIES = ("Abdullah-88/NiNformer", "Abdullah-88/Fourier_NiNformer", "Abdullah-88/ShortConv_NiNformer")
FIELDS = {  # official constructor -> zoo's
    "patch_size": "patch_size",
    "in_channels": "in_chans",
    "num_classes": "num_classes",
    "d_model": "embed_dim",
    "num_layers": "depth",
    "d_ffn": "hidden_dim",
}


def claims(case: Case) -> bool:
    return str(case.get("source", "")).startswith(REPOSITORIES) or case.path.parent.name == "ninformer"


def run(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    names = {name for name, _, _ in case["state_dict"]}
    if "patcher.weight" in names:
        yield from run_model(case, dtype, folded, Family(build, block_outputs, rename))
        if "run_grid" in case and not folded:
            yield from _run_resampled(case, dtype)
        return
    if folded:
        raise NoSuchForm  # what folds is the whole model
    yield from _run_part(case, dtype, names)


# What Activator's cases share ----------------------------------------------------------------------------------


class Family(NamedTuple):
    """How an adapter builds a classifier, reads intermediates of a block, and renames official entries."""

    build: Callable[[Case], nn.Module]
    block_outputs: Callable[[str, nn.Module, Recorder], Tensor | None]
    rename: Callable[[str], str]


def official_options(case: Case, shapes: dict[str, object], fields: dict[str, str], ignored: set[str]) -> dict:
    """Constructor arguments of the zoo model: those of the case, and what only the shapes tell."""
    options = dict(shapes)
    for name, value in case["constructor"].items():
        if name in fields:
            options[fields[name]] = tuple(value) if isinstance(value, list) else value
        elif name == "dropout":
            options["proj_drop_rate"] = 0.0 if case.get("mode") == "train" else value
        elif name not in ignored:
            raise NotUnderstood(f"a constructor argument {name}={value!r}")
    return options


def meta_state(case: Case) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape, _ in case["state_dict"]}


def crop(image: Tensor, patch: tuple[int, int]) -> Tensor:
    """The official convolution does not see trailing rows and columns that fill no patch."""
    return image[..., : image.shape[-2] // patch[0] * patch[0], : image.shape[-1] // patch[1] * patch[1]]


def images(case: Case) -> dict[str, list[int]]:
    """Names and shapes of the inputs."""
    records = case.get("inputs") or [case["input"]]
    return {record["name"]: record["shape"] for record in records}


def run_model(case: Case, dtype: torch.dtype, folded: bool, family: Family) -> Iterator[Check]:
    """A classifier: counts, every recorded output, loss and gradients, optimizer steps."""
    model = family.build(case).to(dtype)
    if dtype is torch.float64 and not folded:
        yield from counts(case, family.build)
    zoo.load_checkpoint(model, {name: value.to(dtype) for name, value in case.weights().items()})
    model.train(case.get("mode") == "train")
    if folded and (model.training or "losses" in case):
        raise NoSuchForm
    if "losses" in case:
        yield from _run_steps(case, model, family, dtype)
        return
    if folded:
        model = zoo.fold(model)
    name, shape = next(iter(images(case).items()))
    image = case.input(name, shape).to(dtype).requires_grad_()
    with Recorder(model, first=True) as recorder, torch.set_grad_enabled(not folded):
        patches = crop(image, model.patch_embed.patch_size)
        features = model.forward_features(patches)
        logits = model(patches) if folded else model.forward_head(features)
        pooled = model.forward_pooled(patches) if folded else model.pool(features)
    outputs = {"logits": logits, "pooled": pooled, "tokens": features}
    for output in case["outputs"]:
        if output in outputs:
            continue
        if output == "patch_embed":
            outputs[output] = recorder.outputs["patch_embed.proj"]
        elif output == "token_map":
            outputs[output] = model.forward_intermediates(patches, 1, intermediates_only=True)[0]
        elif output == "class_map":
            outputs[output] = model.class_map(patches)
        elif match := re.fullmatch(r"block(\d+)(?:_(\w+))?", output):
            block = f"blocks.{match[1]}"
            part = recorder.at(block)
            value = recorder.outputs[block] if match[2] is None else family.block_outputs(match[2], model, part)
            if value is not None:
                outputs[output] = value
    yield from compare(case, outputs, dtype)
    if not folded:
        yield from _gradients(case, model, family, logits, {name: image}, dtype)


class Recorder(ExitStack):
    """Inputs and outputs of every submodule while it is open; those of the first call with `first`."""

    def __init__(self, model: nn.Module, first: bool = False):
        super().__init__()
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            hook = module.register_forward_hook(lambda _, args, out, name=name: self._keep(name, args, out, first))
            self.callback(hook.remove)

    def _keep(self, name: str, args: tuple, out: Tensor, first: bool) -> None:
        if name and not (first and name in self.outputs):
            self.inputs[name], self.outputs[name] = args[0], out

    def at(self, prefix: str) -> Recorder:
        """The records of one submodule's parts."""
        part = Recorder(nn.Identity())
        for ours, theirs in ((part.inputs, self.inputs), (part.outputs, self.outputs)):
            ours.update({n.removeprefix(prefix + "."): v for n, v in theirs.items() if n.startswith(prefix + ".")})
        return part


def compare(case: Case, outputs: dict[str, Tensor], dtype: torch.dtype, suffix: str = "") -> Iterator[Check]:
    for name, record in case["outputs"].items():
        if name not in outputs:
            raise NotUnderstood(f"an output called {name}")
        yield from compare_record(name + suffix, record, outputs[name], BARS[dtype])


def compare_record(name: str, record: dict, output: Tensor, bar: float) -> Iterator[Check]:
    error = output_error(record, output)
    if "sum_abs" in record:
        error = max(error, relative_error(float(output.detach().double().abs().sum()), record["sum_abs"]))
    yield Check(name, error, bar)


def counts(case: Case, build: Callable[[Case], nn.Module]) -> Iterator[Check]:
    with torch.device("meta"):
        model = build(case)
    own = sum(p.numel() for p in model.parameters())
    if "params" in case:
        yield Check("params", abs(own - case["params"]), 0)
    if "trainable_params" in case:
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        yield Check("trainable_params", abs(trainable - case["trainable_params"]), 0)
    if "macs" in case:
        yield Check("macs", abs(multiply_adds(model, next(iter(images(case).values()))) - case["macs"]), 0)
    if "buffers_after" in case:
        yield Check("buffers_after", len(set(dict(model.named_buffers())) ^ set(case["buffers_after"])), 0)


def multiply_adds(model: nn.Module, shape: list[int]) -> int:
    image = crop(torch.empty(1, *shape[1:], device="meta"), model.patch_embed.patch_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops() // 2


def _gradients(
    case: Case, model: nn.Module, family: Family, logits: Tensor, inputs: dict[str, Tensor], dtype: torch.dtype
) -> Iterator[Check]:
    if not {"param_grads", "input_grads", "loss", "grad_norms"} & set(case):
        return
    model.zero_grad()
    if "targets" in case:
        if "cross entropy" not in str(case.get("loss_fn", "cross entropy")):
            raise NotUnderstood(f"a loss of {case['loss_fn']}")
        loss = F.cross_entropy(logits, torch.tensor(case["targets"]))
        for field in ("loss", "loss_value"):
            if isinstance(case.get(field), float):
                yield Check(field, relative_error(float(loss.detach()), case[field]), BARS[dtype])
        loss.backward()
    else:
        logits.backward(fill_input("grad_out", logits.shape, case.seed).to(dtype))
    parameters = dict(model.named_parameters())
    yield from compare_gradients(case, lambda official: parameters[family.rename(official)].grad, inputs)


def compare_gradients(case: Case, parameter: Callable[[str], Tensor], inputs: dict[str, Tensor]) -> Iterator[Check]:
    """Recorded gradients: of inputs, and of parameters under their official names."""
    insensitive = set(case.get("insensitive_params") or ())
    for name, record in case.get("input_grads", {}).items():
        yield from compare_record(f"d {name}", record, inputs[name].grad, GRADIENT_BAR)
    for name, record in case.get("param_grads", {}).items():
        gradient = parameter(name)
        norm = float(gradient.double().norm())
        if name in insensitive:
            yield Check(f"|d {name}|", abs(norm - record["norm"]), GRADIENT_BAR)
            continue
        if "norm" in record:
            yield Check(f"|d {name}|", relative_error(norm, record["norm"]), GRADIENT_BAR)
        if "shape" in record:
            yield from compare_record(f"d {name}", record, gradient, GRADIENT_BAR)
        else:
            recorded = torch.tensor(record["values"], dtype=torch.float64)
            deviation = (gradient.detach().double().flatten()[: len(recorded)] - recorded).abs().max()
            typical = record["norm"] / math.sqrt(gradient.numel())
            yield Check(f"d {name}", float(deviation) / (typical or 1.0), GRADIENT_BAR)
    for name, expected in case.get("grad_norms", {}).items():
        yield Check(f"|d {name}|", relative_error(float(parameter(name).double().norm()), expected), GRADIENT_BAR)


def _run_steps(case: Case, model: nn.Module, family: Family, dtype: torch.dtype) -> Iterator[Check]:
    """Steps of the official optimizer, a new batch each, then the logits of one more batch in eval mode."""
    settings = re.search(r"Adam\(lr ([\d.e-]+), betas ([\d.]+)/([\d.]+), eps ([\d.e-]+), no weight decay", case["what"])
    if settings is None:
        raise NotUnderstood(case["what"])
    rate, beta1, beta2, eps = map(float, settings.groups())
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=(beta1, beta2), eps=eps)
    batches = [case.input(name, shape).to(dtype) for name, shape in images(case).items()]
    batches = [crop(batch, model.patch_embed.patch_size) for batch in batches]
    targets = torch.tensor(case["targets"])
    parameters = dict(model.named_parameters())
    for step, expected in enumerate(case["losses"]):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batches[step]), targets)
        loss.backward()
        yield Check(f"loss {step}", relative_error(float(loss.detach()), expected), BARS[dtype])
        for name, norm in case.get(f"grad_norms_step{step}", {}).items():
            gradient = parameters[family.rename(name)].grad
            yield Check(f"|d {name}| {step}", relative_error(float(gradient.double().norm()), norm), GRADIENT_BAR)
        optimizer.step()
    for name, norm in case.get("param_norms_after", {}).items():
        ours = float(parameters[family.rename(name)].detach().double().norm())
        yield Check(f"|{name}|", relative_error(ours, norm), BARS[dtype])
    with torch.no_grad():
        yield from compare(case, {"logits": model.eval()(batches[-1])}, dtype)


def run_module(
    case: Case, module: nn.Module, official: Callable[[str], str], forward: Callable[..., Tensor], dtype: torch.dtype
) -> Iterator[Check]:
    """A block or operator: its output, and gradients of sum(y * grad_out). `official` renames weights."""
    module.to(dtype).train(case.get("mode") == "train")
    module.load_state_dict({official(name): value for name, value in case.weights().items()})
    if "params" in case and dtype is torch.float64:
        yield Check("params", abs(sum(p.numel() for p in module.parameters()) - case["params"]), 0)
    inputs = {name: case.input(name, shape).to(dtype).requires_grad_() for name, shape in images(case).items()}
    y = forward(*inputs.values())
    yield from compare(case, {"y": y}, dtype)
    y.backward(fill_input("grad_out", y.shape, case.seed).to(dtype))
    parameters = dict(module.named_parameters())
    yield from compare_gradients(case, lambda name: parameters[official(name)].grad, inputs)


# NiNformer -----------------------------------------------------------------------------------------------------


def build(case: Case) -> NinFormer:
    """The classifier that the official constructor describes, on the grid of the case's images.

    The official class runs any grid of as many tokens as its weights are for, whatever `image_size` says. Another
    grid is this project's rule: the model is built for `built_grid` and mixes there.
    """
    shapes = constructor_arguments(meta_state(case))
    built = shapes.pop("img_size", None)
    options = official_options(case, shapes, FIELDS, ignored={"image_size", "seq_len"})
    patch = options["patch_size"]
    patch = patch if isinstance(patch, tuple) else (patch, patch)
    height, width = next(iter(images(case).values()))[-2:]
    grid = (height // patch[0], width // patch[1])
    mixing = next((s[1] for n, s, _ in case["state_dict"] if n.endswith("token_mix.2.net.0.weight")), None)
    if mixing is not None and grid[0] * grid[1] != mixing:
        options["dynamic_img_size"] = True
        grid = tuple(case["built_grid"]) if "built_grid" in case else (math.isqrt(mixing),) * 2
        if built is None and grid[0] * grid[1] != mixing:
            raise NotUnderstood(f"{mixing} tokens on a grid that the case does not tell")
    return NinFormer(img_size=(grid[0] * patch[0], grid[1] * patch[1]), **options)


def block_outputs(name: str, model: NinFormer, block: Recorder) -> Tensor | None:
    """A recorded intermediate of a block, from what its parts got and gave."""
    out = block.outputs
    if name == "token_branch":
        return block.inputs["gate.norm_channels"] - out["norm"]
    if name == "gated":
        return out["value"] * out["gate"]
    parts = dict(norm1="norm", value="value", channel_branch="gate.mlp_channels", gate="gate", ffn="mlp", fft="gate")
    return out.get(parts.get(name, ""))


def _run_resampled(case: Case, dtype: torch.dtype) -> Iterator[Check]:
    """The same numbers from folded weights, by `set_input_size` and by loading at the other size."""
    patch = build(case).patch_embed.patch_size
    size = tuple(n * p for n, p in zip(case["run_grid"], patch))
    state = {name: value.to(dtype) for name, value in case.weights().items()}
    resized = build(case).to(dtype)
    resized.dynamic_img_size = False
    zoo.load_checkpoint(resized, state)
    resized.set_input_size(size)
    options = constructor_arguments(state) | dict(img_size=size)
    loaded = NinFormer(**options).to(dtype)
    report = zoo.load_checkpoint(loaded, state)
    yield Check("a note about resampling", 0.0 if report.notes else 1.0, 0)
    for how, model in (("set_input_size", resized.eval()), ("loaded", loaded.eval())):
        yield from _compare_folded(case, model, dtype, how)
    if dtype is torch.float64:
        params = sum(p.numel() for p in loaded.parameters())
        yield Check("params_folded", abs(params - case["params_folded"]), 0)
        shape = next(iter(images(case).values()))
        yield Check("macs_folded", abs(multiply_adds(loaded.float().to("meta"), shape) - case["macs_folded"]), 0)


def _compare_folded(case: Case, model: NinFormer, dtype: torch.dtype, how: str) -> Iterator[Check]:
    image = case.input().to(dtype)
    with Recorder(model, first=True) as recorder, torch.no_grad():
        features = model.forward_features(image)
        outputs = {"logits": model.forward_head(features), "pooled": model.pool(features)}
    outputs["patch_embed"] = recorder.outputs["patch_embed.proj"]
    for name in case["outputs"]:
        if match := re.fullmatch(r"block(\d+)(?:_(\w+))?", name):
            block = f"blocks.{match[1]}"
            part = recorder.at(block)
            outputs[name] = recorder.outputs[block] if match[2] is None else block_outputs(match[2], model, part)
    yield from compare(case, outputs, dtype, suffix=f" ({how})")
    built, grid = case["built_grid"], case["run_grid"]
    mlp = model.blocks[0].gate.mlp_tokens
    weights = {
        "R_down": torch.kron(*resize_map(built, grid, image)),
        "R_up": torch.kron(*resize_map(grid, built, image)),
        "block0_W1_folded": mlp.fc1.weight,
        "block0_W2_folded": mlp.fc2.weight,
        "block0_b2_folded": mlp.fc2.bias,
    }
    for name, record in case.get("folded", {}).items():
        yield from compare_record(f"{name} ({how})", record, weights[name], BARS[dtype])


def _run_part(case: Case, dtype: torch.dtype, names: set[str]) -> Iterator[Check]:
    shape = {name: size for name, size, _ in case["state_dict"]}
    drop = 0.0 if case.get("mode") == "train" else case["constructor"].get("dropout", 0.0)
    if "mgu.proj.weight" in names:  # NiNBlock
        hidden, d = shape["ffn.net.0.weight"]
        module = NinBlock(d, *_gate(shape, "mgu.", hidden), drop=drop)
        yield from run_module(case, module, lambda name: rename("model.0." + name)[len("blocks.0.") :], module, dtype)
    elif "proj.weight" in names:  # MixerGatingUnit: value times gate
        module = NinBlock(shape["proj.weight"][0], *_gate(shape, "", 1), drop=drop)
        del module.norm, module.mlp
        yield from run_module(
            case,
            module,
            lambda name: rename("model.0.mgu." + name)[len("blocks.0.") :],
            lambda x: module.value(x) * module.gate(x),
            dtype,
        )
    elif any(name.startswith("token_mix.") for name in names):
        f, n = shape["token_mix.2.net.0.weight"]
        module = MixerGate(shape["token_mix.0.weight"][0], n, f, 1)
        del module.norm_channels, module.mlp_channels
        yield from run_module(
            case,
            module,
            lambda name: rename("model.0.mgu.Mixer." + name)[len("blocks.0.gate.") :],
            lambda x: x + module.mlp_tokens(module.norm_tokens(x)),
            dtype,
        )
    else:
        raise NotUnderstood(case.get("variant") or case.get("what"))


def _gate(shape: dict[str, list[int]], prefix: str, hidden: int) -> tuple:
    """Tokens, hidden widths and kind of a block's gate, as `NinBlock` takes them."""
    if f"{prefix}Mixer.token_mix.2.net.0.weight" not in shape:
        return 1, hidden, 1, 1, FourierGate
    token_dim, tokens = shape[f"{prefix}Mixer.token_mix.2.net.0.weight"]
    return tokens, hidden, token_dim, shape[f"{prefix}Mixer.channel_mix.1.net.0.weight"][0], MixerGate
