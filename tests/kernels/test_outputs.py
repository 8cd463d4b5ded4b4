"""`out=` of every op, in every table: the caller's tensors hold the results, or nothing is done."""

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from accuracy import GUARD, guarded
from op_cases import in_blocks, in_fp8, positional, quantized_calls, small_calls
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from gemcut import kernels
from gemcut.kernels import cpu, reference
from gemcut.kernels.contracts import CONTRACTS
from gemcut.kernels.quantized_weight import QuantizedWeight
from gemcut.kernels.registration import empty_results

TABLES = {"kernels": kernels, "cpu": cpu, "reference": reference}
CASES = {f"{name}, plain": arguments for name, arguments in small_calls().items()}
CASES |= {
    f"{name}, {kind}": arguments
    for kind in ("int8 by row", "fp8 by row", "int4 in 32s with zero points")
    for name, arguments in quantized_calls(kind).items()
}
CASES |= {
    f"{name}, fp8 cache": in_fp8(arguments)
    for name, arguments in small_calls().items()
    if "k_cache" in arguments
}
CASES |= {
    f"{name}, in blocks": in_blocks(arguments)
    for name, arguments in small_calls().items()
    if "k_cache" in arguments
}
# whose first result is an argument where the caller gives no memory for it
CASES["begin_step, of all rows"] = small_calls()["begin_step"] | {"rows": None}
by_case = pytest.mark.parametrize("case", CASES)


def fresh(case: str) -> dict[str, Any]:
    """The arguments of a case, in memory of their own."""
    return {key: x.clone() if isinstance(x, Tensor) else x for key, x in CASES[case].items()}


def op_of(case: str) -> str:
    return case.partition(",")[0]


def tensors(x: Any) -> list[Tensor]:
    """All tensors of a result or an argument."""
    if isinstance(x, QuantizedWeight):
        return list(x.tensors)
    return [y for y in (x if isinstance(x, (tuple, list)) else [x]) if isinstance(y, Tensor)]


def as_out(several: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return several[0] if len(several) == 1 else tuple(several)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def buffer_of(x: Tensor) -> Tensor:
    """All of the memory that a guarded tensor lies in."""
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())


@by_case
@pytest.mark.parametrize("table", TABLES)
def test_results_are_in_the_callers_tensors(table, case):
    """The same objects come back, with the same bits, and nothing beside them is written."""
    op, arguments, plain = getattr(TABLES[table], op_of(case)), fresh(case), fresh(case)
    made = tensors(op(**plain))
    outs = [guarded(torch.zeros(y.shape, dtype=y.dtype, device=y.device)) for y in made]
    before = [buffer_of(x).clone() for x in outs]
    returned = tensors(op(**arguments, out=as_out(outs)))
    assert all(x is y for x, y in zip(returned, outs, strict=True))
    for x, y, old in zip(outs, made, before, strict=True):
        assert torch.equal(bits(x), bits(y))
        for edge in (slice(None, GUARD), slice(GUARD + x.numel(), None)):
            assert torch.equal(bits(buffer_of(x)[edge]), bits(old[edge]))
    for key, x in arguments.items():  # what it writes to besides
        if isinstance(x, Tensor):
            assert torch.equal(bits(x), bits(plain[key])), key


def outs_last(case: str, outs: list[Tensor]) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
    """The registered op that writes into tensors, and its arguments."""
    name = op_of(case)
    op = getattr(torch.ops.gemcut, f"{name.rstrip('_')}_out").default
    arguments, schema = positional(name, fresh(case)), op._schema.arguments
    defaults = [p.default_value for p in schema[len(arguments) : len(schema) - len(outs)]]
    assert tuple(p.name for p in schema[-len(outs) :]) == CONTRACTS[name].outs
    return op, (*arguments, *defaults, *outs)


@by_case
def test_a_registered_op_writes_there_and_returns_nothing(case):
    expected = tensors(getattr(kernels, op_of(case))(**fresh(case)))
    outs = tensors(empty_results(op_of(case), **fresh(case)))
    op, arguments = outs_last(case, outs)
    assert op(*arguments) is None
    for x, y in zip(outs, expected, strict=True):
        assert torch.equal(bits(x), bits(y))


@by_case
def test_opcheck_of_what_writes_there(case):
    # unwritten memory may hold NaN, which equals nothing
    outs = [x.zero_() for x in tensors(empty_results(op_of(case), **fresh(case)))]
    op, arguments = outs_last(case, outs)
    of_torch = ("test_faketensor", "test_aot_dispatch_dynamic")
    if "fp8" not in case:  # of which opcheck itself takes the norm, which torch has not
        of_torch += ("test_schema", "test_autograd_registration")
    results = torch.library.opcheck(op, arguments, test_utils=of_torch)
    assert set(results.values()) == {"SUCCESS"}


def test_an_op_without_its_out_is_refused():
    x, weight = torch.randn(2, 32), torch.randn(8, 32)
    with pytest.raises(ValueError, match=r"an op that ends in _out needs out$"):
        torch.ops.gemcut.linear_out(x, weight)
    with pytest.raises(ValueError, match="needs out_scores and out_ids"):
        torch.ops.gemcut.lm_head_argmax_out(x, weight, None, out_ids=torch.zeros(1, 2).long())


WRONG = {
    "shape": (lambda x: x.new_empty((*x.shape, 1)), r"out is \[.*\], must be \["),
    "dtype": (lambda x: x.to(torch.float64), "out is torch.float64, must be torch."),
    "device": (lambda x: x.to("meta"), "out is on meta, must be on "),
    "strides": (
        lambda x: x.new_empty((*x.shape, 2))[..., 0],
        "out has strides .*, must be contiguous",
    ),
    "kind": (lambda x: x.tolist(), "out is a list, must be one tensor"),
}


