"""The blocks of CRAFT on maps of tokens (B, H, W, C): channels last, so that linear layers, norms and windows need
no transposes and depthwise convolutions and poolings run several times faster on CPUs than on (B, C, H, W).

Modules carry the official names. The official 1x1 convolutions keep their (out, in, 1, 1) weights and run as linear
layers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.heads.craft.windows import Windows, make_windows, window_attention
from zoo.kernels.attention import relative_bias


def pointwise(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 1x1 convolution of (..., C) tokens."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def spatial(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A padded convolution of a (B, H, W, C) map, zeros outside."""
    return _conv(x, conv.weight, conv.bias, conv.groups)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=groups)
    return y.permute(0, 2, 3, 1).contiguous()


def depthwise_conv(x: Tensor, weight: Tensor) -> Tensor:
    """A depthwise 3x3 convolution of a (B, H, W, C) map without bias."""
    return _conv(x, weight, None, weight.shape[0])


class ChannelNorm(nn.Module):
    """LayerNorm over channels, under the official name `body`."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.body = nn.LayerNorm(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., C)."""
        return self.body(x)


class PositionBias(nn.Module):
    """An MLP from offsets (dh, dw) to one logit for each head, official name `pos`.

    Its width is dim // 16 for a branch of dim channels. At width 1 (the official models' dim 24) each LayerNorm returns
    its own bias: all offsets get the same logits, which softmax ignores. `inert` says so, and nothing is computed then.
    """

    def __init__(self, dim: int, num_heads: int, window: tuple[int, int], device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        width = dim // 4 // 4
        self.window = window
        self.inert = width == 1
        self.pos_proj = nn.Linear(2, width, **dd)
        self.pos1 = self._layer(width, width, dd)
        self.pos2 = self._layer(width, width, dd)
        self.pos3 = self._layer(width, num_heads, dd)

    @staticmethod
    def _layer(width: int, out: int, dd: dict) -> nn.Sequential:
        return nn.Sequential(nn.LayerNorm(width, **dd), nn.ReLU(), nn.Linear(width, out, **dd))

    def offsets(self) -> Tensor:
        """The table ((2h-1)(2w-1), 2) of offsets between the tokens of a window, as numbers."""
        h, w = self.window
        like = self.pos_proj.weight
        rows = torch.arange(1 - h, h, device=like.device, dtype=like.dtype)
        columns = torch.arange(1 - w, w, device=like.device, dtype=like.dtype)
        return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)

    def table(self) -> Tensor:
        """Logits of every offset: ((2h-1)(2w-1), heads)."""
        return self.pos3(self.pos2(self.pos1(self.pos_proj(self.offsets()))))

    def forward(self) -> Tensor:
        """Logits of every pair of tokens: (heads, h*w, h*w)."""
        h, w = self.window
        return relative_bias(self.table().t().unflatten(1, (2 * h - 1, 2 * w - 1)))


class _Branch(nn.Module):
    def __init__(self, dim: int, num_heads: int, window: tuple[int, int], device=None, dtype=None):
        super().__init__()
        self.pos = PositionBias(dim, num_heads, window, device, dtype)


