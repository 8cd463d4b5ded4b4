"""gemcut-bench serve-sim: the trace of a seed, what its requests got, and what they waited for."""

import json
import threading
from statistics import mean

import numpy as np
import pytest
from planted_engines import skip_ceilings

from gemcut.bench import cli
from gemcut.bench.engines import serve_sim
from gemcut.bench.engines.serve_sim import Arrival, Served, draw_trace, measured, queue_seconds
from gemcut.engine import Engine

TRACE = {"rate": 50.0, "requests": 400, "prompt_tokens": 40, "new_tokens": 20, "limit": 512}
SMALL = ["--requests", "6", "--prompt-tokens", "8", "--new-tokens", "4", "--batch", "2"]
LATENCIES = ("first_token_ms", "between_tokens_ms", "longest_gap_ms", "queue_ms")


@pytest.fixture(autouse=True)
def ceilings(monkeypatch):
    skip_ceilings(monkeypatch)


def simulate(*arguments, capsys):
    code = cli.main(["serve-sim", "--device", "cpu", *SMALL, *arguments])
    lines = capsys.readouterr().out.splitlines()
    return code, "\n".join(lines[:-1]), json.loads(lines[-1])


def test_a_seed_gives_the_same_trace():
    assert draw_trace(**TRACE, seed=3) == draw_trace(**TRACE, seed=3)
    assert draw_trace(**TRACE, seed=3) != draw_trace(**TRACE, seed=4)


def test_the_rate_alone_changes_the_arrivals_alone():
    slow, fast = (draw_trace(**(TRACE | {"rate": rate}), seed=0) for rate in (1.0, 2.0))
    assert [a.at for a in slow] == pytest.approx([2 * a.at for a in fast])
    assert [a.prompt_tokens for a in slow] == [a.prompt_tokens for a in fast]


def test_a_trace_has_the_means_that_were_asked_for():
    trace = draw_trace(**(TRACE | {"requests": 4000, "limit": 8192}), seed=0)
    assert trace[0].at == 0
    assert trace[-1].at == pytest.approx(4000 / 50, rel=0.05)
    waits = np.diff([arrival.at for arrival in trace])
    assert waits.std() == pytest.approx(waits.mean(), rel=0.05)  # exponential
    assert mean(arrival.prompt_tokens for arrival in trace) == pytest.approx(40, rel=0.05)
    assert mean(arrival.new_tokens for arrival in trace) == pytest.approx(20, rel=0.05)


def test_every_request_fits_a_slot():
    trace = draw_trace(**(TRACE | {"limit": 32}), seed=0)
    assert all(a.prompt_tokens >= 1 and a.new_tokens >= 2 for a in trace)
    assert max(a.prompt_tokens + a.new_tokens for a in trace) == 32


def test_command_prints_percentiles_and_one_json_object(capsys, tmp_path):
    file = tmp_path / "serve.json"
    code, text, report = simulate("--rate", "40", "400", "--json", str(file), capsys=capsys)
    assert code == 0
    assert json.loads(file.read_text()) == report
    assert (report["benchmark"], report["interrupted"]) == ("serve-sim", False)
    assert [record["case"] for record in report["rows"]] == ["demo/rate=40", "demo/rate=400"]
    for record, rate in zip(report["rows"], (40.0, 400.0), strict=True):
        assert (record["contestant"], record["status"], record["model"]) == ("gemcut", "ok", "demo")
        assert (record["rate"], record["requests"], record["batch"]) == (rate, 6, 2)
        assert (record["served"], record["failed"]) == (6, 0)
        trace = draw_trace(rate=rate, requests=6, prompt_tokens=8, new_tokens=4, limit=512, seed=0)
        assert record["generated_tokens"] == sum(arrival.new_tokens for arrival in trace)
        for name in LATENCIES:
            one = record[name]
            assert len(one["all"]) == 6
            assert one["low"] <= one["p50"] <= one["p90"] <= one["p99"] <= one["high"]
            assert one["p50"] == pytest.approx(one["median"])
            assert name in text
        assert record["first_token_ms"]["low"] > 0
        assert all(
            first >= queued
            for first, queued in zip(
                record["first_token_ms"]["all"], record["queue_ms"]["all"], strict=True
            )
        )
        assert record["tokens_per_second"]["median"] > 0
    assert report["rows"][1]["queue_ms"]["high"] > 0  # six at once on two slots


