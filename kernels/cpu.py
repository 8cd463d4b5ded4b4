"""The op table for a CPU: the oracles' names, written for speed where torch has a faster way.

`reference` defines what each op computes; ops that would gain nothing are taken from there.
Products are in cpu_products.py, what it needs for quantised weights in cpu_quantized.py; norms,
tables of rotation and the beginning of a step in cpu_rows.py.

Letters in shape comments: M tokens, D hidden size, F MLP width, V vocabulary, HQ and HK query and
KV heads, K head_dim, C the capacity of a cache slot, B rows of a batch, T new tokens of a row, S
keys that are read, R heads of several slots.
"""

from collections.abc import Iterator
from inspect import unwrap

import torch
import torch.nn.functional as F
from torch import Tensor

from gemcut.kernels.cpu_products import PackedWeight, linear, lm_head, lm_head_argmax
from gemcut.kernels.cpu_rows import (
    add_rmsnorm_,
    begin_step,
    rmsnorm,
    rope_tables,
    rounded,
    summed,
    times,
    times_,
    widened,
)
from gemcut.kernels.outputs import takes_out
from gemcut.kernels.reference import (
    advance_,
    best_of_ranges,
    embed,
    filter_logits,
    gumbel_noise,
    penalize,
    sample,
)
from gemcut.kernels.reference.cache import cache_shape, place_of
from gemcut.kernels.reference.ops import stored

__all__ = [
    "add_rmsnorm_",
    "advance_",
    "attention_decode",
    "attention_prefill",
    "begin_step",
    "best_of_ranges",
    "embed",
    "filter_logits",
    "geglu",
    "gumbel_noise",
    "linear",
    "linear_geglu",
    "linear_rope_and_store_",
    "lm_head",
    "lm_head_argmax",
    "penalize",
    "rmsnorm",
    "rope_and_store_",
    "rope_tables",
    "sample",
    "skinny_linear",
]

# queries of one sequence: up to so many attend with all heads at once; more, a head at a time, in
# blocks of at most QUERIES
JOINT_QUERIES, QUERIES = 16, 160


# A call within an op has no `out`, and need not pay for one
_linear = unwrap(linear)

# Rotary embedding and cache


