"""Trials of a kernel's candidate tiles: a few at a time beside the rule, then a final.

All of a trial take turns in the same rounds, on the same inputs, after each was held to the oracle.
The ratio of a candidate is the geometric mean, over the cases of its subject, of its time over the
rule's in the same round.
"""

import math
from collections.abc import Callable, Sequence
from statistics import fmean, median

import torch

from gemcut import kernels
from gemcut.bench.measure.report_file import FAILED, OK, WRONG
from gemcut.bench.measure.timing import Call, Runs, clock, prepare_runs, take_turns
from gemcut.bench.ops.cases import Arguments, Case
from gemcut.bench.ops.kernels import MEMORY_ERRORS, choose_input_sets
from gemcut.bench.ops.op_check import Check
from gemcut.kernels.gpu_arch import arch_of
from gemcut.tools.launches import applied
from gemcut.tools.tuning.search_space import Candidate, Subject, Times

TRIAL = 6  # candidates beside the rule
TRIAL_ROUNDS = 5
FINALISTS = 4
FINAL_ROUNDS = 12
LEAST_GAIN = 0.01  # two processes of the same code differ by about as much
RUN_CALLS = 128  # of a short op, at least: what the host does around a run takes as long as one
NO_TIME = "no time was left"


class OutOfTimeError(Exception):
    """The run must end now."""


def tune(subject: Subject, device: torch.device, share_ends: float, ends: float) -> None:
    """Find the subject's winner, or leave it undecided: the time is up, or no candidate is left.

    Times are the clock's: no trial begins that would pass `share_ends`, and all stops at `ends`.
    RuntimeError where the rule itself fails: what is timed beside it counts for nothing.
    """
    candidates, longest = subject.left(), 0.0
    try:
        for first in range(0, len(candidates), TRIAL):
            began = clock()
            if first and began + 2 * longest > share_ends:  # the trial, and the final after it
                break
            run_trial(subject, candidates[first : first + TRIAL], TRIAL_ROUNDS, device, ends)
            longest = max(longest, clock() - began)
        timed = [c for c in candidates if c.status == OK]
        faster = [c for c in timed if median(c.ratios) < 1]
        finalists = sorted(faster, key=lambda c: median(c.ratios))[:FINALISTS]
        if finalists:
            run_trial(subject, finalists, FINAL_ROUNDS, device, ends)
        if timed:
            subject.winner = choose_winner(subject.rule, finalists)
    except OutOfTimeError:
        pass
    for candidate in subject.left():
        candidate.detail = NO_TIME


def choose_winner(rule: Candidate, finalists: Sequence[Candidate]) -> Candidate:
    """The fastest that beats the rule in every round, by more than the least gain; or the rule."""
    better = [
        c
        for c in finalists
        if c.status == OK and max(c.ratios) < 1 and median(c.ratios) < 1 - LEAST_GAIN
    ]
    return min(better, key=lambda c: median(c.ratios), default=rule)


def run_trial(
    subject: Subject,
    candidates: Sequence[Candidate],
    rounds: int,
    device: torch.device,
    ends: float,
) -> None:
    """Check and time candidates beside the rule; what ends it early leaves them as they were."""
    entered = [subject.rule, *candidates]
    us: dict[str, Times] = {candidate.name: {} for candidate in entered}
    for case in subject.cases:
        found = time_case(subject, case, entered, rounds, device, ends)
        if subject.rule.name not in found:
            raise RuntimeError(f"the rule is {subject.rule.status}: {subject.rule.detail}")
        entered = [candidate for candidate in entered if candidate.name in found]
        for candidate in entered:
            us[candidate.name][case.name] = found[candidate.name]
    for candidate in entered:
        candidate.status, candidate.us = OK, us[candidate.name]
        candidate.ratios = ratios(candidate.us, us[subject.rule.name])


def ratios(us: Times, rule_us: Times) -> list[float]:
    """A candidate's time over the rule's, round by round."""
    by_case = [
        [math.log(a / b) for a, b in zip(us[case], rule_us[case], strict=True)] for case in rule_us
    ]
    return [math.exp(fmean(logs)) for logs in zip(*by_case, strict=True)]


def time_case(
    subject: Subject,
    case: Case,
    candidates: Sequence[Candidate],
    rounds: int,
    device: torch.device,
    ends: float,
) -> Times:
    """Microseconds of a call in each round, by name, of those that compute the case right."""
    sets = choose_input_sets(case, device)
    inputs = [case.make() for _ in range(sets)]
    check, runs = Check(case, inputs[0]), {}
    for candidate in candidates:
        if clock() > ends:
            raise OutOfTimeError
        build = builder(subject, case, candidate, device)
        try:
            accuracy = check.gemcut(build)
            if accuracy.passed:
                runs[candidate.name] = prepare([build(a) for a in inputs], device)
            else:
                error = f"error {accuracy.error:.2e}, where {accuracy.budget:.2e} is allowed"
                candidate.status, candidate.detail = WRONG, f"{case.name}: {error}"
        except MEMORY_ERRORS:
            raise
        except Exception as error:  # whatever else a candidate raises is its own failure
            reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            candidate.status, candidate.detail = FAILED, f"{case.name}: {reason}"
    measured = list(take_turns({name: run.cold for name, run in runs.items()}, rounds))
    return {
        name: [1e6 * round_[name] / run.calls for round_ in measured] for name, run in runs.items()
    }


def builder(
    subject: Subject, case: Case, candidate: Candidate, device: torch.device
) -> Callable[[Arguments], Call]:
    """A builder of calls of a case's op that find the candidate's tile."""
    op, name = getattr(kernels, case.op), arch_of(device)

    def build(arguments: Arguments) -> Call:
        def call() -> object:
            with applied(name, subject.key, candidate.tile):
                return op(**arguments)

        return call

    return build


def prepare(calls: Sequence[Call], device: torch.device) -> Runs:
    """Runs of one candidate; RuntimeError where they would not be CUDA graphs on a GPU."""
    runs = prepare_runs([*calls] * math.ceil(RUN_CALLS / len(calls)), device)
    if device.type == "cuda" and runs.method != "graph":
        raise RuntimeError("its calls cannot be captured")
    return runs
