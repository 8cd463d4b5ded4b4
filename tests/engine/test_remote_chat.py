"""`gemcut chat --url`: what it asks of a server, what it shows, and what it says of failures."""

import signal
import subprocess
import sys
import time

import fake_openai as fake
import pytest
from fake_openai import CUT, FakeServer, Reply, chunk, event, well
from processes import COMMAND, ENVIRONMENT, PATIENCE, error_line
from terminals import PROMPT

from gemcut.engine import cli, cli_options
from gemcut.engine.openai_wire import API_KEYS


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch):
    for name in API_KEYS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server():
    with FakeServer() as started:
        yield started


def endless(asked):
    """Words until the client leaves."""
    return Reply(part for _ in range(3000) for part in (chunk(asked, "word "), 0.01))


def test_each_line_is_answered_and_remembered(run, server):
    stdin = "Who is it?\n\nŽižkov?\n".encode()
    code, out, err = run("chat", "--url", server.url, stdin=stdin)
    assert (code, err) == (0, "")
    assert out == "Who is it? ž☃!\nŽižkov? ž☃!\n"
    first, second = (asked.body for asked in server.answered)
    assert first == {
        "model": fake.MODEL,
        "stream": True,
        "messages": [{"role": "user", "content": "Who is it?"}],
    }
    assert second["messages"] == [
        {"role": "user", "content": "Who is it?"},
        {"role": "assistant", "content": "Who is it? ž☃!"},
        {"role": "user", "content": "Žižkov?"},
    ]
    assert {asked.path for asked in server.answered} == {"/v1/chat/completions"}
    assert all("Authorization" not in asked.headers for asked in server.asked)


def test_it_forgets_and_leaves_when_told(run, server):
    arguments = ["chat", "--url", f"{server.url}/", "--system", "Be brief."]
    code, out, err = run(*arguments, stdin=b"a\n/reset\nb\n/exit\nc\n")
    assert (code, out) == (0, "a ž☃!\nb ž☃!\n")
    assert err == "gemcut: the conversation is forgotten\n"
    system = {"role": "system", "content": "Be brief."}
    asked = [one.body["messages"] for one in server.answered]
    assert asked == [[system, {"role": "user", "content": content}] for content in "ab"]


def test_the_options_of_sampling_are_those_of_the_parser():
    sampling = cli_options.argparse.ArgumentParser(add_help=False)
    cli_options.add_sampling(sampling, max_tokens=None)
    assert [action.dest for action in sampling._actions] == list(cli_options.SAMPLING)


def test_sampling_is_sent_where_it_is_given(run, server):
    options = """--max-tokens 3 --min-tokens 2 --temperature 0 --top-k 5 --top-p 0.5 --min-p 0.1
        --seed 7 --repetition-penalty 1.5 --presence-penalty 0.5 --frequency-penalty 0.25
        --prompt-lookup-num-tokens 4 --stop x --stop y --bad-words z --ignore-eos"""
    code, out, err = run("chat", "--url", server.url, *options.split(), stdin=b"a\n")
    assert (code, out) == (0, " w0 w1 w2\n")
    assert err == "gemcut: the answer was cut at --max-tokens 3\n"
    sent = server.answered[0].body
    assert {name: sent[name] for name in cli_options.SAMPLING} == {
        "max_tokens": 3,
        "min_tokens": 2,
        "temperature": 0,
        "top_k": 5,
        "top_p": 0.5,
        "min_p": 0.1,
        "seed": 7,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "prompt_lookup_num_tokens": 4,
        "stop": ["x", "y"],
        "bad_words": ["z"],
        "ignore_eos": True,
    }


@pytest.mark.parametrize(
    ("given", "environment", "key"),
    [
        pytest.param([], {}, None, id="none"),
        pytest.param([], {"OPENAI_API_KEY": "o"}, "o", id="openai"),
        pytest.param([], {"OPENAI_API_KEY": "o", "GEMCUT_API_KEY": "g"}, "g", id="gemcut-first"),
        pytest.param(["--api-key", "k"], {"GEMCUT_API_KEY": "g"}, "k", id="option-first"),
    ],
)
def test_the_key_goes_with_every_request(run, server, monkeypatch, given, environment, key):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert run("chat", "--url", server.url, *given, stdin=b"a\n")[0] == 0
    expected = None if key is None else f"Bearer {key}"
    assert [one.headers.get("Authorization") for one in server.asked] == [expected] * 2


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_takes_the_key_nowhere(run, server, status):
    with FakeServer() as other:
        server.models = lambda: Reply([b""], status, headers={"Location": f"{other.url}/models"})
        message = error_line(run("chat", "--url", server.url, "--api-key", "k", stdin=b"a\n"))
        assert f"{server.url}/models: {status} " in message
        assert other.asked == []