@takes_out
def rope_and_store_(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    block_tables: Tensor | None = None,
) -> Tensor:
    """Rotate q and k together, fill the cache: qkv [M, (HQ + 2 HK) K] -> q [M, HQ, K]."""
    (HK, C), K = cache_shape(k_cache, block_tables), k_cache.shape[-1]
    qkv = rounded(summed(qkv), cos.dtype)
    HQ = qkv.shape[1] // K - 2 * HK
    heads = qkv.view(-1, HQ + 2 * HK, K)
    qk, v = heads.split_with_sizes([HQ + HK, HK], dim=1)  # `split` is Python, and costs 2 us more
    if q_norm_weight is not None and k_norm_weight is not None:
        norm_weight = torch.cat([q_norm_weight.expand(HQ, K), k_norm_weight.expand(HK, K)])
        qk = rmsnorm(qk, norm_weight, eps)
    qk = widened(qk)
    qk = torch.addcmul(qk * cos, qk.roll(K // 2, -1), sin)
    q, k = qk.split_with_sizes([HQ, HK], dim=1)

    on_host = positions.tolist()
    if min(on_host, default=0) < 0:
        active = positions >= 0
        slots, positions, k, v = slots[active], positions[active], k[active], v[active]
    if block_tables is not None:
        places, caches = place_of(k_cache, slots, positions, block_tables), (k_cache, v_cache)
    else:
        places = (slots, positions % C if max(on_host, default=0) >= C else positions)
        caches = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    caches[0].index_put_(places, stored(k, k_cache.dtype, k_scale))
    caches[1].index_put_(places, stored(v, v_cache.dtype, v_scale))
    return rounded(q, qkv.dtype)


_rope_and_store_ = unwrap(rope_and_store_)


# Products


@takes_out
def skinny_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """A product of few rows as one partial sum: x [M, D], weight [N, D], bias [N] -> [1, M, N].

    It is rounded to x's dtype first: torch's products give no other.
    """
    return widened(_linear(x, weight, bias)).unsqueeze(0)


@takes_out
def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up, with the tanh approximation: gate_up [M, 2 F], gate first -> [M, F]."""
    half = gate_up.shape[-1] // 2
    gate, up = widened(gate_up).split_with_sizes([half, half], dim=-1)
    return rounded(F.gelu(gate, approximate="tanh").mul_(up), gate_up.dtype)


_geglu = unwrap(geglu)


@takes_out
def linear_geglu(x: Tensor, gate_up_weight: PackedWeight) -> Tensor:
    """The first half of the MLP: x [M, D], gate_up_weight [2 F, D], gate first -> [M, F]."""
    return _geglu(_linear(x, gate_up_weight))


@takes_out
def linear_rope_and_store_(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    block_tables: Tensor | None = None,
) -> Tensor:
    """The first part of a layer, up to the cache write: x [M, D] -> q [M, HQ, K]."""
    rotation = (slots, positions, cos, sin, q_norm_weight, k_norm_weight, eps, k_scale, v_scale)
    qkv = _linear(x, weight, bias)
    return _rope_and_store_(qkv, k_cache, v_cache, *rotation, block_tables)


# Attention


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
    """Causal attention of chunks over the cache: q [M, HQ, K] -> [M, HQ, K]."""
    if k_scale is not None and v_scale is not None:
        chunks = (slots, starts, cu_seqlens, scale, softcap, sliding_window, None, None)
        y = attention_prefill(_by_head(q, k_scale), k_cache, v_cache, *chunks, block_tables)
        return rounded(_by_head(y, v_scale), q.dtype)
    bounds, cache = cu_seqlens.tolist(), (k_cache, v_cache, block_tables)
    chunks = [
        _attend(q[None, first:end], *cache, slot, start, scale, softcap, sliding_window)
        for first, end, slot, start in zip(
            bounds, bounds[1:], slots.tolist(), starts.tolist(), strict=False
        )
    ]
    return torch.cat(chunks, 1)[0] if chunks else torch.empty_like(q)


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
    """Attention of each row's T newest tokens over its slot: q [B, T, HQ, K] -> the same shape."""
    if k_scale is not None and v_scale is not None:
        rows = (slots, positions, scale, softcap, sliding_window, None, None)
        y = attention_decode(_by_head(q, k_scale), k_cache, v_cache, *rows, block_tables)
        return rounded(_by_head(y, v_scale), q.dtype)
    at, starts = slots.tolist(), positions.tolist()
    cache, settings = (k_cache, v_cache, block_tables), (scale, softcap, sliding_window)
    runs = [
        _attend(q[first:end], *cache, at[first], starts[first], *settings)
        for first, end in _runs(at, starts)
    ]
    return torch.cat(runs) if len(runs) > 1 else runs[0] if runs else torch.empty_like(q)


def _by_head(x: Tensor, scale: Tensor) -> Tensor:
    """Queries or outputs [.., HQ, K] times the scale of the KV head that they read, widened."""
    return widened(x) * scale.repeat_interleave(x.shape[-2] // len(scale)).unsqueeze(-1)


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
    """Attention [T, HQ, K] where a mask [T, S] says what is seen, and its weights [HQ, T, S].

    No kernel does this: it runs on a GPU too.
    """
    (T, HQ, K), HK = q.shape, k_cache.shape[1]
    end = first + visible.shape[1]
    k, v = _tokens(k_cache, slot, 1, first, end), _tokens(v_cache, slot, 1, first, end)
    by_head = widened(q).view(T, HK, -1, K).permute(1, 2, 0, 3).reshape(HK, -1, K)  # [HK, G T, K]
    scores = _scores(by_head, widened(k), scale, softcap).view(HQ, T, -1)
    weights = scores.masked_fill_(~visible, -torch.inf).softmax(-1)
    out = torch.bmm(weights.view(HK, -1, weights.shape[-1]), widened(v))  # [HK, G T, K]
    out = out.view(HQ, T, K).transpose(0, 1)
    return rounded(out, q.dtype), rounded(weights, q.dtype)


def _runs(slots: list[int], starts: list[int]) -> Iterator[tuple[int, int]]:
    """The first and the end of each run of rows that are equally long and adjacent in the cache.

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
    block_tables: Tensor | None,
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
    HK, dtype = cache_shape(k_cache, block_tables)[0], q.dtype
    end = start + T
    first = 0 if sliding_window is None else max(0, start - sliding_window + 1)
    where = slot, B, first, end, block_tables
    k, v = _tokens(k_cache, *where), _tokens(v_cache, *where)  # [B HK, S, K]

    q, k, v = widened(q), widened(k), widened(v)
    if T == 1:  # all keys are visible
        weights = _scores(q.reshape(B * HK, -1, K), k, scale, softcap).softmax(-1)
        return rounded(torch.bmm(weights, v).view(B, 1, HQ, K), dtype)
    if B == 1 and T > JOINT_QUERIES:
        size = block_of_queries(T)
        blocks = [
            _attend_block(block, k, v, first, start + T0, scale, softcap, sliding_window)
            for T0, block in zip(range(0, T, size), q[0].split(size), strict=True)
        ]
        return rounded(torch.cat(blocks), dtype).unsqueeze(0)
    q = q.view(B, T, HK, -1, K).permute(0, 2, 3, 1, 4).reshape(B * HK, -1, K)  # [B HK, G T, K]
    scores = _scores(q, k, scale, softcap).view(B * HK, -1, T, end - first)
    hidden = ~_visible(start, first, end, sliding_window, q.device)  # [T, S]
    weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
    out = torch.bmm(weights.view(B * HK, -1, end - first), v).view(B, HK, -1, T, K)
    return rounded(out.permute(0, 3, 1, 2, 4).reshape(B, T, HQ, K), dtype)


def block_of_queries(T: int) -> int:
    """How many of T queries attend at once: equal blocks of at most QUERIES."""
    return -(-T // -(-T // QUERIES))


def _attend_block(
    q: Tensor,  # [T, HQ, K]
    k: Tensor,  # [HK, S, K], from position `first` on
    v: Tensor,
    first: int,
    start: int,  # position of the first query
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Attention of some queries of one sequence, all in `widened` dtypes -> [T, HQ, K].

    A head at a time: oneDNN's products take half the time of MKL's for all heads together.
    """
    (T, HQ, K), HK = q.shape, k.shape[0]
    end = start + T
    begin = first if sliding_window is None else max(first, start - sliding_window + 1)
    seen = slice(begin - first, end - first)
    hidden = ~_visible(start, begin, end, sliding_window, q.device)  # [T, S]
    heads = []
    for of_q, of_k, of_v in zip(q.split(HQ // HK, dim=1), k[:, seen], v[:, seen], strict=True):
        scores = _scores(of_q.transpose(0, 1).reshape(-1, K), of_k, scale, softcap)  # [G T, S]
        weights = scores.view(-1, T, end - begin).masked_fill_(hidden, -torch.inf).softmax(-1)
        heads.append(linear(weights.flatten(0, 1), of_v.mT).view(-1, T, K))
    return torch.cat(heads).transpose(0, 1)


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Scores before the mask: q [R, G T, K], k [R, S, K] -> [R, G T, S]; of one head without R."""

    def product(factor: float) -> Tensor:
        scaled = times(q, factor)
        return linear(scaled, k) if q.dim() == 2 else torch.bmm(scaled, k.mT)

    if softcap is None:
        return product(scale)
    return times_(product(scale / softcap).tanh_(), softcap)


def _tokens(
    cache: Tensor, slot: int, B: int, first: int, end: int, block_tables: Tensor | None = None
) -> Tensor:
    """Keys or values of positions first to end - 1 of B slots, in order -> [B HK, S, K].

    A view where the cache is one of slots and its strides allow it.
    """
    if block_tables is not None:
        slots, positions = torch.arange(slot, slot + B).unsqueeze(1), torch.arange(first, end)
        found = cache[place_of(cache, slots, positions, block_tables)]  # [B, S, HK, K]
        return found.transpose(1, 2).flatten(0, 1)
    C = cache.shape[2]
    first, end = first % C, first % C + end - first
    slots = slice(slot, slot + B)
    if end <= C:
        return cache[slots, :, first:end].flatten(0, 1)
    wrapped = torch.cat([cache[slots, :, first:], cache[slots, :, : end - C]], dim=2)
    return wrapped.flatten(0, 1)  # the ring's end, then its beginning


def _visible(
    start: int, first: int, end: int, sliding_window: int | None, device: torch.device
) -> Tensor:
    """Which keys first to end - 1 the queries start to end - 1 see: [T, S] bool."""
    q_positions = torch.arange(start, end, device=device).unsqueeze(-1)
    k_positions = torch.arange(first, end, device=device)
    visible = k_positions <= q_positions
    if sliding_window is not None:
        visible &= k_positions > q_positions - sliding_window
    return visible
