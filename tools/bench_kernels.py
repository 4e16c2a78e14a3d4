"""Each operator of zoo.kernels against the forms that a user has otherwise, forward and backward, side by side.

An operator registers its rows with `@rows("name")`: a function of the device that yields `Row`s. A row has the forms
to compare (the first one is zoo's), functions of the same inputs, and what the computation costs at least: FLOPs and
the bytes that must be moved, forward. All forms are first checked against each other, then timed in turns; the time is
the median, and the ratio that of the best other form to zoo's. On a GPU the share of the roofline is that of the
bound that binds, bytes over bandwidth or FLOPs over the tensor cores' rate of the card.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import attention as attention_file
from zoo.kernels import channel_scan as channel_file
from zoo.kernels import geglu_norm as geglu_file
from zoo.kernels import linear_attention as linear_file
from zoo.kernels import prototype_select as prototype_file
from zoo.kernels import scan2d as scan2d_file
from zoo.kernels import selective_scan as selective_file
from zoo.kernels import tied_attention as tied_file
from zoo.kernels import wave_gate as wave_file
from zoo.tools.timing import default_clock, in_turns

Form = Callable[..., Tensor]

# (bytes a second, half-precision FLOPs a second), from the makers' data sheets, dense
CARDS = {
    "A100": (2.0e12, 312e12),
    "H100": (3.35e12, 989e12),
    "H200": (4.8e12, 989e12),
    "B200": (8.0e12, 2250e12),
    "MI300": (5.3e12, 1307e12),
    "L4": (0.3e12, 121e12),
    "4090": (1.0e12, 165e12),
}


class Row(NamedTuple):
    """One line of the table: forms of one computation at one shape."""

    shape: str
    inputs: tuple[Tensor, ...]
    forms: dict[str, Form]
    flops: float
    bytes: float
    differentiable: bool = True


class Timing(NamedTuple):
    """What was measured of a row, in seconds."""

    operator: str
    shape: str
    direction: str
    seconds: dict[str, float]
    roofline: float | None

    @property
    def ratio(self) -> float:
        """Time of the best other form over that of zoo's."""
        ours, *others = self.seconds.values()
        return min(others) / ours


Rows = Callable[[torch.device], Iterator[Row]]
OPERATORS: dict[str, Rows] = {}


def rows(operator: str) -> Callable[[Rows], Rows]:
    """Register the rows of `operator`."""

    def register(function: Rows) -> Rows:
        OPERATORS[operator] = function
        return function

    return register


def measure(operator: str, device: torch.device, repeats: int = 7, compiled: bool = False) -> Iterator[Timing]:
    """Check and time every row of `operator` on `device`, forward and, where there is one, backward.

    Raises:
        RuntimeError: two forms disagree.
    """
    for row in OPERATORS[operator](device):
        forms = dict(row.forms)
        if compiled:
            last = list(forms)[-1]
            forms[f"compiled {last}"] = torch.compile(forms[last])
        _check(operator, row, forms)
        for direction in ("forward", "backward") if row.differentiable else ("forward",):
            calls = {name: _call(form, row.inputs, direction) for name, form in forms.items()}
            seconds = _time(calls, device, repeats)
            roofline = _roofline(row, direction, next(iter(seconds.values())), device)
            yield Timing(operator, row.shape, direction, seconds, roofline)


def _check(operator: str, row: Row, forms: dict[str, Form]) -> None:
    outputs = {name: form(*row.inputs).double() for name, form in forms.items()}
    first = next(iter(outputs.values()))
    bar = 1e-4 if row.inputs[0].dtype == torch.float32 else 3e-2
    for name, output in outputs.items():
        error = (output - first).abs().max().item() if output.numel() else 0.0
        if not error <= bar * max(1.0, first.abs().max().item()):
            raise RuntimeError(f"{operator} at {row.shape}: the form {name!r} is off by {error:.1e}")


def _call(form: Form, inputs: tuple[Tensor, ...], direction: str) -> Callable[[], None]:
    if direction == "forward":

        def forward() -> None:
            with torch.no_grad():
                form(*inputs)

        return forward
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    wanted = [x for x in leaves if x.requires_grad]
    weight = torch.ones_like(form(*inputs))

    def both() -> None:  # backward alone would keep all the graphs in memory
        torch.autograd.grad(form(*leaves), wanted, weight, allow_unused=True)

    return both


