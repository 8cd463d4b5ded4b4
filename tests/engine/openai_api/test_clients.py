"""`gemcut chat --url` and `gemcut-bench serve` against the server itself."""

import json

import pytest
from processes import GREEDY
from servers import wait_until
from terminals import PROMPT

from gemcut.bench import cli as bench


def test_a_chat_with_the_server_is_the_chat_with_its_engine(run, server, demo):
    brief = [*GREEDY, "--max-tokens", "20", "--ignore-eos", "--system", "You are Watson."]
    stdin = "Who is it?\nŽižkov?\n/reset\nWhy?\n".encode()
    there = run("chat", "--url", f"{server.url}/v1", *brief, stdin=stdin)
    here = run("chat", *brief, stdin=stdin)
    assert there == here
    assert there[0] == 0
    assert there[1].count("\n") >= 3


def test_what_the_server_refuses_is_one_line(run, server):
    code, out, err = run("chat", "nobody", "--url", f"{server.url}/v1", stdin=b"a\n")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "404" in err
    assert "nobody" in err
    code, out, err = run("chat", "--url", f"{server.url}/v1", "--top-p", "2", stdin=b"a\nb\n")
    assert (code, out, err.count("\n")) == (1, "", 2)
    assert "400 Bad Request" in err
    assert "top_p" in err


@pytest.mark.parametrize("chat", [[], ["--chat"]], ids=["completions", "chat"])
def test_every_stream_of_the_trace_is_whole(server, capsys, chat):
    pytest.importorskip("aiohttp")
    url = ["--url", f"{server.url}/v1"]
    sizes = ["--requests", "12", "--rounds", "2", "--prompt-tokens", "40", "--new-tokens", "12"]
    code = bench.main(["serve", *url, *url, *sizes, "--concurrency", "6", *chat])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [record["detail"] for record in report["rows"]] == ["", ""]
    assert code == 0
    for record in report["rows"]:
        assert (record["served"], record["tokens_counted_by"]) == (24, "usage")
        assert record["model"] == server.service.settings.model_names[0]


def test_ctrl_c_frees_the_slot(server, demo, slow_steps, terminal):
    chat = terminal("chat", "--url", f"{server.url}/v1", "--ignore-eos")
    chat.expect(PROMPT)
    chat.type(b"Who?\n")
    chat.expect(rb"\?\r\n.*\w")
    assert demo.metrics()["running"] == 1
    chat.type(b"\x03")
    chat.expect(rb"\^C\r\n>>> $")
    wait_until(lambda: demo.metrics()["running"] == 0)
