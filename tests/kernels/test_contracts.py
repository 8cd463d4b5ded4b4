"""What kernels/README.md says of each op, tried: shapes, dtypes, strides, writes and costs."""

import inspect
import random

import pytest
import torch
from accuracy import DEVICE, assert_accurate, outcome
from contract_forms import fits, letters_of, shape_of, split, value
from op_cases import in_blocks, in_fp8, index, small_calls
from random_models import random_config
from torch import Tensor

from gemcut import kernels
from gemcut.bench.ops.cases import Grid, Shapes
from gemcut.bench.ops.kernels import model_cases
from gemcut.engine.config.model_config import ModelConfig
from gemcut.kernels import reference
from gemcut.kernels.contracts import CONTRACTS
from gemcut.kernels.registration import empty_results

ARGUMENTS = [
    (name, argument, number)
    for name, contract in CONTRACTS.items()
    for argument, forms in contract.forms.items()
    for number in range(len(forms))
]
by_argument = pytest.mark.parametrize(("name", "argument", "number"), ARGUMENTS)


def parameters(name):
    """Of an op's oracle, without `out`."""
    return inspect.signature(inspect.unwrap(getattr(reference, name))).parameters


def call_with(name, argument, number):
    """The small call of an op in which this argument has the form of this number.

    Where others have as many forms, they have that one too.
    """
    arguments, forms = small_calls()[name], CONTRACTS[name].forms
    if "k_cache" in forms and argument.endswith("_scale"):
        arguments = in_fp8(arguments)
    if arguments.get(argument) is None and argument != "block_tables":
        arguments |= made(name, {argument: forms[argument]}, letters_of(forms, arguments))
        if argument.endswith("_norm_weight"):
            both = {"q_norm_weight": forms[argument], "k_norm_weight": forms[argument]}
            arguments |= made(name, both, letters_of(forms, arguments))
    if argument == "block_tables" or (argument.endswith("_cache") and number):
        arguments = in_blocks(arguments)
        return arguments | {n: arguments[n].contiguous() for n in ("k_cache", "v_cache")}
    if not has_form(arguments[argument], forms[argument][number]):
        letters = letters_of(forms, arguments) | {"S": 2, "R": 2}
        several = {n: f for n, f in forms.items() if len(f) > 1 and "cache" not in f[0]}
        arguments |= made(name, {n: [f[number]] for n, f in several.items()}, letters)
    return arguments


def has_form(x, form):
    return len((x[0] if isinstance(x, list) else x).shape) == len(split(form)[0])


def made(name, forms, letters, generator=None):
    """Tensors of the first of these forms, by name: ones, but zeros of integers."""
    found = {}
    for argument, (form, *_) in forms.items():
        dtype = split(form)[1]
        kind = {"int": torch.int64, "float": torch.float32, "cache": torch.float32}.get(dtype)
        kind = torch.float32 if dtype == "weight" else kind or getattr(torch, dtype)
        fill = torch.ones if kind.is_floating_point else torch.zeros
        x = fill(shape_of(form, letters), dtype=kind, device=DEVICE)
        is_several = "Sequence" in str(parameters(name)[argument].annotation)
        found[argument] = [x.clone() for _ in range(letters["R"])] if is_several else x
    return found


def changed(arguments, argument, change, alike=()):
    """The same arguments with one changed, or each of a sequence of them, and those alike."""
    x = arguments[argument]
    new = {argument: [change(y) for y in x] if isinstance(x, list) else change(x)}
    return arguments | {name: change(arguments[name]) for name in alike} | new


def with_gaps(x):
    """The same numbers with a gap after each row, or between those of a vector."""
    if x.dim() == 1:
        return x.new_zeros(2 * len(x))[::2].copy_(x)
    return x.new_zeros((*x.shape[:-1], x.shape[-1] + 3))[..., : x.shape[-1]].copy_(x)


def transposed(x):
    """The same numbers, the last axis no longer contiguous."""
    return x.mT.contiguous().mT if x.dim() > 1 else x.new_zeros(2 * len(x))[::2].copy_(x)


def assert_same(name, arguments, others):
    """Two calls of an op leave the same numbers."""
    found, expected = (outcome(getattr(kernels, name), a) for a in (others, arguments))
    for key, x in expected.items():
        # positions that come back are int32 where they were given so
        torch.testing.assert_close(found[key], x, rtol=0, atol=0, equal_nan=True, check_dtype=False)


