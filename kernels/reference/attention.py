"""The oracles of attention over the cache, in plain torch.

Letters in shape comments: M tokens, HQ and HK query and KV heads, K head_dim, C the capacity of a
cache slot, B rows of a batch, T new tokens of a row, S keys that are read.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from gemcut.kernels.reference.dtypes import rounded, times, times_, widened


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
) -> Tensor:
    """Causal attention of chunks of new tokens over the cache, in which they already stand.

    q [M, HQ, K]: rows cu_seqlens[b] to cu_seqlens[b + 1] are the chunk of sequence b; its first
    token has position starts[b]; its keys are in slots[b] -> [M, HQ, K].
    """
    bounds = cu_seqlens.tolist()
    chunks = [
        _attend(q[None, first:end], k_cache, v_cache, slot, start, scale, softcap, sliding_window)
        for first, end, slot, start in zip(
            bounds, bounds[1:], slots.tolist(), starts.tolist(), strict=False
        )
    ]
    return torch.cat(chunks, 1)[0] if chunks else torch.empty_like(q)


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
    counters: Tensor | None = None,
) -> Tensor:
    """Attention of each row's T newest tokens over its slot: q [B, T, HQ, K] -> the same shape.

    slots, positions [B]; query t of row b stands at positions[b] + t, and its key is in the cache.
    `counters` is scratch of the kernel.
    """
    at, starts = slots.tolist(), positions.tolist()
    settings = (scale, softcap, sliding_window)
    runs = [
        _attend(q[first:end], k_cache, v_cache, at[first], starts[first], *settings)
        for first, end in _runs(at, starts)
    ]
    return torch.cat(runs) if len(runs) > 1 else runs[0] if runs else torch.empty_like(q)


def attention_masked(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: int,
    first: int,
    visible: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention where a mask says what is seen, and its weights: no kernel does this.

    q [T, HQ, K]; visible [T, S] bool: which of the slot's positions first to first + S - 1 each
    query sees, at least one -> [T, HQ, K] and [HQ, T, S], both in q's dtype.
    """
    (T, HQ, K), HK = q.shape, k_cache.shape[1]
    rows, end = slice(slot * HK, (slot + 1) * HK), first + visible.shape[1]
    k, v = _tokens(k_cache, rows, first, end), _tokens(v_cache, rows, first, end)  # [HK, S, K]
    by_head = widened(q).view(T, HK, -1, K).permute(1, 2, 0, 3).reshape(HK, -1, K)  # [HK, G T, K]
    scores = _scores(by_head, widened(k), scale, softcap).view(HQ, T, -1)
    weights = scores.masked_fill_(~visible, -torch.inf).softmax(-1)
    out = torch.bmm(weights.view(HK, -1, weights.shape[-1]), widened(v))  # [HK, G T, K]
    out = out.view(HQ, T, K).transpose(0, 1)
    return rounded(out, q.dtype), rounded(weights, q.dtype)


def _runs(slots: list[int], starts: list[int]) -> Iterator[tuple[int, int]]:
    """Where rows begin and end that are equally long and stand side by side in the cache.

    They are one product over a view of it.  Rows of other lengths share none: padding them to one
    length would copy all keys and values.
    """
    first = 0
    for b in range(1, len(slots)):
        if slots[b] != slots[b - 1] + 1 or starts[b] != starts[b - 1]:
            yield first, b
            first = b
    if slots:
        yield first, len(slots)


def _attend(
    q: Tensor,  # [B, T, HQ, K]
    k_cache: Tensor,  # [slots, HK, C, K]
    v_cache: Tensor,
    slot: int,  # of the first row; the others follow it
    start: int,  # position of the first query, in each row
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Attention of the queries of equally long rows; only keys that some query sees are read."""
    B, T, HQ, K = q.shape
    if start < 0 or T == 0:
        return torch.zeros_like(q)
    HK, dtype = k_cache.shape[1], q.dtype
    end = start + T
    first = 0 if sliding_window is None else max(0, start - sliding_window + 1)
    rows = slice(slot * HK, (slot + B) * HK)
    k, v = _tokens(k_cache, rows, first, end), _tokens(v_cache, rows, first, end)  # [B HK, S, K]

    q, k, v = widened(q), widened(k), widened(v)
    if T == 1:  # all keys are visible
        weights = _scores(q.reshape(B * HK, -1, K), k, scale, softcap).softmax(-1)
        return rounded(torch.bmm(weights, v).view(B, 1, HQ, K), dtype)
    q = q.view(B, T, HK, -1, K).permute(0, 2, 3, 1, 4).reshape(B * HK, -1, K)  # [B HK, G T, K]
    scores = _scores(q, k, scale, softcap).view(B * HK, -1, T, end - first)
    hidden = ~_visible(start, first, end, sliding_window, q.device)  # [T, S]
    weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
    out = torch.bmm(weights.view(B * HK, -1, end - first), v).view(B, HK, -1, T, K)
    return rounded(out.permute(0, 3, 1, 2, 4).reshape(B, T, HQ, K), dtype)


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Scores before the mask: q [B HK, Q, K], k [B HK, S, K] -> [B HK, Q, S].

    The softcap comes before the mask: a capped -inf would be -softcap, and leak.
    """
    if softcap is None:
        return torch.bmm(times(q, scale), k.mT)
    return times_(torch.bmm(times(q, scale / softcap), k.mT).tanh_(), softcap)


def _tokens(cache: Tensor, rows: slice, first: int, end: int) -> Tensor:
    """Keys or values of positions first to end - 1, in order: [slots, HK, C, K] -> [R, S, K].

    `rows` are R of the slots' heads, one slot's behind the other's.
    """
    C, K = cache.shape[2:]
    cache = cache.view(-1, C, K)
    first, end = first % C, first % C + end - first
    if end <= C:
        return cache[rows, first:end]
    return torch.cat([cache[rows, first:], cache[rows, : end - C]], dim=1)  # the ring's end


def _visible(
    start: int, first: int, end: int, sliding_window: int | None, device: torch.device
) -> Tensor:
    """Which keys first to end - 1 the queries start to end - 1 see: [T, S] bool.

    Position q sees k iff q - W < k <= q: itself and the W - 1 before it.
    """
    q_positions = torch.arange(start, end, device=device).unsqueeze(-1)
    k_positions = torch.arange(first, end, device=device)
    visible = k_positions <= q_positions
    if sliding_window is not None:
        visible &= k_positions > q_positions - sliding_window
    return visible
