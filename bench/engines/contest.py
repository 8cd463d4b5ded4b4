"""One case: contestants are loaded, warmed up, judged, and then timed in turn.

Whoever fails at any of that is told with the reason, and the others go on.
"""

import argparse
import gc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from gemcut.bench.engines.peers import (
    CONTESTANTS,
    GEMCUT,
    PEERS,
    Contestant,
    Gemcut,
    Generation,
    Peer,
    Stage,
    Workload,
    choose_peers,
    not_installed,
)
from gemcut.bench.engines.setup import Setup
from gemcut.bench.engines.token_check import Answer, Judge, Rows, Verdict
from gemcut.bench.measure.ceilings import measure_ceilings
from gemcut.bench.measure.report_file import (
    FAILED,
    INTERRUPTED,
    NO_MEMORY,
    OK,
    WRONG,
    Results,
    Row,
)
from gemcut.bench.measure.timing import Spread, take_turns
from gemcut.engine.checks import check_int
from gemcut.tokenizer import Tokenizer

PASSAGE = (
    "The ferry left at six, with the mail, two sheep and a schoolmaster on board. Nobody spoke "
    "until the lighthouse was behind them. Then the pilot said that the wind would turn before "
    "noon, and that whoever had business on the island had better finish it by then. The "
    "schoolmaster looked at his watch, at the sheep, and at the long grey line ahead of them."
)
MEMORY_ERRORS = (MemoryError, torch.OutOfMemoryError)
Measure = Callable[[Generation], float]
Ceilings = dict[str, float]


@dataclass
class Entrant:
    """A contestant on its way through a case; without a verdict, nothing is wrong so far."""

    name: str
    version: str = ""
    settings: str = ""
    contestant: Contestant | None = None
    answer: Rows | None = None  # of the warm-up
    memory_bytes: int | None = None
    verdict: Verdict | None = None

    @property
    def peer(self) -> Peer:
        return CONTESTANTS[self.name]

    @property
    def runs(self) -> bool:
        return self.verdict is None or self.verdict.passed

    def fail(self, error: Exception) -> None:
        """Note why it takes no further part, and let go of what it holds."""
        self.contestant = None
        reason = next(iter(str(error).splitlines()), "")
        if isinstance(error, MEMORY_ERRORS):
            self.verdict = Verdict(NO_MEMORY, reason)
        else:
            self.verdict = Verdict(FAILED, f"{type(error).__name__}: {reason}")


@dataclass
class Result:
    """What a case has yielded so far; a round holds a Generation of everyone who took part."""

    setup: Setup
    workload: Workload
    entrants: list[Entrant]  # gemcut first
    rounds: list[dict[str, Generation]] = field(default_factory=list)
    interrupted: bool = False
    after_warmup: dict[str, int] = field(default_factory=dict)  # what gemcut's engine says

    @property
    def timed(self) -> list[Entrant]:
        return [one for one in self.entrants if one.runs and self.rounds]

    def all(self, name: str, measure: Measure) -> list[float]:
        """A quantity of a contestant that was timed, round by round."""
        return [measure(round_[name]) for round_ in self.rounds]

    def ratios(self, name: str, measure: Measure) -> list[float]:
        """Gemcut's quantity over a peer's, round by round; none where gemcut was not timed."""
        if name == GEMCUT or GEMCUT not in [one.name for one in self.timed]:
            return []
        own, theirs = self.all(GEMCUT, measure), self.all(name, measure)
        return [a / b for a, b in zip(own, theirs, strict=True)]

    def fastest_peer(self, rate: Measure) -> str | None:
        """The peer of the greatest median; quantised ones run another model."""
        peers = [one for one in self.timed if one.name != GEMCUT and not one.peer.quantization]
        return max(
            (one.name for one in peers),
            key=lambda name: Spread.of(self.all(name, rate)).median,
            default=None,
        )

    def row(self, entrant: Entrant, case: str) -> Row:
        """What every row of a report begins with."""
        verdict = entrant.verdict or Verdict(OK, "")
        return {
            "case": case,
            "contestant": entrant.name,
            "version": entrant.version,
            "settings": entrant.settings,
            "status": verdict.status,
            "detail": verdict.detail,
            "model": self.setup.name,
            "dtype": self.setup.dtype_name,
            "batch": self.workload.batch,
            "quantization": entrant.peer.quantization,
        }


