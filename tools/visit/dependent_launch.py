"""Kernels that begin before their predecessor has ended, by programmatic dependent launch.

    y[m, n] = sum_d x[m, d] * w[n, d]       x [M, D], w [N, D], as skinny_linear, without a bias

A kernel launched with launch_pdl=True may begin as soon as every program of the one before it has
said gdc_launch_dependents().  Up to its gdc_wait() it may read only what no kernel of the chain
writes: here it asks L2 for the first columns of its own rows of the weight.  The wait comes before
every other load and every store, in all kernels of a chain: only then has everything before it
ended, and a buffer may be written again.

The product has two forms.  In the first, which skinny_linear had until these were timed, a program
owns BLOCK_N rows of the weight and walks along all of D.  In the swapped one, as skinny_linear now
is, the weight is the first operand of tl.dot, so that 64 of its rows fill one warpgroup instruction
of Hopper (HGMMA m64n16k16); there are fewer such tiles than processors, so D is cut into slices of
SPLIT_D, whose float32 sums a second kernel adds in their order.  Bound by memory bandwidth: N D
weights are read once for 16 rows.

DEPENDENT, PREFETCH and DELAY_NS switch on what Triton's interpreter lacks: it runs the rest.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

PREFETCHED = tl.constexpr(512)  # bytes that one instruction asks for
BLOCK_Y = 256  # elements of a program of the small kernels


@triton.jit
def empty_kernel(DEPENDENT: tl.constexpr):
    """Do nothing: its time is what a node of a graph costs."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def chase_kernel(next_ptr, y_ptr, STEPS: tl.constexpr):
    """Load at an address that the load before gave: its time is that of a load."""
    index = tl.load(next_ptr)
    for _ in range(STEPS - 1):
        index = tl.load(next_ptr + index)
    tl.store(y_ptr, index)


@triton.jit
def late_store_kernel(
    value_ptr, y_ptr,  # [1], [N]
    N,
    DEPENDENT: tl.constexpr,
    DELAY_NS: tl.constexpr,
    BLOCK_Y: tl.constexpr,
):  # fmt: skip
    """Y = value, DELAY_NS after the next kernel has been allowed to begin."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    value = tl.load(value_ptr)
    if DELAY_NS > 0:
        start = tl.extra.cuda.globaltimer()
        now = start
        while now - start < DELAY_NS:
            now = tl.extra.cuda.globaltimer()
    offs_n = tl.program_id(0) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    tl.store(y_ptr + offs_n, tl.zeros([BLOCK_Y], tl.int32) + value, mask=offs_n < N)


@triton.jit
def add_one_kernel(
    x_ptr, y_ptr,  # [N] x 2
    N,
    DEPENDENT: tl.constexpr,
    WAITS: tl.constexpr,
    BLOCK_Y: tl.constexpr,
):  # fmt: skip
    """Y = x + 1; without the wait, of an x that may be an older one."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        if WAITS:
            tl.extra.cuda.gdc_wait()
    offs_n = tl.program_id(0) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    x = tl.load(x_ptr + offs_n, mask=offs_n < N, other=0)
    tl.store(y_ptr + offs_n, x + 1, mask=offs_n < N)


@triton.jit
def begin_dependent(w_ptr, first_row, N, begin_d, D, ROWS: tl.constexpr, PREFETCH: tl.constexpr):
    """Let the next kernel begin, ask L2 for PREFETCH x 512 bytes of each row, and wait."""
    tl.extra.cuda.gdc_launch_dependents()
    if PREFETCH > 0:
        offs = tl.arange(0, ROWS * PREFETCH)
        rows = tl.minimum(first_row + offs // PREFETCH, N - 1)
        columns = tl.minimum(begin_d + offs % PREFETCH * 256, D - 256)  # of 2 bytes
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], 512; mov.u32 $0, 0;", "=r,l",
            [w_ptr + rows * D + columns], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    tl.extra.cuda.gdc_wait()


@triton.jit(do_not_specialize=["M"])
def chained_kernel(
    x_ptr, w_ptr, y_ptr,  # [M, D], [N, D], [M, N]
    stride_x_m, stride_y_m,
    M, N, D,
    DEPENDENT: tl.constexpr,
    PREFETCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_N
    if DEPENDENT:
        begin_dependent(w_ptr, first_row, N, 0, D, BLOCK_N, PREFETCH)
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    offs_n = first_row + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        mask_d = (offs_d < D)[None, :]
        x_ptrs = x_ptr + offs_m[:, None] * stride_x_m + offs_d[None, :]
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_d, other=0.0)
        w_ptrs = w_ptr + offs_n[:, None] * D + offs_d[None, :]
        w = tl.load(w_ptrs, mask=mask_n[:, None] & mask_d, other=0.0)
        acc = tl.dot(x, w.T, acc)
    y_ptrs = y_ptr + offs_m[:, None] * stride_y_m + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["M"])
