"""A comparison of two reports: how many times as fast the second is, beyond what noise explains.

Machines drift between runs, and within one.  The drift hits all contestants of a round alike, so a
record is taken beside its peers: its time in a round over the geometric mean of the times in it of
the contestants that both files share, gemcut excepted.  Bytes do not drift and are taken as they
are, and so is a record without a peer, where drift cannot be told from a change.  Where the peers
themselves changed threefold, the machine was another, which slows each differently: no verdict.

Of all ratios between a round of one file and a round of the other, the median estimates the change
(Hodges and Lehmann), and the k-th least and greatest bound it: k comes from the distribution of
Mann and Whitney's U, whatever the distribution of the noise.  A record is called faster or slower
where this interval is beyond 1 and the estimate beyond the threshold.  The threshold is for
what no round can show: two processes of the same code differ too, by where their memory is.
Under noise of 5 % ten rounds find a change of 20 % among 30 records nearly always, seven mostly.
"""

import math
import statistics
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from gemcut.bench.measure.report_file import OK, Record, print_table
from gemcut.bench.report.load import GEMCUT, Report, direction, figures, metrics, read_report

THRESHOLD = 0.05
ALPHA = 0.01  # of an interval: 1 - its level, at most
FAMILY_ALPHA = 0.05  # all intervals of gemcut together, where there are rounds enough for it
EXACT_ROUNDS = 50  # beyond them U is close to normal
MAX_DRIFT = 3.0  # of peers, either way
FASTER, SLOWER, SAME = "faster", "slower", "same"
TOO_FEW, OTHER_MACHINE = "too few rounds", "machine changed"
VERDICTS = (SLOWER, FASTER, SAME, TOO_FEW, OTHER_MACHINE)
Records = dict[tuple[str, str], Record]  # by case and contestant
NOTED = ("device", "cpu", "threads", "driver", "power_limit_w", "cuda", "commit")


@dataclass(frozen=True)
class Change:
    """One metric of one record: how many times as fast the second file is."""

    case: str
    contestant: str
    metric: str
    estimate: float
    interval: tuple[float, float] | None  # None: too few rounds for the level
    alpha: float  # 1 - the level that the interval has
    rounds: tuple[int, int]
    peers: tuple[str, ...]  # that the record was taken beside
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """What changed from one report to another."""

    notes: list[str]
    changes: list[Change]
    statuses: list[tuple[Record, Record]]  # records whose status changed: before, after
    gone: list[Record]
    new: list[Record]

    @property
    def own(self) -> list[Change]:
        """Gemcut's changes: only these can fail a comparison."""
        return [change for change in self.changes if change.contestant == GEMCUT]

    @property
    def failed(self) -> bool:
        """Whether gemcut became slower or worse."""
        slower = any(change.verdict == SLOWER for change in self.own)
        worse = [a for a, _ in self.statuses if a["contestant"] == GEMCUT and a["status"] == OK]
        return slower or bool(worse)

    @property
    def false_alarm(self) -> float:
        """A bound on the chance that a repeat shows a change of gemcut, beside its peers."""
        alphas = [change.alpha for change in self.own if change.interval is not None]
        return min(1.0, sum(alphas))


def run_compare(a: Path, b: Path, threshold: float = THRESHOLD) -> int:
    """Print how many times as fast B is as A; 1 where gemcut is slower or worse, else 0."""
    comparison = compare_reports(read_report(a), read_report(b), threshold)
    print_comparison(comparison, str(a), str(b))
    return int(comparison.failed)


