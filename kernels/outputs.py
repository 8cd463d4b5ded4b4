"""Where an op leaves its results: in new memory, or in the caller's, which `out=` names.

A launcher writes straight into what it is given; oracles and the ops of a CPU copy their results
there, so that all tables of ops have one signature.  `registration.empty_results` makes tensors
that fit.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from gemcut.kernels.quantized_weight import QuantizedWeight, Weight

Op = TypeVar("Op", bound=Callable[..., Any])


def result(
    out: Tensor | None,
    shape: Sequence[int],
    like: Weight,
    dtype: torch.dtype,
    *used: Weight | Sequence[Tensor] | None,
) -> Tensor:
    """A new tensor of this shape and dtype beside `like`, or `out`, the caller's.

    ValueError unless `out` is dense, is as the new one would be, and shares no memory with `used`:
    all else that the op reads or writes.
    """
    if out is None:
        return torch.empty(shape, device=like.device, dtype=dtype)
    check_out(out, shape, like.device, dtype)
    first, end = _addresses(out)
    for x in _tensors(used):
        if first < _addresses(x)[1] and _addresses(x)[0] < end:
            raise ValueError(f"out {list(shape)} overlaps a tensor {list(x.shape)} of the same op")
    return out


def results(out: Sequence[Tensor] | None, count: int) -> Sequence[Tensor | None]:
    """The caller's tensors for so many results, or None for each; ValueError for another number."""
    if out is None:
        return (None,) * count
    if isinstance(out, Tensor) or len(out) != count:
        given = "one tensor" if isinstance(out, Tensor) else f"{len(out)} tensors"
        raise ValueError(f"out is {given}, must be a tuple of {count}")
    return out


def check_out(out: Tensor, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> None:
    """ValueError unless `out` is a dense tensor of this shape, device and dtype."""
    if not isinstance(out, Tensor):
        raise ValueError(f"out is a {type(out).__name__}, must be one tensor")
    if out.shape != tuple(shape):
        raise ValueError(f"out is {list(out.shape)}, must be {list(shape)}")
    if out.dtype != dtype:
        raise ValueError(f"out is {out.dtype}, must be {dtype}")
    if out.device != device:
        raise ValueError(f"out is on {out.device}, must be on {device}")
    if not out.is_contiguous():
        raise ValueError(f"out has strides {list(out.stride())}, must be contiguous")


def _tensors(used: Sequence[Any]) -> list[Tensor]:
    """All that is in memory, of tensors, quantised weights and sequences of them."""
    found = []
    for x in used:
        if isinstance(x, QuantizedWeight):
            found += x.tensors
        elif isinstance(x, Tensor):
            found.append(x)
        elif x is not None:
            found += _tensors(x)
    return found


def _addresses(x: Tensor) -> tuple[int, int]:
    """The first byte of a tensor, gaps included, and the one after its last."""
    first = x.data_ptr()
    if x.numel() == 0:
        return first, first
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return first, first + span * x.itemsize


def takes_out(op: Op) -> Op:
    """The same op in torch with `out=`, to which it copies its results once it has them."""

    @wraps(op)
    def call(*args: Any, out: Any = None, **kwargs: Any) -> Any:
        made = op(*args, **kwargs)
        if out is None:
            return made
        is_one = isinstance(made, Tensor)
        given: Sequence[Any] = (out,) if is_one else results(out, len(made))
        pairs = list(zip(given, (made,) if is_one else made, strict=True))
        for x, y in pairs:
            check_out(x, y.shape, y.device, y.dtype)
        for x, y in pairs:
            x.copy_(y)
        return out

    own, kind = inspect.signature(op), inspect.Parameter.KEYWORD_ONLY
    given = inspect.Parameter("out", kind, default=None, annotation=own.return_annotation | None)
    signature = own.replace(parameters=[*own.parameters.values(), given])
    call.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
    return call  # pyright: ignore[reportReturnType]
