"""The bytes that a step holds at its peak, beside the weights, the cache and the sampling state.

Counted from model.py and the ops, tensor by tensor, as the names that are still bound keep them
alive.  Letters: T new tokens, S visible keys, B rows, D hidden size, F MLP width, V vocabulary, HQ
and HK query and KV heads, K head_dim.  The ops in plain torch, reference and cpu, keep the scores
of a whole chunk, and float32 copies of tensors that are not float32; the kernels keep neither.

    prefill   the greatest moment of a layer of a chunk; or its states and the first token's choice
    decode    the greatest moment of a layer; or the choice: logits, and what is made of them

Left out are the logits of LOGITS_ROWS prompt tokens, which `score` and prompt_logprobs hold.
"""

from types import ModuleType

import torch

from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.cuda_graphs import ROWS
from gemcut.engine.placement import is_plain_torch
from gemcut.engine.requests.sampling_params import MAX_DRAFT
from gemcut.kernels import cpu, reference
from gemcut.kernels.checks import FP8
from gemcut.kernels.cpu import JOINT_QUERIES, block_of_queries
from gemcut.kernels.cpu_products import HEAD_ROWS
from gemcut.kernels.kv_splits import MAX_SPLITS, least_split, most_splits

FLOAT = 4  # bytes of a float32
# Bytes for each row and vocabulary entry, float32 logits and all, where every setting is in use.
# Plain torch: logits and penalised ones, and three int64 of the noise's hash.
# Kernels: logits, biased and penalised ones, gathered counts (4) and marks of the prompt (1); when
# the counts are gone, the draw's list (4).
TORCH_CHOICE = 2 * FLOAT + 3 * 8
KERNELS_CHOICE = 4 * FLOAT + 1
# cuBLAS's own, from torch's allocator: 32 MiB on Hopper and later, 8 on what is older
CUBLAS_BYTES = 2**25


def prefill_bytes(
    config: ModelConfig,
    dtype: torch.dtype,
    T: int,
    max_seq_len: int,
    ops: ModuleType,
    cache_dtype: torch.dtype | None = None,
) -> int:
    """The most that a prefill of up to `max_seq_len` tokens holds, in chunks of `T`.

    cache_dtype: that of the cache where it is another.
    """
    T = min(T, max_seq_len)
    held = _held(config, dtype) * T
    layer = held + max(
        _moment(config, dtype, T, ops),
        _attention_bytes(config, dtype, T, max_seq_len, ops, cache_dtype or dtype),
    )
    return max(layer, states_bytes(config, dtype, T) + _choice_bytes(config, dtype, 1, ops))


def states_bytes(config: ModelConfig, dtype: torch.dtype, tokens: int) -> int:
    """What a prefill yields of so many tokens: their hidden states."""
    return config.hidden_size * dtype.itemsize * tokens


def decode_bytes(
    config: ModelConfig,
    dtype: torch.dtype,
    B: int,
    max_seq_len: int,
    ops: ModuleType,
    cache_dtype: torch.dtype | None = None,
) -> int:
    """The most that a decode step of `B` rows holds, the choice of their tokens included.

    On the kernels a graph is captured for drafts too: of as many tokens as one pass over the
    weights takes.
    """
    if is_plain_torch(ops):
        tokens = B
        attention = _attention_bytes(config, dtype, 1, max_seq_len, ops, cache_dtype or dtype)
        attention *= B if ops is cpu else 1  # which attends to rows of one length at once
        layer = max(_moment(config, dtype, B, ops), attention)
    else:
        tokens = max(B, min(ROWS, B * (1 + MAX_DRAFT)))
        # a window's ends may cut off a split or two more
        split = least_split(config.num_q_heads, config.num_kv_heads, config.head_dim)
        partials = min(MAX_SPLITS, 2 + most_splits(max_seq_len, split, False))
        layer = _moment(config, dtype, tokens, ops)
        layer += tokens * config.num_q_heads * partials * (config.head_dim + 2) * FLOAT
    return max(tokens * _held(config, dtype) + layer, _choice_bytes(config, dtype, tokens, ops))


def _choice_bytes(config: ModelConfig, dtype: torch.dtype, B: int, ops: ModuleType) -> int:
    """From the head's product to `B` token ids."""
    V, D = config.vocab_size, config.hidden_size
    if not is_plain_torch(ops):
        return B * V * KERNELS_CHOICE
    head = B * V * FLOAT
    if dtype != torch.float32:  # the head is widened, whole or in blocks
        head += (min(HEAD_ROWS, V) if ops is cpu else V) * D * FLOAT
    return max(head, B * V * TORCH_CHOICE)


