"""Golden cases of CRAFT: models, paddings, tiles, self-ensemble, training steps, blocks, operators and metrics.

"Eager" is the network as it trains, with gradients recorded; "folded" is how it infers: in strips of rows, here of a
single strip and of the smallest ones, with maps in memory and in files.

Multiply-adds follow the files: convolutions, linear layers and the products of both attentions; norms, softmax,
pooling and activations are left out; the position MLPs count though nothing of them is computed at width 1.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo
from tests.parity.golden import Case, fill_input, output_error, relative_error
from tests.parity.runner import BARS, GRADIENT_BAR, Check, NoSuchForm, NotUnderstood
from zoo.heads.craft import Craft, read_options
from zoo.heads.craft.blocks import (
    ChannelAttention,
    FusionBlock,
    GatedFeedForward,
    Group,
    HighFrequencyBlock,
    PositionBias,
    RectangleAttentionBlock,
)
from zoo.heads.craft.strips import Storage, Strips, _fusion, _group, _high_frequency, _mixing_matrix, forward_strips
from zoo.heads.craft.strips import _attention as attention_strips
from zoo.heads.craft.tiling import enlarge_tiled, self_ensemble
from zoo.heads.craft.windows import make_windows, window_attention

REPOSITORIES = ("AVC2-UESTC/CRAFT-SR", "AVC2-UESTC/Frequency-Inspired-Optimization-for-EfficientSR")
BUFFERS = ("relative_position_index_h", "relative_position_index_v", "biases_h", "biases_v")


def claims(case: Case) -> bool:
    return str(case.get("source", "")).startswith(REPOSITORIES) or case.path.parent.name == "craft"


def run(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    # the files list kept entries as [name, shape, dtype]
    kept = case.get("kept_entries") or []
    case["kept_entries"] = [entry if isinstance(entry, str) else entry[0] for entry in kept]
    if "sets" in case:
        yield from _run_metrics(case, dtype, folded)
        return
    names = {name for name, _, _ in case["state_dict"]}
    if "conv_first.weight" in names:
        yield from _run_model(case, dtype, folded)
        return
    for entry, runner in (
        ("residual_group.hf_blocks.0.attn.temperature", _run_group),
        ("attn.temperature", _run_fusion),
        ("temperature", _run_channel_attention),
        ("last_fc.weight", _run_high_frequency),
        ("get_v.weight", _run_attention_block),
        ("pos.pos_proj.weight", _run_window_attention),
        ("pos_proj.weight", _run_position_bias),
        ("project_in.weight", _run_feed_forward),
        ("0.weight", _run_upsampler),
    ):
        if entry in names:
            yield from runner(case, dtype, folded)
            return
    raise NotUnderstood(case.get("variant"))


# Whole models -------------------------------------------------------------------------------------------------


def build(case: Case, dtype: torch.dtype) -> Craft:
    """The model that the official constructor and the names and shapes of its state describe."""
    c = case["constructor"]
    meta = {name: torch.empty(shape, device="meta") for name, shape, _ in case["state_dict"]}
    index, table = meta.pop(BUFFERS[0], None), meta.pop("biases_h", None)
    options = read_options(meta)
    window = (c.get("split_size_0"), c.get("split_size_1"))
    if None in window and index is not None and table is not None:
        area, offsets = index.shape[0], table.shape[0]
        fits = [(h, area // h) for h in range(1, area + 1) if area % h == 0]
        window = next((h, w) for h, w in fits if (2 * h - 1) * (2 * w - 1) == offsets)
    options["window"] = window if None not in window else (4, 16)
    for name in ("img_range", "shift_mask", "mlp_ratio", "resi_connection", "qkv_bias"):
        if name in c:
            options[name] = c[name]
    if c.get("upscale", options["scale"]) != options["scale"]:
        raise NotUnderstood(f"scale {c['upscale']} with an upsampler of scale {options['scale']}")
    return Craft(**options, dtype=dtype)


def state_of(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) for name, value in case.weights().items()}


def _run_model(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    model = build(case, dtype)
    state = state_of(case, dtype)
    for name, shape, kind in case["state_dict"]:  # the tables that the file's model builds are accepted too
        if name in BUFFERS and "int" in kind:
            state[name] = torch.zeros(shape, dtype=torch.int64)
    zoo.load_checkpoint(model, state)
    model.train(case.get("mode") == "train")
    if not folded and dtype is torch.float64:
        yield from _counts(case, model)
    if "target" in [record["name"] for record in case.get("inputs") or ()]:
        if folded:
            raise NoSuchForm
        yield from _training_step(case, model, dtype)
        return
    record = case.get("input") or case["inputs"][0]
    image = case.input(record["name"], record["shape"]).to(dtype)
    outputs = _eager(case, model, image) if not folded else _inference(case, model, image)
    for name, value in outputs.items():
        yield from _compare_one(case, name, value, dtype)


def _compare_one(case: Case, name: str, value: Tensor, dtype: torch.dtype, bar: float | None = None) -> Iterator[Check]:
    record = case["outputs"].get(name.split(" ")[0])
    if record is not None:
        yield Check(name, output_error(record, value), bar or BARS[dtype])


def _counts(case: Case, model: Craft) -> Iterator[Check]:
    own = sum(p.numel() for p in model.parameters())
    for field in ("params", "trainable_params"):
        if case.get(field) is not None:
            yield Check(field, abs(own - case[field]), 0)
    if case.get("macs") is not None:
        shape = (case.get("input") or case["inputs"][0])["shape"]
        yield Check("macs", abs(macs(model, shape) - case["macs"]), 0)


def macs(model: Craft, shape: list[int]) -> int:
    """Multiply-adds of a forward pass of the official code on images of this shape."""
    batch, _, height, width = shape
    dim, area = model.embed_dim, math.prod(model.window)
    pixel = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 4)  # each filter tap once a pixel
    fixed = 0
    for group, heads in zip(model.layers, model.num_heads):
        for block in group.residual_group.srwa_blocks:
            pixel += sum(m.weight.numel() for m in (block.qkv, block.proj, block.mlp.fc1, block.mlp.fc2))
            pixel += 2 * area * dim
            for branch in block.attns:
                linears = (m.weight.numel() for m in branch.modules() if isinstance(m, nn.Linear))
                fixed += branch.pos.offsets().shape[0] * sum(linears)
        pixel += len(group.residual_group.hf_blocks) * 2 * dim * (dim // heads)
    return batch * height * width * pixel + fixed


def _eager(case: Case, model: Craft, image: Tensor) -> dict[str, Tensor]:
    """Outputs and intermediates of the network as it trains."""
    outputs: dict[str, Tensor] = {}
    hooks = []

    def watch(name: str, module: nn.Module) -> None:
        hooks.append(module.register_forward_hook(lambda m, i, out: outputs.__setitem__(name, out.detach())))

    for g, group in enumerate(model.layers):
        watch(f"stage{g}", group)
    watch("norm", model.norm)
    watch("upsampled", model.upsample)
    names = case["outputs"]
    s = model.scale
    if not any(name.startswith("sr_") for name in names) or {"sr", "sr_full", "sr_unmasked"} & names.keys():
        with torch.enable_grad():
            sr = model.forward_padded(image).detach()
        maps = {name: value.permute(0, 3, 1, 2) for name, value in outputs.items() if name != "upsampled"}
        outputs.update(maps)
        with torch.no_grad():
            outputs["shallow"] = model.embed(image).permute(0, 3, 1, 2)
            outputs["after_body"] = model.close(maps["norm"].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        outputs["sr"] = outputs["sr_full"] = sr
    for hook in hooks:
        hook.remove()
    if "sr_unmasked" in names:
        model.shift_mask = False
        _set_mask(model, False)
        with torch.enable_grad():
            outputs["sr_unmasked"] = model.forward_padded(image).detach()
        _set_mask(model, case["constructor"].get("shift_mask", False))

    network = model.forward_padded

    def recorded(x: Tensor) -> Tensor:
        with torch.enable_grad():
            return network(x).detach()

    outputs |= _image_rules(case, model, image, recorded)
    assert all(v.shape[2] % s == 0 for n, v in outputs.items() if n.startswith("sr"))
    return {name: value for name, value in outputs.items() if name in names}


def _set_mask(model: Craft, masked: bool) -> None:
    for module in model.modules():
        if isinstance(module, RectangleAttentionBlock):
            module.shift_mask = masked


def _image_rules(case: Case, model: Craft, image: Tensor, network: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Padding, tiles and self-ensemble, over a way to run the network."""
    names, outputs = case["outputs"], {}
    original = model.forward_padded
    model.forward_padded = network
    try:
        if "sr_reflect" in names:
            outputs["sr_reflect"] = model(image)
        if "sr_flip_always" in names:
            outputs["sr_flip_always"] = model.upscale(image, padding="official")
        if "sr_tiled" in names:
            numbers = case["constructor"] | _tile_of(case)
            outputs["sr_tiled"] = enlarge_tiled(model, image, model.scale, numbers["tile"], numbers["overlap"])
        if "sr_self_ensemble_x8" in names:
            outputs["sr_self_ensemble_x8"] = self_ensemble(model, image)
    finally:
        model.forward_padded = original
    return outputs


