"""The fit of machine.py's constants to measured times: profiles, and single products.

Constants that a profile (tools/profile_step.py) holds as such are taken from it: the gap between
launches, the time of each launch without a product, that of torch's own.  Five factors are then
found by golden section, one after the other and all at once, again and again: of the bandwidth, of
a processor's, of the clock, of latencies, of what a launch costs at its ends.  What is minimised is

    sum over kernels of  weight * log(predicted / measured) ** 2

where a kernel of a profile weighs its share of the measured time, and all products of a list
(product_times.py) weigh the same; with a small weight on log(factor) ** 2, so that a factor
without data stays 1.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from gemcut.tools.launches import Made
from gemcut.tools.machine import H200, Machine
from gemcut.tools.prediction.launch_time import main_loop
from gemcut.tools.prediction.predicted_step import PredictedStep

FACTORS = {
    "bandwidth": ("bandwidth",),
    "processor": ("processor_bandwidth",),
    "clock": ("ghz",),
    "latency": ("fill_us", "memory_us", "lookup_us"),
    "ends": ("start_us", "end_us"),
}
RANGES = {
    "bandwidth": (0.6, 1.12),
    "processor": (0.4, 2.0),
    "clock": (0.5, 1.2),
    "latency": (0.4, 3.0),
    "ends": (0.2, 6.0),
}
HOLD = 1e-5  # weight of log(factor) ** 2
ROUNDS = 20
STRIDE = 20.0  # at most so many rounds at once
PRODUCTS = "products"  # in place of a model's name
SECTIONS = 16  # of a search: to 1e-3 of the range


@dataclass(frozen=True)
class Profile:
    """A measured step, or a list of products: by kernel the launches and the microseconds."""

    model: str
    batch: int
    context: int
    kernels: dict[str, tuple[float, float]]  # launches, us of all
    gaps_us: float  # before all of them; 0 where they were not measured

    def weight(self, kernel: str) -> float:
        """The kernel's weight in a fit; the weights of all are 1 together."""
        if self.model == PRODUCTS:
            return 1 / len(self.kernels)
        return self.kernels[kernel][1] / sum(us for _, us in self.kernels.values())


def read_profile(file: Path) -> Profile:
    """The breakdown.json of tools/profile_step.py; ValueError where it is none."""
    try:
        report = json.loads(file.read_text())
        lines = report["lines"]
        profile = Profile(
            str(report["model"]),
            int(report["batch"]),
            int(report["context"]),
            {line["kernel"]: (float(line["launches"]), float(line["us"])) for line in lines},
            sum(float(line["gap_us"]) for line in lines),
        )
        # where launches overlap, one may take no time of its own, and is left out
        timed = {name: of for name, of in profile.kernels.items() if of[1] > 0}
        if not timed:
            raise ValueError("it is empty")
        if not all(launches > 0 for launches, _ in timed.values()):
            raise ValueError("launches must be above 0")
        return replace(profile, kernels=timed)
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{file} is no breakdown of profile_step: {reason}") from None


Pair = tuple[Profile, PredictedStep]


@dataclass(frozen=True)
class Residual:
    """A kernel of a profile: microseconds each as measured, and as predicted before and after."""

    model: str
    kernel: str
    launches: float
    measured_us: float
    before_us: float
    after_us: float


