"""Causal attention of chunks of new tokens over the cache, which holds their keys already.

    s[i, j] = softcap(q[i] . k[j] * scale)     query i sees key j iff i - W < j <= i
    y[i]    = sum_j softmax_j(s[i, j]) * v[j]

q, y [M, HQ, K]; k_cache, v_cache [slots, HK, C, K], position p at index p % C; or in blocks, see
attention_tiles.py.  One program holds
BLOCK_M queries of one head and walks over the keys that any of them sees (flash attention, Dao,
2023).  Keys that no query sees are never read.  Only the tiles at the diagonal and at the window's
far edge branch to the mask; the branch is the same for all threads, and one loop with it takes so
many fewer registers than two loops that a tile of 128 x 32 does not spill at head_dim 256.

A pass of the loop begins with the softmax of a tile whose scores the pass before has left, while
the tensor cores still multiply that one's weights by its values and copies of keys and values are
under way; then the next tile's keys meet the queries, and the tile's weights its values.  So there
is one pass more than there are tiles, the first with scores that no query sees.  Of softcap each
score takes two instructions, a product and tanh: 31 of 503 in a pass of 16 scores a thread (sm_90).

Scores and softmax are float32; p is rounded to v's dtype for the second product, and y once.  Of a
cache in fp8 the keys' scale is a factor of the scores and the values' scale one of y; keys take q's
dtype, values and p float16, which holds e4m3 exactly and takes fewer instructions.  Where the
product reads its operands from registers, sm_89 and sm_120, they are loaded in pairs and joined as
float16: of e4m3 the compiler would read that operand from shared memory byte by byte.

A chunk's first row and length are known on the device alone, so the grid is the most tiles that M
rows in B chunks can need: chunk b owns the tiles from cu_seqlens[b] // BLOCK_M + b on.  The tiles
with the most keys start first, for all heads, so that none of them is left over at the end.

cu_seqlens runs from 0 to M; rows that it leaves out are not written.  A row yields zeros where
starts[b] < 0, and NaN where its slot does not exist, where the chunk and what it sees exceed C keys
and, in its tile of queries, where a block does not: wrong input shows, and never reads foreign
memory.

Cost: 4 K operations for each pair of query and key that sees it, HQ M (M + 1) / 2 pairs for a first
chunk without a window, at most HQ M W with one; (2 M HQ + 2 S HK) K elements move, the cache once
for each tile of queries, through L2.  In bf16 a first chunk has about M / 3 operations for a byte:
bound by the tensor cores, and by exp2 and tanh where K is small.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemcut.kernels.attention_tiles import (
    MAX_POSITION,
    NO_MAXIMUM,
    are_keys,
    block_rows,
    blocks_of,
    check_attention,
    even_and_odd,
    kv_tile,
    ring_rows,
    softmax_tile,
)
from gemcut.kernels.checks import cache_arguments, check_index, check_tensors, require
from gemcut.kernels.gpu_arch import arch_of
from gemcut.kernels.interpreter import INTERPRETED
from gemcut.kernels.tiles import tuned

IN_PAIRS = ("sm_89", "sm_120", "interpreter")
NEVER = tl.constexpr(2**30)  # a position beyond all of a tile, which fit 32 bits


@triton.jit
def chunk_of(cu_seqlens_ptr, tile, B, BLOCK_M: tl.constexpr):
    """The last chunk b with cu_seqlens[b] // BLOCK_M + b <= tile, by bisection."""
    low = tile * 0
    high = B
    while high - low > 1:
        middle = (low + high) // 2
        begins = tl.load(cu_seqlens_ptr + middle) // BLOCK_M + middle <= tile
        low = tl.where(begins, middle, low)
        high = tl.where(begins, high, middle)
    return low


