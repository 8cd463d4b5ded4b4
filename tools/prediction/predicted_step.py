"""The prediction of a decode step: its distinct launches, their code, and the time of each."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

import torch

from gemcut.bench.engines.step_bytes import decode_bytes
from gemcut.engine.config.model_config import PUBLISHED
from gemcut.kernels.checks import FP8
from gemcut.tools.compile_report import Cell, compile_launch
from gemcut.tools.launches import Launch, Made, step_launches
from gemcut.tools.machine import Machine
from gemcut.tools.prediction.launch_time import (
    bound,
    facts_of,
    is_product,
    launch_us,
    memory_bytes,
)

Cells = dict[Launch, Cell]
NAMED_SIZES = ("N", "F", "V", "D")  # that tell launches of one kernel apart in a table


@dataclass(frozen=True)
class Line:
    """One distinct launch of a step."""

    kernel: str
    launches: int
    us: float  # each
    share: float | None  # of the bandwidth; None where no bytes are counted
    bound: str | None  # what a product's programs wait for, see bandwidth_model.py


@dataclass(frozen=True)
class PredictedStep:
    """The launches of a step of `batch` rows that see `context` keys, and their code."""

    model: str
    batch: int
    context: int
    counts: dict[Made, int]
    cells: Cells
    quantization: str | None = None  # of its matrices
    kv_cache_dtype: str = "auto"  # the engine's

    @property
    def name(self) -> str:
        """The model, and how its weights and its cache are quantised."""
        cache = "" if self.kv_cache_dtype == "auto" else f"{self.kv_cache_dtype} cache"
        return " ".join(filter(None, (self.model, self.quantization, cache)))

    def made(self) -> Iterator[tuple[int, Made]]:
        """The distinct launches with how many there are of each, in the order of the step."""
        return ((count, made) for made, count in self.counts.items())

    def us(self, made: Made, machine: Machine) -> float:
        """Microseconds of one of them."""
        return launch_us(made, self.cell(made), self.context, machine)

    def cell(self, made: Made) -> Cell | None:
        """What the compiler made of a launch; None for torch's own."""
        return None if made.launch is None else self.cells[made.launch]

    def lines(self, machine: Machine) -> list[Line]:
        """Each distinct launch, in the order of the step."""
        lines = []
        for count, made in self.made():
            us, nbytes = self.us(made, machine), memory_bytes(made, self.context)
            share = 1e6 * nbytes / machine.bandwidth / us if nbytes else None
            found = bound(made, self.cell(made), machine)
            lines.append(Line(_label(made), count, us, share, found))
        return lines

    def gaps_us(self, machine: Machine) -> float:
        """Microseconds before all launches; a dependent one begins before its turn."""
        hidden = sum(count for count, made in self.made() if made.is_dependent)
        launches = sum(self.counts.values())
        return launches * machine.launch_gap_us - hidden * machine.hidden_us

    def step_us(self, machine: Machine) -> float:
        """Microseconds of the step, gaps between launches included."""
        us = sum(count * self.us(made, machine) for count, made in self.made())
        return us + self.gaps_us(machine)

    @property
    def step_bytes(self) -> int:
        """Bytes that the step must move with any kernels: bench/engines/step_bytes.py."""
        return decode_bytes(
            PUBLISHED[self.model],
            batch=self.batch,
            context=self.context,
            dtype=torch.bfloat16,
            quantization=self.quantization,
            cache_dtype=FP8 if self.kv_cache_dtype == "fp8" else None,
        ).total

    def share(self, machine: Machine) -> float:
        """The step's share of the bandwidth."""
        return 1e6 * self.step_bytes / machine.bandwidth / self.step_us(machine)


def _label(made: Made) -> str:
    facts = facts_of(made)
    name = made.name.removesuffix("_kernel")
    sizes = [str(facts[size]) for size in NAMED_SIZES if size in facts]
    if is_product(facts):
        sizes = [str(facts["w_ptr.0"]), str(facts.get("D", facts["w_ptr.1"]))]
    if "IS_LOCAL" in facts:
        sizes = ["local" if facts["IS_LOCAL"] else "global"]
    return " ".join([name, " x ".join(sizes), _format(made)]).strip()


def _format(made: Made) -> str:
    """The format of a quantised weight."""
    if made.launch is None:
        return ""
    names = [name for name, _ in made.launch.signature]
    constants = {names[index]: value for index, value in made.launch.constants}
    return constants.get("FORMAT") or ""


def predict_steps(
    wanted: Sequence[tuple[str, int, int, str | None]],
    arch: str,
    jobs: int,
    kv_cache_dtype: str = "auto",
) -> list[PredictedStep]:
    """Steps of (model, batch, context, quantization), each launch compiled once."""
    steps = []
    for model, batch, context, quantization in wanted:
        made = step_launches(
            PUBLISHED[model],
            arch,
            batch=batch,
            context=context,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
        )
        steps.append((model, batch, context, dict(Counter(in_turn(made))), quantization))
    cells = compile_all((made for _, _, _, counts, _ in steps for made in counts), jobs)
    return [
        PredictedStep(model, batch, context, counts, cells, quantization, kv_cache_dtype)
        for model, batch, context, counts, quantization in steps
    ]


def in_turn(made: Iterable[Made]) -> list[Made]:
    """Launches in their order, each with what it knows of those before it.

    One that follows a launch of torch's own begins when that has ended, however it is launched.
    """
    found, after_torch, before = [], True, 0
    for one in made:
        asked = one.launch is not None and dict(one.launch.options).get("launch_pdl", False)
        is_dependent = bool(asked) and not after_torch
        before = before if is_dependent else 0
        found.append(replace(one, is_dependent=is_dependent, before=before))
        after_torch = one.launch is None
        if is_product(facts_of(one)):
            before = math.prod(one.grid)
    return found


def compile_all(made: Iterable[Made], jobs: int) -> Cells:
    """What the compiler makes of every distinct launch; RuntimeError for one that it refuses."""
    order = list(dict.fromkeys(one.launch for one in made if one.launch is not None))
    jobs = max(1, min(jobs, len(order)))
    compile_cached = partial(compile_launch, models=[], fresh=False)
    if jobs == 1:
        found = [compile_cached(launch) for launch in order]
    else:  # spawned: a fork would inherit torch's threads
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            found = list(
                pool.map(compile_cached, order, chunksize=math.ceil(len(order) / jobs / 4))
            )
    for cell in found:
        if cell.error is not None:
            raise RuntimeError(f"{cell.kernel} does not compile: {cell.error}")
    return dict(zip(order, found, strict=True))
