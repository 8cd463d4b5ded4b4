"""The small ops of a CPU: norms, the tables of rotation, and what begins a decode step.

A decode step of a small model has few arithmetic operations and many calls of torch, each of which
costs a microsecond or more.  So tensors of constants are kept, and an operation that would change
nothing is left out.

Letters in shape comments: M tokens, D hidden size, K head_dim, N slots, R kinds of layer.
"""

from collections.abc import Sequence
from functools import lru_cache
from inspect import unwrap

import torch
from torch import Tensor

from gemcut.kernels.cpu_products import WIDE
from gemcut.kernels.outputs import takes_out
from gemcut.kernels.quantized_weight import Weight
from gemcut.kernels.reference import embed

# Numbers


def widened(x: Tensor) -> Tensor:
    """Float64 stays, float32 stays, bfloat16 and float8_e4m3fn become float32."""
    if x.dtype in WIDE:
        return x
    return _widened_fp8(x) if x.dtype == torch.float8_e4m3fn else x.float()


def _widened_fp8(x: Tensor) -> Tensor:
    """Float32 of e4m3, in a tenth of the time of torch's own conversion.

    The same exponent and mantissa are a float16, 256 times smaller; only NaN would be none.
    """
    if holds_nan(x):
        return x.float()
    moved = x.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4080)
    return times_(moved.view(torch.float16).float(), 256)


def holds_nan(x: Tensor) -> bool:
    """Whether any of x is NaN; waits for the device.

    In e4m3 that is 7 bits of ones; torch's own isnan takes 100 times as long for it.
    """
    if x.dtype != torch.float8_e4m3fn:
        return bool(x.isnan().any())
    return x.numel() > 0 and bool(x.view(torch.int8).bitwise_and(127).amax() == 127)


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)  # a `to` that does nothing still costs 1 us


@lru_cache(maxsize=64)
def constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=device)


def times(x: Tensor, factor: float) -> Tensor:
    return x * constant(factor, x.dtype, x.device)  # converting a Python number costs 1 us and more


def times_(x: Tensor, factor: float) -> Tensor:
    return x.mul_(constant(factor, x.dtype, x.device))


# Norms


@takes_out
def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last axis: x [..., D], weight [D] -> new tensor [..., D] in x's dtype."""
    dtype = x.dtype
    if dtype not in WIDE:
        x = x.float()
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    eps_ = constant(eps, x.dtype, x.device)
    y = x * torch.addcmul(eps_, norm, norm, value=1 / x.shape[-1]).rsqrt_()
    y = torch.addcmul(y, y, weight)
    return y if dtype in WIDE else y.to(dtype)


_rmsnorm = unwrap(rmsnorm)  # a call within an op has no `out`, and need not pay for one


@takes_out
def add_rmsnorm_(
    residual: Tensor, x: Tensor, post_weight: Tensor | None, next_weight: Tensor, eps: float
) -> Tensor:
    """Add a branch x [M, D] or [S, M, D] to the residual [M, D] and normalise the sum -> [M, D]."""
    x = summed(x)
    if post_weight is not None:
        x = _rmsnorm(x, post_weight, eps)
    residual.add_(x)
    return _rmsnorm(residual, next_weight, eps)


def summed(x: Tensor) -> Tensor:
    """Rows [M, N] of themselves, or of their partial sums [S, M, N], mostly one."""
    if x.dim() == 2:
        return x
    return x[0] if x.shape[0] == 1 else x.sum(0)


# Rotary embedding


@takes_out
def rope_tables(
    positions: Tensor, inv_freq: Tensor, attention_scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cos and sin [M, 1, K] of positions [M]; inv_freq [K/2] or [M, K/2].

    Frequencies are negated in the first half, which negates the sine alone.
    """
    inv_freq = torch.cat([-inv_freq, inv_freq], -1).unsqueeze(-2)
    angles = positions.view(-1, 1, 1) * inv_freq  # [M, 1, K]
    cos, sin = angles.cos(), angles.sin()
    if attention_scaling != 1:
        cos, sin = cos * attention_scaling, sin * attention_scaling
    return rounded(cos, dtype), rounded(sin, dtype)


# The beginning of a decode step


@takes_out
def begin_step(
    token_ids: Tensor,
    positions: Tensor,
    rows: Tensor | None,
    table: Weight,
    scale: float,
    norm_weight: Tensor,
    eps: float,
    inv_freqs: Sequence[Tensor],
    attention_scalings: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Positions [M], residual and its norm [M, D] x 2, cos and sin [R, M, 1, K] of R kinds."""
    if rows is not None:
        token_ids, positions = token_ids.index_select(0, rows), positions.index_select(0, rows)
    residual = embed(token_ids, table, scale)
    kinds = zip(inv_freqs, attention_scalings, strict=True)
    tables = [rope_tables(positions, inv_freq, c, table.dtype) for inv_freq, c in kinds]
    if len(tables) == 1:
        cos, sin = (one.unsqueeze(0) for one in tables[0])
    else:
        cos, sin = (torch.stack(of_kinds) for of_kinds in zip(*tables, strict=True))
    return positions, residual, rmsnorm(residual, norm_weight, eps), cos, sin
