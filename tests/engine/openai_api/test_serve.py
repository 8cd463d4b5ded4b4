"""`gemcut serve` in a process of its own: how it starts, what it says, and how it ends."""

import json
import re
import signal
import socket
import subprocess
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
from processes import COMMAND, ENVIRONMENT, PATIENCE
from servers import wait_until

ASK = {"prompt": "It was", "max_tokens": 100, "ignore_eos": True, "stream": True}


class Served:
    """The process of a server, its address, and the lines that it has written."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process, self.lines = process, []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        wait_until(lambda: self._address() or process.poll() is not None, PATIENCE)
        assert process.poll() is None, self.lines
        self.url = self._address()

    def _read(self) -> None:
        for line in self.process.stderr:
            self.lines.append(line)

    def _address(self) -> str | None:
        return next(iter(re.findall(r"http://\S+(?=/v1$)", "\n".join(self.lines), re.M)), None)

    @contextmanager
    def stream(self, body: dict):
        """The lines of an answer that has begun."""
        with (
            httpx.Client(base_url=self.url, timeout=60) as client,
            client.stream("POST", "/v1/completions", json=body) as response,
        ):
            lines = response.iter_lines()
            next(lines)
            yield lines

    def ended(self) -> int:
        """The exit code, once it has ended."""
        code = self.process.wait(PATIENCE)
        self._reader.join()
        return code


@contextmanager
def serve(*arguments: str, **environment: str):
    process = subprocess.Popen(
        [*COMMAND, "serve", "demo", "--port", "0", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT | environment,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_it_says_what_it_serves_and_ends_when_asked_to():
    arguments = ("--served-model-name", "small", "--max-batch-size", "2", "--no-warmup")
    with serve(*arguments, GEMCUT_API_KEY="secret") as process:
        served = Served(process)
        loading, line = served.lines
        assert loading == "gemcut: loading demo\n"
        assert re.fullmatch(
            r"gemcut: small: 4 million parameters, float32 on cpu, 2 slots of 512 tokens, "
            r"0\.\d\d GB; http://127\.0\.0\.1:\d+/v1\n",
            line,
        )
        key = {"authorization": "Bearer secret"}
        asked = {"prompt": "x", "max_tokens": 1, "model": "small"}
        with httpx.Client(base_url=served.url, timeout=60) as client:
            assert client.post("/v1/completions", json=asked).status_code == 401
            assert client.post("/v1/completions", json=asked, headers=key).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert served.ended() == 0
        *answers, last = served.lines[2:]
        assert [json.loads(line)["status"] for line in answers] == [401, 200]
        assert last == "gemcut: shutting down; open requests: 0\n"


def test_running_answers_end_and_new_ones_are_refused():
    with serve("--max-batch-size", "1", "--no-warmup") as process:
        served = Served(process)
        with served.stream(ASK | {"n": 4}) as lines:
            process.send_signal(signal.SIGTERM)
            with httpx.Client(base_url=served.url, timeout=60) as other:
                wait_until(lambda: other.get("/health").status_code == 503)
                refused = other.post("/v1/completions", json=ASK)
            assert refused.status_code == 503
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""]
        reasons = re.findall(r'"finish_reason":"(\w+)"', "\n".join(rest))
        assert reasons == ["length"] * 4
        assert served.ended() == 0


@pytest.mark.parametrize("second", [True, False])
def test_answers_that_take_too_long_end_with_an_error(second):
    grace = "60" if second else "0.2"
    with serve("--max-batch-size", "1", "--no-warmup", "--grace-period", grace) as process:
        served = Served(process)
        with served.stream(ASK | {"max_tokens": 500, "n": 16}) as lines:
            process.send_signal(signal.SIGINT)
            if second:
                time.sleep(0.3)
                process.send_signal(signal.SIGINT)
            rest = [line for line in lines if line]
        assert json.loads(rest[-2][6:])["error"]["message"] == "the server is shutting down"
        assert rest[-1] == "data: [DONE]"
        assert served.ended() == 0


def test_an_address_in_use_is_found_before_the_model_is_loaded(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, error = run("serve", "no-such-model", "--port", str(port))
    assert (code, error) == (
        1,
        f"gemcut: error: 127.0.0.1 port {port}: Address already in use\n",
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--port", "70000"), "port 70000 is outside 0..65535"),
        (("--max-n", "0"), "max_n 0 is outside 1..1024"),
        (("--max-streams", "-1"), "max_streams -1 is outside"),
        (("--api-key", " "), "api_keys: a value is empty or no line of text"),
        (("--host", "not an address"), "not an address"),
        (("--chat-template", "/nowhere/x.jinja"), "/nowhere/x.jinja"),
        (("--max-waiting", "-1", "--port", "0"), "max_waiting -1 is outside"),
    ],
)
def test_bad_options_are_one_line(run, arguments, named):
    code, out, error = run("serve", "demo", *arguments)
    assert (code, out) == (1, "")
    assert named in error
    assert error.count("\n") == 1
