"""One model of each type as ONNX and as a program: size of the file, difference from the model, seconds.

    python -m tests.bench.export [--tiny] [--program] [NAME ...]

Weights are random (norms' statistics and layer scales too, so that no branch is silent). The check runs in ONNX
Runtime at four sizes and batches, of which one is the nominal size and none is the traced one; "left out" counts its
images at which the model itself jumps (`zoo.export_check`).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import timm
import torch

import zoo

_DEPTHS = dict(depths=(1, 1, 1, 1))
_META = _DEPTHS | dict(dims=(16, 32, 64, 96))
_SLAB = dict(depths=(1, 1, 1, 1))
_VIM = dict(dims=(8, 12), token_depths=(1, 1), channel_depths=(0, 1), channel_expand=(2, 1), d_state=4)

# one variant of each type, and arguments that make it small
MODELS = {
    "poolformerv1_s12": _META,
    "identityformer_s12": _META,
    "randformer_s12": _META,
    "metaformer_ppff_s12_224": _META,
    "metaformer_ppaa_s12_224": _META,
    "crate_tiny": dict(depth=2, embed_dim=24, num_heads=3),
    "crate_alpha_small_p16": dict(depth=2, embed_dim=24, num_heads=3),
    "mae_crate_tiny": dict(depth=2, embed_dim=24, num_heads=3),
    "fcaformer_l1": dict(embed_dims=(16, 24, 32, 64), depths=(1, 1, 2, 1), num_heads=(0, 0, 2, 4)),
    "deit_t_prepbn": dict(embed_dim=48, depth=2, num_heads=3),
    "slab_deit_t": dict(embed_dim=48, depth=2, num_heads=3),
    "pvt_t_prepbn": dict(embed_dims=(16, 24, 32, 40), num_heads=(1, 2, 4, 5), **_SLAB),
    "slab_pvt_t": dict(embed_dims=(16, 24, 32, 40), num_heads=(1, 2, 4, 5), linear_sr_ratios=(8, 4, 2, 1), **_SLAB),
    "slab_pvt_v2_b0": dict(embed_dims=(16, 24, 32, 40), num_heads=(1, 2, 4, 5), **_SLAB),
    "swin_t_prepbn": dict(embed_dim=12, num_heads=(1, 2, 4, 8), depths=(2, 1, 1, 1)),
    "slab_swin_t": dict(embed_dim=12, num_heads=(1, 2, 4, 8), depths=(1, 1, 2, 1)),
    "slab_cswin_t": dict(embed_dim=16, num_heads=(2, 4, 8, 16), **_SLAB),
    "ascan_tiny": dict(stem_width=8, widths=(8, 16, 32, 32), patterns=("C", "CT", "CT", "CT"), head_dim=8),
    "ninformer_patch4_32": dict(embed_dim=16, depth=2),
    "fourier_ninformer_patch4_32": dict(embed_dim=16, depth=2),
    "activator_tiny_patch16_224": dict(embed_dim=16, depth=2),
    "activator_geglu_patch4_32": dict(embed_dim=16, depth=2),
    "uniform_activator_patch4_32": dict(embed_dim=16, depth=2),
    "spartan_xtiny": dict(embed_dims=(8, 16), depths=(1, 1), expand_ratios=(4, 2)),
    "vim2_tiny": _VIM,
    "vanilla_vmamba_tiny": _VIM | dict(channel_depths=(0, 0)),
    "stdc1": {},
    "caformer_s18": {},
    "resnet18": {},
    "vit_tiny_patch16_224": dict(depth=2),
}


def build(name: str, tiny: bool, **options) -> torch.nn.Module:
    """A model whose every parameter matters."""
    torch.manual_seed(0)
    arguments = dict(MODELS[name] if tiny else {}, **options)
    model = timm.create_model(name, **arguments)
    if not model.num_classes:  # pretrained encoders come without a classifier
        model = timm.create_model(name, num_classes=1000, **arguments)
    model.eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "A_log" in parameter_name or "random_matrix" in parameter_name:
                continue
            if parameter.ndim < 2 or parameter.min() == parameter.max():  # norms, scales, biases and tables
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
            elif buffer_name.endswith("running_var"):
                buffer.copy_(0.8 + 0.4 * torch.rand(buffer.shape, generator=generator))
    return model


def main() -> None:
    """Export and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(MODELS))
    parser.add_argument("--tiny", action="store_true", help="small constructor arguments")
    parser.add_argument("--program", action="store_true", help="a torch.export program instead of ONNX")
    parser.add_argument("--precision", default="float32")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | file, MB | images | largest difference | mean | same best class | left out | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.names:
            model, start = build(name, args.tiny), time.perf_counter()
            try:
                if args.program:
                    report = zoo.export_program(model, Path(folder) / "model.pt2")
                else:
                    report = zoo.export_onnx(model, Path(folder) / "model.onnx", precision=args.precision)
            except RuntimeError as error:
                print(f"| {name} | failed: {error} |", flush=True)
                continue
            seconds = time.perf_counter() - start
            print(
                f"| {name} | {report.bytes / 1e6:.1f} | {report.rule} | {report.difference:.1e} | "
                f"{report.mean_difference:.1e} | {report.agreement:.0%} | {report.undecided} | {seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