def test_every_tensor_of_every_op_has_its_form():
    assert set(CONTRACTS) == set(kernels.__all__)
    for name, contract in CONTRACTS.items():
        found = {p.name for p in parameters(name).values() if "ensor" in str(p.annotation)}
        found |= {p.name for p in parameters(name).values() if "Quantized" in str(p.annotation)}
        assert set(contract.forms) == found, name


@pytest.mark.parametrize("name", kernels.__all__)
def test_what_is_written_is_what_the_page_says(name):
    arguments = small_calls()[name]
    before = {k: x.clone() for k, x in arguments.items() if isinstance(x, Tensor)}
    getattr(kernels, name)(**arguments)
    written = {k for k, x in before.items() if not torch.equal(x, arguments[k])}
    assert written == set(CONTRACTS[name].writes)


@by_argument
def test_strides_are_as_the_page_says(name, argument, number):
    arguments = call_with(name, argument, number)
    strides = split(CONTRACTS[name].forms[argument][number])[2]
    alike = ("k_cache", "v_cache") if argument.endswith("_cache") else ()
    if strides == "strided":
        others = changed(arguments, argument, with_gaps, alike)
        if name == "linear":  # cuBLAS and its like take another way then
            assert_accurate(kernels.linear, **others)
        else:
            assert_same(name, arguments, others)
        refused = changed(arguments, argument, transposed, alike)
    else:
        refused = changed(arguments, argument, with_gaps)
    with pytest.raises(ValueError, match=r"contiguous|the last must be 1|no matrix of rows"):
        getattr(kernels, name)(**refused)


@by_argument
def test_dtypes_are_as_the_page_says(name, argument, number):
    arguments, forms = call_with(name, argument, number), CONTRACTS[name].forms
    dtype = split(forms[argument][number])[1]

    def call_in(other):
        return changed(arguments, argument, lambda x: x.to(other))

    if dtype == "int":
        for other in (torch.int32, torch.int64):
            assert_same(name, arguments, call_in(other))
    refused = {
        "int": (torch.int16, torch.float32),
        "int64": (torch.int32,),
        "int32": (torch.int64,),
        "float32": (torch.float64, torch.bfloat16),
        "bool": (torch.uint8,),
    }.get(dtype, (torch.float64,))
    floats = ("float", "weight", "cache")
    narrow = [  # other arguments that must have this one's dtype
        other
        for other, others in forms.items()
        if other != argument
        and split(others[0])[1] in floats
        and not any(split(f)[1] == "float32" and has_form(arguments[other], f) for f in others)
    ]
    if dtype in floats and narrow:
        refused += (torch.bfloat16,)  # beside others in float32
    for other in refused:
        with pytest.raises(ValueError, match=r"is torch|are torch|dtype torch|must be"):
            getattr(kernels, name)(**call_in(other))