@pytest.mark.parametrize("arguments", [["m"], ["--model", "m"]], ids=["argument", "option"])
def test_a_model_that_is_named_is_asked_without_a_list(run, server, arguments):
    server.models = lambda: fake.error(404, "no such page")
    assert run("chat", *arguments, "--url", server.url, stdin=b"a\n")[0] == 0
    assert [one.body["model"] for one in server.asked] == ["m"]


def test_of_several_models_one_must_be_named(run, server):
    server.models = lambda: fake.models("a/x", "b\x1b[31m")
    message = error_line(run("chat", "--url", server.url, stdin=b"a\n"))
    assert message.endswith("has 2 models: name one with --model, of a/x, b\ufffd[31m\n")


def failing(parts):
    """A reply of a beginning and then these parts."""
    return lambda asked: Reply([chunk(asked, "So far"), *parts])


@pytest.mark.parametrize(
    ("respond", "shown", "message"),
    [
        pytest.param(
            lambda asked: fake.error(429, "slow\ndown", **{"Retry-After": "1"}),
            "",
            "429 Too Many Requests: slow down",
            id="429",
        ),
        pytest.param(lambda asked: fake.error(401, "no"), "", "401 Unauthorized: no", id="401"),
        pytest.param(
            lambda asked: Reply([b"<p>\x1b[31m  bad\n gateway"], 502, "text/html"),
            "",
            "502 Bad Gateway: <p>\ufffd[31m bad gateway",
            id="html",
        ),
        pytest.param(
            lambda asked: Reply([b'{"detail": [{"msg": "x"}]}'], 422, "application/json"),
            "",
            '422 Unprocessable Entity: [{"msg": "x"}]',
            id="detail",
        ),
        pytest.param(
            lambda asked: Reply([b""], 307, headers={"Location": "http://127.0.0.1:9/v1"}),
            "",
            "307 Temporary Redirect",
            id="redirect",
        ),
        pytest.param(
            lambda asked: Reply([b"{}"], kind="application/json"),
            "",
            "answers with application/json, not with a stream of events",
            id="no-stream",
        ),
        pytest.param(failing([CUT]), "So far\n", "the connection broke off", id="cut"),
        pytest.param(failing([b"data: {", CUT]), "So far\n", "broke off", id="cut-in-an-event"),
        pytest.param(failing([]), "So far\n", "without a finish_reason: it is cut", id="ended"),
        pytest.param(
            failing([event("[DONE]")]), "So far\n", "without a finish_reason", id="no-reason"
        ),
        pytest.param(
            failing([event({"error": {"message": "out of\nmemory"}}), event("[DONE]")]),
            "So far\n",
            "error: out of memory",
            id="error-event",
        ),
        pytest.param(failing([event('{"choices": [')]), "So far\n", "no JSON object", id="garbage"),
        pytest.param(failing([event("[" * 99999)]), "So far\n", "no JSON object", id="deep"),
        pytest.param(failing([event("3")]), "So far\n", "no JSON object: '3'", id="no-object"),
        pytest.param(failing([b"data: \xff\n\n"]), "So far\n", "no UTF-8", id="no-utf-8"),
        pytest.param(
            failing([event({"choices": "x"})]), "So far\n", "choices that are none", id="choices"
        ),
        pytest.param(
            failing([event({"choices": [{"delta": {"content": 3}}]})]),
            "So far\n",
            "a text that is none: 3",
            id="content",
        ),
    ],
)  # fmt: skip
def test_a_failure_is_one_line_and_the_chat_goes_on(run, server, respond, shown, message):
    def first_fails(asked):
        return respond(asked) if len(server.answered) == 1 else well(asked)

    server.respond = first_fails
    code, out, err = run("chat", "--url", server.url, stdin=b"a\nb\n")
    assert code == 1
    assert out == f"{shown}b ž☃!\n"
    assert err.startswith("gemcut: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert server.answered[-1].body["messages"] == [{"role": "user", "content": "b"}]


def test_a_stream_may_end_without_done(run, server):
    server.respond = lambda asked: Reply(list(well(asked).parts)[:-1])
    assert run("chat", "--url", server.url, stdin=b"Who?\n") == (0, "Who? ž☃!\n", "")


def test_events_may_be_cut_anywhere(run, server):
    def bytewise(asked):
        whole = b"".join(part for part in well(asked).parts if isinstance(part, bytes))
        whole = whole.replace(b"\n", b"\r\n").replace(b"data: ", b"id: 1\r\ndata:", 2)
        return Reply([whole[i : i + 1] for i in range(len(whole))])

    server.respond = bytewise
    assert run("chat", "--url", server.url, stdin=b"Who?\n") == (0, "Who? ž☃!\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "127.0.0.1:8000"], "is not an address such as http://127.0.0.1:8000/v1"),
        (["--url", ""], "url '' is not an address"),
        (["--url", "http://a:port"], "is not an address"),
        (["--url", "ftp://a/v1"], "is not an address"),
        (["--url", "http://a/v1?x=1"], "is not an address"),
        (["--url", "http://me:secret@a/v1"], "a url with a name or password is refused"),
        (["--url", "http://a/v1", "--api-key", "k\nx"], "the API key is empty, or has a character"),
        (["--url", "http://a/v1", "--api-key", ""], "the API key is empty"),
        (["--url", "http://a/v1", "--device", "cpu"], "--device is for an engine here"),
        (["--url", "http://a/v1", "--no-cuda-graphs"], "--no-cuda-graphs is for an engine here"),
        (["--url", "http://a/v1", "--temperature", "nan"], "is not finite"),
        (["--api-key", "k"], "--api-key is for a server: give its --url too"),
        (["--url", "http://127.0.0.1:9/v1"], "http://127.0.0.1:9/v1/models: Connection refused"),
    ],
)
def test_bad_arguments_are_one_line(run, arguments, message):
    line = error_line(run("chat", *arguments, stdin=b"a\n")).replace("[Errno 111] ", "")
    assert message in line
    assert "secret" not in line


