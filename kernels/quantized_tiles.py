"""Tiles of a quantised weight on the device: read as bytes, turned into numbers in registers.

A program reads 16 bytes a thread and never moves a number to another one.  Of 16 columns a tensor
core takes 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 from thread t of four: here these are the four that lie
side by side in memory, which a matrix load brings as one register.  So tiles have their columns in
another order, that of `in_order`, and so have the tiles of x that they are multiplied with.

    format    instructions a number, sm_90       how
    int8      2.0                                the compiler's own conversion
    fp8       2.8                                bits moved into bf16's, times 2^120
    int4      1.6                                bits | 128.0 in bf16, less 136

All are exact in bf16, fp16 and float32.  Where x is no bf16, and in the interpreter, fp8 and int4
are converted by plain arithmetic, which takes more instructions.
"""

import triton
import triton.language as tl

from gemcut.kernels.interpreter import INTERPRETED

HAS_ASSEMBLY = tl.constexpr(not INTERPRETED)


@triton.jit
def in_order(BYTES: tl.constexpr, FORMAT: tl.constexpr):
    """The columns of a tile, as offsets: 4 t to 4 t + 3 of 16 stand at 2 t, 2 t + 1, and 8 after.

    Of int4 the columns in the low halves; 32 further are those in the high ones.
    """
    c = tl.arange(0, BYTES)
    columns = c // 16 * 16 + c % 8 // 2 * 4 + c % 16 // 8 * 2 + c % 2
    if FORMAT == "int4":
        columns = columns // 32 * 64 + columns % 32
    return tl.max_contiguous(tl.multiple_of(columns, 2), 2)


@triton.jit
def byte_tile(
    w_ptr, rows, mask_rows,  # bytes [N, width], [BLOCK_ROWS] x 2
    D, start_d,
    IS_EVEN: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):  # fmt: skip
    """What some rows hold of columns from start_d on, in order: [BLOCK_ROWS, BYTES].

    Shared memory holds runs of 16 bytes of eight rows side by side, so that a matrix load finds
    each in a bank of its own.
    """
    width, start = D, start_d
    if FORMAT == "int4":
        width, start = tl.multiple_of(tl.cdiv(D, 64) * 32, 32), tl.multiple_of(start_d // 2, 32)
    ROWS: tl.constexpr = BLOCK_ROWS // 8
    RUNS: tl.constexpr = BYTES // 16
    run, offs = tl.arange(0, RUNS)[:, None, None], tl.arange(0, 16)[None, None, :]
    columns = (start + run * 16 + offs)[None, :, :, :]
    w_ptrs = w_ptr + rows.reshape(ROWS, 1, 8, 1) * width + columns
    if IS_EVEN:
        w = tl.load(w_ptrs)
    else:
        mask_w = mask_rows.reshape(ROWS, 1, 8, 1)
        if HAS_TAIL:
            mask_w = mask_w & (columns < width)
        w = tl.load(w_ptrs, mask=mask_w, other=0)
    w = w.reshape(ROWS, RUNS, 8, 4, 2, 2).permute(0, 2, 1, 4, 3, 5)
    return w.reshape(BLOCK_ROWS, BYTES)


@triton.jit
def left_and_right(w, BLOCK_ROWS: tl.constexpr, BYTES: tl.constexpr):
    """The two halves of a tile's columns: [BLOCK_ROWS, BYTES] -> 2 x [BLOCK_ROWS, BYTES / 2]."""
    return w.reshape(BLOCK_ROWS, 2, BYTES // 2).permute(0, 2, 1).split()


@triton.jit
def numbers(w, DTYPE: tl.constexpr, FORMAT: tl.constexpr):
    """The values of bytes of int8 or fp8."""
    if FORMAT == "int8":
        return w.to(DTYPE)
    if HAS_ASSEMBLY and DTYPE.is_bf16():
        return tl.inline_asm_elementwise(
            """
            {
                .reg .b32 a, b, s, t, power, zero;
                mov.b32 power, 0x7b807b80;
                mov.b32 zero, 0x80008000;
                prmt.b32 a, $2, 0, 0x1404;
                prmt.b32 b, $2, 0, 0x3424;
                shr.u32 s, a, 4;
                shr.u32 t, b, 4;
                and.b32 a, a, 0x80008000;
                and.b32 b, b, 0x80008000;
                lop3.b32 a, s, 0x07f007f0, a, 0xea;
                lop3.b32 b, t, 0x07f007f0, b, 0xea;
                fma.rn.bf16x2 $0, a, power, zero;
                fma.rn.bf16x2 $1, b, power, zero;
            }
            """,
            "=r,=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    bits = w.to(tl.int32)
    bits = (bits & 0x80) << 24 | (bits & 0x7F) << 20
    return (bits.to(tl.float32, bitcast=True) * 1.329227995784916e36).to(DTYPE)  # 2^120


@triton.jit
def two_numbers(w, DTYPE: tl.constexpr):
    """The values of the low and of the high halves of bytes of int4."""
    if HAS_ASSEMBLY and DTYPE.is_bf16():
        return tl.inline_asm_elementwise(
            """
            {
                .reg .b32 a, b, exponent, one, minus;
                mov.b32 exponent, 0x43004300;
                mov.b32 one, 0x3f803f80;
                mov.b32 minus, 0xc308c308;
                prmt.b32 a, $4, 0, 0x4140;
                prmt.b32 b, $4, 0, 0x4342;
                lop3.b32 $0, a, 0x000f000f, exponent, 0xea;
                lop3.b32 $1, b, 0x000f000f, exponent, 0xea;
                shr.u32 a, a, 4;
                shr.u32 b, b, 4;
                lop3.b32 $2, a, 0x000f000f, exponent, 0xea;
                lop3.b32 $3, b, 0x000f000f, exponent, 0xea;
                fma.rn.bf16x2 $0, $0, one, minus;
                fma.rn.bf16x2 $1, $1, one, minus;
                fma.rn.bf16x2 $2, $2, one, minus;
                fma.rn.bf16x2 $3, $3, one, minus;
            }
            """,
            "=r,=r,=r,=r,r", [w], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip
    low, high = (w & 15).to(tl.int32) - 8, (w >> 4).to(tl.int32) - 8
    return low.to(DTYPE), high.to(DTYPE)


@triton.jit
def row_of_numbers(
    weight, row, offs_d, mask_d, D,  # weight as in skinny_product.py; of one row these columns
    FORMAT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """What some columns of a row of a quantised weight stand for, in float32."""
    w_ptr, scales_ptr, zeros_ptr = weight
    if FORMAT == "int4":
        w_ptrs = w_ptr + row * (tl.cdiv(D, 64) * 32) + offs_d // 64 * 32 + offs_d % 32
        w = tl.load(w_ptrs, mask=mask_d, other=0).to(tl.int32)
        x = ((w >> (offs_d % 64 // 32 * 4) & 15) - 8).to(tl.float32)
    else:
        x = numbers(tl.load(w_ptr + row * D + offs_d, mask=mask_d, other=0), tl.float32, FORMAT)
    groups, group = 1, offs_d * 0
    if GROUP > 0:
        groups, group = D // GROUP, offs_d // GROUP
    if zeros_ptr is not None:
        x -= tl.load(zeros_ptr + row * groups + group, mask=mask_d, other=0.0).to(tl.float32)
    return x * tl.load(scales_ptr + row * groups + group, mask=mask_d, other=0.0).to(tl.float32)