def _tile_of(case: Case) -> dict[str, int]:
    """Tile and overlap: fields of the case, or its note ("tile 32, overlap 16: ...")."""
    import re

    found = {name: case[name] for name in ("tile", "overlap") if name in case}
    note = " ".join(str(case.get(field, "")) for field in ("note", "description", "output_notes"))
    for name in ("tile", "overlap"):
        if name not in found:
            match = re.search(rf"\b{name}[ =:]*(\d+)", note)
            if match is None:
                raise NotUnderstood(f"tiles without a {name}")
            found[name] = int(match[1])
    return found


def _inference(case: Case, model: Craft, image: Tensor) -> dict[str, Tensor]:
    """The same images by the inference path."""
    names = case["outputs"]
    outputs = {}
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        smallest = partial(forward_strips, model, tokens=1)
        if {"sr", "sr_full"} & names.keys():
            key = "sr" if "sr" in names else "sr_full"
            outputs[key] = model(image)
            outputs[f"{key} (strips)"] = smallest(image)
            outputs[f"{key} (strips, files)"] = smallest(image, storage=Storage(folder))
        if "sr_unmasked" in names:
            _set_mask(model, False)
            outputs["sr_unmasked"] = model(image)
            outputs["sr_unmasked (strips)"] = smallest(image)
            _set_mask(model, case["constructor"].get("shift_mask", False))
        rules = _image_rules(case, model, image, smallest)
        outputs |= {f"{name} (strips)": value for name, value in rules.items()}
    return outputs


