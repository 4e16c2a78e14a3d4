"""Golden cases of CRATE, its demonstration models, CRATE-alpha and CRATE-MAE, and of their operators."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo
from tests.parity.golden import Case, fill_input, output_error, relative_error
from tests.parity.runner import BARS, GRADIENT_BAR, Check, NoSuchForm, NotUnderstood
from zoo.checkpoint import find_converter
from zoo.crate import Crate, learning_rate_factor
from zoo.crate_blocks import CrateAlphaBlock, Ista, Mssa, Odl, sincos_pos_embed
from zoo.crate_mae import CrateMae
from zoo.kernels.tied_attention import tied_attention
from zoo.whitebox import attention_maps, coding_rate, layer_statistics, pca, shared_projection

REPOSITORIES = ("Ma-Lab-Berkeley/CRATE", "LeslieTrue/crate-emergence-notebooks", "UCSC-VLAA/CRATE-alpha")
POOLS = {"cls": "token", "mean": "avg"}


def claims(case: Case) -> bool:
    by_name = case.path.parent.name == "crate" or case.path.stem == "op_pca"  # which names no source
    return str(case.get("source", "")).startswith(REPOSITORIES) or by_name


def run(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    what = case.get("what", "")
    if "constructor" in case:
        runner = _run_mae if "embed_dim" in case["constructor"] else _run_classifier
        yield from runner(case, dtype, folded)
        return
    known = {
        "ISTA module": _run_ista,
        "MSSA": _run_mssa,
        "bare tied attention": _run_tied_attention,
        "CRATE-alpha ODL": _run_odl,
        "CodingRate": _run_coding_rate,
        "PCA": _run_pca,
        "decoder_pos_embed": _run_table,
        "lr multiplier": _run_schedule,
        "parameter and matmul-MAC counts": _run_counts,
    }
    for start, operator in known.items():
        if what.startswith(start):
            if folded and operator is not _run_ista:
                raise NoSuchForm
            yield from operator(case, dtype, folded)
            return
    raise NotUnderstood(what)


# Whole models -------------------------------------------------------------------------------------------------


def build(case: Case) -> Crate:
    """The classifier that the official constructor describes."""
    c = case["constructor"]
    shapes = {name: shape for name, shape, _ in case["state_dict"]}
    alpha = any(name.endswith(".1.fn.D1") for name in shapes)
    built, given = _pair(c.get("image_size", 224)), tuple(case["input"]["shape"][-2:])
    inner = next(s for n, s in shapes.items() if n.endswith("qkv.weight"))[0]
    options = dict(step_size=c.get("ista", c.get("step_size", 0.1)), lambd=c.get("lambd", c.get("lambda", 0.1)))
    if alpha:
        options |= dict(block_fn=CrateAlphaBlock, patch_norm=False, norm_eps=1e-6)
    if built != given or case.get(
        "hr_shape"
    ):  # the official CRATE takes the first rows of its table, the notebooks interpolate
        notebook = str(case.get("source")).startswith("LeslieTrue")
        options |= dict(dynamic_img_size=True, pos_mode="offset" if notebook else "prefix")
    return Crate(
        img_size=built,
        patch_size=c.get("patch_size", 16),
        in_chans=c.get("channels", 3),
        num_classes=c.get("num_classes", 1000),
        global_pool=POOLS[c.get("pool", "cls")],
        embed_dim=c["dim"],
        depth=c["depth"],
        num_heads=c["heads"],
        head_dim=inner // c["heads"],
        **options,
    )


def _pair(size) -> tuple[int, int]:
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)


def _run_classifier(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    model = build(case).to(dtype)
    state = {name: value.to(dtype) for name, value in case.weights().items()}
    exact = dtype is torch.float64 and not folded
    if exact:
        yield from _params(case, model)
        if "macs" in case:
            yield Check("macs", abs(classifier_macs(model, case["input"]["shape"]) - case["macs"]), 0)
    zoo.load_checkpoint(model, state)
    gradients = "grad_l2_norm" in case or "loss" in case
    model.train(case.get("mode") == "train")
    if folded:
        if model.training:
            raise NoSuchForm
        model = zoo.fold(model)
    image = case.input().to(dtype)
    recorded = _Recorder()
    with recorded, torch.set_grad_enabled(gradients and not folded):
        image.requires_grad_(gradients and not folded)
        recorded.tokens("patch_embed", model.patch_embed)
        for i, block in enumerate(model.blocks):
            recorded.tokens(f"mssa{i}", block.attn)
            recorded.tokens(f"layer{i}", block)
            recorded.tokens(f"odl{i}", getattr(block, "odl", None))
        recorded.tokens("tokens", model)
        features = model.forward_features(image)
        pooled = features[:, 0] if model.global_pool == "token" else features.mean(dim=1)
        logits = model.forward_head(features)
    outputs = recorded.outputs | {
        "logits": logits,
        "pre_head_cls": features[:, 0],
        "pre_head": pooled,
        "pooled": pooled,
        "tokens": features,
    }
    with torch.no_grad():
        outputs |= _attention_outputs(case, model, dtype)
    if gradients and not folded:
        yield from _gradients(case, model, state, logits, image, outputs, dtype)
    yield from _compare(case, outputs, dtype)
    last = features.detach()
    if "fraction_zero_last_layer" in case:
        share = float((last == 0).double().mean())
        bar = 1e-12 if dtype is torch.float64 else 1e-4  # an entry at the threshold falls either way in float32
        yield Check("fraction_zero_last_layer", abs(share - case["fraction_zero_last_layer"]), bar)
    if "coding_rate_mean" in case:
        yield from _diagnostics(case, model, image.detach(), dtype)


class _Recorder(ExitStack):
    """Keeps the outputs of hooked modules while it is open."""

    def __init__(self):
        super().__init__()
        self.outputs: dict[str, Tensor] = {}

    def tokens(self, name: str, module: nn.Module | None) -> None:
        if module is not None:
            handle = module.register_forward_hook(lambda *call: self.outputs.__setitem__(name, call[-1]))
            self.callback(handle.remove)


def _attention_outputs(case: Case, model: Crate, dtype: torch.dtype) -> dict[str, Tensor]:
    """Attention and shared projections of an unmasked image, of the case's own size or of `hr_shape`."""
    outputs = {}
    for name in case["outputs"]:
        match = re.fullmatch(
            r"(?:self)?attention_(?:enc_)?layer(\d+)(_hr.*)?|(?:last_)?key_(?:enc_)?layer(\d+)(_hr.*)?", name
        )
        if match is None:
            continue
        large = match[2] or match[4]
        image = fill_input("image_hr", case["hr_shape"], case.seed) if large else case.input()
        h, w = (size - size % p for size, p in zip(image.shape[-2:], model.patch_embed.patch_size))
        image = image[..., :h, :w]  # as the notebooks crop
        if match[1]:
            outputs[name] = attention_maps(model, image.to(dtype), int(match[1]))
        else:
            outputs[name] = shared_projection(model, image.to(dtype), int(match[3]))
    return outputs


