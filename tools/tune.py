"""Finds tile constants for an arch, and writes them with all that was tried.

    python -P -m gemcut.tools.tune --compile-only --arch sm_90
    python -P -m gemcut.tools.tune --models gemma-2-2b --kernels skinny_linear --out FOLDER --write
    python -P -m gemcut.tools.tune --merge FOLDER/tiles-sm_90.json

Candidates (search_space.py) are compiled first, for any arch and on any machine; those that spill,
take too much shared memory or break another rule of compile_report.py are dropped.  The rest are
put in the order of their predicted times (ranking.py), held to the oracle and timed on the GPU at
hand, in trials beside the kernel's own rule (trials.py).  A kernel has one tile for every batch, so
a candidate is judged by one number: the geometric mean, over the shape's cases, of its time over
the rule's.

The best of the trials meet the rule once more, in rounds that had no part in choosing them.  One
wins that beats the rule in every round (by chance alone 1 in 4096 does) and by more than one
hundredth in the median; else the rule stays.

FOLDER holds tune-ARCH.json, a report as gemcut-bench writes them, with a record for each candidate:
its status, its microseconds by case, its ratio to the rule; and tiles-ARCH.json, what won.  Both
are written anew after each shape: whatever ends a run, what it has decided is kept.
"""

import argparse
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from gemcut.bench.measure.report_file import INTERRUPTED, NO_MEMORY, OK, Record, Results, metric
from gemcut.bench.measure.timing import Spread, clock
from gemcut.bench.ops.kernels import MEMORY_ERRORS
from gemcut.engine.config.model_config import PUBLISHED
from gemcut.kernels.gpu_arch import SHARED_MEMORY, arch_of
from gemcut.kernels.interpreter import INTERPRETED
from gemcut.kernels.tiles import TILES_FILE, Key, Measured, Tile, read_measured
from gemcut.tools.compile_report import Cell, compile_launch
from gemcut.tools.launches import Launch
from gemcut.tools.tuning.ranking import rank
from gemcut.tools.tuning.search_space import (
    CANDIDATES,
    COMPILED,
    DROPPED,
    THE_RULE,
    UNTRIED,
    Candidate,
    Subject,
    find_launches,
    find_subjects,
)
from gemcut.tools.tuning.tile_file import (
    by_kernel,
    merged,
    write_measured,
)
from gemcut.tools.tuning.trials import NO_TIME, tune

MOST_REGISTERS = 255  # of a thread, on any arch

# What the compiler makes of candidates


def compile_candidates(
    subjects: Sequence[Subject], name: str, jobs: int, ends: float, predicted: bool = False
) -> None:
    """Drop the candidates that break a rule of the compile report, or wait beyond `ends`.

    With `predicted` the rest are put in the order of their predicted times.
    """
    # spawned: a fork would inherit torch's threads
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        cells = compile_untried(pool, subjects, name, ends)
        for candidate in (candidate for subject in subjects for candidate in subject.candidates):
            if candidate.spill_bytes and "maxnreg" not in candidate.tile:
                # ptxas aims for many programs on a processor, and rather spills a few bytes
                candidate.tile = {**candidate.tile, "maxnreg": MOST_REGISTERS}
                candidate.status = UNTRIED
        cells |= compile_untried(pool, subjects, name, ends)
        for subject in subjects if predicted else ():
            rank(subject, name, cells, pool)


def compile_untried(
    pool: ProcessPoolExecutor, subjects: Sequence[Subject], name: str, ends: float
) -> dict[Launch, Cell]:
    """Compile what untried candidates launch, and note what became of them."""
    wanted: list[tuple[Candidate, set[Launch]]] = []
    for subject in subjects:
        untried = [c for c in subject.candidates if c.status == UNTRIED]
        rule, *launches = find_launches(subject, [{}, *(c.tile for c in untried)], name)
        for candidate, launched in zip(untried, launches, strict=True):
            if launched == rule:
                candidate.status = THE_RULE
            else:
                wanted.append((candidate, launched - rule))
    futures = {
        launch: pool.submit(compile_launch, launch, [], fresh=False)
        for launch in dict.fromkeys(launch for _, launched in wanted for launch in launched)
    }
    done, late = wait(futures.values(), timeout=max(0.0, ends - clock()))
    for future in late:
        future.cancel()
    for candidate, launched in wanted:
        cells = [futures[launch].result() for launch in launched if futures[launch] in done]
        note(candidate, cells, in_time=len(cells) == len(launched))
    return {launch: future.result() for launch, future in futures.items() if future in done}


