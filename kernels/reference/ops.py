"""The oracles of a layer's ops and of both ends of the model, in plain torch.

Letters in shape comments: M tokens, D hidden size, F MLP width, V vocabulary, HQ and HK query and
KV heads, K head_dim, C the capacity of a cache slot, S partial sums.

All arithmetic is at least float32 and the result is rounded once, to the dtype of the input.  A
cache is made of slots, or of blocks that block_tables name (cache.py).  A negative position marks
an inactive row: nothing is stored for it, and its attention is zero.

A cache has the dtype of the activations, or it is float8_e4m3fn and has scales, k_scale and v_scale
[HK] in float32, by which a head's stored numbers are multiplied.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gemcut.kernels.outputs import takes_out
from gemcut.kernels.quantized_weight import QuantizedWeight, Weight, dequantized
from gemcut.kernels.reference.cache import cache_shape, store_
from gemcut.kernels.reference.sampling import gumbel_noise

GREATEST_FP8 = 448.0  # of float8_e4m3fn

# Embedding and norms


@takes_out
def embed(token_ids: Tensor, table: Weight, scale: float) -> Tensor:
    """Scaled rows of the table: token_ids [M], table [V, D] -> [M, D]."""
    if isinstance(table, QuantizedWeight):
        rows = dequantized(table[token_ids], torch.promote_types(table.dtype, torch.float32))
        return (rows * scale).to(table.dtype)
    return table.index_select(0, token_ids) * scale


@takes_out
def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last axis: x [..., D], weight [D] -> new tensor [..., D] in x's dtype.

    Gemma stores the weight as an offset from one: zeros are the identity.
    """
    wide = widened(x)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd * (1 + widened(weight))).to(x.dtype)


@takes_out
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


def widened(x: Tensor) -> Tensor:
    """The same numbers in float32, or in float64 where they are that already."""
    return x if x.dtype == torch.float64 else x.float()


def summed(x: Tensor) -> Tensor:
    """Rows [M, N] of themselves, or of their partial sums [S, M, N]."""
    return x.sum(0) if x.dim() == 3 else x


# Rotary embedding and cache


