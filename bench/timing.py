"""The only timer: a clock, contestants that take turns, and what their times amount to.

A timed call returns values on the host, so that no work of a device is left when the clock stops.
Contestants take turns because a machine's speed drifts: what disturbs one round disturbs all of it,
and leaves the ratios within the round alone.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

clock = time.perf_counter  # seconds; also the clock of the engine's own metrics


def take_turns(calls: Mapping[str, Callable[[], T]], repeats: int) -> Iterator[dict[str, T]]:
    """Rounds, as they finish: in each, every call is made once, in the same order."""
    for _ in range(repeats):
        yield {name: call() for name, call in calls.items()}


@dataclass(frozen=True)
class Spread:
    """The median of repeated measurements, and the least and the greatest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))
