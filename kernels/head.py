"""Both ends of the model: the embedding's rows, and the product with the vocabulary.

    embed             y[m] = table[token_ids[m]] * scale, rounded to the table's dtype
    lm_head           logits = softcap * tanh(x @ weight.T / softcap), in float32
    lm_head_argmax    the greatest of them and its token id, without the logits

Logits are float32 whatever x's dtype: bf16 logits tie, about one row in twenty would have two equal
maxima.  A program owns BLOCK_V tokens for 16 rows; for the argmax it keeps the best of them, and
the last program to finish compares what all have kept.  Both take the same sums in the same order,
so they agree bit for bit.

Cost of embed: 2 M D elements moved.  Of the head: V D weights read once for 16 rows (1.2 GB in a
step of gemma-2-2b, a fifth of all its bytes), 2 operations each a row, 4 M V bytes of logits
written: bound by memory bandwidth, see matmul.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemcut.kernels.activations import tanh
from gemcut.kernels.checks import (
    check_counters,
    check_index,
    check_shape,
    check_softcap,
    check_tensors,
    require,
)
from gemcut.kernels.matmul import BLOCK_M, check_linear, pipeline, product, rows_of_weight
from gemcut.kernels.tiles import tuned

BLOCK_V = 256  # tokens of a program of the head
BLOCK_T = 256  # programs whose best the last one compares at a time
MAX_BLOCK_D = 4096  # columns that a program of embed copies


@triton.jit
def embed_kernel(
    token_ids_ptr, table_ptr, y_ptr,  # [M], [V, D], [M, D]
    V, D,
    SCALE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    token_id = tl.load(token_ids_ptr + row).to(tl.int64)
    # an id outside the table would read foreign memory: it yields NaN, which nobody overlooks
    width = tl.where((token_id >= 0) & (token_id < V), D, 0)
    x = tl.load(table_ptr + token_id * D + offs_d, mask=offs_d < width, other=float("nan"))
    y = x.to(tl.float32) * SCALE
    tl.store(y_ptr + row * D + offs_d, y.to(y_ptr.dtype.element_ty), mask=mask_d)


@triton.jit
def head_tile(
    x_ptr, w_ptr, stride_x_m, offs_m, mask_m, offs_v, mask_v, D,
    SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Logits of tokens offs_v: [BLOCK_M, BLOCK_V] float32."""
    acc = product(
        x_ptr, w_ptr, stride_x_m, offs_m, mask_m, offs_v, mask_v, D, BLOCK_M, BLOCK_V, BLOCK_D
    )
    if SOFTCAP is not None:
        acc = SOFTCAP * tanh(acc / SOFTCAP, APPROXIMATE=False)
    return acc


