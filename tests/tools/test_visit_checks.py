"""The visit's checks see what they are for: rows, replays, scales and waits that are wrong."""

import os

import pytest
import torch

from gemcut.kernels import launch_switch
from gemcut.tools.visit import attention, bits, ops, quantized, waits


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
