# pyright: reportMissingImports=false
"""The provider "gemcut" of the norms of vLLM's IR, for `--ir-op-priority`; nobody else runs it.

The IR's norms multiply by the weight itself.  Gemma's kernel takes an offset from one, so each call
subtracts it first, in float32: one small operation on D elements, which torch.compile fuses with
those that made the weight of Gemma's.  The sum of a fused add is rounded before the norm reads it.
"""

import torch
from torch import Tensor
from vllm import ir
from vllm.platforms import current_platform

from gemcut.kernels.checks import DTYPES
from gemcut.kernels.norm import MAX_HIDDEN_SIZE

PROVIDER = "gemcut"


def register_providers() -> None:
    """Add the provider to both norms, once; ValueError where their signatures are others."""
    supported = current_platform.is_cuda() or current_platform.is_cpu()
    for op, function, takes in (
        (ir.ops.rms_norm, rms_norm, takes_rms_norm),
        (ir.ops.fused_add_rms_norm, fused_add_rms_norm, takes_fused_add_rms_norm),
    ):
        if PROVIDER not in op.impls:
            in_place = {"inplace": True} if function is fused_add_rms_norm else {}
            register = op.register_impl(
                PROVIDER, supported=supported, supports_args=takes, **in_place
            )
            register(function)


def takes_rms_norm(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    """Whether the kernel computes it: whole rows of a dtype and a length that it knows."""
    return variance_size is None and x.dtype in DTYPES and 0 < x.shape[-1] <= MAX_HIDDEN_SIZE


def takes_fused_add_rms_norm(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    """The same for the fused add, whose residual is written in place."""
    rows = x_residual.is_contiguous() and x_residual.dtype == x.dtype
    return rows and takes_rms_norm(x, weight, epsilon, variance_size)


def rms_norm(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> Tensor:
    """Rows x [..., D], weight [D] or None -> [..., D], rounded once."""
    rows = x.reshape(-1, x.shape[-1])  # a copy where x is a part of other rows: heads of a qkv
    return torch.ops.gemcut.rmsnorm(rows, _offset(x, weight), epsilon).view(x.shape)


def fused_add_rms_norm(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows x, x_residual [..., D] -> the sum normalised, and the sum, now in x_residual."""
    D = x.shape[-1]
    rows, residual = x.reshape(-1, D), x_residual.view(-1, D)
    y = torch.ops.gemcut.add_rmsnorm_(residual, rows, None, _offset(x, weight), epsilon)
    return y.view(x.shape), x_residual


def _offset(x: Tensor, weight: Tensor | None) -> Tensor:
    """The weight less one, in float32."""
    if weight is None:
        return x.new_zeros(x.shape[-1], dtype=torch.float32)
    return weight.float() - 1