def compare_reports(a: Report, b: Report, threshold: float = THRESHOLD) -> Comparison:
    """What changed from `a` to `b`; ValueError where they are of different benchmarks."""
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold {threshold} is outside 0..1")
    if a["benchmark"] != b["benchmark"]:
        raise ValueError(
            f"one file is of {a['benchmark']!r}, the other of {b['benchmark']!r}: "
            "there is nothing to compare"
        )
    before, after = _by_name(a), _by_name(b)
    both = [name for name in before if name in after]
    compared = [
        (record, metric)
        for record in (before[name] for name in both)
        for metric in metrics(record)
        if _timed(record, metric) and _timed(after[record["case"], record["contestant"]], metric)
    ]
    own = sum(record["contestant"] == GEMCUT for record, _ in compared)
    alpha = min(ALPHA, FAMILY_ALPHA / max(1, own))
    changes = [
        _change(record, metric, before, after, alpha, threshold) for record, metric in compared
    ]
    statuses = [(before[name], after[name]) for name in both]
    return Comparison(
        _notes(a, b),
        changes,
        [(record, other) for record, other in statuses if record["status"] != other["status"]],
        [record for name, record in before.items() if name not in after],
        [record for name, record in after.items() if name not in before],
    )


def _by_name(report: Report) -> Records:
    return {(record["case"], record["contestant"]): record for record in report["rows"]}


def _timed(record: Record, metric: str) -> bool:
    """Whether a record has a metric that a ratio can be taken of."""
    value = record.get(metric)
    return record["status"] == OK and isinstance(value, dict) and min(value["all"]) > 0


def _change(
    record: Record, metric: str, before: Records, after: Records, alpha: float, threshold: float
) -> Change:
    peers = _common_peers(record, metric, before, after)
    samples, peers_speed = [], []
    for records in (before, after):
        beside = [_speeds(records[record["case"], peer], metric) for peer in peers]
        mean = np.mean(beside, axis=0) if beside else np.zeros(1)
        samples.append(_speeds(records[record["case"], record["contestant"]], metric) - mean)
        peers_speed.append(np.median(mean))
    a, b = samples
    ratios = np.sort(np.exp(b[:, None] - a[None, :]), axis=None)
    estimate = float(np.median(ratios))
    rank, reached = interval_rank(len(a), len(b), alpha)
    interval, verdict = None, TOO_FEW
    if rank > 0:
        low, high = interval = float(ratios[rank - 1]), float(ratios[-rank])
        verdict = SAME
        if abs(peers_speed[1] - peers_speed[0]) > math.log(MAX_DRIFT):
            verdict = OTHER_MACHINE
        elif high < 1 and estimate < 1 - threshold:
            verdict = SLOWER
        elif low > 1 and estimate > 1 + threshold:
            verdict = FASTER
    return Change(
        case=record["case"],
        contestant=record["contestant"],
        metric=metric,
        estimate=estimate,
        interval=interval,
        alpha=reached,
        rounds=(len(a), len(b)),
        peers=peers,
        verdict=verdict,
    )


def _common_peers(record: Record, metric: str, before: Records, after: Records) -> tuple[str, ...]:
    """The peers that both files timed in the record's case and rounds, unchanged between them."""
    if metric.endswith("_bytes"):
        return ()

    def in_the_rounds(name: tuple[str, str], records: Records) -> bool:
        rounds = len(records[record["case"], record["contestant"]][metric]["all"])
        peer = records.get(name)
        return peer is not None and _timed(peer, metric) and len(peer[metric]["all"]) == rounds

    names = [(case, peer) for case, peer in before if case == record["case"]]
    return tuple(
        peer
        for case, peer in names
        if peer not in (GEMCUT, record["contestant"])
        and all(in_the_rounds((case, peer), records) for records in (before, after))
        and _identity(before[case, peer]) == _identity(after[case, peer])
    )


def _identity(peer: Record) -> tuple[object, object]:
    return peer.get("version"), peer.get("settings")


def _speeds(record: Record, metric: str) -> np.ndarray:
    """Logarithms of how fast a record was, round by round; means of them are geometric."""
    return direction(metric) * np.log(record[metric]["all"])


@cache
def interval_rank(n: int, m: int, alpha: float) -> tuple[int, float]:
    """The k of an interval from the k-th least to the k-th greatest of n * m ratios, and its alpha.

    The narrowest within `alpha`, or the widest there is if that is within ALPHA; k is 0 otherwise.
    """
    if max(n, m) > EXACT_ROUNDS:
        deviation = math.sqrt(n * m * (n + m + 1) / 12)
        z = statistics.NormalDist().inv_cdf(1 - alpha / 2)
        return max(0, math.floor((n * m + 1) / 2 - z * deviation)), alpha
    total, tail, rank, reached = math.comb(n + m, n), 0, 0, 1.0
    for count in mann_whitney_counts(n, m):
        tail += count
        two_sided = 2 * tail / total
        if two_sided > (alpha if rank else ALPHA):
            break
        rank, reached = rank + 1, two_sided
    return rank, reached


