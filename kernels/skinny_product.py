"""A weight times a decode step's few rows: the device code and the tile rule of four kernels.

matmul.py, qkv.py, mlp.py and head.py each do something else with the sums.

The weight is the wide operand: a program owns some rows of it, 64 as a warpgroup of Hopper's tensor
cores takes them, and multiplies them with 16 rows of x.  It streams them once, 16 bytes a load,
through a pipeline of asynchronous copies.  Sums are float32.

Batch invariance: the tile depends on the weight's shape and the arch, never on M, for which Triton
must not specialise; missing rows are masked, further rows are further programs.  So all batch sizes
run the same code, and a row's bits do not depend on its company.

Cost: N D weights read once for 16 rows, M D elements of x for each block of rows, from L2; 2 M N D
operations.  At 16 rows that is 16 operations a byte in bf16, where an H200 could do about 200:
bound by memory bandwidth.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemcut.kernels.checks import check_rows, check_shape, check_tensors, check_weight, require
from gemcut.kernels.gpu_arch import PROCESSORS, SHARED_MEMORY, arch_of
from gemcut.kernels.quantized_tiles import (
    HAS_ASSEMBLY,
    byte_tile,
    in_order,
    left_and_right,
    numbers,
    two_numbers,
)
from gemcut.kernels.quantized_weight import BITS, Weight
from gemcut.kernels.tiles import tuned

BLOCK_M = 16  # rows of x in a program: the least that tensor cores take
BLOCK_N = 64  # rows of the weight in a program
# Columns of a step, of 16 bits, and steps in shared memory, by the programs of a processor that it
# is for.  60, 50 and 70 KB a program: at most 75, beside which the next kernel's find room, and at
# least 25 of weight on their way to a processor.  The first was timed on an H200, the others with
# one step less; bench/NOTES.md has what larger ones gain.
PIPELINES = {3: (128, 3), 4: (64, 5), 1: (64, 7)}
# half as much shared memory, or less: 30, 40 and 60 KB
SMALL_PIPELINES = {3: (64, 3), 2: (64, 4), 1: (64, 6)}
# The same of a byte a number, and of half a byte with twice as many rows: 40 to 64 KB, of which x
# takes a third; then 24 to 72.
BYTE_PIPELINES = {5: (128, 4), 4: (128, 5), 3: (128, 6), 1: (256, 3)}
INT4_PIPELINES = {3: (128, 5), 2: (128, 6), 1: (128, 6)}
SMALL_BYTE_PIPELINES = {3: (128, 3), 2: (128, 4), 1: (128, 6)}
SMALL_INT4_PIPELINES = {2: (128, 4), 1: (128, 6)}
SMALL_ARCHS = ("sm_80", "sm_89", "sm_120")
RESERVED = 1024  # bytes of shared memory that each program takes beside its own


@triton.jit
def product(
    tokens, weight, rows, mask_rows,  # see add_step
    D, begin, end,  # columns begin to end - 1; begin is a multiple of BLOCK_D
    IS_EVEN: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    IN_STEPS: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Some rows of a weight times tokens: [BLOCK_ROWS, BLOCK_M] float32.

    IN_STEPS adds each step's sum to the others' as a whole, rounded to nearest: one long chain of
    sums would err twice as much in float32, and tensor cores cut off what they add up (on an H200
    such chains erred up to 2.2 times what their tests allow).
    """
    acc = tl.zeros([BLOCK_ROWS, BLOCK_M], dtype=tl.float32)
    for start_d in range(begin, end, BLOCK_D):
        acc = add_step(
            acc, tokens, weight, rows, mask_rows,
            D, start_d, IS_EVEN, HAS_TAIL, IN_STEPS, FORMAT, GROUP, BLOCK_D,
        )  # fmt: skip
    return scaled_by_row(acc, weight, rows, mask_rows, FORMAT, GROUP)


