"""The timer, on a CPU: calls counted, input sets rotated, contestants in turn; and the ceilings."""

import time
from functools import partial
from itertools import pairwise

import pytest
import torch

from gemcut.bench.measure import timing
from gemcut.bench.measure.ceilings import Cost, floor_us, measure_ceilings
from gemcut.bench.measure.timing import Spread, input_sets, prepare_runs, take_turns, time_runs

CPU = torch.device("cpu")


def test_contestants_take_turns():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    assert len(list(take_turns(calls, 2))) == 2
    assert order == ["a", "b", "a", "b"]
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(median=2.0, low=1.0, high=3.0)


def test_a_cold_run_rotates_over_all_sets_and_a_warm_one_stays():
    order = []
    runs = prepare_runs([partial(order.append, i) for i in range(5)], CPU)
    order.clear()
    runs.cold()
    assert len(order) == runs.calls
    assert set(order) == set(range(5))
    assert all((a + 1) % 5 == b for a, b in pairwise(order))
    order.clear()
    runs.warm()
    assert order == [0] * runs.calls


def test_time_of_a_call():
    calls = {"short": [partial(time.sleep, 0.002)], "long": [partial(time.sleep, 0.006)]}
    timings = time_runs({name: prepare_runs(each, CPU) for name, each in calls.items()}, 3)
    for name, least in (("short", 2000), ("long", 6000)):
        assert timings[name].method == "loop"
        assert len(timings[name].cold_us) == len(timings[name].warm_us) == 3
        assert min(timings[name].cold_us + timings[name].warm_us) >= least


def test_a_long_call_is_made_once_a_run():
    assert prepare_runs([partial(time.sleep, 0.025)] * 4, CPU).calls == 1


def test_input_sets_exceed_the_cache(monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1000)
    assert input_sets(4000, CPU) == 1
    assert input_sets(3999, CPU) == 2
    assert input_sets(100, CPU) == 40
    assert input_sets(0, CPU) == timing.MAX_SETS


def test_cache_of_a_machine_that_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "CPU_CACHE", tmp_path / "size")
    assert timing.cache_bytes(CPU) == timing.CPU_CACHE_BYTES
    (tmp_path / "size").write_text("49152K\n")
    assert timing.cache_bytes(CPU) == 48 << 20


CEILINGS = {"read_gbps": 4000.0, "copy_gbps": 4000.0, "matmul_tflops": 800.0}


@pytest.mark.parametrize(
    ("cost", "ceilings", "us", "bound"),
    [
        pytest.param(Cost(4_000_000, 0, 0), {}, 1.0, "memory", id="reads"),
        # at equal bandwidths a byte written costs what a byte read does
        pytest.param(Cost(2_000_000, 2_000_000, 0), {}, 1.0, "memory", id="copies"),
        # a copy at 3000 GB/s takes 4/3 us for these: its writes cost 5/6 of that
        pytest.param(
            Cost(2_000_000, 2_000_000, 0), {"copy_gbps": 3000.0}, 4 / 3, "memory", id="slow-writes"
        ),
        pytest.param(
            Cost(0, 4_000_000, 0), {"copy_gbps": 3000.0}, 5 / 3, "memory", id="writes-alone"
        ),
        pytest.param(Cost(1000, 0, 800_000_000, True), {}, 1.0, "compute", id="multiplies"),
        # elementwise operations are not what tensor cores bound
        pytest.param(Cost(4_000_000, 0, 800_000_000_000), {}, 1.0, "memory", id="elementwise"),
    ],
)
def test_floor(cost, ceilings, us, bound):
    assert floor_us(cost, CEILINGS | ceilings) == (pytest.approx(us), bound)


def test_ceilings_of_this_machine(monkeypatch):
    monkeypatch.setattr("gemcut.bench.measure.ceilings.CPU_BYTES", 1 << 20)
    monkeypatch.setattr("gemcut.bench.measure.ceilings.cache_bytes", lambda device: 1 << 18)
    monkeypatch.setattr("gemcut.bench.measure.ceilings.CPU_WIDTH", 64)
    ceilings = measure_ceilings(CPU, torch.float32)
    assert ceilings.keys() == CEILINGS.keys()
    # of one core since 2005, and of no CPU yet
    assert 0.5 < ceilings["read_gbps"] < 5000
    assert 0.5 < ceilings["copy_gbps"] < 5000
    assert 1e-4 < ceilings["matmul_tflops"] < 100
