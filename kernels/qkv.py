"""The first kernel of a decode layer: q, k and v, rotation, cache write.

    q | k | v  = x @ weight.T + bias
    q, k       = x * cos + roll(x, K/2) * sin                         see reference.rope_tables
    cache      = k and v at (slot, position % C)

Rotation pairs dimension i of a head with i + K/2, so a program owns BLOCK_I such pairs of one head:
rows i and i + K/2 of the weight.  Gemma 3 normalises q and k over the whole head before it rotates
them, which no program holds: there the product is one launch and rotary.py the second.  So it is
with int4, whose heads make too few programs for its instructions.

Cost: (HQ + 2 HK) K D weights read once for 16 rows, 2 operations each a row: bound by memory
bandwidth, see skinny_product.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemcut.kernels.checks import (
    cache_arguments,
    check_cache,
    check_rotation,
    check_tensors,
    count_q_heads,
)
from gemcut.kernels.dependent_launch import (
    dependent_launch,
    let_next_begin,
    prefetch_and_wait,
    prefetched_bytes,
)
from gemcut.kernels.gpu_arch import PROCESSORS, arch_of
from gemcut.kernels.matmul import skinny_linear
from gemcut.kernels.product_tiles import (
    BLOCK_M,
    BLOCK_N,
    check_linear,
    is_int4,
    leaves_places,
    operands,
    pipeline,
    rows_of_weight,
    tuned_tile,
)
from gemcut.kernels.quantized_weight import Weight
from gemcut.kernels.rotary import check_head_norms, place_of, rope_and_store_, stored
from gemcut.kernels.skinny_product import halves, prefetch_scales, product


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["slots_ptr", "positions_ptr"])
def linear_rope_and_store_kernel(
    x_ptr, w_ptr, scales_ptr, zeros_ptr,  # [M, D], [N, D], [N, G] x 2; N = (HQ + 2 HK) K
    bias_ptr,  # [N]
    q_ptr, k_cache_ptr, v_cache_ptr,  # [M, HQ, K], [slots, HK, C, K] or in blocks x 2
    slots_ptr, positions_ptr, cos_ptr, sin_ptr,  # [M], [M], [M, 1, K] x 2
    k_scale_ptr, v_scale_ptr,  # [HK] x 2 where the cache is fp8
    block_table_ptr,  # [slots, N] where the cache is in blocks, [blocks, block_size, HK, K]
    stride_x_m, stride_k_s, stride_k_h, stride_table,  # v as k
    M, D, C, num_slots, num_blocks,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KV_STRIDE: tl.constexpr,  # from a token to the next
    KV_BLOCK: tl.constexpr,  # tokens of a block; 0: slots
    IS_EVEN: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    IN_STEPS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PREFETCH: tl.constexpr,
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
    tokens, weight = (x_ptr, stride_x_m, offs_m, mask_m), (w_ptr, scales_ptr, zeros_ptr)
    prefetch_scales(weight, rows, mask_rows, 0, D, FORMAT, GROUP)
    prefetch_and_wait(w_ptr, rows, 0, D, DEPENDENT, PREFETCH, FORMAT)

    acc = product(
        tokens, weight, rows, mask_rows, D, 0, D,
        IS_EVEN, HAS_TAIL, IN_STEPS, FORMAT, GROUP, BLOCK_M, 2 * BLOCK_I, BLOCK_D,
    )  # fmt: skip
    let_next_begin(DEPENDENT)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows, mask=mask_rows, other=0.0).to(tl.float32)[:, None]
    low, high = halves(acc, BLOCK_I, BLOCK_M)

    mask = mask_i[:, None] & mask_m[None, :]
    if head < NUM_Q_HEADS + NUM_KV_HEADS:  # all but v
        offs = offs_m[None, :] * HEAD_DIM + offs_i[:, None]
        cos = tl.load(cos_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + offs + HALF, mask=mask, other=0.0).to(tl.float32)  # not negated
        low, high = low * cos - high * sin, high * cos + low * sin

    slot = tl.load(slots_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
    position = tl.load(positions_ptr + offs_m, mask=mask_m, other=-1).to(tl.int64)
    active = position >= 0
    place, known = place_of(
        slot, position, block_table_ptr, stride_table, stride_k_s, num_slots, num_blocks, C,
        KV_STRIDE, KV_BLOCK,
    )  # fmt: skip
    dtype = q_ptr.dtype.element_ty
    if head < NUM_Q_HEADS:
        # a place outside the cache would show nowhere else
        lost = (active & (known == 0))[None, :]
        low, high = tl.where(lost, float("nan"), low), tl.where(lost, float("nan"), high)
        q_ptrs = q_ptr + (offs_m * NUM_Q_HEADS + head)[None, :] * HEAD_DIM + offs_i[:, None]
        tl.store(q_ptrs, low.to(dtype), mask=mask)
        tl.store(q_ptrs + HALF, high.to(dtype), mask=mask)
    else:
        is_key = head < NUM_Q_HEADS + NUM_KV_HEADS
        kv_head = head - NUM_Q_HEADS - tl.where(is_key, 0, NUM_KV_HEADS)
        offs = (place + kv_head * stride_k_h)[None, :] + offs_i[:, None]
        mask = mask & (active & known)[None, :]
        cached: tl.constexpr = k_cache_ptr.dtype.element_ty
        scale = 1.0
        if k_scale_ptr is not None:
            scale = tl.load(tl.where(is_key, k_scale_ptr, v_scale_ptr) + kv_head)
        first, second = stored(low, scale, cached), stored(high, scale, cached)
        if is_key:
            tl.store(k_cache_ptr + offs, first, mask=mask)
            tl.store(k_cache_ptr + offs + HALF, second, mask=mask)
        else:
            tl.store(v_cache_ptr + offs, first, mask=mask)
            tl.store(v_cache_ptr + offs + HALF, second, mask=mask)


def _tile(num_heads: int, K: int, x: Tensor, weight: Weight) -> dict[str, int]:
    """BLOCK_I pairs: 64 rows of the weight, or 32 where those are too few for all processors.

    Half as many rows of twice as many columns are as many bytes on their way, to twice as many
    processors; a warpgroup instruction takes no fewer than 64 rows, so these are tensor core
    instructions of a warp.
    """
    half = max(8, triton.next_power_of_2(K // 2))  # 8: the least that tensor cores take
    block_i = min(rows_of_weight(x, BLOCK_N // 2), half)
    blocks = num_heads * triton.cdiv(K // 2, block_i)
    rule = {"BLOCK_I": block_i, **pipeline(x, weight, blocks)}
    is_few = block_i >= 16 and blocks <= PROCESSORS.get(arch_of(x.device), 0)
    if is_few and isinstance(weight, Tensor):  # bytes take steps of more columns instead
        rule |= {"BLOCK_I": block_i // 2, "BLOCK_D": 2 * rule["BLOCK_D"], "num_stages": 6}
    return rule | tuned_tile("linear_rope_and_store", x, weight, num_heads * K, x.shape[1], K)


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
    """Few rows' queries, rotated, and their keys and values in the cache: x [M, D] -> [M, HQ, K].

    weight [(HQ + 2 HK) K, D], bias [(HQ + 2 HK) K]; the rest as in `rope_and_store_`.  A place
    outside the cache gives NaN and stores nothing.
    """
    check_linear(x, weight, bias)
    num_slots, HK, C, K = check_cache(x, k_cache, v_cache, k_scale, v_scale, block_tables)
    check_tensors(x, slots=slots, positions=positions, cos=cos, sin=sin)
    M, D = x.shape
    HQ = count_q_heads("weight", weight.shape[0], HK, K)
    check_rotation(M, K, slots, positions, cos, sin)
    check_head_norms(x, q_norm_weight, k_norm_weight, K)
    if q_norm_weight is not None or is_int4(weight):
        return rope_and_store_(
            skinny_linear(x, weight, bias),
            k_cache, v_cache, slots, positions, cos, sin, q_norm_weight, k_norm_weight, eps,
            k_scale, v_scale, block_tables,
        )  # fmt: skip

    q = torch.empty((M, HQ, K), device=x.device, dtype=x.dtype)
    if M:
        tile = _tile(HQ + 2 * HK, K, x, weight)
        grid = (triton.cdiv(M, BLOCK_M), HQ + 2 * HK, triton.cdiv(K // 2, tile["BLOCK_I"]))
        is_even = D % tile["BLOCK_D"] == 0 and K // 2 % tile["BLOCK_I"] == 0
        plain = leaves_places(x, weight, grid[1] * grid[2], 2 * tile["BLOCK_I"], tile)
        linear_rope_and_store_kernel[grid](
            x_ptr=x, **operands(weight), bias_ptr=bias,
            q_ptr=q, k_cache_ptr=k_cache, v_cache_ptr=v_cache, slots_ptr=slots,
            positions_ptr=positions, cos_ptr=cos, sin_ptr=sin,
            k_scale_ptr=k_scale, v_scale_ptr=v_scale,
            stride_x_m=x.stride(0), M=M, D=D, C=C, num_slots=num_slots,
            **cache_arguments(k_cache, block_tables),
            HAS_BIAS=bias is not None,
            NUM_Q_HEADS=HQ, NUM_KV_HEADS=HK, HEAD_DIM=K,
            IS_EVEN=is_even, HAS_TAIL=D % tile["BLOCK_D"] != 0, IN_STEPS=x.dtype == torch.float32,
            PREFETCH=0 if plain else prefetched_bytes(weight, is_even), BLOCK_M=BLOCK_M, **tile,
            **dependent_launch(x.device, plain),
        )  # fmt: skip
    return q