def _time(calls: dict[str, Callable[[], None]], device: torch.device, repeats: int) -> dict[str, float]:
    clock = default_clock(device)
    return {name: statistics.median(values) for name, values in in_turns(calls, repeats, device, clock).items()}


def _roofline(row: Row, direction: str, seconds: float, device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    card = next((limits for key, limits in CARDS.items() if key in name), None)
    if card is None:
        return None
    factor = 1.0 if direction == "forward" else 3.5  # forward once more, and two to two and a half times its work
    return factor * max(row.bytes / card[0], row.flops / card[1]) / seconds


def table(timings: list[Timing]) -> str:
    """A Markdown table: the time of each form in milliseconds, and the ratio."""
    lines = [
        "| operator | shape | direction | zoo | others | best other / zoo | roofline |",
        "|---|---|---|---|---|---|---|",
    ]
    for t in timings:
        (_, ours), *others = t.seconds.items()
        rest = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in others)
        share = "-" if t.roofline is None else f"{t.roofline:.0%}"
        lines.append(
            f"| {t.operator} | {t.shape} | {t.direction} | {1e3 * ours:.2f} | {rest} | {t.ratio:.2f} | {share} |"
        )
    return "\n".join(lines)


# The attention family ----------------------------------------------------------------------------------------------


def draw(device: torch.device, *shape: int) -> Tensor:
    """Normal numbers, in float32 on a CPU and bfloat16 on a GPU."""
    return torch.randn(*shape, device=device, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16)


def batch(device: torch.device, on_gpu: int = 64) -> int:
    """Images of a row: one on a CPU."""
    return 1 if device.type == "cpu" else on_gpu


