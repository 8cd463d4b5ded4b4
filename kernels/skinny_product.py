"""A weight times a decode step's few rows: the device code of four kernels.

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

import triton
import triton.language as tl

from gemcut.kernels.quantized_tiles import (
    HAS_ASSEMBLY,
    byte_tile,
    in_order,
    left_and_right,
    numbers,
    two_numbers,
)


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
        acc = added(acc, w, x, IN_STEPS, weight, 0, 0)
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
            acc, w, groups, tokens, weight, D, start_d,
            HAS_TAIL, IN_STEPS, FORMAT, GROUP, BLOCK_ROWS, BYTES,
        )  # fmt: skip
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
    tokens, weight, D, start_d,
    HAS_TAIL: tl.constexpr, IN_STEPS: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """The sum over these columns, added to acc, cut into units that share a scale."""
    if is_several_units(FORMAT, GROUP, BYTES):
        HALF: tl.constexpr = BYTES // 2
        left, right = left_and_right(w, BLOCK_ROWS, BYTES)
        acc = add_bytes(
            acc, left, groups[0], tokens, weight, D, start_d,
            HAS_TAIL, IN_STEPS, FORMAT, GROUP, BLOCK_ROWS, HALF,
        )  # fmt: skip
        start_d += BYTES if FORMAT == "int4" else HALF
        acc = add_bytes(
            acc, right, groups[1], tokens, weight, D, start_d,
            HAS_TAIL, IN_STEPS, FORMAT, GROUP, BLOCK_ROWS, HALF,
        )  # fmt: skip
    else:
        DTYPE: tl.constexpr = tokens[0].dtype.element_ty
        offs_d = start_d + in_order(BYTES, FORMAT)
        x = x_tile(tokens, offs_d, D, HAS_TAIL)
        if FORMAT == "int4":
            low, high = two_numbers(w, DTYPE)
            acc = added(acc, low, x, IN_STEPS, weight, groups[0], GROUP)
            x = x_tile(tokens, offs_d + 32, D, HAS_TAIL)
            acc = added(acc, high, x, IN_STEPS, weight, groups[1], GROUP)
        else:
            w = numbers(w, DTYPE, FORMAT)
            acc = added(acc, w, x, IN_STEPS, weight, groups, GROUP)
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
        found = (0, 0), (0, 0)  # nobody looks at them
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
    """Scales of some rows in the group of column start_d + FIRST, and zero points, if there are.

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
    zeros = scales
    if weight[2] is not None:
        zeros = of_rows(weight[2], offs, mask_rows)
    return scales, zeros


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
def added(acc, w, x, IN_STEPS: tl.constexpr, weight, group, GROUP: tl.constexpr):
    """Acc + w @ x.T, or acc + (w - zero points) @ x.T * scales of a group."""
    if GROUP > 0:
        unit = tl.dot(w, x.T, input_precision="ieee")
        if weight[2] is not None:
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
