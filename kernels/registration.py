"""The ops as `torch.ops.gemcut.*`, for torch.compile and for other modules in torch.

Tensors on cuda go to the kernel; tensors on a CPU to cpu.py, or to the kernel where Triton's
interpreter is on.  Each op has a fake implementation (shapes and dtypes without data), so a module
that uses them is traced whole.  Dispatch costs microseconds: the engine calls the launchers.
The oracle's signature is the op's schema.  Where the weight is quantised, it is given as values,
and the rest of it in four more arguments.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gemcut.kernels import cpu, reference
from gemcut.kernels.head import count_ranges
from gemcut.kernels.interpreter import INTERPRETED
from gemcut.kernels.matmul import count_parts
from gemcut.kernels.quantized_weight import QuantizedWeight, Weight

MUTATED = {
    "add_rmsnorm_": ("residual",),
    "advance_": ("tokens", "positions"),
    "linear_rope_and_store_": ("k_cache", "v_cache"),
    "rope_and_store_": ("k_cache", "v_cache"),
}


def _empty(x: Weight, *shape: int) -> Tensor:
    """On x's device, in the dtype of its rows."""
    of_device = x if isinstance(x, Tensor) else x.values
    return of_device.new_empty(shape, dtype=x.dtype)


def _matrix(x: Weight, rows: int, columns: int) -> Tensor:
    return _empty(x, rows, columns)


def _fake_queries(x: Tensor, width: int, k_cache: Tensor, cos: Tensor) -> Tensor:
    _, HK, _, K = k_cache.shape
    return cos.new_empty(x.shape[-2], width // K - 2 * HK, K)


def _fake_linear_rope_and_store_(x, weight, bias, k_cache, v_cache, slots, positions, cos, *_):
    return _fake_queries(x, weight.shape[0], k_cache, cos)


def _fake_rope_and_store_(qkv, k_cache, v_cache, slots, positions, cos, *_):
    return _fake_queries(qkv, qkv.shape[-1], k_cache, cos)


def _runs_kernels(x: Tensor) -> bool:
    return x.device.type != "cpu" or INTERPRETED


def _fake_skinny_linear(x: Tensor, weight: Weight, bias=None) -> Tensor:
    splits = count_parts(weight, x) if _runs_kernels(x) else 1
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((splits, x.shape[0], weight.shape[0]), dtype=dtype)


def _fake_lm_head_argmax(x: Tensor, weight: Weight, *_):
    ranges = count_ranges(weight, x) if _runs_kernels(x) else 1
    shape = (ranges, x.shape[0])
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int64)


def _fake_begin_step(token_ids, positions, rows, table, scale, norm_weight, eps, inv_freqs, _):
    M = positions.shape[0] if rows is None else rows.shape[0]
    residual, half = _matrix(table, M, table.shape[1]), inv_freqs[0].shape[-1]
    cos = _empty(table, len(inv_freqs), M, 1, 2 * half)
    return positions.new_empty(M), residual, residual.clone(), cos, cos.clone()


def _fake_rope_tables(positions: Tensor, inv_freq: Tensor, attention_scaling, dtype):
    shape = (positions.shape[0], 1, 2 * inv_freq.shape[-1])
    return inv_freq.new_empty(shape, dtype=dtype), inv_freq.new_empty(shape, dtype=dtype)


# What each op yields, without data
FAKES: dict[str, Callable[..., Any]] = {
    "add_rmsnorm_": lambda residual, *_: residual.new_empty(residual.shape),
    "advance_": lambda chosen, *_: chosen.new_empty(chosen.shape[-1], dtype=torch.int64),
    "attention_decode": lambda q, *_: q.new_empty(q.shape),
    "attention_prefill": lambda q, *_: q.new_empty(q.shape),
    "begin_step": _fake_begin_step,
    "embed": lambda token_ids, table, _: _matrix(table, token_ids.shape[0], table.shape[1]),
    "geglu": lambda gate_up: _matrix(gate_up, gate_up.shape[0], gate_up.shape[1] // 2),
    "linear": lambda x, weight, *_: _matrix(x, x.shape[0], weight.shape[0]),
    "linear_geglu": lambda x, weight: _matrix(x, x.shape[0], weight.shape[0] // 2),
    "linear_rope_and_store_": _fake_linear_rope_and_store_,
    "lm_head": lambda x, weight, _: _matrix(x, x.shape[0], weight.shape[0]).float(),
    "lm_head_argmax": _fake_lm_head_argmax,
    "penalize": lambda logits, *_: logits.new_empty(logits.shape),
    "rmsnorm": lambda x, *_: x.new_empty(x.shape),
    "rope_and_store_": _fake_rope_and_store_,
    "rope_tables": _fake_rope_tables,
    "sample": lambda logits, *_: logits.new_empty(logits.shape[0], dtype=torch.int64),
    "skinny_linear": _fake_skinny_linear,
}


def _owning(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, but every result is dense and no argument."""

    def owned(result: Tensor, arguments: Sequence[Any]) -> Tensor:
        is_argument = any(result is argument for argument in arguments)
        return result.clone() if is_argument else result.contiguous()

    def wrapped(*arguments: Any) -> Any:
        first = next(x for x in arguments if isinstance(x, Tensor))
        index = first.device.index if first.is_cuda else None
        with torch.accelerator.device_index(index):  # where Triton launches
            result = function(*arguments)
        if isinstance(result, tuple):
            return tuple(owned(x, arguments) for x in result)
        return owned(result, arguments)

    return wrapped


def _of_quantized(
    scales: Tensor | None = None,
    zero_points: Tensor | None = None,
    columns: int | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """What an op takes after its own arguments where its weight is a QuantizedWeight's values."""


def _flat(function: Callable[..., Any], oracle: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors and numbers alone, in place of one that may take a QuantizedWeight."""
    signature = inspect.signature(oracle)
    own = list(signature.parameters.values())
    at = next((i for i, p in enumerate(own) if p.annotation == Weight), None)
    if at is None:
        return function
    more = inspect.signature(_of_quantized).parameters.values()
    flat = [*own[:at], own[at].replace(annotation=Tensor), *own[at + 1 :], *more]

    def call(*arguments: Any) -> Any:
        given = list(arguments[: len(own)])
        scales, zero_points, columns, dtype = (*arguments[len(own) :], *[None] * 4)[:4]
        if scales is not None:
            values = given[at]
            columns = columns or values.shape[1] * (2 if values.dtype == torch.uint8 else 1)
            dtype = dtype or torch.bfloat16
            given[at] = QuantizedWeight(values, scales, zero_points, columns, dtype)
        return function(*given)

    call.__signature__ = signature.replace(parameters=flat)  # pyright: ignore[reportFunctionMemberAccess]
    return call


def register(kernels: Mapping[str, Callable[..., Any]]) -> None:
    """Make `torch.ops.gemcut.<name>` of each kernel's launcher, by name."""
    for name, kernel in kernels.items():
        oracle, mutated = getattr(reference, name), MUTATED.get(name, ())
        op = torch.library.custom_op(
            f"gemcut::{name}",
            _owning(_flat(kernel, oracle)),
            mutates_args=mutated,
            device_types="cuda",
            schema=torch.library.infer_schema(_flat(oracle, oracle), mutates_args=mutated),
        )
        on_cpu = kernel if INTERPRETED else getattr(cpu, name)
        op.register_kernel("cpu", _owning(_flat(on_cpu, oracle)))
        op.register_fake(_flat(FAKES[name], oracle))