def _training_step(case: Case, model: Craft, dtype: torch.dtype) -> Iterator[Check]:
    if "mean absolute error" not in case["loss"] and "L1" not in case["loss"]:
        raise NotUnderstood(f"a loss of {case['loss']}")
    tensors = {r["name"]: fill_input(r["name"], r["shape"], case.seed).to(dtype) for r in case["inputs"]}
    image = next(value for name, value in tensors.items() if name != "target").requires_grad_()
    sr = model(image)
    loss = F.l1_loss(sr, tensors["target"])
    loss.backward()
    yield Check("loss_value", relative_error(float(loss.detach()), case["loss_value"]), BARS[dtype])
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    bar = 1e-8 if dtype is torch.float64 else 1e-4
    if "grad_norm_total" in case:
        total = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
        yield Check("grad_norm_total", relative_error(total, case["grad_norm_total"]), bar)
    zero = set(case.get("zero_gradients") or ())
    for name, record in case["outputs"].items():
        if name == "sr":
            yield Check(name, output_error(record, sr), BARS[dtype])
            continue
        key = name.removeprefix("grad:")
        value = image.grad if key in tensors else grads[key]
        yield from _gradient(name, record, value, dtype, name in zero)


def _gradient(name: str, record: dict, value: Tensor, dtype: torch.dtype, is_zero: bool) -> Iterator[Check]:
    if is_zero or max(abs(v) for v in record["values"]) < 1e-13:
        yield Check(name, float(value.abs().max()), 1e-9 if dtype is torch.float64 else 1e-3)
        return
    # L1's gradient is a sign: in float32 a few of them may fall the other way
    yield Check(name, output_error(record, value), 1e-8 if dtype is torch.float64 else GRADIENT_BAR)


