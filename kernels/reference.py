"""The oracle of every op, in plain torch: what the kernels must compute, and what runs on a CPU.

Letters in shape comments: M tokens, D hidden size, F MLP width, V vocabulary, HQ and HK query and
KV heads, K head_dim, C the capacity of a cache slot, B rows of a batch, T new tokens of a row.

All arithmetic is at least float32 and the result is rounded once, to the dtype of the input.  A
cache is a ring: position p lives at index p % C, which is p itself where C is the longest sequence.
A negative position marks an inactive row: nothing is stored for it, and what it yields is zero.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# Embedding and norms


def embed(token_ids: Tensor, table: Tensor, scale: float) -> Tensor:
    """Scaled rows of the table: token_ids [M], table [V, D] -> [M, D]."""
    return F.embedding(token_ids, table) * scale


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last axis: x [..., D], weight [D] -> new tensor [..., D] in x's dtype.

    Gemma stores the weight as an offset from one: zeros are the identity.
    """
    wide = _wide(x)
    x_wide = x.to(wide)
    rstd = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    return (x_wide * rstd * (1 + weight.to(wide))).to(x.dtype)


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


def rope_and_store_(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    attention_scaling: float,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Rotate queries and keys; write keys and values into the cache; return the queries.

    qkv [M, (HQ + 2 HK) * K]; k_cache, v_cache [slots, HK, C, K], written at each token's slot and
    position; slots, positions [M]; inv_freq [K/2] or [M, K/2] in float32 -> [M, HQ, K].
    Dimension i pairs with i + K/2.  Angles are float32 (a bf16 position is wrong from 257 on);
    cos and sin are rounded to qkv's dtype.  Gemma 3 normalises q and k per head first.
    """
    M = qkv.shape[0]
    _, HK, C, K = k_cache.shape
    heads = qkv.view(M, -1, K)
    HQ = heads.shape[1] - 2 * HK
    q, k, v = heads.split([HQ, HK, HK], dim=1)
    if q_norm_weight is not None and k_norm_weight is not None:
        q = rmsnorm(q, q_norm_weight, eps)
        k = rmsnorm(k, k_norm_weight, eps)

    angles = positions.unsqueeze(-1).float() * inv_freq  # [M, K/2]
    cos = (angles.cos() * attention_scaling).to(qkv.dtype).to(_wide(qkv)).unsqueeze(1)
    sin = (angles.sin() * attention_scaling).to(qkv.dtype).to(_wide(qkv)).unsqueeze(1)
    k = _rotate(k, cos, sin)

    active = positions >= 0
    if not bool(active.all()):
        slots, positions, k, v = slots[active], positions[active], k[active], v[active]
    k_cache[slots, :, positions % C] = k.to(k_cache.dtype)
    v_cache[slots, :, positions % C] = v.to(v_cache.dtype)
    return _rotate(q, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(x.dtype)


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
    out = torch.empty_like(q)
    for b, start in enumerate(starts.tolist()):
        rows = slice(bounds[b], bounds[b + 1])
        T = bounds[b + 1] - bounds[b]
        keys = min(start + T, k_cache.shape[2])
        out[rows] = _attend(
            q[rows].unsqueeze(0),
            k_cache[slots[b], :, :keys].unsqueeze(0),
            v_cache[slots[b], :, :keys].unsqueeze(0),
            starts[b : b + 1],
            k_cache.shape[2],
            scale,
            softcap,
            sliding_window,
        )[0]
    return out


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Attention of each row's T newest tokens over its slot: q [B, T, HQ, K] -> the same shape.

    slots, positions [B]; query t of row b stands at positions[b] + t, and its key is in the cache.
    """
    keys = min(k_cache.shape[2], max(1, int(positions.max()) + q.shape[1]))
    k, v = k_cache[slots, :, :keys], v_cache[slots, :, :keys]
    return _attend(q, k, v, positions, k_cache.shape[2], scale, softcap, sliding_window)


def _attend(
    q: Tensor,  # [B, T, HQ, K]
    k: Tensor,  # [B, HK, S, K]: the first S indices of each ring
    v: Tensor,
    positions: Tensor,  # [B], of the first query
    capacity: int,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
) -> Tensor:
    B, T, HQ, K = q.shape
    HK, S = k.shape[1], k.shape[2]
    wide = _wide(q)

    q_positions = positions.unsqueeze(-1) + torch.arange(T, device=q.device)
    q_positions = q_positions.masked_fill(positions.unsqueeze(-1) < 0, -1)
    newest = q_positions[:, -1:]
    indices = torch.arange(S, device=q.device)
    k_positions = newest - (newest - indices) % capacity  # [B, S]; negative: never written
    visible = _visible(q_positions.unsqueeze(-1), k_positions.unsqueeze(1), sliding_window)

    q = q.to(wide).view(B, T, HK, HQ // HK, K).permute(0, 2, 3, 1, 4)  # [B, HK, G, T, K]
    scores = q.reshape(B, HK, -1, K) @ k.to(wide).transpose(-1, -2) * scale
    if softcap is not None:  # before the mask: a capped -inf would be -softcap, and leak
        scores = softcap * torch.tanh(scores / softcap)
    hidden = ~visible[:, None, None]  # [B, 1, 1, T, S]
    scores = scores.view(B, HK, -1, T, S).masked_fill(hidden, -torch.inf)
    # a row without a visible key has no softmax: the substitute weights fall on zeros
    scores = scores.masked_fill(hidden.all(-1, keepdim=True), 0.0)
    # what no query sees may be anything, NaN included
    v = v.to(wide).masked_fill(~visible.any(1)[:, None, :, None], 0.0)
    out = scores.softmax(-1).view(B, HK, -1, S) @ v
    return out.view(B, HK, HQ // HK, T, K).permute(0, 3, 1, 2, 4).reshape(B, T, HQ, K).to(k.dtype)


def _visible(q_positions: Tensor, k_positions: Tensor, sliding_window: int | None) -> Tensor:
    """Position q sees k iff q - W < k <= q: itself and the W - 1 before it."""
    visible = (k_positions >= 0) & (k_positions <= q_positions)
    if sliding_window is not None:
        visible &= k_positions > q_positions - sliding_window
    return visible


# Products


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X [M, D], weight [N, D], bias [N] -> [M, N]; the sum is kept in float32 and rounded once."""
    return F.linear(x, weight, bias)


def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up, with the tanh approximation: gate_up [M, 2 F], gate first -> [M, F]."""
    gate, up = gate_up.to(_wide(gate_up)).chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)


def linear_geglu(x: Tensor, gate_up_weight: Tensor) -> Tensor:
    """The first half of the MLP: x [M, D], gate_up_weight [2 F, D], gate first -> [M, F]."""
    return geglu(linear(x, gate_up_weight))


def lm_head(x: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    """Logits in float32 whatever x's dtype: x [M, D], weight [V, D] -> [M, V].

    bf16 logits tie: about one row in twenty would have two equal maxima.
    """
    wide = _wide(x)
    logits = linear(x.to(wide), weight.to(wide))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


# Token choice


def penalize(
    logits: Tensor,
    output_counts: Tensor,
    in_prompt: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> Tensor:
    """Penalised logits [B, V], from how often each token was generated and whether it was prompted.

    output_counts [B, V] int, in_prompt [B, V] bool; repetition, presence, frequency [B].
    Repetition divides what speaks for a seen token (Keskar et al., 2019, CTRL, section 4.1);
    presence and frequency are subtracted for generated tokens only (OpenAI's definition).
    """
    generated = output_counts > 0
    repetition = repetition.unsqueeze(-1)
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(generated | in_prompt, repeated, logits)
    return logits - frequency.unsqueeze(-1) * output_counts - presence.unsqueeze(-1) * generated


def sample(
    logits: Tensor,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """One token id for each row: logits [B, V] float32 -> [B] int64.  The rest is [B] each.

    temperature 0 (or None for all rows) takes the maximum.  top_k 0, top_p 1 and min_p 0 keep
    all; None means that no row uses it.  A filter keeps every token that ties with the last one it
    keeps; top_p measures what top_k left; min_p is a share of the greatest probability.

    The draw is exact and stateless: argmax of logits / temperature + Gumbel noise, where the noise
    is a hash of the row's seed, the position of the new token and the token id.
    """
    best = logits.argmax(-1)
    if temperature is None:
        return best
    assert seeds is not None
    assert positions is not None
    greedy = temperature == 0
    # the greatest becomes 0, so that no temperature overflows
    scaled = logits - logits.amax(-1, keepdim=True)
    scaled = scaled / temperature.masked_fill(greedy, 1.0).unsqueeze(-1)
    kept = filter_logits(scaled, top_k, top_p, min_p)
    drawn = (kept + gumbel_noise(seeds, positions, logits.shape[-1])).argmax(-1)
    return torch.where(greedy, best, drawn)


def filter_logits(
    logits: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None
) -> Tensor:
    """Logits [B, V] with -inf for every token that the filters [B] drop."""
    threshold = torch.full_like(logits[:, 0], -torch.inf)  # [B]: tokens below it are dropped
    if min_p is not None:
        threshold = torch.maximum(threshold, logits.amax(-1) + min_p.log())
    if top_k is not None or top_p is not None:
        ordered = logits.sort(-1, descending=True).values
        if top_k is not None:
            last = (top_k - 1).clamp(0, logits.shape[-1] - 1)
            kth = ordered.gather(-1, last.unsqueeze(-1)).squeeze(-1)
            kth = kth.masked_fill(top_k == 0, -torch.inf)
            threshold = torch.maximum(threshold, kth)
            ordered = ordered.masked_fill(ordered < kth.unsqueeze(-1), -torch.inf)
        if top_p is not None:
            mass = ordered.softmax(-1).cumsum(-1)
            last = (mass < top_p.unsqueeze(-1)).sum(-1).clamp(max=logits.shape[-1] - 1)
            smallest = ordered.gather(-1, last.unsqueeze(-1)).squeeze(-1)
            # rounding must not drop the last token of a row that keeps all
            threshold = torch.maximum(threshold, smallest.masked_fill(top_p >= 1, -torch.inf))
    return logits.masked_fill(logits < threshold.unsqueeze(-1), -torch.inf)


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Gumbel(0, 1) noise [B, V] float32: a hash of seeds [B], positions [B] and token id."""
    token_ids = torch.arange(1, vocab_size + 1, device=seeds.device)
    streams = _mix64(seeds + (positions + 1) * GOLDEN_GAMMA)  # [B]
    bits = _mix64(streams.unsqueeze(-1) + token_ids * GOLDEN_GAMMA)  # [B, V]
    # 23 bits and a half: exact in float32, and never 0 or 1
    uniform = (_shift_right(bits, 41).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def _signed(x: int) -> int:
    return x - (1 << 64)


# SplitMix64 (Steele, Lea, Flood, 2014, "Fast splittable pseudorandom number generators")
GOLDEN_GAMMA = _signed(0x9E3779B97F4A7C15)
MIX_1 = _signed(0xBF58476D1CE4E5B9)
MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch's own shift keeps the sign


def _mix64(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * MIX_1
    x = (x ^ _shift_right(x, 27)) * MIX_2
    return x ^ _shift_right(x, 31)
