"""Requests made at random from /openapi.json: no fault of the server's, and answers as it says.

    GEMCUT_HTTP_CASES=2000 pytest tests/engine/openai_api/test_openapi.py

makes 2000; without it there are a few.
"""

import os
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from servers import check_error

schemathesis = pytest.importorskip("schemathesis")
from schemathesis.checks import (  # noqa: E402
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)

CASES = int(os.environ.get("GEMCUT_HTTP_CASES", "60"))
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
# of 100 cases; the other paths take no body, and nearly nothing can be wrong with them
SHARES = {
    "POST /v1/completions": 30,
    "POST /v1/chat/completions": 30,
    "POST /v1/responses": 30,
    "POST /tokenize": 6,
    "POST /detokenize": 4,
}
CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
)


def brief(body):
    """The same request of the model that is served, for at most three tokens."""
    if not isinstance(body, dict):
        return body
    given = {name: min(body[name], 3) for name in LENGTHS if type(body.get(name)) is int}
    model = {"model": "demo"} if isinstance(body.get("model"), str) else {}
    return body | dict.fromkeys(LENGTHS, 3) | given | model


def fitting(body, vocab_size):
    """The same request without what a description cannot say: ids of a vocabulary, fields that
    exclude each other, roles that alternate.
    """
    if not isinstance(body, dict):
        return body
    body = dict(body)
    for name in ("prompt", "tokens", "stop_token_ids", "allowed_token_ids"):
        ids = body.get(name)
        if isinstance(ids, list) and all(isinstance(one, int) for one in ids):
            body[name] = [one % vocab_size for one in ids] or [2]
    for name in ("n", "min_tokens"):
        if body.get(name) is not None:
            body[name] = body[name] % 2 + (name == "n")
    if body.get("logit_bias"):
        body["logit_bias"] = {str(i): bias for i, bias in enumerate(body["logit_bias"].values())}
    for needed, name in (("stream", "stream_options"), ("logprobs", "top_logprobs")):
        if not body.get(needed) and "input" not in body:
            body.pop(name, None)
    if isinstance(body.get("messages"), list):
        users = [one for one in body["messages"] if one.get("role") == "user"]
        told = {"role": "user", "content": "x"}
        body["messages"] = [one | {"content": one.get("content") or "x"} for one in users] or [told]
        body["messages"] = body["messages"][:1]
    if not body.get("tools"):
        body.pop("tool_choice", None)
    return body


def test_no_request_is_a_fault_of_the_server(server):
    described = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    statuses: Counter[tuple[str, int]] = Counter()

    def ask(case):
        case.body = brief(case.body)
        if case.meta.generation.mode.is_positive:
            case.body = fitting(case.body, server.service.tokenizer.vocab_size)
        response = case.call(base_url=server.url)
        statuses[case.operation.label, response.status_code] += 1
        case.validate_response(response, checks=list(CHECKS))
        if response.status_code != 200:
            check_error(response, response.status_code, "")

    for operation in (result.ok() for result in described.get_all_operations()):
        modes = list(schemathesis.GenerationMode) if operation.body else ["positive"]
        share = SHARES.get(operation.label, 2)
        for mode in map(schemathesis.GenerationMode, modes):
            cases = settings(
                max_examples=-(-CASES * share // (100 * len(modes))),
                phases=[Phase.generate],
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            cases(given(operation.as_strategy(mode))(ask))()
    print(f"{statuses.total()} cases: {dict(statuses)}")
    for label in SHARES:
        assert statuses[label, 200] or statuses.total() < 1000, label
    assert server.post("/v1/completions", {"prompt": "x", "max_tokens": 1}).status_code == 200