def note(candidate: Candidate, cells: Sequence[Cell], in_time: bool) -> None:
    """What a candidate takes at most, and the rules that it breaks."""
    candidate.registers = max((cell.registers for cell in cells), default=0)
    candidate.spill_bytes = max((cell.spill_bytes for cell in cells), default=0)
    candidate.shared_bytes = max((cell.shared_bytes for cell in cells), default=0)
    problems = {problem for cell in cells for problem in cell.problems()}
    candidate.status, candidate.detail = COMPILED, ""
    if problems or not in_time:
        candidate.status = DROPPED
        candidate.detail = "; ".join(sorted(problems)) or NO_TIME


# What is kept


def rows(subject: Subject) -> list[Record]:
    """A row for the rule and for each candidate of a subject."""
    return [_row(subject, candidate) for candidate in (subject.rule, *subject.candidates)]


def _row(subject: Subject, candidate: Candidate) -> Record:
    row = {
        "case": subject.name,
        "contestant": candidate.name,
        "status": candidate.status,
        "detail": candidate.detail,
        "kernel": subject.key[0],
        "shape": list(subject.key[1]),
        "models": subject.models,
        "tile": candidate.tile,
        "registers": candidate.registers,
        "shared_bytes": candidate.shared_bytes,
        "predicted_us": candidate.predicted_us,
        "won": candidate is subject.winner,
    }
    if candidate.ratios:
        row |= {
            "ratio": metric(candidate.ratios),
            "us": {case: metric(us) for case, us in candidate.us.items()},
        }
    return row


def measured(results: Results, name: str, subjects: Sequence[Subject]) -> Measured:
    """The winners so far, with where they were found."""
    machine = results.report["machine"]
    won: dict[Key, Tile] = {s.key: s.winner.tile for s in subjects if s.winner is not None}
    return Measured(
        arch=name,
        card=machine["device"],
        date=time.strftime("%Y-%m-%d"),
        triton=machine["versions"]["triton"],
        torch=machine["versions"]["torch"],
        commit=machine["commit"] or "unknown",
        tiles=by_kernel(won),
    )


def keep(block: Measured, files: Iterable[Path]) -> None:
    """Lay what won over what these files hold, where anything is decided."""
    for file in files if block.tiles else ():
        old = read_measured(file) if file.exists() else ()
        write_measured(file, merged(old, block))


# What is printed


def print_left(subject: Subject) -> None:
    """How many candidates the compiler left of a subject, why others went, and what is left."""
    left = subject.left()
    print(f"{subject.name}: {len(left)} of {len(subject.candidates)} candidates are left")
    gone = Counter(c.detail or c.status for c in subject.candidates if c not in left)
    for reason, count in gone.most_common():
        print(f"    {count} dropped: {reason}")


def print_candidates(subject: Subject) -> None:
    """The rule and the candidates that are left, with what they take."""
    for candidate in (subject.rule, *subject.left()):
        taken = f"{candidate.registers:>5} registers{candidate.shared_bytes / 1024:>5.0f} KB"
        if candidate is subject.rule:
            taken = " " * 22
        us = "".join(f"{us:>9.2f}" for us in candidate.predicted_us[:2])
        ratio = f"{us} us predicted, {candidate.predicted_ratio:.2f} of the rule's" if us else ""
        print(f"    {candidate.name:<64}{taken}{ratio}")


def print_winner(subject: Subject) -> None:
    """The outcome of a subject, and the candidates that failed."""
    timed = sum(candidate.status == OK for candidate in subject.candidates)
    for candidate in subject.candidates:
        if candidate.status not in (OK, DROPPED, THE_RULE) and candidate.detail != NO_TIME:
            print(f"    {candidate.name} {candidate.status}: {candidate.detail}")
    if subject.winner is None:
        result = "undecided"
    elif subject.winner is subject.rule:
        result = "the rule stays"
    else:
        ratio = Spread.of(subject.winner.ratios)
        result = (
            f"{subject.winner.name} takes {ratio.median:.3f} "
            f"({ratio.low:.3f} - {ratio.high:.3f}) of the rule's time"
        )
    print(f"{subject.name}: {timed} timed; {result}", flush=True)


