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

from gemcut.kernels.reference.attention import attention_decode, attention_prefill
from gemcut.kernels.reference.dtypes import WIDE, constant, rounded, times, times_, widened
from gemcut.kernels.reference.sampling import (
    advance_,
    filter_logits,
    gumbel_noise,
    penalize,
    sample,
)

__all__ = [
    "add_rmsnorm_",
    "advance_",
    "attention_decode",
    "attention_prefill",
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

FEW_ROWS, BLOCKS = 16, 4  # see linear
HEAD_ROWS = 256  # see lm_head


# Embedding and norms


def embed(token_ids: Tensor, table: Tensor, scale: float) -> Tensor:
    """Scaled rows of the table: token_ids [M], table [V, D] -> [M, D]."""
    return table.index_select(0, token_ids) * scale


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last axis: x [..., D], weight [D] -> new tensor [..., D] in x's dtype.

        y = x * rsqrt(mean(x ** 2) + eps) * (1 + weight)

    Gemma stores the weight as an offset from one: zeros are the identity.
    """
    dtype = x.dtype
    if dtype not in WIDE:
        x = x.float()
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    eps_ = constant(eps, x.dtype, x.device)
    y = x * torch.addcmul(eps_, norm, norm, value=1 / x.shape[-1]).rsqrt_()
    y = torch.addcmul(y, y, weight)
    return y if dtype in WIDE else y.to(dtype)


def add_rmsnorm_(
    residual: Tensor, x: Tensor, post_weight: Tensor | None, next_weight: Tensor, eps: float
) -> Tensor:
    """Add a branch to the residual stream, in place, and normalise the sum for the next branch.

    residual [M, D], x [M, D] or partial sums of it [S, M, D]; weights [D] -> [M, D].  With
    `post_weight` (the sandwich norm of Gemma 2 and 3) the branch is normalised before it is added.
    The sum is rounded to the residual's dtype before the norm reads it.
    """
    x = summed(x)
    if post_weight is not None:
        x = rmsnorm(x, post_weight, eps)
    residual.add_(x)
    return rmsnorm(residual, next_weight, eps)


def summed(x: Tensor) -> Tensor:
    """Rows [M, N] of themselves, or of their partial sums [S, M, N]."""
    if x.dim() == 2:
        return x
    return x[0] if x.shape[0] == 1 else x.sum(0)


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
    return rounded(cos, dtype), rounded(sin, dtype)


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

    qkv [M, (HQ + 2 HK) * K], or partial sums of it [S, M, (HQ + 2 HK) * K], which are added up and
    rounded first; k_cache, v_cache [slots, HK, C, K], written at each token's slot and position;
    slots, positions [M]; cos, sin [M, 1, K] -> [M, HQ, K].  Gemma 3 normalises q and k over each
    head first.
    """
    _, HK, C, K = k_cache.shape
    qkv = rounded(summed(qkv), k_cache.dtype)
    HQ = qkv.shape[1] // K - 2 * HK
    heads = qkv.view(-1, HQ + 2 * HK, K)
    qk, v = heads.split_with_sizes([HQ + HK, HK], dim=1)  # `split` is Python, and costs 2 us more
    if q_norm_weight is not None and k_norm_weight is not None:
        q, k = qk.split_with_sizes([HQ, HK], dim=1)
        qk = torch.cat([rmsnorm(q, q_norm_weight, eps), rmsnorm(k, k_norm_weight, eps)], dim=1)
    qk = _rotated(widened(qk), cos, sin)
    q, k = qk.split_with_sizes([HQ, HK], dim=1)

    on_host = positions.tolist()
    if min(on_host, default=0) < 0:
        active = positions >= 0
        slots, positions, k, v = slots[active], positions[active], k[active], v[active]
    places = (slots, positions % C if max(on_host, default=0) >= C else positions)
    k_cache.transpose(1, 2).index_put_(places, rounded(k, k_cache.dtype))
    v_cache.transpose(1, 2).index_put_(places, rounded(v, v_cache.dtype))
    return rounded(q, qkv.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


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


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A product of few rows, as partial sums: x [M, D], weight [N, D], bias [N] -> [S, M, N].

    Their sum over S is x @ weight.T + bias, in float32 at least.  S is 1 here; a kernel cuts the
    sum over D where that keeps more of a GPU busy.
    """
    return widened(linear(x, weight, bias)).unsqueeze(0)


def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up, with the tanh approximation: gate_up [M, 2 F], gate first -> [M, F]."""
    half = gate_up.shape[-1] // 2
    gate, up = widened(gate_up).split_with_sizes([half, half], dim=-1)
    return rounded(F.gelu(gate, approximate="tanh").mul_(up), gate_up.dtype)


def lm_head(x: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    """Logits in float32 whatever x's dtype: x [M, D], weight [V, D] -> [M, V].

    bf16 logits tie: about one row in twenty would have two equal maxima.
    """
    x = widened(x)
    if softcap is not None:
        x = times(x, 1 / softcap)
    if weight.dtype in WIDE:
        logits = linear(x, weight)
    else:  # a wide copy of the whole head takes eight times as long as one block after the other
        logits = torch.cat([linear(x, rows.float()) for rows in weight.split(HEAD_ROWS)], -1)
    return logits if softcap is None else times_(logits.tanh_(), softcap)


def lm_head_argmax(
    x: Tensor, weight: Tensor, softcap: float | None, counters: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The greatest logit and its token id, the lowest of equals: x [M, D] -> [M] float32, [M].

    `counters` is scratch of the kernel.
    """
    best = lm_head(x, weight, softcap).max(-1)
    return best.values, best.indices


# What a decode step does in one kernel


def linear_geglu(x: Tensor, gate_up_weight: Tensor) -> Tensor:
    """The first half of the MLP: x [M, D], gate_up_weight [2 F, D], gate first -> [M, F]."""
    return geglu(linear(x, gate_up_weight))


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
    """The first part of a layer, up to the cache write: x [M, D] -> q [M, HQ, K]."""
    rotation = (slots, positions, cos, sin, q_norm_weight, k_norm_weight, eps)
    return rope_and_store_(linear(x, weight, bias), k_cache, v_cache, *rotation)