@triton.jit
def add_step(
    acc,  # [BLOCK_ROWS, BLOCK_M]
    tokens,  # x_ptr [M, D], stride_x_m, offs_m [BLOCK_M], mask_m [BLOCK_M]
    weight,  # w_ptr [N, D], scales_ptr [N, G], zeros_ptr [N, G], as `operands` gives them
    rows, mask_rows,  # [BLOCK_ROWS] x 2: rows of the weight
    D, start_d,
    IS_EVEN: tl.constexpr,  # every row exists, and D is a multiple of BLOCK_D
    HAS_TAIL: tl.constexpr,  # D is none
    IN_STEPS: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One step of a product: acc and the sum over columns start_d to start_d + BLOCK_D - 1."""
    if FORMAT is None:
        offs_d = start_d + tl.arange(0, BLOCK_D)
        x = x_tile(tokens, offs_d, D, HAS_TAIL)
        w_ptrs = weight[0] + rows[:, None] * D + offs_d[None, :]
        if IS_EVEN:
            w = tl.load(w_ptrs)
        else:
            mask_w = mask_rows[:, None]
            if HAS_TAIL:
                mask_w = mask_w & (offs_d < D)[None, :]
            w = tl.load(w_ptrs, mask=mask_w, other=0.0)
        acc = added(acc, w, x, IN_STEPS)
    else:
        BYTES: tl.constexpr = BLOCK_D // 2 if FORMAT == "int4" else BLOCK_D
        BLOCK_ROWS: tl.constexpr = acc.shape[0]
        w = byte_tile(
            weight[0], rows, mask_rows, D, start_d, IS_EVEN, HAS_TAIL, FORMAT, BLOCK_ROWS, BYTES
        )  # fmt: skip
        groups = scales_of(
            weight, rows, mask_rows, D, start_d, 0, HAS_TAIL, FORMAT, GROUP, BYTES, BLOCK_D
        )
        acc = add_bytes(
            acc, w, groups, tokens, D, start_d, HAS_TAIL, IN_STEPS, FORMAT, GROUP, BLOCK_ROWS, BYTES
        )
    return acc


@triton.jit
def x_tile(tokens, offs_d, D, HAS_TAIL: tl.constexpr):
    """Columns offs_d of rows of x: [BLOCK_M, BLOCK_D]."""
    x_ptr, stride_x_m, offs_m, mask_m = tokens
    mask_x = mask_m[:, None]
    if HAS_TAIL:
        mask_x = mask_x & (offs_d < D)[None, :]
    return tl.load(
        x_ptr + offs_m[:, None] * stride_x_m + offs_d[None, :], mask=mask_x, other=0.0
    )  # fmt: skip


@triton.jit
def add_bytes(
    acc,
    w,  # [BLOCK_ROWS, BYTES]: what a quantised weight holds of columns from start_d on
    groups,  # as `scales_of` gives them
    tokens, D, start_d,
    HAS_TAIL: tl.constexpr, IN_STEPS: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Acc and the sum over these columns, cut into units that share a scale."""
    if is_several_units(FORMAT, GROUP, BYTES):
        HALF: tl.constexpr = BYTES // 2
        left, right = left_and_right(w, BLOCK_ROWS, BYTES)
        acc = add_bytes(
            acc, left, groups[0], tokens, D, start_d,
            HAS_TAIL, IN_STEPS, FORMAT, GROUP, BLOCK_ROWS, HALF,
        )  # fmt: skip
        start_d += BYTES if FORMAT == "int4" else HALF
        acc = add_bytes(
            acc, right, groups[1], tokens, D, start_d,
            HAS_TAIL, IN_STEPS, FORMAT, GROUP, BLOCK_ROWS, HALF,
        )  # fmt: skip
    else:
        DTYPE: tl.constexpr = tokens[0].dtype.element_ty
        offs_d = start_d + in_order(BYTES, FORMAT)
        x = x_tile(tokens, offs_d, D, HAS_TAIL)
        if FORMAT == "int4":
            low, high = two_numbers(w, DTYPE)
            acc = added(acc, low, x, IN_STEPS, groups[0])
            x = x_tile(tokens, offs_d + 32, D, HAS_TAIL)
            acc = added(acc, high, x, IN_STEPS, groups[1])
        else:
            acc = added(acc, numbers(w, DTYPE, FORMAT), x, IN_STEPS, groups)
    return acc


@triton.constexpr_function
def is_several_units(format, group, size):
    """Whether so many bytes of a row hold more than one unit of columns that share their scale.

    A unit is the greatest power of two that divides a group; of int4, whose bytes hold columns 32
    apart, at least 32 bytes.  A group that is a whole row has units of any size.
    """
    if group % 32 or group == 0:
        return False
    unit = group & -group
    return size > (max(unit // 2, 32) if format == "int4" else unit)


@triton.jit
def scales_of(
    weight, rows, mask_rows, D, start_d, FIRST: tl.constexpr, HAS_TAIL: tl.constexpr,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, BYTES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scales and zero points of columns from start_d + FIRST on: pairs of pairs, by halves.

    All loads of a step stand before its products, whose barriers none would pass.
    """
    if GROUP == 0:
        found = ((None, None), (None, None)) if FORMAT == "int4" else (None, None)
    elif is_several_units(FORMAT, GROUP, BYTES):
        HALF: tl.constexpr = BYTES // 2
        NEXT: tl.constexpr = FIRST + (BYTES if FORMAT == "int4" else HALF)
        left = scales_of(
            weight, rows, mask_rows, D, start_d, FIRST, HAS_TAIL, FORMAT, GROUP, HALF, BLOCK_D
        )
        right = scales_of(
            weight, rows, mask_rows, D, start_d, NEXT, HAS_TAIL, FORMAT, GROUP, HALF, BLOCK_D
        )
        found = left, right
    else:
        found = of_group(weight, rows, mask_rows, D, start_d, FIRST, HAS_TAIL, GROUP, BLOCK_D)
        if FORMAT == "int4":
            of_high = of_group(
                weight, rows, mask_rows, D, start_d, FIRST + 32, HAS_TAIL, GROUP, BLOCK_D
            )
            found = found, of_high
    return found


@triton.jit
def of_group(
    weight, rows, mask_rows, D, start_d, FIRST: tl.constexpr,
    HAS_TAIL: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scales of some rows in the group of column start_d + FIRST, and zero points or None.

    Their loads have a mask in any case: the compiler leaves those in their place.
    """
    if BLOCK_D % GROUP == 0 or GROUP % BLOCK_D == 0:
        group = start_d // GROUP + FIRST % BLOCK_D // GROUP
    else:
        group = (start_d + FIRST) // GROUP
    if HAS_TAIL:
        group = tl.minimum(group, D // GROUP - 1)  # columns past D add nothing
    offs = rows * (D // GROUP) + group
    scales = of_rows(weight[1], offs, mask_rows)
    if weight[2] is None:
        found = scales, None
    else:
        found = scales, of_rows(weight[2], offs, mask_rows)
    return found


@triton.jit
def of_rows(ptr, offs, mask):
    """A number of each of some rows, in float32: [BLOCK_ROWS].

    By 64 rows: what has fewer elements than there are threads is loaded where it is needed.
    """
    ROWS: tl.constexpr = offs.shape[0]
    if ROWS > 64:
        HALF: tl.constexpr = ROWS // 2
        upper, lower = offs.reshape(2, HALF).permute(1, 0).split()
        mask_upper, mask_lower = mask.reshape(2, HALF).permute(1, 0).split()
        x = tl.join(of_rows(ptr, upper, mask_upper), of_rows(ptr, lower, mask_lower))
        x = x.permute(1, 0).reshape(ROWS)
    else:
        x = tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def added(acc, w, x, IN_STEPS: tl.constexpr, group=(None, None)):
    """Acc + w @ x.T, or acc + (w - zero points) @ x.T * scales of a group."""
    if group[0] is not None:
        unit = tl.dot(w, x.T, input_precision="ieee")
        if group[1] is not None:
            ones = tl.full(w.shape, 1.0, w.dtype)
            unit -= group[1][:, None] * tl.dot(ones, x.T, input_precision="ieee")
        acc += unit * group[0][:, None]
    elif IN_STEPS:
        # with 0 for max_num_imprecise_acc the compiler makes one chain of it again
        acc += tl.dot(w, x.T, input_precision="ieee", max_num_imprecise_acc=1)
    else:
        acc = tl.dot(w, x.T, acc, input_precision="ieee")
    return acc


@triton.jit
def scaled_by_row(
    acc, weight, rows, mask_rows, FORMAT: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """A sum times its rows' scales, where each row has one."""
    if FORMAT is not None and GROUP == 0:
        acc *= tl.load(weight[1] + rows, mask=mask_rows, other=0.0).to(tl.float32)[:, None]
    return acc


@triton.jit
def prefetch_scales(weight, rows, mask_rows, column, D, FORMAT: tl.constexpr, GROUP: tl.constexpr):
    """Ask L2 for the scales of some rows, up to 512 bytes of each from a column's group on.

    A step loads its own into registers, 2 or 4 bytes each: from memory it would wait for them.
    """
    if GROUP > 0 and HAS_ASSEMBLY:
        # of each row, or else of its last group; of row 0 where there is no row
        first = tl.where(mask_rows, rows, 0) * (D // GROUP) + column // GROUP
        last = tl.where(mask_rows, rows, 0) * (D // GROUP) + D // GROUP - 1
        line = tl.arange(0, 4) * (1024 // weight[1].dtype.element_ty.primitive_bitwidth)
        offs = tl.minimum(first[:, None] + line[None, :], last[:, None])
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [(weight[1] + offs).to(tl.int64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def halves(acc, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rows 0 to BLOCK_N - 1 and the rest: [2 BLOCK_N, BLOCK_M] -> 2 x [BLOCK_N, BLOCK_M].

    A program that combines two rows of a weight takes both in one product, and splits them here.
    """
    return tl.split(acc.reshape(2, BLOCK_N, BLOCK_M).permute(1, 2, 0))


def operands(weight: Weight) -> dict[str, Any]:
    """A kernel's arguments for its weight.

    FORMAT is None for a plain one; GROUP is 0 where a row's sum is scaled at its end.
    """
    if isinstance(weight, Tensor):
        return {
            "w_ptr": weight, "scales_ptr": None, "zeros_ptr": None, "FORMAT": None, "GROUP": 0,
        }  # fmt: skip
    values, size = weight.values, weight.group_size
    by_row = size == weight.columns and weight.zero_points is None
    return {
        "w_ptr": values.view(torch.uint8) if weight.format == "fp8" else values,
        "scales_ptr": weight.scales,
        "zeros_ptr": weight.zero_points,
        "FORMAT": weight.format,
        "GROUP": 0 if by_row else size,
    }


def tuned_tile(kernel: str, x: Tensor, weight: Weight, *shape: int) -> dict[str, int]:
    """`tuned`, of plain weights: nobody has timed others."""
    return tuned(kernel, x, *shape) if isinstance(weight, Tensor) else {}


def is_int4(weight: Weight) -> bool:
    """Whether a weight holds two numbers a byte."""
    return not isinstance(weight, Tensor) and weight.format == "int4"


def item_bits(x: Tensor, weight: Weight) -> int:
    """Bits of a weight's number, beside those of x where it is plain."""
    return 8 * x.itemsize if isinstance(weight, Tensor) else BITS[weight.format]


def pipeline(x: Tensor, weight: Weight, blocks: int) -> dict[str, int]:
    """How `blocks` programs stream a weight: columns of a step, steps on their way, warps.

    As many programs share a processor as leave the fewest of them idle while the last ones run, but
    of many waves the last one counts for little.  A program alone on its processor has more steps.
    """
    # a size may be a SymInt under torch.compile, which no cache can hold
    found = pipelines(x, weight)
    return dict(found[_together(arch_of(x.device), tuple(found), int(blocks))])


def pipelines(x: Tensor, weight: Weight) -> dict[int, dict[str, int]]:
    """The tiles to choose from, by the programs of a processor that they are for."""
    name = arch_of(x.device)
    if name == "interpreter":
        return {1: {"BLOCK_D": 256, "num_warps": 4, "num_stages": 1}}
    is_small = name in SMALL_ARCHS
    if isinstance(weight, Tensor):
        found = SMALL_PIPELINES if is_small else PIPELINES
    elif is_int4(weight):
        found = SMALL_INT4_PIPELINES if is_small else INT4_PIPELINES
    else:
        found = SMALL_BYTE_PIPELINES if is_small else BYTE_PIPELINES
    return {
        together: {"BLOCK_D": columns * 2 // x.itemsize, "num_warps": 4, "num_stages": stages}
        for together, (columns, stages) in found.items()
    }


@lru_cache
def _together(name: str, choices: tuple[int, ...], blocks: int) -> int:
    if name == "interpreter" or blocks <= PROCESSORS[name]:
        return 1

    def idle(programs: int) -> float:
        slots = programs * PROCESSORS[name]
        waves = -(-blocks // slots)
        return 0.0 if waves > 4 else round(1 - blocks / (waves * slots), 3)

    return min((n for n in choices if n > 1), key=idle)


def places(x: Tensor, weight: Weight, rows: int, tile: dict[str, int]) -> int:
    """Programs of `rows` rows that fit the GPU, by shared memory, the scarcest; 0: no GPU."""
    name = arch_of(x.device)
    if name not in SHARED_MEMORY:
        return 0
    stages, columns = tile["num_stages"], tile["BLOCK_D"]
    # numbers of a quantised weight are turned into x's dtype beside the product before it
    kept = stages if isinstance(weight, Tensor) else stages - 1
    each = rows * columns * item_bits(x, weight) // 8 * kept
    each += BLOCK_M * columns * x.itemsize * stages + RESERVED
    return (SHARED_MEMORY[name] + RESERVED) // each * PROCESSORS[name]


def leaves_places(
    x: Tensor, weight: Weight, programs: int, rows: int, tile: dict[str, int]
) -> bool:
    """Whether more than a twentieth of the places is free: see dependent_launch.py."""
    return 20 * int(programs) < 19 * places(x, weight, rows, tile)


def rows_of_weight(x: Tensor, weight: Weight, rows: int = BLOCK_N) -> int:
    """How many rows of a weight a program streams: `rows` on a GPU.

    Of int4 twice as many: its programs are bound by their instructions, of which a third is spent
    on a step whatever its rows.
    """
    rows = 2 * rows if is_int4(weight) else rows
    return 512 if arch_of(x.device) == "interpreter" else rows


def check_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> None:
    """ValueError unless x [M, D], weight [N, D] and bias [N] make a product."""
    check_weight("weight", weight)
    N, D = weight.shape
    require(N > 0 and D > 0, f"weight is {list(weight.shape)}: an empty product")
    check_tensors(x, weight=weight, bias=bias)
    check_rows("x", x, D)
    if bias is not None:
        check_shape("bias", bias, N)
