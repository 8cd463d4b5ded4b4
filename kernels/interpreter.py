"""Triton's CPU interpreter, with bfloat16 and float8_e4m3 made right.

Where TRITON_INTERPRET=1 is set before this module is imported, kernels run in NumPy, one program
after another.  The interpreter keeps bfloat16 as uint16 and gets it wrong in two ways (still so in
Triton 3.9): products and sums compute with the bits as if they were integers, and a cast to
bfloat16 truncates.  Here the bits are widened before arithmetic and every cast rounds to the
nearest even, as a GPU does.  So it is with casts to and from e4m3, which it keeps as uint8; there
what is too great becomes the greatest.  tests/kernels/test_interpreter.py holds both against torch.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)


def widen(bits: np.ndarray) -> np.ndarray:
    """Bfloat16 as uint16 -> the same values in float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to_nearest_even(x: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 as uint16."""
    u = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _all_e4m3() -> np.ndarray:
    """The value of each byte as e4m3: a sign, 4 bits of exponent, 3 of mantissa; no infinities."""
    bits = np.arange(128)
    exponent, mantissa = bits >> 3, bits & 7
    values = np.where(exponent, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


E4M3 = _all_e4m3()


def round_to_e4m3(x: np.ndarray) -> np.ndarray:
    """float32 -> e4m3 as uint8: to the nearest even, saturated; NaN stays NaN."""
    positive = E4M3[:127]
    magnitude = np.minimum(np.abs(x), positive[-1])  # of NaN: NaN
    above = np.searchsorted(positive, magnitude).clip(0, 126)  # the first not below
    below = np.maximum(above - 1, 0)
    to_above, to_below = positive[above] - magnitude, magnitude - positive[below]
    takes_below = (to_below < to_above) | ((to_below == to_above) & (below % 2 == 0))
    nearest = np.where(np.isnan(x), 127, np.where(takes_below, below, above))
    return (nearest + 128 * np.signbit(x)).astype(np.uint8)


# What the interpreter keeps as bits: how they are widened to float32 and made of it
NARROW = {
    tl.bfloat16: (widen, round_to_nearest_even),
    tl.float8e4nv: (lambda bits: E4M3[bits], round_to_e4m3),
}


def _repair(builder: Any, handle: Any) -> None:
    cast_impl, create_fp_to_fp = builder.cast_impl, builder.create_fp_to_fp
    create_dot, binary_op = builder.create_dot, builder.binary_op

    def is_bf16(x: Any) -> bool:
        return x.dtype.scalar == tl.bfloat16

    def widened(x: Any) -> Any:
        if x.dtype.scalar not in NARROW:
            return x
        return handle(NARROW[x.dtype.scalar][0](x.data), tl.float32)

    def rounded(x: Any, dtype: Any = tl.bfloat16) -> Any:
        return handle(NARROW[dtype][1](x.data), dtype)

    def through_float32(cast: Callable) -> Callable:
        def patched(self: Any, src: Any, dst_type: Any, *rounding: Any) -> Any:
            source, target = src.dtype.scalar, dst_type.scalar
            if not (source in NARROW or target in NARROW):
                return cast(self, src, dst_type, *rounding)
            if source == target:
                return src
            wide = widened(src)
            if target in NARROW:
                is_fp32 = wide.dtype.scalar == tl.float32
                return rounded(wide if is_fp32 else cast_impl(self, wide, tl.float32), target)
            return wide if target == tl.float32 else cast_impl(self, wide, dst_type)

        return patched

    def patched_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, widened(a), widened(b), *rest)

    def patched_binary(self: Any, lhs: Any, rhs: Any, op: Callable) -> Any:
        if not (is_bf16(lhs) and is_bf16(rhs)):
            return binary_op(self, lhs, rhs, op)
        result = binary_op(self, widened(lhs), widened(rhs), op)
        return rounded(result) if result.dtype.scalar == tl.float32 else result  # not a comparison

    builder.cast_impl = through_float32(cast_impl)
    builder.create_fp_to_fp = through_float32(create_fp_to_fp)
    builder.create_dot, builder.binary_op = patched_dot, patched_binary


if INTERPRETED:
    from triton.runtime import interpreter

    _repair(interpreter.InterpreterBuilder, interpreter.TensorHandle)