def swapped_kernel(
    x_ptr, w_ptr, partial_ptr,  # [M, D], [N, D], [ceil(D / SPLIT_D), M, N] float32
    stride_x_m,
    M, N, D,
    DEPENDENT: tl.constexpr,
    PREFETCH: tl.constexpr,
    SPLIT_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_N
    split = tl.program_id(1)
    begin = split * SPLIT_D  # of D, which fits 32 bits
    end = tl.minimum(begin + SPLIT_D, D)
    if DEPENDENT:
        begin_dependent(w_ptr, first_row, N, begin, D, BLOCK_N, PREFETCH)
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    offs_n = first_row + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    acc = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for start_d in range(begin, end, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        mask_d = (offs_d < end)[None, :]
        x_ptrs = x_ptr + offs_m[:, None] * stride_x_m + offs_d[None, :]
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_d, other=0.0)
        w_ptrs = w_ptr + offs_n[:, None] * D + offs_d[None, :]
        w = tl.load(w_ptrs, mask=mask_n[:, None] & mask_d, other=0.0)
        acc = tl.dot(w, x.T, acc)
    partial_ptrs = partial_ptr + (split.to(tl.int64) * M + offs_m)[None, :] * N + offs_n[:, None]
    tl.store(partial_ptrs, acc, mask=mask_m[None, :] & mask_n[:, None])


@triton.jit(do_not_specialize=["M"])
def add_splits_kernel(
    partial_ptr, y_ptr,  # [SPLITS, M, N] float32, [M, N]
    stride_y_m,
    M, N,
    DEPENDENT: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_Y: tl.constexpr,
):  # fmt: skip
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    m = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    mask = offs_n < N
    acc = tl.zeros([BLOCK_Y], dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(partial_ptr + (split * M + m) * N + offs_n, mask=mask, other=0.0)
    tl.store(y_ptr + m * stride_y_m + offs_n, acc.to(y_ptr.dtype.element_ty), mask=mask)


# 16 rows of 256 columns, or 512 by half as many warps: at most 75 KB of shared memory, so that the
# next kernel fits beside
SKINNY = {
    "16x256": {"BLOCK_N": 16, "BLOCK_D": 256, "num_warps": 4, "num_stages": 4, "maxnreg": 255},
    "16x512": {"BLOCK_N": 16, "BLOCK_D": 512, "num_warps": 2, "num_stages": 3},
}
SWAPPED = {"BLOCK_N": 64, "BLOCK_D": 128, "num_warps": 4, "num_stages": 3}


def chained(
    x: Tensor, w: Tensor, y: Tensor, tile: Mapping[str, int], dependent: bool, prefetch: int
) -> None:
    """Write x @ w.T into y: x [M, D], w [N, D], y [M, N]; M at most 16, rows of x and y apart.

    `prefetch` pieces of 512 bytes of each row of the weight are asked for before the wait.
    """
    (M, D), N = x.shape, w.shape[0]
    chained_kernel[(triton.cdiv(N, tile["BLOCK_N"]),)](
        x_ptr=x, w_ptr=w, y_ptr=y, stride_x_m=x.stride(0), stride_y_m=y.stride(0),
        M=M, N=N, D=D, DEPENDENT=dependent, PREFETCH=prefetch, BLOCK_M=16,
        launch_pdl=dependent, **tile,
    )  # fmt: skip


def swapped(
    x: Tensor, w: Tensor, y: Tensor, partial: Tensor, split_d: int, dependent: bool, prefetch: int
) -> None:
    """The same with the weight as the wide operand; partial [ceil(D / split_d), M, N] float32."""
    (M, D), N = x.shape, w.shape[0]
    splits = triton.cdiv(D, split_d)
    swapped_kernel[(triton.cdiv(N, SWAPPED["BLOCK_N"]), splits)](
        x_ptr=x, w_ptr=w, partial_ptr=partial, stride_x_m=x.stride(0),
        M=M, N=N, D=D, DEPENDENT=dependent, PREFETCH=prefetch, SPLIT_D=split_d, BLOCK_M=16,
        launch_pdl=dependent, **SWAPPED,
    )  # fmt: skip
    add_splits_kernel[(triton.cdiv(N, BLOCK_Y), M)](
        partial_ptr=partial, y_ptr=y, stride_y_m=y.stride(0), M=M, N=N,
        DEPENDENT=dependent, SPLITS=splits, BLOCK_Y=BLOCK_Y, launch_pdl=dependent,
    )  # fmt: skip


def empty(dependent: bool) -> None:
    """Launch one program that does nothing."""
    empty_kernel[(1,)](DEPENDENT=dependent, num_warps=1, launch_pdl=dependent)


def chase(following: Tensor, steps: int, y: Tensor) -> None:
    """Follow so many links of following [N] int32 from 0; the last one into y [1]."""
    chase_kernel[(1,)](next_ptr=following, y_ptr=y, STEPS=steps, num_warps=1)


def late_store(value: Tensor, y: Tensor, dependent: bool, delay_ns: int) -> None:
    """Write value [1] int32 into y [N] int32 after a delay."""
    late_store_kernel[(triton.cdiv(y.numel(), BLOCK_Y),)](
        value_ptr=value, y_ptr=y, N=y.numel(), DEPENDENT=dependent, DELAY_NS=delay_ns,
        BLOCK_Y=BLOCK_Y, launch_pdl=dependent,
    )  # fmt: skip


def add_one(x: Tensor, y: Tensor, dependent: bool, waits: bool = True) -> None:
    """Write x + 1 into y: [N] int32."""
    add_one_kernel[(triton.cdiv(y.numel(), BLOCK_Y),)](
        x_ptr=x, y_ptr=y, N=y.numel(), DEPENDENT=dependent, WAITS=waits, BLOCK_Y=BLOCK_Y,
        launch_pdl=dependent,
    )  # fmt: skip


def partials(x: Tensor, w: Tensor, split_d: int) -> Tensor:
    """An empty buffer for the sums of `swapped`: [ceil(D / split_d), M, N] float32."""
    shape = (triton.cdiv(x.shape[1], split_d), x.shape[0], w.shape[0])
    return torch.empty(shape, device=x.device, dtype=torch.float32)
