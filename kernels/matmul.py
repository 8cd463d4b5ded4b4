"""Matrix products: of many rows by cuBLAS, of a decode step's few rows by kernels of our own.

    linear          y = x @ weight.T + bias                              many rows: prefill
    skinny_linear   y = x @ weight.T + bias + residual                   few rows: decode
    norm_linear     y = rmsnorm(residual + ..., norm_weight) @ weight.T  see prologue.py

A program owns BLOCK_N columns of y for 16 rows of x and streams its rows of the weight once, 16
bytes a load, through a pipeline of asynchronous copies.  Sums are float32 and rounded once.

Batch invariance: the tile depends on the weight's shape and the part, never on M, for which Triton
must not specialise; missing rows are masked, further rows are further programs.  So all batch sizes
run the same code, and a row's bits do not depend on its company.

Cost: N D weights read once for 16 rows, plus 2 M (N + D) elements of activations; 2 M N D
operations.  At 16 rows that is 16 operations a byte in bf16, where an H200 could do about 200:
bound by memory bandwidth.  4.8 TB/s at a latency of 0.7 us want 25 KB in flight on each of 132
processors.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from gemcut.kernels.checks import check_rows, check_shape, check_tensors, require
from gemcut.kernels.parts import part
from gemcut.kernels.prologue import check_prologue, offset_weight, row_rstd, summed_tile
from gemcut.kernels.tiles import tuned

BLOCK_M = 16  # rows of a program: the least that tensor cores take
PROCESSORS = 132  # of an H100
SMALL_PARTS = ("sm_89", "sm_120")  # 99 KB of shared memory


@triton.jit
def weight_tile(w_ptr, offs_n, mask_n, offs_d, D):
    """Rows offs_n, columns offs_d of a matrix [N, D] -> [BLOCK_N, BLOCK_D]."""
    mask = mask_n[:, None] & (offs_d < D)[None, :]
    return tl.load(w_ptr + offs_n[:, None] * D + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Columns 0 to BLOCK_N - 1 and the rest: [BLOCK_M, 2 BLOCK_N] -> 2 x [BLOCK_M, BLOCK_N].

    A program that combines two rows of a weight takes both in one product, and parts them here.
    """
    return tl.split(acc.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1))


