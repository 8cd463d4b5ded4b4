"""Threads of a step on a CPU: all of torch's, or one while other programs use the cores."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch

from gemcut.engine import Engine, SamplingParams
from gemcut.engine.execution import cpu_steps
from gemcut.engine.execution.cpu_steps import (
    FIRST_PAUSE,
    LEAST_SWITCHES,
    LONGEST_PAUSE,
    FreeThreads,
)


class Machine:
    """A clock and a count of lost cores that a test turns by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.switches, self.late = 10.0, 0, 0.0
        monkeypatch.setattr(cpu_steps.time, "perf_counter", self._clock)
        monkeypatch.setattr(cpu_steps, "_switches", lambda: self.switches)

    def _clock(self) -> float:
        self.now += self.late
        return self.now

    def step(self, free: FreeThreads, *, lost: int = 0, seconds: float = 0.01) -> int:
        """A step, in which so many cores are lost -> the threads that it had."""
        with free:
            used = torch.get_num_threads()
            self.switches += lost
            self.now += seconds
        assert torch.get_num_threads() == 2
        return used


@pytest.fixture
def machine(two_threads, monkeypatch) -> Machine:
    return Machine(monkeypatch)


def test_a_quiet_machine_gives_all_threads(machine):
    free = FreeThreads()
    assert [machine.step(free, lost=LEAST_SWITCHES - 1) for _ in range(5)] == [2] * 5
    assert machine.step(free, lost=90, seconds=1.0) == 2, "so many in a long step are usual"
    assert machine.step(free) == 2


def test_a_step_that_loses_its_cores_is_followed_by_steps_on_one_thread(machine):
    free = FreeThreads()
    assert machine.step(free, lost=50) == 2
    assert [machine.step(free) for _ in range(3)] == [1] * 3
    machine.now += FIRST_PAUSE
    assert machine.step(free) == 2, "tried again, and nothing was late"
    assert machine.step(free) == 2


def test_cores_that_stay_busy_are_tried_ever_more_rarely(machine):
    free = FreeThreads()
    machine.step(free, lost=50)
    pauses, machine.late = [], 0.004
    for _ in range(6):
        machine.now += LONGEST_PAUSE
        assert machine.step(free) == 1
        pauses.append(free._pause / FIRST_PAUSE)
    assert pauses == [2, 4, 8, 16, LONGEST_PAUSE / FIRST_PAUSE, LONGEST_PAUSE / FIRST_PAUSE]
    machine.late = 0.0
    machine.now += LONGEST_PAUSE
    assert machine.step(free) == 2
    machine.step(free, lost=50)
    machine.now += FIRST_PAUSE
    assert machine.step(free) == 2, "the next time it begins with a short pause"


def test_an_error_gives_the_threads_back(machine):
    free = FreeThreads()
    machine.step(free, lost=50)
    with suppress(ValueError), free:
        assert torch.get_num_threads() == 1
        raise ValueError
    assert torch.get_num_threads() == 2


def test_one_thread_is_left_alone(machine):
    torch.set_num_threads(1)
    free, machine.late = FreeThreads(), 0.004
    with free:
        machine.switches += 100
    with free:
        assert torch.get_num_threads() == 1
    torch.set_num_threads(2)
    assert machine.step(free) == 2, "what happened on one thread says nothing of two"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_and_logprobs_are_the_same_whatever_the_threads_are(two_threads, monkeypatch, dtype):
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=24, logprobs=2)

    def generated() -> list:
        with Engine.from_pretrained("demo", dtype=dtype, max_batch_size=2) as engine:
            outputs = engine.generate(["Once", "It was a bright cold morning"], params)
        return [(output.token_ids, output.outputs[0].logprobs) for output in outputs]

    counts = iter([1, 2, 2, 1] * 100)
    plain = generated()
    monkeypatch.setattr(FreeThreads, "__enter__", lambda self: torch.set_num_threads(next(counts)))
    monkeypatch.setattr(FreeThreads, "__exit__", lambda self, *_: torch.set_num_threads(2))
    assert generated() == plain


@pytest.mark.parametrize("params", [{"temperature": 0}, {"seed": 1}, {"logprobs": 1}], ids=str)
def test_every_step_of_an_engine_asks_for_threads(two_threads, monkeypatch, params):
    """Where they are not free, nothing of a step is computed on two, the first token included."""
    seen = []
    monkeypatch.setattr(FreeThreads, "_are_free", lambda self: False)
    with Engine.from_pretrained("demo", device="cpu", max_batch_size=1) as engine:
        ops = engine.model.ops
        for name in ("rmsnorm", "lm_head", "lm_head_argmax", "sample", "advance_"):
            monkeypatch.setattr(ops, name, noting(seen, getattr(ops, name)))
        engine.generate("It was", SamplingParams(max_tokens=3, ignore_eos=True, **params))
    assert {name for name, _ in seen} >= {"rmsnorm", "advance_"}
    assert {name for name, threads in seen if threads != 1} == set()


def noting(seen: list, op: Callable[..., Any]) -> Callable[..., Any]:
    """An op that notes its name and the threads that it has."""

    def noted(*args, **options):
        seen.append((op.__name__, torch.get_num_threads()))
        return op(*args, **options)

    return noted
