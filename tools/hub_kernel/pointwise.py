"""Rotation and GELU on tensors as transformers has them: ops of the Hub kernel alone.

    rotate          y[i] = x[i] * cos[i] - x[i + K/2] * sin[i]              i < K/2, of q and of k
                    y[i + K/2] = x[i + K/2] * cos[i + K/2] + x[i] * sin[i + K/2]
    gelu            gelu(x)
    gelu_and_mul    gelu(gate) * up

The engine has no use for them: there rotation fills the cache and GeGLU follows its product at
once.  Here a layer of transformers gives q, k, gate and up as they lie, and takes new tensors.
GELU is its tanh approximation.  Arithmetic is float32, rounded once.

Cost: rotate reads and writes q and k once, 6 operations an element; gelu moves 2 elements for each
result and gelu_and_mul 3, about 15 operations: all are bound by memory bandwidth.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from gemcut.kernels.checks import check_tensors, require
from gemcut.kernels.gelu import gelu as gelu_of_tile
from gemcut.kernels.interpreter import INTERPRETED

__all__ = ["gelu", "gelu_and_mul", "rotate"]

BLOCK_H = 4  # heads of a program of rotate
ELEMENTS = 1024  # of a program of gelu
MAX_HEAD_DIM = 512  # a program holds BLOCK_H heads in registers


@triton.jit
def _either(q_ptrs, is_q, k_ptrs, is_k):
    q = tl.load(q_ptrs, mask=is_q, other=0.0).to(tl.float32)
    return tl.where(is_q, q, tl.load(k_ptrs, mask=is_k, other=0.0).to(tl.float32))


@triton.jit(do_not_specialize=["T"])
def rotate_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, y_q_ptr, y_k_ptr,  # [B, HQ, T, K], [B, HK, T, K], [B, T, K] x 2
    stride_q_b, stride_q_h, stride_q_t, stride_k_b, stride_k_h, stride_k_t,
    stride_cos_b, stride_cos_t, stride_sin_b, stride_sin_t,
    stride_y_q_b, stride_y_q_h, stride_y_q_t, stride_y_k_b, stride_y_k_h, stride_y_k_t,
    T, HQ, HK,
    HALF_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,  # of half a head
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)  # row * stride passes 2**31 on a long prefill
    b, t = token // T, token % T
    h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask_d = offs_d < HALF_DIM
    is_q, is_k = (h < HQ) & mask_d, (h >= HQ) & (h < HQ + HK) & mask_d

    q_ptrs = q_ptr + b * stride_q_b + h * stride_q_h + t * stride_q_t + offs_d
    k_ptrs = k_ptr + b * stride_k_b + (h - HQ) * stride_k_h + t * stride_k_t + offs_d
    x_1 = _either(q_ptrs, is_q, k_ptrs, is_k)
    x_2 = _either(q_ptrs + HALF_DIM, is_q, k_ptrs + HALF_DIM, is_k)
    cos_ptrs = cos_ptr + b * stride_cos_b + t * stride_cos_t + offs_d
    sin_ptrs = sin_ptr + b * stride_sin_b + t * stride_sin_t + offs_d
    cos_1 = tl.load(cos_ptrs, mask=mask_d, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos_ptrs + HALF_DIM, mask=mask_d, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin_ptrs, mask=mask_d, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin_ptrs + HALF_DIM, mask=mask_d, other=0.0).to(tl.float32)

    dtype = y_q_ptr.dtype.element_ty
    y_1, y_2 = (x_1 * cos_1 - x_2 * sin_1).to(dtype), (x_2 * cos_2 + x_1 * sin_2).to(dtype)
    y_q_ptrs = y_q_ptr + b * stride_y_q_b + h * stride_y_q_h + t * stride_y_q_t + offs_d
    y_k_ptrs = y_k_ptr + b * stride_y_k_b + (h - HQ) * stride_y_k_h + t * stride_y_k_t + offs_d
    tl.store(y_q_ptrs, y_1, mask=is_q)
    tl.store(y_q_ptrs + HALF_DIM, y_2, mask=is_q)
    tl.store(y_k_ptrs, y_1, mask=is_k)
    tl.store(y_k_ptrs + HALF_DIM, y_2, mask=is_k)


@triton.jit
def gelu_kernel(
    x_ptr, up_ptr, y_ptr,  # [N] each; up_ptr may be None
    N,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    y = gelu_of_tile(tl.load(x_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32))
    if up_ptr is not None:
        y *= tl.load(up_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs_n, y.to(y_ptr.dtype.element_ty), mask=mask_n)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated queries and keys: q [B, HQ, T, K], k [B, HK, T, K] -> the same, of their strides.

    cos, sin [B, T, K] or [1, T, K], as transformers' rotary embedding gives them.  Strides are
    free, but each head's last is 1.
    """
    _check_rotation(q, k, cos, sin)
    check_tensors(q, k=k, cos=cos, sin=sin)
    (B, HQ, T, K), HK = q.shape, k.shape[1]
    cos, sin = cos.expand(B, T, K), sin.expand(B, T, K)
    y_q, y_k = torch.empty_like(q), torch.empty_like(k)
    if B * T:
        block_d = triton.next_power_of_2(K // 2)
        rotate_kernel[(B * T, triton.cdiv(HQ + HK, BLOCK_H))](
            q_ptr=q, k_ptr=k, cos_ptr=cos, sin_ptr=sin, y_q_ptr=y_q, y_k_ptr=y_k,
            **_strides("bht", q=q, k=k, y_q=y_q, y_k=y_k), **_strides("bt", cos=cos, sin=sin),
            T=T, HQ=HQ, HK=HK, HALF_DIM=K // 2, BLOCK_H=BLOCK_H, BLOCK_D=block_d,
            num_warps=max(1, BLOCK_H * block_d // 256),  # 16 bytes of each half for a thread
        )  # fmt: skip
    return y_q, y_k


def _strides(axes: str, **tensors: Tensor) -> dict[str, int]:
    """Those of the axes before the last, as the kernel names them."""
    return {
        f"stride_{name}_{axis}": x.stride(i)
        for name, x in tensors.items()
        for i, axis in enumerate(axes)
    }


def _check_rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    require(
        q.dim() == 4 and k.dim() == 4, f"q is {list(q.shape)}, k {list(k.shape)}: not four axes"
    )
    (B, _, T, K), shape_k = q.shape, tuple(k.shape)
    require(
        (shape_k[0], *shape_k[2:]) == (B, T, K),
        f"k is {list(k.shape)}, must be [{B}, HK, {T}, {K}] beside q {list(q.shape)}",
    )
    require(0 < K <= MAX_HEAD_DIM and K % 2 == 0, f"head_dim {K} is not even, 2 to {MAX_HEAD_DIM}")
    for name, x in {"cos": cos, "sin": sin}.items():
        require(
            x.dim() == 3 and x.shape[0] in (1, B) and tuple(x.shape[1:]) == (T, K),
            f"{name} is {list(x.shape)}, must be [{B}, {T}, {K}] or [1, {T}, {K}]",
        )
    for name, x in {"q": q, "k": k, "cos": cos, "sin": sin}.items():
        require(x.stride(-1) == 1, f"{name} has strides {list(x.stride())}, the last must be 1")


def gelu(x: Tensor) -> Tensor:
    """GELU by its tanh approximation: a new, dense tensor of x's shape."""
    return _gelu(x, None)


def gelu_and_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, of one shape: a new, dense tensor."""
    require(gate.shape == up.shape, f"gate is {list(gate.shape)}, up {list(up.shape)}")
    return _gelu(gate, up)


def _gelu(x: Tensor, up: Tensor | None) -> Tensor:
    check_tensors(x, up=up)
    x, up = x.contiguous(), None if up is None else up.contiguous()
    y = torch.empty_like(x)
    if N := x.numel():
        gelu_kernel[(triton.cdiv(N, ELEMENTS),)](
            x_ptr=x, up_ptr=up, y_ptr=y, N=N, BLOCK_N=ELEMENTS, num_warps=4
        )
    return y


def _rotate_on_cpu(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    _check_rotation(q, k, cos, sin)
    half, cos, sin = q.shape[-1] // 2, cos.unsqueeze(1), sin.unsqueeze(1)

    def rotated(x: Tensor) -> Tensor:
        turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
        return torch.empty_like(x).copy_(torch.addcmul(x * cos, turned, sin))

    return rotated(q), rotated(k)


def _gelu_on_cpu(x: Tensor) -> Tensor:
    return F.gelu(x.contiguous(), approximate="tanh")


def _gelu_and_mul_on_cpu(gate: Tensor, up: Tensor) -> Tensor:
    require(gate.shape == up.shape, f"gate is {list(gate.shape)}, up {list(up.shape)}")
    return _gelu_on_cpu(gate).mul_(up)


def _register(kernel: Callable[..., Any], on_cpu: Callable[..., Any], fake: Any) -> None:
    """Make it an op: the kernel on cuda and in the interpreter, torch's own ops on a CPU."""

    def on_gpu(*arguments: Tensor) -> Any:
        with torch.accelerator.device_index(arguments[0].device.index):  # where Triton launches
            return kernel(*arguments)

    schema = torch.library.infer_schema(kernel, mutates_args=())
    op = torch.library.custom_op(
        f"gemcut::{kernel.__name__}",
        on_gpu,
        mutates_args=(),
        device_types="cuda",
        schema=schema,
    )
    op.register_kernel("cpu", kernel if INTERPRETED else on_cpu)
    op.register_fake(fake)


def _dense(x: Tensor, *_: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_register(rotate, _rotate_on_cpu, lambda q, k, *_: (torch.empty_like(q), torch.empty_like(k)))
_register(gelu, _gelu_on_cpu, _dense)
_register(gelu_and_mul, _gelu_and_mul_on_cpu, _dense)
