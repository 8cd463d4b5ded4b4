"""Split-KV attention of each row's T newest tokens over its slot, in two launches.

    s[t, j] = softcap(q[t] . k[j] * scale)     token t sees key j iff
    y[t]    = sum_j softmax_j(s[t, j]) * v[j]  position + t - W < j <= position + t

q, y [B, T, HQ, K]; k_cache, v_cache [slots, HK, C, K], position p at index p % C; or in blocks, see
attention_tiles.py.

The queries that share a KV head are one tile of tl.dot: those of one token, or of several while
they are at most 16.  The keys are cut into splits at absolute positions (kv_splits.py).  A program
takes a run of a tile's splits, in one pipelined loop over their keys; at the end of each it leaves
the split's unnormalised acc, m and l in a workspace.  A second launch adds up, for each query, the
splits that it sees (kv_combine.py), in an order that its position gives.

What a query does not see of a split, masked keys, adds exact zeros.  So a token's bits are the same
in any company: whatever the rows beside it, the tokens decoded with it, and the programs that share
the work.  Two compiled kernels serve all of these: constants follow from the model's shape and the
arch, and nothing is counted or waited for within a launch.

Scores, softmax and partial sums are float32; p is rounded to v's dtype for the second product, and
y once.  A row yields zeros where positions[b] < 0, and NaN where its slot does not exist, where it
sees more than C keys or is at a position beyond 2 ** 30; so does a token that sees a key whose
block does not exist: wrong input shows, and never reads foreign memory.

Of a cache in fp8 the keys' scale is a factor of the scores, and the values' scale one of the sum of
splits.  Keys take q's dtype in registers; values and p float16, which holds e4m3 exactly and takes
a quarter of the instructions of bfloat16.

Cost: for a row that sees S keys 2 S HK K elements of cache are read, for T tokens T * GROUP_SIZE /
16 times, mostly from L2.  The workspace adds 8 T HQ K bytes for each split, written and read back
through L2: in bf16 2 T GROUP_SIZE / SPLIT of the cache's bytes, 3 to 25 % for one token up to 8k
keys and less beyond.  4 T HQ K S operations: bound by memory bandwidth.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemcut.kernels.attention_tiles import (
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
from gemcut.kernels.dependent_launch import dependent_launch, wait_for_predecessor
from gemcut.kernels.gpu_arch import arch_of
from gemcut.kernels.interpreter import INTERPRETED
from gemcut.kernels.kv_combine import (
    MAX_POSITION,
    attention_combine_kernel,
    find_row,
    first_key,
    run_begin,
    split_begin,
    split_of,
    store_partial,
)
from gemcut.kernels.kv_splits import (
    MAX_SPLITS,
    UNIFORM_SPLITS,
    count_splits,
    most_splits,
    rule_split,
)
from gemcut.kernels.outputs import result
from gemcut.kernels.tiles import tuned

MAX_Q_LEN = 8  # tokens of a row; more are a prefill
MAX_GROUP_SIZE = 64  # queries of a token in one tile
MIN_ROWS = 16  # of a tile of tl.dot
# Programs of a launch: one wave of three on each of 132 processors.  The host knows no length, so
# the grid follows the capacity, and a program without keys still takes its turn.
MANY_PROGRAMS = 396

# splits and columns that a program of one warp, which has no barriers, loads at once
COMBINED = {"BLOCK_S": 64, "BLOCK_D": 16, "num_warps": 1}

PLAIN = ["stride_q_b", "stride_q_t", "stride_q_h", "stride_table", "num_slots", "num_blocks"]
PLAIN += ["C", "W", "T"]
PLAIN += ["num_rows", "most_splits"]


@triton.jit(  # one compiled kernel serves every T, B and cache
    do_not_specialize=PLAIN, do_not_specialize_on_alignment=["slots_ptr", "positions_ptr"]
)
def attention_decode_kernel(
    q_ptr, k_ptr, v_ptr,  # [B, T, HQ, K], [slots, HK, C, K] twice
    slots_ptr, positions_ptr, k_scale_ptr,  # [B] x 2, [HK] where the cache is fp8
    block_table_ptr,  # [slots, N] where the cache is in blocks, [blocks, block_size, HK, K]
    acc_ptr, m_ptr, l_ptr,  # [B, tiles, HK, partials, num_rows, K], [.., num_rows, partials] twice
    stride_q_b, stride_q_t, stride_q_h,  # in units of Q_UNIT elements
    stride_k_s, stride_k_h,  # v as k
    stride_table, num_slots, num_blocks, C, W, T, num_rows, most_splits,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    Q_UNIT: tl.constexpr,
    KV_STRIDE: tl.constexpr,  # from a token to the next
    KV_BLOCK: tl.constexpr,  # tokens of a block; 0: slots
    IS_RING: tl.constexpr,  # a local layer's slot
    IS_LOCAL: tl.constexpr,
    FAST_TANH: tl.constexpr,
    COMPILED: tl.constexpr,  # not interpreted
    DEPENDENT: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor(DEPENDENT)
    pid_s, pid_h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_head, first_token = pid_h % NUM_KV_HEADS, pid_h // NUM_KV_HEADS * TOKENS
    offs_m = tl.arange(0, BLOCK_M)  # token offs_m // GROUP_SIZE, head offs_m % GROUP_SIZE
    offs_k = tl.arange(0, BLOCK_K)
    num_tokens = tl.minimum(T - first_token, TOKENS)
    mask_m = offs_m < num_tokens * GROUP_SIZE
    tokens, heads = first_token + offs_m // GROUP_SIZE, kv_head * GROUP_SIZE + offs_m % GROUP_SIZE
    q_row = b * stride_q_b + tokens.to(tl.int64) * stride_q_t + heads.to(tl.int64) * stride_q_h
    q_ptrs = q_ptr + q_row[:, None] * Q_UNIT + offs_k[None, :]
    q = tl.load(q_ptrs, mask=mask_m[:, None] & (offs_k < HEAD_DIM)[None, :], other=0.0)

    slot, position, is_unknown = find_row(slots_ptr, positions_ptr, b, num_slots, C, W, T, IS_RING)
    if (position < 0) | is_unknown:
        return
    first_query = position + first_token
    end = first_query + num_tokens
    first = first_key(first_query, W, IS_LOCAL)
    first_split = split_of(first, SPLIT, IS_LOCAL)
    end_split = split_of(end - 1, SPLIT, IS_LOCAL) + 1
    split = run_begin(pid_s, first, end, first_split, end_split, SPLIT, IS_LOCAL)
    run_end = run_begin(pid_s + 1, first, end, first_split, end_split, SPLIT, IS_LOCAL)
    if split >= run_end:
        return

    kv_offset = kv_head.to(tl.int64) * stride_k_h
    if block_table_ptr is None:
        kv_offset += slot.to(tl.int64) * stride_k_s
    else:
        block_table_ptr += slot.to(tl.int64) * stride_table
    k_head_ptr, v_head_ptr = k_ptr + kv_offset, v_ptr + kv_offset
    # of fp8 values are taken in pairs: acc holds the even dimensions and odd_acc the others
    PARTS: tl.constexpr = 1 if k_scale_ptr is None else 2
    p_dtype: tl.constexpr = q.dtype if PARTS == 1 or q.dtype == tl.float32 else tl.float16
    head = b * tl.num_programs(1) + pid_h
    row = head * most_splits * num_rows  # where this head's workspace begins
    acc_ptr += row * HEAD_DIM
    m_ptr += row
    l_ptr += row

    offs_q = first_query + offs_m // GROUP_SIZE
    index = first % C if IS_RING else first  # of the first key in its slot
    if k_scale_ptr is None:
        scale: tl.constexpr = SCALE
    else:
        scale = SCALE * tl.load(k_scale_ptr + kv_head)
    acc = tl.zeros([BLOCK_M, BLOCK_K // PARTS], tl.float32)
    odd_acc = acc
    m_i = tl.full([BLOCK_M], NO_MAXIMUM, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    split_end = split_begin(split + 1, SPLIT, IS_LOCAL)
    begin_key = tl.maximum(split_begin(split, SPLIT, IS_LOCAL), first // BLOCK_N * BLOCK_N)
    end_key = tl.minimum(split_begin(run_end, SPLIT, IS_LOCAL), end)
    if block_table_ptr is not None:  # a pass ahead
        block = blocks_of(block_table_ptr, first, begin_key - first, end - first, KV_BLOCK, BLOCK_N)
    # without licm: addresses of the next loop, computed before it, would cost registers
    for begin in tl.range(begin_key, end_key, BLOCK_N, disable_licm=True):
        if begin == split_end:
            store_partial(
                acc_ptr, m_ptr, l_ptr, acc, odd_acc, m_i, l_i, split - first_split,
                offs_m, mask_m, num_rows, most_splits, HEAD_DIM, BLOCK_K, PARTS, COMPILED,
            )  # fmt: skip
            acc = tl.zeros([BLOCK_M, BLOCK_K // PARTS], tl.float32)
            odd_acc = acc
            m_i = tl.full([BLOCK_M], NO_MAXIMUM, tl.float32)
            l_i = tl.zeros([BLOCK_M], tl.float32)
            split += 1
            split_end = split_begin(split + 1, SPLIT, IS_LOCAL)
        offs_n = begin + tl.arange(0, BLOCK_N)
        number, seen = are_keys(begin - first, end - first, BLOCK_N)
        if block_table_ptr is None:
            at = ring_rows(index, number, C, KV_STRIDE, IS_RING)
        else:
            at, known = block_rows(
                block, first, number, num_blocks, stride_k_s, KV_STRIDE, KV_BLOCK
            )
            seen &= known
            block = blocks_of(
                block_table_ptr, first, begin + BLOCK_N - first, end - first, KV_BLOCK, BLOCK_N
            )
        k = kv_tile(k_head_ptr, at, seen, HEAD_DIM, BLOCK_K, False)
        v = kv_tile(v_head_ptr, at, seen, HEAD_DIM, BLOCK_K, PARTS == 2)
        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        if block_table_ptr is not None:
            s = tl.where(known[None, :], s, float("nan"))
        p, alpha, m_i, l_i = softmax_tile(
            s, m_i, l_i, True, offs_q, offs_n, W, scale, SOFTCAP, IS_LOCAL, FAST_TANH
        )
        p = p.to(p_dtype)
        if PARTS == 2:
            v, odd_v = even_and_odd(v, p_dtype, COMPILED)
            odd_acc = tl.dot(p, odd_v, odd_acc * alpha[:, None], input_precision="ieee")
        acc = tl.dot(p, v, acc * alpha[:, None], input_precision="ieee")

    store_partial(
        acc_ptr, m_ptr, l_ptr, acc, odd_acc, m_i, l_i, split - first_split,
        offs_m, mask_m, num_rows, most_splits, HEAD_DIM, BLOCK_K, PARTS, COMPILED,
    )  # fmt: skip


def _tile(head_dim: int, group_size: int, itemsize: int, arch: str) -> dict[str, int]:
    """Keys of a tile, warps and stages; compiled without spills, untimed.

    A memory of 4.7 TB/s and 0.7 us latency is kept busy by 3.3 MB in flight, 25 KB on each of 132
    multiprocessors: two stages of K and V tiles of 16 KiB are 64 KiB in each of three programs.
    Archs with 100 KB of shared memory have less bandwidth for each multiprocessor, and get half.
    """
    is_small = arch in ("sm_89", "sm_120")
    is_narrow = itemsize == 2 and group_size <= MIN_ROWS
    tile_bytes = 8192 if is_small else 16384
    row_bytes = itemsize * triton.next_power_of_2(head_dim)
    return {
        "BLOCK_N": max(16, min(32, tile_bytes // row_bytes)),
        "num_warps": 4 if is_narrow else 8,
        # three programs of four warps; or two, as shared memory has it, or where 168 would spill
        "maxnreg": 168 if is_narrow and arch == "sm_90" else 255,
        "num_stages": 3 if is_narrow else 2,
    }


def _keys_of_a_split(shortest: int, C: int, sliding_window: int | None) -> int:
    """So many that a row has at most MAX_SPLITS, or its window UNIFORM_SPLITS."""
    if sliding_window is not None:
        return max(shortest, triton.next_power_of_2(triton.cdiv(sliding_window, UNIFORM_SPLITS)))
    while count_splits(C, shortest) > MAX_SPLITS:
        shortest *= 2
    return shortest


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    block_tables: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of each row's T newest tokens: q [B, T, HQ, K] -> new tensor of the same shape.

    k_cache, v_cache [slots, HK, C, K], or [blocks, block_size, HK, K] with block_tables [slots, N]
    int32, of any strides whose last is 1; slots, positions [B]; query t of row b has position
    positions[b] + t, and its key is in the cache.  T is 1 to 8.  ValueError for shapes and numbers
    that no kernel takes.
    """
    require(q.dim() == 4, f"q is {list(q.shape)}, must be [B, T, HQ, K]")
    num_slots, HK, C, K = check_attention(
        q, k_cache, v_cache, scale, softcap, sliding_window, k_scale, v_scale, block_tables
    )
    check_tensors(q, slots=slots, positions=positions)
    B, T, HQ, _ = q.shape
    G = HQ // HK
    check_index("slots", slots, B)
    check_index("positions", positions, B)
    require(0 < T <= MAX_Q_LEN, f"{T} new tokens are not in 1 to {MAX_Q_LEN}")
    require(T <= C, f"{T} new tokens do not fit a capacity of {C}")
    require(G <= MAX_GROUP_SIZE, f"{G} query heads on a KV head exceed {MAX_GROUP_SIZE}")
    tokens = max(1, MIN_ROWS // G)  # of a tile of queries
    heads = HK * triton.cdiv(T, tokens)

    rows = (slots, positions, k_scale, v_scale, block_tables)
    y = result(out, (B, T, HQ, K), q, q.dtype, q, k_cache, v_cache, *rows)
    if B:
        is_local = sliding_window is not None
        tile = {"SPLIT": rule_split(HK)} | _tile(K, G, q.itemsize, arch_of(q.device))
        tile |= tuned("attention_decode", q, HQ, HK, K)
        split = _keys_of_a_split(tile.pop("SPLIT"), C, sliding_window)
        tokens_of_tile = min(T, tokens)
        seen = C if sliding_window is None else min(C, sliding_window + tokens_of_tile - 1)
        splits = most_splits(seen, split, is_local)
        num_programs = min(splits, max(1, MANY_PROGRAMS // (B * heads)))
        workspace = (B, heads, splits, tokens_of_tile * G)
        acc = torch.empty((*workspace, K), device=q.device, dtype=torch.float32)
        m = torch.empty(workspace, device=q.device, dtype=torch.float32)
        l = torch.empty(workspace, device=q.device, dtype=torch.float32)
        common = {
            "acc_ptr": acc, "m_ptr": m, "l_ptr": l, "slots_ptr": slots, "positions_ptr": positions,
            "num_slots": num_slots, "C": C, "W": min(sliding_window or 0, MAX_POSITION.value),
            "T": T, "num_rows": tokens_of_tile * G, "most_splits": splits,
            "HEAD_DIM": K, "GROUP_SIZE": G, "NUM_KV_HEADS": HK, "TOKENS": tokens,
            "IS_RING": is_local and block_tables is None, "IS_LOCAL": is_local, "SPLIT": split,
            **dependent_launch(q.device),
        }  # fmt: skip
        # of axes with one element no stride counts, so that it changes no kernel
        strides = [n * (size > 1) for n, size in zip(q.stride()[:3], q.shape[:3], strict=True)]
        unit = 1 if any(n % 8 for n in (K, *strides)) else 8
        block_k, block_m = max(16, triton.next_power_of_2(K)), triton.next_power_of_2(tokens * G)
        attention_decode_kernel[(num_programs, heads, B)](
            q_ptr=q, k_ptr=k_cache, v_ptr=v_cache, k_scale_ptr=k_scale,
            stride_q_b=strides[0] // unit, stride_q_t=strides[1] // unit,
            stride_q_h=strides[2] // unit,
            SCALE=scale, SOFTCAP=softcap, Q_UNIT=unit, **cache_arguments(k_cache, block_tables),
            FAST_TANH=not INTERPRETED and q.dtype != torch.float32, COMPILED=not INTERPRETED,
            BLOCK_M=max(MIN_ROWS, block_m), BLOCK_K=block_k, **tile, **common,
        )  # fmt: skip
        attention_combine_kernel[(triton.cdiv(K, COMBINED["BLOCK_D"]), T * HQ, B)](
            y_ptr=y, v_scale_ptr=v_scale, **COMBINED, **common
        )
    return y