@takes_out
def rope_tables(
    positions: Tensor, inv_freq: Tensor, attention_scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The cos and sin by which `rope_and_store_` rotates, in every layer of one kind.

    positions [M], inv_freq [K/2] or [M, K/2] in float32 -> cos, sin [M, 1, K].  Dimension i pairs
    with i + K/2, so both halves hold the same angles, and the first half of sin is negated:

        rotated = x * cos + roll(x, K/2) * sin

    Angles are float32 (a bf16 position is wrong from 257 on); cos and sin are rounded to the dtype
    of the activations.
    """
    inv_freq = inv_freq.unsqueeze(-2)
    angles = positions.view(-1, 1, 1) * inv_freq  # [M, 1, K/2]
    cos, sin = angles.cos() * attention_scaling, angles.sin() * attention_scaling
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


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
    """Rotate queries and keys; write keys and values into the cache; return the queries.

    qkv [M, (HQ + 2 HK) * K], or partial sums of it [S, M, (HQ + 2 HK) * K], which are added up and
    rounded first; k_cache, v_cache [slots, HK, C, K], written at each token's slot and position, or
    [blocks, block_size, HK, K] with block_tables [slots, N]; slots, positions [M]; cos, sin
    [M, 1, K] -> [M, HQ, K].  Gemma 3 normalises q and k over each head first.
    """
    HK, K = cache_shape(k_cache, block_tables)[0], k_cache.shape[-1]
    heads = summed(qkv).to(cos.dtype).unflatten(-1, (-1, K))  # [M, HQ + 2 HK, K]
    q, k, v = heads.split([heads.shape[1] - 2 * HK, HK, HK], dim=1)
    if q_norm_weight is not None and k_norm_weight is not None:
        q, k = rmsnorm(q, q_norm_weight, eps), rmsnorm(k, k_norm_weight, eps)
    q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)

    active = positions >= 0
    where = slots[active], positions[active], block_tables
    store_(k_cache, stored(k[active], k_cache.dtype, k_scale), *where)
    store_(v_cache, stored(v[active], v_cache.dtype, v_scale), *where)
    return q.to(cos.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = widened(x)
    return wide * cos + wide.roll(x.shape[-1] // 2, -1) * sin


def stored(x: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """Keys or values [M, HK, K] as a cache of `dtype` holds them.

    With scales [HK]: divided by them, to the nearest of what e4m3 has, at most GREATEST_FP8.
    """
    if scale is None:
        return x.to(dtype)
    return (widened(x) / scale[:, None]).clamp(-GREATEST_FP8, GREATEST_FP8).to(dtype)


def loaded(x: Tensor, scale: Tensor | None) -> Tensor:
    """What a cache's numbers [HK, S, K] stand for, in float32 at least."""
    return widened(x) if scale is None else widened(x) * scale[:, None, None]


# Products


@takes_out
def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """Project rows: x [M, D], weight [N, D], bias [N] -> [M, N].

    torch itself sums in float32 and rounds once.
    """
    if isinstance(weight, QuantizedWeight):
        return _by_quantized(x, weight, bias).to(x.dtype)
    return F.linear(x, weight, bias)


def _by_quantized(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """The same with what a quantised weight stands for, and not rounded."""
    x = widened(x)
    return F.linear(x, dequantized(weight, x.dtype), None if bias is None else bias.to(x.dtype))


@takes_out
def skinny_linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """A product of few rows, as partial sums: x [M, D], weight [N, D], bias [N] -> [S, M, N].

    Their sum over S is x @ weight.T + bias, in float32 at least.  S is 1 here; a kernel cuts the
    sum over D where that keeps more of a GPU busy.
    """
    if isinstance(weight, QuantizedWeight):
        return _by_quantized(x, weight, bias).unsqueeze(0)
    return widened(F.linear(x, weight, bias)).unsqueeze(0)


@takes_out
def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up, with the tanh approximation: gate_up [M, 2 F], gate first -> [M, F]."""
    gate, up = widened(gate_up).chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)


@takes_out
def lm_head(x: Tensor, weight: Weight, softcap: float | None) -> Tensor:
    """Logits in float32 whatever x's dtype: x [M, D], weight [V, D] -> [M, V].

    bf16 logits tie: about one row in twenty would have two equal maxima.
    """
    if isinstance(weight, QuantizedWeight):
        logits = _by_quantized(x, weight)
    else:
        logits = F.linear(widened(x), widened(weight))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@takes_out
def lm_head_argmax(
    x: Tensor,
    weight: Weight,
    softcap: float | None,
    temperature: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The greatest logit and its token id, the lowest of equals: x [M, D] -> [1, M] x 2.

    With temperature, seeds and positions [N], of which row m takes those at rows[m], or its own
    where rows is None: the greatest of logits + temperature * noise, the token of `sample`.  A
    kernel gives the best of each of S ranges of the vocabulary, [S, M] each, of which `advance_`
    takes the greatest.
    """
    logits = lm_head(x, weight, softcap)
    if temperature is not None:
        assert seeds is not None
        assert positions is not None
        if rows is not None:
            temperature, seeds, positions = (x[rows] for x in (temperature, seeds, positions))
        noise = gumbel_noise(seeds, positions, logits.shape[-1])
        logits = logits + temperature.unsqueeze(-1) * noise
    best = logits.max(-1)
    return best.values.unsqueeze(0), best.indices.unsqueeze(0)


# What a decode step does in one kernel


@takes_out
def linear_geglu(x: Tensor, gate_up_weight: Weight) -> Tensor:
    """The first half of the MLP: x [M, D], gate_up_weight [2 F, D], gate first -> [M, F]."""
    return geglu(linear(x, gate_up_weight))


@takes_out
def linear_rope_and_store_(
    x: Tensor,
    weight: Weight,
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
    return rope_and_store_(linear(x, weight, bias), k_cache, v_cache, *rotation, block_tables)


# The beginning of a decode step


@takes_out
def begin_step(
    token_ids: Tensor,
    positions: Tensor,
    rows: Tensor | None,
    table: Weight,
    scale: float,
    norm_weight: Tensor,
    eps: float,
    inv_freqs: Sequence[Tensor],
    attention_scalings: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What stands before the first layer: positions, residual and its norm, cos and sin.

    token_ids, positions [N], of which row m takes those at rows[m], or its own where rows is None;
    table [V, D], norm_weight [D]; for each of R kinds of layer inv_freqs [K/2] or [M, K/2] and its
    scaling -> positions [M], residual [M, D], normed [M, D], cos, sin [R, M, 1, K].
    """
    if rows is not None:
        token_ids, positions = token_ids.index_select(0, rows), positions.index_select(0, rows)
    residual = embed(token_ids, table, scale)
    kinds = zip(inv_freqs, attention_scalings, strict=True)
    tables = [rope_tables(positions, inv_freq, c, table.dtype) for inv_freq, c in kinds]
    cos, sin = (torch.stack(of_kinds) for of_kinds in zip(*tables, strict=True))
    return positions, residual, rmsnorm(residual, norm_weight, eps), cos, sin
