"""The beginning of a decode step, all that stands before the first layer, in one launch.

    token, position   those of the row's slot
    residual          embed(token)                                      see head.py
    normed            rmsnorm(residual)                                 see norm.py
    cos, sin          rope_tables(position), of each kind of layer      see rotary.py

It computes and rounds what these do.  One program makes all of a row: the sines while the row of
the table is on its way.

Cost: D elements read and 2 D written a row, and 4 K elements of cos and sin for each kind of layer;
bound by the latency of three loads, each of which needs the one before it.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from gemcut.kernels.checks import (
    check_index,
    check_shape,
    check_tensors,
    check_weight,
    require,
)
from gemcut.kernels.dependent_launch import dependent_launch, wait_for_predecessor
from gemcut.kernels.head import embedding
from gemcut.kernels.norm import MAX_HIDDEN_SIZE, normalised
from gemcut.kernels.outputs import result, results
from gemcut.kernels.product_tiles import operands
from gemcut.kernels.quantized_weight import Weight
from gemcut.kernels.rotary import check_frequencies, store_tables


@triton.jit(
    do_not_specialize=["N"],
    do_not_specialize_on_alignment=[
        "token_ids_ptr", "positions_ptr", "rows_ptr", "row_positions_ptr"
    ],
)  # fmt: skip
def begin_step_kernel(
    token_ids_ptr, positions_ptr, rows_ptr,  # [N], [N], [M]
    w_ptr, scales_ptr, zeros_ptr,  # the table: [V, D], [V, G] x 2
    norm_w_ptr, inv_freq_ptr, local_inv_freq_ptr,  # [D], [K/2] or [M, K/2]
    row_positions_ptr, residual_ptr, y_ptr,  # [M], [M, D], [M, D]
    cos_ptr, sin_ptr,  # [R, M, K] each
    stride_inv_freq_m, stride_local_inv_freq_m,  # 0 where all rows share the frequencies
    N, V, D,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    EPS: tl.constexpr,
    ATTENTION_SCALING: tl.constexpr,
    LOCAL_ATTENTION_SCALING: tl.constexpr,
    HALF_DIM: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,  # of half a head
):  # fmt: skip
    wait_for_predecessor(DEPENDENT)
    m = tl.program_id(0).to(tl.int64)
    row = m
    if rows_ptr is not None:
        row = tl.load(rows_ptr + m).to(tl.int64)
    exists = (row >= 0) & (row < N)  # others are inactive, and show as NaN
    token_id = tl.load(token_ids_ptr + row, mask=exists, other=-1)
    position = tl.load(positions_ptr + row, mask=exists, other=-1)
    if row_positions_ptr is not None:
        tl.store(row_positions_ptr + m, position)

    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    table = w_ptr, scales_ptr, zeros_ptr
    residual = embedding(table, token_id, offs_d, V, D, FORMAT, GROUP, SCALE)
    residual = residual.to(residual_ptr.dtype.element_ty)
    w = tl.load(norm_w_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)

    inv_freq_ptr += m * stride_inv_freq_m
    store_tables(cos_ptr, sin_ptr, m, position, inv_freq_ptr, ATTENTION_SCALING, HALF_DIM, BLOCK_K)
    if local_inv_freq_ptr is not None:
        local_inv_freq_ptr += m * stride_local_inv_freq_m
        store_tables(
            cos_ptr, sin_ptr, tl.num_programs(0) + m, position, local_inv_freq_ptr,
            LOCAL_ATTENTION_SCALING, HALF_DIM, BLOCK_K,
        )  # fmt: skip

    tl.store(residual_ptr + m * D + offs_d, residual, mask=mask_d)
    x = tl.where(mask_d, residual.to(tl.float32), 0.0)
    y = normalised(x, w, D, EPS)
    tl.store(y_ptr + m * D + offs_d, y.to(y_ptr.dtype.element_ty), mask=mask_d)


def begin_step(
    token_ids: Tensor,
    positions: Tensor,
    rows: Tensor | None,
    table: Weight,
    scale: float,
    norm_weight: Tensor,
    eps: float,
    inv_freqs: Sequence[Tensor],
    attention_scalings: Sequence[float],
    *,
    out: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What stands before the first layer: positions, residual and its norm, cos and sin.

    token_ids, positions [N] int, of which row m takes those at rows[m], or its own where rows is
    None; table [V, D], norm_weight [D]; for each of R kinds of layer, one or two, inv_freqs [K/2]
    or [M, K/2] float32 and its scaling -> positions [M], residual [M, D], normed [M, D], cos, sin
    [R, M, 1, K] in the table's dtype.  A row outside yields NaN and the position -1, an id outside
    the table NaN: the device cannot raise.
    """
    check_weight("table", table, "[V, D]")
    (V, D), N = table.shape, positions.numel()
    M = N if rows is None else rows.numel()
    check_tensors(
        table, token_ids=token_ids, positions=positions, rows=rows, norm_weight=norm_weight
    )
    check_shape("norm_weight", norm_weight, D)
    require(0 < D <= MAX_HIDDEN_SIZE, f"hidden size {D} is not in 1 to {MAX_HIDDEN_SIZE}")
    check_index("token_ids", token_ids, N)
    check_index("positions", positions, N)
    if rows is not None:
        check_index("rows", rows, M)
    kinds = len(inv_freqs)
    require(
        kinds in (1, 2) and len(attention_scalings) == kinds,
        f"{kinds} inv_freqs and {len(attention_scalings)} scalings, must be 1 or 2 of each",
    )
    half = check_frequencies(inv_freqs[0], M, positions)
    require(check_frequencies(inv_freqs[-1], M, positions) == half, "inv_freqs differ in width")

    dtype = table.dtype
    given, used = results(out, 5), (token_ids, positions, rows, table, norm_weight, inv_freqs)
    row_positions = None
    if rows is not None or out is not None:
        row_positions = result(given[0], (M,), table, positions.dtype, *used)
    residual = result(given[1], (M, D), table, dtype, *used, given[0])
    y = result(given[2], (M, D), table, dtype, *used, given[:2])
    cos = result(given[3], (kinds, M, 1, 2 * half), table, dtype, *used, given[:3])
    sin = result(given[4], (kinds, M, 1, 2 * half), table, dtype, *used, given[:4])
    if M:
        strides = [0 if inv_freq.dim() == 1 else half for inv_freq in inv_freqs]
        block_d = triton.next_power_of_2(D)
        begin_step_kernel[(M,)](
            token_ids_ptr=token_ids, positions_ptr=positions, rows_ptr=rows,
            **operands(table), norm_w_ptr=norm_weight,
            inv_freq_ptr=inv_freqs[0], local_inv_freq_ptr=inv_freqs[1] if kinds == 2 else None,
            row_positions_ptr=row_positions, residual_ptr=residual, y_ptr=y,
            cos_ptr=cos, sin_ptr=sin,
            stride_inv_freq_m=strides[0], stride_local_inv_freq_m=strides[-1],
            N=N, V=V, D=D, SCALE=scale, EPS=eps,
            ATTENTION_SCALING=float(attention_scalings[0]),
            LOCAL_ATTENTION_SCALING=float(attention_scalings[-1]),
            HALF_DIM=half, BLOCK_D=block_d, BLOCK_K=triton.next_power_of_2(half),
            num_warps=min(16, max(1, block_d // 512)), **dependent_launch(table.device),
        )  # fmt: skip
    return positions if row_positions is None else row_positions, residual, y, cos, sin