@pytest.mark.parametrize("name", kernels.__all__)
@pytest.mark.parametrize("wrong", WRONG)
def test_another_out_is_refused_and_nothing_is_done(wrong, name):
    (make, message), case = WRONG[wrong], f"{name}, plain"
    outs = tensors(empty_results(name, **fresh(case)))
    for at in range(len(outs)):
        given = as_out([make(x) if i == at else x for i, x in enumerate(outs)])
        for table in TABLES.values():
            arguments = fresh(case)
            with pytest.raises(ValueError, match=message):
                getattr(table, name)(**arguments, out=given)
            if table is kernels:  # in torch, results are copied once they are there
                for key, x in arguments.items():
                    assert not isinstance(x, Tensor) or torch.equal(x, CASES[case][key])


@pytest.mark.parametrize("name", [n for n in kernels.__all__ if len(CONTRACTS[n].results) > 1])
def test_another_number_of_outs_is_refused(name):
    case = f"{name}, plain"
    outs = tensors(empty_results(name, **fresh(case)))
    for given, told in ((outs[0], "one tensor"), (outs[:1], "1 tensors")):
        for table in TABLES.values():
            with pytest.raises(ValueError, match=f"out is {told}, must be a tuple of {len(outs)}"):
                getattr(table, name)(**fresh(case), out=given)


@by_case
def test_an_out_in_the_memory_of_an_argument_is_refused(case):
    """Of each tensor of the call, whatever the dtypes, and of another result."""
    op = getattr(kernels, op_of(case))
    outs = tensors(empty_results(op_of(case), **fresh(case)))
    for at, like in enumerate(outs):
        for key, x in fresh(case).items():
            for i in range(len(tensors(x))):
                arguments = fresh(case)
                old = tensors(arguments[key])[i]
                moved, bad = overlapping(old, like)
                given = as_out([bad if j == at else y for j, y in enumerate(outs)])
                with pytest.raises(ValueError, match="overlaps a tensor"):
                    op(**replaced(arguments, key, old, moved), out=given)
        for other in range(at):
            moved, bad = overlapping(outs[other], like)
            given = as_out([{at: bad, other: moved}.get(j, y) for j, y in enumerate(outs)])
            with pytest.raises(ValueError, match="overlaps a tensor"):
                op(**fresh(case), out=given)


def overlapping(x: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of x, and a tensor as `like` that begins in the last of its memory."""
    unit = max(x.itemsize, like.itemsize)
    memory = torch.zeros(2 * unit + x.nbytes + like.nbytes, dtype=torch.uint8, device=x.device)
    begin = -x.nbytes % unit  # so that the end of x is a place for both dtypes
    last = begin + x.nbytes - unit
    copy = memory[begin : begin + x.nbytes].view(x.dtype).view(x.shape).copy_(x)
    return copy, memory[last : last + like.nbytes].view(like.dtype).view(like.shape)


def replaced(arguments: dict[str, Any], key: str, old: Tensor, new: Tensor) -> dict[str, Any]:
    """The same arguments with another tensor in place of one."""
    x = arguments[key]
    if isinstance(x, QuantizedWeight):
        at = next(n for n in ("values", "scales", "zero_points") if getattr(x, n) is old)
        return arguments | {key: replace(x, **{at: new})}
    if isinstance(x, list):
        return arguments | {key: [new if y is old else y for y in x]}
    return arguments | {key: new}


class Allocations(TorchDispatchMode):
    """The calls of torch that allocate."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if any(word in name for word in ("empty", "zeros", "clone", "to_copy")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter counts launches")
@by_case
def test_scratch_and_launches_are_as_the_page_has_them(case, monkeypatch):
    """What has no scratch allocates nothing: a captured graph holds the caller's memory alone."""
    launches = []
    monkeypatch.setattr(GridExecutor, "__call__", lambda *_, **__: launches.append(1))
    name, arguments = op_of(case), fresh(case)
    outs, contract = empty_results(name, **arguments), CONTRACTS[name]
    with Allocations() as allocations:
        getattr(kernels, name)(**arguments, out=outs)
    has_scratch = bool(contract.scratch) and not contract.scratch.startswith("none")
    expected = int(contract.launches[0])
    if name == "linear":  # a plain product is cuBLAS's
        has_scratch, expected = "plain" not in case, int("plain" not in case)
    elif name == "linear_rope_and_store_" and "int4" in case:
        has_scratch, expected = True, 2
    elif name == "sample":  # the small call has top_k and top_p
        expected = 3
    assert bool(allocations.names) == has_scratch, allocations.names
    assert len(launches) == expected


@by_case
def test_empty_results_are_like_those_of_the_call(case):
    expected = tensors(getattr(kernels, op_of(case))(**fresh(case)))
    arguments = fresh(case)
    made = tensors(empty_results(op_of(case), **arguments))
    forms = [[(x.shape, x.dtype, x.device) for x in found] for found in (made, expected)]
    assert forms[0] == forms[1]
    assert all(x.is_contiguous() for x in made)
    used = {x.data_ptr() for argument in arguments.values() for x in tensors(argument)}
    assert len({x.data_ptr() for x in made} - used) == len(made)


def test_results_of_what_is_no_op_are_refused():
    with pytest.raises(
        ValueError, match=r"there is no op 'best_of_ranges'; there are add_rmsnorm_, "
    ):
        empty_results("best_of_ranges", torch.zeros(2, 3))


def test_signatures_end_in_out():
    for name in kernels.__all__:
        for table in TABLES.values():
            *_, out = inspect.signature(getattr(table, name)).parameters.values()
            assert (out.name, out.kind, out.default) == ("out", out.KEYWORD_ONLY, None)
