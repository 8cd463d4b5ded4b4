"""The repair of bfloat16 and float8_e4m3 in Triton's interpreter, against torch."""

import pytest
import torch
import triton
import triton.language as tl
from accuracy import DEVICE

from gemcut.kernels.interpreter import INTERPRETED

N = 1 << 16


@triton.jit
def cast_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(y_ptr.dtype.element_ty))


@triton.jit
def store_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))  # an implicit cast


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offs), tl.load(y_ptr + offs)
    tl.store(out_ptr + offs, x + y)
    tl.store(out_ptr + BLOCK + offs, x * y)
    tl.store(out_ptr + 2 * BLOCK + offs, tl.where(x < y, x, y))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, BLOCK: tl.constexpr):
    rows, cols = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    a, b = tl.load(a_ptr + rows * BLOCK + cols), tl.load(b_ptr + rows * BLOCK + cols)
    tl.store(out_ptr + rows * BLOCK + cols, tl.dot(a, b))


def all_bf16() -> torch.Tensor:
    bits = torch.arange(N, dtype=torch.int32).to(torch.int16)
    return bits.view(torch.bfloat16).to(DEVICE)


def assert_equal_values(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kernel", [cast_kernel, store_kernel], ids=["cast", "store"])
def test_rounding_to_bf16(kernel):
    """The interpreter alone truncates: half of all values would be one unit too small."""
    torch.manual_seed(0)
    # every exponent, with random and with halfway mantissas: ties go to the even neighbour
    bits = torch.randint(-(2**31), 2**31, (N,), dtype=torch.int64).to(torch.int32)
    halfway = (bits & ~0xFFFF) | 0x8000
    x = torch.cat([bits, halfway]).view(torch.float32).to(DEVICE)
    y = torch.empty(2 * N, dtype=torch.bfloat16, device=DEVICE)
    kernel[(16,)](x_ptr=x, y_ptr=y, BLOCK=2 * N // 16)
    assert_equal_values(y, x.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_widening_of_every_bf16(dtype):
    y = torch.empty(N, dtype=dtype, device=DEVICE)
    cast_kernel[(16,)](x_ptr=all_bf16(), y_ptr=y, BLOCK=N // 16)
    assert_equal_values(y, all_bf16().to(dtype))


FP8 = torch.float8_e4m3fn
FROM_FP8 = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FROM_FP8, ids=str)
def test_widening_of_every_fp8(dtype):
    x = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(FP8)
    y = torch.empty(256, dtype=dtype, device=DEVICE)
    cast_kernel[(1,)](x_ptr=x, y_ptr=y, BLOCK=256)
    assert_equal_values(y, x.to(dtype))


@pytest.mark.parametrize("dtype", FROM_FP8, ids=str)
def test_rounding_to_fp8(dtype):
    """Halfway values go to the even neighbour, what is too great to the greatest."""
    torch.manual_seed(0)
    values = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    halfway = (values[1:] + values[:-1]) / 2
    near = torch.cat([halfway * 0.99, halfway, halfway * 1.01, torch.randn(1024 - 3 * 126 - 4)])
    x = torch.cat([near, -near, torch.tensor([448, 464, 1e30, torch.inf, torch.nan, 0, 2e-10, 1])])
    x = x.to(DEVICE, dtype)
    y = torch.empty(2048, dtype=FP8, device=DEVICE)
    cast_kernel[(1,)](x_ptr=x, y_ptr=y, BLOCK=2048)
    expected = x.float().clamp(-448, 448).to(FP8)
    assert torch.equal(y.isnan(), expected.isnan())
    same = y.view(torch.uint8) == expected.view(torch.uint8)  # of zeros the sign too
    assert (same | y.isnan()).all()


def test_arithmetic():
    torch.manual_seed(0)
    x, y = torch.randn(2, 1024, device=DEVICE).bfloat16()
    out = torch.empty(3 * 1024, dtype=torch.bfloat16, device=DEVICE)
    arithmetic_kernel[(1,)](x_ptr=x, y_ptr=y, out_ptr=out, BLOCK=1024)
    assert_equal_values(out, torch.cat([x + y, x * y, torch.minimum(x, y)]))


def test_dot_is_exact():
    torch.manual_seed(0)
    # integers: every sum is exact in float32, whatever its order
    a, b = torch.randint(-64, 64, (2, 32, 32), device=DEVICE).bfloat16()
    out = torch.empty(32, 32, device=DEVICE)
    dot_kernel[(1,)](a_ptr=a, b_ptr=b, out_ptr=out, BLOCK=32)
    assert_equal_values(out, a.float() @ b.float())


def test_the_interpreter_runs_where_there_is_no_gpu():
    assert INTERPRETED is not torch.cuda.is_available()
