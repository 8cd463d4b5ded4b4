"""Rotary embedding: the tables of a step, and one pass that rotates q and k and fills the cache.

    rope_tables        cos[m, i] = cos[m, i + K/2] = cos(p[m] * f[i]) * c       i < K/2
                       sin[m, i + K/2] = -sin[m, i] = sin(p[m] * f[i]) * c
    rope_and_store_    y[i] = x[i] * cos[i] + x[(i + K/2) % K] * sin[i]         for q and k
                       k_cache, v_cache [slot, head, p % C] = y, v              / scale in fp8
                                   or in blocks, see attention_tiles.py

M tokens, K head_dim, C the capacity of a cache slot, f the inverse frequencies, c the scaling of
the RoPE type.  Tables come from the caller, so every type rotates by the same kernel.  Dimension i
pairs with i + K/2: a program holds a head as its two halves.

Arithmetic is float32.  Angles never leave it (a bf16 position is wrong from 257 on); cos and sin
are rounded once, q, k and v once, where they are stored; Gemma 3's normalised q and k also before
they are rotated, as the oracle does.

Cost: rope_tables writes 2 M K elements, with M K / 2 sines and cosines: bound by latency, once a
step.  rope_and_store_ reads (HQ + 2 HK) K elements of a token and its 2 K of the tables (once from
memory, then from L1), writes (HQ + 2 HK) K, 3 operations each, 8 with the norm: bound by memory
bandwidth.  A program takes 4 heads of a token, whatever M is, so that a row's bits never depend on
the batch: 4 KiB moved in bf16 at K = 256, and at decode as many warps as there are heads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemcut.kernels.checks import (
    DTYPES,
    MAX_HEAD_DIM,
    cache_arguments,
    check_cache,
    check_index,
    check_parts,
    check_rotation,
    check_shape,
    check_tensors,
    count_q_heads,
    require,
)
from gemcut.kernels.dependent_launch import dependent_launch, wait_for_predecessor

BLOCK_H = 4  # heads of a program


@triton.jit(do_not_specialize_on_alignment=["positions_ptr"])
def rope_tables_kernel(
    positions_ptr, inv_freq_ptr, cos_ptr, sin_ptr,  # [M], [K/2] or [M, K/2], [M, K], [M, K]
    stride_inv_freq_m,  # 0 where all tokens share the frequencies
    ATTENTION_SCALING: tl.constexpr,
    HALF_DIM: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor(DEPENDENT)
    m = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + m)
    inv_freq_ptr += m * stride_inv_freq_m
    store_tables(cos_ptr, sin_ptr, m, position, inv_freq_ptr, ATTENTION_SCALING, HALF_DIM, BLOCK_D)


@triton.jit
def store_tables(
    cos_ptr, sin_ptr, row, position, inv_freq_ptr,  # [.., K] x 2, .., .., [K/2]
    ATTENTION_SCALING: tl.constexpr, HALF_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Row `row` of both tables: the cos and sin of a position."""
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HALF_DIM
    dtype = cos_ptr.dtype.element_ty
    position = position.to(tl.float32)
    inv_freq = tl.load(inv_freq_ptr + offs_d, mask=mask_d, other=0.0)
    angles = position * inv_freq
    cos = (tl.cos(angles) * ATTENTION_SCALING).to(dtype)
    sin = tl.sin(angles) * ATTENTION_SCALING

    first = row * (2 * HALF_DIM) + offs_d
    tl.store(cos_ptr + first, cos, mask=mask_d)
    tl.store(cos_ptr + first + HALF_DIM, cos, mask=mask_d)
    tl.store(sin_ptr + first, (-sin).to(dtype), mask=mask_d)
    tl.store(sin_ptr + first + HALF_DIM, sin.to(dtype), mask=mask_d)


@triton.jit
def stored(x, scale, dtype: tl.constexpr):
    """Float32 as a cache of this dtype holds it; in fp8 divided by the head's scale.

    The conversion to fp8 saturates, and NaN stays NaN (PTX ISA, cvt.satfinite).
    """
    if dtype == tl.float8e4nv:
        x *= 1.0 / scale
    return x.to(dtype)


