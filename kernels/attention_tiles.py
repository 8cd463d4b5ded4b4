"""Code shared by prefill and decode attention: tiles of a ring, one step of online softmax, checks.

Scores come from tl.dot in float32.  Softmax runs in base 2: log2(e) is part of the factor that
multiplies a score, after the softcap where there is one, so that either way

    p = exp2(s * factor - m_i)

is one fused multiply-add and one exp2.  The mask comes after the softcap: a capped -inf would be
-softcap, and leak.  The running maximum starts at a finite number, so that a row that has seen no
key computes exp2(-inf) = 0 and never inf - inf.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from gemcut.kernels.checks import check_cache, check_softcap, check_tensors, require
from gemcut.kernels.gelu import tanh

LOG2E = tl.constexpr(1.4426950408889634)
MAX_POSITION = tl.constexpr(2**40)  # sums with it stay within 64 bits
NO_MAXIMUM = tl.constexpr(-1.0e30)  # below every score, yet finite


@triton.jit
def ring_tile(
    head_ptr,  # one slot's head [C, K]
    first, begin, num_keys, C,
    HEAD_DIM: tl.constexpr,
    IS_LOCAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Keys or values number `begin` and on of the num_keys that start at index `first`.

    [BLOCK_N, BLOCK_K], zero before number 0, past num_keys and past HEAD_DIM.  As num_keys <= C,
    the ring wraps at most once, and without a window, where `first` is 0, never.
    """
    offs_k = tl.arange(0, BLOCK_K)
    index = begin + tl.arange(0, BLOCK_N)
    # unsigned: a number below 0 is a great one
    seen = index.to(tl.uint32, bitcast=True) < num_keys.to(tl.uint32, bitcast=True)
    mask = seen[:, None] & (offs_k < HEAD_DIM)[None, :]
    if IS_LOCAL:
        index += first
        index = tl.where(index >= C, index - C, index)
    return tl.load(head_ptr + index[:, None] * HEAD_DIM + offs_k[None, :], mask=mask, other=0.0)


@triton.jit
def softmax_step(
    q, k, v,  # [BLOCK_M, BLOCK_K], [BLOCK_N, BLOCK_K] twice
    acc, m_i, l_i,  # [BLOCK_M, BLOCK_K], [BLOCK_M] twice, float32
    is_edge,  # whether a query does not see all keys of the tile
    offs_q, offs_n, W,  # positions of queries and keys, from the same origin
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    IS_LOCAL: tl.constexpr,
    FAST_TANH: tl.constexpr,
):  # fmt: skip
    """One tile of keys more: the new acc, m_i, l_i."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    p, alpha, m_i, l_i = softmax_tile(
        s, m_i, l_i, is_edge, offs_q, offs_n, W, SCALE, SOFTCAP, IS_LOCAL, FAST_TANH
    )
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return acc, m_i, l_i


@triton.jit
def softmax_tile(
    s, m_i, l_i,  # [BLOCK_M, BLOCK_N], [BLOCK_M] twice, float32
    is_edge, offs_q, offs_n, W,  # as above
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    IS_LOCAL: tl.constexpr,
    FAST_TANH: tl.constexpr,
):  # fmt: skip
    """Weights p of a tile's products s, the factor of all that came before, the new m_i, l_i."""
    if SOFTCAP is None:
        factor: tl.constexpr = SCALE * LOG2E
    else:
        s = tanh(s * (SCALE / SOFTCAP), FAST_TANH)
        factor: tl.constexpr = SOFTCAP * LOG2E
    if is_edge:
        visible = offs_q[:, None] >= offs_n[None, :]
        if IS_LOCAL:
            visible &= offs_q[:, None] - offs_n[None, :] < W
        s = tl.where(visible, s, -float("inf"))
    m_new = tl.maximum(m_i, tl.max(s, axis=1) * factor)
    p = tl.exp2(s * factor - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    l_i = l_i * alpha + tl.sum(p, axis=1)
    return p, alpha, m_new, l_i


def check_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
) -> None:
    """What holds for every query tensor [..., HQ, K]; ValueError otherwise."""
    check_tensors(q, k_cache=k_cache, v_cache=v_cache)
    _, HK, C, K = check_cache(k_cache, v_cache)
    HQ = q.shape[-2]
    require(q.shape[-1] == K, f"q has head_dim {q.shape[-1]}, the cache {K}")
    require(HQ > 0 and HQ % HK == 0, f"{HQ} query heads cannot share {HK} KV heads evenly")
    require(C * K < 2**31, f"capacity {C} x head_dim {K} is not below 2**31")
    require(q.stride(-1) == 1, f"q has strides {list(q.stride())}, the last must be 1")
    require(0 < scale < math.inf, f"scale {scale} is not above 0 and finite")
    check_softcap(softcap)
    require(
        sliding_window is None or sliding_window >= 1, f"sliding_window {sliding_window} is below 1"
    )
