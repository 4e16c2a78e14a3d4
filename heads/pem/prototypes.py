"""Which token each query and head looks at: the most similar one inside the query's mask.

    index[q, h] = argmax_n <query_q^h, key_n^h>  over the tokens n that the mask of q allows

The keys stay where they are: similarities exist for one tile of tokens at a time, heads x queries x tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TILE = 1024  # tokens a tile: 8 heads x 100 queries x 1024 fit a core's cache


def select_tokens(queries: Tensor, keys: Tensor, allowed: Tensor, num_heads: int) -> Tensor:
    """The best token for each query and head.

    Args:
        queries: (B, Q, C); heads are consecutive blocks of channels.
        keys: (B, N, C).
        allowed: (B, Q, N), the tokens inside each query's mask. A query without any takes token 0; an image in
            which no query has any is treated as if all were allowed (PEM's two rules).

    Returns:
        Indices (B, Q, num_heads); the first of equal maxima.
    """
    B, Q, _ = queries.shape
    N = keys.shape[1]
    q = queries.reshape(B, Q, num_heads, -1).permute(0, 2, 1, 3)
    k = keys.reshape(B, N, num_heads, -1).permute(0, 2, 3, 1)
    # 0 where allowed, -inf elsewhere; 0 everywhere for images without any allowed token
    some = allowed.flatten(1).any(1).view(B, 1, 1)
    bias = torch.zeros((), dtype=q.dtype, device=q.device).expand(B, Q, N).masked_fill(some & ~allowed, -torch.inf)
    bias = bias.unsqueeze(1)
    if N <= _TILE or torch.compiler.is_compiling():
        return (q @ k).add_(bias).argmax(-1).transpose(1, 2)
    best = q.new_full((B, num_heads, Q), -torch.inf)
    index = torch.zeros((B, num_heads, Q), dtype=torch.long, device=q.device)
    for start in range(0, N, _TILE):
        value, place = (q @ k[..., start : start + _TILE]).add_(bias[..., start : start + _TILE]).max(-1)
        better = value > best
        best = torch.where(better, value, best)
        index = torch.where(better, place + start, index)
    return index.transpose(1, 2)


def gather_tokens(keys: Tensor, index: Tensor) -> Tensor:
    """The chosen tokens, head by head: keys (B, N, C), index (B, Q, heads) -> (B, Q, C)."""
    B, N, C = keys.shape
    _, Q, heads = index.shape
    k = keys.view(B, N, heads, C // heads)
    return k.gather(1, index.unsqueeze(-1).expand(B, Q, heads, C // heads)).flatten(2)