def _compare(case: Case, outputs: dict[str, Tensor], dtype: torch.dtype) -> Iterator[Check]:
    for name, record in case["outputs"].items():
        if name not in outputs:
            raise NotUnderstood(f"an output called {name}")
        bar = BARS[dtype]
        if "attention_" in name and dtype is torch.float32:
            # entries are exponentials: in float32 the reference's own order of operations is 7e-4 of the std
            # away from float64 (CRATE-MAE-T, layer 10)
            bar = 2e-3
        yield Check(name, output_error(record, outputs[name]), bar)


def _params(case: Case, model: nn.Module) -> Iterator[Check]:
    """Counts of the official module: zoo's parameters, tables that are constants here, entries left out."""
    own = sum(p.numel() for p in model.parameters())
    shapes = {name: math.prod(shape) for name, shape, _ in case["state_dict"]}
    unread = sum(n for name, n in shapes.items() if name.startswith("decoder_embed."))
    tables = sum(n for name, n in shapes.items() if name in ("pos_embed", "decoder_pos_embed"))
    if "params" in case:
        yield Check("params", abs(own + unread + tables - case["params"]), 0)
    if "trainable_params" in case:
        yield Check("trainable_params", abs(own + unread - case["trainable_params"]), 0)


def _layer_macs(n: int, d: int, inner: int, sparse: int) -> int:
    """Shared projection and output map, the two products of attention, and those of the sparse step."""
    return 2 * n * d * inner + 2 * n * n * inner + sparse


