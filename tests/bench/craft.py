"""CRAFT's inference path against the official formulation of the same network: time and peak memory, one thread.

    python tests/bench/craft.py                       # LR 64x64 and 128x128, x4
    python tests/bench/craft.py --memory              # 1280x720 output, x2, x3, x4
    python tests/bench/craft.py --training            # a training step

`official_forward` is a straightforward implementation of what the authors' code computes and how: (B, C, H, W) maps,
rolled and permuted windows, the position MLP evaluated and gathered, scores stored, hand-written norms. Both sides run
on the same weights, are compared first, and alternate.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.heads.craft import Craft
from zoo.heads.craft.padding import pad_image


def channel_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm over the channels of (B, C, H, W), by hand on transposed tokens."""
    b, c, h, w = x.shape
    t = x.flatten(2).transpose(1, 2)
    mean, var = t.mean(-1, keepdim=True), t.var(-1, keepdim=True, unbiased=False)
    t = (t - mean) / torch.sqrt(var + 1e-5) * weight + bias
    return t.transpose(1, 2).reshape(b, c, h, w)


def offset_table(h: int, w: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets of a window and the index of each pair of tokens among them."""
    rows, columns = torch.arange(1 - h, h), torch.arange(1 - w, w)
    table = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).flatten(1).t().to(like)
    position = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")).flatten(1)
    offset = position[:, :, None] - position[:, None, :]
    return table, (offset[0] + h - 1) * (2 * w - 1) + offset[1] + w - 1


def position_bias(p: dict, start: str, table: Tensor, index: Tensor) -> Tensor:
    """(heads, N, N)."""
    t = F.linear(table, p[start + "pos_proj.weight"], p[start + "pos_proj.bias"])
    for name in ("pos1", "pos2", "pos3"):
        weight = p[f"{start}{name}.0.weight"]
        t = F.relu(F.layer_norm(t, weight.shape, weight, p[f"{start}{name}.0.bias"]))
        t = F.linear(t, p[f"{start}{name}.2.weight"], p[f"{start}{name}.2.bias"])
    n = index.shape[0]
    return t[index.flatten()].view(n, n, -1).permute(2, 0, 1).contiguous()


def rectangle_attention(x: Tensor, size: tuple[int, int], p: dict, start: str, hw: tuple[int, int], tables) -> Tensor:
    """One branch: x is (3, B, H*W, C), the result (B, H, W, C)."""
    (height, width), (h, w) = hw, size
    c = x.shape[-1]

    def windows(t: Tensor) -> Tensor:
        t = t.transpose(1, 2).contiguous().view(-1, c, height // h, h, width // w, w)
        t = t.permute(0, 2, 4, 3, 5, 1).contiguous().view(-1, h * w, c)
        return t.reshape(-1, h * w, 3, c // 3).permute(0, 2, 1, 3).contiguous()

    q, k, v = (windows(t) for t in x)
    scores = q * (c // 3) ** -0.5 @ k.transpose(-2, -1)
    scores = scores + position_bias(p, start + "pos.", *tables).unsqueeze(0)
    out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, h * w, c)
    out = out.view(-1, height // h, width // w, h, w, c)
    return out.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, height, width, c)


def attention_block(x: Tensor, p: dict, start: str, hw: tuple[int, int], shifted: bool, tables) -> Tensor:
    """A rectangle attention block on tokens (B, H*W, C)."""
    b, length, c = x.shape
    height, width = hw
    y = F.layer_norm(x, (c,), p[start + "norm1.weight"], p[start + "norm1.bias"])
    qkv = F.linear(y, p[start + "qkv.weight"], p[start + "qkv.bias"]).reshape(b, length, 3, c).permute(2, 0, 1, 3)
    v = qkv[2].transpose(-2, -1).contiguous().view(b, c, height, width)
    maps = qkv.reshape(3 * b, height, width, c)
    out = []
    for i, (size, shift) in enumerate((((4, 16), (2, 8)), ((16, 4), (8, 2)))):
        part = maps[..., i * c // 2 : (i + 1) * c // 2]
        if shifted:
            part = torch.roll(part, (-shift[0], -shift[1]), (1, 2))
        part = part.reshape(3, b, length, c // 2)
        part = rectangle_attention(part, size, p, f"{start}attns.{i}.", hw, tables[i])
        out.append(torch.roll(part, shift, (1, 2)) if shifted else part)
    y = torch.cat([t.reshape(b, length, c // 2) for t in out], dim=2)
    lcm = F.conv2d(v, p[start + "get_v.weight"], p[start + "get_v.bias"], padding=1, groups=c)
    y = y + lcm.permute(0, 2, 3, 1).contiguous().view(b, length, c)
    x = x + F.linear(y, p[start + "proj.weight"], p[start + "proj.bias"])
    y = F.layer_norm(x, (c,), p[start + "norm2.weight"], p[start + "norm2.bias"])
    y = F.gelu(F.linear(y, p[start + "mlp.fc1.weight"], p[start + "mlp.fc1.bias"]))
    return x + F.linear(y, p[start + "mlp.fc2.weight"], p[start + "mlp.fc2.bias"])


def high_frequency(x: Tensor, p: dict, start: str) -> Tensor:
    """HFERB."""
    c = x.shape[1] // 2
    a = F.gelu(F.conv2d(x[:, :c], p[start + "conv.weight"], p[start + "conv.bias"], padding=1))
    b = F.conv2d(F.max_pool2d(x[:, c:], 3, 1, 1), p[start + "fc.weight"], p[start + "fc.bias"])
    y = torch.cat([a, F.gelu(b)], dim=1)
    return F.conv2d(y, p[start + "last_fc.weight"], p[start + "last_fc.bias"]) + x


def fusion(low: Tensor, high: Tensor, p: dict, start: str) -> Tensor:
    """HFB."""
    b, c, h, w = low.shape
    y = channel_norm(low, p[start + "norm1.body.weight"], p[start + "norm1.body.bias"])
    q = F.conv2d(F.conv2d(high, p[start + "attn.q.weight"]), p[start + "attn.q_dwconv.weight"], padding=1, groups=c)
    kv = F.conv2d(y, p[start + "attn.kv.weight"])
    k, v = F.conv2d(kv, p[start + "attn.kv_dwconv.weight"], padding=1, groups=2 * c).chunk(2, dim=1)
    heads = p[start + "attn.temperature"].shape[0]
    q, k, v = (t.reshape(b, heads, c // heads, h * w) for t in (q, k, v))
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * p[start + "attn.temperature"]
    out = (scores.softmax(-1) @ v).reshape(b, c, h, w)
    x = low + F.conv2d(out, p[start + "attn.project_out.weight"])
    y = channel_norm(x, p[start + "norm2.body.weight"], p[start + "norm2.body.bias"])
    y = F.conv2d(y, p[start + "ffn.project_in.weight"])
    a, g = F.conv2d(y, p[start + "ffn.dwconv.weight"], padding=1, groups=y.shape[1]).chunk(2, dim=1)
    return x + F.conv2d(F.gelu(a) * g, p[start + "ffn.project_out.weight"])


def official_forward(model: Craft, x: Tensor) -> Tensor:
    """The whole network on (B, 3, H, W), multiples of 16."""
    p = dict(model.named_parameters())
    hw = tuple(x.shape[2:])
    tables = [offset_table(*size, x) for size in ((4, 16), (16, 4))]
    x = (x - model.mean) * model.img_range
    shallow = x = F.conv2d(x, p["conv_first.weight"], p["conv_first.bias"], padding=1)
    b, c = x.shape[:2]
    for g, depth in enumerate(model.depths):
        skip, start = x, f"layers.{g}.residual_group."
        for i in range(depth):
            low = x.flatten(2).transpose(1, 2)
            for j in (2 * i, 2 * i + 1):
                low = attention_block(low, p, f"{start}srwa_blocks.{j}.", hw, j % 2 == 1, tables)
            low = low.transpose(1, 2).reshape(b, c, *hw)
            x = fusion(low, high_frequency(x, p, f"{start}hfer_blocks.{i}."), p, f"{start}hf_blocks.{i}.")
        x = F.conv2d(x, p[f"layers.{g}.conv.weight"], p[f"layers.{g}.conv.bias"], padding=1) + skip
    x = channel_norm(x, p["norm.body.weight"], p["norm.body.bias"])
    x = F.conv2d(x, p["conv_after_body.weight"], p["conv_after_body.bias"], padding=1) + shallow
    x = F.pixel_shuffle(F.conv2d(x, p["upsample.0.weight"], p["upsample.0.bias"], padding=1), model.scale)
    return x / model.img_range + model.mean


class PeakMemory(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of tensor storage alive at the same time, beyond those at the start."""

    def __enter__(self):
        self.live, self.peak, self.seen = 0, 0, {}
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        import weakref

        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                key = storage._cdata
                if key not in self.seen:
                    size = storage.nbytes()
                    self.live += size
                    self.peak = max(self.peak, self.live)
                    self.seen[key] = weakref.finalize(storage, self._free, key, size)
        return out

    def _free(self, key, size):
        self.live -= size
        self.seen.pop(key, None)


def alternate(sides: dict, repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each side, taken in turns: other processes cannot favour one of them."""
    times = {name: [] for name in sides}
    for run in sides.values():
        run()
    for _ in range(repeats):
        for name, run in sides.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return times


def report(title: str, times: dict[str, list[float]]) -> None:
    """Median, spread and ratio of the first side to each other one."""
    base = statistics.median(next(iter(times.values())))
    for name, values in times.items():
        middle = statistics.median(values)
        print(
            f"{title:<26} {name:<22} {middle:>8.3f} s  ({min(values):.3f} to {max(values):.3f})  x{base / middle:.2f}",
            flush=True,
        )


def check(model: Craft) -> None:
    """Both sides give the same numbers."""
    with torch.inference_mode():
        m = Craft(2, depths=(2, 1), dtype=torch.float64).eval()
        for p in m.parameters():
            p.add_(torch.randn_like(p) * 0.05)
        x = torch.rand(2, 3, 48, 64, dtype=torch.float64)
        a, b = official_forward(m, x), m(x)
        error = float((a - b).abs().max() / a.std())
        print(f"float64, largest difference over std: {error:.1e}")
        assert error < 1e-9, error
        x = torch.rand(1, 3, 64, 64)
        a, b = official_forward(model, x), model(x)
        error = float((a - b).abs().max() / a.std())
        print(f"float32, largest difference over std: {error:.1e}")
        assert error < 1e-4, error


def speed(scale: int, sizes: list[int], repeats: int) -> None:
    """Time of a forward pass."""
    model = Craft(scale).eval()
    check(model)
    with torch.inference_mode():
        for size in sizes:
            x = torch.rand(1, 3, size, size)
            padded = pad_image(x, 16, "official")
            sides = {
                "official formulation": lambda x=padded: official_forward(model, x),
                "zoo": lambda x=padded: model(x),
            }
            report(f"x{scale}, LR {size}x{size} (+16)", alternate(sides, repeats))


def memory() -> None:
    """Peak live bytes of a 1280x720 output."""
    for scale in (4, 3, 2):
        model = Craft(scale).eval()
        x = torch.rand(1, 3, 720 // scale, 1280 // scale)
        padded = pad_image(x, 16, "official")
        peaks = []
        for run in (lambda: official_forward(model, padded), lambda: model(padded)):  # noqa: B023
            with torch.inference_mode(), PeakMemory() as trace:
                run()
            peaks.append(trace.peak / 1e6)
        print(
            f"x{scale}: official formulation {peaks[0]:.0f} MB, zoo {peaks[1]:.0f} MB, {peaks[1] / peaks[0]:.0%}",
            flush=True,
        )


def training(repeats: int) -> None:
    """Time of a forward and backward pass, batch 2, LR 64x64, x2."""
    model = Craft(2).train()
    x, target = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 128, 128)

    def step(forward):
        model.zero_grad()
        F.l1_loss(forward(x), target).backward()

    sides = {
        "official formulation": lambda: step(lambda x: official_forward(model, x)),
        "zoo": lambda: step(model),
    }
    report("training step", alternate(sides, repeats))


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=4)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--training", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if args.memory:
        memory()
    elif args.training:
        training(args.repeats)
    else:
        speed(args.scale, args.sizes, args.repeats)


if __name__ == "__main__":
    main()