@triton.jit
def product(
    x_ptr, w_ptr, stride_x_m,  # [M, D], [N, D]
    offs_m, mask_m, rows, mask_rows,  # [BLOCK_M] x 2, [BLOCK_ROWS] x 2: tokens, rows of the weight
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Tokens times some rows of a weight: [BLOCK_M, BLOCK_ROWS] float32."""
    acc = tl.zeros([BLOCK_M, BLOCK_ROWS], dtype=tl.float32)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        mask_x = mask_m[:, None] & (offs_d < D)[None, :]
        x_ptrs = x_ptr + offs_m[:, None] * stride_x_m + offs_d[None, :]
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)
        w = weight_tile(w_ptr, rows, mask_rows, offs_d, D)
        acc = tl.dot(x, w.T, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["M"])
def skinny_linear_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr,  # [M, D], [N, D], [N], [M, N], [M, N]
    stride_x_m, stride_residual_m,
    M, N, D,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    # int64: row * stride passes 2**31 in a vocabulary's matrix
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N

    acc = product(
        x_ptr, w_ptr, stride_x_m, offs_m, mask_m, offs_n, mask_n, D, BLOCK_M, BLOCK_N, BLOCK_D
    )
    mask = mask_m[:, None] & mask_n[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + offs_m[:, None] * stride_residual_m + offs_n[None, :]
        acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def normed_product(
    residual_ptr, branch_ptr, summed_ptr, post_w_ptr, norm_w_ptr, w_ptr,  # see prologue.py; [N, D]
    offs_m, mask_m, mask_stored,  # [BLOCK_M] x 3: the tokens, and those whose sum is stored
    rows, mask_rows,  # [BLOCK_ROWS] x 2: of the weight
    D,
    EPS: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_POST_NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Normed tokens times some rows of a weight: [BLOCK_M, BLOCK_ROWS] float32."""
    branch_rstd = offs_m
    if HAS_POST_NORM:
        branch_rstd = row_rstd(branch_ptr, offs_m, mask_m, D, EPS, BLOCK_M, BLOCK_D)

    acc = tl.zeros([BLOCK_M, BLOCK_ROWS], dtype=tl.float32)
    squares = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        summed = summed_tile(
            residual_ptr, branch_ptr, post_w_ptr, summed_ptr,
            branch_rstd, offs_m, mask_m, offs_d, D, mask_stored, HAS_BRANCH, HAS_POST_NORM,
        )  # fmt: skip
        squares += summed * summed
        x = (summed * offset_weight(norm_w_ptr, offs_d, D)[None, :]).to(w_ptr.dtype.element_ty)
        w = weight_tile(w_ptr, rows, mask_rows, offs_d, D)
        acc = tl.dot(x, w.T, acc, input_precision="ieee")
    return acc * tl.rsqrt(tl.sum(squares, axis=1) / D + EPS)[:, None]


@triton.jit(do_not_specialize=["M"])
def norm_linear_kernel(
    residual_ptr, branch_ptr, summed_ptr,  # [M, D] x 3
    post_w_ptr, norm_w_ptr,  # [D] x 2
    w_ptr, bias_ptr, y_ptr,  # [N, D], [N], [M, N]
    M, N, D,
    EPS: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_POST_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    # one program of all stores the sum
    mask_stored = offs_m < tl.where(tl.program_id(1) == 0, M, 0)

    acc = normed_product(
        residual_ptr, branch_ptr, summed_ptr, post_w_ptr, norm_w_ptr, w_ptr,
        offs_m, mask_m, mask_stored, offs_n, mask_n, D,
        EPS, HAS_BRANCH, HAS_POST_NORM, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


def pipeline(x: Tensor, columns: int = 256) -> dict[str, int]:
    """Columns of the weight that a step reads, and steps on their way; predicted, not yet timed.

    Three stages are two steps in flight; more of them cost programs on a processor, whose steps are
    in flight as well.  bench/NOTES.md has the predictions.
    """
    is_short = x.itemsize == 2 or part(x.device) == "interpreter"
    return {
        "BLOCK_M": BLOCK_M,
        "BLOCK_D": columns if is_short else 64,
        "num_warps": 4,
        "num_stages": 3,
    }


def rows_of_weight(x: Tensor, rows: int) -> int:
    """How many rows of a weight a program streams: `rows` on a GPU."""
    return 512 if part(x.device) == "interpreter" else rows


def _block_n(N: int, x: Tensor) -> int:
    """A narrow matrix is cut finer, so that every processor has a program."""
    return rows_of_weight(x, 16 if N < 64 * PROCESSORS else 32)


def _tile(N: int, x: Tensor) -> dict[str, int]:
    rule = {"BLOCK_N": _block_n(N, x), **pipeline(x)}
    return rule | tuned("norm_linear", x, N, x.shape[1])


def _skinny_tile(N: int, x: Tensor) -> dict[str, int]:
    """The fewer programs, the more each has in flight: steps of 512 or 1024 columns, 32 to 64 KB.

    A step of twice as many columns takes less than twice as long: what a pass of the loop waits for
    is a chain of dependent instructions, and the next one's loads begin before its end.
    """
    block_n = _block_n(N, x)
    programs, has_room = triton.cdiv(N, block_n), part(x.device) not in SMALL_PARTS
    is_one_each = programs <= PROCESSORS and has_room
    rule = {"BLOCK_N": block_n, **pipeline(x, columns=1024 if is_one_each else 512)}
    if has_room and PROCESSORS < programs < 2 * PROCESSORS:
        rule["num_stages"] = 4
    else:
        # three programs on a processor; ptxas by itself aims for six, and spills 8 bytes
        rule["maxnreg"] = 168
    return rule | tuned("skinny_linear", x, N, x.shape[1])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Project many rows: x [M, D], weight [N, D], bias [N] -> [M, N], by cuBLAS.

    It adds nothing that a kernel here could fuse better; a row's bits may depend on M.
    """
    check_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """ValueError unless x [M, D], weight [N, D] and bias [N] make a product."""
    require(weight.dim() == 2, f"weight is {list(weight.shape)}, must be [N, D]")
    N, D = weight.shape
    require(N > 0 and D > 0, f"weight is {list(weight.shape)}: an empty product")
    check_tensors(x, weight=weight, bias=bias)
    check_shape("weight", weight, N, D)
    check_rows("x", x, D)
    if bias is not None:
        check_shape("bias", bias, N)


def skinny_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """Project few rows: x [M, D], weight [N, D], bias [N], residual [M, N] -> new tensor [M, N].

    A row's bits do not depend on the others.  Any M works; the weight is read once for 16 rows.
    """
    check_linear(x, weight, bias)
    M, (N, D) = x.shape[0], weight.shape
    if residual is not None:
        check_tensors(x, residual=residual)
        check_rows("residual", residual, N)
        require(residual.shape[0] == M, f"residual has {residual.shape[0]} rows, x {M}")

    y = torch.empty((M, N), device=x.device, dtype=x.dtype)
    if M:
        tile = _skinny_tile(N, x)
        grid = (triton.cdiv(M, BLOCK_M), triton.cdiv(N, tile["BLOCK_N"]))
        skinny_linear_kernel[grid](
            x_ptr=x, w_ptr=weight, bias_ptr=bias, residual_ptr=residual, y_ptr=y,
            stride_x_m=x.stride(0),
            stride_residual_m=0 if residual is None else residual.stride(0),
            M=M, N=N, D=D,
            HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, **tile,
        )  # fmt: skip
    return y


def norm_linear(
    residual: Tensor,
    branch: Tensor | None,
    post_weight: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream, normalise and project it: y [M, N], summed [M, D].

    residual, branch [M, D]; post_weight, norm_weight [D]; weight [N, D]; bias [N].  The residual is
    left as it is: other programs still read it.  Without a branch `summed` is `residual` itself.
    """
    summed = check_prologue(residual, branch, post_weight, norm_weight)
    check_linear(residual, weight, bias)
    M, (N, D) = residual.shape[0], weight.shape
    y = torch.empty((M, N), device=residual.device, dtype=residual.dtype)
    if M:
        tile = _tile(N, residual)
        grid = (triton.cdiv(M, BLOCK_M), triton.cdiv(N, tile["BLOCK_N"]))
        norm_linear_kernel[grid](
            residual_ptr=residual, branch_ptr=branch, post_w_ptr=post_weight,
            norm_w_ptr=norm_weight, summed_ptr=summed, w_ptr=weight, bias_ptr=bias, y_ptr=y,
            M=M, N=N, D=D, EPS=eps,
            HAS_BRANCH=branch is not None, HAS_POST_NORM=post_weight is not None,
            HAS_BIAS=bias is not None, **tile,
        )  # fmt: skip
    return y, summed
