"""The residual add and norms of a decode step, computed by the product that reads their result.

    summed = residual + rmsnorm(branch, post_weight)    each part only where the layer has it
    y      = rmsnorm(summed, norm_weight) @ weight.T

Every program of the product walks along D once, and computes its share of the activations from the
same few rows, which lie in L2.  The norm's factor rsqrt(mean(summed ** 2) + eps) is one number for
a row, so the product is taken of summed * (1 + norm_weight), rounded to the operands' dtype, and
the factor multiplies the float32 sum at the end, when the squares have been added up as well.  The
branch's own factor is needed before the sum: a first walk along D finds it.

Rounding is that of a norm stored in the model's dtype, but for its place.  In float16,
summed * (1 + norm_weight) must stay below 65504.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemcut.kernels.checks import check_shape, check_tensors, require


@triton.jit
def row_rstd(
    x_ptr, offs_m, mask_m, D,
    EPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """1 / sqrt(mean(x ** 2) + eps) of a few rows: x [M, D] -> [BLOCK_M]."""
    squares = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    # pipelined, or each step would wait for L2: no weight is on its way yet
    for start_d in tl.range(0, D, BLOCK_D, num_stages=4):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        mask = mask_m[:, None] & (offs_d < D)[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
        x = x.to(tl.float32)
        squares += x * x
    return tl.rsqrt(tl.sum(squares, axis=1) / D + EPS)


@triton.jit
def summed_tile(
    residual_ptr, branch_ptr, post_w_ptr, summed_ptr,  # [M, D], [M, D], [D], [M, D]
    branch_rstd, offs_m, mask_m, offs_d,  # [BLOCK_M] x 3, [BLOCK_D]
    D,
    mask_stored,  # [BLOCK_M]: the rows whose sum this program stores
    HAS_BRANCH: tl.constexpr,
    HAS_POST_NORM: tl.constexpr,
):  # fmt: skip
    """The residual stream after the branch: columns offs_d in float32 [BLOCK_M, BLOCK_D]."""
    offs = offs_m[:, None] * D + offs_d[None, :]
    mask_d = offs_d < D
    mask = mask_m[:, None] & mask_d[None, :]
    summed = tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        branch = tl.load(branch_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if HAS_POST_NORM:
            post_w = tl.load(post_w_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
            branch = branch * branch_rstd[:, None] * (1.0 + post_w)[None, :]
        rounded = (summed + branch).to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + offs, rounded, mask=mask & mask_stored[:, None])
        summed = rounded.to(tl.float32)
    return summed


@triton.jit
def offset_weight(w_ptr, offs_d, D):
    """1 + w: Gemma stores a norm's weight as an offset from one.  [BLOCK_D] float32."""
    return 1.0 + tl.load(w_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)


def check_prologue(
    residual: Tensor, branch: Tensor | None, post_weight: Tensor | None, norm_weight: Tensor
) -> Tensor:
    """Check the arguments above; return where `summed` goes: `residual` itself without a branch."""
    require(residual.dim() == 2, f"residual is {list(residual.shape)}, must be [M, D]")
    M, D = residual.shape
    check_tensors(residual, branch=branch, post_weight=post_weight, norm_weight=norm_weight)
    check_shape("residual", residual, M, D)
    check_shape("norm_weight", norm_weight, D)
    if post_weight is not None:
        require(branch is not None, "post_weight normalises a branch, but branch is None")
        check_shape("post_weight", post_weight, D)
    if branch is None:
        return residual
    check_shape("branch", branch, M, D)
    return torch.empty_like(residual)
