"""The op table and `torch.ops.gemcut`: same names and signatures, traced whole by torch.compile."""

import inspect
import subprocess
import sys

import pytest
import torch
from accuracy import random
from op_cases import positional, quantized_calls, small_calls
from torch import Tensor

from gemcut import kernels
from gemcut.kernels import reference

CALLS = small_calls()
QUANTIZED = {
    f"{name}, {kind}": arguments
    for kind in ("int8 by row", "fp8 by row", "int4 in 32s with zero points")
    for name, arguments in quantized_calls(kind).items()
}


def parameters(function) -> list[tuple]:
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.default, p.annotation) for p in found]


def test_every_op_has_an_oracle_and_a_small_call():
    helpers = {"best_of_ranges", "filter_logits", "gumbel_noise"}
    assert set(kernels.__all__) == set(reference.__all__) - helpers == set(CALLS)


@pytest.mark.parametrize("name", kernels.__all__)
def test_a_kernel_has_its_oracles_signature(name):
    kernel, oracle = getattr(kernels, name), getattr(reference, name)
    assert parameters(kernel) == parameters(oracle)
    returned = [inspect.signature(f).return_annotation for f in (kernel, oracle)]
    assert returned[0] == returned[1]


def cloned(arguments: tuple) -> tuple:
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in arguments)


@pytest.mark.parametrize("name", kernels.__all__)
def test_a_registered_op_is_the_launcher(name):
    arguments = positional(name, CALLS[name])
    expected = getattr(kernels, name)(*cloned(arguments))
    torch.testing.assert_close(
        getattr(torch.ops.gemcut, name)(*cloned(arguments)), expected, rtol=0, atol=0
    )


@pytest.mark.parametrize("name", kernels.__all__)
def test_opcheck(name):
    """Schema, mutation, aliasing, fake implementation and tracing, as torch itself checks them."""
    op = getattr(torch.ops.gemcut, name).default
    results = torch.library.opcheck(op, cloned(positional(name, CALLS[name])))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("case", QUANTIZED)
def test_a_registered_op_takes_a_quantised_weight_in_its_parts(case):
    name, arguments = case.partition(",")[0], QUANTIZED[case]
    clones = {k: x.clone() if isinstance(x, Tensor) else x for k, x in arguments.items()}
    expected = getattr(kernels, name)(**clones)
    op, flat = getattr(torch.ops.gemcut, name), positional(name, arguments)
    torch.testing.assert_close(op(*cloned(flat)), expected, rtol=0, atol=0)
    of_torch = ("test_faketensor", "test_aot_dispatch_dynamic")
    if "fp8" not in case:  # of which opcheck itself takes the norm, which torch has not
        of_torch += ("test_schema", "test_autograd_registration")
    results = torch.library.opcheck(op.default, cloned(flat), test_utils=of_torch)
    assert set(results.values()) == {"SUCCESS"}


class Layer(torch.nn.Module):
    """A decode layer, as a serving stack of somebody else would write it."""

    def forward(self, calls: dict[str, dict]) -> Tensor:
        ops = torch.ops.gemcut
        q = ops.linear_rope_and_store_(**calls["linear_rope_and_store_"])
        attended = ops.attention_decode(**calls["attention_decode"] | {"q": q.unsqueeze(1)})
        y = ops.skinny_linear(attended.flatten(1)[:, :24].contiguous(), calls["w"])
        residual = calls["add_rmsnorm_"]["residual"].clone()
        h = ops.add_rmsnorm_(**calls["add_rmsnorm_"] | {"residual": residual, "x": y})
        hidden = ops.linear_geglu(**calls["linear_geglu"] | {"x": h})
        return ops.lm_head(ops.rmsnorm(h, calls["norm"], 1e-6), calls["head"], 30.0), hidden


def test_a_module_is_compiled_whole():
    """Fullgraph: one break would raise.  The second call runs what the first has compiled."""
    calls = small_calls() | {"w": random(24, 24), "norm": random(24), "head": random(40, 24)}
    expected = Layer()(calls)
    compiled = torch.compile(Layer(), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(calls), expected, rtol=0, atol=0)


def test_without_the_interpreter_a_cpu_runs_its_own_table():
    code = (
        "import torch; from gemcut import kernels; from gemcut.kernels import cpu\n"
        "x, w = torch.randn(3, 8), torch.randn(8)\n"
        "assert torch.equal(torch.ops.gemcut.rmsnorm(x, w, 1e-6), cpu.rmsnorm(x, w, 1e-6))\n"
        "try: kernels.rmsnorm(x, w, 1e-6)\n"
        "except ValueError as error: print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={"TRITON_INTERPRET": "0", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert "a kernel needs tensors on cuda, not cpu" in run.stdout, run.stderr
    assert len(run.stdout.splitlines()) == 1
