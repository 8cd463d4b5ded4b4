"""The cases of an engine benchmark: contestants are loaded, warmed up, checked, timed in turn.

A contestant that fails at any of that is reported with the reason, and the others go on.
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
    EnginePeer,
    Gemcut,
    Generation,
    LoadedEngine,
    Stage,
    Workload,
    choose_peers,
    not_installed,
)
from gemcut.bench.engines.setup import Setup
from gemcut.bench.engines.token_check import Answer, Finding, Rows, TokenCheck
from gemcut.bench.measure.ceilings import measure_ceilings
from gemcut.bench.measure.report_file import (
    FAILED,
    INTERRUPTED,
    NO_MEMORY,
    OK,
    WRONG,
    Record,
    Results,
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
class Contestant:
    """The state of a contestant in a case; without a finding, nothing is wrong so far."""

    name: str
    version: str = ""
    settings: str = ""
    engine: LoadedEngine | None = None
    answer: Rows | None = None  # of the warm-up
    memory_bytes: int | None = None
    finding: Finding | None = None

    @property
    def peer(self) -> EnginePeer:
        return CONTESTANTS[self.name]

    @property
    def runs(self) -> bool:
        return self.finding is None or self.finding.passed

    def fail(self, error: Exception) -> None:
        """Note why it takes no further part, and let go of what it holds."""
        self.engine = None
        reason = next(iter(str(error).splitlines()), "")
        if isinstance(error, MEMORY_ERRORS):
            self.finding = Finding(NO_MEMORY, reason)
        else:
            self.finding = Finding(FAILED, f"{type(error).__name__}: {reason}")


@dataclass
class Result:
    """The results of a case so far; a round holds a Generation of each contestant in it."""

    setup: Setup
    workload: Workload
    contestants: list[Contestant]  # gemcut first
    rounds: list[dict[str, Generation]] = field(default_factory=list)
    interrupted: bool = False
    after_warmup: dict[str, int] = field(default_factory=dict)  # as gemcut's engine counts

    @property
    def timed(self) -> list[Contestant]:
        return [one for one in self.contestants if one.runs and self.rounds]

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
        """The peer of the greatest median; those quantised otherwise run another model."""
        own = self.workload.quantization
        peers = [one for one in self.timed if one.name != GEMCUT and self.quantization(one) == own]
        return max(
            (one.name for one in peers),
            key=lambda name: Spread.of(self.all(name, rate)).median,
            default=None,
        )

    def quantization(self, contestant: Contestant) -> str | None:
        """How a contestant's weights are quantised."""
        is_own = contestant.name == GEMCUT
        return self.workload.quantization if is_own else contestant.peer.quantization

    def record(self, contestant: Contestant, case: str) -> Record:
        """The fields that every record begins with."""
        finding = contestant.finding or Finding(OK, "")
        return {
            "case": case,
            "contestant": contestant.name,
            "version": contestant.version,
            "settings": contestant.settings,
            "status": finding.status,
            "detail": finding.detail,
            "model": self.setup.name,
            "dtype": self.setup.dtype_name,
            "batch": self.workload.batch,
            "quantization": self.quantization(contestant),
        }


def make_prompts(tokenizer: Tokenizer, workload: Workload) -> list[list[int]]:
    """Prompts [B][T] of ids: BOS, then a passage that each row begins at another token."""
    rows = range(workload.batch)
    return [make_prompt(tokenizer, workload.prompt_tokens, start=row) for row in rows]


