"""The oracles of attention over the cache, in plain torch.

    s[t, j] = softcap(q[t] . k[j] * scale)     position p sees key j iff p - W < j <= p
    y[t]    = sum_j softmax_j(s[t, j]) * v[j]

Letters in shape comments: M tokens, HQ and HK query and KV heads, K head_dim, C the capacity of a
cache slot, B sequences, T new tokens of one, S keys that some of them sees.  Query head h reads KV
head h // (HQ / HK); cache.py says where a token is.
"""

from itertools import pairwise

import torch
from torch import Tensor

from gemcut.kernels.outputs import takes_out
from gemcut.kernels.reference.cache import cache_shape, held
from gemcut.kernels.reference.ops import loaded, widened


@takes_out
def attention_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    starts: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    block_tables: Tensor | None = None,
) -> Tensor:
    """Causal attention of chunks of new tokens over the cache, which holds their keys already.

    q [M, HQ, K]: rows cu_seqlens[b] to cu_seqlens[b + 1] are the chunk of sequence b; its first
    token has position starts[b]; its keys are in slots[b], or in the blocks that row slots[b] of
    block_tables names -> [M, HQ, K].
    """
    y = torch.zeros_like(q)
    chunks = zip(pairwise(cu_seqlens.tolist()), slots.tolist(), starts.tolist(), strict=True)
    for (first, end), slot, start in chunks:
        kv = k_cache, v_cache, k_scale, v_scale, block_tables, slot
        y[first:end] = _attended(q[first:end], *kv, start, scale, softcap, sliding_window)
    return y


@takes_out
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    block_tables: Tensor | None = None,
) -> Tensor:
    """Attention of each row's T newest tokens over its slot: q [B, T, HQ, K] -> the same shape.

    slots, positions [B]; query t of row b has position positions[b] + t, and its key is in the
    cache.
    """
    y = torch.zeros_like(q)
    for b, (slot, start) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        kv = k_cache, v_cache, k_scale, v_scale, block_tables, slot
        y[b] = _attended(q[b], *kv, start, scale, softcap, sliding_window)
    return y


def _attended(
    q: Tensor,  # [T, HQ, K]
    k_cache: Tensor,  # [slots, HK, C, K]
    v_cache: Tensor,
    k_scale: Tensor | None,  # [HK]
    v_scale: Tensor | None,
    block_tables: Tensor | None,  # [slots, N]
    slot: int,
    start: int,  # position of the first query; below 0 the sequence is inactive
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Attention of one sequence's new tokens, [T, HQ, K]; only keys that some of them sees."""
    end = start + q.shape[0]
    if start < 0 or start == end:
        return torch.zeros_like(q)
    first = 0 if sliding_window is None else max(0, start - sliding_window + 1)
    q_positions = torch.arange(start, end, device=q.device).unsqueeze(-1)
    k_positions = torch.arange(first, end, device=q.device)
    visible = k_positions <= q_positions  # [T, S]
    if sliding_window is not None:
        visible &= k_positions > q_positions - sliding_window
    kv = k_cache, v_cache, slot
    rest = scale, softcap, k_scale, v_scale, block_tables
    return attention_masked(q, *kv, first, visible, *rest)[0]


def attention_masked(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: int,
    first: int,
    visible: Tensor,
    scale: float,
    softcap: float | None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    block_tables: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention where a mask says what is seen, and its weights.

    q [T, HQ, K]; visible [T, S] bool: which of the slot's positions first to first + S - 1 each
    query sees, at least one -> [T, HQ, K] and [HQ, T, S], both in q's dtype.
    """
    HQ, HK = q.shape[1], cache_shape(k_cache, block_tables)[0]
    end = first + visible.shape[1]
    wide = widened(q)
    k, v = (
        loaded(held(cache, slot, first, end, block_tables), of_heads)
        .to(wide.dtype)
        .repeat_interleave(HQ // HK, 0)
        for cache, of_heads in ((k_cache, k_scale), (v_cache, v_scale))
    )  # [HQ, S, K]
    scores = wide.transpose(0, 1) @ k.mT * scale  # [HQ, T, S]
    if softcap is not None:  # before the mask: a capped -inf would be -softcap
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return (weights @ v).transpose(0, 1).to(q.dtype), weights.to(q.dtype)
