"""Triton's CPU interpreter, with bfloat16 made right.

Where TRITON_INTERPRET=1 is set before this module is imported, kernels run in NumPy, one program
after another.  The interpreter keeps bfloat16 as uint16 and gets it wrong in two ways (still so in
Triton 3.9): products and sums compute with the bits as if they were integers, and a cast to
bfloat16 truncates.  Here the bits are widened before arithmetic and every cast rounds to the
nearest even, as a GPU does.  tests/kernels/test_interpreter.py holds the patch against torch.
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


def _repair(builder: Any, handle: Any) -> None:
    cast_impl, create_fp_to_fp = builder.cast_impl, builder.create_fp_to_fp
    create_dot, binary_op = builder.create_dot, builder.binary_op

    def is_bf16(x: Any) -> bool:
        return x.dtype.scalar == tl.bfloat16

    def widened(x: Any) -> Any:
        return handle(widen(x.data), tl.float32) if is_bf16(x) else x

    def rounded(x: Any) -> Any:
        return handle(round_to_nearest_even(x.data), tl.bfloat16)

    def through_float32(cast: Callable) -> Callable:
        def patched(self: Any, src: Any, dst_type: Any, *rounding: Any) -> Any:
            to_bf16 = dst_type.scalar == tl.bfloat16
            if not (to_bf16 or is_bf16(src)):
                return cast(self, src, dst_type, *rounding)
            if to_bf16 and is_bf16(src):
                return src
            wide = widened(src)
            if to_bf16:
                is_fp32 = wide.dtype.scalar == tl.float32
                return rounded(wide if is_fp32 else cast_impl(self, wide, tl.float32))
            return wide if dst_type.scalar == tl.float32 else cast_impl(self, wide, dst_type)

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