def classifier_macs(model: Crate, shape: list[int]) -> int:
    """Multiply-adds of the matrix products of the official graph: ISTA with 3 products, ODL with 4 wide ones."""
    rows, columns = model.patch_embed.dynamic_feat_size(tuple(shape[-2:]))
    patches, d = rows * columns, model.embed_dim
    n = patches + 1
    total = patches * math.prod(model.patch_embed.patch_size) * model.in_chans * d + d * model.num_classes
    for block in model.blocks:
        ratio = block.odl.dictionary.shape[1] // d if hasattr(block, "odl") else 0
        sparse = 4 * n * d * d * ratio if ratio else 3 * n * d * d
        total += _layer_macs(n, d, block.attn.num_heads * block.attn.head_dim, sparse)
    return total * shape[0]


def _gradients(case, model, state, logits, image, outputs, dtype) -> Iterator[Check]:
    """Loss, and gradients under the official names: pulled back through the translation of the weights."""
    if "label smoothing" not in case["loss"] and "cross entropy" not in case["loss"]:
        raise NotUnderstood(f"a loss of {case['loss']}")
    smoothing = re.search(r"smoothing ([\d.]+)", case["loss"])
    targets = torch.tensor(case["targets"])
    loss = F.cross_entropy(logits, targets, label_smoothing=float(smoothing[1]) if smoothing else 0.0)
    loss.backward()
    bar = BARS[dtype]
    yield Check("loss_value", relative_error(float(loss.detach()), case["loss_value"]), bar)
    outputs["d_image"] = image.grad
    yield from _parameter_gradients(case, model, state, dtype)


def _parameter_gradients(case: Case, model: nn.Module, state: dict[str, Tensor], dtype) -> Iterator[Check]:
    official = _official_gradients(model, state)
    bar = 1e-8 if dtype is torch.float64 else GRADIENT_BAR
    for name, norm in case.get("grad_l2_norm", {}).items():
        yield Check(f"|d {name}|", relative_error(float(official[name].norm()), norm), bar)
    for name, expected in case.get("grad_probe0", {}).items():
        gradient = official[name].double().flatten()
        probe = fill_input("probe0", gradient.shape, 0)
        error = abs(float(gradient @ probe) / math.sqrt(gradient.numel()) - expected)
        scale = case["grad_l2_norm"][name] / math.sqrt(gradient.numel()) or 1.0  # that of a random projection
        yield Check(f"probe {name}", error / scale, 1e-7 if dtype is torch.float64 else 1e-3)


def _official_gradients(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
    converted = find_converter(model)(leaves, model).state_dict
    parameters = dict(model.named_parameters())
    pulled = sum((converted[n] * p.grad).sum() for n, p in parameters.items() if n in converted and p.grad is not None)
    gradients = torch.autograd.grad(pulled, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, gradients))


