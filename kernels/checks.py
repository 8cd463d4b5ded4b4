"""Checks before a launch: a kernel launched on wrong shapes reads foreign memory."""

import math
from typing import Any

import torch
from torch import Tensor

from gemcut.kernels.gpu_arch import converts_fp8
from gemcut.kernels.interpreter import INTERPRETED
from gemcut.kernels.quantized_weight import Weight

FP8 = torch.float8_e4m3fn
MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def require(condition: bool, message: str) -> None:
    """ValueError with `message` unless the condition holds; an assert would vanish under -O."""
    if not condition:
        raise ValueError(message)


def check_tensors(x: Weight, /, **others: Weight | None) -> None:
    """ValueError unless all are on x's device, where kernels run, and floats have x's dtype.

    A quantised weight may stand for rows of any dtype, but as x it gives the others theirs.
    """
    device, dtype = x.device, x.dtype
    require(
        device.type == "cuda" or (INTERPRETED and device.type == "cpu"),
        f"a kernel needs tensors on cuda, not {device}; a CPU runs gemcut.kernels.reference, "
        f"or the kernels themselves with TRITON_INTERPRET=1 set before the import",
    )
    if device.type == "cuda":
        current = torch.cuda.current_device()
        require(
            device.index == current,
            f"the input is on {device}, but Triton launches on the current device, "
            f"cuda:{current}; call under torch.cuda.device({device.index})",
        )
    require(dtype in DTYPES, f"dtype {dtype} is not supported; float32, bfloat16, float16 are")
    for name, other in others.items():
        if other is None:
            continue
        require(other.device == device, f"{name} is on {other.device}, the input on {device}")
        if isinstance(other, Tensor) and other.is_floating_point():
            require(other.dtype == dtype, f"{name} is {other.dtype}, the input {dtype}")


def check_shape(name: str, x: Tensor, *shape: int) -> None:
    """A dense row-major tensor of exactly this shape."""
    require(tuple(x.shape) == shape, f"{name} is {list(x.shape)}, must be {list(shape)}")
    require(x.is_contiguous(), f"{name} has strides {list(x.stride())}, must be contiguous")


def check_weight(name: str, weight: Weight, must_be: str = "[N, D]") -> None:
    """A dense matrix [N, D], plain or quantised."""
    if isinstance(weight, Tensor):
        require(weight.dim() == 2, f"{name} is {list(weight.shape)}, must be {must_be}")
        check_shape(name, weight, *weight.shape)
        return
    for part in weight.tensors:
        check_shape(f"a part of {name}", part, *part.shape)


def check_rows(name: str, x: Tensor, width: int) -> None:
    """Rows of a matrix, [M, width]; they may have gaps between them, each is contiguous."""
    require(
        x.dim() == 2 and x.shape[1] == width,
        f"{name} is {list(x.shape)}, must be [M, {width}]",
    )
    require(
        x.stride(1) == 1 or width == 1,
        f"{name} has strides {list(x.stride())}, the last must be 1",
    )


def check_parts(name: str, x: Tensor, like: Tensor) -> tuple[int, int, int]:
    """Rows [M, N] of the dtype of `like`, or partial sums of them [S, M, N] in float32: S, M, N."""
    if x.dim() != 3:
        check_tensors(like, **{name: x})
        check_rows(name, x, x.shape[-1])
        return 1, x.shape[0], x.shape[1]
    require(x.dtype == torch.float32, f"{name} is {x.dtype}, partial sums must be float32")
    require(x.device == like.device, f"{name} is on {x.device}, the others on {like.device}")
    require(x.shape[0] > 0, f"{name} is {list(x.shape)}: not one partial sum")
    check_shape(name, x, *x.shape)
    return x.shape[0], x.shape[1], x.shape[2]


def check_index(name: str, x: Tensor, *shape: int) -> None:
    """A contiguous tensor of int64 or int32 of exactly this shape."""
    require(x.dtype in (torch.int64, torch.int32), f"{name} is {x.dtype}, must be int64 or int32")
    check_shape(name, x, *shape)


def check_softcap(softcap: float | None) -> None:
    """A cap is positive, or absent."""
    require(
        softcap is None or 0 < softcap < math.inf,
        f"softcap is {softcap}, must be above 0 and finite, or None",
    )


