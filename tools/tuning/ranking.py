"""The order of tools/tune.py's candidates by their predicted times, before any is timed.

A candidate's launches are predicted (launch_time.py) from what the compiler made of them; it is
ranked by one number, as after timing: the geometric mean over decode cases of its time over the
rule's.  Archs whose machine code cannot be read, and prefill, are not predicted: there the order
stays.
"""

import math
from collections.abc import Sequence
from concurrent.futures import Executor
from statistics import fmean

from gemcut import kernels
from gemcut.kernels import tiles
from gemcut.kernels.tiles import Tile
from gemcut.tools.compile_report import compile_launch
from gemcut.tools.launches import Launch, Made, applied, recorded
from gemcut.tools.machine import H200, Machine
from gemcut.tools.prediction.launch_time import launch_us, main_loop
from gemcut.tools.prediction.predicted_step import Cells
from gemcut.tools.tuning.search_space import Subject


def rank(
    subject: Subject, arch: str, cells: Cells, pool: Executor, machine: Machine = H200
) -> None:
    """Sort what is left of a subject's candidates, the tile in use before all others.

    Of those that differ only in stages, the best comes before all the rest and the others after.
    `cells` are what was compiled; the rule's own launches are added to it.
    """
    left = subject.left()
    made = find_made(subject, [{}, *(candidate.tile for candidate in left)], arch)
    futures = {
        launch: pool.submit(compile_launch, launch, [], fresh=False)
        for launch in launches_of(made) - cells.keys()
    }
    cells |= {launch: future.result() for launch, future in futures.items()}
    times = [predicted_us(cases, subject, cells, machine) for cases in made]
    for candidate, us in zip((subject.rule, *left), times, strict=True):
        candidate.predicted_us = us
        candidate.predicted_ratio = _mean_ratio(us, times[0])
    in_use = tiles.TUNED.get(arch, {}).get(subject.key)
    gone = [candidate for candidate in subject.candidates if candidate not in left]
    left.sort(key=lambda c: c.predicted_ratio)
    best = {_kind(candidate.tile): candidate for candidate in reversed(left)}.values()
    left.sort(key=lambda c: (c.tile != in_use, c not in best))
    subject.candidates = left + gone


def _kind(tile: Tile) -> tuple[tuple[str, int], ...]:
    """What tells tiles apart in a first trial: stages and registers are for later ones."""
    return tuple((k, v) for k, v in tile.items() if k not in ("num_stages", "maxnreg"))


def launches_of(made: Sequence[Sequence[Sequence[Made]]]) -> set[Launch]:
    """The distinct launches, which must have been compiled."""
    found = {one.launch for cases in made for case in cases for one in case}
    return {launch for launch in found if launch is not None}


def find_made(subject: Subject, tried: Sequence[Tile], arch: str) -> list[list[list[Made]]]:
    """What each decode case of a subject launches with each of these tiles, by tile and case."""
    found: list[list[list[Made]]] = [[] for _ in tried]
    for case in subject.decode_cases():
        made: list[Made] = []
        with recorded(arch, made):
            arguments = case.make()
            for tile, of_tile in zip(tried, found, strict=True):
                made.clear()
                with applied(arch, subject.key, tile):
                    getattr(kernels, case.op)(**arguments)
                of_tile.append([one for one in made if one.launch is not None])
    return found


def predicted_us(
    cases: Sequence[Sequence[Made]], subject: Subject, cells: Cells, machine: Machine
) -> list[float]:
    """Microseconds of each case; empty where a loop cannot be read."""
    found = []
    for case, made in zip(subject.decode_cases(), cases, strict=True):
        of_case = [(one, cells[one.launch]) for one in made if one.launch is not None]
        if not any(main_loop(cell) for _, cell in of_case):
            return []
        context = case.facts.get("context", 1)
        found.append(sum(launch_us(one, cell, context, machine) for one, cell in of_case))
    return found


def _mean_ratio(us: Sequence[float], rule_us: Sequence[float]) -> float:
    if not us or len(us) != len(rule_us):
        return 1.0
    return math.exp(fmean(math.log(a / b) for a, b in zip(us, rule_us, strict=True)))