class Mlp(nn.Module):
    """Linear, GELU, linear (official names `fc1`, `fc2`)."""

    def __init__(self, dim: int, hidden: int, device=None, dtype=None):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to the same."""
        return self.fc2(F.gelu(self.fc1(x)))


class RectangleAttentionBlock(nn.Module):
    """SRWAB: half of the channels attend in h x w windows, the other half in w x h ones, shifted in odd blocks.

    A depthwise convolution of the unshifted values ("locality complementary" term) is added before the projection;
    an MLP follows.

    Args:
        dim: channels.
        num_heads: heads, half of them for each branch.
        window: rows and columns of branch 0; branch 1 has them exchanged.
        shifted: shift the windows by half of their size.
        mlp_ratio: hidden width of the MLP over `dim`.
        qkv_bias: biases of queries, keys and values.
        shift_mask: keep apart what meets in a shifted window across the border of the map.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: tuple[int, int] = (4, 16),
        shifted: bool = False,
        mlp_ratio: float = 2.0,
        qkv_bias: bool = True,
        shift_mask: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.num_heads = num_heads
        self.shift_mask = shift_mask
        self.sizes = (window, window[::-1])
        self.shifts = tuple((h // 2, w // 2) if shifted else (0, 0) for h, w in self.sizes)
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.attns = nn.ModuleList(_Branch(dim // 2, num_heads // 2, size, **dd) for size in self.sizes)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)

    def branch_weights(self) -> list[tuple[Tensor, Tensor | None]]:
        """Weight (3 * C/2, C) and bias of the queries, keys and values of each branch."""
        dim = self.qkv.in_features
        weight = self.qkv.weight.reshape(3, 2, dim // 2, dim)
        bias = None if self.qkv.bias is None else self.qkv.bias.reshape(3, 2, dim // 2)
        return [(weight[:, i].flatten(0, 1), None if bias is None else bias[:, i].flatten()) for i in (0, 1)]

    def bias(self, branch: int) -> Tensor | None:
        """Position bias of a branch, None where it has no effect."""
        pos = self.attns[branch].pos
        return None if pos.inert else pos()

    def windows(
        self, branch: int, height: int, width: int, x: Tensor, rolled: bool = False, last: bool = True
    ) -> Windows:
        """The windows of a branch over a map, or over rows of it that come `rolled` (`last`: with the map's end)."""
        shift = self.shifts[branch]
        if rolled and not last:
            shift = (0, shift[1])  # these rows do not reach the border where rolling joins what is apart
        return make_windows(height, width, self.sizes[branch], shift, self.shift_mask, rolled, x.device, x.dtype)

    def attend(self, qkv: Tensor, branch: int, windows: Windows, bias: Tensor | None) -> Tensor:
        """Window attention of one branch: (B, H, W, 3 * C/2) -> (B, H, W, C/2)."""
        return window_attention(qkv.flatten(1, 2), windows, self.num_heads // 2, bias).reshape(*qkv.shape[:3], -1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C), H and W multiples of both sides of the windows."""
        _, height, width, dim = x.shape
        y = self.norm1(x)
        values, attended = [], []
        for i, (weight, bias) in enumerate(self.branch_weights()):
            qkv = F.linear(y, weight, bias)
            values.append(qkv[..., dim:])
            attended.append(self.attend(qkv, i, self.windows(i, height, width, qkv), self.bias(i)))
        y = torch.cat(attended, dim=-1) + spatial(torch.cat(values, dim=-1), self.get_v)
        x = x + self.proj(y)
        return x + self.mlp(self.norm2(x))


class HighFrequencyBlock(nn.Module):
    """HFERB: a convolution of one half of the channels, a maximum over neighbours of the other half."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        half = dim // 2
        self.last_fc = nn.Conv2d(dim, dim, 1, **dd)
        self.fc = nn.Conv2d(half, half, 1, **dd)
        self.conv = nn.Conv2d(half, half, 3, padding=1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        half = self.conv.in_channels
        a = spatial(x[..., :half].contiguous(), self.conv)
        b = F.max_pool2d(x[..., half:].contiguous().permute(0, 3, 1, 2), 3, stride=1, padding=1)
        b = pointwise(b.permute(0, 2, 3, 1), self.fc)
        return x + pointwise(F.gelu(torch.cat([a, b], dim=-1)), self.last_fc)


class ChannelAttention(nn.Module):
    """Attention across channels, over the whole image: high frequencies query the values of the low ones.

    With A = softmax(G / (|q| |k|) tau) for the Gram matrix G = q k^T of each head (d x d, summed over all positions),
    the projection of A v is one C x C matrix of the image applied to v, so neither q nor k is ever normalised.
    """

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1, **dd))
        self.q = nn.Conv2d(dim, dim, 1, bias=False, **dd)
        self.q_dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False, **dd)
        self.kv = nn.Conv2d(dim, 2 * dim, 1, bias=False, **dd)
        self.kv_dwconv = nn.Conv2d(2 * dim, 2 * dim, 3, padding=1, groups=2 * dim, bias=False, **dd)
        self.project_out = nn.Conv2d(dim, dim, 1, bias=False, **dd)

    def queries(self, high: Tensor) -> Tensor:
        """(B, H, W, C)."""
        return spatial(pointwise(high, self.q), self.q_dwconv)

    def keys(self, low: Tensor) -> Tensor:
        """(B, H, W, C)."""
        dim = self.q.in_channels
        k = F.linear(low, self.kv.weight[:dim].flatten(1))
        return _conv(k, self.kv_dwconv.weight[:dim], None, dim)

    def values(self, low: Tensor) -> Tensor:
        """(B, H, W, C)."""
        dim = self.q.in_channels
        v = F.linear(low, self.kv.weight[dim:].flatten(1))
        return _conv(v, self.kv_dwconv.weight[dim:], None, dim)

    def mixing_matrix(self, gram: Tensor, q_norm: Tensor, k_norm: Tensor) -> Tensor:
        """(B, C, C), what the values are multiplied by.

        Args:
            gram: (B, C, C), products of query and key channels, summed over positions.
            q_norm: (B, C), Euclidean norms of the query channels.
            k_norm: (B, C), those of the key channels.
        """
        batch, dim, _ = gram.shape
        heads, d = self.num_heads, dim // self.num_heads
        # the d x d blocks on the diagonal: (B, heads, d, d)
        gram = gram.reshape(batch, heads, d, heads, d).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        q_norm = q_norm.clamp_min(1e-12).reshape(batch, heads, d, 1)
        k_norm = k_norm.clamp_min(1e-12).reshape(batch, heads, 1, d)
        weights = (gram / (q_norm * k_norm) * self.temperature).softmax(dim=-1)
        out = self.project_out.weight.reshape(dim, heads, d).transpose(0, 1)  # (heads, C, d)
        return (out.to(weights.dtype) @ weights).transpose(1, 2).reshape(batch, dim, dim)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """Two maps (B, H, W, C) to one."""
        q, k, v = (t.flatten(1, 2) for t in (self.queries(high), self.keys(low), self.values(low)))
        with torch.autocast(q.device.type, enabled=False):  # sums over all positions, never in half precision
            q, k = (t if t.dtype == torch.float64 else t.float() for t in (q, k))
            norm = torch.linalg.vector_norm
            matrix = self.mixing_matrix(q.transpose(1, 2) @ k, norm(q, dim=1), norm(k, dim=1))
        return (v @ matrix.transpose(1, 2).to(v.dtype)).reshape(low.shape)


class GatedFeedForward(nn.Module):
    """GDFN: 1x1, depthwise 3x3, GELU of one half times the other half, 1x1."""

    def __init__(self, dim: int, ratio: float = 2.66, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        hidden = int(dim * ratio)
        self.project_in = nn.Conv2d(dim, 2 * hidden, 1, bias=False, **dd)
        self.dwconv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=False, **dd)
        self.project_out = nn.Conv2d(hidden, dim, 1, bias=False, **dd)

    def aligned_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three weights with zeros up to a multiple of 16 hidden channels: matrix products like it better."""
        hidden = self.project_out.in_channels
        extra = -hidden % 16
        first = F.pad(self.project_in.weight.reshape(2, hidden, -1), (0, 0, 0, extra)).flatten(0, 1)
        depthwise = F.pad(self.dwconv.weight.reshape(2, hidden, 9), (0, 0, 0, extra)).reshape(-1, 1, 3, 3)
        return first, depthwise, F.pad(self.project_out.weight.flatten(1), (0, extra))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        first, depthwise, last = self.aligned_weights()
        a, b = depthwise_conv(F.linear(x, first), depthwise).chunk(2, dim=-1)
        return F.linear(F.gelu(a) * b, last)


class FusionBlock(nn.Module):
    """HFB: the high-frequency map queries the attention map across channels; a gated feed-forward follows."""

    def __init__(self, dim: int, num_heads: int, ffn_ratio: float = 2.66, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.norm1 = ChannelNorm(dim, **dd)
        self.attn = ChannelAttention(dim, num_heads, **dd)
        self.norm2 = ChannelNorm(dim, **dd)
        self.ffn = GatedFeedForward(dim, ffn_ratio, **dd)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """Two maps (B, H, W, C) to one."""
        x = low + self.attn(self.norm1(low), high)
        return x + self.ffn(self.norm2(x))


class CrossRefinement(nn.Module):
    """CRFB: in each step the attention and the high-frequency branch see the same map; their fusion replaces it."""

    def __init__(
        self, dim: int, depth: int, num_heads: int, ffn_ratio: float, attention: dict, device=None, dtype=None
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.srwa_blocks = nn.ModuleList(
            RectangleAttentionBlock(dim, num_heads, shifted=j % 2 == 1, **attention, **dd) for j in range(2 * depth)
        )
        self.hfer_blocks = nn.ModuleList(HighFrequencyBlock(dim, **dd) for _ in range(depth))
        self.hf_blocks = nn.ModuleList(FusionBlock(dim, num_heads, ffn_ratio, **dd) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        for i, (high, fusion) in enumerate(zip(self.hfer_blocks, self.hf_blocks)):
            low = self.srwa_blocks[2 * i + 1](self.srwa_blocks[2 * i](x))
            x = fusion(low, high(x))
        return x


class Group(nn.Module):
    """RCRFG: `depth` steps of cross refinement, a convolution (or nothing), and the input added."""

    def __init__(
        self,
        dim: int,
        depth: int = 2,
        num_heads: int = 6,
        ffn_ratio: float = 2.66,
        conv: bool = True,
        attention: dict | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.residual_group = CrossRefinement(dim, depth, num_heads, ffn_ratio, attention or {}, **dd)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, **dd) if conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        y = self.residual_group(x)
        return (spatial(y, self.conv) if isinstance(self.conv, nn.Conv2d) else y) + x