def make_prompts(tokenizer: Tokenizer, workload: Workload) -> list[list[int]]:
    """Prompts of equal length: BOS, then a passage that each row begins at another token."""
    rows = range(workload.batch)
    return [make_prompt(tokenizer, workload.prompt_tokens, start=row) for row in rows]


def make_prompt(tokenizer: Tokenizer, length: int, start: int) -> list[int]:
    """BOS, then a passage from its token `start` on, again and again: `length` ids."""
    ids = tokenizer.encode(PASSAGE, add_bos=False)
    start %= len(ids)
    repeated = (ids[start:] + ids[:start]) * (length // len(ids) + 1)
    return [tokenizer.bos_id, *repeated[: length - 1]]


def run_case(setup: Setup, workload: Workload, peers: Sequence[str], repeats: int) -> Result:
    """Gemcut beside these peers in so many rounds; Ctrl-C keeps whole rounds."""
    result = Result(setup, workload, [Entrant(name) for name in (GEMCUT, *peers)])
    try:
        prompts = make_prompts(setup.tokenizer, workload)
        stage = Stage(setup, workload)
        for entrant in result.entrants:
            _warm_up(entrant, stage, prompts)
        _measure(result, prompts, repeats)
    except KeyboardInterrupt:
        result.interrupted = True
    _let_go(result)
    return result


def _warm_up(entrant: Entrant, stage: Stage, prompts: Rows) -> None:
    """Load a contestant and run it once, which compiles and captures, and yields its answer."""
    device = stage.setup.device
    try:
        entrant.peer.model(stage)
        before = _allocated(device)
        contestant = entrant.contestant = entrant.peer.load(stage)
        entrant.version, entrant.settings = contestant.version, contestant.settings
        new_tokens = stage.workload.new_tokens
        entrant.answer = contestant.generate(prompts, new_tokens).token_ids
        if device.type == "cuda":  # once more: the first run's peak is its compiler's
            torch.cuda.reset_peak_memory_stats(device)
            contestant.generate(prompts, new_tokens)
            own = torch.cuda.max_memory_allocated(device) - before
            entrant.memory_bytes = own + stage.kept_weight_bytes(entrant.peer)
    except Exception as error:  # whatever a peer may raise is its own failure
        entrant.fail(error)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _measure(result: Result, prompts: Rows, repeats: int) -> None:
    """Judge the answers, and time whoever is right in rounds."""
    answers = {one.name: one.answer for one in result.entrants if one.answer is not None}
    if not answers:
        return
    judge = Judge(result.setup.model, prompts, result.workload.new_tokens)
    _judge(result, judge, answers)
    turns = {one.name: partial(_turn, result, one, prompts) for one in result.entrants if one.runs}
    for round_ in take_turns(turns, repeats if turns else 0):
        result.rounds.append({name: one for name, one in round_.items() if one is not None})
    for round_ in result.rounds:  # a race in a kernel shows now and then only
        others = {one.name: round_[one.name].token_ids for one in result.timed}
        _judge(result, judge, {n: rows for n, rows in others.items() if rows != answers[n]})


def _judge(result: Result, judge: Judge, answers: Mapping[str, Rows]) -> None:
    asked = {name: Answer(rows, CONTESTANTS[name].weight_bits) for name, rows in answers.items()}
    try:
        verdicts = judge.verdicts(asked, own=result.entrants[0].answer)
    except MEMORY_ERRORS as error:
        for entrant in result.entrants:
            if entrant.runs:
                entrant.fail(MemoryError(f"judging takes more than there is: {error}"))
        return
    for entrant in result.entrants:
        entrant.verdict = verdicts.get(entrant.name, entrant.verdict)


def _turn(result: Result, entrant: Entrant, prompts: Rows) -> Generation | None:
    """One run of a contestant; None once it has failed."""
    if entrant.contestant is None:
        return None
    try:
        generation = entrant.contestant.generate(prompts, result.workload.new_tokens)
        if isinstance(entrant.contestant, Gemcut):
            result.after_warmup = entrant.contestant.after_warmup
        return generation
    except Exception as error:
        entrant.fail(error)
        return None


def _let_go(result: Result) -> None:
    """Free what the contestants hold, and what was compiled for the case's shapes."""
    if any(one.peer.compiles for one in result.entrants):
        torch.compiler.reset()
    for entrant in result.entrants:
        entrant.contestant = None
    gc.collect()
    if result.setup.device.type == "cuda":
        torch.cuda.empty_cache()


# A run of cases


def add_contest_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say who runs, how many prompts at a time, and how often."""
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1], metavar="N", help="prompts at a time (1)"
    )
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="rounds (%(default)s)")
    parser.add_argument(
        "--peer",
        nargs="+",
        action="extend",
        metavar="PEER",
        help=f"of {', '.join(PEERS)}; default: all that are installed, "
        "on a CPU those that compile nothing",
    )


def run_contest(
    benchmark: str,
    arguments: argparse.Namespace,
    setup: Setup,
    workloads: Sequence[Workload],
    make_rows: Callable[[Result, Ceilings], list[Row]],
    print_case: Callable[[Result, list[Row], Ceilings], None],
) -> int:
    """Measure the cases of a benchmark; the exit code of its command."""
    check_int("repeats", arguments.repeats, 1, 10**6)
    workloads = list(dict.fromkeys(workloads))
    for workload in workloads:
        check_fits(setup, workload)
    peers = choose_peers(arguments.peer, setup.device)
    settings = report_settings(arguments, setup) | {"peer": peers}
    results = Results(benchmark, settings, setup.device, arguments.json)
    ceilings = measure_ceilings(setup.device, setup.dtype)
    results.set_ceilings(ceilings)
    if lacking := not_installed():
        print(f"not installed: {', '.join(lacking)}")

    interrupted = False
    after_warmup: Counter[str] = Counter()
    for workload in workloads:
        result = run_case(setup, workload, peers, arguments.repeats)
        interrupted = result.interrupted
        after_warmup.update(result.after_warmup)
        results.report["after_warmup"] = dict(after_warmup)
        if result.rounds or not interrupted:
            rows = make_rows(result, ceilings)
            results.add(*rows)
            _print_result(result, rows, arguments.repeats)
            print_case(result, rows, ceilings)
        if interrupted:
            print(f"interrupted: {len(result.rounds)} whole rounds of this case are kept")
            break
    if not interrupted:
        results.finish()
    results.print_line()
    return INTERRUPTED if interrupted else _exit_code(results.rows, peers)


def check_fits(setup: Setup, workload: Workload) -> None:
    """Nothing, or ValueError where the model has no room for prompt and continuation."""
    limit = setup.config.context_length
    if workload.length > limit:
        raise ValueError(
            f"{workload.prompt_tokens} prompt tokens and {workload.new_tokens} new ones are "
            f"{workload.length}, but a slot of this model holds at most {limit}"
        )


def report_settings(arguments: argparse.Namespace, setup: Setup) -> dict[str, Any]:
    """The arguments as a report has them: it names no folder."""
    settings = {key: value for key, value in vars(arguments).items() if key not in ("run", "json")}
    return settings | {"model": setup.name, "dtype": setup.dtype_name}


def _print_result(result: Result, rows: Sequence[Row], repeats: int) -> None:
    """How a case was run, who took part, and what was found of each."""
    print(
        f"{rows[0]['case']}: {result.workload.prompt_tokens} prompt tokens and "
        f"{result.workload.new_tokens} new, {result.setup.dtype_name} on "
        f"{result.setup.device.type}, threads {torch.get_num_threads()}, "
        f"rounds {len(result.rounds)} of {repeats}"
    )
    for row in rows:
        print(f"{row['contestant']} {row['version']}: {row['settings']}")
        print(f"    {row['status']}: {row['detail']}")


def print_fastest(rows: Sequence[Row], does: str) -> None:
    """How gemcut does beside the fastest peer, where both were timed."""
    fastest = rows[0]["fastest_peer"]
    for row in rows:
        if row["contestant"] == fastest and "ratio" in row:
            ratio = describe(row["ratio"])
            print(f"gemcut {does} {ratio} times as fast as the fastest peer, {fastest}")


def describe(quantity: Row) -> str:
    """A metric of a row as tables have it: median (range)."""
    return "{median:.2f} ({low:.2f} - {high:.2f})".format(**quantity)


def _exit_code(rows: Sequence[Row], peers: Sequence[str]) -> int:
    """1 where anyone is wrong, or gemcut or all peers were never timed."""
    timed = {row["contestant"] for row in rows if row["status"] == OK}
    lacking = GEMCUT not in timed or (bool(peers) and timed == {GEMCUT})
    return int(lacking or any(row["status"] == WRONG for row in rows))
