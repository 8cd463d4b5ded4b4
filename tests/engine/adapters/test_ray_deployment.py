"""Two replicas on one machine: their answers, one killed, clients that leave, the choice of one."""

import asyncio
import json
import socket
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest

pytest.importorskip("ray.serve")
pytest.importorskip("fastapi")

import httpx
import openai
import ray
from openai.types.responses import ResponseErrorEvent
from ray import serve

from gemcut.engine import Engine, SamplingParams
from gemcut.engine.adapters.ray_deployment import (
    Arguments,
    Passed,
    PrefixRouter,
    app,
    beginning,
    error_event,
)

LONG = {"max_tokens": 450, "temperature": 0, "extra_body": {"ignore_eos": True}}
PATIENCE = 40  # seconds for Ray to notice, and for a process to import torch


@pytest.fixture(scope="module")
def url():
    """The demo on two replicas of two slots; one thread computes in each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"port": port})
        arguments = {"model": "demo", "num_replicas": "2", "max_batch_size": "2"}  # as typed
        serve.run(app(Arguments.model_validate(arguments)))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def engine():
    with Engine.from_pretrained("demo", max_batch_size=2) as engine:
        yield engine


def begin(client, prompt: str):
    """A long answer that has begun, and the name of its replica."""
    options = {"model": "demo", "prompt": prompt, "stream": True, **LONG}
    response = client.completions.with_raw_response.create(**options)
    stream = response.parse()
    first = next(stream).choices[0].text
    return SimpleNamespace(
        prompt=prompt, name=response.headers["x-gemcut-replica"], stream=stream, text=first
    )


def replica_actors() -> dict[str, str]:
    """The full names of the actors of live replicas, by the names that answers have."""
    named = ray.util.list_named_actors(all_namespaces=True)
    names = [one["name"] for one in named if "#Replica#" in one["name"]]
    return {name.rpartition("#")[2]: name for name in names}


def tokens_and_running(url: str) -> dict[str, tuple[float, float]]:
    """Of each replica what it has generated and how many of its slots run: chance chooses one."""
    found = {}
    for _ in range(30):
        answer = httpx.get(f"{url}/metrics")
        lines = dict(
            line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#")
        )
        count, running = lines["gemcut_generated_tokens_total"], lines["gemcut_running"]
        found[answer.headers["x-gemcut-replica"]] = (float(count), float(running))
    return found


def test_answers_are_those_of_an_engine(client, engine):
    prompts = ["It was", "Once upon a time", "The moor", "She said"]
    expected = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=20))
    for prompt, one in zip(prompts, expected, strict=True):
        asked = {"model": "demo", "prompt": prompt, "max_tokens": 20, "temperature": 0}
        whole = client.completions.create(**asked)
        assert whole.choices[0].text == one.text
        assert "".join(
            event.choices[0].text for event in client.completions.create(**asked, stream=True)
        ) == one.text  # fmt: skip
    messages = [{"role": "user", "content": "Who are you?"}]
    chat = client.chat.completions.create(
        model="demo", messages=messages, max_tokens=5, temperature=0
    )
    assert chat.choices[0].message.content
    assert chat.usage.completion_tokens == 5


def test_errors_are_those_of_the_application(client, url):
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model="demo", prompt="It", max_tokens=-1)
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.completions.create(model="other", prompt="It")
    with pytest.raises(openai.NotFoundError):
        client.get("/nothing", cast_to=object)
    large = httpx.post(f"{url}/v1/completions", content=b" " * (4 * 1024 * 1024 + 1))
    assert (large.status_code, large.json()["error"]["param"]) == (413, None)
    answer = httpx.get(f"{url}/health", headers={"x-request-id": "mine"})
    assert answer.json() == {"status": "ok"}
    assert answer.headers.get_list("x-request-id") == ["mine"]


def test_prompts_that_begin_alike_go_to_one_replica(client):
    def replicas(prompts):
        return {
            client.completions.with_raw_response.create(
                model="demo", prompt=prompt, max_tokens=1
            ).headers["x-gemcut-replica"]
            for prompt in prompts
        }

    assert len(replicas(["It was a bright cold morning. " * 20 + word for word in "abcdef"])) == 1
    assert len(replicas(f"{number} times" for number in range(16))) == 2


@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_frees_its_slot(client, url, is_stream):
    before = sum(tokens for tokens, _ in tokens_and_running(url).values())
    if is_stream:
        asked = [begin(client, f"{number} It was") for number in range(4)]
        for one in asked:
            one.stream.close()
    else:
        for number in range(4):
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=0.1).completions.create(
                    model="demo", prompt=f"{number} It was", **LONG
                )
    until = time.monotonic() + PATIENCE
    found = tokens_and_running(url)
    while any(running for _, running in found.values()):
        assert time.monotonic() < until
        found = tokens_and_running(url)
    assert sum(tokens for tokens, _ in found.values()) - before < 4 * LONG["max_tokens"] / 2


def test_a_replica_that_dies_ends_its_streams_alone(client, url, engine):
    """Four streams on four slots, with the prompts of both replicas."""
    streams = [begin(client, f"{number} It was") for number in range(4)]
    assert Counter(one.name for one in streams) == dict.fromkeys({s.name for s in streams}, 2)
    dying = streams[0].name
    refused = []

    def wait_for_room():  # an answer that has not begun: it waits in the dying replica, or before
        try:
            client.completions.create(model="demo", prompt="0 It was", max_tokens=1)
        except openai.InternalServerError as error:
            refused.append(error)

    waiting = threading.Thread(target=wait_for_room)
    waiting.start()
    ray.kill(ray.get_actor(replica_actors()[dying], namespace="serve"))
    params = SamplingParams(temperature=0, max_tokens=LONG["max_tokens"], ignore_eos=True)
    for one in streams:
        expected = engine.generate(one.prompt, params).text
        if one.name == dying:
            with pytest.raises(openai.APIError, match="has died") as error:
                one.text += "".join(event.choices[0].text for event in one.stream)
            assert error.value.body["type"] == "server_error"
            assert expected.startswith(one.text)
            assert one.text != expected
        else:
            one.text += "".join(event.choices[0].text for event in one.stream)
            assert one.text == expected
    waiting.join(PATIENCE)
    assert all(error.status_code == 503 for error in refused)
    until = time.monotonic() + PATIENCE
    while len(tokens_and_running(url).keys() - {dying}) < 2:  # a new one
        assert time.monotonic() < until
    answered = client.completions.create(model="demo", prompt="0 It was", max_tokens=3)
    assert answered.usage.completion_tokens == 3


def replica(name: str):
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=name))


def ranks(replicas, prompt: str):
    router = PrefixRouter.__new__(PrefixRouter)
    passed = Passed("POST", "/", b"", [], None, b"", prompt)
    pending = SimpleNamespace(args=[passed])
    return asyncio.run(router.choose_replicas(replicas, pending))


def test_a_replica_that_goes_moves_its_own_prompts_only():
    three = [replica(name) for name in "abc"]
    prompts = [f"prompt {number}" for number in range(300)]
    before = [ranks(three, prompt)[0][0] for prompt in prompts]
    assert all(60 < before.count(one) < 140 for one in three)
    for prompt, own in zip(prompts, before, strict=True):
        first, others = ranks(three, prompt)
        assert first == [own]
        assert sorted(map(id, [*first, *others])) == sorted(map(id, three))
        if own is not three[2]:
            assert ranks(three[:2], prompt)[0] == [own]
    assert ranks(three[:1], "x") == [three[:1]]
    (any_order,) = ranks(three, "")
    assert sorted(map(id, any_order)) == sorted(map(id, three))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"prompt": "It was"}, '"It was"'),
        ({"prompt": [[5, 6], [7]]}, "[[5, 6], [7]]"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, '[{"role": "user", "content": "Hi"}]'),
        ({"input": "Hi", "prompt": None}, '"Hi"'),
        ({"prompt": "x" * 5000}, '"' + "x" * 511),
        ({}, '""'),
        ([], ""),
    ],
    ids=["text", "ids", "chat", "responses", "long", "none", "no object"],
)
def test_the_beginning_of_a_prompt(body, expected):
    assert beginning(json.dumps(body).encode()) == expected
    assert beginning(b"") == beginning(b"\xff") == ""


def test_the_error_event_of_responses_is_their_own():
    event = error_event("/v1/responses", 7)
    assert event.startswith("event: error\ndata: ")
    found = ResponseErrorEvent.model_validate_json(event.partition("data: ")[2])
    assert (found.type, found.sequence_number) == ("error", 7)


@pytest.mark.parametrize(
    "arguments",
    [
        {"modle": "demo"},
        {"num_replicas": 0},
        {"num_replicas": "two"},
        {"quantization": "int3"},
        {"num_replicas": 3, "max_replicas": 2},
        {"served_model_name": "two\nlines"},
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_anything_starts(arguments):
    with pytest.raises(ValueError, match=list(arguments)[-1].replace("served_", "")):
        app(Arguments.model_validate(arguments))
