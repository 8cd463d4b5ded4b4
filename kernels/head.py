"""Both ends of the model: the embedding's rows, and the product with the vocabulary.

    embed             y[m] = table[token_ids[m]] * scale, rounded to the table's dtype
    lm_head           logits = softcap * tanh(x @ weight.T / softcap), in float32
    lm_head_argmax    the greatest of them and its token id, without the logits

Logits are float32 whatever x's dtype: bf16 logits tie, about one row in twenty would have two equal
maxima.  A program owns BLOCK_V tokens for 16 rows.  For the argmax, all programs meet in an atomic
maximum of (logit, lowest id) packed into 63 bits, exact in any order, and the last to finish
unpacks it.  Both take the same sums in the same order, so they agree bit for bit.

Cost of embed: 2 M D elements moved.  Of the head: V D weights read once for 16 rows (1.2 GB in a
step of gemma-2-2b, a fifth of all its bytes), 2 operations each a row, 4 M V bytes of logits
written: bound by memory bandwidth, see skinny_product.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemcut.kernels.checks import (
    check_counters,
    check_index,
    check_shape,
    check_softcap,
    check_tensors,
    require,
)
from gemcut.kernels.dependent_launch import dependent_launch, wait_for_predecessor
from gemcut.kernels.gelu import tanh
from gemcut.kernels.skinny_product import BLOCK_M, check_linear, pipeline, product, rows_of_weight
from gemcut.kernels.tiles import tuned
from gemcut.kernels.top_k_top_p import packed, packed_id, packed_value

MAX_BLOCK_D = 4096  # columns that a program of embed copies


@triton.jit(do_not_specialize_on_alignment=["token_ids_ptr"])
def embed_kernel(
    token_ids_ptr, table_ptr, y_ptr,  # [M], [V, D], [M, D]
    V, D,
    SCALE: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    token_id = tl.load(token_ids_ptr + row).to(tl.int64)
    # an id outside the table would read foreign memory: it yields NaN, which shows
    width = tl.where((token_id >= 0) & (token_id < V), D, 0)
    x = tl.load(table_ptr + token_id * D + offs_d, mask=offs_d < width, other=float("nan"))
    y = x.to(tl.float32) * SCALE
    tl.store(y_ptr + row * D + offs_d, y.to(y_ptr.dtype.element_ty), mask=mask_d)


@triton.jit
def head_tile(
    x_ptr, w_ptr, stride_x_m, offs_m, mask_m, offs_v, mask_v, D,
    SOFTCAP: tl.constexpr, IS_EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Logits of tokens offs_v: [BLOCK_V, BLOCK_M] float32."""
    acc = product(
        x_ptr, w_ptr, stride_x_m, offs_m, mask_m, offs_v, mask_v, D, 0, D,
        IS_EVEN, True, BLOCK_M, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    if SOFTCAP is not None:
        acc = SOFTCAP * tanh(acc / SOFTCAP, APPROXIMATE=False)
    return acc


@triton.jit(do_not_specialize=["M"])
def lm_head_kernel(
    x_ptr, w_ptr, logits_ptr,  # [M, D], [V, D], [M, V] float32
    stride_x_m,
    M, V, D,
    SOFTCAP: tl.constexpr,
    IS_EVEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor(DEPENDENT)
    # int64: 8389 rows of 256 000 logits pass 2**31
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_v = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_m, mask_v = offs_m < M, offs_v < V
    logits = head_tile(
        x_ptr, w_ptr, stride_x_m, offs_m, mask_m, offs_v, mask_v, D,
        SOFTCAP, IS_EVEN, BLOCK_M, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    logits_ptrs = logits_ptr + offs_m[None, :] * V + offs_v[:, None]
    tl.store(logits_ptrs, logits, mask=mask_m[None, :] & mask_v[:, None])


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["counters_ptr"])
def lm_head_argmax_kernel(
    x_ptr, w_ptr,  # [M, D], [V, D]
    state_ptr,  # [M] int64: the greatest logit so far and its id, packed; zero before and after
    counters_ptr,  # [ceil(M / BLOCK_M)] int32, zeros before and after
    best_ptr, ids_ptr,  # [M] float32, [M] int64
    stride_x_m,
    M, V, D,
    SOFTCAP: tl.constexpr,
    IS_EVEN: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor(DEPENDENT)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_v = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_m, mask_v = offs_m < M, offs_v < V
    logits = head_tile(
        x_ptr, w_ptr, stride_x_m, offs_m, mask_m, offs_v, mask_v, D,
        SOFTCAP, IS_EVEN, BLOCK_M, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    best = tl.max(tl.where(mask_v[:, None], packed(logits, offs_v[:, None]), 0), axis=0)
    tl.atomic_max(state_ptr + offs_m, best, mask=mask_m, sem="relaxed")

    tl.debug_barrier()  # every thread's maximum comes before the count
    counter_ptr = counters_ptr + tl.program_id(0)
    finished = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    if finished == tl.num_programs(1) - 1:
        # .cg: L2, where the other programs' maxima are
        best = tl.load(state_ptr + offs_m, mask=mask_m, other=0, cache_modifier=".cg")
        tl.store(best_ptr + offs_m, packed_value(best), mask=mask_m)
        tl.store(ids_ptr + offs_m, packed_id(best), mask=mask_m)
        tl.store(state_ptr + offs_m, tl.zeros_like(best), mask=mask_m)
        tl.store(counter_ptr, 0)


def _tile(V: int, x: Tensor) -> dict[str, int]:
    D, block_v = x.shape[1], rows_of_weight(x)
    rule = {"BLOCK_V": block_v, **pipeline(x, triton.cdiv(V, block_v))}
    tile = rule | tuned("lm_head", x, V, D)
    is_even = D % tile["BLOCK_D"] == 0 and V % tile["BLOCK_V"] == 0
    return {"BLOCK_M": BLOCK_M, "IS_EVEN": is_even, **tile}


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
            SCALE=scale, BLOCK_D=block_d, num_warps=4, **dependent_launch(table.device),
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
            M=M, V=V, D=D, SOFTCAP=softcap, **tile, **dependent_launch(x.device),
        )  # fmt: skip
    return logits


def lm_head_argmax(
    x: Tensor, weight: Tensor, softcap: float | None, counters: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The greatest logit and its token id: x [M, D], weight [V, D] -> [M] float32, [M] int64.

    The lowest id wins a tie; NaN counts as the greatest.  `counters` is scratch: two zeros for each
    row and one for 16 in int32, zeros again afterwards; None allocates it, which costs a launch.
    """
    check_linear(x, weight, None)
    check_softcap(softcap)
    M, (V, D) = x.shape[0], weight.shape
    require(V < 2**31, f"vocabulary of {V} is not below 2**31")
    groups = triton.cdiv(M, BLOCK_M)
    if counters is None:
        counters = torch.zeros(2 * M + groups, dtype=torch.int32, device=x.device)
    check_counters(counters, 2 * M + groups, x)
    require(counters.storage_offset() % 2 == 0, "counters must begin at a multiple of 8 bytes")

    best = torch.empty(M, dtype=torch.float32, device=x.device)
    ids = torch.empty(M, dtype=torch.int64, device=x.device)
    if M:
        tile = _tile(V, x)
        state, counters = counters.narrow(0, 0, 2 * M), counters.narrow(0, 2 * M, groups)
        lm_head_argmax_kernel[(groups, triton.cdiv(V, tile["BLOCK_V"]))](
            x_ptr=x, w_ptr=weight, state_ptr=state.view(torch.int64), counters_ptr=counters,
            best_ptr=best, ids_ptr=ids, stride_x_m=x.stride(0),
            M=M, V=V, D=D, SOFTCAP=softcap, **tile, **dependent_launch(x.device),
        )  # fmt: skip
    return best, ids