# The command


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0; 1 for bad input or a rule that fails; 2 for wrong usage."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.merge is None and arguments.out is None and not arguments.compile_only:
        parser.error("--out FOLDER is needed: what was tried is kept there")
    if arguments.compile_only and INTERPRETED:
        parser.error("TRITON_INTERPRET is set: kernels are interpreted, not compiled; unset it")
    try:
        if arguments.merge is not None:
            return merge(arguments.merge)
        return run(arguments)
    except (ValueError, RuntimeError, MemoryError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        print(f"tune: {reason}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -P -m gemcut.tools.tune",
        description="Find tile constants for a GPU, and write them with all that was tried.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="MODEL",
        default=["gemma-2-2b"],
        help=f"of {', '.join(PUBLISHED)}, or folders with a config.json",
    )
    parser.add_argument(
        "--kernels", nargs="+", metavar="KERNEL", choices=CANDIDATES, default=list(CANDIDATES)
    )
    parser.add_argument(
        "--arch", "--part", choices=SHARED_MEMORY, help="of --compile-only; default: the GPU's"
    )
    parser.add_argument("--compile-only", action="store_true", help="time nothing; needs no GPU")
    parser.add_argument("--minutes", type=float, default=7.0, help="for all of it")
    parser.add_argument("--jobs", type=int, default=_cores(), help="compilers at a time")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for what was tried and won")
    parser.add_argument("--write", action="store_true", help="lay what won over the measured tiles")
    parser.add_argument(
        "--merge", type=Path, metavar="FILE", help="lay a tiles-ARCH.json over them; nothing else"
    )
    return parser


def _cores() -> int:
    """What this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def merge(file: Path) -> int:
    """Lay what another machine measured over kernels/measured_tiles.json."""
    blocks = read_measured(file)
    for block in blocks:
        if block.arch not in SHARED_MEMORY:
            raise ValueError(f"{file}: arch {block.arch!r} is not {', '.join(SHARED_MEMORY)}")
    for block in blocks:
        keep(block, [TILES_FILE])
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Compile, time and write what was asked for."""
    ends = clock() + 60 * arguments.minutes
    device, name = choose_arch(arguments)
    if not (math.isfinite(arguments.minutes) and arguments.minutes > 0 and arguments.jobs > 0):
        raise ValueError(f"--minutes {arguments.minutes} --jobs {arguments.jobs}: must be above 0")
    subjects = find_subjects(arguments.models, arguments.kernels, name, device, torch.bfloat16)

    here = torch.device("cpu") if arguments.compile_only else device
    report = report_file(arguments.out, name)
    results = Results("tune", _settings(arguments, name), here, report)
    try:
        if not INTERPRETED:  # in half of the time, where the other half is for timing
            share = 1 if arguments.compile_only else 2
            compile_ends = clock() + (ends - clock()) / share
            compile_candidates(subjects, name, arguments.jobs, compile_ends, predicted=True)
        if arguments.compile_only:
            for subject in subjects:
                results.add(*rows(subject))
                print_left(subject)
                print_candidates(subject)
        else:
            files = [Path(arguments.out, f"tiles-{name}.json")] + [TILES_FILE] * arguments.write
            tune_all(subjects, results, device, name, files, ends)
        results.finish()
    except KeyboardInterrupt:
        print("tune: interrupted; what was decided is kept", file=sys.stderr)
        return INTERRUPTED
    return 0


def report_file(folder: Path | None, name: str) -> Path | None:
    """Where what was tried is kept, in a folder that exists from now on."""
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"tune-{name}.json"


def choose_arch(arguments: argparse.Namespace) -> tuple[torch.device, str]:
    """The device and the arch to tune for; ValueError where they cannot be had."""
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        name = arch_of(device)
    elif INTERPRETED:
        device = torch.device("cpu")
        name = arch_of(device)
    else:
        device, name = torch.device("cuda", 0), ""
    if arguments.compile_only:
        if not (arguments.arch or name):
            raise ValueError("no GPU is here: --compile-only needs an --arch to compile for")
        return device, arguments.arch or name
    if not name:
        raise ValueError("no GPU is here to time on; --compile-only --arch sm_90 compiles")
    if arguments.arch not in (None, name):
        raise ValueError(f"--arch {arguments.arch}: the GPU here is {name}")
    if arguments.write and device.type != "cuda":
        raise ValueError("--write: the interpreter's times say nothing about a GPU")
    return device, name


def tune_all(
    subjects: Sequence[Subject],
    results: Results,
    device: torch.device,
    name: str,
    files: Sequence[Path],
    ends: float,
) -> None:
    """Tune one subject after the other, and keep what is decided after each."""
    for number, subject in enumerate(subjects):
        print_left(subject)
        share = (ends - clock()) / (len(subjects) - number)
        try:
            tune(subject, device, clock() + share, ends)
        except MEMORY_ERRORS as error:
            for candidate in subject.left():
                candidate.status, candidate.detail = NO_MEMORY, str(error).splitlines()[0]
        finally:
            results.add(*rows(subject))
        keep(measured(results, name, subjects), files)
        print_winner(subject)


def _settings(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    names = ("models", "kernels", "minutes", "compile_only")
    return {"part": name, **{key: getattr(arguments, key) for key in names}}


if __name__ == "__main__":
    sys.exit(main())