@triton.jit
def place_of(
    slot, position, block_table_ptr,
    stride_table, stride_k_s, num_slots, num_blocks, C,
    KV_STRIDE: tl.constexpr,
    KV_BLOCK: tl.constexpr,
):  # fmt: skip
    """Where a cache has the first head of tokens at positions of slots, and whether it has them."""
    known = (slot >= 0) & (slot < num_slots)
    if block_table_ptr is None:
        place = slot * stride_k_s + position % C * KV_STRIDE
    else:
        known &= position < C
        entries = block_table_ptr + slot * stride_table + position // KV_BLOCK
        block = tl.load(entries, mask=known & (position >= 0), other=-1).to(tl.int64)
        known &= (block >= 0) & (block < num_blocks)
        place = block * stride_k_s + position % KV_BLOCK * KV_STRIDE
    return place, known


@triton.jit
def _widened_half(ptr, offs, mask):
    return tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize_on_alignment=["slots_ptr", "positions_ptr"])
def rope_and_store_kernel(
    qkv_ptr, q_ptr,  # [S, M, (HQ + 2 HK) K], [M, HQ, K]
    k_cache_ptr, v_cache_ptr,  # [slots, HK, C, K] or [blocks, block_size, HK, K] each
    slots_ptr, positions_ptr, cos_ptr, sin_ptr,  # [M], [M], [M, K], [M, K]
    q_norm_ptr, k_norm_ptr, k_scale_ptr, v_scale_ptr,  # [K] x 2, [HK] x 2 where the cache is fp8
    block_table_ptr,  # [slots, N] where the cache is in blocks
    stride_qkv_s, stride_qkv_m, stride_k_s, stride_k_h, stride_table,  # v as k
    num_slots, num_blocks, C,
    EPS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KV_STRIDE: tl.constexpr,  # from a token to the next
    KV_BLOCK: tl.constexpr,  # tokens of a block; 0: slots
    SPLITS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,  # of half a head
):  # fmt: skip
    wait_for_predecessor(DEPENDENT)
    m = tl.program_id(0).to(tl.int64)
    HALF_DIM: tl.constexpr = HEAD_DIM // 2
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask_d = offs_d < HALF_DIM
    mask = (heads < NUM_Q_HEADS + 2 * NUM_KV_HEADS) & mask_d
    is_q = heads < NUM_Q_HEADS
    is_k = (heads >= NUM_Q_HEADS) & (heads < NUM_Q_HEADS + NUM_KV_HEADS)
    is_v = heads >= NUM_Q_HEADS + NUM_KV_HEADS
    dtype = q_ptr.dtype.element_ty

    slot = tl.load(slots_ptr + m).to(tl.int64)
    position = tl.load(positions_ptr + m).to(tl.int64)
    x_ptrs = qkv_ptr + m * stride_qkv_m + heads * HEAD_DIM
    v_1 = _widened_half(x_ptrs, offs_d, mask)
    v_2 = _widened_half(x_ptrs, offs_d + HALF_DIM, mask)
    for s in tl.static_range(1, SPLITS):
        v_1 += _widened_half(x_ptrs + s * stride_qkv_s, offs_d, mask)
        v_2 += _widened_half(x_ptrs + s * stride_qkv_s, offs_d + HALF_DIM, mask)
    if SPLITS > 1:
        v_1, v_2 = v_1.to(dtype).to(tl.float32), v_2.to(dtype).to(tl.float32)
    cos_ptrs, sin_ptrs = cos_ptr + m * HEAD_DIM, sin_ptr + m * HEAD_DIM
    cos_1 = _widened_half(cos_ptrs, offs_d, mask_d)
    cos_2 = _widened_half(cos_ptrs, offs_d + HALF_DIM, mask_d)
    sin_1 = _widened_half(sin_ptrs, offs_d, mask_d)
    sin_2 = _widened_half(sin_ptrs, offs_d + HALF_DIM, mask_d)

    x_1, x_2 = v_1, v_2
    if HAS_NORM:
        # the weight is an offset from one (norm.py)
        w_1 = tl.where(
            is_q,
            _widened_half(q_norm_ptr, offs_d, mask_d),
            _widened_half(k_norm_ptr, offs_d, mask_d),
        )
        offs_2 = offs_d + HALF_DIM
        w_2 = tl.where(
            is_q,
            _widened_half(q_norm_ptr, offs_2, mask_d),
            _widened_half(k_norm_ptr, offs_2, mask_d),
        )
        rstd = tl.rsqrt(tl.sum(x_1 * x_1 + x_2 * x_2, axis=1, keep_dims=True) / HEAD_DIM + EPS)
        x_1 = (x_1 * rstd * (1.0 + w_1)).to(dtype).to(tl.float32)
        x_2 = (x_2 * rstd * (1.0 + w_2)).to(dtype).to(tl.float32)
    y_1 = x_1 * cos_1 + x_2 * sin_1
    y_2 = x_2 * cos_2 + x_1 * sin_2

    # A place that does not exist shows as NaN; nothing is written outside the cache.
    is_active = position >= 0
    place, has_place = place_of(
        slot, position, block_table_ptr, stride_table, stride_k_s, num_slots, num_blocks, C,
        KV_STRIDE, KV_BLOCK,
    )  # fmt: skip
    lost = is_active & (has_place == 0)
    q_1 = tl.where(lost, float("nan"), y_1).to(dtype)
    q_2 = tl.where(lost, float("nan"), y_2).to(dtype)
    q_ptrs = q_ptr + (m * NUM_Q_HEADS + heads) * HEAD_DIM + offs_d
    tl.store(q_ptrs, q_1, mask=mask & is_q)
    tl.store(q_ptrs + HALF_DIM, q_2, mask=mask & is_q)

    if is_active & has_place:
        cached: tl.constexpr = k_cache_ptr.dtype.element_ty
        k_scale, v_scale = 1.0, 1.0
        if k_scale_ptr is not None:
            k_scale = tl.load(k_scale_ptr + heads - NUM_Q_HEADS, mask=is_k, other=1.0)
            of_v = heads - NUM_Q_HEADS - NUM_KV_HEADS
            v_scale = tl.load(v_scale_ptr + of_v, mask=is_v & (of_v < NUM_KV_HEADS), other=1.0)
        of_head = (heads - NUM_Q_HEADS).to(tl.int64) * stride_k_h
        k_ptrs = k_cache_ptr + place + of_head + offs_d
        tl.store(k_ptrs, stored(y_1, k_scale, cached), mask=mask & is_k)
        tl.store(k_ptrs + HALF_DIM, stored(y_2, k_scale, cached), mask=mask & is_k)
        of_head = (heads - NUM_Q_HEADS - NUM_KV_HEADS).to(tl.int64) * stride_k_h
        v_ptrs = v_cache_ptr + place + of_head + offs_d
        tl.store(v_ptrs, stored(v_1, v_scale, cached), mask=mask & is_v)
        tl.store(v_ptrs + HALF_DIM, stored(v_2, v_scale, cached), mask=mask & is_v)