def check_cache(
    x: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    block_tables: Tensor | None,
) -> tuple[int, int, int, int]:
    """Slots, KV heads, capacity and head_dim of a cache of x's dtype.

    Or of float8_e4m3fn, and then with scales [HK] in float32.  k and v [num_slots, HK, C, K], or
    with block_tables [num_slots, N] in blocks, [blocks, block_size, HK, K], both with one set of
    strides, of which the last is 1.
    """
    shape = "[slots, HK, C, K]" if block_tables is None else "[blocks, block_size, HK, K]"
    require(k_cache.dim() == 4, f"k_cache is {list(k_cache.shape)}, must be {shape}")
    num_slots, HK, C, K = k_cache.shape
    if block_tables is not None:
        num_slots, C, HK = _check_block_tables(x, k_cache, block_tables)
    require(HK > 0 and C > 0, f"k_cache is {list(k_cache.shape)}, must hold heads and positions")
    require(
        0 < K <= MAX_HEAD_DIM and K % 2 == 0, f"head_dim {K} is not even and in 2 to {MAX_HEAD_DIM}"
    )
    _check_strides(k_cache, v_cache, 2 if block_tables is None else 1)
    if k_cache.dtype != FP8:
        check_tensors(x, k_cache=k_cache, v_cache=v_cache)
        require(k_scale is v_scale is None, f"scales are for a cache of fp8, not {k_cache.dtype}")
        return num_slots, HK, C, K
    require(v_cache.dtype == FP8, f"v_cache is {v_cache.dtype}, k_cache {k_cache.dtype}")
    check_converts_fp8(x.device)
    strides = k_cache.stride()
    require(not any(n % 2 for n in strides[:3]), f"k_cache has strides {list(strides)}, not even")
    for name, cache, scale in (("k", k_cache, k_scale), ("v", v_cache, v_scale)):
        require(scale is not None, f"a cache of fp8 needs {name}_scale [{HK}]")
        assert scale is not None
        check_shape(f"{name}_scale", scale, HK)
        require(scale.dtype == torch.float32, f"{name}_scale is {scale.dtype}, must be float32")
        for other in (cache, scale):
            require(other.device == x.device, f"{name} is on {other.device}, not on {x.device}")
    return num_slots, HK, C, K


def _check_block_tables(x: Tensor, k_cache: Tensor, block_tables: Tensor) -> tuple[int, int, int]:
    """Slots, capacity and KV heads of a cache in blocks."""
    shape, strides = list(block_tables.shape), list(block_tables.stride())
    require(len(shape) == 2, f"block_tables is {shape}, must be [slots, N]")
    dtype = block_tables.dtype
    require(dtype == torch.int32, f"block_tables is {dtype}, must be torch.int32")
    require(
        strides[1] == 1 or shape[1] == 1, f"block_tables has strides {strides}, the last must be 1"
    )
    check_tensors(x, block_tables=block_tables)
    capacity = shape[1] * k_cache.shape[1]
    require(capacity < 2**31, f"{shape[1]} blocks of {k_cache.shape[1]} tokens are not below 2**31")
    return shape[0], capacity, k_cache.shape[2]


def _check_strides(k_cache: Tensor, v_cache: Tensor, tokens: int) -> None:
    """ValueError unless k and v have one shape and lie alike; `tokens` is the axis of these.

    Without `require`: messages that nobody sees would cost microseconds of a launch.
    """
    shape, strides, of_v = k_cache.shape, k_cache.stride(), v_cache.stride()
    if v_cache.shape != shape:
        raise ValueError(f"v_cache is {list(v_cache.shape)}, must be {list(shape)}, as k_cache")
    if strides[3] != 1:
        raise ValueError(f"k_cache has strides {list(strides)}, the last must be 1")
    if of_v != strides:
        raise ValueError(f"v_cache has strides {list(of_v)}, must have {list(strides)}, as k_cache")
    if shape[tokens] * strides[tokens] >= 2**31:  # offsets within a head are 32-bit
        raise ValueError(
            f"{shape[tokens]} tokens of a head, {strides[tokens]} elements apart, "
            f"are not below 2**31"
        )


def cache_arguments(k_cache: Tensor, block_tables: Tensor | None) -> dict[str, Any]:
    """How a cache lies, as arguments of a kernel: slots are KV_BLOCK 0, without a table."""
    if block_tables is None:
        slot, head, token, _ = k_cache.stride()
        return {
            "block_table_ptr": None, "stride_table": 0, "num_blocks": 0,
            "stride_k_s": slot, "stride_k_h": head, "KV_STRIDE": token, "KV_BLOCK": 0,
        }  # fmt: skip
    block, token, head, _ = k_cache.stride()
    return {
        "block_table_ptr": block_tables, "stride_table": block_tables.stride(0),
        "num_blocks": k_cache.shape[0],
        "stride_k_s": block, "stride_k_h": head, "KV_STRIDE": token, "KV_BLOCK": k_cache.shape[1],
    }  # fmt: skip


def check_converts_fp8(device: torch.device) -> None:
    """ValueError where a GPU has no instructions that convert to and from e4m3."""
    require(converts_fp8(device), f"an fp8 cache needs a GPU from sm_89 on, which {device} is not")


def count_q_heads(name: str, width: int, num_kv_heads: int, head_dim: int) -> int:
    """Query heads of a fused qkv of `width` rows or columns: HQ, a multiple of HK."""
    HQ = width // head_dim - 2 * num_kv_heads
    require(
        width % head_dim == 0 and HQ > 0 and HQ % num_kv_heads == 0,
        f"{name} is {width} wide, must be (HQ + 2 * {num_kv_heads}) * {head_dim} "
        f"with HQ a multiple of {num_kv_heads}",
    )
    return HQ


def check_rotation(
    M: int, K: int, slots: Tensor, positions: Tensor, cos: Tensor, sin: Tensor
) -> None:
    """Where M tokens go, and by what they are rotated: slots, positions [M]; cos, sin [M, 1, K]."""
    check_index("slots", slots, M)
    check_index("positions", positions, M)
    check_shape("cos", cos, M, 1, K)
    check_shape("sin", sin, M, 1, K)