def test_a_request_that_fails_is_counted_and_the_others_are_served(monkeypatch, capsys):
    stream, calls, lock = Engine.stream, [], threading.Lock()

    def refuse_one(self, prompt, params):
        with lock:
            calls.append(prompt)
            number = len(calls)
        if number == 3:
            raise RuntimeError("the third\nof them")
        return stream(self, prompt, params)

    monkeypatch.setattr(Engine, "stream", refuse_one)
    code, text, report = simulate("--rate", "100", capsys=capsys)
    assert code == 1
    (record,) = report["rows"]
    assert (record["status"], record["served"], record["failed"]) == ("failed", 5, 1)
    assert record["detail"] == "1 of 6 requests: RuntimeError: the third"
    assert len(record["first_token_ms"]["all"]) == 5
    assert "failed: 1 of 6 requests" in text


def test_a_request_with_a_token_too_few_has_failed(monkeypatch, capsys):
    stream = Engine.stream

    def cut_short(self, prompt, params):
        return list(stream(self, prompt, params))[:-1]

    monkeypatch.setattr(Engine, "stream", cut_short)
    code, _, report = simulate("--rate", "100", capsys=capsys)
    assert code == 1
    (record,) = report["rows"]
    assert (record["status"], record["served"], record["failed"]) == ("failed", 0, 6)
    assert "tokens, where" in record["detail"]
    assert "first_token_ms" not in record


def test_too_little_memory_says_how_much(monkeypatch, capsys):
    monkeypatch.setattr("gemcut.bench.engines.setup.free_bytes", lambda device: 1000)
    code, text, report = simulate("--rate", "100", "200", capsys=capsys)
    assert code == 1
    assert [record["status"] for record in report["rows"]] == ["no memory", "no memory"]
    assert "GB are missing on cpu" in text


def test_an_interrupted_run_keeps_what_was_served(monkeypatch, capsys):
    def interrupt(futures):
        for future in futures[:2]:
            future.result()
        raise KeyboardInterrupt

    monkeypatch.setattr(serve_sim, "wait", interrupt)
    # the later requests must not be waited for
    trace = [Arrival(at, 4, 3) for at in (0.0, 0.1, 600.0, 600.0)]
    monkeypatch.setattr(serve_sim, "draw_trace", lambda **settings: trace)
    code, text, report = simulate("--rate", "1", capsys=capsys)
    assert code == 130
    assert report["interrupted"]
    (record,) = report["rows"]
    assert record["served"] == 2
    assert record["failed"] == 0
    assert "interrupted: what was served is kept" in text


def test_a_wait_for_a_slot_ends_as_soon_as_one_is_free():
    # two slots: the third waits for the end at 3, the fourth for that at 5, the last for none
    times = [(0.0, 0.5, 5.0), (1.0, 1.5, 3.0), (2.0, 3.5, 9.0), (2.5, 5.5, 6.0), (8.0, 8.5, 10.0)]
    served = [Served(Arrival(at, 1, 2), [first, end], end) for at, first, end in times]
    assert queue_seconds(served, 2) == [0.0, 0.0, 1.0, 2.5, 0.0]
    assert queue_seconds(served, 5) == [0.0] * 5
    # the end of the first is noted late: the fourth had its slot before
    served[0].token_times[-1] = 5.7
    assert queue_seconds(served, 2) == [0.0, 0.0, 1.0, 3.0, 0.0]
    # the first to arrive is not always served first
    served[0].token_times[-1] = 5.0
    assert queue_seconds(served[::-1], 2) == [0.0, 2.5, 1.0, 0.0, 0.0]


def test_latencies_count_from_the_arrival():
    served = [
        Served(Arrival(1.0, 4, 3), [1.5, 1.6, 2.0], 2.0),
        Served(Arrival(2.0, 4, 3), [2.1, 2.2, 2.3], 2.3),
        Served(Arrival(9.0, 4, 3)),  # interrupted
    ]
    record = measured(served, 8)
    assert record["first_token_ms"]["all"] == pytest.approx([500, 100])
    assert record["between_tokens_ms"]["all"] == pytest.approx([250, 100])
    assert record["longest_gap_ms"]["all"] == pytest.approx([400, 100])
    assert record["tokens_per_second"]["all"] == pytest.approx([6 / 2.3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "0"], "rate 0.0 must be above 0"),
        (["--rate", "4", "nan"], "rate nan is not finite"),
        (["--requests", "0"], "requests 0 is outside 1.."),
        (["--batch", "0"], "batch 0 is outside 1.."),
        (["--new-tokens", "1"], "new tokens 1 is outside 2..511"),
        (["--prompt-tokens", "509"], "prompt tokens 509 is outside 1..508"),
        (["--seed", "-1"], "seed -1 is outside 0.."),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert cli.main(["serve-sim", "--device", "cpu", *SMALL, *arguments]) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