def mann_whitney_counts(n: int, m: int) -> list[int]:
    """How many of the orders of n and m values have U = 0, 1, ..., n * m.

    Their generating function is the Gaussian binomial: the product over i of
    (1 - q^(m + i)) / (1 - q^i).
    """
    counts = [1] + [0] * (n * m)
    for i in range(1, n + 1):
        for u in range(n * m, m + i - 1, -1):
            counts[u] -= counts[u - m - i]
        for u in range(i, n * m + 1):
            counts[u] += counts[u - i]
    return counts


def _notes(a: Report, b: Report) -> list[str]:
    """What else differs between two reports, as `name: before | after`."""
    notes = []
    old, new = a["machine"], b["machine"]
    if old["device"] != new["device"]:
        notes.append("the devices differ: beside peers, a ratio tells nothing of the devices")
    differing = {name: (old.get(name), new.get(name)) for name in NOTED}
    versions = [machine.get("versions", {}) for machine in (old, new)]
    for name in sorted(set(versions[0]) | set(versions[1])):
        differing[name] = versions[0].get(name), versions[1].get(name)
    differing["dtype"] = _dtypes(a), _dtypes(b)
    for name in sorted(set(a["arguments"]) | set(b["arguments"])):
        if name != "json":  # where the report itself went
            differing[f"argument {name}"] = a["arguments"].get(name), b["arguments"].get(name)
    notes += [f"{name}: {x} | {y}" for name, (x, y) in differing.items() if x != y]
    for report, which in ((a, "first"), (b, "second")):
        if report["interrupted"]:
            notes.append(f"the {which} run was interrupted")
    return notes


def _dtypes(report: Report) -> str:
    return ", ".join(sorted({str(one["dtype"]) for one in report["rows"] if "dtype" in one}))


def print_comparison(comparison: Comparison, a: str, b: str) -> None:
    """Print the comparison as a table; below it what has no ratio, and gemcut's sum."""
    print(f"A: {a}")
    print(f"B: {b}")
    for note in comparison.notes:
        print(f"note: {note}")
    print("how many times as fast B is as A: above 1, B is better (of bytes: it needs fewer)")
    header = ["case", "contestant", "metric", "B / A", "interval", "rounds", "beside", "verdict"]
    rows = []
    for one in comparison.changes:
        interval = "" if one.interval is None else " - ".join(f"{x:.3f}" for x in one.interval)
        rounds = "{} | {}".format(*one.rounds)
        cells = [one.case, one.contestant, one.metric, f"{one.estimate:.3f}", interval, rounds]
        rows.append([*cells, " ".join(one.peers) or "nobody", one.verdict])
    if rows:
        print_table(header, rows)
    for before, after in comparison.statuses:
        detail = f" ({after['detail']})" if after.get("detail") else ""
        print(f"{_name(before)}: {before['status']} -> {after['status']}{detail}")
    for which, only in (("A", comparison.gone), ("B", comparison.new)):
        for record in only:
            print(f"{_name(record)}: only in {which}")
    _print_sum(comparison)


def _print_sum(comparison: Comparison) -> None:
    verdicts = [change.verdict for change in comparison.own]
    counts = {name: verdicts.count(name) for name in VERDICTS}
    print("gemcut: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    alone = [one for one in comparison.own if not one.peers and not one.metric.endswith("_bytes")]
    if alone:
        print(f"{len(alone)} of them beside nobody: drift of the machine counts as a change there")
    chance = figures(100 * comparison.false_alarm, 2)
    print(f"a repeat beside the same peers calls any of them changed in at most {chance} % of runs")


def _name(record: Record) -> str:
    return f"{record['contestant']} in {record['case']}"
