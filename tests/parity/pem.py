"""Golden cases of the PEM repository: the segmenter, its head and parts, criterion, post-processing, counts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo
from tests.parity.golden import Case, fill_input, output_error, relative_error
from tests.parity.runner import BARS, GRADIENT_BAR, Check, NoSuchForm, NotUnderstood
from zoo.heads.pem.checkpoint import rename_head
from zoo.heads.pem.criterion import PemCriterion, Segments
from zoo.heads.pem.matcher import matching_costs
from zoo.heads.pem.model import Pem, PemHead, PemOutput
from zoo.heads.pem.pixel_decoder import DeformableLevel, PixelDecoder
from zoo.heads.pem.postprocess import (
    Geometry,
    Instances,
    find_instances,
    panoptic_map,
    semantic_map,
    semantic_scores,
)
from zoo.heads.pem.transformer_decoder import KeyProjection, PrototypeAttention, SelfAttention, TransformerDecoder
from zoo.heads.segmentation import create_segmenter

_ZERO = 1e-9  # below this a recorded gradient norm is rounding of a mathematically zero one


def claims(case: Case) -> bool:
    return "PEM@" in (case.get("source") or "")


def run(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    names = {name for name, *_ in case.get("state_dict") or ()}
    if "results" in case:
        yield from _macs(case, dtype, folded)
    elif "assignments" in case:
        yield from _criterion(case, dtype, folded)
    elif "settings" in case:
        yield from _postprocess(case, dtype, folded)
    elif any(name.startswith("backbone.") for name in names):
        yield from _segmenter(case, dtype, folded)
    elif any(name.startswith("predictor.") for name in names):
        yield from _head(case, dtype, folded)
    elif "query_feat.weight" in names:
        yield from _transformer_decoder(case, dtype, folded)
    elif any(name.startswith("in_projections.") for name in names):
        yield from _pixel_decoder(case, dtype, folded)
    elif "alpha" in names:
        yield from _cross_attention(case, dtype, folded)
    else:
        raise NotUnderstood(f"entries such as {', '.join(sorted(names)[:3])}")


# ---- networks


def _shapes(case: Case, prefix: str = "") -> dict[str, list[int]]:
    return {n.removeprefix(prefix): s for n, s, *_ in case["state_dict"] if n.startswith(prefix)}


def _decoder_options(case: Case, shapes: dict[str, list[int]]) -> dict:
    """Constructor arguments of the transformer decoder, from the shapes where they show it."""
    constructor = case["constructor"]
    numbers = [int(m[1]) for n in shapes if (m := re.match(r"transformer_ffn_layers\.(\d+)\.linear1\.weight", n))]
    queries = "query_feat.weight" if "query_feat.weight" in shapes else "static_query.weight"
    return dict(
        num_classes=shapes["class_embed.weight"][0] - 1,
        num_queries=shapes[queries][0],
        dim=shapes[queries][1],
        num_heads=constructor.get("num_heads", 8),
        mlp_dim=shapes["transformer_ffn_layers.0.linear1.weight"][0],
        depth=max(numbers) + 1,
        pre_norm=constructor.get("pre_norm", True),
    )


def _head_options(case: Case, prefix: str = "") -> dict:
    pixel = _shapes(case, f"{prefix}pixel_decoder.")
    return dict(
        conv_dim=pixel["out.conv.weight"][1],
        mask_dim=pixel["out.conv.weight"][0],
        **_decoder_options(case, _shapes(case, f"{prefix}predictor.")),
    )


def _channels(shapes: dict[str, list[int]]) -> list[int]:
    count = sum(re.fullmatch(r"in_projections\.\d+\.conv\.weight", n) is not None for n in shapes)
    return [shapes[f"in_projections.{i}.conv.weight"][1] for i in range(count)]


def _load(case: Case, model: nn.Module, dtype: torch.dtype, folded: bool) -> nn.Module:
    train = str(case.get("mode", "eval")).startswith("train")
    if folded and train:
        raise NoSuchForm
    model = model.to(dtype)
    zoo.load_checkpoint(model, {name: value.to(dtype) for name, value in case.weights().items()})
    model.train(train)
    return zoo.fold(model) if folded else model


def _inputs(case: Case, dtype: torch.dtype) -> list[Tensor]:
    return [fill_input(each["name"], each["shape"], case.seed).to(dtype) for each in case["input"]]


def _counts(case: Case, model: nn.Module) -> Iterator[Check]:
    parameters = list(model.parameters())
    counts = dict(params=parameters, trainable_params=[p for p in parameters if p.requires_grad])
    for name, counted in counts.items():
        if case.get(name) is not None:
            yield Check(name, abs(sum(p.numel() for p in counted) - case[name]), 0.0)


def _named_outputs(output: PemOutput) -> dict[str, Tensor]:
    named = dict(pred_logits=output.class_logits, pred_masks=output.mask_logits)
    for i, each in enumerate(output.auxiliary):
        named |= {f"aux{i}_pred_logits": each.class_logits, f"aux{i}_pred_masks": each.mask_logits}
    return named


def _compare(case: Case, outputs: dict[str, Tensor], dtype: torch.dtype, known: set[str] = frozenset()):
    for name, record in case["outputs"].items():
        if name in outputs:
            yield Check(name, output_error(record, outputs[name]), _bar(case, name, record, dtype))
        elif name not in known:
            raise NotUnderstood(f"an output called {name}")


def _bar(case: Case, name: str, record: dict, dtype: torch.dtype) -> float:
    """The project's bar, or in float32 twice the noise that the official code itself showed in that type."""
    noise = (case.get("robustness") or {}).get("diffs", {}).get("float32", {}).get(name, {}).get("max_abs_diff", 0.0)
    return max(BARS[dtype], 2 * noise / record["std"]) if dtype is torch.float32 else BARS[dtype]


