"""Split-KV attention of each row's T newest tokens over its slot, in one launch.

    s[t, j] = softcap(q[t] . k[j] * scale)     token t sees key j iff
    y[t]    = sum_j softmax_j(s[t, j]) * v[j]  position + t - W < j <= position + t

q, y [B, T, HQ, K]; k_cache, v_cache [slots, HK, C, K], position p at index p % C.  The keys that a
row sees are cut into splits of SPLIT keys, counted from its first.  A program takes every n-th
split of one KV head of one row; the T * GROUP_SIZE queries that share the head are one tile of
tl.dot.  It leaves each split's unnormalised acc, m and l in a workspace and counts itself; the last
to do so adds the splits up in their order.  A row of one split is written at once.

So the cut and every sum depend on the row's own length, the model's shape and the part, never on
the batch or on which program came last: a row's result is the same bits in any company.

Scores, softmax and partial sums are float32; p is rounded to v's dtype for the second product, and
y once.  A row yields zeros where positions[b] < 0, and NaN where its slot does not exist or where
it sees more than C keys: wrong input shows, and never reads foreign memory.

Cost: for a row that sees S keys 2 S HK K elements of cache are read.  The workspace adds 8 T HQ K
bytes for each split, written and read back through L2: in bf16 2 T GROUP_SIZE / SPLIT of the
cache's bytes, 2 to 6 % for one token.  4 T HQ K S operations, T * GROUP_SIZE for each byte in bf16:
bound by memory bandwidth.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemcut.kernels.attention_tiles import (
    MAX_POSITION,
    NO_MAXIMUM,
    check_attention,
    ring_tile,
    softmax_step,
)
from gemcut.kernels.checks import check_counters, check_index, check_tensors, require
from gemcut.kernels.interpreter import INTERPRETED
from gemcut.kernels.parts import part
from gemcut.kernels.tiles import tuned

MAX_Q_LEN = 8  # tokens of a row; more are a prefill
MAX_PACKED_ROWS = 64  # T * GROUP_SIZE queries in one tile
MAX_SPLITS = 256  # of a row: a longer cache is cut into longer splits
# Programs of a launch: two waves of three on each of 132 processors.  The host knows no length, so
# the grid follows the capacity, and a program without keys still takes its turn.
MANY_PROGRAMS = 792
COMBINED_ELEMENTS = 8192  # partial sums that the last program holds at once, 32 KiB of registers


@triton.jit
def combine(
    acc_ptr, m_ptr, l_ptr,  # [splits, NUM_ROWS, K], [splits, NUM_ROWS] twice
    num_splits, offs_r, offs_k,
    NUM_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows offs_r of the result, acc [BLOCK_R, BLOCK_K] and l [BLOCK_R], from all splits."""
    m_i = tl.full([BLOCK_R], NO_MAXIMUM, tl.float32)
    l_i = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for begin in tl.range(0, num_splits, BLOCK_S):
        splits = begin + tl.arange(0, BLOCK_S)
        at = splits[:, None] * NUM_ROWS + offs_r[None, :]
        mask = (splits < num_splits)[:, None] & (offs_r < NUM_ROWS)[None, :]
        mask_k = mask[:, :, None] & (offs_k < HEAD_DIM)[None, None, :]
        at_k = at[:, :, None] * HEAD_DIM + offs_k[None, None, :]
        # .cg: other programs wrote these, and L1 is not coherent
        m = tl.load(m_ptr + at, mask=mask, other=NO_MAXIMUM, cache_modifier=".cg")
        l = tl.load(l_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
        partial = tl.load(acc_ptr + at_k, mask=mask_k, other=0.0, cache_modifier=".cg")
        m_new = tl.maximum(m_i, tl.max(m, axis=0))
        weight = tl.exp2(m - m_new[None, :])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(l * weight, axis=0)
        acc = acc * alpha[:, None] + tl.sum(partial * weight[:, :, None], axis=0)
        m_i = m_new
    return acc, l_i


@triton.jit
def attention_decode_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr,  # [B, T, HQ, K], [slots, HK, C, K] twice, [B, T, HQ, K]
    slots_ptr, positions_ptr, counters_ptr,  # [B], [B], [B, HK] int32, zero before and after
    acc_ptr, m_ptr, l_ptr,  # [B, HK, splits, NUM_ROWS, K], [B, HK, splits, NUM_ROWS] twice
    stride_q_b, stride_q_t, stride_q_h, stride_k_s, stride_k_h,  # v as k
    num_slots, C, W, most_splits,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    Q_LEN: tl.constexpr,
    IS_LOCAL: tl.constexpr,
    FAST_TANH: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    NUM_ROWS: tl.constexpr = Q_LEN * GROUP_SIZE
    pid_s = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    slot = tl.load(slots_ptr + b).to(tl.int64)
    position = tl.load(positions_ptr + b).to(tl.int64)
    first = tl.zeros((), tl.int64)  # first key that the row sees
    if IS_LOCAL:
        first = tl.maximum(position - W + 1, first)
    num_needed = position + Q_LEN - first
    is_unknown = (slot < 0) | (slot >= num_slots) | (num_needed > C) | (position > MAX_POSITION)
    is_unknown &= position >= 0
    is_empty = (position < 0) | is_unknown
    num_keys = tl.where(is_empty, 0, num_needed).to(tl.int32)
    num_splits = tl.maximum(tl.cdiv(num_keys, SPLIT), 1)
    if pid_s >= num_splits:
        return

    # from here on positions are counted from the row's first key, and fit 32 bits
    slot = tl.where(is_empty, 0, slot)
    first_query = tl.where(is_empty, 0, position - first).to(tl.int32)
    first = tl.where(is_empty, 0, first % C).to(tl.int32)

    offs_m = tl.arange(0, BLOCK_M)  # token offs_m // GROUP_SIZE, head offs_m % GROUP_SIZE
    tokens, heads = (offs_m // GROUP_SIZE).to(tl.int64), (offs_m % GROUP_SIZE).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    mask = (offs_m < NUM_ROWS)[:, None] & (offs_k < HEAD_DIM)[None, :]
    q_row = b * stride_q_b + tokens * stride_q_t + (kv_head * GROUP_SIZE + heads) * stride_q_h
    q = tl.load(q_ptr + q_row[:, None] + offs_k[None, :], mask=mask, other=0.0)
    kv_offset = slot * stride_k_s + kv_head * stride_k_h
    k_head_ptr, v_head_ptr = k_ptr + kv_offset, v_ptr + kv_offset

    head_stride = HEAD_DIM * GROUP_SIZE  # of a KV head's queries in y, which is contiguous
    token_stride = tl.num_programs(1).to(tl.int64) * head_stride
    y_head_ptr = y_ptr + b * Q_LEN * token_stride + kv_head * head_stride
    head = b * tl.num_programs(1) + kv_head
    row = head * most_splits * NUM_ROWS  # where this head's workspace begins
    offs_q = first_query + offs_m // GROUP_SIZE
    # without licm: addresses of the next loop, computed before it, would cost registers
    for split in tl.range(pid_s, num_splits, tl.num_programs(0), disable_licm=True):
        acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        m_i = tl.full([BLOCK_M], NO_MAXIMUM, tl.float32)
        l_i = tl.zeros([BLOCK_M], tl.float32)
        split_end = tl.minimum(split * SPLIT + SPLIT, num_keys)
        for begin in tl.range(split * SPLIT, split_end, BLOCK_N, disable_licm=True):
            offs_n = begin + tl.arange(0, BLOCK_N)
            k = ring_tile(
                k_head_ptr, first, begin, num_keys, C, HEAD_DIM, IS_LOCAL, BLOCK_N, BLOCK_K
            )
            v = ring_tile(
                v_head_ptr, first, begin, num_keys, C, HEAD_DIM, IS_LOCAL, BLOCK_N, BLOCK_K
            )
            acc, m_i, l_i = softmax_step(
                q, k, v, acc, m_i, l_i, True, offs_q, offs_n, W,
                SCALE, SOFTCAP, IS_LOCAL, FAST_TANH,
            )  # fmt: skip

        if num_splits == 1:
            l_i = tl.where(l_i == 0.0, 1.0, l_i)  # no key: zeros
            l_i = tl.where(is_unknown, float("nan"), l_i)
            y = acc / l_i[:, None]
            y_row = tokens * token_stride + heads * HEAD_DIM
            y_ptrs = y_head_ptr + y_row[:, None] + offs_k[None, :]
            tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)
        else:
            at = split * NUM_ROWS + offs_m
            acc_ptrs = acc_ptr + row * HEAD_DIM + at[:, None] * HEAD_DIM + offs_k[None, :]
            tl.store(acc_ptrs, acc, mask=mask)
            tl.store(m_ptr + row + at, m_i, mask=offs_m < NUM_ROWS)
            tl.store(l_ptr + row + at, l_i, mask=offs_m < NUM_ROWS)

    if num_splits == 1:
        return
    tl.debug_barrier()  # every thread's stores precede the release
    num_done = tl.atomic_add(counters_ptr + head, 1, sem="acq_rel", scope="gpu")
    if num_done < tl.minimum(num_splits, tl.num_programs(0)) - 1:
        return
    tl.store(counters_ptr + head, 0)  # for the next launch
    for begin in tl.range(0, NUM_ROWS, BLOCK_R):
        offs_r = begin + tl.arange(0, BLOCK_R)
        acc_r, l_r = combine(
            acc_ptr + row * HEAD_DIM, m_ptr + row, l_ptr + row, num_splits, offs_r, offs_k,
            NUM_ROWS, HEAD_DIM, BLOCK_R, BLOCK_S, BLOCK_K,
        )  # fmt: skip
        y = acc_r / tl.where(l_r == 0.0, 1.0, l_r)[:, None]  # 0 only past NUM_ROWS
        y_row = (offs_r // GROUP_SIZE) * token_stride + (offs_r % GROUP_SIZE) * HEAD_DIM
        y_ptrs = y_head_ptr + y_row[:, None] + offs_k[None, :]
        mask_r = (offs_r < NUM_ROWS)[:, None] & (offs_k < HEAD_DIM)[None, :]
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_r)


def _tile(head_dim: int, group_size: int, q_len: int, itemsize: int, part: str) -> dict[str, int]:
    """Keys of a split and of a tile, warps and stages; compiled without spills, not yet timed.

    A memory of 3.3 TB/s and 0.7 us latency is kept busy by 2.3 MB in flight, 18 KiB on each of 132
    multiprocessors: two stages of K and V tiles of 16 KiB are 64 KiB in each program.  Parts with
    100 KB of shared memory have less bandwidth for each multiprocessor, and get half of it.

    The time of a split grows with its keys, that of adding the splits up with their number times
    group_size; their sum is least at sqrt(group_size * S) keys, 32 to 180 for S from 1k to 4k.
    """
    is_small = part in ("sm_89", "sm_120")
    rows = group_size * q_len
    num_warps = 4 if itemsize == 2 and rows <= 8 else 8
    tile_bytes = 8192 if is_small else 16384
    row_bytes = itemsize * triton.next_power_of_2(head_dim)
    return {
        "SPLIT": 128 if group_size <= 4 else 256,
        "BLOCK_N": max(16, min(64, tile_bytes // row_bytes)),
        "num_warps": num_warps,
        # three programs of four warps; ptxas by itself aims for four, and spills a few bytes
        "maxnreg": 160 if num_warps == 4 else 255,
        "num_stages": (3 if itemsize == 2 else 2) - (rows > 32),
    }


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
    counters: Tensor | None = None,
) -> Tensor:
    """Attention of each row's T newest tokens: q [B, T, HQ, K] -> new tensor of the same shape.

    k_cache, v_cache [slots, HK, C, K]; slots, positions [B]; query t of row b stands at
    positions[b] + t, and its key is in the cache.  T is 1 to 8.

    `counters` is scratch that every call finds and leaves zero, int32 [at least B * HK]: an engine
    passes the same one each time and saves a memset.  Calls that share it must not overlap.
    ValueError for shapes and numbers that no kernel takes.
    """
    require(q.dim() == 4, f"q is {list(q.shape)}, must be [B, T, HQ, K]")
    check_attention(q, k_cache, v_cache, scale, softcap, sliding_window)
    check_tensors(q, slots=slots, positions=positions)
    (B, T, HQ, K), (num_slots, HK, C, _) = q.shape, k_cache.shape
    G = HQ // HK
    check_index("slots", slots, B)
    check_index("positions", positions, B)
    require(0 < T <= MAX_Q_LEN, f"{T} new tokens are not in 1 to {MAX_Q_LEN}")
    require(T <= C, f"{T} new tokens do not fit a capacity of {C}")
    require(
        G * T <= MAX_PACKED_ROWS,
        f"{G} query heads on a KV head x {T} tokens exceed {MAX_PACKED_ROWS} rows",
    )
    if counters is None:
        counters = torch.zeros(B * HK, device=q.device, dtype=torch.int32)
    check_counters(counters, B * HK, q)

    y = torch.empty((B, T, HQ, K), device=q.device, dtype=q.dtype)
    if B:
        rule = _tile(K, G, T, q.itemsize, part(q.device))
        tile = rule | tuned("attention_decode", q, HQ, HK, K, T)
        most_keys = C if sliding_window is None else min(C, sliding_window + T - 1)
        longer = triton.next_power_of_2(triton.cdiv(most_keys, MAX_SPLITS))
        tile["SPLIT"] = max(tile["SPLIT"], longer)
        num_splits = triton.cdiv(most_keys, tile["SPLIT"])
        num_programs = min(num_splits, triton.cdiv(MANY_PROGRAMS, B * HK))
        block_k, rows = max(16, triton.next_power_of_2(K)), triton.next_power_of_2(G * T)
        block_r = min(16, rows)
        block_s = min(
            triton.next_power_of_2(num_splits), max(1, COMBINED_ELEMENTS // (block_r * block_k))
        )
        workspace = (B, HK, num_splits, G * T)
        acc = torch.empty((*workspace, K), device=q.device, dtype=torch.float32)
        m = torch.empty(workspace, device=q.device, dtype=torch.float32)
        l = torch.empty(workspace, device=q.device, dtype=torch.float32)
        attention_decode_kernel[(num_programs, HK, B)](
            q_ptr=q, k_ptr=k_cache, v_ptr=v_cache, y_ptr=y,
            slots_ptr=slots, positions_ptr=positions, counters_ptr=counters,
            acc_ptr=acc, m_ptr=m, l_ptr=l,
            stride_q_b=q.stride(0), stride_q_t=q.stride(1), stride_q_h=q.stride(2),
            stride_k_s=k_cache.stride(0), stride_k_h=C * K,
            num_slots=num_slots, C=C, W=sliding_window or 0, most_splits=num_splits,
            SCALE=scale, SOFTCAP=softcap, HEAD_DIM=K, GROUP_SIZE=G, Q_LEN=T,
            IS_LOCAL=sliding_window is not None,
            FAST_TANH=not INTERPRETED and q.dtype != torch.float32,
            BLOCK_M=max(16, rows), BLOCK_K=block_k, BLOCK_R=block_r, BLOCK_S=block_s, **tile,
        )  # fmt: skip
    return y
