"""Splits of decode attention on the device: their bounds, their programs, and their sum.

A split leaves acc [num_rows, K], not yet divided, and the running maximum m and sum l [num_rows] of
its queries.  A launch of its own adds them up, one program for each part of a query's head_dim:

    m = max_i m_i    l = sum_i l_i * 2 ** (m_i - m)    y = sum_i acc_i * 2 ** (m_i - m) / l

over the splits i that hold a key which the token sees.  They are loaded BLOCK_S at a time, and each
place keeps a sum of its own, of every BLOCK_S-th split; the places are added up at the end.  So the
order of the sum follows from the token's position alone.

Cost: for T tokens 4 T HQ K bytes of each split are read, through L2, in which they were just
written: bound by the latencies of a position, of BLOCK_S partials after the other, and of a store.
"""

import triton
import triton.language as tl

from gemcut.kernels.attention_tiles import NO_MAXIMUM
from gemcut.kernels.dependent_launch import wait_for_predecessor

MAX_POSITION = tl.constexpr(2**30)  # sums with it stay within 32 bits


@triton.jit
def split_of(key, SPLIT: tl.constexpr, IS_LOCAL: tl.constexpr):
    """The split that holds a key; see kv_splits.py."""
    x = key // SPLIT
    if IS_LOCAL:
        return x
    # the exponent and 7 bits of mantissa, which count on from 128 where x is 128; x < 2 ** 24
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    return tl.where(x < 128, x, (bits >> 16) - 133 * 128)


@triton.jit
def split_begin(split, SPLIT: tl.constexpr, IS_LOCAL: tl.constexpr):
    """The first key of a split."""
    if IS_LOCAL:
        return split * SPLIT
    octave = tl.maximum((split >> 7) - 1, 0)
    return tl.where(split < 256, split, (128 + (split & 127)) << octave) * SPLIT


@triton.jit
def run_begin(pid, first, end, first_split, end_split, SPLIT: tl.constexpr, IS_LOCAL: tl.constexpr):
    """The first split of a program's run over keys first to end - 1; pid + 1 gives its end.

    Where there are fewer programs than splits, each takes those that begin in its part of the keys.
    """
    programs = tl.num_programs(0)
    share = (end - first) // programs + 1
    last_before = tl.minimum(first + pid.to(tl.int64) * share, end).to(tl.int32) - 1
    split = split_of(tl.maximum(last_before, 0), SPLIT, IS_LOCAL) + 1
    split = tl.where((pid == 0) | (end_split - first_split <= programs), first_split + pid, split)
    return tl.where(pid == programs, end_split, tl.minimum(split, end_split))


@triton.jit
def find_row(slots_ptr, positions_ptr, b, num_slots, C, W, T, IS_RING: tl.constexpr):
    """Slot and first position of row b, and whether no slot holds what it sees.

    The position is -1 where the row is inactive, and at most MAX_POSITION.
    """
    slot = tl.load(slots_ptr + b)
    position = tl.load(positions_ptr + b)
    is_unknown = (slot < 0) | (slot >= num_slots) | (position > MAX_POSITION)
    position = tl.maximum(tl.minimum(position, MAX_POSITION), -1).to(tl.int32)
    is_unknown |= position + T - first_key(position, W, IS_RING) > C
    return slot, position, is_unknown & (position >= 0)


@triton.jit
def first_key(position, W, IS_LOCAL: tl.constexpr):
    """The first key that a token sees."""
    if IS_LOCAL:
        return tl.maximum(position - W + 1, 0)
    return tl.zeros((), tl.int32)