def _held(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes a token that a layer's loop keeps: residual, h, branch, q, attended, cos and sin."""
    kinds = 1 if config.rope_local == config.rope else 2
    q_size = config.num_q_heads * config.head_dim
    return (3 * config.hidden_size + 2 * q_size + 2 * kinds * config.head_dim) * dtype.itemsize


def _moment(config: ModelConfig, dtype: torch.dtype, rows: int, ops: ModuleType) -> int:
    """The most that an op of a layer holds for so many tokens, except the scores of attention."""
    D, F, K = config.hidden_size, config.intermediate_size, config.head_dim
    q_size, k_size = config.num_q_heads * K, config.num_kv_heads * K
    qk_size, qkv_size = q_size + k_size, q_size + 2 * k_size
    size = dtype.itemsize
    if not is_plain_torch(ops):
        mlp = 3 * F * size  # gate_up, activated
        rope = (qkv_size + q_size) * size
        return rows * max(mlp, rope, D * size, q_size * size)
    wide = 0 if dtype == torch.float32 else FLOAT
    normed = size if config.has_qk_norm else 0
    # gate_up; gelu(gate)
    mlp = 2 * F * (size + wide) + F * FLOAT
    # qkv; normed q and k
    rope = qkv_size * size + qk_size * normed
    if ops is cpu:
        # up multiplies gelu(gate) in place; that rounded
        mlp += F * size if wide else 0
        # q and k joined; x * cos, x rolled, and the sum of both
        rope += qk_size * (wide + 3 * FLOAT)
    else:
        # times up
        mlp += F * FLOAT
        # of q, then of k beside the rotated q: x * cos, x rolled, and that times sin
        rope += max(q_size * (wide + 3 * FLOAT), q_size * size + k_size * (wide + 3 * FLOAT))
        rope -= q_size * size  # a prefill keeps nothing that was attended
    # normed branch; x * rstd, and that times 1 + weight
    norm = D * (size + wide + 2 * FLOAT)
    return rows * max(mlp, rope, norm)


def _attention_bytes(
    config: ModelConfig,
    dtype: torch.dtype,
    T: int,
    max_seq_len: int,
    ops: ModuleType,
    cache_dtype: torch.dtype,
) -> int:
    """The most that attention of T tokens of one sequence holds, in any layer."""
    if not is_plain_torch(ops):
        return 0  # as much as `_moment` counts, or a workspace
    return max(
        _scores_bytes(config, dtype, T, max_seq_len, config.is_local(layer), ops, cache_dtype)
        for layer in range(config.num_layers)
    )


def _scores_bytes(
    config: ModelConfig,
    dtype: torch.dtype,
    T: int,
    max_seq_len: int,
    is_local: bool,
    ops: ModuleType,
    cache_dtype: torch.dtype,
) -> int:
    """What attention in plain torch holds: scores [HQ, T, S], masks [T, S], keys and values."""
    S = max_seq_len
    if is_local and config.sliding_window is not None:
        S = min(S, config.sliding_window + T - 1)
    HQ, HK, K = config.num_q_heads, config.num_kv_heads, config.head_dim
    is_fp8 = cache_dtype == FP8
    if ops is reference:
        # scores, masked ones, weights; the mask and its contrary; or values on their way from fp8
        scores = max((3 * HQ * FLOAT + 2) * T * S, is_fp8 * 2 * S * HK * K * FLOAT)
        return scores + 2 * S * HQ * K * FLOAT  # keys and values of every head
    total = 0
    if cache_dtype != torch.float32 or max_seq_len > S:  # keys and values, widened or out of a ring
        total += 2 * S * HK * K * FLOAT
    # of fp8: a ring's keys and values, and values in 16 bits
    widening = is_fp8 * (2 * (max_seq_len > S) + 2) * S * HK * K
    if T <= JOINT_QUERIES:
        # q by KV head, the sum over keys, and that by token; scores and weights, the mask
        rest = 3 * T * HQ * K * FLOAT + (2 * HQ * FLOAT + 1) * T * S
        return total + max(rest, widening)
    # q, outputs in blocks and joined; of a block scores and weights of one KV head, its values
    # in the order of the product, the mask
    queries = block_of_queries(T)
    total += 3 * T * HQ * K * FLOAT + 2 * queries * HQ * K * FLOAT + S * K * FLOAT
    return total + max((2 * HQ // HK * FLOAT + 1) * queries * S, widening)
