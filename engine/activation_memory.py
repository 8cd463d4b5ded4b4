"""What a step holds at its peak, in bytes, beside the weights, the cache and the sampling state.

Counted from model.py and the ops, tensor by tensor, as the names that are still bound keep them
alive.  Letters are those of STYLE: T new tokens, S visible keys, B rows, D, F, V, HQ, HK, K.  The
reference ops keep the scores of a whole chunk, and float32 copies of what is not float32; the
kernels keep neither.

    prefill   the greatest moment of a layer of a chunk; or its states and the first token's choice
    decode    the greatest moment of a layer; or the choice: logits, and what is made of them

Left out are the logits of LOGITS_ROWS prompt tokens, which `score` and prompt_logprobs hold.
"""

import torch

from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.cuda_graphs import ROWS
from gemcut.engine.requests.sampling_params import MAX_DRAFT
from gemcut.kernels.kv_splits import MAX_GROUPS, MAX_SPLITS, most_partials
from gemcut.kernels.reference.ops import HEAD_ROWS

FLOAT = 4  # bytes of a float32
# Bytes for each row and vocabulary entry, float32 logits and all, where every setting is in use.
# Reference: logits, penalised, scaled and filtered ones, and three int64 of the noise's hash.
# Kernels: logits, biased and penalised ones, gathered counts (4) and marks of the prompt (1).
REFERENCE_CHOICE = 4 * FLOAT + 3 * 8
KERNELS_CHOICE = 4 * FLOAT + 1
# cuBLAS's own, from torch's allocator: 32 MiB on Hopper and later, 8 on what is older
CUBLAS_BYTES = 2**25
SPLIT = 64  # keys of decode attention's shortest split


def prefill_bytes(
    config: ModelConfig, dtype: torch.dtype, T: int, max_seq_len: int, *, is_reference: bool
) -> int:
    """The most that a prefill of up to `max_seq_len` tokens holds, in chunks of `T`."""
    T = min(T, max_seq_len)
    states = states_bytes(config, dtype, T)
    layer = _layer_bytes(config, dtype, T, max_seq_len, is_reference)
    return max(layer, states + _choice_bytes(config, dtype, 1, is_reference))


def states_bytes(config: ModelConfig, dtype: torch.dtype, tokens: int) -> int:
    """What a prefill yields of so many tokens: their hidden states."""
    return config.hidden_size * dtype.itemsize * tokens


def decode_bytes(
    config: ModelConfig, dtype: torch.dtype, B: int, max_seq_len: int, *, is_reference: bool
) -> int:
    """The most that a decode step of `B` rows holds, the choice of their tokens included.

    On the kernels a graph is captured for drafts too: of as many tokens as one pass over the
    weights takes.
    """
    if is_reference:  # which attends to rows of one length at once
        layer = B * _layer_bytes(config, dtype, 1, max_seq_len, is_reference)
        return max(layer, _choice_bytes(config, dtype, B, is_reference))
    tokens = max(B, min(ROWS, B * (1 + MAX_DRAFT)))
    # a window's ends may cut off a split and a group more
    partials = min(MAX_SPLITS + MAX_GROUPS, 2 + sum(most_partials(max_seq_len, SPLIT, False)))
    layer = _moments(config, dtype, tokens, is_reference)
    layer += tokens * config.num_q_heads * partials * (config.head_dim + 2) * FLOAT
    return max(layer, _choice_bytes(config, dtype, tokens, is_reference))


def _choice_bytes(config: ModelConfig, dtype: torch.dtype, B: int, is_reference: bool) -> int:
    """From the head's product to `B` token ids."""
    V = config.vocab_size
    if not is_reference:
        return B * V * KERNELS_CHOICE
    head = 2 * B * V * FLOAT  # the product from the weight's side, and turned
    if dtype != torch.float32:
        head += HEAD_ROWS * config.hidden_size * FLOAT  # a block of the head, widened
    return max(head, B * V * REFERENCE_CHOICE)


def _layer_bytes(
    config: ModelConfig, dtype: torch.dtype, T: int, max_seq_len: int, is_reference: bool
) -> int:
    """The most that a layer holds for T tokens of one sequence, attention included."""
    most = _moments(config, dtype, T, is_reference)
    if not is_reference:
        return most
    held = _held(config, dtype) * T
    for is_local in {config.is_local(layer) for layer in range(config.num_layers)}:
        S = max_seq_len
        if is_local and config.sliding_window is not None:
            S = min(S, config.sliding_window + T - 1)
        most = max(most, held + _attention_bytes(config, dtype, T, S, max_seq_len > S))
    return most


def _held(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes a token that a layer's loop keeps: residual, h, branch, q, attended, cos and sin."""
    kinds = 1 if config.rope_local == config.rope else 2
    q_size = config.num_q_heads * config.head_dim
    return (3 * config.hidden_size + 2 * q_size + 2 * kinds * config.head_dim) * dtype.itemsize


def _moments(config: ModelConfig, dtype: torch.dtype, rows: int, is_reference: bool) -> int:
    """The greatest moment of a layer for so many tokens, but for the scores of attention."""
    D, F, K = config.hidden_size, config.intermediate_size, config.head_dim
    q_size, qk_size = config.num_q_heads * K, (config.num_q_heads + config.num_kv_heads) * K
    qkv_size = qk_size + config.num_kv_heads * K
    size = dtype.itemsize
    if not is_reference:
        mlp = 3 * F * size  # gate_up, activated
        rope = (qkv_size + q_size) * size
        return rows * (_held(config, dtype) + max(mlp, rope, D * size, q_size * size))
    wide = 0 if dtype == torch.float32 else FLOAT
    # gate_up; gelu(gate), which up multiplies in place; that rounded
    mlp = 2 * F * (size + wide) + F * FLOAT + (F * size if wide else 0)
    # qkv; normed q and k joined; x * cos, x rolled, and the sum of both
    normed = size if config.has_qk_norm else 0
    rope = qkv_size * size + qk_size * (normed + wide + 3 * FLOAT)
    # normed branch; x * rstd, and that times 1 + weight
    norm = D * (size + wide + 2 * FLOAT)
    return rows * (_held(config, dtype) + max(mlp, rope, norm))


def _attention_bytes(config: ModelConfig, dtype: torch.dtype, T: int, S: int, is_ring: bool) -> int:
    """What the reference's attention holds: scores and weights [HQ, T, S], the mask [T, S]."""
    # q by KV head, the sum over keys, and that by token
    total = 3 * T * config.num_q_heads * config.head_dim * FLOAT
    total += (2 * config.num_q_heads * FLOAT + 1) * T * S
    kv_bytes = 2 * S * config.num_kv_heads * config.head_dim
    if dtype != torch.float32 or is_ring:
        total += kv_bytes * FLOAT
    return total
