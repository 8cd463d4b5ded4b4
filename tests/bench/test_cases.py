"""The cost of each case, counted another way: on its tensors, and by running its oracle."""

import inspect
from dataclasses import replace
from math import prod

import pytest
import torch
from random_models import MODEL_TYPES, random_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gemcut.bench.ops.cases import CPU_GRID, GPU_GRID, Grid, Shapes
from gemcut.bench.ops.decode_cases import decode_cases
from gemcut.bench.ops.kernels import model_cases
from gemcut.bench.ops.prefill_cases import visible_pairs
from gemcut.engine.config.model_config import PUBLISHED, ModelConfig
from gemcut.engine.info import find_config
from gemcut.kernels import reference

GRID = Grid(batches=(1, 3), contexts=(7, 40), tokens=(23,), large_bytes=4096, chunk=9)
MOVES = {"view", "transpose", "permute", "expand", "slice", "select", "split", "clone", "copy_"}
MOVES |= {"_to_copy", "cat", "stack", "unsqueeze", "squeeze", "t", "roll", "index_put_", "alias"}
MOVES |= {"embedding", "arange", "full", "empty_like", "_unsafe_view", "detach", "lift_fresh"}
MOVES |= {
    "split_with_sizes",
    "unbind",
    "index",
    "gather",
    "index_select",
    "as_strided",
    "full_like",
    "slice_copy",
}
MOVES |= {
    "_local_scalar_dense",
    "reshape",
    "empty",
    "scalar_tensor",
    "zeros_like",
    "_reshape_alias",
}
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # the place of the first factor
REDUCTIONS = {"argmax", "amax", "max", "mean", "sum", "sort"}


class Operations(TorchDispatchMode):
    """Counts what an oracle computes: operations of products, and elementwise ones."""

    def __init__(self):
        super().__init__()
        self.of_products = self.elementwise = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        first = out if isinstance(out, Tensor) else out[0] if isinstance(out, tuple) else None
        if name in PRODUCTS:
            self.of_products += 2 * out.numel() * args[PRODUCTS[name]].shape[-1]
        elif name not in MOVES and first is not None and first.dim():
            counted = args[0] if name in REDUCTIONS else first
            self.elementwise += counted.numel()
            # a kernel adds 1 to a norm's weight [D] for each row
            if name == "mul" and isinstance(args[1], Tensor) and args[1].dim() == 1 < first.dim():
                self.elementwise += first.numel() - args[1].numel()
        return out


def configs():
    for model_type in MODEL_TYPES:
        overrides = {"vocab_size": 1024} | ({"sliding_window": 11} if model_type != "gemma" else {})
        values = random_config(model_type, **overrides).to_dict()
        yield pytest.param(ModelConfig.from_dict(values), id=model_type)


@pytest.fixture(params=configs())
def cases(request):
    torch.manual_seed(0)
    shapes = Shapes("small", request.param, torch.device("cpu"), torch.float32)
    return model_cases(shapes, GRID)


def outputs(case, arguments):
    """Everything that a call writes: what it returns, except a view of its arguments."""
    returned = getattr(reference, case.op)(**arguments)
    returned = returned if isinstance(returned, tuple) else (returned,)
    given = {v.data_ptr() for v in arguments.values() if isinstance(v, Tensor)}
    return [out for out in returned if out.data_ptr() not in given]


def visibility(case, arguments):
    """Which places of its cache each query depends on, found by changing them: [M, slots, C]."""
    slots, _, capacity, _ = arguments["k_cache"].shape
    before = getattr(reference, case.op)(**arguments)
    seen = []
    # a hidden key's NaN never leaves the mask; a hidden value's would: 0 * NaN
    for name, change in {"k_cache": torch.nan, "v_cache": 1.0}.items():
        found = torch.zeros(arguments["q"].shape[0], slots, capacity, dtype=torch.bool)
        for slot in range(slots):
            for place in range(capacity):
                changed = arguments[name].clone()
                changed[slot, :, place] += change
                out = getattr(reference, case.op)(**{**arguments, name: changed})
                found[:, slot, place] = (out != before).flatten(1).any(1)
        seen.append(found)
    assert torch.equal(*seen)
    return seen[0]


def written_places(case, arguments):
    """Bytes of the caches that a call writes, found as those that change."""
    changed = 0
    for name in ("k_cache", "v_cache"):
        fresh = arguments[name].fill_(torch.nan)
        getattr(reference, case.op)(**arguments)
        changed += fresh.isnan().logical_not().sum().item() * fresh.itemsize
    return changed


