"""The rule that a kernel is held to: it may err twice as much as torch does in the same dtype.

Kernel tests run on the GPU where there is one, in Triton's interpreter elsewhere.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gemcut.kernels import reference
from gemcut.kernels.quantized_weight import QuantizedWeight, pack_int4

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
by_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
GUARD = 64  # elements before and after every buffer


def guarded(x: Tensor) -> Tensor:
    """A copy with the same strides in the middle of a buffer of NaN, or of absurd integers.

    An overrun that a mask forgot reads NaN and shows; the interpreter would not notice it.
    """
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    fill = torch.nan if x.is_floating_point() else (0 if x.dtype == torch.bool else -77)
    fill = 0xFF if x.dtype == torch.uint8 else fill
    buffer = torch.full((span + 2 * GUARD,), fill, dtype=x.dtype, device=x.device)
    copy = buffer.as_strided(x.shape, x.stride(), GUARD)
    return copy.copy_(x)


def _guarded_argument(x: Any) -> Any:
    """What of an argument is in memory between guards; of a quantised weight each of its tensors.

    No format of a weight has NaN among integers: these are the greatest there are.
    """
    if isinstance(x, QuantizedWeight):
        zeros = None if x.zero_points is None else guarded(x.zero_points)
        return replace(x, values=guarded(x.values), scales=guarded(x.scales), zero_points=zeros)
    return guarded(x) if isinstance(x, Tensor) and x.numel() else x


def outcome(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Tensor]:
    """What a call returns and what its floating arguments hold afterwards, by name."""
    copies = {name: _guarded_argument(x) for name, x in arguments.items()}
    result = function(**copies)
    found = dict(enumerate(result)) if isinstance(result, tuple) else {0: result}
    found = {f"result {key}": value for key, value in found.items()}
    return found | {
        name: x for name, x in copies.items() if isinstance(x, Tensor) and x.is_floating_point()
    }


def assert_accurate(
    op: Callable[..., Any], *args: Any, oracle: Callable[..., Any] | None = None, **kwargs: Any
) -> None:
    """Hold an op to the oracle of its name, in the results and in every argument it may write.

    Error at most twice that of the oracle in the same dtype, plus two units in the last place of
    the greatest value.  NaN is where the oracle has it, and nowhere else.
    """
    oracle = oracle or getattr(reference, op.__name__)
    arguments = inspect.signature(oracle).bind(*args, **kwargs).arguments

    def double(x: Any) -> Any:
        if isinstance(x, QuantizedWeight):
            return replace(x, dtype=torch.float64)
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    exact = outcome(oracle, {name: double(x) for name, x in arguments.items()})
    eager = outcome(oracle, arguments)
    actual = outcome(op, arguments)
    assert actual.keys() == exact.keys()
    for name, value in actual.items():
        assert_within_budget(name, value, eager[name], exact[name])


def assert_within_budget(name: str, actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    """The rule itself, for what torch computes in float64 and in the dtype of `actual`."""
    assert actual.shape == eager.shape, f"{name}: {actual.shape} instead of {eager.shape}"
    assert actual.dtype == eager.dtype, f"{name}: {actual.dtype} instead of {eager.dtype}"
    if not actual.is_floating_point():
        assert torch.equal(actual, eager), name
        return
    unknown = exact.isnan()
    assert torch.equal(actual.isnan(), unknown), f"{name}: NaN at {actual.isnan().nonzero()[:4]}"
    if exact[~unknown].numel() == 0:
        return

    def error(x: Tensor) -> float:
        difference = (x.double() - exact)[~unknown]
        return difference.abs().max().item()

    ulp = torch.finfo(actual.dtype).eps * exact[~unknown].abs().max().item()
    budget = 2 * error(eager) + 2 * ulp
    assert error(actual) <= budget, (
        f"{name}: max error {error(actual):.2e} exceeds the budget of {budget:.2e}"
    )


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal numbers on the device under test; the same for a shape under a given seed."""
    return (scale * torch.randn(shape)).to(DEVICE, dtype)


# format, group size (0: a row), zero points, dtype of the scales
WEIGHTS = {
    "int8 by row": ("int8", 0, False, torch.float32),
    "int8 in 32s": ("int8", 32, False, torch.float16),
    "fp8 by row": ("fp8", 0, False, torch.bfloat16),
    "fp8 in 128s": ("fp8", 128, False, torch.float32),
    "int4 in 32s": ("int4", 32, False, torch.bfloat16),
    "int4 in 32s with zero points": ("int4", 32, True, torch.bfloat16),
    "int4 in 128s": ("int4", 128, False, torch.bfloat16),
    "int4 in 96s": ("int4", 96, True, torch.float32),
    "int4 by row": ("int4", 0, False, torch.float32),
    "int8 by row with zero points": ("int8", 0, True, torch.float32),
}
by_weight = pytest.mark.parametrize("kind", WEIGHTS)


def quantized(N: int, D: int, kind: str, dtype: torch.dtype = torch.float32) -> QuantizedWeight:
    """A weight of one of the kinds above that uses every value of its format.

    Where groups do not divide D there is one scale a row.
    """
    format, group, has_zeros, scales_dtype = WEIGHTS[kind]
    groups = D // group if group and D % group == 0 else 1
    if format == "fp8":
        values = (100 * torch.randn(N, D)).clamp(-448, 448).to(torch.float8_e4m3fn)
    else:
        low, high = {"int8": (-128, 127), "int4": (-8, 7)}[format]
        values = torch.randint(low, high + 1, (N, D), dtype=torch.int8)
        values = pack_int4(values) if format == "int4" else values
    greatest = {"int8": 64, "fp8": 100, "int4": 4}[format]
    scales = ((0.5 + torch.rand(N, groups)) / greatest / D**0.5).to(scales_dtype)
    zeros = torch.randint(-3, 8, (N, groups)).to(scales_dtype) if has_zeros else None
    return QuantizedWeight(values, scales, zeros, D, dtype).to(DEVICE)


def assert_row_invariant(op: Callable[[slice], Tensor | tuple[Tensor, ...]], count: int) -> None:
    """An op gives the same bits for a row alone and beside 1 to `count` - 1 others."""

    def bits(rows: slice) -> list[Tensor]:
        result = op(rows)
        return list(result) if isinstance(result, tuple) else [result]

    together = bits(slice(0, count))
    companies = [slice(0, n) for n in range(1, count)] + [slice(n, n + 1) for n in (1, count - 1)]
    for rows in companies:
        for part, whole in zip(bits(rows), together, strict=True):
            assert torch.equal(part, whole[rows]), f"rows {rows.start} to {rows.stop - 1} differ"
