"""gemcut-bench serve: what is asked of servers, what is measured, and which failures are seen."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import fake_openai as fake
import pytest
from fake_openai import CUT, FakeServer, Reply, chunk, event, usage, well
from processes import ENVIRONMENT, PATIENCE

from gemcut.bench import cli
from gemcut.bench.engines import serve
from gemcut.bench.engines.serve import WORDS, make_prompts, name_urls
from gemcut.bench.engines.serve_sim import Arrival, draw_trace

pytest.importorskip("aiohttp")
from gemcut.bench.engines.openai_load import Server

SMALL = ["--requests", "6", "--rounds", "2", "--prompt-tokens", "16", "--new-tokens", "12"]


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch):
    monkeypatch.delenv("GEMCUT_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def measure(capsys):
    """Run the command: exit code, what is printed before the report, the report."""

    def measure(*arguments):
        code = cli.main(["serve", *SMALL, *arguments])
        lines = capsys.readouterr().out.splitlines()
        return code, "\n".join(lines[:-1]), json.loads(lines[-1])

    return measure


def timed_requests(server):
    """The requests of the rounds, without those before them."""
    return server.answered[2 + serve.WARM_UP :]


def test_two_servers_take_turns_under_the_same_trace(measure, tmp_path):
    file = tmp_path / "serve.json"
    with FakeServer() as one, FakeServer(lambda asked: well(asked, 0.004)) as two:
        arguments = ["--url", f"quick={one.url}", "--url", two.url, "--json", str(file)]
        code, text, report = measure(*arguments, "--rate", "50", "--seed", "3")
    assert code == 0
    assert json.loads(file.read_text()) == report
    assert (report["benchmark"], report["interrupted"]) == ("serve", False)
    quick, slow = report["rows"]
    assert [one["contestant"] for one in (quick, slow)] == ["quick", two.url[7:-3]]
    trace = draw_trace(
        rate=50.0, requests=6, prompt_tokens=16, new_tokens=12, limit=1 << 19, seed=3
    )
    for server, record in ((one, quick), (two, slow)):
        assert (record["case"], record["status"]) == ("fake-1b/rate=50", "ok")
        assert (record["served"], record["failed"]) == (12, 0)
        assert record["generated_tokens"] == 2 * sum(arrival.new_tokens for arrival in trace)
        assert record["tokens_counted_by"] == "usage"
        for name in ("first_token_ms", "between_tokens_ms", "longest_gap_ms", "request_ms"):
            assert len(record[name]["all"]) == 12
            assert record[name]["p50"] <= record[name]["p90"] <= record[name]["p99"]
            assert len(record[name]["rounds"]["p99"]) == 2
            assert f"quick  {name}" in text
        assert len(record["tokens_per_second"]["all"]) == 2
        rounds = timed_requests(server)
        assert len(rounds) == 12
        for asked, arrival in zip(rounds[:6], trace, strict=True):  # sent as they arrive
            body = asked.body
            assert (body["max_tokens"], body["ignore_eos"]) == (arrival.new_tokens, True)
            assert (body["temperature"], body["stream"]) == (0, True)
            assert body["stream_options"] == {"include_usage": True}
            # the fake server counts 5 tokens and one for each word
            assert len(body["prompt"].split()) == max(1, arrival.prompt_tokens - 5)
    assert slow["between_tokens_ms"]["low"] >= 4
    assert "quick over" in text


def test_a_closed_loop_keeps_so_many_requests_under_way(measure):
    lock = threading.Lock()
    under_way, seen = [0], []

    def respond(asked):
        def parts():
            with lock:
                under_way[0] += 1
                seen.append(under_way[0])
            *before, end = well(asked, 0.01).parts
            yield from before
            with lock:  # before the client can know that it ends, and ask again
                under_way[0] -= 1
            yield end

        return Reply(parts())

    with FakeServer(respond) as server:
        _, _, report = measure("--url", server.url, "--concurrency", "3", "--requests", "12")
    (record,) = report["rows"]
    assert (record["case"], record["status"]) == ("fake-1b/concurrency=3", "ok")
    assert record["client_late_ms"]["high"] == 0
    assert max(seen[2 + serve.WARM_UP :]) == 3


def test_chats_are_asked_as_chats(measure):
    with FakeServer() as server:
        code, _, report = measure("--chat", "--url", server.url, "--rate", "50")
    assert code == 0
    assert {asked.path for asked in server.answered} == {"/v1/chat/completions"}
    messages = timed_requests(server)[0].body["messages"]
    assert [message["role"] for message in messages] == ["user"]
    assert report["rows"][0]["endpoint"] == "chat/completions"


def test_the_key_is_sent_and_never_kept(measure):
    with FakeServer() as server:
        _, text, report = measure("--url", server.url, "--rate", "50", "--api-key", "sesame")
    assert {asked.headers["Authorization"] for asked in server.asked} == {"Bearer sesame"}
    assert "sesame" not in text + json.dumps(report)


def test_a_request_that_waits_is_waited_for_from_its_arrival(measure):
    """A server that serves one request at a time: those that arrive meanwhile wait."""
    lock = threading.Lock()

    def one_at_a_time(asked):
        def parts():
            with lock:
                yield 0.05
                yield from well(asked).parts

        return Reply(parts())

    with FakeServer(one_at_a_time) as server:
        _, _, report = measure("--url", server.url, "--rate", "1e5", "--rounds", "1")
    times = sorted(report["rows"][0]["first_token_ms"]["all"])
    assert all(value >= 50 * (i + 1) for i, value in enumerate(times))


def cut_short(asked, *parts):
    return Reply([chunk(asked, "a"), chunk(asked, "b"), *parts])


def without_done(asked):
    return Reply(list(well(asked).parts)[:-1])


def counted_wrong(asked):
    parts = list(well(asked).parts)
    parts[-2] = usage(asked.body["max_tokens"] + 1)
    return Reply(parts)


def too_few(asked):
    tokens = asked.body["max_tokens"] - 1
    end = (chunk(asked, None, "length"), usage(tokens), event("[DONE]"))
    return Reply([*(chunk(asked, "a") for _ in range(tokens)), *end])


@pytest.mark.parametrize(
    ("respond", "kind", "detail"),
    [
        pytest.param(lambda asked: fake.error(429, "busy"), "refused", "429 busy", id="429"),
        pytest.param(
            lambda asked: Reply([b"{}"], kind="application/json"), "refused", "no stream", id="json"
        ),
        pytest.param(lambda asked: cut_short(asked, CUT), "lost", "broke off", id="cut"),
        pytest.param(lambda asked: cut_short(asked), "lost", "without a finish_reason", id="end"),
        pytest.param(without_done, "lost", "without [DONE]", id="no-done"),
        pytest.param(
            lambda asked: cut_short(asked, 2.0), "lost", "broke off: ", id="silent"
        ),
        pytest.param(
            lambda asked: cut_short(asked, event({"error": {"message": "no\nmemory"}})),
            "error",
            "no memory",
            id="error-event",
        ),
        pytest.param(
            lambda asked: cut_short(asked, event("{")), "error", "no JSON object", id="garbage"
        ),
        pytest.param(counted_wrong, "wrong", "tokens, where", id="counted-wrong"),
        pytest.param(too_few, "wrong", "tokens, where", id="a-token-too-few"),
        pytest.param(
            lambda asked: well(fake.Asked(asked.path, {}, {**asked.body, "stream_options": {}})),
            None,
            "",
            id="no-usage-is-no-failure",
        ),
    ],
)  # fmt: skip
def test_a_failure_is_counted_and_the_others_are_served(measure, respond, kind, detail):
    with FakeServer() as server:
        # after two requests that count words and the warm-up, the second of the trace fails
        server.respond = lambda asked: (
            respond(asked) if len(server.answered) == serve.WARM_UP + 4 else well(asked)
        )
        arguments = ["--concurrency", "1", "--rounds", "1", "--patience", "1"]
        code, text, report = measure("--url", server.url, *arguments)
    (record,) = report["rows"]
    counts = {name: record[name] for name in ("refused", "lost", "error", "wrong")}
    assert counts == {name: int(name == kind) for name in counts}
    assert record["failed"] == code == int(kind is not None)
    assert record["served"] == 6 - record["failed"]
    assert len(record["first_token_ms"]["all"]) == record["served"]
    assert detail in record["detail"]
    assert record["detail"] in text
    assert record["tokens_counted_by"] == ("pieces" if kind is None else "usage")


@pytest.mark.parametrize("chat", [[], ["--chat"]], ids=["completions", "chat"])
def test_usage_is_held_to_the_tokens_listed_one_by_one(capsys, chat):
    def listing(asked, short):
        """Well, with log-probabilities of each token where they are asked for."""
        if "logprobs" not in asked.body:
            return well(asked)
        parts = []
        for part in well(asked).parts:
            if isinstance(part, bytes) and b'"choices": [{' in part:
                value = json.loads(part[6:])
                choice = value["choices"][0]
                text = choice.get("text") or choice.get("delta", {}).get("content")
                tokens = [text] if text and not (short and text == " w1") else []
                kind = {"content": [{"token": t} for t in tokens]} if chat else {"tokens": tokens}
                choice["logprobs"] = kind
                part = event(value)
            parts.append(part)
        return Reply(parts)

    for short in (False, True):
        with FakeServer(lambda asked, short=short: listing(asked, short)) as server:
            code = cli.main(["serve", *SMALL, "--url", server.url, "--rate", "50", *chat])
        assert "logprobs" in server.answered[0].body
        assert code == int(short)
    assert capsys.readouterr().err == (
        f"gemcut-bench: {server.url}: usage says 4 tokens, the stream had 3\n"
    )


def test_a_server_that_refuses_log_probabilities_is_measured_without(measure):
    def refuse(asked):
        return fake.error(400, "no logprobs") if "logprobs" in asked.body else well(asked)

    with FakeServer(refuse) as server:
        assert measure("--url", server.url, "--rate", "50")[0] == 0


def test_models_are_found_or_named(measure, capsys):
    with FakeServer() as one, FakeServer() as two:
        two.models = lambda: fake.models("x", "y")
        urls = ["--url", one.url, "--url", two.url]
        assert cli.main(["serve", *SMALL, *urls]) == 1
        assert "has several models: name one with --model, of x, y" in capsys.readouterr().err
        code, _, report = measure(*urls, "--model", "a", "--model", "y", "--rate", "50")
    assert code == 0
    assert [{asked.body["model"] for asked in one.answered} for one in (one, two)] == [{"a"}, {"y"}]
    assert [record["model"] for record in report["rows"]] == ["a", "a"]


def test_the_longest_request_fits_what_the_server_says(measure):
    with FakeServer(max_model_len=40) as server:
        measure("--url", server.url, "--rate", "1000", "--requests", "200", "--rounds", "1")
    sizes = [
        5 + len(asked.body["prompt"].split()) + asked.body["max_tokens"]
        for asked in timed_requests(server)
    ]
    assert 30 <= max(sizes) <= 40
    assert len(sizes) == 200


def test_prompts_share_all_but_their_first_words_with_the_other_server_alone():
    server = Server("a", "u", "m", "", None, overhead=6.0, tokens_per_word=2.0)
    trace = [Arrival(0.0, 46, 2), Arrival(0.1, 7, 2), Arrival(0.2, 1, 2)]
    first, other, later = (
        make_prompts(trace, server, *who) for who in ((0, 0, 0), (0, 0, 1), (0, 1, 0))
    )
    assert [len(prompt.split()) for prompt in first] == [20, 1, 1]
    a, b, c = (prompts[0].split() for prompts in (first, other, later))
    assert a[4:] == b[4:] != c[4:]
    assert a[:4] != b[:4]
    assert set(a) <= set(WORDS)
    assert make_prompts(trace, server, 0, 0, 0) == first


def test_names_of_servers():
    assert name_urls(["a=http://x/v1/", "http://y:8/v1", "http://y:8/v1"]) == {
        "a": "http://x/v1",
        "y:8": "http://y:8/v1",
        "y:8 (2)": "http://y:8/v1",
    }
    with pytest.raises(ValueError, match="two servers are named 'a'"):
        name_urls(["a=http://x/v1", "a=http://y/v1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "localhost"], "url 'localhost' is not an address such as"),
        (["--url", "http://127.0.0.1:9/v1"], "http://127.0.0.1:9/v1: "),
        (["--rate", "0"], "rate 0.0 must be above 0"),
        (["--concurrency", "0"], "concurrency 0 is outside 1.."),
        (["--rate", "1", "--concurrency", "1"], "--rate and --concurrency exclude each other"),
        (["--model", "a", "--model", "b", "--model", "c"], "but 3 --model"),
        (["--rounds", "0"], "rounds 0 is outside 1.."),
        (["--new-tokens", "1"], "new tokens 1 is outside 2.."),
        (["--max-seq-len", "20"], "prompt tokens 16 is outside 1..8"),
        (["--temperature", "nan"], "temperature nan is not finite"),
        (["--patience", "0"], "patience 0.0 must be above 0"),
        (["--api-key", ""], "the API key is empty"),
        (["--json", "no/such.json"], "there is no such folder"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    with FakeServer() as server:
        url = [] if "--url" in arguments else ["--url", server.url]
        assert cli.main(["serve", *SMALL, *url, *arguments]) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert server.answered == []


def test_a_server_that_does_not_answer_at_all_is_one_line(capsys):
    with FakeServer(lambda asked: fake.error(500, "out of\norder")) as server:
        assert cli.main(["serve", *SMALL, "--url", server.url]) == 1
    assert capsys.readouterr().err == f"gemcut-bench: {server.url}: 500 out of order\n"


def test_it_says_which_package_it_needs(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "gemcut.bench.engines.openai_load", raising=False)
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    assert cli.main(["serve", "--url", "http://127.0.0.1:9/v1"]) == 1
    assert capsys.readouterr().err == f"gemcut-bench: {serve.NEEDS_AIOHTTP}\n"


def test_ctrl_c_keeps_whole_rounds_and_leaves_no_stream(tmp_path):
    """In a process of its own: the first round is whole, the second never ends."""
    file = tmp_path / "serve.json"
    with FakeServer() as server:
        before = 2 + serve.WARM_UP + 6
        server.respond = lambda asked: (
            well(asked)
            if len(server.answered) <= before
            else Reply(part for _ in range(3000) for part in (chunk(asked, "a"), 0.01))
        )
        code = "import sys; from gemcut.bench.cli import main; sys.exit(main())"
        command = [sys.executable, "-P", "-c", code, "serve", *SMALL, "--concurrency", "6"]
        running = subprocess.Popen(
            [*command, "--url", server.url, "--json", str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        )
        deadline = time.monotonic() + PATIENCE
        while len(server.answered) < before + 6:
            assert time.monotonic() < deadline
            assert running.poll() is None, running.communicate()
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=PATIENCE)
        assert (running.returncode, err) == (130, b"")
        assert all(asked.left.wait(PATIENCE) for asked in server.answered[before:])
    report = json.loads(out.splitlines()[-1])
    assert report == json.loads(file.read_text())
    assert report["interrupted"]
    assert [record["served"] for record in report["rows"]] == [6]