def _attention_cost(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> tuple[float, float]:
    B, H, N, D = q.shape
    flops = attention_file.attention_flops(B, H, N, k.shape[2], D)
    moved = sum(x.numel() * x.element_size() for x in (q, k, v, q, *others))
    return flops, moved


@rows("attention")
def _attention(device: torch.device) -> Iterator[Row]:
    sdpa, reference, attend = F.scaled_dot_product_attention, attention_file.reference, attention_file.attention
    B = batch(device)
    for name, heads, N, D in (("CAFormer 14x14", 10, 196, 32), ("AsCAN 16x16", 8, 256, 32), ("DeiT-T", 3, 197, 64)):
        q, k, v = (draw(device, B, heads, N, D) for _ in range(3))
        yield Row(
            name, (q, k, v), {"attention": attend, "sdpa": sdpa, "reference": reference}, *_attention_cost(q, k, v)
        )

    q, k, v = (draw(device, B, 6, 196, 32) for _ in range(3))
    table, k2, v2, key_bias2 = (
        draw(device, 6, 27, 27),
        draw(device, B, 6, 96, 32),
        draw(device, B, 6, 96, 32),
        draw(device, 6, 96),
    )

    def two_segments(form: Form) -> Form:
        return lambda q, k, v, t, k2, v2, kb: form(q, k, v, table=t, k2=k2, v2=v2, key_bias2=kb)

    def concatenated(q, k, v, t, k2, v2, kb):
        bias = torch.cat([attention_file.relative_bias(t), kb.unsqueeze(1).expand(-1, q.shape[2], -1)], 2)
        return sdpa(q, torch.cat([k, k2], 2), torch.cat([v, v2], 2), attn_mask=bias.expand(q.shape[0], -1, -1, -1))

    flops, moved = _attention_cost(q, k, v, k2, v2)
    yield Row(
        "FcaFormer-L2 14x14, table, 96 cross tokens",
        (q, k, v, table, k2, v2, key_bias2),
        {"attention": two_segments(attend), "sdpa": concatenated, "reference": two_segments(reference)},
        flops * (196 + 96) / 196,
        moved,
    )

    windows = 16 if device.type == "cpu" else 64
    q, k, v = (draw(device, B * windows, 3, 49, 32) for _ in range(3))
    bias = draw(device, windows, 3, 49, 49)

    def per_window(form: Form) -> Form:
        return lambda q, k, v, bias: form(q, k, v, bias=bias)

    def repeated(q, k, v, bias):
        return sdpa(q, k, v, attn_mask=bias.repeat(q.shape[0] // bias.shape[0], 1, 1, 1))

    yield Row(
        f"Swin-T, {windows} windows of 49 with biases",
        (q, k, v, bias),
        {"attention": per_window(attend), "sdpa": repeated, "reference": per_window(reference)},
        *_attention_cost(q, k, v, bias),
    )
    q, k, v = (draw(device, B * 80, 3, 64, 8) for _ in range(3))
    yield Row(
        "CRAFT, 80 windows of 64, head size 8",
        (q, k, v),
        {"attention": attend, "sdpa": sdpa, "reference": reference},
        *_attention_cost(q, k, v),
    )


@rows("tied_attention")
def _tied_attention(device: torch.device) -> Iterator[Row]:
    for name, heads, N, D in (("CRATE-T", 6, 197, 64), ("CRATE-S", 12, 197, 48), ("CRATE-B 384", 12, 577, 64)):
        w = draw(device, batch(device), heads, N, D)
        forms = {
            "tied_attention": tied_file.tied_attention,
            "sdpa of three tensors": lambda w: F.scaled_dot_product_attention(w, w.clone(), w.clone()),
            "reference": tied_file.reference,
        }
        flops = attention_file.attention_flops(*w.shape[:2], N, N, D)
        yield Row(name, (w,), forms, flops, 2 * w.numel() * w.element_size())


@rows("linear_attention")
def _linear_attention(device: torch.device) -> Iterator[Row]:
    def queries_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_file.reference(q, k, v)

    def authors(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.relu(q), F.relu(k)
        z = 1 / (torch.einsum("bhnd,bhd->bhn", q, k.sum(2)) + 1e-6)
        return torch.einsum("bhnd,bhde,bhn->bhne", q, torch.einsum("bhnd,bhne->bhde", k, v), z)

    for name, heads, N, D, images in (
        ("SLAB-Swin-T stage 1, 49 tokens", 3, 49, 32, 64 if device.type == "cpu" else 64 * 64),
        ("SLAB-DeiT-T", 3, 196, 64, batch(device)),
        ("SLAB-PVT stage 1, 3136 tokens", 1, 3136, 64, batch(device)),
    ):
        q, k, v = draw(device, 3, images, N, heads, D).transpose(2, 3)
        forms = {
            "linear_attention": linear_file.linear_attention,
            "authors' einsums": authors,
            "reference": queries_first,
        }
        flops = linear_file.linear_attention_flops(images, heads, N, N, D, D)
        yield Row(name, (q, k, v), forms, flops, 4 * q.numel() * q.element_size())


@rows("prototype_select")
def _prototype_select(device: torch.device) -> Iterator[Row]:
    def authors(q: Tensor, k: Tensor, allowed: Tensor) -> Tensor:
        """Similarities (B, heads, N, Q), the largest along the strided axis."""
        qh, kh = (x.unflatten(-1, (8, 32)).transpose(1, 2) for x in (q, k))
        similarity = (kh @ qh.transpose(2, 3)).masked_fill(~allowed.transpose(1, 2).unsqueeze(1), float("-inf"))
        index = similarity.argmax(2, keepdim=True).transpose(2, 3)
        return kh.gather(2, index.expand(-1, -1, -1, 32)).transpose(1, 2).flatten(2)

    for N in (1024, 4096, 16384):
        q, k = draw(device, batch(device, 8), 100, 256), F.normalize(draw(device, batch(device, 8), N, 256), dim=-1)
        allowed = torch.rand(q.shape[0], 100, N, device=device) < 0.5
        yield Row(
            f"PEM, {N} tokens, 100 queries",
            (q, k, allowed),
            {
                "prototype_select": lambda q, k, a: prototype_file.prototype_select(q, k, a, 8),
                "reference": lambda q, k, a: prototype_file.reference(q, k, a, 8),
                "authors' layout": authors,
            },
            2.0 * q.shape[0] * 100 * N * 256,
            (q.numel() * 2 + k.numel()) * q.element_size() + allowed.numel(),
        )


# Scans and pointwise operators ---------------------------------------------------------------------------------------


def _scan_weights(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Weights in float32, as models keep them; small, so that no scan grows."""
    return [0.1 * torch.randn(*shape, device=device) for shape in shapes]


@rows("scan2d")
def _scan2d(device: torch.device) -> Iterator[Row]:
    shapes = (("ViM2-T stage 1", 56, 192), ("ViM2-T stage 3", 14, 768), ("ViM2-T stage 4", 7, 1536))
    for name, side, dim in shapes[2:] if device.type == "cpu" else shapes:  # the reference takes minutes
        N = 16
        rank, images = dim // 32, batch(device)
        x = torch.randn(images, side, side, dim, device=device)
        shapes = ((4, rank + 2 * N, dim), (4, dim, rank), (4, dim), (4 * dim, N), (4 * dim,))
        proj, dt_weight, dt_bias, A, D = _scan_weights(device, *shapes)
        pixels = images * side * side
        flops = 2 * pixels * 4 * dim * (2 * rank + 2 * N) + 9 * pixels * 4 * dim * N
        forms = {"scan2d": scan2d_file.scan2d, "reference": scan2d_file.reference}
        moved = 4 * pixels * (2 * dim + 4 * (rank + 2 * N))
        yield Row(name, (x, proj, dt_weight, dt_bias - 3, -1 - A.abs(), D), forms, flops, moved)


@rows("selective_scan")
def _selective_scan(device: torch.device) -> Iterator[Row]:
    b, d, N, length = batch(device, 16), 768, 16, 196
    u, dt, z = torch.randn(3, b, d, length, device=device)
    B, C = torch.randn(2, b, 1, N, length, device=device)
    A, D, bias = _scan_weights(device, (d, N), (d,), (d,))

    def form(function: Form) -> Form:
        return lambda *tensors: function(*tensors, softplus=True)

    forms = {"selective_scan": form(selective_file.selective_scan), "reference": form(selective_file.reference)}
    inputs = (u, dt, -1 - A.abs(), B, C, D, z, bias - 3)
    yield Row(f"{d} channels, {length} steps", inputs, forms, 9 * u.numel() * N, 4 * (4 * u.numel() + 2 * B.numel()))


@rows("channel_scan")
def _channel_scan(device: torch.device) -> Iterator[Row]:
    sizes = (("ViM2-T stage 3", 14, 768, 2), ("ViM2-T stage 4", 7, 768, 1))
    for name, side, width, expand in sizes[1:] if device.type == "cpu" else sizes:
        x = torch.randn(batch(device), side, side, width, device=device)
        shapes = ((4, 3), (1, 4), (4, width), (4, width), (4, 16), (4, 16, width), (4, 16, width), (4, width))
        conv, conv_bias, dt_weight, dt_bias, A, B, C, D = _scan_weights(device, *shapes)
        inputs = (x, conv, conv_bias, dt_weight, dt_bias - 3, -1 - A.abs(), B, C, D)

        def form(function: Form, expand: int = expand) -> Form:
            return lambda pixels, *weights: function(pixels, expand, *weights)

        forms = {"channel_scan": form(channel_file.channel_scan), "reference": form(channel_file.reference)}
        yield Row(name, inputs, forms, 4 * x.numel() * (11 * 16 + 8), 8 * x.numel())


@rows("geglu_norm")
def _geglu_norm(device: torch.device) -> Iterator[Row]:
    for name, tokens, features in (("Activator, 64 tokens of 512", 64, 512), ("196 tokens of 1536", 196, 1536)):
        a, b = (draw(device, batch(device, 256), tokens, features) for _ in range(2))
        weight, bias = (draw(device, features) for _ in range(2))
        forms = {"geglu_norm": geglu_file.geglu_norm, "reference": geglu_file.reference}
        yield Row(name, (a, b, weight, bias), forms, 20 * a.numel(), 3 * a.numel() * a.element_size())


@rows("wave_gate")
def _wave_gate(device: torch.device) -> Iterator[Row]:
    for name, channels, side in (("SpaRTAN-T stage 1", 32, 56), ("SpaRTAN-T stage 3", 128, 14)):
        x = draw(device, batch(device, 256), channels, side, side)
        theta, amplitude = (draw(device, len(x), 4 * channels, side, side) for _ in range(2))
        rotation = draw(device, 2 * channels, 2)
        forms = {"wave_gate": wave_file.wave_gate}
        if device.type == "cpu":  # complex numbers do not exist in bfloat16
            forms["reference"] = wave_file.reference
        else:
            forms["superpose, rotate"] = lambda x, t, a, r: wave_file.rotate(
                wave_file.superpose(wave_file.strongest(x), t, a), r
            )
        moved = (x.numel() + 3 * theta.numel()) * x.element_size()
        yield Row(name, (x, theta, amplitude, rotation), forms, 15 * theta.numel(), moved)