# Blocks and operators -----------------------------------------------------------------------------------------


def _load(module: nn.Module, case: Case, dtype: torch.dtype) -> nn.Module:
    """Official names are the modules' own."""
    module = module.to(dtype)
    module.load_state_dict({n: v for n, v in state_of(case, dtype).items() if n not in BUFFERS})
    return module


def _inputs(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    records = case.get("inputs") or [case["input"]]
    return {r["name"]: fill_input(r["name"], r["shape"], case.seed).to(dtype).requires_grad_() for r in records}


def _module_case(
    case: Case, dtype: torch.dtype, module: nn.Module, inputs: dict[str, Tensor], outputs: dict[str, Tensor]
) -> Iterator[Check]:
    """Outputs, and where the case has them the gradients of the loss sum(y * grad_out)."""
    if case.get("params") is not None and dtype is torch.float64:
        yield Check("params", abs(sum(p.numel() for p in module.parameters()) - case["params"]), 0)
    zero = set(case.get("zero_gradients") or ())
    if any(name.startswith("grad:") for name in case["outputs"]):
        record = case.get("grad_out") or {"name": "grad_out", "shape": list(outputs["y"].shape)}
        grad_out = fill_input(record["name"], record["shape"], case.seed).to(dtype)
        (outputs["y"] * grad_out).sum().backward()
        leaves = inputs | dict(module.named_parameters())
        for name, leaf in leaves.items():
            outputs[f"grad:{name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    for name, record in case["outputs"].items():
        if name not in outputs:
            raise NotUnderstood(f"an output called {name}")
        if name.startswith("grad:"):
            yield from _gradient(name, record, outputs[name], dtype, name in zero)
        else:
            yield Check(name, output_error(record, outputs[name]), BARS[dtype])


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _in_strips(
    case: Case, dtype: torch.dtype, shape: tuple[int, ...], multiple: int, compute: Callable[[Strips, int], Tensor]
) -> Iterator[Check]:
    """The recorded "y" by strips of the smallest size and by one: compute(strips, image) gives (H, W, C)."""
    batch, _, height, width = shape
    with torch.no_grad():
        for label, tokens in (("y (strips)", 1), ("y (one strip)", height * width)):
            strips = Strips(height, width, multiple, tokens=tokens)
            y = torch.stack([compute(strips, i) for i in range(batch)])
            record = case["outputs"]["y"]
            y = _nchw(y) if len(record["shape"]) == 4 else y.flatten(1, 2)
            yield Check(label, output_error(record, y), BARS[dtype])


def _run_group(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    c = case["constructor"]
    names = {name for name, _, _ in case["state_dict"]}
    window = tuple(c.get("window", (4, 16)))
    attention = dict(
        window=window,
        mlp_ratio=c.get("mlp_ratio", 2.0),
        qkv_bias="residual_group.srwa_blocks.0.qkv.bias" in names,
        shift_mask=c.get("masked", c.get("shift_mask", False)),
    )
    group = Group(
        c["dim"], c["depth"], c["num_heads"], c.get("ffn_expansion_factor", 2.66), "conv.weight" in names, attention
    )
    group = _load(group, case, dtype)
    inputs = _inputs(case, dtype)
    x = _nhwc(inputs["x"])
    if folded:
        multiple = math.lcm(*window)
        yield from _in_strips(case, dtype, inputs["x"].shape, multiple, lambda s, i: _group(group, x[i], s))
        return
    inner = group.residual_group(x)
    yield from _module_case(case, dtype, group, inputs, {"y": _nchw(group(x)), "inner": _nchw(inner)})


def _run_fusion(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    c = case["constructor"]
    block = FusionBlock(c["dim"], c["num_heads"], c.get("ffn_expansion_factor", 2.66))
    block = _load(block, case, dtype)
    inputs = _inputs(case, dtype)
    low, high = _nhwc(inputs["low"]), _nhwc(inputs["high"])
    if folded:

        def compute(s: Strips, i: int) -> Tensor:
            return _fusion(block, low[i], _mixing_matrix(block, low[i], high[i], s), s)

        yield from _in_strips(case, dtype, inputs["low"].shape, 1, compute)
        return
    outputs = {"y": block(low, high)}
    if "attn" in case["outputs"]:  # the two layers on their own: attention after its norm, feed-forward of `low` itself
        outputs |= {"attn": block.attn(block.norm1(low), high), "ffn": block.ffn(low)}
    yield from _module_case(case, dtype, block, inputs, {n: _nchw(v) for n, v in outputs.items()})


def _run_channel_attention(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    if folded:
        raise NoSuchForm
    c = case["constructor"]
    module = _load(ChannelAttention(c["dim"], c["num_heads"]), case, dtype)
    inputs = _inputs(case, dtype)
    y = module(_nhwc(inputs["low"]), _nhwc(inputs["high"]))
    yield from _module_case(case, dtype, module, inputs, {"y": _nchw(y)})


def _run_feed_forward(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    if folded:
        raise NoSuchForm
    shapes = {name: shape for name, shape, _ in case["state_dict"]}
    dim, hidden = shapes["project_out.weight"][:2]
    module = _load(GatedFeedForward(dim, (hidden + 0.5) / dim), case, dtype)
    inputs = _inputs(case, dtype)
    yield from _module_case(case, dtype, module, inputs, {"y": _nchw(module(_nhwc(inputs["x"])))})


def _run_high_frequency(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    block = _load(HighFrequencyBlock(case["constructor"]["dim"]), case, dtype)
    inputs = _inputs(case, dtype)
    x = _nhwc(inputs["x"])
    if folded:
        yield from _in_strips(case, dtype, inputs["x"].shape, 1, lambda s, i: _high_frequency(block, x[i], s))
        return
    yield from _module_case(case, dtype, block, inputs, {"y": _nchw(block(x))})


def _run_attention_block(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    c = case["constructor"]
    names = {name for name, _, _ in case["state_dict"]}
    window = tuple(c.get("window", (4, 16)))
    block = RectangleAttentionBlock(
        c["dim"],
        c["num_heads"],
        window,
        any(c.get("shift", (0, 0))),
        c.get("mlp_ratio", 2.0),
        "qkv.bias" in names,
        c.get("masked", False),
    )
    block = _load(block, case, dtype)
    inputs = _inputs(case, dtype)
    x = inputs["x"].unflatten(1, (c["height"], c["width"]))
    if folded:
        shape = _nchw(x).shape
        yield from _in_strips(case, dtype, shape, math.lcm(*window), lambda s, i: attention_strips(block, x[i], s))
        return
    yield from _module_case(case, dtype, block, inputs, {"y": block(x).flatten(1, 2)})


class _Branch(nn.Module):
    """The window attention of one branch: q, k, v as tokens, position bias `pos`."""

    def __init__(self, dim: int, num_heads: int, window: tuple[int, int]):
        super().__init__()
        self.num_heads = num_heads
        self.pos = PositionBias(dim, num_heads, window)

    def forward(self, qkv: Tensor, height: int, width: int, shift: tuple[int, int], masked: bool) -> Tensor:
        windows = make_windows(height, width, self.pos.window, shift, masked, device=qkv.device, dtype=qkv.dtype)
        if any(shift):
            # the tokens come rolled already: only which of them the shift separates is left
            order = make_windows(height, width, self.pos.window, device=qkv.device)
            rolled = (
                (torch.arange(height * width).reshape(height, width)).roll((-shift[0], -shift[1]), (0, 1)).flatten()
            )
            place = torch.empty_like(rolled).scatter_(0, rolled, torch.arange(height * width))
            tokens = place[windows.order]
            inverse = torch.empty_like(tokens).scatter_(0, tokens, torch.arange(height * width))
            windows = windows._replace(order=tokens, inverse=inverse, area=order.area)
        bias = None if self.pos.inert else self.pos()
        return window_attention(qkv, windows, self.num_heads, bias).unflatten(1, (height, width))


def _run_window_attention(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    if folded:
        raise NoSuchForm
    c = case["constructor"]
    window = tuple(c["window"])
    masked = c.get("masked", False)
    shift = tuple(c.get("shift", (window[0] // 2, window[1] // 2))) if masked else (0, 0)
    module = _load(_Branch(c["dim"], c["num_heads"], window), case, dtype)
    inputs = _inputs(case, dtype)
    qkv = torch.cat([inputs[name] for name in "qkv"], dim=-1)
    y = module(qkv, c["height"], c["width"], shift, masked)
    yield from _module_case(case, dtype, module, inputs, {"y": y})


def _run_position_bias(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    if folded:
        raise NoSuchForm
    c = case["constructor"]
    shapes = {name: shape for name, shape, _ in case["state_dict"]}
    width = shapes["pos_proj.weight"][0]
    module = _load(PositionBias(16 * width, c["num_heads"], tuple(c["window"])), case, dtype)
    yield from _module_case(case, dtype, module, {}, {"table": module.table(), "bias": module()})


def _run_upsampler(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    if folded:
        raise NoSuchForm
    out, dim = next(shape[:2] for name, shape, _ in case["state_dict"] if name == "0.weight")
    scale = case["constructor"]["scale"]
    module = Craft(scale, in_chans=out // scale**2, embed_dim=dim, depths=(1,), dtype=dtype).upsample
    module = _load(module, case, dtype)
    inputs = _inputs(case, dtype)
    yield from _module_case(case, dtype, module, inputs, {"y": module(inputs["x"])})


# Metrics ------------------------------------------------------------------------------------------------------


def sr_data() -> Path | None:
    """The folder with Set5 and Set14: $ZOO_SR_DATA, or where this project's checkouts keep shared data."""
    import os

    root = Path(__file__).parents[2]
    for folder in (os.environ.get("ZOO_SR_DATA"), root / "../shared/data/sr", root / "shared/data/sr"):
        if folder and (Path(folder) / "Set5" / "HR").is_dir():
            return Path(folder)
    return None


def _run_metrics(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    """PSNR and SSIM of bicubic enlargement, for each picture of the sets and their means."""
    import re

    import numpy as np

    from zoo.images import read_image
    from zoo.imresize import imresize, to_uint8
    from zoo.train.sr_metrics import mean_scores, sr_scores

    if folded:
        raise NoSuchForm
    folder = sr_data()
    if folder is None:
        raise NoSuchForm  # the pictures may not be copied into this repository
    bars = {"psnr": 2e-3, "psnr_y": 2e-3, "ssim": 2e-5, "ssim_y": 2e-5}  # the file's tolerance_note
    numbers = np.float64 if dtype is torch.float64 else np.float32
    for key, recorded in case["sets"].items():
        name, scale = re.fullmatch(r"(\w+)x(\d)", key).groups()
        scores = {}
        for picture, expected in recorded["images"].items():
            high = np.asarray(read_image(folder / name / "HR" / f"{picture}.png"))
            low = np.asarray(read_image(folder / name / "LR_bicubic" / f"X{scale}" / f"{picture}x{scale}.png"))
            up = to_uint8(imresize(low.astype(numbers) / 255, int(scale)).clip(0, 1) * 255)
            scores[picture] = sr_scores(up, high, int(scale))
            for metric, bar in bars.items():
                yield Check(f"{key} {picture} {metric}", abs(scores[picture][metric] - expected[metric]), bar)
        for metric, value in mean_scores(list(scores.values())).items():
            yield Check(f"{key} mean {metric}", abs(value - recorded["mean"][metric]), bars[metric])
