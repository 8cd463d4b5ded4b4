"""Bodies that are built to cost: each is refused soon, in few bytes, and delays nobody."""

import json
from itertools import product

import pytest
from pydantic import ValidationError
from servers import check_error, wait_until

from gemcut.engine.openai_api.chat import ChatRequest
from gemcut.engine.openai_api.completions import CompletionRequest
from gemcut.engine.openai_api.response_input import ResponseRequest
from gemcut.engine.openai_api.tokens import DetokenizeRequest, TokenizeRequest

REQUESTS = (CompletionRequest, ChatRequest, ResponseRequest, TokenizeRequest, DetokenizeRequest)
MANY = 5000
WRONG = [
    [{}] * MANY,
    [[]] * MANY,
    ["x"] * MANY,
    [None] * MANY,
    [[{}] * MANY],
    [["x"]] * MANY,
    {f"k{number}": [] for number in range(MANY)},
    {f"k{number}": "x" for number in range(MANY)},
]


@pytest.mark.parametrize("request_type", REQUESTS)
def test_the_first_errors_of_a_field_are_enough(request_type):
    """4 MB of them took 49 seconds and 5 GB, while every other stream stood still."""
    for name, wrong in product(request_type.model_fields, WRONG):
        with pytest.raises(ValidationError) as refused:
            request_type.model_validate({name: wrong, "model": 1})
        assert refused.value.error_count() < 100, name


def test_numbers_of_a_large_object_are_all_read(server):
    bias = {str(number): "0.5" if number % 2 else -1 for number in range(1000)}
    read = CompletionRequest.model_validate({"prompt": "x", "logit_bias": bias}).logit_bias
    assert read == {key: float(value) for key, value in bias.items()}
    response = server.post("/v1/completions", {"prompt": "x", "logit_bias": bias | {"7": "y"}})
    check_error(response, 400, "logit_bias.7")


def test_a_line_of_the_log_stays_short(server, caplog):
    caplog.set_level("INFO", "gemcut.access")
    body = {"prompt": "x", "max_tokens": 1, "k" * 10**6: 1} | {f"k{n}": 1 for n in range(10**4)}
    assert server.post("/v1/completions", body).status_code == 200
    wait_until(lambda: "k100" in caplog.text)
    (line,) = [one for one in caplog.messages if "k100" in one]
    assert len(line) < 5000
    assert json.loads(line)["ignored"][-1] == "and 9969 more"


@pytest.mark.parametrize("key", ["y" * 10**6, "\ud800", "a\nb\x1b[31m"])
def test_an_error_names_a_hostile_field_in_a_few_printable_characters(server, key):
    response = server.post("/v1/completions", {"prompt": "x", "logit_bias": {key: "y"}})
    check_error(response, 400, "logit_bias")
    param = response.json()["error"]["param"]
    assert len(param) <= 300
    assert param.isprintable()
