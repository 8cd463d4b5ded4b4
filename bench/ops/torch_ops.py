"""Each op as a model in plain torch writes it: what "torch" and "torch.compile" stand for here.

Names and signatures are those of the oracles, but not their care: what a model computes in bfloat16
is rounded after each operation here, and nothing reads the device.  How far these lie from the
oracle is what a peer may err.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def embed(token_ids: Tensor, table: Tensor, scale: float) -> Tensor:
    return F.embedding(token_ids, table) * scale


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * (1.0 + weight.float())).type_as(x)


def add_rmsnorm_(
    residual: Tensor, x: Tensor, post_weight: Tensor | None, next_weight: Tensor, eps: float
) -> Tensor:
    residual.add_(x if post_weight is None else rmsnorm(x, post_weight, eps))
    return rmsnorm(residual, next_weight, eps)


def rope_tables(
    positions: Tensor, inv_freq: Tensor, attention_scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    angles = positions.unsqueeze(-1).float() * inv_freq
    cos, sin = angles.cos() * attention_scaling, angles.sin() * attention_scaling
    cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    return cos.to(dtype).unsqueeze(1), sin.to(dtype).unsqueeze(1)


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
    _, HK, C, K = k_cache.shape
    heads = qkv.view(qkv.shape[0], -1, K)
    q, k, v = heads.split([heads.shape[1] - 2 * HK, HK, HK], dim=1)
    if q_norm_weight is not None and k_norm_weight is not None:
        q, k = rmsnorm(q, q_norm_weight, eps), rmsnorm(k, k_norm_weight, eps)
    q, k = (x * cos + x.roll(K // 2, -1) * sin for x in (q, k))
    k_cache[slots, :, positions % C] = k
    v_cache[slots, :, positions % C] = v
    return q


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
    """Over the whole slot with a mask, as models with a static cache do."""
    B, T, HQ, K = q.shape
    HK, C = k_cache.shape[1:3]
    k, v = k_cache[slots], v_cache[slots]  # [B, HK, C, K]
    visible = _visible(positions, T, C, sliding_window)  # [B, T, C]
    grouped = q.view(B, T, HK, HQ // HK, K).permute(0, 2, 3, 1, 4)  # [B, HK, G, T, K]
    out = _attend(grouped, k.unsqueeze(2), v.unsqueeze(2), visible[:, None, None], scale, softcap)
    return out.permute(0, 3, 1, 2, 4).reshape(B, T, HQ, K)


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
    """Of chunks that are equally long."""
    chunks = q.unflatten(0, (slots.shape[0], -1))
    settings = (scale, softcap, sliding_window)
    return attention_decode(chunks, k_cache, v_cache, slots, starts, *settings).flatten(0, 1)


def _visible(starts: Tensor, T: int, C: int, sliding_window: int | None) -> Tensor:
    """Which places of a ring of C the queries from starts [B] on see: [B, T, C]."""
    queries = starts.view(-1, 1, 1) + torch.arange(T, device=starts.device).view(T, 1)
    newest = starts.view(-1, 1, 1) + T - 1
    keys = newest - (newest - torch.arange(C, device=starts.device)) % C  # position at each place
    visible = (keys >= 0) & (keys <= queries)
    return visible if sliding_window is None else visible & (keys > queries - sliding_window)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float | None
) -> Tensor:
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1, dtype=torch.float32)
    return weights.to(q.dtype) @ v


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias).unsqueeze(0)  # one partial sum


def geglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def lm_head(x: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    logits = F.linear(x, weight).float()
    return logits if softcap is None else (logits / softcap).tanh() * softcap


def lm_head_argmax(
    x: Tensor, weight: Tensor, softcap: float | None, counters: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    best = lm_head(x, weight, softcap).max(-1)
    return best.values, best.indices


def linear_geglu(x: Tensor, gate_up_weight: Tensor) -> Tensor:
    return geglu(F.linear(x, gate_up_weight))


def linear_rope_and_store_(
    x: Tensor,
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
    eps: float = 1e-6,
) -> Tensor:
    qkv = F.linear(x, weight, bias)
    store = (k_cache, v_cache, slots, positions, cos, sin, q_norm_weight, k_norm_weight, eps)
    return rope_and_store_(qkv, *store)


def penalize(
    logits: Tensor,
    output_counts: Tensor,
    in_prompt: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> Tensor:
    repetition, presence, frequency = (x.unsqueeze(-1) for x in (repetition, presence, frequency))
    generated = output_counts > 0
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(generated | in_prompt, repeated, logits)
    return logits - frequency * output_counts - presence * generated


def sample(
    logits: Tensor,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """With torch's own random numbers; draws by an exponential race, which needs no sync."""
    if temperature is None:
        return logits.argmax(-1)
    ordered, ids = (logits / temperature.unsqueeze(-1)).sort(-1, descending=True)
    if top_k is not None:
        ranks = torch.arange(logits.shape[-1], device=logits.device)
        ordered = ordered.masked_fill(ranks >= top_k.unsqueeze(-1), -torch.inf)
    probabilities = ordered.softmax(-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p.unsqueeze(-1), 0.0)
    race = probabilities / torch.empty_like(probabilities).exponential_()
    return ids.gather(-1, race.argmax(-1, keepdim=True)).squeeze(-1)