def test_a_server_without_v1_gets_a_hint(run, server):
    server.models = lambda: fake.error(404, "Not Found")
    line = error_line(run("chat", "--url", server.url.removesuffix("/v1"), stdin=b"a\n"))
    assert line.endswith("404 Not Found: Not Found; most servers' --url ends in /v1\n")


def test_it_needs_no_torch(server):
    code = (
        "import sys; from gemcut.engine.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'numpy', 'triton', 'openai', 'httpx', 'requests'} & {*sys.modules}\n"
        "sys.exit(code or ', '.join(heavy) or 0)"
    )
    command = [sys.executable, "-P", "-c", code, "chat", "--url", server.url]
    done = subprocess.run(command, input=b"a\n", capture_output=True, env=ENVIRONMENT)
    assert (done.returncode, done.stderr) == (0, b"")


def test_ctrl_c_ends_an_answer_and_closes_its_connection(server, terminal):
    server.respond = lambda asked: endless(asked) if len(server.answered) == 1 else well(asked)
    chat = terminal("chat", "--url", server.url)
    assert b"/reset forgets" in chat.expect(PROMPT)
    chat.type(b"Who?\n")
    chat.expect(rb"word word")
    chat.type(b"\x03")
    chat.expect(rb"\^C\r\n>>> $")
    assert server.answered[0].left.wait(PATIENCE)
    chat.type(b"And?\n")
    chat.expect("And\\? ž☃!\r\n>>> $".encode())
    partial = server.answered[1].body["messages"][1]
    assert partial["role"] == "assistant"
    assert partial["content"].startswith("word word")
    chat.type(b"\x04")
    code, shown = chat.end()
    assert (code, shown) == (0, b"\r\n")


def test_ctrl_c_before_the_first_word(server, terminal):
    server.respond = lambda asked: Reply([30.0])
    chat = terminal("chat", "--url", server.url)
    chat.expect(PROMPT)
    chat.type(b"Who?\n")
    deadline = time.monotonic() + PATIENCE
    while not server.answered:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    chat.wait_until_it_waits()
    chat.type(b"\x03")
    chat.expect(rb"\^C\r\n>>> $")


def run_endless(server):
    server.respond = endless
    command = [*COMMAND, "chat", "--url", server.url]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    running = subprocess.Popen(command, env=ENVIRONMENT, **pipes)
    running.stdin.write(b"a\n")
    running.stdin.flush()
    assert running.stdout.read(4) == b"word"
    return running


def test_ctrl_c_in_a_pipe_leaves(server):
    running = run_endless(server)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=PATIENCE)
    assert (running.returncode, err) == (130, b"\n")
    assert server.answered[0].left.wait(PATIENCE)


def test_a_reader_that_leaves_is_no_error(server):
    running = run_endless(server)
    running.stdout.close()
    assert running.wait(PATIENCE) == 141
    assert running.stderr.read() == b""
    assert server.answered[0].left.wait(PATIENCE)


def test_the_default_model_of_an_engine_is_still_the_demo():
    asked = cli._parser().parse_args(["chat"])
    assert (asked.model, asked.url) == (None, None)