def fit(pairs: Sequence[Pair], machine: Machine = H200) -> tuple[Machine, list[Residual]]:
    """The machine that fits these profiles best, and what is left.

    ValueError where a profile shares no product with the step that is predicted for it.
    """
    for profile, step in pairs:
        if not any(main_loop(step.cell(made)) for _, made in _matched(profile, step)):
            raise ValueError(f"no kernel of the profile of {profile.model} is one of its step's")
    fitted = _taken(pairs, machine)

    def cost(factors: dict[str, float]) -> float:
        tried = scaled(fitted, factors)
        found = HOLD * sum(math.log(factor) ** 2 for factor in factors.values())
        for profile, step in pairs:
            for name, us in _each(profile, step, tried).items():
                launches, measured = profile.kernels[name]
                found += profile.weight(name) * math.log(us * launches / measured) ** 2
        return found

    logs = dict.fromkeys(FACTORS, 0.0)

    def along(direction: dict[str, float], most: float, lowest: float = 0.0) -> None:
        """Move to the least cost on a line from here, within the ranges."""

        def at(x: float) -> dict[str, float]:
            return {
                name: min(
                    max(log + x * direction[name], math.log(RANGES[name][0])),
                    math.log(RANGES[name][1]),
                )
                for name, log in logs.items()
            }

        def of(x: float) -> float:
            return cost({name: math.exp(log) for name, log in at(x).items()})

        x = least(of, lowest, most)
        if of(x) < of(0.0):
            logs.update(at(x))

    for _ in range(ROUNDS):
        before = dict(logs)
        for name, (low, high) in RANGES.items():
            axis = {other: float(other == name) for other in FACTORS}
            along(axis, math.log(high) - logs[name], math.log(low) - logs[name])
        # factors that trade against each other form a slanted valley: go on as this round went
        along({name: logs[name] - before[name] for name in FACTORS}, most=STRIDE)
    best = scaled(fitted, {name: math.exp(log) for name, log in logs.items()})
    return best, [*_residuals(pairs, machine, best)]


def scaled(machine: Machine, factors: dict[str, float]) -> Machine:
    """The machine with groups of constants multiplied."""
    return replace(
        machine,
        **{
            field: getattr(machine, field) * factor
            for name, factor in factors.items()
            for field in FACTORS[name]
        },
    )


def least(cost: Callable[[float], float], low: float, high: float) -> float:
    """The place where a function of one valley is least, by golden section."""
    golden = (math.sqrt(5) - 1) / 2
    a, b = high - golden * (high - low), low + golden * (high - low)
    at_a, at_b = cost(a), cost(b)
    for _ in range(SECTIONS):
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - golden * (high - low)
            at_a = cost(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + golden * (high - low)
            at_b = cost(b)
    return (low + high) / 2


def _taken(pairs: Sequence[Pair], machine: Machine) -> Machine:
    """The machine with the constants that profiles hold as such."""
    small, torch_own, gaps = dict(machine.small_us), [], []
    for profile, step in pairs:
        if profile.model == PRODUCTS:
            continue
        hidden = sum(count for count, made in step.made() if made.is_dependent)
        us = profile.gaps_us + hidden * machine.hidden_us
        gaps.append((sum(n for n, _ in profile.kernels.values()), us))
        by_name = {made.name: made for _, made in step.made()}
        for name, (count, us) in profile.kernels.items():
            made = by_name.get(name)
            if made is None:
                torch_own.append((count, us))
            elif main_loop(step.cell(made)) is None:
                reading = step.us(made, machine) - machine.small_us.get(name, machine.other_us)
                small[name] = max(0.0, us / count - reading)
    return replace(
        machine,
        launch_gap_us=_mean(gaps, machine.launch_gap_us),
        small_us=MappingProxyType(small),
        torch_us=_mean(torch_own, machine.torch_us),
    )


def _mean(found: Sequence[tuple[float, float]], otherwise: float) -> float:
    launches = sum(count for count, _ in found)
    return sum(us for _, us in found) / launches if launches else otherwise


def _matched(profile: Profile, step: PredictedStep) -> Iterator[tuple[int, Made]]:
    return ((n, made) for n, made in step.made() if made.name in profile.kernels)


def _each(profile: Profile, step: PredictedStep, machine: Machine) -> dict[str, float]:
    """Predicted microseconds of a launch by kernel, the mean of its shapes."""
    us: dict[str, float] = defaultdict(float)
    launches: dict[str, int] = defaultdict(int)
    for count, made in _matched(profile, step):
        us[made.name] += count * step.us(made, machine)
        launches[made.name] += count
    return {name: us[name] / launches[name] for name in us}


def _residuals(pairs: Sequence[Pair], before: Machine, after: Machine) -> Iterator[Residual]:
    for profile, step in pairs:
        old, new = _each(profile, step, before), _each(profile, step, after)
        for name in sorted(old, key=lambda name: -profile.kernels[name][1]):
            launches, us = profile.kernels[name]
            yield Residual(profile.model, name, launches, us / launches, old[name], new[name])
