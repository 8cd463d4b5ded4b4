"""Matrix products: of many rows by cuBLAS, of a decode step's few rows by a kernel of our own.

    linear          y = x @ weight.T + bias                 many rows: prefill
    skinny_linear   sum over s of y[s] = the same           few rows: decode

A quantised weight of the first is turned into numbers some rows at a time, which cuBLAS reads.

The second is skinny_product.py's loop with a bias.  A narrow weight has fewer blocks of rows than a
GPU has processors.  So its columns are cut as well, into S splits of whole steps, and each split's
sum is left to the kernel that reads the product: it adds them up in their order (norm.py,
rotary.py).  S, like the tile, depends on the weight's shape and the arch, never on M: a row's bits
do not depend on its company.

Cost: that of skinny_product.py, and 4 S M N bytes of partial sums written: bound by memory
bandwidth.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from gemcut.kernels.dependent_launch import (
    dependent_launch,
    let_next_begin,
    prefetch_and_wait,
    prefetched_bytes,
)
from gemcut.kernels.gpu_arch import PROCESSORS, arch_of
from gemcut.kernels.outputs import result
from gemcut.kernels.product_tiles import (
    BLOCK_M,
    BLOCK_N,
    check_linear,
    is_wide,
    operands,
    pipelines,
    places,
    rows_of_weight,
    tuned_tile,
)
from gemcut.kernels.quantized_tiles import row_of_numbers
from gemcut.kernels.quantized_weight import Weight
from gemcut.kernels.skinny_product import prefetch_scales, product

SCRATCH = 64_000_000  # bytes of a quantised weight's rows beside a product of many rows
MAX_BLOCK_D = 4096  # columns of a row that a program turns into numbers
LEAST_COLUMNS = 128  # of a part
ENOUGH = 0.95  # of the places of a GPU


@triton.jit(do_not_specialize=["first"])
def dequantize_kernel(
    w_ptr, scales_ptr, zeros_ptr, y_ptr,  # [N, D], [N, G] x 2, some rows of [N, D]
    first, D,  # first: of these rows
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    weight, mask_d = (w_ptr, scales_ptr, zeros_ptr), offs_d < D
    y = row_of_numbers(weight, first + row, offs_d, mask_d, D, FORMAT, GROUP)
    tl.store(y_ptr + row * D + offs_d, y.to(y_ptr.dtype.element_ty), mask=mask_d)


@triton.jit(do_not_specialize=["M"])
def skinny_linear_kernel(
    x_ptr, w_ptr, scales_ptr, zeros_ptr,  # [M, D], [N, D], [N, G], [N, G]
    bias_ptr, y_ptr,  # [N], [S, M, N] float32
    stride_x_m,
    M, N, D, split_d,  # split_d: columns of a part
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    IN_STEPS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PREFETCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    # int64: row * stride passes 2**31 in a vocabulary's matrix
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    s = tl.program_id(2)
    mask_m, mask_n = offs_m < M, offs_n < N

    begin = (s.to(tl.int64) * split_d).to(tl.int32)  # below D
    tokens, weight = (x_ptr, stride_x_m, offs_m, mask_m), (w_ptr, scales_ptr, zeros_ptr)
    prefetch_scales(weight, offs_n, mask_n, begin, D, FORMAT, GROUP)
    prefetch_and_wait(w_ptr, offs_n, begin, D, DEPENDENT, PREFETCH, FORMAT)
    acc = product(
        tokens, weight, offs_n, mask_n, D, begin, tl.minimum(begin + split_d, D),
        IS_EVEN, HAS_TAIL, IN_STEPS, FORMAT, GROUP, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    let_next_begin(DEPENDENT)
    if HAS_BIAS:
        mask_bias = offs_n < tl.where(s == 0, N, 0)  # the first part adds it
        acc += tl.load(bias_ptr + offs_n, mask=mask_bias, other=0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + (s.to(tl.int64) * M + offs_m)[None, :] * N + offs_n[:, None]
    tl.store(y_ptrs, acc, mask=mask_m[None, :] & mask_n[:, None])


def _tile(weight: Weight, x: Tensor) -> dict[str, int]:
    """With as many parts, of whole steps and as equal as they can be, as fill the GPU once.

    Of the tiles it is the first whose programs take nearly every place, or else the fullest.
    """
    N, D = weight.shape
    wide = is_wide(weight)
    block_n = rows_of_weight(x, BLOCK_N * (1 + wide))
    blocks = int(triton.cdiv(N, block_n))

    def splits(tile: dict[str, int]) -> int:
        most = max(1, min(places(x, weight, block_n, tile) // blocks, D // LEAST_COLUMNS))
        steps = triton.cdiv(D, tile["BLOCK_D"])
        return triton.cdiv(steps, triton.cdiv(steps, most))

    def taken(tile: dict[str, int]) -> float:
        return min(blocks * splits(tile) / max(1, places(x, weight, block_n, tile)), ENOUGH)

    tiles = pipelines(x, weight, wide)
    tile = max(tiles.values(), key=taken)
    if blocks * splits(tile) <= PROCESSORS.get(arch_of(x.device), 0):
        tile = tiles[1]
    rule = {"BLOCK_N": block_n, "SPLITS": splits(tile), **tile}
    return rule | tuned_tile("skinny_linear", x, weight, N, D)


def count_parts(weight: Weight, x: Tensor) -> int:
    """S, the partial sums that `skinny_linear` leaves of a product with this weight."""
    return _tile(weight, x)["SPLITS"]


def linear(
    x: Tensor, weight: Weight, bias: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Project many rows: x [M, D], weight [N, D], bias [N] -> [M, N], by cuBLAS.

    It adds nothing that a kernel here could fuse better; a row's bits may depend on M.  A quantised
    weight is rounded to x's dtype, some rows at a time: at most SCRATCH bytes, or one row.
    """
    check_linear(x, weight, bias)
    if isinstance(weight, Tensor) and out is None:
        return F.linear(x, weight, bias)
    (M, D), N = x.shape, weight.shape[0]
    y = result(out, (M, N), x, x.dtype, x, weight, bias)
    if isinstance(weight, Tensor):
        return _product_(y, x, weight.T, bias)
    rows = max(1, min(N, SCRATCH // (D * x.itemsize)))
    scratch = torch.empty((rows, D), device=x.device, dtype=x.dtype)
    block_d = min(MAX_BLOCK_D, triton.next_power_of_2(D))
    num_warps = 4 if block_d > 1024 else 2  # 16 columns a thread, or more
    for first in range(0, N if M else 0, rows):
        count = min(rows, N - first)
        dequantize_kernel[(count, triton.cdiv(D, block_d))](
            **operands(weight), y_ptr=scratch,
            first=first, D=D, BLOCK_D=block_d, num_warps=num_warps,
        )  # fmt: skip
        part = None if bias is None else bias.narrow(0, first, count)
        _product_(y.narrow(1, first, count), x, scratch.narrow(0, 0, count).T, part)
    return y


def _product_(y: Tensor, x: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return torch.mm(x, columns, out=y)
    return torch.addmm(bias, x, columns, out=y)


def skinny_linear(
    x: Tensor, weight: Weight, bias: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Project few rows: x [M, D], weight [N, D], bias [N] -> partial sums [S, M, N] in float32.

    Their sum over S is the product.  S follows from the weight's shape and the GPU alone, and a
    row's bits do not depend on the others.  Any M works; the weight is read once for 16 rows.
    """
    check_linear(x, weight, bias)
    M, (N, D) = x.shape[0], weight.shape
    tile = _tile(weight, x)
    splits, block_d = tile.pop("SPLITS"), tile["BLOCK_D"]
    y = result(out, (splits, M, N), x, torch.float32, x, weight, bias)
    if M:
        grid = (triton.cdiv(M, BLOCK_M), triton.cdiv(N, tile["BLOCK_N"]), splits)
        is_even = D % block_d == 0 and N % tile["BLOCK_N"] == 0
        skinny_linear_kernel[grid](
            x_ptr=x, **operands(weight), bias_ptr=bias, y_ptr=y, stride_x_m=x.stride(0),
            M=M, N=N, D=D, split_d=triton.cdiv(triton.cdiv(D, block_d), splits) * block_d,
            HAS_BIAS=bias is not None, IS_EVEN=is_even, HAS_TAIL=D % block_d != 0,
            IN_STEPS=x.dtype == torch.float32,
            PREFETCH=prefetched_bytes(weight, is_even), BLOCK_M=BLOCK_M, **tile,
            **dependent_launch(x.device),
        )  # fmt: skip
    return y