@triton.jit
def store_partial(
    acc_ptr, m_ptr, l_ptr,  # [partials, num_rows, K], [num_rows, partials] twice
    acc, odd_acc, m_i, l_i, number, offs_r, mask_r, num_rows, most_splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,  # 2: acc is the even dimensions, odd_acc the others
    COMPILED: tl.constexpr,
):  # fmt: skip
    """Leave rows offs_r of acc, m and l at place `number`."""
    offs_k = tl.arange(0, BLOCK_K // PARTS) * PARTS
    acc_ptr += number.to(tl.int64) * num_rows * HEAD_DIM
    offs = offs_r[:, None] * HEAD_DIM + offs_k[None, :]
    mask = mask_r[:, None] & (offs_k < HEAD_DIM)[None, :]
    _store_in_place(acc_ptr, offs, acc, mask, COMPILED)
    if PARTS == 2:
        _store_in_place(acc_ptr + 1, offs, odd_acc, mask, COMPILED)
    at = offs_r.to(tl.int64) * most_splits + number
    tl.store(m_ptr + at, m_i, mask=mask_r)
    tl.store(l_ptr + at, l_i, mask=mask_r)


@triton.jit
def _store_in_place(acc_ptr, offs, acc, mask, COMPILED: tl.constexpr):
    """Store acc from the registers in which the product left it.

    By way of shared memory it would take 8 KB more, and of 82 KB no three programs fit a processor
    of sm_90.
    """
    if COMPILED:
        tl.inline_asm_elementwise(
            "{.reg .pred p; .reg .b64 a; setp.ge.s32 p, $2, 0; mad.wide.s32 a, $2, 4, $1; "
            "@p st.global.f32 [a], $3; mov.b32 $0, 0;}",
            "=r,l,r,f", [acc_ptr.to(tl.int64), tl.where(mask, offs, -1), acc],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.store(acc_ptr + offs, acc, mask=mask)


@triton.jit(
    do_not_specialize=["num_slots", "C", "W", "T", "num_rows", "most_splits"],
    do_not_specialize_on_alignment=["slots_ptr", "positions_ptr"],
)
def attention_combine_kernel(
    acc_ptr, m_ptr, l_ptr,  # [B, tiles, HK, partials, num_rows, K], [.., num_rows, partials] twice
    y_ptr, v_scale_ptr,  # [B, T, HQ, K], [HK] where the cache is fp8
    slots_ptr, positions_ptr,  # [B]
    num_slots, C, W, T, num_rows, most_splits,
    HEAD_DIM: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    IS_RING: tl.constexpr,
    IS_LOCAL: tl.constexpr,
    SPLIT: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor(DEPENDENT)
    pid_d, query, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    _, position, is_unknown = find_row(slots_ptr, positions_ptr, b, num_slots, C, W, T, IS_RING)
    token, head = query // (NUM_KV_HEADS * GROUP_SIZE), query % (NUM_KV_HEADS * GROUP_SIZE)
    tile, token_of_tile = token // TOKENS, token % TOKENS
    # the splits that the token sees, and the first of its tile
    last_key = position + token
    split = split_of(first_key(last_key, W, IS_LOCAL), SPLIT, IS_LOCAL)
    stored = split_of(first_key(last_key - token_of_tile, W, IS_LOCAL), SPLIT, IS_LOCAL)
    count = split_of(tl.maximum(last_key, 0), SPLIT, IS_LOCAL) + 1 - split
    count = tl.where((position < 0) | is_unknown, 0, count)

    workspace = b * tl.cdiv(T, TOKENS) * NUM_KV_HEADS + tile * NUM_KV_HEADS + head // GROUP_SIZE
    workspace = workspace * most_splits * num_rows  # where this head's begins
    row = token_of_tile * GROUP_SIZE + head % GROUP_SIZE
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    ml = workspace + row.to(tl.int64) * most_splits + split - stored + offs_s
    acc_ptrs = acc_ptr + (workspace + row) * HEAD_DIM + offs_d[None, :]
    acc = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    m_i = tl.full([BLOCK_S], NO_MAXIMUM, tl.float32)
    l_i = tl.zeros([BLOCK_S], tl.float32)
    for begin in tl.range(0, count, BLOCK_S):
        mask = begin + offs_s < count
        numbers = (split - stored + begin + offs_s).to(tl.int64)[:, None]
        # .cg: read once
        m = tl.load(m_ptr + ml + begin, mask=mask, other=NO_MAXIMUM, cache_modifier=".cg")
        l = tl.load(l_ptr + ml + begin, mask=mask, other=0.0, cache_modifier=".cg")
        partial = tl.load(
            acc_ptrs + numbers * num_rows * HEAD_DIM,
            mask=mask[:, None] & mask_d[None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        m_new = tl.maximum(m_i, m)
        alpha, weight = tl.exp2(m_i - m_new), tl.exp2(m - m_new)
        l_i = l_i * alpha + l * weight
        acc = acc * alpha[:, None] + partial * weight[:, None]
        m_i = m_new

    weight = tl.exp2(m_i - tl.max(m_i, axis=0))
    l = tl.sum(l_i * weight, axis=0)
    l = tl.where(l == 0.0, 1.0, l)  # no key: zeros
    l = tl.where(is_unknown, float("nan"), l)
    acc = tl.sum(acc * weight[:, None], axis=0)
    if v_scale_ptr is not None:
        acc *= tl.load(v_scale_ptr + head // GROUP_SIZE)
    if y_ptr.dtype.element_ty == tl.float32:
        y = tl.div_rn(acc, tl.broadcast_to(l, [BLOCK_D]))
    else:
        y = acc * (1.0 / l)
    y_ptrs = y_ptr + ((b * T + token) * NUM_KV_HEADS * GROUP_SIZE + head) * HEAD_DIM + offs_d
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_d)
