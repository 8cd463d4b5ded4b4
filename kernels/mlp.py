"""The gated MLP's first half: GeGLU after a product of many rows, or inside one of few rows.

    geglu           gelu(gate) * up             gate_up [M, 2 F], gate first: prefill
    linear_geglu    the same of x @ gate_up.T   few rows: decode

GELU is its tanh approximation, as every published Gemma was trained with.  Arithmetic is
float32, rounded once.  In decode a program owns the same BLOCK_F rows of gate and of up, so that
nothing between the two products leaves its registers.  It owns fewer of them where all processors
then get as many: 24 of 32 in gemma-2-2b.

Cost of geglu: 3 M F elements moved, about 15 operations each: bound by memory bandwidth.  Cost of
linear_geglu: 2 F D weights read once for 16 rows, 2 operations each a row: bound by it too, see
skinny_product.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemcut.kernels.checks import check_rows, check_tensors, require
from gemcut.kernels.dependent_launch import (
    dependent_launch,
    let_next_begin,
    prefetch_and_wait,
    prefetched_bytes,
)
from gemcut.kernels.gelu import gelu
from gemcut.kernels.gpu_arch import PROCESSORS, arch_of
from gemcut.kernels.outputs import result
from gemcut.kernels.product_tiles import (
    BLOCK_M,
    BLOCK_N,
    check_linear,
    is_int4,
    is_wide,
    leaves_places,
    operands,
    pipeline,
    places,
    rows_of_weight,
    tuned_tile,
)
from gemcut.kernels.quantized_weight import Weight
from gemcut.kernels.skinny_product import halves, prefetch_scales, product

COLUMNS = 1024  # of a program of geglu


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
def linear_geglu_kernel(
    x_ptr, w_ptr, scales_ptr, zeros_ptr, y_ptr,  # [M, D], [2 F, D], [2 F, G] x 2, [M, F]
    stride_x_m,
    M, F, D, share,  # share: rows of gate that a program owns, at most BLOCK_F
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    IS_EVEN: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    IN_STEPS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PREFETCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    start_f = tl.program_id(1).to(tl.int64) * share
    end_f = tl.minimum(start_f + share, F)
    offs_2f = tl.arange(0, 2 * BLOCK_F)  # BLOCK_F rows of gate, then the same of up
    rows = start_f + offs_2f % BLOCK_F + (offs_2f // BLOCK_F).to(tl.int64) * F
    mask_m, mask_rows = offs_m < M, start_f + offs_2f % BLOCK_F < end_f
    tokens, weight = (x_ptr, stride_x_m, offs_m, mask_m), (w_ptr, scales_ptr, zeros_ptr)
    prefetch_scales(weight, rows, mask_rows, 0, D, FORMAT, GROUP)
    prefetch_and_wait(w_ptr, rows, 0, D, DEPENDENT, PREFETCH, FORMAT)

    acc = product(
        tokens, weight, rows, mask_rows, D, 0, D,
        IS_EVEN, HAS_TAIL, IN_STEPS, FORMAT, GROUP, BLOCK_M, 2 * BLOCK_F, BLOCK_D,
    )  # fmt: skip
    let_next_begin(DEPENDENT)
    gate, up = halves(acc, BLOCK_F, BLOCK_M)
    y = gelu(gate) * up
    offs_f = start_f + tl.arange(0, BLOCK_F)
    y_ptrs = y_ptr + offs_m[None, :] * F + offs_f[:, None]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_m[None, :] & (offs_f < end_f)[:, None])


def _tile(weight: Weight, x: Tensor) -> dict[str, int]:
    """BLOCK_F rows of gate and as many of up."""
    F, wide = weight.shape[0] // 2, is_wide(weight)
    block_f = rows_of_weight(x, BLOCK_N * (1 + wide) // 2)
    rule = {"BLOCK_F": block_f, **pipeline(x, weight, triton.cdiv(F, block_f), wide)}
    return rule | tuned_tile("linear_geglu", x, weight, F, x.shape[1])


def _share(weight: Weight, x: Tensor, tile: dict[str, int]) -> int:
    """Rows of gate of a program: so few that programs fill their waves, where these are few."""
    F = weight.shape[0] // 2
    blocks = triton.cdiv(F, tile["BLOCK_F"])
    slots = places(x, weight, 2 * tile["BLOCK_F"], tile)
    # of int4 fewer rows would save no instructions, which bound it
    if is_int4(weight) or blocks <= PROCESSORS.get(arch_of(x.device), 0) or blocks > 4 * slots:
        return tile["BLOCK_F"]
    return triton.cdiv(F, triton.cdiv(blocks, slots) * slots)


def geglu(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """gelu(gate) * up: gate_up [M, 2 F], gate first -> [M, F].  Rows may have gaps."""
    require(
        gate_up.dim() == 2 and gate_up.shape[1] > 0 and gate_up.shape[1] % 2 == 0,
        f"gate_up is {list(gate_up.shape)}, must be [M, 2 F]",
    )
    check_tensors(gate_up)
    M, F = gate_up.shape[0], gate_up.shape[1] // 2
    check_rows("gate_up", gate_up, 2 * F)

    y = result(out, (M, F), gate_up, gate_up.dtype, gate_up)
    if M:
        geglu_kernel[(M, triton.cdiv(F, COLUMNS))](
            gate_up_ptr=gate_up, y_ptr=y, stride_gate_up_m=gate_up.stride(0),
            F=F, BLOCK_F=COLUMNS, num_warps=4,
        )  # fmt: skip
    return y


def linear_geglu(x: Tensor, gate_up_weight: Weight, *, out: Tensor | None = None) -> Tensor:
    """Project few rows to gate and up, and combine: x [M, D], gate_up_weight [2 F, D] -> [M, F].

    Gate comes first.  A row's bits do not depend on the others.
    """
    check_linear(x, gate_up_weight, None)
    rows = gate_up_weight.shape[0]
    require(rows % 2 == 0, f"gate_up_weight has {rows} rows, must have as many of gate as of up")

    M, D, F = *x.shape, rows // 2
    y = result(out, (M, F), x, x.dtype, x, gate_up_weight)
    if M:
        tile = _tile(gate_up_weight, x)
        share = _share(gate_up_weight, x, tile)
        is_even = D % tile["BLOCK_D"] == 0 and share == tile["BLOCK_F"] and F % share == 0
        programs = triton.cdiv(F, share)
        plain = leaves_places(x, gate_up_weight, programs, 2 * tile["BLOCK_F"], tile)
        linear_geglu_kernel[(triton.cdiv(M, BLOCK_M), programs)](
            x_ptr=x, **operands(gate_up_weight), y_ptr=y, stride_x_m=x.stride(0),
            M=M, F=F, D=D, share=share,
            IS_EVEN=is_even, HAS_TAIL=D % tile["BLOCK_D"] != 0, IN_STEPS=x.dtype == torch.float32,
            PREFETCH=0 if plain else prefetched_bytes(gate_up_weight, is_even), BLOCK_M=BLOCK_M,
            **tile, **dependent_launch(x.device, plain),
        )  # fmt: skip
    return y
