"""The ops as `torch.ops.gemcut.*`, for torch.compile and for other modules in torch.

Tensors on cuda go to the kernel; tensors on a CPU to cpu.py, or to the kernel where Triton's
interpreter is on.  Each op has a fake implementation (shapes and dtypes without data), so a module
that uses them is traced whole.  Dispatch costs microseconds: the engine calls the launchers.
The oracle's signature is the op's schema.  Where the weight is quantised, it is given as values,
and the rest of it in four more arguments.  `<name>_out` writes its results into arguments, which
come last and by keyword, and returns nothing.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from gemcut.kernels import cpu, reference
from gemcut.kernels.contracts import CONTRACTS
from gemcut.kernels.head import count_ranges
from gemcut.kernels.interpreter import INTERPRETED
from gemcut.kernels.matmul import count_parts
from gemcut.kernels.quantized_weight import QuantizedWeight, Weight
from gemcut.kernels.reference.cache import cache_shape


def _empty(x: Weight, *shape: int) -> Tensor:
    """On x's device, in the dtype of its rows."""
    of_device = x if isinstance(x, Tensor) else x.values
    return of_device.new_empty(shape, dtype=x.dtype)


def _matrix(x: Weight, rows: int, columns: int) -> Tensor:
    return _empty(x, rows, columns)


def _fake_queries(
    x, width, k_cache, cos, sin, q_norm=None, k_norm=None, eps=0.0, k_scale=None, v_scale=None,
    block_tables=None,
):  # fmt: skip
    HK, K = cache_shape(k_cache, block_tables)[0], k_cache.shape[-1]
    return cos.new_empty(x.shape[-2], width // K - 2 * HK, K)


def _fake_linear_rope_and_store_(x, weight, bias, k_cache, v_cache, slots, positions, cos, *more):
    return _fake_queries(x, weight.shape[0], k_cache, cos, *more)


def _fake_rope_and_store_(qkv, k_cache, v_cache, slots, positions, cos, *more):
    return _fake_queries(qkv, qkv.shape[-1], k_cache, cos, *more)


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
    normed, sin = residual.new_empty(residual.shape), cos.new_empty(cos.shape)
    return positions.new_empty(M), residual, normed, cos, sin


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
    "lm_head": lambda x, weight, _: x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32),
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
        with _device_of(arguments):
            result = function(*arguments)
        if isinstance(result, tuple):
            return tuple(owned(x, arguments) for x in result)
        return owned(result, arguments)

    return wrapped


def _device_of(arguments: Sequence[Any]) -> AbstractContextManager[None]:
    """The device of the tensors as the current one, where Triton launches."""
    first = next(x for x in arguments if isinstance(x, Tensor))
    return torch.accelerator.device_index(first.device.index if first.is_cuda else None)


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

    def call(*arguments: Any, **out: Any) -> Any:
        given = list(arguments[: len(own)])
        scales, zero_points, columns, dtype = (*arguments[len(own) :], *[None] * 4)[:4]
        if scales is not None:
            values = given[at]
            columns = columns or values.shape[1] * (2 if values.dtype == torch.uint8 else 1)
            dtype = dtype or torch.bfloat16
            given[at] = QuantizedWeight(values, scales, zero_points, columns, dtype)
        return function(*given, **out)

    call.__signature__ = signature.replace(parameters=flat)  # pyright: ignore[reportFunctionMemberAccess]
    return call


def _into_outs(
    function: Callable[..., Any], schema: Callable[..., Any], names: Sequence[str]
) -> Callable[..., Any]:
    """A function of that schema whose results are arguments, of these names: it returns nothing.

    They come last.  torch has no tensors by keyword alone, and none without a default after one
    that has: there they seem optional.
    """
    own = inspect.signature(schema)
    parameters = list(own.parameters.values())
    has_defaults = any(p.default is not p.empty for p in parameters)
    annotation, default = (Tensor | None, None) if has_defaults else (Tensor, inspect._empty)

    def call(*arguments: Any) -> None:
        outs = arguments[len(parameters) :]
        if len(outs) < len(names) or any(out is None for out in outs):
            raise ValueError(f"an op that ends in _out needs {' and '.join(names)}")
        with _device_of(arguments):
            function(*arguments[: len(parameters)], out=outs if len(names) > 1 else outs[0])

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    more = [inspect.Parameter(n, kind, default=default, annotation=annotation) for n in names]
    call.__signature__ = own.replace(parameters=[*parameters, *more], return_annotation=None)  # pyright: ignore[reportFunctionMemberAccess]
    return call


def register(kernels: Mapping[str, Callable[..., Any]]) -> None:
    """Make `torch.ops.gemcut.<name>` and `<name>_out` of each kernel's launcher, by name."""
    for name, kernel in kernels.items():
        oracle, contract = inspect.unwrap(getattr(reference, name)), CONTRACTS[name]
        on_cpu = kernel if INTERPRETED else getattr(cpu, name)
        gpu, cpu_, schema, fake = (
            _flat(function, oracle) for function in (kernel, on_cpu, oracle, FAKES[name])
        )
        op = torch.library.custom_op(
            f"gemcut::{name}",
            _owning(gpu),
            mutates_args=contract.writes,
            device_types="cuda",
            schema=torch.library.infer_schema(schema, mutates_args=contract.writes),
        )
        op.register_kernel("cpu", _owning(cpu_))
        op.register_fake(fake)

        writes = (*contract.writes, *contract.outs)
        gpu, cpu_, schema = (_into_outs(f, schema, contract.outs) for f in (gpu, cpu_, schema))
        op = torch.library.custom_op(
            f"gemcut::{name.rstrip('_')}_out",
            gpu,
            mutates_args=writes,
            device_types="cuda",
            schema=torch.library.infer_schema(schema, mutates_args=writes),
        )
        op.register_kernel("cpu", cpu_)
        op.register_fake(lambda *_: None)


def empty_results(name: str, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
    """New tensors for the results of an op of this name, as `out=` takes them: nothing is launched.

    The other arguments are those of the call; under a FakeTensorMode nothing is allocated either.
    """
    if name not in FAKES:
        raise ValueError(f"there is no op {name!r}; there are {', '.join(FAKES)}")
    bound = inspect.signature(inspect.unwrap(getattr(reference, name))).bind(*args, **kwargs)
    bound.apply_defaults()
    return FAKES[name](*bound.args)
