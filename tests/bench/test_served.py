"""Replies of servers: which are whole, and what is measured of them, worked out by hand."""

import pytest

from gemcut.bench.engines.serve_sim import Arrival
from gemcut.bench.engines.served import (
    ERROR,
    LOST,
    REFUSED,
    WRONG,
    Reply,
    by_percentile,
    check_reply,
    measured,
    times_as_good,
)

WANTED = 12


def reply(due=0.0, times=(1.0, 1.5, 2.5), finished=3.0, ended=3.25, **values):
    """A whole reply of 12 tokens in three pieces."""
    usage = {"completion_tokens": WANTED, "prompt_tokens": 4}
    usual = {"finish_reason": "length", "done": True, "usage": usage}
    one = Reply(Arrival(due, 4, WANTED), **(usual | values))
    one.due_at, one.sent_at, one.piece_times = due, due + 0.25, list(times)
    one.finished_at, one.ended_at = finished, ended
    return one


def said(tokens):
    return {"usage": {"completion_tokens": tokens}}


@pytest.mark.parametrize(
    ("values", "to_the_end"),
    [
        pytest.param({}, True, id="all-there"),
        pytest.param({"usage": None}, True, id="nothing-counted"),
        pytest.param({"usage": None, "counted": 12}, True, id="counted-by-the-stream"),
        pytest.param({"counted": 12}, True, id="counted-twice-alike"),
        pytest.param({"times": (1.0,), "usage": None}, True, id="one-piece-and-no-count"),
        pytest.param({"finish_reason": "stop", **said(7)}, False, id="ended-by-itself"),
    ],
)
def test_a_whole_reply_has_no_failure(values, to_the_end):
    one = reply(**values)
    check_reply(one, to_the_end)
    assert (one.kind, one.detail) == (None, "")


@pytest.mark.parametrize(
    ("values", "to_the_end", "kind", "detail"),
    [
        ({"finish_reason": None}, True, LOST, "ended without a finish_reason"),
        ({"done": False}, True, LOST, "ended without [DONE]"),
        ({"finish_reason": "stop"}, True, WRONG, "finish_reason 'stop', not length"),
        ({"finish_reason": "abort"}, False, WRONG, "'abort', not length or stop"),
        ({"counted": 11}, True, WRONG, "usage says 12 tokens, the stream had 11"),
        ({**said(2)}, False, WRONG, "usage says 2 tokens, but 3 pieces had text"),
        ({**said(11)}, True, WRONG, "11 tokens, where 12 were asked for"),
        ({**said(13)}, False, WRONG, "13 tokens, where 12 were asked for"),
        ({"usage": None, "counted": 11}, True, WRONG, "11 tokens, where 12 were asked for"),
        ({"times": ()}, True, WRONG, "there was no text"),
        ({"times": (1.0,)}, True, WRONG, "12 tokens came in one piece: that is no stream"),
    ],
)
def test_a_reply_that_lacks_something_is_told(values, to_the_end, kind, detail):
    one = reply(**values)
    check_reply(one, to_the_end)
    assert one.kind == kind
    assert detail in one.detail


def test_the_first_failure_is_the_reason():
    one = reply(finish_reason=None)
    one.fail(REFUSED, "429")
    check_reply(one, True)
    assert (one.kind, one.detail) == (REFUSED, "429")


def test_latencies_count_from_the_arrival():
    first = reply()
    second = reply(2.0, (5.0, 5.5), 5.5, 6.0)
    record = measured([[first], [second]])
    assert record["first_token_ms"]["all"] == [1000, 3000]
    assert record["between_tokens_ms"]["all"] == pytest.approx([2000 / 11, 500 / 11])
    assert record["longest_gap_ms"]["all"] == [1000, 500]
    assert record["request_ms"]["all"] == [3250, 4000]
    assert record["request_tokens_per_second"]["all"] == [12 / 3.25, 3]
    assert record["tokens_per_second"]["all"] == [12 / 3.25, 3]
    assert record["requests_per_second"]["all"] == [1 / 3.25, 1 / 4]
    assert record["client_late_ms"]["all"] == [250, 250]
    assert (record["served"], record["failed"], record["generated_tokens"]) == (2, 0, 24)
    assert record["tokens_counted_by"] == "usage"
    assert "status" not in record


def test_a_wait_for_the_end_of_the_text_is_a_gap():
    record = measured([[reply(times=(1.0, 1.5), finished=4.0)]])
    assert record["longest_gap_ms"]["all"] == [2500]


def test_pieces_that_come_together_have_a_gap_above_zero():
    record = measured([[reply(times=(1.0, 1.0), finished=1.0)]])
    assert record["longest_gap_ms"]["low"] > 0
    assert record["between_tokens_ms"]["low"] > 0


def test_failures_are_counted_by_kind_and_leave_the_others_numbers():
    failed = []
    for kind in (LOST, REFUSED, LOST, ERROR):
        failed.append(reply(due=0.5))
        failed[-1].fail(kind, f"{kind} it is")
    record = measured([[reply(due=1.0), *failed], failed[:1]])
    assert (record["served"], record["failed"]) == (1, 5)
    assert [record[kind] for kind in (REFUSED, LOST, ERROR, WRONG)] == [1, 3, 1, 0]
    assert record["status"] == "failed"
    assert record["detail"] == "of 6 requests 1 refused, 3 lost, 1 error; the first: lost it is"
    assert record["first_token_ms"]["all"] == [0.0]
    # those that failed had arrived too: 0.5 is the first arrival
    assert record["tokens_per_second"]["all"] == [12 / 2.75]
    assert "first_token_ms" not in measured([failed])


def test_a_percentile_is_what_so_many_requests_are_as_good_as():
    values = [float(value) for value in range(101)]
    latency = by_percentile([values], slow_is_low=False)
    rate = by_percentile([values], slow_is_low=True)
    assert [latency[p] for p in ("p50", "p90", "p99")] == [50, 90, 99]
    assert [rate[p] for p in ("p50", "p90", "p99")] == [50, 10, 1]
    assert latency["all"] == values


def test_ratios_are_taken_within_rounds():
    fast, slow = (
        {
            "first_token_ms": by_percentile(rounds, slow_is_low=False),
            "tokens_per_second": {"all": [1 / one[0] for one in rounds]},
        }
        for rounds in ([[1.0, 3.0], [10.0, 30.0]], [[2.0, 6.0], [40.0, 120.0]])
    )
    ratio = times_as_good(fast, slow, "first_token_ms", "p50")
    assert (ratio.low, ratio.median, ratio.high) == (2, 3, 4)
    ratio = times_as_good(fast, slow, "tokens_per_second", None)
    assert (ratio.low, ratio.high) == (2, 4)
