"""PEM's head against the official formulation of it, side by side: `python -m tests.bench.pem [SIZE ...]`.

`Straightforward` computes what the official code computes, step by step as it does: every prediction at full size and
then resized, similarities with the queries as the last axis, torchvision's deformable convolution, batch norms on
their own. It runs on the weights of a zoo head, so that outputs can be compared. Backbone not included; one thread.
"""

from __future__ import annotations

import argparse
import gc
import platform
import resource
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torchvision.ops import deform_conv2d

import zoo
from zoo.heads.pem.model import PemHead
from zoo.heads.pem.postprocess import Geometry, semantic_map
from zoo.heads.pem.transformer_decoder import sine_position

CHANNELS = {"resnet50": (256, 512, 1024, 2048), "stdc1": (64, 256, 512, 1024)}


class Straightforward(nn.Module):
    """The official sequence of operations on a zoo head's modules: maps -> the last prediction."""

    def __init__(self, head: PemHead):
        super().__init__()
        self.pixel, self.decoder = head.pixel_decoder, head.decoder

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits and mask logits."""
        mask_features, levels = self._decode_pixels(maps)
        return self._decode_queries(mask_features, levels)

    def _decode_pixels(self, maps: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        pixel = self.pixel
        with record_function("## in_projections"):
            projected = [layer(x) for layer, x in zip(pixel.projections, maps, strict=True)]
            carried = pixel.context(maps[-1].mean((2, 3), keepdim=True))
        levels = []
        for i, gate in enumerate(pixel.gates):
            with record_function("## gates"):
                x = projected[-1 - i]
                hidden = gate.norm(gate.reduce(x.mean((2, 3), keepdim=True))).relu()
                x = x + x * torch.sigmoid(torch.sigmoid(gate.expand(hidden)))
                x = x + carried
            if i < len(pixel.levels):
                level = pixel.levels[i]
                with record_function("## offset conv"):
                    o1, o2, mask = torch.chunk(level.offset(x), 3, 1)
                with record_function("## deformable conv"):
                    offset = torch.cat((o1, o2), 1)
                    x = deform_conv2d(x, offset, level.conv.weight, padding=1, mask=mask.sigmoid())
                    x = level.norm(x).relu()
                levels.append(x)
                with record_function("## transposed conv"):
                    carried = level.up_norm(level.up(x)).relu()
        with record_function("## out"):
            return pixel.out(x), levels

    def _decode_queries(self, mask_features: Tensor, levels: list[Tensor]) -> tuple[Tensor, Tensor]:
        decoder = self.decoder
        with record_function("## sine"):
            positions = [sine_position(*x.shape[-2:], decoder.dim) for x in levels]
        with record_function("## input_proj"):
            features = [
                project(x) + decoder.level_embed[i][:, None, None]
                for i, (x, project) in enumerate(zip(levels, decoder.projections, strict=True))
            ]
        B = mask_features.shape[0]
        t = decoder.query_feat[None].repeat(B, 1, 1)
        classes, masks, attention = self._predict(t, mask_features, levels[0].shape[-2:])
        for i, layer in enumerate(decoder.layers):
            cross = layer.cross_attn
            with record_function("## keys"):
                x = cross.keys.conv(cross.keys.norm(features[i % 3] + positions[i % 3]))
                keys = F.normalize(cross.keys.linear(x.flatten(2).transpose(1, 2)), dim=-1)
            with record_function("## selection"):
                q = F.normalize(cross.query(cross.query_norm(t + decoder.query_pos)), dim=-1)
                k = keys.unflatten(-1, (cross.num_heads, -1)).transpose(1, 2)
                similarity = torch.einsum("bhnc,bhqc->bhnq", k, q.unflatten(-1, (cross.num_heads, -1)).transpose(1, 2))
                blocked = (attention < 0).flatten(2).transpose(1, 2).unsqueeze(1)
                blocked = blocked & ~blocked.flatten(1).all(1).view(B, 1, 1, 1)
                similarity = similarity.masked_fill(blocked, -torch.inf)
                best = similarity.max(2)[1]
                p = k.gather(2, best.unsqueeze(-1).expand(-1, -1, -1, k.shape[-1])).transpose(1, 2).flatten(2)
            with record_function("## query side"):
                t = cross.final(cross.alpha * F.normalize(cross.proj(p * q), dim=1) + p) + t
                t = layer.mlp(layer.self_attn(t, decoder.query_pos))
            classes, masks, attention = self._predict(t, mask_features, levels[(i + 1) % 3].shape[-2:])
        return classes, masks

    def _predict(self, t: Tensor, mask_features: Tensor, size: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        with record_function("## prediction heads"):
            t = self.decoder.norm(t)
            masks = torch.einsum("bqc,bchw->bqhw", self.decoder.mask_head(t), mask_features)
            return self.decoder.class_head(t), masks, F.interpolate(masks, size=size, mode="bilinear")


def make_heads(
    backbone: str, num_classes: int, dtype: torch.dtype = torch.float32
) -> tuple[Straightforward, PemHead, PemHead]:
    """The official formulation, zoo's head, zoo's folded head, on equal weights that no layer would hide."""
    head = PemHead(CHANNELS[backbone], num_classes, dtype=dtype).eval()
    with torch.no_grad():
        for module in head.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.8, 1.2)
                module.bias.normal_(std=0.1)
        for level in head.pixel_decoder.levels:
            level.offset.weight.normal_(std=0.02)
    return Straightforward(head), head, zoo.fold(head)


def make_maps(backbone: str, height: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Maps as a backbone gives them."""
    return [
        torch.randn(1, channels, height // s, width // s, dtype=dtype).relu()
        for channels, s in zip(CHANNELS[backbone], (4, 8, 16, 32), strict=True)
    ]


def check(backbone: str) -> float:
    """Largest difference of all three in float64, in units of the masks' std."""
    models = make_heads(backbone, 150, torch.float64)
    maps = make_maps(backbone, 256, 256, torch.float64)
    reference, *others = [m(maps)[:2] for m in models]
    return max(float((a - b).abs().max() / b.std()) for each in others for a, b in zip(each, reference, strict=True))


def seconds(call) -> float:
    """Processor time of one call: other programs on the machine count for little."""
    start = time.process_time()
    call()
    return time.process_time() - start


def measure_memory(side: str, backbone: str, num_classes: int, height: int, width: int) -> None:
    """Growth of the process's largest memory in one forward pass and in making a label map: one side a process."""

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    head = dict(zip(("official", "zoo", "folded"), make_heads(backbone, num_classes), strict=True))[side]
    maps = make_maps(backbone, height, width)
    start = peak()
    logits, masks = head(maps)[:2]
    middle = peak()
    del maps
    size = (height, width)
    if side == "official":
        full = F.interpolate(masks, size=size, mode="bilinear")[0].sigmoid()
        torch.einsum("qk,qhw->khw", logits[0].softmax(-1)[:, :-1], full).argmax(0)
    else:
        semantic_map(logits[0], masks[0], Geometry(size, size, size))
    print(f"{side}, {height}x{width}: head {middle - start:.0f} MB, label map {peak() - middle:.0f} MB more")


def bench(backbone: str, height: int, width: int, num_classes: int, rounds: int, show_profile: bool) -> None:
    """Time the three heads in turns."""
    models = dict(zip(("official formulation", "zoo", "zoo folded"), make_heads(backbone, num_classes), strict=True))
    maps = make_maps(backbone, height, width)
    calls = {name: (lambda model=model: model(maps)) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
    print(f"{backbone} head, {height}x{width}, {num_classes} classes")
    base = times["official formulation"]
    for name, each in times.items():
        low, high = min(each), max(each)
        ratio = statistics.median(a / b for a, b in zip(base, each, strict=True))
        print(f"  {name:<22} {statistics.median(each) * 1e3:8.0f} ms  ({low * 1e3:.0f}-{high * 1e3:.0f})  {ratio:.2f}x")
    if show_profile:
        for name in ("official formulation", "zoo folded"):
            print_profile(name, calls[name])


def print_profile(name: str, call) -> None:
    """Where the time goes: the parts that the official formulation marks, else the operators."""
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        call()
    rows = prof.key_averages()
    marked = [row for row in rows if row.key.startswith("##")]
    rows = marked or rows
    total = sum(row.self_cpu_time_total for row in prof.key_averages())
    time_of = (lambda row: row.cpu_time_total) if marked else (lambda row: row.self_cpu_time_total)
    print(f"  profile of {name}: {total / 1e3:.0f} ms")
    for row in sorted(rows, key=time_of, reverse=True)[:14]:
        print(f"    {row.key.removeprefix('## '):<40} {time_of(row) / 1e3:7.1f} ms  {time_of(row) / total:5.1%}")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", nargs="*", default=["512x512", "640x640"], help="HxW of the image")
    parser.add_argument("--backbone", default="resnet50", choices=list(CHANNELS))
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--memory", choices=("official", "zoo", "folded"), help="measure memory of one side instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread")
    with torch.inference_mode():
        if args.memory:
            measure_memory(args.memory, args.backbone, args.classes, *map(int, args.sizes[0].split("x")))
            return
        error = check(args.backbone)
        print(f"float64 difference: {error:.1e} of the std")
        assert error < 1e-9
        for size in args.sizes:
            height, width = map(int, size.split("x"))
            bench(args.backbone, height, width, args.classes, args.rounds, args.profile)
            gc.collect()


if __name__ == "__main__":
    main()
