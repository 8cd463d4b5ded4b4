"""Splits of decode attention on the device: their bounds, their programs, and their sum.

A split leaves acc [num_rows, K], not yet divided, and the running maximum m and sum l [num_rows] of
its queries.  Partials are summed 16 at a time, each at the place that the last four bits of its
number give it, so that a sum is the same bits wherever a row begins and ends:

    m = max_i m_i    l = sum_i l_i * 2 ** (m_i - m)    acc = sum_i acc_i * 2 ** (m_i - m)

One that holds no visible key has m = NO_MAXIMUM and zeros, and adds exactly nothing; the sum of one
partial is that partial.
"""

import triton
import triton.language as tl

from gemcut.kernels.attention_tiles import NO_MAXIMUM
from gemcut.kernels.kv_splits import GROUP

FAN = tl.constexpr(GROUP)


@triton.jit
def split_of(key, SPLIT: tl.constexpr, IS_LOCAL: tl.constexpr):
    """The split that holds a key; see kv_splits.py."""
    x = key // SPLIT
    if IS_LOCAL:
        return x
    # the exponent and six bits of mantissa, which count on from 64 where x is 64; x < 2 ** 24
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    return tl.where(x < 64, x, (bits >> 17) - 132 * 64)


@triton.jit
def split_begin(split, SPLIT: tl.constexpr, IS_LOCAL: tl.constexpr):
    """The first key of a split."""
    if IS_LOCAL:
        return split * SPLIT
    octave = tl.maximum((split >> 6) - 1, 0)
    return tl.where(split < 128, split, (64 + (split & 63)) << octave) * SPLIT


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
def store_partial(
    acc_ptr, m_ptr, l_ptr,  # [partials, num_rows, K], [partials, num_rows] twice
    acc, m_i, l_i, number, offs_r, mask_r, num_rows,
    HEAD_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IN_PLACE: tl.constexpr,
):  # fmt: skip
    """Leave rows offs_r of acc, m and l at place `number`."""
    offs_k = tl.arange(0, BLOCK_K)
    first = number.to(tl.int64) * num_rows
    acc_ptr += first * HEAD_DIM
    offs = offs_r[:, None] * HEAD_DIM + offs_k[None, :]
    mask = mask_r[:, None] & (offs_k < HEAD_DIM)[None, :]
    if IN_PLACE:
        tl.inline_asm_elementwise(
            "{.reg .pred p; .reg .b64 a; setp.ge.s32 p, $2, 0; mad.wide.s32 a, $2, 4, $1; "
            "@p st.global.f32 [a], $3; mov.b32 $0, 0;}",
            "=r,l,r,f", [acc_ptr.to(tl.int64), tl.where(mask, offs, -1), acc],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.store(acc_ptr + offs, acc, mask=mask)
    at = first + offs_r
    tl.store(m_ptr + at, m_i, mask=mask_r)
    tl.store(l_ptr + at, l_i, mask=mask_r)


@triton.jit
def combine(
    acc_ptr, m_ptr, l_ptr,  # as in store_partial
    begin, end, base, offs_r, mask_r, num_rows,
    HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows offs_r of the sum of partials begin to end - 1, of which `base` is the first one stored.

    acc [BLOCK_R, BLOCK_K], m and l [BLOCK_R].
    """
    offs_k = tl.arange(0, BLOCK_K)
    m_i = tl.full([BLOCK_R], NO_MAXIMUM, tl.float32)
    l_i = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for start in tl.range(begin, end, FAN, num_stages=1):
        # each at the place of its last four bits, wherever `begin` is
        numbers = start + ((tl.arange(0, FAN) - start) & (FAN - 1))
        at = (numbers - base).to(tl.int64)[:, None] * num_rows + offs_r[None, :]
        mask = (numbers < end)[:, None] & mask_r[None, :]
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
    return acc, m_i, l_i