@pytest.mark.parametrize("name", kernels.__all__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_floats_may_be_narrow(name, dtype):
    arguments, forms = small_calls()[name], CONTRACTS[name].forms
    for argument in forms:
        kinds = {split(f)[1] for f in forms[argument]}
        first = split(forms[argument][0])[1]
        given = arguments.get(argument)
        if (
            kinds & {"float", "weight", "cache"}
            and given is not None
            and has_form(given, forms[argument][0])
        ):
            arguments = changed(arguments, argument, lambda x: x.to(dtype))
        assert first != "float" or kinds <= {"float", "float32"}
    if "dtype" in arguments:
        arguments |= {"dtype": dtype}
    made_, results = empty_results(name, **arguments), getattr(kernels, name)(**arguments)
    several = [x if isinstance(x, tuple) else (x,) for x in (made_, results)]
    forms_ = CONTRACTS[name].results.values()
    for form, x, y in zip(forms_, *several, strict=True):
        assert x.dtype == y.dtype
        kind = split(form)[1]
        narrow = dtype if kind in ("float", "as dtype") else y.dtype
        assert y.dtype == narrow


@by_argument
def test_tensors_of_two_devices_are_refused(name, argument, number):
    arguments = call_with(name, argument, number)
    moved = changed(arguments, argument, lambda x: x.to("meta"))
    with pytest.raises(ValueError, match="meta"):
        getattr(kernels, name)(**moved)


def sizes(seed):
    """Random sizes by letter, as ops take them."""
    of = random.Random(seed)
    letters = {letter: of.randint(1, 5) for letter in "BFMSTV"}
    letters |= {name: of.randint(2, 4) for name in ("slots", "blocks")}
    letters |= {"N": of.randint(3, 6), "block_size": of.randint(3, 5)}
    letters |= {"HK": of.randint(1, 3), "K": 2 * of.randint(1, 12), "D": 32 * of.randint(1, 3)}
    return letters | {"HQ": letters["HK"] * of.randint(1, 3), "C": of.randint(9, 20), "R": 2}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", kernels.__all__)
def test_results_have_the_shapes_of_the_page(name, seed):
    """Of the launcher and without data, where tensors are made by the page alone."""
    letters, contract = sizes(seed), CONTRACTS[name]
    number = seed % 2
    forms = {n: [f[min(number, len(f) - 1)]] for n, f in contract.forms.items()}
    arguments = {p.name: p.default for p in parameters(name).values()}
    arguments |= {n: x for n, x in small_calls()[name].items() if n not in forms}
    arguments |= made(name, forms, letters)
    if "k_scale" in forms:
        arguments |= {"k_scale": None, "v_scale": None}
        arguments |= {} if number else {"block_tables": None}
    if name == "attention_prefill":
        arguments["cu_seqlens"] = index(0, *[letters["M"]] * letters["B"])
        letters["M"] = min(letters["M"], letters["C"])
    if name == "begin_step":
        arguments["attention_scalings"] = [1.0] * letters["R"]
    results = getattr(kernels, name)(**arguments)
    fakes = empty_results(name, **arguments)
    results, fakes = (x if isinstance(x, tuple) else (x,) for x in (results, fakes))
    for form, x, y in zip(contract.results.values(), results, fakes, strict=True):
        known = {k: n for k, n in letters.items() if k != "S"}  # which the result itself tells
        assert fits(form, tuple(x.shape), known), (form, x.shape, letters)
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        kind = split(form)[1]
        given = {"float": torch.float32, "as positions": torch.int64, "as dtype": torch.float32}
        assert x.dtype == given.get(kind, getattr(torch, kind, None))


GRID = Grid(batches=(1, 3), contexts=(7, 40), tokens=(23,), large_bytes=4096, chunk=9)


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_costs_are_those_of_the_benchmarks(model_type):
    """Which a test of theirs counts in another way."""
    config = ModelConfig.from_dict(random_config(model_type, sliding_window=11).to_dict())
    shapes = Shapes("small", config, torch.device("cpu"), torch.bfloat16)
    seen = set()
    for case in model_cases(shapes, GRID):
        contract, arguments = CONTRACTS[case.op], case.make()
        letters = letters_of(contract.forms, arguments) | {"e": 2, "n": 0}
        weight = arguments.get("weight", arguments.get("gate_up_weight"))
        if weight is not None and "w" in contract.moved:
            letters["w"] = weight.nbytes
        letters = {"S": 1, "M": letters.get("N")} | letters
        letters["n"] = arguments.get("q_norm_weight") is not None
        if case.op == "add_rmsnorm_":
            letters["n"] = 1 + (arguments["post_weight"] is not None)
        if case.op == "begin_step":
            letters["R"] = len(arguments["inv_freqs"])
        if "attention" in case.op:
            letters |= keys_seen(case.op, arguments)
        if case.op == "sample" and case.facts["variant"] != "greedy":
            continue
        assert value(contract.moved, letters) == case.cost.nbytes, case.name
        assert value(contract.computed, letters) == case.cost.flops, case.name
        seen.add(case.op)
    assert seen == set(kernels.__all__) - {"advance_"}  # which has no case


def keys_seen(op, arguments):
    """S and A of attention over one sequence, or over rows of one length."""
    positions = arguments["positions"] if op == "attention_decode" else arguments["starts"]
    start, T = int(positions[0]), 1 if op == "attention_decode" else len(arguments["q"])
    window = arguments["sliding_window"] or start + T
    seen = [range(max(0, p - window + 1), p + 1) for p in range(start, start + T)]
    return {"S": seen[-1].stop - seen[0].start, "A": sum(map(len, seen))}
