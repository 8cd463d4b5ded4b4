"""The kernel cases under pytest-benchmark, whose statistics are then times of the device.

    pytest bench/ --kernels "--models gemma-2-2b --op rmsnorm geglu" --benchmark-autosave
    pytest bench/ --benchmark-compare --benchmark-compare-fail=median:10%
    pytest bench/ --benchmark-histogram

A round is one run of many calls (timing.py).  pytest-benchmark's clock is the sum of the device's
own times, each divided by the calls of its run: so a median is seconds per call.
"""

from collections.abc import Mapping
from dataclasses import replace

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from gemcut.bench.measure.report_file import NO_MEMORY, OK
from gemcut.bench.measure.timing import Runs, Timing
from gemcut.bench.ops.cases import Case
from gemcut.bench.ops.kernels import GEMCUT, Bench, contestants, measure_case


class DeviceClock:
    """A clock that moves only when a run adds to it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


device_clock = DeviceClock()


@pytest.mark.benchmark(timer=device_clock)
def test_kernel(
    benchmark: BenchmarkFixture,
    case: Case,
    contestant: str,
    bench: Bench,
    measured_ceilings: dict[str, float],
) -> None:
    def time(runs: Mapping[str, Runs], rounds: int) -> dict[str, Timing]:
        return {name: _time(benchmark, one, rounds) for name, one in runs.items()}

    benchmark.group = case.name
    bench = replace(bench, ceilings=measured_ceilings)
    peer = contestants(case, bench)[contestant]
    (record,) = measure_case(case, bench, {contestant: peer}, time)

    if record["status"] == NO_MEMORY or (record["status"] != OK and contestant != GEMCUT):
        pytest.skip(f"{record['status']}: {record['detail']}")
    assert record["status"] == OK, record["detail"]
    for key, value in record.items():
        benchmark.extra_info[key] = value["median"] if isinstance(value, dict) else value


def _time(benchmark: BenchmarkFixture, runs: Runs, rounds: int) -> Timing:
    cold_us, warm_us = [], []

    def make_run() -> None:
        seconds = runs.cold() / runs.calls
        device_clock.seconds += seconds
        cold_us.append(1e6 * seconds)

    benchmark.pedantic(make_run, rounds=rounds)
    warm_us = [1e6 * runs.warm() / runs.calls for _ in range(rounds)]
    return Timing(cold_us, warm_us, runs.method, runs.calls)