def _float64(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _diagnostics(case: Case, model: Crate, image: Tensor, dtype: torch.dtype) -> Iterator[Check]:
    rate, zeros = layer_statistics(model, image, case["eps"])
    loose = dtype is torch.float32
    recorded = _float64(case["coding_rate_per_image"])
    bar = 1e-4 if loose else 1e-9
    yield Check("coding_rate_per_image", float(((rate - recorded) / recorded).abs().max()), bar)
    mean, std = _float64(case["coding_rate_mean"]), _float64(case["coding_rate_std"])
    yield Check("coding_rate_mean", float(((rate.mean(1) - mean) / mean).abs().max()), bar)
    yield Check("coding_rate_std", float((rate.std(1) - std).abs().max()), 1e-2 if loose else 1e-6)
    mean = _float64(case["sparsity_zero_fraction_mean"])
    std = _float64(case["sparsity_zero_fraction_std"])
    bar = 1e-4 if loose else 1e-12
    yield Check("sparsity_zero_fraction_mean", float((zeros.mean(1) - mean).abs().max()), bar)
    yield Check("sparsity_zero_fraction_std", float((zeros.std(1, correction=0) - std).abs().max()), bar)


# CRATE-MAE ----------------------------------------------------------------------------------------------------


def build_mae(case: Case) -> CrateMae:
    """The autoencoder that the official constructor describes."""
    c = case["constructor"]
    inner = next(s for n, s, _ in case["state_dict"] if n.endswith("qkv.weight"))[0]
    encoder = Crate(
        img_size=_pair(c.get("img_size", 224)),
        patch_size=c.get("patch_size", 16),
        in_chans=c.get("in_chans", 3),
        num_classes=0,
        embed_dim=c["embed_dim"],
        depth=c["depth"],
        num_heads=c["num_heads"],
        head_dim=inner // c["num_heads"],
        step_size=c.get("step_size", 0.1),
        lambd=c.get("lambd_encoder", 0.5),
        norm_eps=c.get("norm_eps_blocks", 1e-5),
        head_norm_eps=c.get("norm_eps_final", 1e-6),
        patch_norm=False,
        final_norm=True,
        weight_init="mae",
        dynamic_img_size=True,
        pos_mode="offset",
    )
    return CrateMae(
        encoder,
        decoder_depth=c.get("decoder_depth"),
        decoder_num_heads=c.get("decoder_num_heads"),
        norm_pix_loss=c.get("norm_pix_loss", False),
        final_norm_eps=c.get("norm_eps_final", 1e-6),
    )


def _run_mae(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    model = build_mae(case).to(dtype)
    state = {name: value.to(dtype) for name, value in case.weights().items()}
    if dtype is torch.float64 and not folded:
        yield from _params(case, model)
        if "macs" in case:
            yield Check("macs", abs(mae_macs(model, case["input"]["shape"]) - case["macs"]), 0)
    zoo.load_checkpoint(model, state)
    model.train(case.get("mode") == "train")
    if folded:
        if model.training:
            raise NoSuchForm
        model = zoo.fold(model)
    image = case.input().to(dtype)
    grid = model.encoder.patch_embed.dynamic_feat_size(tuple(image.shape[-2:]))
    noise = fill_input("mask_noise", (image.shape[0], grid[0] * grid[1]), case.seed)
    recorded = _Recorder()
    gradients = "grad_l2_norm" in case and not folded
    image.requires_grad_(gradients)
    with recorded, torch.set_grad_enabled(gradients):
        for i, block in enumerate(model.encoder.blocks):
            recorded.tokens(f"enc{i}", block)
        for i, block in enumerate(model.decoder.blocks):
            recorded.tokens(f"dec{i}", block)
        recorded.tokens("latent", model.encoder.norm)
        loss, pred, mask = model(image, case.get("mask_ratio", 0.75), noise)
    outputs = recorded.outputs | {"loss": loss.reshape(1), "pred": pred, "mask": mask}
    if gradients:
        loss.backward()
        outputs["d_image"] = image.grad
        yield from _parameter_gradients(case, model, state, dtype)
    with torch.no_grad():
        outputs |= _attention_outputs(case, model.encoder, dtype)
    yield from _compare(case, outputs, dtype)
    if "ids_restore_first_row" in case:
        rank = noise[0].argsort().argsort()
        yield Check("ids_restore", float((rank - torch.tensor(case["ids_restore_first_row"])).abs().max()), 0)


def mae_macs(model: CrateMae, shape: list[int]) -> int:
    """Multiply-adds of the matrix products of the official masked forward pass, of all images."""
    encoder = model.encoder
    d = encoder.embed_dim
    rows, columns = encoder.patch_embed.dynamic_feat_size(tuple(shape[-2:]))
    n = rows * columns + 1
    total = classifier_macs(encoder, [1, *shape[1:]])
    for block in model.decoder.blocks:
        total += _layer_macs(n, d, block.attn.num_heads * block.attn.head_dim, n * d * d)
    return (total + n * model.decoder.pred.weight.numel()) * shape[0]


def _run_table(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    side = math.isqrt(case["shape"][1] - 1)
    table = sincos_pos_embed((side, side), case["shape"][2])
    bar = 1e-6  # the record is of float32 numbers, whose last bit may depend on the CPU's sine
    yield Check("decoder_pos_embed", output_error(case["outputs"]["decoder_pos_embed"], table), bar)
    for key, row in case.items():
        if match := re.fullmatch(r"row(\d+)", key):
            error = (table[0, int(match[1])].double() - torch.tensor(row, dtype=torch.float64)).abs().max()
            yield Check(key, float(error), bar)


# Operators ----------------------------------------------------------------------------------------------------


def _operator(case: Case, module: nn.Module, dtype: torch.dtype, official: Callable[[str], str]) -> Iterator[Check]:
    """Output and gradients of a module with weights under official names, for the loss sum(out * grad_out)."""
    names = {official(name): name for name, _, _ in case["state_dict"]}
    state = {name: value.to(dtype) for name, value in case.weights().items()}
    module = module.to(dtype)
    module.load_state_dict({ours: state[name] for ours, name in names.items()})
    module.zero_grad()
    x = case.input().to(dtype).requires_grad_()
    out = module(x)
    out.backward(fill_input("grad_out", out.shape, case.seed).to(dtype))
    outputs = {"out": out, "dx": x.grad} | {f"d_{names[n]}": p.grad for n, p in module.named_parameters()}
    yield from _compare(case, outputs, dtype)


def _run_ista(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    dim = case["input"]["shape"][-1]
    module = Ista(dim, case.get("eta", 0.1), case.get("lambda", 0.1))
    if folded:
        module.to(dtype).load_state_dict(case.weights())
        with torch.no_grad():
            out = module.fuse()(case.input().to(dtype))
        yield Check("out", output_error(case["outputs"]["out"], out), BARS[dtype])
        return
    yield from _operator(case, module.eval(), dtype, str)
    for check in _operator(case, module.train(), dtype, str):  # the forms with fewer products
        yield check._replace(output=f"{check.output} (training form)")


def _run_mssa(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    entries = {name: shape for name, shape, _ in case["state_dict"]}
    inner, dim = entries["qkv.weight"]
    heads = re.search(r"heads (\d+)", case["what"])
    width = re.search(r"head dim (\d+)", case["what"])
    heads = case.get("heads") or (int(heads[1]) if heads else inner // int(width[1]))
    bias = "to_out.0.bias" in entries
    module = Mssa(dim, heads, inner // heads, proj_bias=bias)
    yield from _operator(case, module, dtype, lambda name: name.replace("to_out.0.", "proj."))


def _run_odl(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    dim, wide = case["state_dict"][0][1]
    names = {"D": "dictionary", "D1": "decoder"}
    yield from _operator(case, Odl(dim, wide / dim), dtype, names.__getitem__)


def _run_tied_attention(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    w = case.input().to(dtype).requires_grad_()
    out = tied_attention(w, case["scale"])
    out.backward(fill_input("grad_out", out.shape, case.seed).to(dtype))
    lse = ((w.detach() * case["scale"]) @ w.detach().transpose(-2, -1)).logsumexp(dim=-1)
    yield from _compare(case, {"out": out, "dw": w.grad, "lse": lse}, dtype)


def _run_coding_rate(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    x = case.input().to(dtype)
    if "row 1 overwritten by a copy of row 0" in case["what"]:
        x[:, :, 1] = x[:, :, 0]
    rate = coding_rate(x, case["eps"]).double()
    bar = BARS[dtype]
    yield Check("mean", relative_error(float(rate.mean()), case["mean"]), bar)
    yield Check("std_unbiased", relative_error(float(rate.std()), case["std_unbiased"]), 1e-6 if bar < 1e-6 else 1e-2)


def _run_pca(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    d = case["input"]["shape"][1]
    scale = [float(v) for v in re.search(r"linspace\(([\d.]+),([\d.]+),d\)", case["what"]).groups()]
    x = (case.input() * torch.linspace(*scale, d, dtype=torch.float64)).to(dtype)
    found = pca(x, int(re.search(r"n_components=(\d+)", case["what"])[1]))
    bar = 1e-9 if dtype is torch.float64 else 1e-3  # float32: neighbouring components mix
    yield Check("abs_projection", output_error(case["outputs"]["abs_projection"], found.projection.abs()), bar)
    for k, expected in enumerate(case["explained_variance"]):
        yield Check(f"variance {k}", relative_error(float(found.variance[k]), expected), BARS[dtype])


def _run_schedule(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    if dtype is not torch.float64:
        raise NoSuchForm
    warmup = re.search(r"\(e\+1\)/\((\d+)\+1e-8\)", case["what"])
    for name, factors in case.items():
        if match := re.fullmatch(r"E(\d+)", name):
            ours = [learning_rate_factor(e, int(match[1]), int(warmup[1])) for e in range(len(factors))]
            yield Check(name, max(abs(a - b) for a, b in zip(ours, factors)), 1e-15)


def _run_counts(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    if dtype is not torch.float64:
        raise NoSuchForm
    sizes = {"S": "small", "B": "base", "L": "large", "H": "huge"}
    for name, counts in case["variants"].items():
        size, _, patch = name.partition("/")
        registered = f"crate_alpha_{sizes[size]}_p{patch}" if patch else name
        model = timm.create_model(registered, device="meta", num_classes=1000)
        params = sum(p.numel() for p in model.parameters())
        yield Check(f"params {name}", abs(params - counts["params"]), 0)
        yield Check(f"macs {name}", abs(classifier_macs(model, [1, 3, 224, 224]) - counts["macs"]), 0)
