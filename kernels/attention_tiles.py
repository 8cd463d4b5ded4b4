"""Code shared by prefill and decode attention: tiles of keys, a step of online softmax, checks.

Scores come from tl.dot in float32.  Softmax runs in base 2: log2(e) is part of the factor that
multiplies a score, after the softcap where there is one, so that either way

    p = exp2(s * factor - m_i)

is one fused multiply-add and one exp2.  The mask comes after the softcap: a capped -inf would be
-softcap, and leak.  The running maximum starts at a finite number, so that a row that has seen no
key computes exp2(-inf) = 0 and never inf - inf.

A cache is made of slots [slots, HK, C, K], with a ring in each, or of blocks:

    k, v [blocks, block_size, HK, K]    position p at [block_tables[slot, p // block_size],
                                                       p % block_size]

One kernel reads both, compiled for each: what differs is where the keys of a tile are, offsets
[BLOCK_N].  They come in the same tiles and in the same order, so the bits are the same.  In blocks
offsets are 64-bit, an entry of the table is read for each key of a tile, a pass before it is
needed, and the block size is a constant, by which positions are divided.  Nothing is a ring then: C
is what a row of the table holds, and a window hides.  An entry that no key needs is not read.

Cost of blocks: 4 bytes for each key, in L1 after the first of 32 entries; in a pass of sm_90 15 to
29 % more cycles of a warp in prefill and 15 to 46 % in decode (compiled, not timed).
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
def are_keys(begin, num_keys, BLOCK_N: tl.constexpr):
    """Numbers from `begin` on, and which of them, 0 to num_keys - 1, are keys: [BLOCK_N] twice."""
    number = begin + tl.arange(0, BLOCK_N)
    # unsigned: a number below 0 is a great one
    return number, number.to(tl.uint32, bitcast=True) < num_keys.to(tl.uint32, bitcast=True)


@triton.jit
def ring_rows(
    first, number, C,
    KV_STRIDE: tl.constexpr,
    IS_RING: tl.constexpr,
):  # fmt: skip
    """Offsets in a slot's head of keys by their number from index `first` on.

    There are at most C keys: a ring wraps once.  What is no ring never does.
    """
    index = number
    if IS_RING:
        index += first
        index = tl.where(index >= C, index - C, index)
    return index * KV_STRIDE


@triton.jit
def blocks_of(
    table_ptr,  # one slot's blocks
    first, begin, num_keys,
    KV_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Blocks [BLOCK_N] of keys number `begin` and on of the num_keys from position `first` on."""
    number, seen = are_keys(begin, num_keys, BLOCK_N)
    position = (first + number).to(tl.uint32, bitcast=True)  # divides in one instruction
    return tl.load(table_ptr + position // KV_BLOCK, mask=seen, other=0)


@triton.jit
def block_rows(
    block, first, number,  # [BLOCK_N], .., [BLOCK_N]
    num_blocks, stride_block,
    KV_STRIDE: tl.constexpr,
    KV_BLOCK: tl.constexpr,
):  # fmt: skip
    """Offsets in a head of keys by their number from position `first` on, and which have a block.

    What has none is read in block 0, for nobody.
    """
    known = block.to(tl.uint32, bitcast=True) < num_blocks.to(tl.uint32, bitcast=True)
    block = tl.where(known, block, 0).to(tl.int64)
    position = (first + number).to(tl.uint32, bitcast=True)
    return block * stride_block + position % KV_BLOCK * KV_STRIDE, known


@triton.jit
def kv_tile(
    head_ptr, offsets, seen,  # one head's keys or values, [BLOCK_N] twice
    HEAD_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IN_PAIRS: tl.constexpr,
):  # fmt: skip
    """A tile of keys or values, zero where they are not seen and past HEAD_DIM: [BLOCK_N, BLOCK_K].

    IN_PAIRS: two neighbours of fp8 in each int16.
    """
    PARTS: tl.constexpr = 2 if IN_PAIRS else 1
    ptrs = head_ptr + offsets[:, None]
    if IN_PAIRS:
        ptrs = ptrs.to(tl.pointer_type(tl.int16))
    offs_k = tl.arange(0, BLOCK_K // PARTS)
    mask = seen[:, None] & (offs_k < HEAD_DIM // PARTS)[None, :]
    return tl.load(ptrs + offs_k[None, :], mask=mask, other=0.0)


@triton.jit
def even_and_odd(pairs, dtype: tl.constexpr, PACKED: tl.constexpr):
    """Two neighbours of e4m3 in each int16, the even and the odd ones in 16 or 32 bits.

    A product reads 16-bit values by columns from shared memory eight rows at once, and bytes one by
    one: so values are brought to its registers in pairs, and converted there.  PACKED does that in
    three instructions for four of them, of which the compiler makes ten.
    """
    if PACKED and dtype == tl.float16:
        return tl.inline_asm_elementwise(
            "{.reg .b32 r; .reg .b16 even, odd; prmt.b32 r, $2, 0, 0x3120; mov.b32 {even, odd}, r; "
            "cvt.rn.f16x2.e4m3x2 $0, even; cvt.rn.f16x2.e4m3x2 $1, odd;}",
            "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    even = pairs.to(tl.int8).to(tl.float8e4nv, bitcast=True).to(dtype)
    odd = (pairs >> 8).to(tl.int8).to(tl.float8e4nv, bitcast=True).to(dtype)
    return even, odd


@triton.jit
def softmax_tile(
    s, m_i, l_i,  # [BLOCK_M, BLOCK_N], [BLOCK_M] twice, float32
    is_edge,  # whether a query does not see all keys of the tile
    offs_q, offs_n, W,  # positions of queries and keys, from the same origin
    scale,  # of scores
    SOFTCAP: tl.constexpr,
    IS_LOCAL: tl.constexpr,
    FAST_TANH: tl.constexpr,
):  # fmt: skip
    """Weights p of a tile's products s, the factor of all that came before, the new m_i, l_i."""
    if SOFTCAP is None:
        factor = scale * LOG2E
    else:
        s = tanh(s * (scale / SOFTCAP), FAST_TANH)
        factor = SOFTCAP * LOG2E
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
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_tables: Tensor | None,
) -> tuple[int, int, int, int]:
    """Slots, KV heads, capacity, head_dim; ValueError unless q [..., HQ, K] can read them."""
    check_tensors(q)
    num_slots, HK, C, K = check_cache(q, k_cache, v_cache, k_scale, v_scale, block_tables)
    HQ = q.shape[-2]
    require(q.shape[-1] == K, f"q has head_dim {q.shape[-1]}, the cache {K}")
    require(HQ > 0 and HQ % HK == 0, f"{HQ} query heads cannot share {HK} KV heads evenly")
    require(q.stride(-1) == 1, f"q has strides {list(q.stride())}, the last must be 1")
    require(0 < scale < math.inf, f"scale {scale} is not above 0 and finite")
    check_softcap(softcap)
    require(
        sliding_window is None or sliding_window >= 1, f"sliding_window {sliding_window} is below 1"
    )
    return num_slots, HK, C, K
