"""Bad requests: an OpenAI-shaped error with the right status, one line, and the server goes on."""

import json
import socket

import pytest
from servers import check_error, serving, wait_until

CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
PATHS = {
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
    "responses": "/v1/responses",
}
TOOL = {"type": "function", "name": "f"}
# path, body, status, what the message names
CASES = [
    ("completions", {}, 400, "prompt: Field required"),
    ("completions", b"{", 400, "the body is not JSON"),
    ("completions", b"", 400, "the body"),
    ("completions", b"[" * 100_000, 400, "the body"),
    ("completions", b'"text"', 400, "the body"),
    ("completions", b'{"prompt": "x", "max_tokens": ' + b"9" * 10_000 + b"}", 400, "the body"),
    ("completions", b'{"prompt": "x", "temperature": NaN}', 400, "temperature"),
    ("completions", {"prompt": ""}, 400, "the prompt is empty"),
    ("completions", {"prompt": []}, 400, "the prompt is empty"),
    ("completions", {"prompt": [-1]}, 400, "token id -1"),
    ("completions", {"prompt": [10**30]}, 400, "prompt"),
    ("completions", {"prompt": ["x"] * 65}, 400, "65 prompts are more than the 64"),
    ("completions", {"prompt": ["x"] * 64, "n": 5}, 400, "320 completions at once are more than"),
    ("completions", {"prompt": "x " * 600}, 400, "a slot holds"),
    ("completions", {"prompt": "x", "model": "gpt"}, 404, "the model 'gpt' is not served here"),
    ("completions", {"prompt": "x", "max_tokens": -1}, 400, "max_tokens -1"),
    ("completions", {"prompt": "x", "max_tokens": 0}, 400, "max_tokens 0 needs echo"),
    ("completions", {"prompt": "x", "n": 0}, 400, "n 0"),
    ("completions", {"prompt": "x", "n": 17}, 400, "n 17 is more than the 16"),
    ("completions", {"prompt": "x", "temperature": -1}, 400, "temperature -1"),
    ("completions", {"prompt": "x", "temperature": 1e300}, 400, "temperature"),
    ("completions", {"prompt": "x", "top_p": 2}, 400, "top_p 2"),
    ("completions", {"prompt": "x", "logprobs": 21}, 400, "logprobs 21 is outside 0..20"),
    ("completions", {"prompt": "x", "logprobs": -1}, 400, "logprobs -1 is outside 0..20"),
    ("completions", {"prompt": "x", "stop": [""]}, 400, "stop"),
    ("completions", {"prompt": "x", "stop": ["y"] * 65}, 400, "stop has 65 entries, above 64"),
    ("completions", {"prompt": "x", "bad_words": ["y"] * 1025}, 400, "bad_words has 1025"),
    ("completions", {"prompt": "x", "seed": 2**70}, 400, "seed"),
    ("completions", {"prompt": "x", "logit_bias": {"a": 1}}, 400, "logit_bias"),
    ("completions", {"prompt": "x", "logit_bias": {"999999": 1}}, 400, "logit_bias"),
    ("completions", {"prompt": "x", "suffix": "y"}, 400, "suffix is not supported"),
    ("completions", {"prompt": "x", "best_of": 3}, 400, "best_of is not supported"),
    ("completions", {"prompt": "x", "guided_json": {"a": 1}}, 400, "use structured_outputs"),
    ("completions", {"prompt": "x", "stream_options": {}}, 400, "stream_options needs stream"),
    ("completions", {"prompt": "x", "response_format": {"type": "xml"}}, 400, "response_format"),
    ("completions", {"prompt": "x", "structured_outputs": {"xml": 1}}, 400, "no 'xml'"),
    ("completions", {"prompt": "\ud800"}, 400, ""),
    ("chat", {"messages": []}, 400, "messages"),
    ("chat", {"messages": [{}]}, 400, "message 0"),
    ("chat", {"messages": ["x"]}, 400, "messages.0"),
    ("chat", {"messages": [{"role": "wizard", "content": "x"}]}, 400, "role 'wizard'"),
    (
        "chat",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "image_url",
    ),
    ("chat", CHAT | {"top_logprobs": 2}, 400, "top_logprobs needs logprobs"),
    ("chat", CHAT | {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs 21"),
    ("chat", CHAT | {"tools": [{"type": "web"}]}, 400, "tools.0 is no function"),
    ("chat", CHAT | {"tool_choice": "required"}, 400, "tool_choice needs tools"),
    ("chat", CHAT | {"functions": [{"name": "f"}]}, 400, "use tools"),
    ("chat", CHAT | {"modalities": ["audio"]}, 400, "modalities"),
    ("chat", CHAT | {"chat_template": "{{ 1 }}"}, 400, "--chat-template"),
    ("chat", CHAT | {"response_format": {"type": "json_schema"}}, 400, "schema is missing"),
    ("responses", {}, 400, "input: Field required"),
    ("responses", {"input": "x", "previous_response_id": "resp_1"}, 400, "no response is kept"),
    ("responses", {"input": "x", "background": True}, 400, "background is not supported"),
    ("responses", {"input": [{"type": "image"}]}, 400, "input.0 is of type 'image'"),
    ("responses", {"input": "x", "text": {"format": {"type": "json_schema"}}}, 400, "text.format"),
    ("responses", {"input": "x", "truncation": "auto"}, 400, "a prompt is never cut"),
    # fields of vLLM's that would change the answer
    ("completions", {"prompt": "x", "add_special_tokens": False}, 400, "send token ids"),
    ("completions", {"prompt": "x", "prompt_logprobs": 2}, 400, "echo and logprobs"),
    ("completions", {"prompt": "x", "cache_salt": "a"}, 400, "cache_salt is not supported"),
    ("chat", CHAT | {"echo": True}, 400, "echo: the template alone makes the prompt"),
    ("chat", CHAT | {"return_token_ids": True}, 400, "/tokenize tells them"),
    ("responses", {"input": "x", "n": 2}, 400, "n: a response is one answer"),
    ("responses", {"input": "x", "response_format": {"type": "text"}}, 400, "use text.format"),
    ("responses", {"input": "x", "stop": [""]}, 400, "stop"),
    # what a response repeats of its request must be what a response can say
    ("responses", {"input": "x", "metadata": {"a": 1}}, 400, "metadata.a"),
    ("responses", {"input": "x", "tools": [TOOL | {"strict": [1]}]}, 400, "strict"),
    ("responses", {"input": "x", "tools": [TOOL | {"description": 7}]}, 400, "description"),
    ("responses", {"input": "x", "stream": True, "tools": [TOOL | {"strict": 7}]}, 400, "strict"),
]


@pytest.mark.parametrize(("kind", "body", "status", "named"), CASES, ids=range(len(CASES)))
def test_a_bad_request(server, kind, body, status, named):
    check_error(server.post(PATHS[kind], body), status, named)


def test_the_server_answers_after_all_of_them(server):
    assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_bad_tokens(server, path):
    check_error(server.post(path, {}), 400, "")
    check_error(server.post(path, {"tokens": [-1], "prompt": 5}), 400, "")
    check_error(server.post("/detokenize", {"tokens": [3072]}), 400, "id 3072 is outside 0..3071")


def test_other_paths_and_methods(server):
    check_error(server.post("/v1/nothing", {}), 404, "Not Found")
    with server.client() as client:
        check_error(client.get("/v1/completions"), 405, "Method Not Allowed")


def test_a_prompt_that_is_too_long_has_its_code(server):
    response = server.post("/v1/completions", {"prompt": "x " * 600})
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_what_never_fits_is_refused_and_not_asked_for_again(server):
    """The queue holds 100 and there are 4 slots: 429 would have clients try it for ever."""
    body = {"prompt": ["x"] * 35, "n": 3, "max_tokens": 1}
    check_error(server.post("/v1/completions", body), 400, "105 completions at once are more than")


def test_unknown_fields_are_accepted_and_named_in_the_log(server, caplog):
    caplog.set_level("INFO", "gemcut.access")
    body = {"prompt": "x", "max_tokens": 1, "user": "me", "metadata": {}, "sparkles": 3}
    assert server.post("/v1/completions", body).status_code == 200
    wait_until(lambda: "sparkles" in caplog.text)
    (line,) = [json.loads(one) for one in caplog.messages if "sparkles" in one]
    assert line["ignored"] == ["metadata", "sparkles", "user"]


def test_a_body_that_is_too_large_is_refused_before_it_is_read(server):
    big = b'{"prompt": "' + b"x" * (5 << 20) + b'"}'
    check_error(server.post("/v1/completions", big), 413, "4194304 bytes")

    def chunks():  # without a length
        yield b'{"prompt": "'
        for _ in range(80):
            yield b"x" * 65536

    with server.client(**{"content-type": "application/json"}) as client:
        check_error(client.post("/v1/completions", content=chunks()), 413, "4194304 bytes")


def test_headers_are_bounded(server):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n")
        try:
            for _ in range(100):
                raw.sendall(b"x-junk: " + b"y" * 4096 + b"\r\n")
            answer = raw.recv(100)
        except ConnectionError:
            answer = b""
    assert not answer or b" 400 " in answer or b" 431 " in answer
    assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 1}).status_code == 200


def test_a_template_that_refuses_a_system_message_says_what_helps(demo):
    template = """
        {%- if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}
        {{- messages[0]['content'] }}
    """
    messages = [{"role": "system", "content": "Be short."}, *CHAT["messages"]]
    for merges, status in ((False, 400), (True, 200)):
        with serving(demo, chat_template=template, merge_system=merges) as server:
            response = server.post("/v1/chat/completions", CHAT | {"messages": messages})
            assert response.status_code == status, response.text
            if not merges:
                check_error(response, 400, "no system role")
                assert "--merge-system" in response.text


def test_a_developer_stays_one_where_the_template_knows_that_role(demo):
    """As FunctionGemma's does; for other templates it is the system."""
    messages = [{"role": "developer", "content": "x"}]
    for comment, role in (("developer", "developer"), ("", "system")):
        template = "{# " + comment + " #}{{ messages[0]['role'] }}"
        with serving(demo, chat_template=template) as server:
            ids = server.post("/tokenize", {"messages": messages}).json()["tokens"]
            assert server.post("/detokenize", {"tokens": ids}).json() == {"prompt": role}
