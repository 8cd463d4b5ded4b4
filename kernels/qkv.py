"""The first kernel of a decode layer: residual add, norm, q, k and v, rotation, cache write.

    h          = rmsnorm(residual + ..., norm_weight)                 see prologue.py
    q | k | v  = h @ weight.T + bias
    q, k       = x * cos + roll(x, K/2) * sin                         see reference.rope_tables
    cache      = k and v at (slot, position % C)

Rotation pairs dimension i of a head with i + K/2, so a program owns BLOCK_I such pairs of one head:
rows i and i + K/2 of the weight.  Gemma 3 normalises q and k over the whole head before it rotates
them, which no program holds: there the product is one launch and rotary.py the second.

Cost: (HQ + 2 HK) K D weights read once for 16 rows, 2 operations each a row: bound by memory
bandwidth, see matmul.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemcut.kernels.checks import check_cache, check_rotation, check_tensors, count_q_heads
from gemcut.kernels.matmul import (
    BLOCK_M,
    check_linear,
    halves,
    norm_linear,
    normed_product,
    pipeline,
    rows_of_weight,
)
from gemcut.kernels.prologue import check_prologue
from gemcut.kernels.rotary import check_head_norms, rope_and_store_
from gemcut.kernels.tiles import tuned

BLOCK_I = 16  # pairs of dimensions: 32 rows of the weight


@triton.jit(do_not_specialize=["M"])
def norm_qkv_kernel(
    residual_ptr, branch_ptr, summed_ptr,  # [M, D] x 3
    post_w_ptr, norm_w_ptr,  # [D] x 2
    w_ptr, bias_ptr,  # [(HQ + 2 HK) K, D], [(HQ + 2 HK) K]
    q_ptr, k_cache_ptr, v_cache_ptr,  # [M, HQ, K], [num_slots, HK, C, K] x 2
    slots_ptr, positions_ptr, cos_ptr, sin_ptr,  # [M], [M], [M, 1, K] x 2
    M, D, C, num_slots,
    EPS: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_POST_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = HEAD_DIM // 2
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1).to(tl.int64)
    offs_i = tl.program_id(2) * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_2i = tl.arange(0, 2 * BLOCK_I)  # BLOCK_I dimensions i, then their partners i + K/2
    dims = tl.program_id(2) * BLOCK_I + offs_2i % BLOCK_I
    rows = head * HEAD_DIM + dims + offs_2i // BLOCK_I * HALF
    mask_m, mask_i, mask_rows = offs_m < M, offs_i < HALF, dims < HALF
    # one program of all stores the sum
    mask_stored = offs_m < tl.where(tl.program_id(1) + tl.program_id(2) == 0, M, 0)

    acc = normed_product(
        residual_ptr, branch_ptr, summed_ptr, post_w_ptr, norm_w_ptr, w_ptr,
        offs_m, mask_m, mask_stored, rows, mask_rows, D,
        EPS, HAS_BRANCH, HAS_POST_NORM, BLOCK_M, 2 * BLOCK_I, BLOCK_D,
    )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows, mask=mask_rows, other=0.0).to(tl.float32)[None, :]
    low, high = halves(acc, BLOCK_M, BLOCK_I)

    mask = mask_m[:, None] & mask_i[None, :]
    if head < NUM_Q_HEADS + NUM_KV_HEADS:  # all but v
        offs = offs_m[:, None] * HEAD_DIM + offs_i[None, :]
        cos = tl.load(cos_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + offs + HALF, mask=mask, other=0.0).to(tl.float32)  # not negated
        low, high = low * cos - high * sin, high * cos + low * sin

    slot = tl.load(slots_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
    position = tl.load(positions_ptr + offs_m, mask=mask_m, other=-1).to(tl.int64)
    active, known = position >= 0, (slot >= 0) & (slot < num_slots)
    dtype = q_ptr.dtype.element_ty
    if head < NUM_Q_HEADS:
        # a slot outside the cache would show nowhere else
        lost = (active & (known == 0))[:, None]
        low, high = tl.where(lost, float("nan"), low), tl.where(lost, float("nan"), high)
        q_ptrs = q_ptr + (offs_m * NUM_Q_HEADS + head)[:, None] * HEAD_DIM + offs_i[None, :]
        tl.store(q_ptrs, low.to(dtype), mask=mask)
        tl.store(q_ptrs + HALF, high.to(dtype), mask=mask)
    else:
        is_key = head < NUM_Q_HEADS + NUM_KV_HEADS
        kv_head = head - NUM_Q_HEADS - tl.where(is_key, 0, NUM_KV_HEADS)
        place = (slot * NUM_KV_HEADS + kv_head) * C + position % C
        offs = place[:, None] * HEAD_DIM + offs_i[None, :]
        mask = mask & (active & known)[:, None]
        if is_key:
            tl.store(k_cache_ptr + offs, low.to(dtype), mask=mask)
            tl.store(k_cache_ptr + offs + HALF, high.to(dtype), mask=mask)
        else:
            tl.store(v_cache_ptr + offs, low.to(dtype), mask=mask)
            tl.store(v_cache_ptr + offs + HALF, high.to(dtype), mask=mask)


def _tile(rows: int, K: int, x: Tensor) -> dict[str, int]:
    half = max(8, triton.next_power_of_2(K // 2))  # 8: the least that tensor cores take
    rule = {"BLOCK_I": min(rows_of_weight(x, BLOCK_I), half), **pipeline(x)}
    return rule | tuned("norm_qkv", x, rows, x.shape[1], K)


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
    """The residual stream's next queries, rotated, and its keys and values in the cache.

    residual, branch [M, D]; post_weight, norm_weight [D]; weight [(HQ + 2 HK) K, D]; the rest as in
    `rope_and_store_` -> q [M, HQ, K], summed [M, D], which is `residual` itself without a branch.
    A slot outside the cache gives NaN and stores nothing.
    """
    check_linear(residual, weight, bias)
    check_tensors(
        residual, k_cache=k_cache, v_cache=v_cache,
        slots=slots, positions=positions, cos=cos, sin=sin,
    )  # fmt: skip
    M, D = residual.shape
    num_slots, HK, C, K = check_cache(k_cache, v_cache)
    HQ = count_q_heads("weight", weight.shape[0], HK, K)
    check_rotation(M, K, slots, positions, cos, sin)
    check_head_norms(residual, q_norm_weight, k_norm_weight, K)
    if q_norm_weight is not None:
        qkv, summed = norm_linear(residual, branch, post_weight, norm_weight, eps, weight, bias)
        q = rope_and_store_(
            qkv, k_cache, v_cache, slots, positions, cos, sin, q_norm_weight, k_norm_weight, eps
        )
        return q, summed

    summed = check_prologue(residual, branch, post_weight, norm_weight)
    q = torch.empty((M, HQ, K), device=residual.device, dtype=residual.dtype)
    if M:
        tile = _tile(weight.shape[0], K, residual)
        grid = (triton.cdiv(M, BLOCK_M), HQ + 2 * HK, triton.cdiv(K // 2, tile["BLOCK_I"]))
        norm_qkv_kernel[grid](
            residual_ptr=residual, branch_ptr=branch, post_w_ptr=post_weight,
            norm_w_ptr=norm_weight, summed_ptr=summed, w_ptr=weight, bias_ptr=bias,
            q_ptr=q, k_cache_ptr=k_cache, v_cache_ptr=v_cache,
            slots_ptr=slots, positions_ptr=positions, cos_ptr=cos, sin_ptr=sin,
            M=M, D=D, C=C, num_slots=num_slots, EPS=eps,
            HAS_BRANCH=branch is not None, HAS_POST_NORM=post_weight is not None,
            HAS_BIAS=bias is not None,
            NUM_Q_HEADS=HQ, NUM_KV_HEADS=HK, HEAD_DIM=K, **tile,
        )  # fmt: skip
    return q, summed
