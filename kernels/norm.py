"""Gemma's RMSNorm, alone and after a residual add: one program holds one row.

    rmsnorm         y = x * rsqrt(mean(x ** 2) + eps) * (1 + w)
    add_rmsnorm_    residual += x, or residual += rmsnorm(x, post_weight)
                    y = rmsnorm(residual, next_weight)
                    x may come as partial sums, which are added up first, in their order

Gemma stores the weight as an offset from one.  Arithmetic is float32; results are rounded once,
and so is the sum before the second norm reads it.

Cost: 2 M D elements moved for rmsnorm, 4 M D for add_rmsnorm_ (read both, write both; weights stay
in L2), about 5 and 12 operations for each: bound by memory bandwidth.  The one program of a decode
step's row is bound by latency; S partial sums are S loads that it makes at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemcut.kernels.checks import check_parts, check_rows, check_shape, check_tensors, require
from gemcut.kernels.dependent_launch import dependent_launch, wait_for_predecessor
from gemcut.kernels.outputs import result

MAX_HIDDEN_SIZE = 16384  # a row lives in registers; wider rows would spill


@triton.jit
def normalised(x, w, D, EPS: tl.constexpr):
    """A float32 row [BLOCK_D], zero past D, times rstd and 1 + w."""
    rstd = tl.rsqrt(tl.sum(x * x, axis=0) / D + EPS)
    return x * rstd * (1.0 + w)


@triton.jit
def rmsnorm_kernel(
    x_ptr, w_ptr, y_ptr,  # [M, D], [D], [M, D]
    stride_x_m, stride_y_m,
    D,
    EPS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31 on a long prefill
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D

    x = tl.load(x_ptr + row * stride_x_m + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    y = normalised(x, w, D, EPS)
    tl.store(y_ptr + row * stride_y_m + offs_d, y.to(y_ptr.dtype.element_ty), mask=mask_d)


@triton.jit
def add_rmsnorm_kernel(
    residual_ptr, x_ptr, post_w_ptr, next_w_ptr, y_ptr,  # [M, D], [S, M, D], [D], [D], [M, D]
    stride_residual_m, stride_x_s, stride_x_m, stride_y_m,
    D,
    EPS: tl.constexpr,
    HAS_POST_NORM: tl.constexpr,
    SPLITS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    dtype = y_ptr.dtype.element_ty

    residual_ptrs = residual_ptr + row * stride_residual_m + offs_d
    x_ptrs = x_ptr + row * stride_x_m + offs_d
    x = tl.load(x_ptrs, mask=mask_d, other=0.0).to(tl.float32)
    for s in tl.static_range(1, SPLITS):
        x += tl.load(x_ptrs + s * stride_x_s, mask=mask_d, other=0.0)
    residual = tl.load(residual_ptrs, mask=mask_d, other=0.0).to(tl.float32)
    if HAS_POST_NORM:
        post_w = tl.load(post_w_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        x = normalised(x, post_w, D, EPS)
    rounded = (residual + x).to(dtype)
    tl.store(residual_ptrs, rounded, mask=mask_d)

    next_w = tl.load(next_w_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    y = normalised(rounded.to(tl.float32), next_w, D, EPS)
    tl.store(y_ptr + row * stride_y_m + offs_d, y.to(dtype), mask=mask_d)


def _tile(D: int) -> dict[str, int]:
    block_d = triton.next_power_of_2(D)
    return {"BLOCK_D": block_d, "num_warps": min(16, max(1, block_d // 512))}


def rmsnorm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """Normalise the last axis: x [..., D], weight [D] -> new tensor [..., D] in x's dtype.

    The weight may be in float32 whatever x is.  ValueError unless x views as rows and D is at most
    16384.
    """
    D = x.shape[-1]
    _check_tensors(x, weight=weight)
    check_shape("weight", weight, D)
    require(0 < D <= MAX_HIDDEN_SIZE, f"hidden size {D} is not in 1 to {MAX_HIDDEN_SIZE}")
    rows = x if x.dim() == 2 else _view_rows(x, D)
    check_rows("x", rows, D)

    y = result(out, x.shape, x, x.dtype, x, weight)
    if rows.shape[0]:
        rmsnorm_kernel[(rows.shape[0],)](
            x_ptr=rows, w_ptr=weight, y_ptr=y,
            stride_x_m=rows.stride(0), stride_y_m=D,
            D=D, EPS=eps, **_tile(D), **dependent_launch(x.device),
        )  # fmt: skip
    return y


def _check_tensors(x: Tensor, **weights: Tensor | None) -> None:
    """`check_tensors`, but for weights in float32 on x's device: the kernels widen all to that."""
    others = {
        name: weight
        for name, weight in weights.items()
        if weight is None or weight.dtype != torch.float32 or weight.device != x.device
    }
    check_tensors(x, **others)


def _view_rows(x: Tensor, D: int) -> Tensor:
    try:
        return x.view(-1, D) if x.numel() else x.new_empty(0, D)
    except RuntimeError:  # a hidden copy would cost bandwidth
        raise ValueError(
            f"x of shape {list(x.shape)} and strides {list(x.stride())} is no matrix of rows"
        ) from None


def add_rmsnorm_(
    residual: Tensor,
    x: Tensor,
    post_weight: Tensor | None,
    next_weight: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Add a branch to the residual stream, in place, and normalise the sum for the next branch.

    residual [M, D], x [M, D] or partial sums [S, M, D] in float32; weights [D], which may
    be in float32 -> [M, D].  With `post_weight` the branch is normalised first.
    """
    _check_tensors(residual, post_weight=post_weight, next_weight=next_weight)
    parts, M, D = check_parts("x", x, residual)
    require(0 < D <= MAX_HIDDEN_SIZE, f"hidden size {D} is not in 1 to {MAX_HIDDEN_SIZE}")
    check_rows("residual", residual, D)
    require(residual.shape[0] == M, f"residual has {residual.shape[0]} rows, x {M}")
    check_shape("next_weight", next_weight, D)
    if post_weight is not None:
        check_shape("post_weight", post_weight, D)

    y = result(out, (M, D), x, residual.dtype, residual, x, post_weight, next_weight)
    if M:
        add_rmsnorm_kernel[(M,)](
            residual_ptr=residual, x_ptr=x, post_w_ptr=post_weight, next_w_ptr=next_weight, y_ptr=y,
            stride_residual_m=residual.stride(0), stride_x_s=M * D, stride_x_m=x.stride(-2),
            stride_y_m=D, D=D, EPS=eps, HAS_POST_NORM=post_weight is not None, SPLITS=parts,
            **_tile(D), **dependent_launch(x.device),
        )  # fmt: skip
    return y
