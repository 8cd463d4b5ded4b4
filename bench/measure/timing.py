"""The suite's only timer: interleaved rounds, cold and warm caches, CUDA graphs between events.

Contestants take turns: what disturbs a round disturbs all of them, and not the ratios within it.

    take_turns      whole runs of an engine, which return values on the host
    time_runs       single ops: microseconds a call, cold and warm
    time_replays    one graph, replayed many times in a row

An op is timed in runs of many calls.  Cold, the calls rotate over input sets that together exceed
the last-level cache, as the layers of a model do; warm, all take the first set.  On a GPU a run is
one CUDA graph between two events, so that the host is not in it.  The gaps between kernels are:
each node of a graph costs about a microsecond on the device, which tools/visit/machine.py measures.
Calls that cannot be captured are timed as a stream of launches, as `method` says.  On a CPU a run
is a loop under a wall clock.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")
Call = Callable[[], object]
Run = Callable[[], float]  # seconds that it took

clock = time.perf_counter  # seconds; also the clock of the engine's own metrics

RUN_SECONDS = 2e-3  # of one run: clocks and events resolve far less
MAX_CALLS = 1000  # of one run, the nodes of its graph
MAX_SETS = 256  # of inputs: tiny ones never exceed a cache
CACHES = 4  # input sets together are so many times the cache
CPU_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
CPU_CACHE_BYTES = 32 << 20  # where the system does not say


@dataclass(frozen=True)
class Spread:
    """The median of repeated measurements, and the least and the greatest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Timing:
    """Microseconds a call of one contestant, round by round."""

    cold_us: list[float]
    warm_us: list[float]
    method: str  # "graph" | "stream" | "loop"
    calls: int  # in a run


def take_turns(calls: Mapping[str, Callable[[], T]], repeats: int) -> Iterator[dict[str, T]]:
    """Yield rounds as they finish: in each, every call is made once, in the same order."""
    for _ in range(repeats):
        yield {name: call() for name, call in calls.items()}


@dataclass(frozen=True)
class Runs:
    """A contestant's runs, which may be repeated; each returns its seconds."""

    cold: Run
    warm: Run
    method: str  # "graph" | "stream" | "loop"
    calls: int  # in a run


def prepare_runs(calls: Sequence[Call], device: torch.device) -> Runs:
    """Runs of one contestant, given as one call for each input set."""
    count = _calls_of_a_run(calls, device)
    cold, method = _prepare([calls[i % len(calls)] for i in range(count)], device)

    @cache  # captured when it is first asked for: tuning never does, and a capture takes a second
    def warm() -> Run:
        return _prepare([calls[0]] * count, device)[0]

    return Runs(cold, lambda: warm()(), method, count)


def time_runs(contestants: Mapping[str, Runs], rounds: int) -> dict[str, Timing]:
    """Time each contestant in interleaved rounds."""
    turns = {
        name: lambda runs=runs: (runs.cold(), runs.warm()) for name, runs in contestants.items()
    }
    measured = list(take_turns(turns, rounds))
    timings = {}
    for name, runs in contestants.items():
        cold, warm = ([1e6 * round_[name][i] / runs.calls for round_ in measured] for i in range(2))
        timings[name] = Timing(cold, warm, runs.method, runs.calls)
    return timings


def time_replays(
    replay: Call, count: int, rounds: int, device: torch.device, reset: Call = lambda: None
) -> list[float]:
    """Microseconds of one of `count` consecutive replays, round by round; a reset begins a round.

    Consecutive, since the device waits for the host before the first replay and no later one.
    """
    found = []
    for _ in range(rounds):
        reset()
        synchronize(device)
        run = [replay] * count
        seconds = (
            _between_events(lambda run=run: _make(run)) if device.type == "cuda" else _loop(run)
        )
        found.append(1e6 * seconds / count)
    return found


def input_sets(nbytes: int, device: torch.device) -> int:
    """How many input sets of `nbytes` to rotate over, for cold caches."""
    return min(MAX_SETS, max(1, math.ceil(CACHES * cache_bytes(device) / max(1, nbytes))))


def cache_bytes(device: torch.device) -> int:
    """Bytes of the last-level cache: L2 of a GPU, L3 of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        return int(CPU_CACHE.read_text().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return CPU_CACHE_BYTES


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _calls_of_a_run(calls: Sequence[Call], device: torch.device) -> int:
    """Calls that make a run long enough: at least one of each set, unless that takes too long."""
    for call in calls[:3]:  # compiles
        call()
    synchronize(device)
    started = clock()
    for call in calls[:3]:
        call()
    synchronize(device)
    seconds = (clock() - started) / len(calls[:3])
    wanted = math.ceil(RUN_SECONDS / seconds)
    every_set = min(len(calls), math.ceil(10 * RUN_SECONDS / seconds))
    return min(MAX_CALLS, max(wanted, every_set))


def _prepare(calls: Sequence[Call], device: torch.device) -> tuple[Run, str]:
    """A run of these calls, and its method."""
    if device.type != "cuda":
        return lambda: _loop(calls), "loop"
    try:
        graph = capture(calls)
    except Exception:  # a peer does what a capture forbids, mostly a copy to the host
        torch.cuda.synchronize(device)
        return lambda: _between_events(lambda: _make(calls)), "stream"
    return lambda: _between_events(graph.replay), "graph"


def _make(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _loop(calls: Sequence[Call]) -> float:
    started = clock()
    _make(calls)
    return clock() - started


def capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of these calls; the first three are made once before the capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries allocate their workspaces before a capture
        _make(calls[:3])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _make(calls)
    return graph


def _between_events(work: Callable[[], object]) -> float:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3
