"""The visit's checks see what they are for: rows, replays, scales and waits that are wrong."""

import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from gemcut.kernels import launch_switch
from gemcut.tools.visit import attention, bits, capture, ops, quantized, waits


class Found(list):
    """A visit that notes its records."""

    on_gpu, device = False, torch.device("cpu")

    def check(self, case, passed, detail, **facts):
        self.append((case, passed, detail))

    def add(self, case, status="ok", **facts):
        self.append((case, status == "ok", ""))


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="the interpreter is off")
def test_a_row_that_depends_on_its_company_is_seen(monkeypatch):
    from gemcut import kernels

    found, plain = Found(), kernels.add_rmsnorm_
    shapes = ops.shapes_of("demo", found.device)
    cases = [c for c in ops.company_cases(found, shapes) if c.op == "add_rmsnorm_"]
    assert all(ops.same_bits(case, 0, 1) for case in cases)

    def leaning(residual, *args, **kwargs):
        y = plain(residual, *args, **kwargs)
        return y * (1 + y.shape[0] / 100)

    monkeypatch.setattr(kernels, "add_rmsnorm_", leaning)
    assert not any(ops.same_bits(case, 0, 1) for case in cases)


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="the interpreter is off")
def test_a_scale_of_the_cache_that_is_forgotten_is_seen(monkeypatch):
    from gemcut import kernels

    found = Found()
    wanted = ("attention_decode", "linear_rope_and_store_")
    cases = {c.op: c for c in quantized.cache_cases(found, found.device, 1) if c.op in wanted}
    for op, case in cases.items():
        plain = getattr(kernels, op)

        def unscaled(*args, plain=plain, v_scale, **kwargs):
            return plain(*args, v_scale=torch.ones_like(v_scale), **kwargs)

        ops.check(found, case, ops.Worst())
        monkeypatch.setattr(kernels, op, unscaled)
        ops.check(found, case, ops.Worst())
    assert [passed for _, passed, _ in found] == [True, False, True, False]


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="the interpreter is off")
def test_a_table_of_other_blocks_is_seen(monkeypatch):
    found, right = Found(), attention.in_blocks
    case = attention.decode_case(found, "demo", 24)
    attention.compare_paged(found, case)

    def turned(arguments):
        of_blocks = right(arguments)
        return of_blocks | {"block_tables": of_blocks["block_tables"].flip(1)}

    monkeypatch.setattr(attention, "in_blocks", turned)
    attention.compare_paged(found, case)
    assert [passed for _, passed, _ in found] == [True, False]


def test_a_replay_that_differs_is_seen():
    found, calls = Found(), iter(range(9))
    bits.compare_replays(found, "moving", lambda: torch.full((3,), float(next(calls))), 2)
    bits.compare_replays(found, "still", lambda: torch.full((3,), torch.nan), 2)
    assert found == [
        ("moving", False, "1 of 1 replays differ from the eager call"),
        ("still", True, "0 of 1 replays differ from the eager call"),
    ]


class Stale:
    """Two steps, whose second kernel reads what the first one wrote in the replay before."""

    def __init__(self, late):
        self.begins = [torch.zeros(2), torch.ones(2)]
        self.given, self.written, self.late = torch.zeros(2), torch.zeros(2), late

    def run(self, name):
        if not launch_switch.is_on() or not self.late:
            self.written.copy_(self.given)
        read = self.written.clone()
        self.written.copy_(self.given)
        return [read]


def test_a_kernel_that_does_not_wait_is_seen():
    found = Found()
    waits.compare(found, "right", Stale(late=False), "greedy")
    waits.compare(found, "stale", Stale(late=True), "greedy")
    assert found == [
        ("right, dependent", True, "0 of 2 replays differ from plain launches"),
        ("stale, dependent", False, "2 of 2 replays differ from plain launches"),
    ]


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="the interpreter is off")
def test_a_graph_whose_results_are_elsewhere_is_seen():
    """The replays of a graph that reads old inputs, or whose last op writes nothing."""
    found = Found()
    shapes = ops.shapes_of(capture.CPU_MODEL, found.device)
    with torch.inference_mode():
        layer = capture.Layer(shapes, 32)
        layer.allocate()
        assert set(layer.write()) == set(CALLED)
        capture.compare(found, layer, layer.write, 2)
        old = layer.normed.clone()

        def stale():
            new = layer.normed.clone()
            layer.normed.copy_(old)
            layer.write()
            layer.normed.copy_(new)

        capture.compare(found, layer, stale, 1)

        def elsewhere():
            held, layer.outs = layer.outs, {}
            layer.allocate()
            layer.write()
            layer.outs = held

        for out in layer.outs[8]:
            out.fill_(7)
        capture.compare(found, layer, elsewhere, 1)
    assert [passed for _, passed, _ in found] == [True, False, False]


CALLED = {
    "rope_tables": 0,
    "linear_rope_and_store_": 0,
    "attention_decode": 3,
    "skinny_linear": 0,
    "add_rmsnorm_": 0,
    "linear_geglu": 0,
    "lm_head_argmax": 0,
}


def test_an_allocation_too_many_in_a_capture_is_seen():
    found = Found()
    capture.check_allocations(found, CALLED)
    capture.check_allocations(found, CALLED | {"linear_geglu": 1, "attention_decode": 2})
    told = "2 by attention_decode, 1 by linear_geglu"
    assert [record[1:] for record in found] == [(True, ""), (False, told)]


def test_the_launches_of_the_layer_are_noted():
    """So that the block before compiles them; outside the interpreter, where launches are made."""
    code = (
        "from gemcut.tools.visit import capture\n"
        "print(*sorted({launch.kernel for launch in capture.record('sm_90')}))\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True
    )
    assert run.stdout.split() == NOTED, run.stderr


NOTED = [
    "add_rmsnorm_kernel",
    "attention_combine_kernel",
    "attention_decode_kernel",
    "linear_geglu_kernel",
    "linear_rope_and_store_kernel",
    "lm_head_argmax_kernel",
    "rope_tables_kernel",
    "skinny_linear_kernel",
]


def test_a_capture_counts_the_allocations_of_each_op(monkeypatch):
    """With a graph that only looks like one, and an op that allocates twice."""
    found, made = Found(), []

    class Layer:
        def write(self, count=int):
            before = count()
            made.extend("ab")
            return {"geglu": count() - before}

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay="replayed"))
    monkeypatch.setattr(torch.cuda, "graph", nullcontext)
    statistics = "allocation.all.allocated"
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {statistics: len(made)})
    assert capture.captured(found, Layer()) == "replayed"
    assert found == [("allocations of a capture", False, "2 by geglu")]
