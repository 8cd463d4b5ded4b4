"""What servers answered, reply by reply: whether it is whole, and how long it took.

    first_token_ms              from a request's arrival to its first text
    between_tokens_ms           between two tokens of a request, in the mean up to its finish_reason
    longest_gap_ms              between two pieces of text of a request, at most
    request_ms                  from a request's arrival to the end of its stream
    request_tokens_per_second   of one request, over its request_ms
    tokens_per_second           of all requests of a round, from the first arrival to the last end
    requests_per_second         the same, of requests that were answered

`all` has a value for each request, round after round, in the order of arrival; of the last two, for
each round.  p50, p90 and p99 are what so many percent of the requests are at least as good as, so
of a rate the slow ones; `rounds` has them round by round.  Ratios of two servers are taken there.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gemcut.bench.engines.serve_sim import PERCENTILES, Arrival
from gemcut.bench.measure.report_file import FAILED, Record, metric
from gemcut.bench.measure.timing import Spread

LATENCIES = ("first_token_ms", "between_tokens_ms", "longest_gap_ms", "request_ms")
BY_REQUEST = (*LATENCIES, "request_tokens_per_second")
BY_ROUND = ("tokens_per_second", "requests_per_second")
STREAMED = 8  # tokens; fewer may make one piece of text
LEAST_MS = 1e-3  # of a gap: pieces may come together, but ratios are taken
FAILURES = REFUSED, LOST, ERROR, WRONG = "refused", "lost", "error", "wrong"


@dataclass
class Reply:
    """One request and what came back; times are seconds of one clock."""

    arrival: Arrival
    due_at: float = 0.0
    sent_at: float = 0.0
    piece_times: list[float] = field(default_factory=list)  # of pieces with text
    ended_at: float = 0.0
    finished_at: float = 0.0  # the last piece, or the finish_reason after it
    finish_reason: str | None = None
    done: bool = False  # [DONE] has come
    usage: Mapping[str, Any] | None = None
    counted: int = 0  # tokens that were listed one by one, by their ids or log-probabilities
    kind: str | None = None  # of the failure
    detail: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of the answer: as the server counted them, else as they could be counted."""
        said = None if self.usage is None else self.usage.get("completion_tokens")
        return said if isinstance(said, int) else self.counted or len(self.piece_times)

    def fail(self, kind: str, detail: str) -> None:
        """Note a failure, unless an earlier one explains it."""
        if self.kind is None:
            self.kind, self.detail = kind, detail


def check_reply(reply: Reply, to_the_end: bool) -> None:
    """Note as a failure what a whole stream does not look like.

    `to_the_end`: the server was asked to go on to the last token, past an end of text.
    """
    wanted = reply.arrival.new_tokens
    if reply.finish_reason is None:
        reply.fail(LOST, "the stream ended without a finish_reason")
    if not reply.done:
        reply.fail(LOST, "the stream ended without [DONE]")
    fine = ("length",) if to_the_end else ("length", "stop")
    if reply.finish_reason not in fine:
        reply.fail(WRONG, f"finish_reason {reply.finish_reason!r}, not {' or '.join(fine)}")
    if reply.counted and reply.counted != reply.tokens:
        reply.fail(WRONG, f"usage says {reply.tokens} tokens, the stream had {reply.counted}")
    if len(reply.piece_times) > reply.tokens:
        pieces = len(reply.piece_times)
        reply.fail(WRONG, f"usage says {reply.tokens} tokens, but {pieces} pieces had text")
    # without usage there is no count: a piece may hold several tokens, and some tokens no text
    counts = reply.usage is not None or reply.counted > 0
    if counts and (reply.tokens != wanted if to_the_end else reply.tokens > wanted):
        reply.fail(WRONG, f"{reply.tokens} tokens, where {wanted} were asked for")
    if not reply.piece_times:
        reply.fail(WRONG, "there was no text")
    elif len(reply.piece_times) == 1 and reply.tokens >= STREAMED:
        reply.fail(WRONG, f"{reply.tokens} tokens came in one piece: that is no stream")


def measured(rounds: Sequence[Sequence[Reply]]) -> Record:
    """The metrics of the replies that are whole, and how the others failed."""
    replies = [reply for one in rounds for reply in one]
    failed = [reply for reply in replies if reply.kind is not None]
    kinds = Counter(reply.kind for reply in failed)
    record: Record = {"served": len(replies) - len(failed), "failed": len(failed)}
    record |= {kind: kinds[kind] for kind in FAILURES}
    if failed:
        counts = ", ".join(f"{kinds[kind]} {kind}" for kind in FAILURES if kinds[kind])
        record["status"] = FAILED
        record["detail"] = f"of {len(replies)} requests {counts}; the first: {failed[0].detail}"
    kept = [one for one in rounds if any(reply.kind is None for reply in one)]
    whole = [[reply for reply in one if reply.kind is None] for one in kept]
    if not whole:
        return record
    record["generated_tokens"] = sum(reply.tokens for one in whole for reply in one)
    record["tokens_counted_by"] = (
        "usage" if all(r.usage is not None for one in whole for r in one) else "pieces"
    )
    record["client_late_ms"] = metric(
        [1e3 * max(reply.sent_at - reply.due_at for reply in one) for one in whole]
    )
    for name in BY_REQUEST:
        values = [[_value(name, reply) for reply in one] for one in whole]
        record[name] = by_percentile(values, slow_is_low=name.endswith("_per_second"))
    spans = [
        max(reply.ended_at for reply in one) - min(reply.due_at for reply in every)
        for one, every in zip(whole, kept, strict=True)
    ]
    tokens = [sum(reply.tokens for reply in one) for one in whole]
    for name, counts in zip(BY_ROUND, (tokens, [len(one) for one in whole]), strict=True):
        record[name] = metric([n / span for n, span in zip(counts, spans, strict=True)])
    return record


def _value(name: str, reply: Reply) -> float:
    first = reply.piece_times[0]
    if name == "first_token_ms":
        return 1e3 * (first - reply.due_at)
    if name == "between_tokens_ms":
        return max(LEAST_MS, 1e3 * (reply.finished_at - first) / max(1, reply.tokens - 1))
    if name == "longest_gap_ms":
        times = [*reply.piece_times, reply.finished_at]
        return max(LEAST_MS, 1e3 * float(np.diff(times).max()))
    seconds = reply.ended_at - reply.due_at
    return 1e3 * seconds if name == "request_ms" else reply.tokens / seconds


def by_percentile(rounds: Sequence[Sequence[float]], *, slow_is_low: bool) -> dict[str, Any]:
    """A metric of requests, with its percentiles over all of them and in each round."""
    ranks = [100 - p if slow_is_low else p for p in PERCENTILES]
    every = [value for one in rounds for value in one]
    names = [f"p{p}" for p in PERCENTILES]
    overall = dict(zip(names, map(float, np.percentile(every, ranks)), strict=True))
    each = [np.percentile(one, ranks).tolist() for one in rounds]
    by_round = dict(zip(names, map(list, zip(*each, strict=True)), strict=True))
    return metric(every) | overall | {"rounds": by_round}


def times_as_good(record: Record, other: Record, name: str, percentile: str | None) -> Spread:
    """How many times as fast `record` is as `other`, round by round."""
    values = [
        one[name]["all"] if percentile is None else one[name]["rounds"][percentile]
        for one in (record, other)
    ]
    power = 1 if name.endswith("_per_second") else -1
    return Spread.of([(a / b) ** power for a, b in zip(*values, strict=False)])