def counted_bytes(case, arguments):
    tensors = {k: v for k, v in arguments.items() if isinstance(v, Tensor)}
    written = sum(out.nbytes for out in outputs(case, arguments))
    if "attention" in case.op:
        keys = visibility(case, arguments).any(0).sum().item()
        bytes_of_a_key = prod(arguments["k_cache"].shape[1::2]) * arguments["k_cache"].itemsize
        read = sum(v.nbytes for k, v in tensors.items() if "cache" not in k)
        return read + 2 * keys * bytes_of_a_key, written
    if "k_cache" in tensors:
        written += written_places(case, arguments)
        return sum(v.nbytes for k, v in tensors.items() if "cache" not in k), written
    read = sum(v.nbytes for v in tensors.values())
    if case.op in ("embed", "begin_step"):
        table = tensors["table"]
        read += len(tensors["token_ids"]) * table[0].nbytes - table.nbytes
    if case.op == "add_rmsnorm_":
        written += tensors["residual"].nbytes
    return read, written


def test_bytes_of_each_case(cases):
    for case in cases:
        arguments = case.make()
        counted = counted_bytes(case, arguments)
        assert (case.cost.read_bytes, case.cost.written_bytes) == counted, case.name


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_a_quantised_weight_is_read_with_its_scales(quantization):
    """Peers are given the plain one; what gemcut's op takes is quantised once."""
    where = torch.device("cpu"), torch.float32
    cases = model_cases(Shapes("demo", find_config("demo"), *where, quantization), GRID)
    assert len(cases) == 5 * len(GRID.batches)
    for case in cases:
        assert case.facts["quantization"] == quantization
        plain = case.make()
        own = case.own(plain)
        name = "gate_up_weight" if case.op == "linear_geglu" else "weight"
        assert case.own(own) is own
        read, written = counted_bytes(case, own)  # the weight is no tensor
        assert case.cost.read_bytes == read + own[name].nbytes, case.name
        assert case.cost.written_bytes == written
        is_head = case.op == "lm_head_argmax"
        wanted = "int8" if is_head else quantization
        assert own[name].format == wanted
        assert own[name].nbytes < plain[name].nbytes / (3.9 if wanted != "int4" else 6)


def counted_operations(case, arguments):
    if "attention" in case.op:  # two products with each key that a query sees
        _, HQ, K = arguments["q"].flatten(0, -3).shape
        return 4 * HQ * K * visibility(case, arguments).sum().item()
    with Operations() as counted:
        getattr(reference, case.op)(**arguments)
    return counted.of_products or counted.elementwise


def test_operations_of_each_case(cases):
    for case in cases:
        arguments = case.make()
        counted = counted_operations(case, arguments)
        rows = max(case.facts.get("batch", 0), case.facts.get("tokens", 0))
        heads = 0
        if case.op == "rope_and_store_":  # q-norm and k-norm have a row for each head
            heads = arguments["qkv"].shape[1] // arguments["cos"].shape[-1]
        # what an oracle computes once a row, the root of a mean say, is not counted in a cost
        assert 0 <= counted - case.cost.flops <= 32 * rows + 6 * rows * heads, case.name


def test_arguments_are_those_of_the_op(cases):
    for case in cases:
        inspect.signature(getattr(reference, case.op)).bind(**case.make())


@pytest.mark.parametrize("model", PUBLISHED)
def test_names_of_cases_are_distinct(model):
    shapes = Shapes(model, PUBLISHED[model], torch.device("cpu"), torch.bfloat16)
    for grid in (GPU_GRID, CPU_GRID):
        names = [case.name for case in model_cases(shapes, grid)]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("model", PUBLISHED)
def test_weights_of_a_decode_step_are_in_its_cases(model):
    """Six launches hold each weight of a layer once; all layers and the head are the model.

    Each add holds the next layer's first norm; that of the first layer is a launch of its own.
    """
    config = PUBLISHED[model]
    shapes = Shapes(model, config, torch.device("cpu"), torch.bfloat16)
    grid = replace(GRID, batches=(0,), contexts=(1,))  # no rows: weights are all that is left
    read = {case.name: case.cost.read_bytes for case in decode_cases(shapes, grid)}
    layer = sum(
        read[f"{name}/{model}/batch=0{rest}"]
        for name, rest in {
            "linear_rope_and_store_": "",
            "skinny_linear": "/o",
            "linear_geglu": "",
        }.items()
    )
    layer += read[f"skinny_linear/{model}/batch=0/down"] + 2 * read[f"add_rmsnorm_/{model}/batch=0"]
    head = read[f"lm_head/{model}/batch=0"] + 2 * config.hidden_size
    assert config.num_layers * layer + head == 2 * config.num_parameters()


def test_visible_pairs():
    for start in range(6):
        for T in range(1, 6):
            for window in range(1, 12):
                pairs = sum(k > q - window for q in range(start, start + T) for k in range(q + 1))
                assert visible_pairs(start, T, window) == pairs
