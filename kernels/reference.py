"""The oracle of every op, in plain torch: what the kernels must compute, and what runs on a CPU.

Letters in shape comments: M tokens, D hidden size, F MLP width, V vocabulary, HQ and HK query and
KV heads, K head_dim, C the capacity of a cache slot, B rows of a batch, T new tokens of a row.

All arithmetic is at least float32 and the result is rounded once, to the dtype of the input.  A
cache is a ring: position p lives at index p % C, which is p itself where C is the longest sequence.
A negative position marks an inactive row: nothing is stored for it, and what it yields is zero.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from gemcut.kernels.reference_sampling import filter_logits, gumbel_noise, penalize, sample

__all__ = [
    "add_rmsnorm_",
    "attention_decode",
    "attention_prefill",
    "embed",
    "filter_logits",
    "geglu",
    "gumbel_noise",
    "linear",
    "lm_head",
    "lm_head_argmax",
    "norm_linear",
    "norm_linear_geglu",
    "norm_qkv_rope_and_store_",
    "penalize",
    "rmsnorm",
    "rope_and_store_",
    "rope_tables",
    "sample",
    "skinny_linear",
]

FEW_ROWS, BLOCKS = 16, 4  # see linear
WIDE = (torch.float32, torch.float64)


def _widened(x: Tensor) -> Tensor:
    """Float64 stays, float32 stays, bfloat16 becomes float32."""
    return x if x.dtype in WIDE else x.float()


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)  # a `to` that does nothing still costs 1 us


@lru_cache(maxsize=64)
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=device)


def _times(x: Tensor, factor: float) -> Tensor:
    return x * _constant(
        factor, x.dtype, x.device
    )  # converting a Python number costs 1 us and more


def _times_(x: Tensor, factor: float) -> Tensor:
    return x.mul_(_constant(factor, x.dtype, x.device))


# Embedding and norms


def embed(token_ids: Tensor, table: Tensor, scale: float) -> Tensor:
    """Scaled rows of the table: token_ids [M], table [V, D] -> [M, D]."""
    return table.index_select(0, token_ids) * scale


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last axis: x [..., D], weight [D] -> new tensor [..., D] in x's dtype.

        y = x * rsqrt(mean(x ** 2) + eps) * (1 + weight)

    Gemma stores the weight as an offset from one: zeros are the identity.
    """
    x_wide = _widened(x)
    norm = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True)
    eps_ = _constant(eps, norm.dtype, norm.device)
    y = x_wide * torch.addcmul(eps_, norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return _rounded(torch.addcmul(y, y, weight), x.dtype)


def add_rmsnorm_(
    residual: Tensor, x: Tensor, post_weight: Tensor | None, next_weight: Tensor, eps: float
) -> Tensor:
    """Add a branch to the residual stream, in place, and normalise the sum for the next branch.

    residual, x [M, D]; weights [D] -> [M, D].  With `post_weight` (the sandwich norm of Gemma 2 and
    3) the branch is normalised before it is added.  The sum is rounded to the residual's dtype
    before the norm reads it.
    """
    if post_weight is not None:
        x = rmsnorm(x, post_weight, eps)
    residual.add_(x)
    return rmsnorm(residual, next_weight, eps)


# Rotary embedding and cache


def rope_tables(
    positions: Tensor, inv_freq: Tensor, attention_scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The cos and sin by which `rope_and_store_` rotates, in every layer of one kind.

    positions [M], inv_freq [K/2] or [M, K/2] in float32 -> cos, sin [M, 1, K].  Dimension i pairs
    with i + K/2, so both halves hold the same angles; in the first they are negated, which negates
    the sine alone, and then

        rotated = x * cos + roll(x, K/2) * sin

    Angles are float32 (a bf16 position is wrong from 257 on); cos and sin are rounded to the dtype
    of the activations.
    """
    inv_freq = torch.cat([-inv_freq, inv_freq], -1).unsqueeze(-2)
    angles = positions.view(-1, 1, 1) * inv_freq  # [M, 1, K]
    cos, sin = angles.cos(), angles.sin()
    if attention_scaling != 1:
        cos, sin = cos * attention_scaling, sin * attention_scaling
    return _rounded(cos, dtype), _rounded(sin, dtype)


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
) -> Tensor:
    """Rotate queries and keys; write keys and values into the cache; return the queries.

    qkv [M, (HQ + 2 HK) * K]; k_cache, v_cache [slots, HK, C, K], written at each token's slot and
    position; slots, positions [M]; cos, sin [M, 1, K] -> [M, HQ, K].  Gemma 3 normalises q and k
    over each head first.
    """
    _, HK, C, K = k_cache.shape
    HQ = qkv.shape[1] // K - 2 * HK
    heads = qkv.view(-1, HQ + 2 * HK, K)
    qk, v = heads.split_with_sizes([HQ + HK, HK], dim=1)  # `split` is Python, and costs 2 us more
    if q_norm_weight is not None and k_norm_weight is not None:
        q, k = qk.split_with_sizes([HQ, HK], dim=1)
        qk = torch.cat([rmsnorm(q, q_norm_weight, eps), rmsnorm(k, k_norm_weight, eps)], dim=1)
    qk = _rotated(_widened(qk), cos, sin)
    q, k = qk.split_with_sizes([HQ, HK], dim=1)

    on_host = positions.tolist()
    if min(on_host, default=0) < 0:
        active = positions >= 0
        slots, positions, k, v = slots[active], positions[active], k[active], v[active]
    places = (slots, positions % C if max(on_host, default=0) >= C else positions)
    k_cache.transpose(1, 2).index_put_(places, _rounded(k, k_cache.dtype))
    v_cache.transpose(1, 2).index_put_(places, _rounded(v, v_cache.dtype))
    return _rounded(q, qkv.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


# Attention


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


def _runs(slots: list[int], starts: list[int]) -> Iterator[tuple[int, int]]:
    """Where rows begin and end that are equally long and stand side by side in the cache."""
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

    q, k, v = _widened(q), _widened(k), _widened(v)
    if T == 1:  # all keys are visible
        weights = _scores(q.reshape(B * HK, -1, K), k, scale, softcap).softmax(-1)
        return _rounded(torch.bmm(weights, v).view(B, 1, HQ, K), dtype)
    q = q.view(B, T, HK, -1, K).permute(0, 2, 3, 1, 4).reshape(B * HK, -1, K)  # [B HK, G T, K]
    scores = _scores(q, k, scale, softcap).view(B * HK, -1, T, end - first)
    hidden = ~_visible(start, first, end, sliding_window, q.device)  # [T, S]
    weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
    out = torch.bmm(weights.view(B * HK, -1, end - first), v).view(B, HK, -1, T, K)
    return _rounded(out.permute(0, 3, 1, 2, 4).reshape(B, T, HQ, K), dtype)


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Scores before the mask: q [B HK, Q, K], k [B HK, S, K] -> [B HK, Q, S].

    The softcap comes before the mask: a capped -inf would be -softcap, and leak.
    """
    if softcap is None:
        return torch.bmm(_times(q, scale), k.mT)
    return _times_(torch.bmm(_times(q, scale / softcap), k.mT).tanh_(), softcap)


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


# Products


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Project rows: x [M, D], weight [N, D], bias [N] -> [M, N]; float32 sums, rounded once."""
    M, (N, D) = x.shape[0], weight.shape
    if M > FEW_ROWS or x.dtype != torch.float32 or not x.is_cpu:
        return F.linear(x, weight, bias)
    # The same product from the weight's side, and of one row a few blocks at a time: torch reads
    # the demo model's matrices in 0.5 ms this way, instead of 1.5, at one row and two threads.
    if M == 1 and N % BLOCKS == 0:
        y = torch.bmm(weight.view(BLOCKS, -1, D), x.mT.expand(BLOCKS, D, 1)).view(1, N)
    else:
        y = torch.mm(weight, x.mT).mT.contiguous()
    return y if bias is None else y.add_(bias)


def skinny_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """A product of few rows, with an add behind it: x [M, D], residual [M, N] -> [M, N]."""
    y = linear(x, weight, bias)
    return y if residual is None else residual + y


def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up, with the tanh approximation: gate_up [M, 2 F], gate first -> [M, F]."""
    half = gate_up.shape[-1] // 2
    gate, up = _widened(gate_up).split_with_sizes([half, half], dim=-1)
    return _rounded(F.gelu(gate, approximate="tanh").mul_(up), gate_up.dtype)


def lm_head(x: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    """Logits in float32 whatever x's dtype: x [M, D], weight [V, D] -> [M, V].

    bf16 logits tie: about one row in twenty would have two equal maxima.
    """
    x, weight = _widened(x), _widened(weight)
    if softcap is None:
        return linear(x, weight)
    return _times_(linear(_times(x, 1 / softcap), weight).tanh_(), softcap)


def lm_head_argmax(
    x: Tensor, weight: Tensor, softcap: float | None, counters: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The greatest logit and its token id, the lowest of equals: x [M, D] -> [M] float32, [M].

    `counters` is scratch of the kernel.
    """
    best = lm_head(x, weight, softcap).max(-1)
    return best.values, best.indices


# What a decode step does in one kernel: each begins with the residual stream, to which the branch
# of the layer before is still to be added


def _add_norm(
    residual: Tensor,
    branch: Tensor | None,
    post_weight: Tensor | None,
    norm_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Normed sum and sum; the residual is left as it is, and is itself the sum of no branch."""
    if branch is None:
        return rmsnorm(residual, norm_weight, eps), residual
    if post_weight is not None:
        branch = rmsnorm(branch, post_weight, eps)
    summed = residual + branch
    return rmsnorm(summed, norm_weight, eps), summed


def norm_linear(
    residual: Tensor,
    branch: Tensor | None,
    post_weight: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a branch, normalise and project: residual, branch [M, D] -> y [M, N], summed [M, D]."""
    h, summed = _add_norm(residual, branch, post_weight, norm_weight, eps)
    return linear(h, weight, bias), summed


def norm_qkv_rope_and_store_(
    residual: Tensor,
    branch: Tensor | None,
    post_weight: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The first part of a layer, up to the cache write -> q [M, HQ, K], summed [M, D]."""
    qkv, summed = norm_linear(residual, branch, post_weight, norm_weight, eps, weight, bias)
    q = rope_and_store_(
        qkv, k_cache, v_cache, slots, positions, cos, sin, q_norm_weight, k_norm_weight, eps
    )
    return q, summed


def norm_linear_geglu(
    residual: Tensor,
    branch: Tensor | None,
    post_weight: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    gate_up_weight: Tensor,
) -> tuple[Tensor, Tensor]:
    """The first half of the MLP: gate_up_weight [2 F, D], gate first -> y [M, F], summed [M, D]."""
    gate_up, summed = norm_linear(residual, branch, post_weight, norm_weight, eps, gate_up_weight)
    return geglu(gate_up), summed
