"""Many clients at once: none lost, each as alone; those that vanish or dawdle disturb nobody."""

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from servers import wait_until

from gemcut.engine import SamplingParams
from gemcut.engine.openai_api.generation import Generation
from gemcut.engine.requests.request_builder import RequestBuilder

PROMPTS = [f"{first} {second}" for first in ("It was", "She", "There", "A") for second in "abcd"]
LONG = {"prompt": "It was", "max_tokens": 400, "ignore_eos": True, "stream": True}


async def read(client: httpx.AsyncClient, body: dict) -> tuple[str, str | None]:
    """The text and the end of a streamed completion."""
    text, reason, last = "", None, ""
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            last = line or last
            if line.startswith("data: {"):
                (choice,) = json.loads(line[6:])["choices"]
                text, reason = text + choice["text"], choice["finish_reason"] or reason
    assert last == "data: [DONE]"
    return text, reason


def test_64_streams_at_once_are_what_each_is_alone(server):
    bodies = [
        {"prompt": prompt, "max_tokens": 8 + number, "temperature": number % 2, "seed": number}
        for number, prompt in enumerate(PROMPTS * 4)
    ]

    async def ask(at_once: int) -> list[tuple[str, str | None]]:
        gate = asyncio.Semaphore(at_once)
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:

            async def one(body):
                async with gate:
                    return await read(client, body)

            return await asyncio.gather(*map(one, bodies))

    together, alone = asyncio.run(ask(64)), asyncio.run(ask(1))
    assert together == alone
    wait_until(lambda: server.service.open_requests == 0)


def test_clients_that_vanish_leave_no_slot(server, slow_steps):
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps(LONG).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    for number in range(20):
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            if number % 2:  # half of them leave before their first token
                raw.recv(1000)
    wait_until(lambda: server.service.open_requests == 0)
    wait_until(lambda: server.engine.metrics()["running"] == 0)
    assert server.engine.metrics()["waiting"] == 0


def test_a_client_that_vanishes_frees_its_slot_within_a_step(server, demo, slow_steps, caplog):
    """Its tokens stop: those counted after it has left are of the steps under way."""
    caplog.set_level("INFO", "gemcut.access")
    with server.client() as client, client.stream("POST", "/v1/completions", json=LONG) as response:
        next(response.iter_lines())
    wait_until(lambda: server.service.open_requests == 0)
    before = demo.metrics()["generated_tokens"]
    wait_until(lambda: demo.metrics()["running"] == 0)
    assert demo.metrics()["generated_tokens"] - before <= 1
    wait_until(lambda: caplog.messages)
    assert 1 <= json.loads(caplog.messages[0])["completion_tokens"] < LONG["max_tokens"]


def test_tokens_are_counted_as_they_are_told_not_as_they_are_made(server, demo):
    async def counts() -> list[int]:
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        generation = Generation(demo.astream("It was", params), server.service.metrics, {})
        while demo.metrics()["running"] or demo.metrics()["waiting"]:
            await asyncio.sleep(0.01)  # the engine has made them all before one is told
        return [generation.usage().completion_tokens async for _ in generation.deltas()]

    assert asyncio.run(counts()) == [1, 2, 3, 4, 5, 6]


def test_a_whole_answer_is_not_made_for_a_client_that_left(server, demo, slow_steps):
    before = demo.metrics()["ended"].get("abort", 0)
    with server.client() as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json=LONG | {"stream": False}, timeout=0.2)
    wait_until(lambda: demo.metrics()["ended"].get("abort", 0) == before + 1)


def test_a_slow_reader_delays_nobody(server):
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps(LONG | {"n": 2}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with socket.create_connection((host, int(port))) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        slow.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        started = time.perf_counter()
        quick = server.post("/v1/completions", {"prompt": "She", "max_tokens": 8})
        assert quick.status_code == 200
        # the slow one has not read a byte, and its text is complete all the same
        wait_until(lambda: server.engine.metrics()["running"] == 0)
        assert time.perf_counter() - started < 60


@pytest.mark.parametrize(
    "heavy", [{"structured_outputs": {"choice": ["a"]}}, {"prompt": "x " * 100_000}]
)
def test_heavy_requests_are_built_two_at_once_and_small_ones_go_past_them(
    server, monkeypatch, heavy
):
    one, building, may_go = RequestBuilder.one, [], threading.Event()

    def slow(self, prompt, params, **others):
        if params.max_tokens == 2:
            building.append(1)
            may_go.wait(60)
        return one(self, prompt, params, **others)

    monkeypatch.setattr(RequestBuilder, "one", slow)
    body = {"prompt": "x", "max_tokens": 2} | heavy
    with ThreadPoolExecutor(40) as pool:
        asked = [pool.submit(server.post, "/v1/completions", body) for _ in range(40)]
        try:
            wait_until(lambda: server.service.open_requests == 40)
            small = server.post("/v1/completions", {"prompt": "x", "max_tokens": 1})
            assert small.status_code == 200
            assert len(building) == 2
        finally:
            may_go.set()
        assert {one.result().status_code for one in asked} <= {200, 400}


def test_an_error_after_the_first_token_is_the_last_event(server, demo, monkeypatch):
    observe, seen = Generation._observe, []

    def breaks(self, choice):
        observe(self, choice)
        seen.append(choice)
        if len(seen) > 2:
            raise RuntimeError("a secret of the engine")

    monkeypatch.setattr(Generation, "_observe", breaks)
    first, *_, last = server.events("/v1/completions", LONG)
    assert first["choices"][0]["text"]
    assert set(last) == {"error"}
    assert "secret" not in json.dumps(last)
    wait_until(lambda: demo.metrics()["running"] == 0)


def test_a_stream_option_may_be_null(server):
    body = {"prompt": "x", "max_tokens": 2, "stream_options": {"include_usage": None}}
    assert all("usage" not in event for event in server.events("/v1/completions", body))