def make_prompt(tokenizer: Tokenizer, length: int, start: int) -> list[int]:
    """BOS, then a passage from its token `start` on, again and again: `length` ids."""
    ids = tokenizer.encode(PASSAGE, add_bos=False)
    start %= len(ids)
    repeated = (ids[start:] + ids[:start]) * (length // len(ids) + 1)
    return [tokenizer.bos_id, *repeated[: length - 1]]


def run_case(setup: Setup, workload: Workload, peers: Sequence[str], repeats: int) -> Result:
    """Measure gemcut beside these peers in `repeats` rounds; Ctrl-C keeps whole rounds."""
    result = Result(setup, workload, [Contestant(name) for name in (GEMCUT, *peers)])
    try:
        prompts = make_prompts(setup.tokenizer, workload)
        stage = Stage(setup, workload)
        for contestant in result.contestants:
            _warm_up(contestant, stage, prompts)
        _measure(result, prompts, repeats)
    except KeyboardInterrupt:
        result.interrupted = True
    _let_go(result)
    return result


def _warm_up(contestant: Contestant, stage: Stage, prompts: Rows) -> None:
    """Load a contestant and run it once, which compiles and captures, and yields its answer."""
    device = stage.setup.device
    try:
        contestant.peer.model(stage)
        before = _allocated(device)
        engine = contestant.engine = contestant.peer.load(stage)
        contestant.version, contestant.settings = engine.version, engine.settings
        new_tokens = stage.workload.new_tokens
        contestant.answer = engine.generate(prompts, new_tokens).token_ids
        if device.type == "cuda":  # once more: the first run's peak is its compiler's
            torch.cuda.reset_peak_memory_stats(device)
            engine.generate(prompts, new_tokens)
            own = torch.cuda.max_memory_allocated(device) - before
            contestant.memory_bytes = own + stage.kept_weight_bytes(contestant.peer)
    except Exception as error:  # whatever a peer may raise is its own failure
        contestant.fail(error)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _measure(result: Result, prompts: Rows, repeats: int) -> None:
    """Check the answers, and time the contestants that are right, in rounds."""
    answers = {one.name: one.answer for one in result.contestants if one.answer is not None}
    if not answers:
        return
    check = TokenCheck(result.setup.model, prompts, result.workload.new_tokens)
    _check(result, check, answers)
    right = [one for one in result.contestants if one.runs]
    turns = {one.name: partial(_turn, result, one, prompts) for one in right}
    for round_ in take_turns(turns, repeats if turns else 0):
        result.rounds.append({name: one for name, one in round_.items() if one is not None})
    for round_ in result.rounds:  # a race in a kernel shows now and then only
        others = {one.name: round_[one.name].token_ids for one in result.timed}
        _check(result, check, {n: rows for n, rows in others.items() if rows != answers[n]})


def _check(result: Result, check: TokenCheck, answers: Mapping[str, Rows]) -> None:
    setup, quantization = result.setup, result.workload.quantization
    own = None if quantization is None else setup.quantized_model(quantization)
    asked = {
        name: Answer(rows, own if name == GEMCUT else CONTESTANTS[name].weight_bits)
        for name, rows in answers.items()
    }
    try:
        findings = check.findings(asked, own=result.contestants[0].answer)
    except MEMORY_ERRORS as error:
        for contestant in result.contestants:
            if contestant.runs:
                contestant.fail(MemoryError(f"judging takes more than there is: {error}"))
        return
    for contestant in result.contestants:
        contestant.finding = findings.get(contestant.name, contestant.finding)


def _turn(result: Result, contestant: Contestant, prompts: Rows) -> Generation | None:
    """One run of a contestant; None once it has failed."""
    if contestant.engine is None:
        return None
    try:
        generation = contestant.engine.generate(prompts, result.workload.new_tokens)
        if isinstance(contestant.engine, Gemcut):
            result.after_warmup = contestant.engine.after_warmup
        return generation
    except Exception as error:
        contestant.fail(error)
        return None


def _let_go(result: Result) -> None:
    """Free what the contestants hold, and what was compiled for the case's shapes."""
    if any(one.peer.compiles for one in result.contestants):
        torch.compiler.reset()
    for contestant in result.contestants:
        contestant.engine = None
    gc.collect()
    if result.setup.device.type == "cuda":
        torch.cuda.empty_cache()


# A run of cases


def add_case_arguments(parser: argparse.ArgumentParser) -> None:
    """The options for the batch, the rounds and the peers."""
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


def run_cases(
    benchmark: str,
    arguments: argparse.Namespace,
    setup: Setup,
    workloads: Sequence[Workload],
    make_records: Callable[[Result, Ceilings], list[Record]],
    print_case: Callable[[Result, list[Record], Ceilings], None],
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
        result = run_case(setup, workload, like(workload, peers), arguments.repeats)
        interrupted = result.interrupted
        after_warmup.update(result.after_warmup)
        results.report["after_warmup"] = dict(after_warmup)
        if result.rounds or not interrupted:
            records = make_records(result, ceilings)
            results.add(*records)
            _print_result(result, records, arguments.repeats)
            print_case(result, records, ceilings)
        if interrupted:
            print(f"interrupted: {len(result.rounds)} whole rounds of this case are kept")
            break
    if not interrupted:
        results.finish()
    results.print_line()
    taking_part = [name for workload in workloads for name in like(workload, peers)]
    return INTERRUPTED if interrupted else _exit_code(results.records, taking_part)


def like(workload: Workload, peers: Sequence[str]) -> list[str]:
    """The peers of a case: beside quantised weights of gemcut's, those quantised to the same."""
    own = workload.quantization
    return [name for name in peers if own is None or CONTESTANTS[name].quantization == own]


def check_fits(setup: Setup, workload: Workload) -> None:
    """ValueError where the model has no room for prompt and continuation."""
    limit = setup.config.context_length
    if workload.length > limit:
        raise ValueError(
            f"{workload.prompt_tokens} prompt tokens and {workload.new_tokens} new ones are "
            f"{workload.length}, but a slot of this model holds at most {limit}"
        )


def report_settings(arguments: argparse.Namespace, setup: Setup) -> dict[str, Any]:
    """The arguments as a report holds them: without the names of folders."""
    settings = {key: value for key, value in vars(arguments).items() if key not in ("run", "json")}
    return settings | {"model": setup.name, "dtype": setup.dtype_name}


def _print_result(result: Result, records: Sequence[Record], repeats: int) -> None:
    """Print how a case was run, its contestants, and the finding on each."""
    print(
        f"{records[0]['case']}: {result.workload.prompt_tokens} prompt tokens and "
        f"{result.workload.new_tokens} new, {result.setup.dtype_name} on "
        f"{result.setup.device.type}, threads {torch.get_num_threads()}, "
        f"rounds {len(result.rounds)} of {repeats}"
    )
    for record in records:
        print(f"{record['contestant']} {record['version']}: {record['settings']}")
        print(f"    {record['status']}: {record['detail']}")


def print_fastest(records: Sequence[Record], does: str) -> None:
    """Print how fast gemcut is beside the fastest peer, where both were timed."""
    fastest = records[0]["fastest_peer"]
    for record in records:
        if record["contestant"] == fastest and "ratio" in record:
            ratio = describe(record["ratio"])
            print(f"gemcut {does} {ratio} times as fast as the fastest peer, {fastest}")


def describe(quantity: Record) -> str:
    """A metric as tables show it: median (range)."""
    return "{median:.2f} ({low:.2f} - {high:.2f})".format(**quantity)


def _exit_code(records: Sequence[Record], peers: Sequence[str]) -> int:
    """1 where a contestant is wrong, or gemcut or all peers were never timed."""
    timed = {record["contestant"] for record in records if record["status"] == OK}
    lacking = GEMCUT not in timed or (bool(peers) and timed == {GEMCUT})
    return int(lacking or any(record["status"] == WRONG for record in records))