@triton.jit(
    do_not_specialize=["M", "B"],
    do_not_specialize_on_alignment=["slots_ptr", "starts_ptr", "cu_seqlens_ptr"],
)
def attention_prefill_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr,  # [M, HQ, K], [slots, HK, C, K] twice, [M, HQ, K]
    slots_ptr, starts_ptr, cu_seqlens_ptr,  # [B], [B], [B + 1]
    block_table_ptr,  # [slots, N] where the cache is in blocks, [blocks, block_size, HK, K]
    k_scale_ptr, v_scale_ptr,  # [HK] x 2 where the cache is fp8
    stride_q_m, stride_q_h, stride_k_s, stride_k_h, stride_y_m, stride_y_h,  # v as k
    stride_table, M, B, num_slots, num_blocks, C, W,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    KV_STRIDE: tl.constexpr,  # from a token to the next
    KV_BLOCK: tl.constexpr,  # tokens of a block; 0: slots
    IS_LOCAL: tl.constexpr,
    FAST_TANH: tl.constexpr,
    IN_PAIRS: tl.constexpr,  # values of fp8 are loaded so
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # a chunk's last queries see the most keys
    b = chunk_of(cu_seqlens_ptr, tile, B, BLOCK_M)
    chunk_begin = tl.load(cu_seqlens_ptr + b).to(tl.int64)
    chunk_end = tl.minimum(tl.load(cu_seqlens_ptr + b + 1).to(tl.int64), M)
    row = chunk_begin + (tile - chunk_begin // BLOCK_M - b) * BLOCK_M
    if (row < 0) | (row >= chunk_end):
        return
    num_queries = tl.minimum(chunk_end - row, BLOCK_M).to(tl.int32)

    slot = tl.load(slots_ptr + b).to(tl.int64)
    start = tl.load(starts_ptr + b).to(tl.int64)
    position = start + row - chunk_begin  # of the tile's first query
    oldest = tl.zeros((), tl.int64)  # first key that the chunk sees, and that the tile sees
    first = tl.zeros((), tl.int64)
    IS_RING: tl.constexpr = IS_LOCAL and block_table_ptr is None
    if IS_RING:
        oldest = tl.maximum(start - W + 1, oldest)
    if IS_LOCAL:
        first = tl.maximum(position - W + 1, first)
    num_needed = start + chunk_end - chunk_begin - oldest
    is_unknown = (slot < 0) | (slot >= num_slots) | (num_needed > C) | (start > MAX_POSITION)
    is_unknown &= start >= 0
    is_empty = (start < 0) | is_unknown
    slot = tl.where(is_empty, 0, slot)

    # from here on positions are counted from the tile's first key, and fit 32 bits
    first_query = tl.where(is_empty, 0, position - first).to(tl.int32)
    num_keys = tl.where(is_empty, 0, first_query + num_queries)
    first = tl.where(is_empty, 0, first % C if IS_RING else first).to(tl.int32)

    offs_m = tl.arange(0, BLOCK_M)
    wide_m = offs_m[:, None].to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    mask = (offs_m < num_queries)[:, None] & (offs_k < HEAD_DIM)[None, :]
    q_ptrs = q_ptr + row * stride_q_m + head * stride_q_h
    q = tl.load(q_ptrs + wide_m * stride_q_m + offs_k[None, :], mask=mask, other=0.0)
    kv_offset = head // GROUP_SIZE * stride_k_h
    if block_table_ptr is None:
        kv_offset += slot * stride_k_s
    else:
        block_table_ptr += slot * stride_table
    k_head_ptr, v_head_ptr = k_ptr + kv_offset, v_ptr + kv_offset

    if k_scale_ptr is None:
        scale: tl.constexpr = SCALE
    else:
        scale = SCALE * tl.load(k_scale_ptr + head // GROUP_SIZE)
    is_wide: tl.constexpr = k_scale_ptr is None or q.dtype == tl.float32
    p_dtype: tl.constexpr = q.dtype if is_wide else tl.float16
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    m_i = tl.full([BLOCK_M], NO_MAXIMUM, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    offs_q = first_query + offs_m
    # tile `begin` has its softmax and meets its values while the next one's scores are computed
    s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if block_table_ptr is not None:  # entries are read a pass ahead
        block = blocks_of(block_table_ptr, first, 0, num_keys, KV_BLOCK, BLOCK_N)
        at_next = tl.zeros([BLOCK_N], tl.int64)
        all_known = tl.full([BLOCK_N], True, tl.int1)
    for begin in tl.range(-BLOCK_N, num_keys, BLOCK_N):
        position_n = tl.where(begin < 0, NEVER, begin)  # before the first tile: what no query sees
        offs_n = position_n + tl.arange(0, BLOCK_N)
        is_edge = position_n + BLOCK_N - 1 > first_query
        if IS_LOCAL:
            is_edge |= num_keys - 1 - begin >= W
        p, alpha, m_i, l_i = softmax_tile(
            s, m_i, l_i, is_edge, offs_q, offs_n, W, scale, SOFTCAP, IS_LOCAL, FAST_TANH
        )
        p = p.to(p_dtype)
        number_k, seen_k = are_keys(begin + BLOCK_N, num_keys, BLOCK_N)
        number_v, seen_v = are_keys(begin, num_keys, BLOCK_N)
        if block_table_ptr is None:
            at_k = ring_rows(first, number_k, C, KV_STRIDE, IS_RING)
            at_v = ring_rows(first, number_v, C, KV_STRIDE, IS_RING)
        else:
            at_v = at_next
            at_k, known = block_rows(
                block, first, number_k, num_blocks, stride_k_s, KV_STRIDE, KV_BLOCK
            )
            at_next = at_k
            all_known &= known
            block = blocks_of(
                block_table_ptr, first, begin + 2 * BLOCK_N, num_keys, KV_BLOCK, BLOCK_N
            )
        k = kv_tile(k_head_ptr, at_k, seen_k, HEAD_DIM, BLOCK_K, False)
        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        v = kv_tile(v_head_ptr, at_v, seen_v, HEAD_DIM, BLOCK_K, IN_PAIRS)
        if IN_PAIRS:
            even, odd = even_and_odd(v, p_dtype, FAST_TANH)
            v = tl.join(even, odd).reshape(BLOCK_N, BLOCK_K)
        else:
            v = v.to(p_dtype)
        acc = tl.dot(p, v, acc * alpha[:, None], input_precision="ieee")

    l_i = tl.where(l_i == 0.0, 1.0, l_i)  # no key: zeros
    if block_table_ptr is not None:
        is_unknown |= tl.min(all_known.to(tl.int32), axis=0) == 0
    l_i = tl.where(is_unknown, float("nan"), l_i)
    y = acc / l_i[:, None]
    if v_scale_ptr is not None:
        y *= tl.load(v_scale_ptr + head // GROUP_SIZE)
    y_ptrs = y_ptr + row * stride_y_m + head * stride_y_h + wide_m * stride_y_m + offs_k[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


# BLOCK_M, BLOCK_N, num_warps, num_stages by padded head_dim, for 16-bit elements.  The largest
# that neither spill nor exceed the arch's shared memory (compiled, not yet timed): more queries
# in a tile read the cache less often, and sm_90 and sm_100 multiply 64 and 128 rows at once.
# Three stages keep copies under way for a whole pass, two only until the next softmax has ended:
# so 32 keys at head_dim 256 on sm_90, where three stages of 64 would not fit.
TILES = {
    256: {
        "sm_80": (64, 64, 8, 2), "sm_89": (64, 32, 8, 2), "sm_90": (128, 32, 8, 3),
        "sm_100": (128, 32, 8, 2), "sm_120": (64, 32, 8, 2),
    },
    128: {
        "sm_80": (128, 64, 8, 3), "sm_89": (128, 64, 8, 2), "sm_90": (128, 64, 8, 3),
        "sm_100": (128, 64, 8, 3), "sm_120": (128, 64, 8, 2),
    },
    64: {
        "sm_80": (128, 64, 8, 3), "sm_89": (128, 64, 8, 3), "sm_90": (128, 128, 8, 3),
        "sm_100": (128, 64, 8, 3), "sm_120": (128, 64, 8, 3),
    },
}  # fmt: skip


def _tile(head_dim: int, itemsize: int, arch: str) -> dict[str, int]:
    width = max(64, triton.next_power_of_2(head_dim))
    if itemsize == 4:  # no tensor cores: operands of the products are in registers
        tile = (32 if width == 256 else 64, 32, 8, 1)
    elif arch == "interpreter":
        tile = (64, 64, 8, 1)
    else:
        tile = TILES[width][arch]
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), tile, strict=True))


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
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    block_tables: Tensor | None = None,
) -> Tensor:
    """Causal attention of chunks over the cache: q [M, HQ, K] -> new tensor [M, HQ, K].

    k_cache, v_cache [slots, HK, C, K], or [blocks, block_size, HK, K] with block_tables [slots, N]
    int32, of any strides whose last is 1; rows cu_seqlens[b] to cu_seqlens[b + 1] are the chunk of
    sequence b, whose first token has position starts[b] and whose keys are in slots[b].  slots,
    starts [B], cu_seqlens [B + 1].  ValueError for shapes and numbers that no kernel takes.
    """
    require(q.dim() == 3, f"q is {list(q.shape)}, must be [M, HQ, K]")
    num_slots, HK, C, K = check_attention(
        q, k_cache, v_cache, scale, softcap, sliding_window, k_scale, v_scale, block_tables
    )
    check_tensors(q, slots=slots, starts=starts, cu_seqlens=cu_seqlens)
    M, HQ, B = q.shape[0], q.shape[1], slots.numel()
    check_index("slots", slots, B)
    check_index("starts", starts, B)
    check_index("cu_seqlens", cu_seqlens, B + 1)
    require(M <= B * C, f"{M} rows in {B} chunks do not fit a capacity of {C}")

    y = torch.empty((M, HQ, K), device=q.device, dtype=q.dtype)
    if M:
        arch = arch_of(q.device)
        rule = _tile(K, q.itemsize, arch)
        tile = rule | tuned("attention_prefill", q, HQ, HK, K)
        attention_prefill_kernel[(HQ, triton.cdiv(M, tile["BLOCK_M"]) + B)](
            q_ptr=q, k_ptr=k_cache, v_ptr=v_cache, y_ptr=y,
            slots_ptr=slots, starts_ptr=starts, cu_seqlens_ptr=cu_seqlens,
            k_scale_ptr=k_scale, v_scale_ptr=v_scale,
            stride_q_m=q.stride(0), stride_q_h=q.stride(1),
            stride_y_m=HQ * K, stride_y_h=K,
            M=M, B=B, num_slots=num_slots, C=C, W=sliding_window or 0,
            SCALE=scale, SOFTCAP=softcap, HEAD_DIM=K, GROUP_SIZE=HQ // HK,
            IS_LOCAL=sliding_window is not None,
            FAST_TANH=not INTERPRETED and q.dtype != torch.float32,
            **cache_arguments(k_cache, block_tables),
            IN_PAIRS=k_scale is not None and q.itemsize == 2 and arch in IN_PAIRS,
            BLOCK_K=max(16, triton.next_power_of_2(K)), **tile,
        )  # fmt: skip
    return y