def _tile(K: int) -> dict[str, int]:
    block_d = triton.next_power_of_2(K // 2)
    # 16 bytes of each half for a thread
    return {"BLOCK_D": block_d, "num_warps": max(1, BLOCK_H * block_d // 256)}


def rope_tables(
    positions: Tensor, inv_freq: Tensor, attention_scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The cos and sin by which `rope_and_store_` rotates, in every layer of one kind.

    positions [M] int, inv_freq [K/2] or [M, K/2] float32 -> cos, sin [M, 1, K] in dtype; the first
    half of sin is negated.
    """
    require(positions.dim() == 1, f"positions is {list(positions.shape)}, must be [M]")
    M = positions.shape[0]
    half = check_frequencies(inv_freq, M, positions)
    check_index("positions", positions, M)
    require(dtype in DTYPES, f"dtype {dtype} is not supported; float32, bfloat16, float16 are")

    cos = torch.empty((M, 1, 2 * half), device=positions.device, dtype=dtype)
    sin = torch.empty((M, 1, 2 * half), device=positions.device, dtype=dtype)
    if M:
        block_d = triton.next_power_of_2(half)
        rope_tables_kernel[(M,)](
            positions_ptr=positions, inv_freq_ptr=inv_freq, cos_ptr=cos, sin_ptr=sin,
            stride_inv_freq_m=0 if inv_freq.dim() == 1 else half,
            ATTENTION_SCALING=float(attention_scaling), HALF_DIM=half, BLOCK_D=block_d,
            num_warps=max(1, block_d // 32), **dependent_launch(positions.device),
        )  # fmt: skip
    return cos, sin


def check_frequencies(inv_freq: Tensor, M: int, positions: Tensor) -> int:
    """ValueError unless inv_freq is [K/2] or [M, K/2] in float32, beside the positions: K/2."""
    require(
        inv_freq.dim() in (1, 2), f"inv_freq is {list(inv_freq.shape)}, must be [K/2] or [M, K/2]"
    )
    half = inv_freq.shape[-1]
    require(0 < 2 * half <= MAX_HEAD_DIM, f"head_dim {2 * half} is not in 2 to {MAX_HEAD_DIM}")
    check_tensors(inv_freq, positions=positions)
    require(inv_freq.dtype == torch.float32, f"inv_freq is {inv_freq.dtype}, must be torch.float32")
    check_shape("inv_freq", inv_freq, *([half] if inv_freq.dim() == 1 else [M, half]))
    return half


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

    qkv [M, (HQ + 2 HK) * K], rows may have gaps, or partial sums of them [S, M, (HQ + 2 HK) * K] in
    float32, which are added up and rounded first; k_cache, v_cache [slots, HK, C, K], written at
    each token's slot and position % C, or [blocks, block_size, HK, K] with block_tables [slots, N]
    int32, of any strides whose last is 1; slots, positions [M] int; cos, sin [M, 1, K] -> [M, HQ,
    K].  k_scale, v_scale [HK] float32 where the cache is float8_e4m3fn.
    A negative position stores nothing.  A slot, a block or a position of a table outside the cache
    stores nothing and yields NaN: the host cannot check it without stopping the device.
    """
    require(qkv.dim() in (2, 3), f"qkv is {list(qkv.shape)}, must be [M, (HQ + 2 HK) * K]")
    x = qkv if qkv.dim() == 2 else cos
    num_slots, HK, C, K = check_cache(x, k_cache, v_cache, k_scale, v_scale, block_tables)
    check_tensors(x, slots=slots, positions=positions, cos=cos, sin=sin)
    parts, M, width = check_parts("qkv", qkv, cos)
    HQ = count_q_heads("qkv", width, HK, K)
    check_rotation(M, K, slots, positions, cos, sin)
    check_head_norms(cos, q_norm_weight, k_norm_weight, K)

    q = torch.empty((M, HQ, K), device=qkv.device, dtype=cos.dtype)
    if M:
        rope_and_store_kernel[(M, triton.cdiv(HQ + 2 * HK, BLOCK_H))](
            qkv_ptr=qkv, q_ptr=q, k_cache_ptr=k_cache, v_cache_ptr=v_cache,
            slots_ptr=slots, positions_ptr=positions, cos_ptr=cos, sin_ptr=sin,
            q_norm_ptr=q_norm_weight, k_norm_ptr=k_norm_weight,
            k_scale_ptr=k_scale, v_scale_ptr=v_scale,
            stride_qkv_s=M * width, stride_qkv_m=qkv.stride(-2),
            num_slots=num_slots, C=C, **cache_arguments(k_cache, block_tables),
            EPS=eps, HAS_NORM=q_norm_weight is not None,
            NUM_Q_HEADS=HQ, NUM_KV_HEADS=HK, HEAD_DIM=K, SPLITS=parts,
            BLOCK_H=BLOCK_H, **_tile(K), **dependent_launch(qkv.device),
            maxnreg=128,  # ptxas would rather spill the last addresses than take more than 64
        )  # fmt: skip
    return q


def check_head_norms(
    x: Tensor, q_norm_weight: Tensor | None, k_norm_weight: Tensor | None, K: int
) -> None:
    """ValueError unless both weights are there, or neither: [K] each, of x's dtype and device."""
    require(
        (q_norm_weight is None) == (k_norm_weight is None),
        f"q_norm_weight is {_named(q_norm_weight)} and k_norm_weight {_named(k_norm_weight)}: "
        f"both or neither",
    )
    check_tensors(x, q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight)
    if q_norm_weight is not None and k_norm_weight is not None:
        check_shape("q_norm_weight", q_norm_weight, K)
        check_shape("k_norm_weight", k_norm_weight, K)


def _named(x: Tensor | None) -> str:
    return "absent" if x is None else f"given as {list(x.shape)}"
