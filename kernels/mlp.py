"""The gated MLP's first half: GeGLU after a product of many rows, or inside one of few rows.

    geglu               gelu(gate) * up                       gate_up [M, 2 F], gate first: prefill
    norm_linear_geglu   the same of rmsnorm(residual + ..., norm_weight) @ gate_up.T: decode

GELU is its tanh approximation, which is what every published Gemma was trained with.  Arithmetic is
float32, rounded once.  In decode a program owns the same BLOCK_N rows of gate and of up, so that
nothing between the two products leaves its registers.

Cost of geglu: 3 M F elements moved, about 15 operations each: bound by memory bandwidth.  Of
norm_linear_geglu: 2 F D weights read once for 16 rows, 2 operations each a row: likewise, see
matmul.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemcut.kernels.activations import gelu
from gemcut.kernels.checks import check_rows, check_tensors, require
from gemcut.kernels.matmul import (
    BLOCK_M,
    PROCESSORS,
    check_linear,
    halves,
    normed_product,
    pipeline,
    rows_of_weight,
)
from gemcut.kernels.prologue import check_prologue
from gemcut.kernels.tiles import tuned

BLOCK_F = 1024  # columns of a program of geglu


@triton.jit
def geglu_kernel(
    gate_up_ptr, y_ptr,  # [M, 2 F], [M, F]
    stride_gate_up_m,
    F,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31 on a long prefill
    offs_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask_f = offs_f < F

    gate_ptrs = gate_up_ptr + row * stride_gate_up_m + offs_f
    gate = tl.load(gate_ptrs, mask=mask_f, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + F, mask=mask_f, other=0.0).to(tl.float32)
    y = gelu(gate) * up
    tl.store(y_ptr + row * F + offs_f, y.to(y_ptr.dtype.element_ty), mask=mask_f)


@triton.jit(do_not_specialize=["M"])
def norm_linear_geglu_kernel(
    residual_ptr, branch_ptr, summed_ptr,  # [M, D] x 3
    post_w_ptr, norm_w_ptr,  # [D] x 2
    w_ptr, y_ptr,  # [2 F, D], [M, F]
    M, F, D,
    EPS: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_POST_NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    start_n = tl.program_id(1).to(tl.int64) * BLOCK_N
    offs_2n = tl.arange(0, 2 * BLOCK_N)  # BLOCK_N rows of gate, then the same of up
    rows = start_n + offs_2n % BLOCK_N + (offs_2n // BLOCK_N).to(tl.int64) * F
    mask_m, mask_rows = offs_m < M, start_n + offs_2n % BLOCK_N < F
    # one program of all stores the sum
    mask_stored = offs_m < tl.where(tl.program_id(1) == 0, M, 0)

    acc = normed_product(
        residual_ptr, branch_ptr, summed_ptr, post_w_ptr, norm_w_ptr, w_ptr,
        offs_m, mask_m, mask_stored, rows, mask_rows, D,
        EPS, HAS_BRANCH, HAS_POST_NORM, BLOCK_M, 2 * BLOCK_N, BLOCK_D,
    )  # fmt: skip
    gate, up = halves(acc, BLOCK_M, BLOCK_N)
    y = gelu(gate) * up
    offs_n = start_n + tl.arange(0, BLOCK_N)
    y_ptrs = y_ptr + offs_m[:, None] * F + offs_n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_n < F)[None, :])


def _tile(F: int, x: Tensor, has_branch: bool = False) -> dict[str, int]:
    """BLOCK_N rows of gate and as many of up; predicted (bench/NOTES.md), not yet timed.

    The most rows are best of which all programs run at once: a second wave walks along the branch
    and fills its pipeline again, beside few others.  Of 2 x 64 rows a processor holds three
    programs, two where they add a branch.
    """
    if F < 32 * PROCESSORS:
        block_n, columns = 16, 256
    elif 64 * PROCESSORS <= F <= 64 * PROCESSORS * (2 if has_branch else 3):
        block_n, columns = 64, 128
    else:
        block_n, columns = 32, 128
    rule = {"BLOCK_N": rows_of_weight(x, block_n), **pipeline(x, columns)}
    return rule | tuned("norm_linear_geglu", x, F, x.shape[1])


def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up: gate_up [M, 2 F], gate first -> [M, F].  Rows may lie apart."""
    require(
        gate_up.dim() == 2 and gate_up.shape[1] > 0 and gate_up.shape[1] % 2 == 0,
        f"gate_up is {list(gate_up.shape)}, must be [M, 2 F]",
    )
    check_tensors(gate_up)
    M, F = gate_up.shape[0], gate_up.shape[1] // 2
    check_rows("gate_up", gate_up, 2 * F)

    y = torch.empty((M, F), device=gate_up.device, dtype=gate_up.dtype)
    if M:
        geglu_kernel[(M, triton.cdiv(F, BLOCK_F))](
            gate_up_ptr=gate_up, y_ptr=y, stride_gate_up_m=gate_up.stride(0),
            F=F, BLOCK_F=BLOCK_F, num_warps=4,
        )  # fmt: skip
    return y


def norm_linear_geglu(
    residual: Tensor,
    branch: Tensor | None,
    post_weight: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    gate_up_weight: Tensor,
) -> tuple[Tensor, Tensor]:
    """Add a branch, normalise, project to gate and up, combine: y [M, F], summed [M, D].

    residual, branch [M, D]; post_weight, norm_weight [D]; gate_up_weight [2 F, D], gate first.
    Without a branch `summed` is `residual` itself.  A row's bits do not depend on the others.
    """
    check_linear(residual, gate_up_weight, None)
    rows = gate_up_weight.shape[0]
    require(rows % 2 == 0, f"gate_up_weight has {rows} rows, must have as many of gate as of up")
    summed = check_prologue(residual, branch, post_weight, norm_weight)

    M, D, F = *residual.shape, rows // 2
    y = torch.empty((M, F), device=residual.device, dtype=residual.dtype)
    if M:
        tile = _tile(F, residual, has_branch=branch is not None)
        grid = (triton.cdiv(M, BLOCK_M), triton.cdiv(F, tile["BLOCK_N"]))
        norm_linear_geglu_kernel[grid](
            residual_ptr=residual, branch_ptr=branch, post_w_ptr=post_weight,
            norm_w_ptr=norm_weight, summed_ptr=summed, w_ptr=gate_up_weight, y_ptr=y,
            M=M, F=F, D=D, EPS=eps,
            HAS_BRANCH=branch is not None, HAS_POST_NORM=post_weight is not None,
            **tile,
        )  # fmt: skip
    return y, summed
