"""Golden cases of Activator, with and without the MLP, and Uniform_Activator; multiply-adds as in `ninformer`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parity.golden import Case
from tests.parity.ninformer import Family, Recorder, images, meta_state, official_options, run_model, run_module
from tests.parity.runner import Check, NoSuchForm, NotUnderstood
from zoo.activator import Activator, ActivatorBlock, GatingUnit, constructor_arguments, rename
from zoo.kernels.geglu_norm import geglu_norm

REPOSITORIES = ("Abdullah-88/Activator", "Abdullah-88/Uniform_Activator")
FIELDS = {  # official constructor -> zoo's
    "patch_size": "patch_size",
    "in_channels": "in_chans",
    "num_classes": "num_classes",
    "d_model": "embed_dim",
    "num_layers": "depth",
    "d_ffn": "hidden_dim",
}


def claims(case: Case) -> bool:
    return str(case.get("source", "")).startswith(REPOSITORIES) or case.path.parent.name == "activator"


def run(case: Case, dtype: torch.dtype, folded: bool) -> Iterator[Check]:
    names = {name for name, _, _ in case["state_dict"]}
    if "patcher.weight" in names:
        yield from run_model(case, dtype, folded, Family(build, block_outputs, rename))
        return
    if folded:
        raise NoSuchForm  # what folds is the whole model
    yield from _run_part(case, dtype, names)


def build(case: Case) -> Activator:
    """The classifier that the official constructor describes; names tell which of the three layouts it is."""
    shapes = constructor_arguments(meta_state(case))
    options = official_options(case, shapes, FIELDS, ignored={"image_size"})
    return Activator(img_size=tuple(next(iter(images(case).values()))[-2:]), **options)


def block_outputs(name: str, model: Activator, block: Recorder) -> Tensor | None:
    """A recorded intermediate of a block, from what its parts got and gave."""
    if name == "gate_norm":
        norm = model.blocks[0].glu.norm  # the operator has no such tensor: composed from its input
        return F.layer_norm(F.gelu(block.outputs["glu.fc1_g"]), norm.normalized_shape, *norm.parameters(), norm.eps)
    if name == "g":
        return block.inputs["glu.fc2"]
    return block.outputs.get(dict(norm1="norm", glu="glu", ffn="mlp").get(name, ""))


class _Norm(nn.Module):
    """The LayerNorm of the gate's operator, under its official name."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return geglu_norm(a, b, self.norm.weight, self.norm.bias, self.norm.eps)


def _run_part(case: Case, dtype: torch.dtype, names: set[str]) -> Iterator[Check]:
    c = case["constructor"]
    shape = {name: size for name, size, _ in case["state_dict"]}
    if "actgu.proj_1.weight" in names:  # ActivatorBlock
        hidden, dim = shape["actgu.proj_1.weight"]
        drop = 0.0 if case.get("mode") == "train" else c.get("dropout", 0.0)
        mlp, norm = "ffn.net.0.weight" in names, "actgu.norm.weight" in names
        module = ActivatorBlock(dim, hidden, mlp=mlp, gate_norm=norm, drop=drop)
        prefix, start = "model.0.", "blocks.0."
    elif "proj_1.weight" in names:  # ActivatorGatingUnit
        hidden, dim = shape["proj_1.weight"]
        module = GatingUnit(dim, hidden, norm="norm.weight" in names)
        prefix, start = "model.0.actgu.", "blocks.0.glu."
    elif names == {"norm.weight", "norm.bias"}:
        module, prefix, start = _Norm(*shape["norm.weight"]), "", ""
    else:
        raise NotUnderstood(case.get("variant") or case.get("what"))
    yield from run_module(case, module, lambda name: rename(prefix + name)[len(start) :], module, dtype)