@triton.jit(do_not_specialize=["M"])
def lm_head_kernel(
    x_ptr, w_ptr, logits_ptr,  # [M, D], [V, D], [M, V] float32
    stride_x_m,
    M, V, D,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    # int64: 8389 rows of 256 000 logits pass 2**31
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_v = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_m, mask_v = offs_m < M, offs_v < V
    logits = head_tile(
        x_ptr, w_ptr, stride_x_m, offs_m, mask_m, offs_v, mask_v, D,
        SOFTCAP, BLOCK_M, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    logits_ptrs = logits_ptr + offs_m[:, None] * V + offs_v[None, :]
    tl.store(logits_ptrs, logits, mask=mask_m[:, None] & mask_v[None, :])


@triton.jit
def greater(a, a_id, b, b_id):
    """The greater of two logits with its id; NaN is the greatest, the lower id wins a tie."""
    a_wins = (a > b) | (a != a) & (b == b) | ((a == b) | (a != a) & (b != b)) & (a_id < b_id)
    return tl.where(a_wins, a, b), tl.where(a_wins, a_id, b_id)


@triton.jit
def greatest(logits, ids):
    """The greatest of each row and its id, by the same rule: logits, ids [M, V] -> [M], [M]."""
    is_nan = logits != logits
    best = tl.max(tl.where(is_nan, -float("inf"), logits), axis=1)
    has_nan = tl.max(is_nan.to(tl.int32), axis=1) > 0
    wins = tl.where(has_nan[:, None], is_nan, logits == best[:, None])
    best_id = tl.min(tl.where(wins, ids, 1 << 62), axis=1)
    return tl.where(has_nan, float("nan"), best), best_id


@triton.jit(do_not_specialize=["M"])
def lm_head_argmax_kernel(
    x_ptr, w_ptr,  # [M, D], [V, D]
    tile_best_ptr, tile_ids_ptr,  # [tiles, M] float32 and int64: what each program keeps
    counters_ptr,  # [ceil(M / BLOCK_M)] int32, zeros before and after
    best_ptr, ids_ptr,  # [M] float32, [M] int64
    stride_x_m,
    M, V, D,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    tile, tiles = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_m, mask_v = offs_m < M, offs_v < V
    logits = head_tile(
        x_ptr, w_ptr, stride_x_m, offs_m, mask_m, offs_v, mask_v, D,
        SOFTCAP, BLOCK_M, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    logits = tl.where(mask_v[None, :], logits, -float("inf"))
    best, ids = greatest(logits, offs_v[None, :])
    tl.store(tile_best_ptr + tile * M + offs_m, best, mask=mask_m)
    tl.store(tile_ids_ptr + tile * M + offs_m, ids, mask=mask_m)

    tl.debug_barrier()  # every thread has stored before one of them counts
    counter_ptr = counters_ptr + tl.program_id(0)
    finished = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    if finished == tiles - 1:
        best = tl.full([BLOCK_M, BLOCK_T], -float("inf"), dtype=tl.float32)
        ids = tl.full([BLOCK_M, BLOCK_T], V, dtype=tl.int64)
        for start in range(0, tiles, BLOCK_T):
            offs_t = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
            mask = mask_m[:, None] & (offs_t < tiles)[None, :]
            offs = offs_t[None, :] * M + offs_m[:, None]
            # .cg: L2, where the other programs' stores are
            kept = tl.load(tile_best_ptr + offs, mask, other=-float("inf"), cache_modifier=".cg")
            kept_ids = tl.load(tile_ids_ptr + offs, mask, other=V, cache_modifier=".cg")
            best, ids = greater(best, ids, kept, kept_ids)
        best, ids = greatest(best, ids)
        tl.store(best_ptr + offs_m, best, mask=mask_m)
        tl.store(ids_ptr + offs_m, ids, mask=mask_m)
        tl.store(counter_ptr, 0)


def _tile(V: int, x: Tensor) -> dict[str, int]:
    """Two programs on a processor: the end of one, a reduction, is hidden by the other's loads.

    Many tokens in a program are few programs whose best the last one compares.
    """
    rule = {**pipeline(x, columns=64), "BLOCK_V": rows_of_weight(x, BLOCK_V)}
    rule["maxnreg"] = 255  # ptxas by itself aims for more programs, and spills 8 bytes
    return rule | tuned("lm_head", x, V, x.shape[1])


def embed(token_ids: Tensor, table: Tensor, scale: float) -> Tensor:
    """Scaled rows of the table: token_ids [M], table [V, D] -> [M, D].

    An id outside the table yields a row of NaN: the device cannot raise.
    """
    require(table.dim() == 2, f"table is {list(table.shape)}, must be [V, D]")
    V, D = table.shape
    M = token_ids.numel()
    check_tensors(table, token_ids=token_ids)
    check_shape("table", table, V, D)
    check_index("token_ids", token_ids, M)

    y = torch.empty((M, D), device=table.device, dtype=table.dtype)
    if y.numel():
        block_d = min(MAX_BLOCK_D, triton.next_power_of_2(D))
        embed_kernel[(M, triton.cdiv(D, block_d))](
            token_ids_ptr=token_ids, table_ptr=table, y_ptr=y, V=V, D=D,
            SCALE=scale, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return y


def lm_head(x: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    """Logits in float32 whatever x's dtype: x [M, D], weight [V, D] -> [M, V].

    A row's bits do not depend on the others.
    """
    check_linear(x, weight, None)
    check_softcap(softcap)
    M, (V, D) = x.shape[0], weight.shape
    logits = torch.empty((M, V), device=x.device, dtype=torch.float32)
    if M:
        tile = _tile(V, x)
        lm_head_kernel[(triton.cdiv(M, BLOCK_M), triton.cdiv(V, tile["BLOCK_V"]))](
            x_ptr=x, w_ptr=weight, logits_ptr=logits, stride_x_m=x.stride(0),
            M=M, V=V, D=D, SOFTCAP=softcap, **tile,
        )  # fmt: skip
    return logits


def lm_head_argmax(
    x: Tensor, weight: Tensor, softcap: float | None, counters: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The greatest logit and its token id: x [M, D], weight [V, D] -> [M] float32, [M] int64.

    The lowest id wins a tie; NaN counts as the greatest.  `counters` is scratch: at least M / 16
    zeros in int32, zeros again afterwards; None allocates it, which costs a launch.
    """
    check_linear(x, weight, None)
    check_softcap(softcap)
    M, (V, D) = x.shape[0], weight.shape
    tile = _tile(V, x)
    groups, tiles = triton.cdiv(M, BLOCK_M), triton.cdiv(V, tile["BLOCK_V"])
    if counters is None:
        counters = torch.zeros(groups, dtype=torch.int32, device=x.device)
    check_counters(counters, groups, x)

    best = torch.empty(M, dtype=torch.float32, device=x.device)
    ids = torch.empty(M, dtype=torch.int64, device=x.device)
    if M:
        tile_best = torch.empty((tiles, M), dtype=torch.float32, device=x.device)
        tile_ids = torch.empty((tiles, M), dtype=torch.int64, device=x.device)
        lm_head_argmax_kernel[(groups, tiles)](
            x_ptr=x, w_ptr=weight, tile_best_ptr=tile_best, tile_ids_ptr=tile_ids,
            counters_ptr=counters, best_ptr=best, ids_ptr=ids, stride_x_m=x.stride(0),
            M=M, V=V, D=D, SOFTCAP=softcap, BLOCK_T=BLOCK_T, **tile,
        )  # fmt: skip
    return best, ids