def _segmenter(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    model = build_segmenter(case)
    if dtype is torch.float64 and not folded:
        yield from _counts(case, model)
    model = _load(case, model, dtype, folded)
    record = case["input"]
    image = case.input(record["name"], record["shape"]).to(dtype)
    with torch.no_grad():
        maps = model.backbone(image)
        outputs = {f"stage{i}": each for i, each in enumerate(maps)} | _named_outputs(model.head(maps, True))
        yield from _compare(case, outputs, dtype)
        yield from _short_form(model(image), outputs, dtype)


def _short_form(output: PemOutput, outputs: dict[str, Tensor], dtype: torch.dtype) -> Iterator[Check]:
    """Inference, which makes no auxiliary predictions, gives the same last one."""
    for name, value in _named_outputs(output).items():
        error = float((value - outputs[name]).abs().max() / outputs[name].std())
        yield Check(f"{name} without auxiliary", error, BARS[dtype])


def build_segmenter(case: Case, device: str | None = None) -> Pem:
    """The segmenter that the constructor and the entry shapes describe."""
    constructor = case["constructor"]
    shapes = _shapes(case, "backbone.")
    if "stem.conv1.weight" in shapes:
        depths = [max(int(n.split(".")[1]) for n in shapes if n.startswith(f"res{s}.")) + 1 for s in (2, 3, 4, 5)]
        names = {(3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101", (3, 8, 36, 3): "resnet152"}
        name, arguments = names.get(tuple(depths)), {}
        if "res2.0.conv3.weight" not in shapes:
            name = {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet34"}.get(tuple(depths))
        if name is None:
            raise NotUnderstood(f"a ResNet of depths {depths}")
    elif "features.0.conv.weight" in shapes:
        blocks = 1 + max(int(n.split(".")[1]) for n in shapes if n.startswith("features."))
        strided = [i for i in range(blocks) if f"features.{i}.avd_layer.0.weight" in shapes]
        depths = [b - a for a, b in zip(strided, [*strided[1:], blocks])]
        name, arguments = "stdc1", dict(depths=depths)
    else:
        raise NotUnderstood(f"a backbone with entries such as {', '.join(list(shapes)[:3])}")
    frozen = "FrozenBN" in str(constructor.get("backbone_norm"))
    head = _head_options(case, "sem_seg_head.")
    return create_segmenter("pem", name, backbone_args=arguments, freeze_norm=frozen, **head)


def _head(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    model = PemHead(_channels(_shapes(case, "pixel_decoder.")), **_head_options(case))
    exact = dtype is torch.float64 and not folded
    if exact:
        yield from _counts(case, model)
    model = _load(case, model, dtype, folded)
    maps = _inputs(case, dtype)
    with torch.set_grad_enabled(model.training):
        output = model(maps, auxiliary=True)
    outputs = _named_outputs(output)
    yield from _compare(case, outputs, dtype)
    if exact:
        for name, record in (case.get("running_stats_after_one_forward") or {}).items():
            yield Check(f"{name} after", output_error(record, model.get_buffer(rename_head(name))), BARS[dtype])
    if "grad_norms" in case:
        yield from _gradients(case, model, outputs, dtype)
    if not model.training:
        with torch.no_grad():
            short = model(maps)
        yield from _short_form(short, outputs, dtype)


def _gradients(case: Case, model: PemHead, outputs: dict[str, Tensor], dtype: torch.dtype) -> Iterator[Check]:
    total = 0.0
    for output, probe in (("pred_logits", "grad_logits"), ("pred_masks", "grad_masks")):
        value = outputs[output]
        weight = fill_input(probe, value.shape, case.seed).to(dtype)
        total = total + (value * weight).sum() / math.sqrt(value.numel())
    yield Check("grad_scalar_value", relative_error(float(total.detach()), case["grad_scalar_value"]), BARS[dtype])
    total.backward()
    parameters = dict(model.named_parameters())
    zero = {*(case.get("params_with_zero_grad") or ()), *(case.get("params_without_grad") or ())}
    for name, norm in case["grad_norms"].items():
        gradient = parameters[rename_head(name)].grad
        computed = 0.0 if gradient is None else float(gradient.norm())
        if norm < _ZERO or name in zero:  # a constant in front of a batch norm: no effect, only rounding
            yield Check(f"gradient {name}", computed, 1e-9 if dtype is torch.float64 else 1e-3)
        else:
            yield Check(f"gradient {name}", relative_error(computed, norm), GRADIENT_BAR)
    for name in case.get("params_without_grad") or ():
        yield Check(f"no gradient {name}", float(parameters[rename_head(name)].grad is not None), 0.0)


def _pixel_decoder(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    shapes = _shapes(case)
    mask_dim, dim = shapes["out.conv.weight"][:2]
    model = PixelDecoder(_channels(shapes), dim, mask_dim)
    if dtype is torch.float64 and not folded:
        yield from _counts(case, model)
    model = _load(case, model, dtype, folded)
    with torch.no_grad():
        mask_features, levels = model(_inputs(case, dtype))
    outputs = {"mask_features": mask_features}
    outputs |= {f"level{i}_stride{2 ** (len(levels) + 2 - i)}": level for i, level in enumerate(levels)}
    yield from _compare(case, outputs, dtype)


def _transformer_decoder(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    shapes = _shapes(case)
    mask_features, *levels = _inputs(case, dtype)
    options = _decoder_options(case, shapes)
    model = TransformerDecoder(
        levels[0].shape[1], mask_features.shape[1], num_levels=shapes["level_embed.weight"][0], **options
    )
    if dtype is torch.float64 and not folded:
        yield from _counts(case, model)
    model = _load(case, model, dtype, folded)
    stats: list[dict] = []
    hooks = [
        layer.cross_attn.register_forward_pre_hook(lambda _m, args: stats.append(_mask_statistics(args[3])))
        for layer in model.layers
    ]
    with torch.no_grad():
        last, earlier = model(mask_features, levels, auxiliary=True)
    for hook in hooks:
        hook.remove()
    outputs = _named_outputs(PemOutput(*last, earlier))
    yield from _compare(case, outputs, dtype)
    if dtype is torch.float64:
        for recorded, measured in zip(case.get("decoder_layer_stats") or (), stats, strict=False):
            for name, value in measured.items():
                yield Check(f"layer {recorded['layer']} {name}", abs(value - recorded[name]), 1e-12)
    with torch.no_grad():
        last, earlier = model(mask_features, levels)
    yield from _short_form(PemOutput(*last, earlier), outputs, dtype)


def _mask_statistics(allowed: Tensor) -> dict[str, float]:
    query_full = ~allowed.any(-1)
    return dict(
        tokens=allowed.shape[-1],
        fully_masked_queries=int(query_full.sum()),
        images_with_every_query_masked=int(query_full.all(-1).sum()),
        masked_fraction=1 - float(allowed.double().mean()),
    )


def _cross_attention(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    constructor = case["constructor"]
    model = PrototypeAttention(constructor["d_model"], constructor["num_heads"])
    if dtype is torch.float64 and not folded:
        yield from _counts(case, model)
    model = _load(case, model, dtype, folded)
    values = {each["name"]: each for each in case["input"]}
    values = {name: fill_input(name, each["shape"], case.seed) for name, each in values.items()}
    mask = _edit_mask(values["memory_mask"], case.get("input_note") or "")
    t, query_pos = (values[name].transpose(0, 1).to(dtype) for name in ("tgt", "query_pos"))
    allowed = mask.flatten(2) >= 0
    with torch.set_grad_enabled(model.training):
        keys = model.keys((values["memory"] + values["pos"]).to(dtype))
        _, index = model.select(t, query_pos, keys, allowed)
        outputs = {"out": model(t, query_pos, keys, allowed).transpose(0, 1)}
    yield from _compare(case, outputs, dtype, {"selected_token"})
    if "selected_token" in case["outputs"]:
        recorded = torch.tensor(case["outputs"]["selected_token"]["values"])
        chosen = index.transpose(1, 2).reshape(-1)[: len(recorded)]
        # nearly equal similarities may be ordered differently in float32: the output above is the judge there
        wrong = float((chosen != recorded.reshape(-1)).sum())
        yield Check("selected_token", wrong, 0.0 if dtype is torch.float64 else 0.01 * len(recorded))


def _edit_mask(mask: Tensor, note: str) -> Tensor:
    """`memory_mask` after the edits that the note lists: images or single queries made negative or positive."""
    edits = note.partition(":")[2]
    mask = mask.clone()
    for edit in edits.split(";"):
        found = re.match(r"\s*image (\d+)(?: quer(?:y|ies) ([\d, and]+?))?\s*<-\s*(.*)", edit)
        if found is None:
            if "not edited" not in edit and edit.strip():
                raise NotUnderstood(f"the edit {edit.strip()!r} of memory_mask")
            continue
        image = int(found[1])
        queries = [int(q) for q in re.findall(r"\d+", found[2] or "")] or list(range(mask.shape[1]))
        rule = found[3].replace(" ", "")
        for query in queries:
            absolute = mask[image, query].abs()
            if rule.startswith("-(|x|+"):
                mask[image, query] = -(absolute + float(re.match(r"-\(\|x\|\+([\d.]+)\)", rule)[1]))
            elif rule.startswith("-|x|"):
                mask[image, query] = -absolute
            elif rule.startswith("|x|"):
                mask[image, query] = absolute
            else:
                raise NotUnderstood(f"the edit {edit.strip()!r} of memory_mask")
    return mask


# ---- counts


def _macs(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    """fvcore's counts of the official network for several backbones, class counts and image sizes."""
    if folded or dtype is not torch.float64:
        raise NoSuchForm
    classes = {"ade20k": 150, "cityscapes": 19}
    backbones = {"r50": "resnet50", "r101": "resnet101", "stdc1": "stdc1", "stdc2": "stdc2"}
    for name, record in case["results"].items():
        backbone, dataset, size = name.split("_")[:3]
        height, width = map(int, size.split("x"))
        counted = count_macs(backbones[backbone], classes[dataset], height, width)
        for key in ("total", "backbone", "pixel_decoder", "transformer_decoder", "deform_conv"):
            if key in record:
                yield Check(f"macs {name} {key}", abs(counted[key] - record[key]), 0.0)
        for key, value in (record.get("by_op") or {}).items():
            yield Check(f"macs {name} {key}", abs(counted["by_op"].get(key, 0) - value), 0.0)


def count_macs(backbone: str, num_classes: int, height: int, width: int) -> dict:
    """Multiply-adds of one image by fvcore's rules on the official code.

    One each for convolutions, linear layers, matrix products; deformable convolution as a convolution; batch norms
    count 2 an element, layer norms 5, bilinear resizing 4 an output; einsums through numpy's report of four digits.
    The official code computes seven class heads and seven full-size masks, six of which are resized.
    """
    model = create_segmenter("pem", backbone, num_classes).eval().to("meta")
    image = torch.empty(1, 3, height, width, device="meta")
    counts: dict[tuple[str, str], float] = {}

    def add(part: str, op: str, value: float) -> None:
        counts[part, op] = counts.get((part, op), 0) + value

    def hook(part: str):
        def count(module: nn.Module, args: tuple, output: Tensor) -> None:
            if isinstance(module, nn.ConvTranspose2d):
                add(part, "conv", module.weight.numel() * args[0].shape[-2:].numel())
            elif isinstance(module, nn.Conv2d):
                add(part, "conv", module.weight.numel() * output.shape[-2:].numel())
            elif isinstance(module, nn.Linear):
                add(part, "linear", output.numel() * module.in_features)
            elif isinstance(module, nn.LayerNorm):
                add(part, "layer_norm", 5 * output.numel())
            elif isinstance(module, nn.BatchNorm2d):
                add(part, "batch_norm", 2 * output.numel())
            elif isinstance(module, DeformableLevel):
                add(part, "deform_conv2d", module.conv.weight.numel() * args[0].shape[-2:].numel())
            elif isinstance(module, SelfAttention):
                queries, dim = args[0].shape[1:]
                add(part, "linear", 3 * queries * dim * dim)
                add(part, "bmm", 2 * queries * queries * dim)
            elif isinstance(module, KeyProjection):
                queries, tokens, dim = model.head.decoder.num_queries, *output.shape[1:]
                add(part, "einsum", _numpy_einsum(queries * tokens * dim))
                add(part, "upsample_bilinear2d", 4 * queries * tokens)

        return count

    parts = dict(
        backbone=model.backbone, pixel_decoder=model.head.pixel_decoder, transformer_decoder=model.head.decoder
    )
    for part, module in parts.items():
        for each in module.modules():
            each.register_forward_hook(hook(part))
    with torch.no_grad():
        output = model(image, auxiliary=True)
    masks = output.mask_logits
    mask_dim = model.head.pixel_decoder.out.conv.out_channels
    for _ in range(1 + len(output.auxiliary)):
        add("transformer_decoder", "einsum", _numpy_einsum(masks.numel() * mask_dim))
    by_op: dict[str, float] = {}
    result: dict = dict.fromkeys(parts, 0)
    for (part, op), value in counts.items():
        by_op[op] = by_op.get(op, 0) + value
        result[part] += value
    return result | dict(total=sum(counts.values()), deform_conv=by_op["deform_conv2d"], by_op=by_op)


def _numpy_einsum(macs: int) -> float:
    return float(f"{2 * macs:.3e}") / 2


# ---- criterion and post-processing


def _criterion(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    if folded:
        raise NoSuchForm
    constructor, inputs = case["constructor"], case["inputs"]
    bar = BARS[torch.float32] if case.get("compute_dtype") == "float32" else BARS[dtype]
    criterion = _build_criterion(case)
    leaves = _predictions(case, dtype)
    last, auxiliary = leaves[0], leaves[1:]
    targets = [_segments(each, inputs["target_size"]) for each in inputs["targets"]]
    matched = _record(criterion, "match")
    losses = criterion.losses(PemOutput(*last, auxiliary), targets)
    for name, value in case["losses_unweighted"].items():
        yield Check(name, relative_error(float(losses[name].detach()), value), bar)
    criterion.draw = _official_draws(case)
    weighted = criterion(PemOutput(*last, auxiliary), targets)
    for name, value in case["losses_weighted"].items():
        yield Check(f"weighted {name}", relative_error(float(weighted[name].detach()), value), bar)
    if set(weighted) != set(case["losses_weighted"]) or constructor["aux_layers"] != len(auxiliary):
        raise NotUnderstood(f"losses {', '.join(weighted)}")
    total = sum(weighted.values())
    yield Check("total_weighted", relative_error(float(total.detach()), case["total_weighted"]), bar)
    for name, images in case["assignments"].items():
        chosen = matched[0][0 if name == "last" else 1 + int(name.removeprefix("aux"))]
        wrong = sum(
            sorted(zip(queries.tolist(), segments.tolist())) != sorted(zip(image["pred"], image["target"]))
            for (queries, segments), image in zip(chosen, images, strict=True)
        )
        yield Check(f"assignment {name}", float(wrong), 0.0)
    yield from _costs(case, criterion, last, targets, bar)
    total.backward()
    for name, leaf in zip(("pred_logits", "pred_masks"), last, strict=True):
        if name in case["grads"]:
            yield Check(f"gradient {name}", output_error(case["grads"][name], leaf.grad), GRADIENT_BAR)


def _build_criterion(case: Case) -> PemCriterion:
    constructor = case["constructor"]
    weights = constructor["weights"]
    same = ("num_classes", "cost_class", "cost_mask", "cost_dice", "no_object_weight", "num_points")
    return PemCriterion(
        **{name: constructor[name] for name in same},
        oversample_ratio=constructor["oversample_ratio"],
        importance_sample_ratio=constructor["importance_sample_ratio"],
        weight_class=weights["loss_ce"],
        weight_mask=weights["loss_mask"],
        weight_dice=weights["loss_dice"],
        draw=_official_draws(case),
    )


def _official_draws(case: Case):
    """The k-th uniform draw of the record, rounded to float32; its shape must be the one asked for."""
    calls = iter(case["random_draws"]["calls"])

    def draw(shape: tuple[int, ...], device=None) -> Tensor:
        call = next(calls)
        assert list(shape) == call["shape"], f"{call['name']} has shape {call['shape']}, asked for {list(shape)}"
        normal = fill_input(call["name"], shape, case.seed)
        return torch.special.ndtr(normal).float()

    return draw


def _predictions(case: Case, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    inputs = case["inputs"]
    B, Q, K = (inputs[name] for name in "BQK")
    scales = {name: float(re.match(r"([\d.]+)\s*\*", inputs[name])[1]) for name in ("pred_logits", "pred_masks")}
    shapes = dict(pred_logits=(B, Q, K + 1), pred_masks=(B, Q, *inputs["mask_size"]))
    pairs = []
    for prefix in ("", *(f"aux{i}_" for i in range(case["constructor"]["aux_layers"]))):
        values = (scales[name] * fill_input(prefix + name, shape, case.seed) for name, shape in shapes.items())
        pairs.append(tuple(value.to(dtype).requires_grad_() for value in values))
    return pairs


def _segments(target: dict, size: list[int]) -> Segments:
    masks = torch.zeros(len(target["labels"]), *size, dtype=torch.bool)
    for mask, (y0, x0, y1, x1) in zip(masks, target["rectangles_y0x0y1x1_half_open"], strict=True):
        mask[y0:y1, x0:x1] = True
    return Segments(torch.tensor(target["labels"], dtype=torch.long), masks)


def _record(module: nn.Module, method: str) -> list:
    """Results of every later call of a method."""
    results: list = []
    original = getattr(module, method)

    def call(*args):
        results.append(original(*args))
        return results[-1]

    setattr(module, method, call)
    return results


def _costs(case: Case, criterion: PemCriterion, last, targets: list[Segments], bar: float) -> Iterator[Check]:
    draw = _official_draws(case)
    points = [draw((1, criterion.num_points, 2))[0].to(last[1].dtype) for _ in targets]
    for record in case["last_layer_cost_matrices"]:
        image = record["image"]
        labels, masks = targets[image]
        logits = (each[image].detach() for each in last)
        costs = matching_costs(*logits, labels, masks.to(last[1].dtype), points[image], **criterion.costs)
        assert list(costs.shape) == record["shape"]
        recorded = torch.tensor(record["values"], dtype=torch.float64).reshape(costs.shape)
        # recorded with six decimals
        error = float((costs.double() - recorded).abs().max()) if recorded.numel() else 0.0
        yield Check(f"costs of image {image}", error, bar)


def _postprocess(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    if folded:
        raise NoSuchForm
    settings, inputs = case["settings"], case["inputs"]
    logits, masks = _described_input(case, "pred_logits").to(dtype), _described_input(case, "pred_masks").to(dtype)
    sizes = ("padded_image_size", "image_size_before_padding", "output_size")
    geometry = Geometry(*(tuple(inputs[name]) for name in sizes))
    bar = BARS[dtype]
    # pixels whose two best values differ by less than rounding may go either way in float32
    spare = 0.0 if dtype is torch.float64 else 2e-3 * math.prod(geometry.output)

    scores = semantic_scores(logits, masks, geometry, settings["semantic_resized_before_inference"])
    yield Check("semantic scores", output_error(case["semantic"]["scores"], scores), bar)
    labels = semantic_map(logits, masks, geometry, settings["semantic_resized_before_inference"])
    expected = _run_length_map(case["semantic"]["argmax_rle"], geometry.output)
    yield Check("semantic argmax", float((labels != expected).sum()), spare)

    things = settings["thing_classes"]
    thresholds = settings["object_mask_threshold"], settings["overlap_threshold"]
    found = panoptic_map(logits, masks, geometry, things, *thresholds)
    expected = _run_length_map(case["panoptic"]["panoptic_rle"], geometry.output)
    yield Check("panoptic map", float((found.ids != expected).sum()), spare)
    segments = [dict(id=s.id, isthing=s.is_thing, category_id=s.label) for s in found.segments]
    recorded = [dict(s, isthing=bool(s["isthing"])) for s in case["panoptic"]["segments_info"]]
    recorded = [{name: s[name] for name in ("id", "isthing", "category_id")} for s in recorded]
    yield Check("panoptic segments", float(segments != recorded), 0.0)

    classes = things if settings["panoptic_on"] else None
    yield from _instances(case, find_instances(logits, masks, geometry, settings["topk_per_image"], classes), dtype)


def _instances(case: Case, found: Instances, dtype: torch.dtype) -> Iterator[Check]:
    recorded = case["instance"]["detections"]
    yield Check("instances", abs(len(found.scores) - len(recorded)), 0.0)
    exact = dtype is torch.float64
    errors = dict.fromkeys(("score", "class", "area", "mask_row_sums_checksum", "mask_col_sums_checksum"), 0.0)
    for i, detection in enumerate(recorded):
        mask = torch.from_numpy(found.mask(i)).double()
        rows, columns = mask.sum(1), mask.sum(0)
        measured = {
            "score": float(found.scores[i]),
            "class": int(found.labels[i]),
            "area": int(found.areas[i]),
            "mask_row_sums_checksum": float((rows * torch.arange(1, len(rows) + 1)).sum()),
            "mask_col_sums_checksum": float((columns * torch.arange(1, len(columns) + 1)).sum()),
        }
        for name, value in measured.items():
            errors[name] = max(errors[name], relative_error(value, detection[name]))
    for name, error in errors.items():
        pixels = 0.0 if exact or name == "class" else 2e-3  # a pixel at the threshold may flip in float32
        yield Check(f"instance {name}", error, BARS[dtype] if name == "score" else pixels)


def _described_input(case: Case, name: str) -> Tensor:
    """An input from its sentence: factor, name, shape, and an upsampling."""
    text = case["inputs"][name]
    made = re.search(r'fill_input\("(\w+)",\s*\(([\d,\s]+)\)\)', text)
    shape = [int(n) for n in made[2].split(",") if n.strip()]
    value = float(re.match(r"\s*([\d.]+)\s*\*", text)[1]) * fill_input(made[1], shape, case.seed)
    factor = re.search(r"bilinear x(\d+) upsampling", text)
    if factor:
        value = F.interpolate(value, scale_factor=int(factor[1]), mode="bilinear", align_corners=False)
    return value[0]


def _run_length_map(runs: list[list[int]], size: tuple[int, int]) -> Tensor:
    values, lengths = torch.tensor(runs).T
    return values.repeat_interleave(lengths).view(size)
