"""How the oracles compute with numbers of any dtype: in at least float32, and rounded once."""

from functools import lru_cache

import torch
from torch import Tensor

WIDE = (torch.float32, torch.float64)


def widened(x: Tensor) -> Tensor:
    """Float64 stays, float32 stays, bfloat16 becomes float32."""
    return x if x.dtype in WIDE else x.float()


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)  # a `to` that does nothing still costs 1 us


@lru_cache(maxsize=64)
def constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=device)


def times(x: Tensor, factor: float) -> Tensor:
    return x * constant(factor, x.dtype, x.device)  # converting a Python number costs 1 us and more


def times_(x: Tensor, factor: float) -> Tensor:
    return x.mul_(constant(factor, x.dtype, x.device))
