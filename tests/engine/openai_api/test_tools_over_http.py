"""Calls of tools through the server, from texts that the model is dictated."""

import json

import pytest
from engines import Dictation
from random_models import random_model
from servers import serving
from twins import gemcut_twin

from gemcut.engine import Engine, SamplingParams

pytest.importorskip("llguidance")

from tool_grammars import tool_tokenizer

USER = {"role": "user", "content": "How is the weather in Paris?"}
PROPERTIES = {"city": {"type": "string", "maxLength": 20}, "days": {"type": "integer"}}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": parameters}}
    for name, parameters in {
        "weather": {"type": "object", "properties": PROPERTIES, "required": ["city"]},
        "now": {"type": "object", "properties": {}},
    }.items()
]
PARIS, ROME, NOW = (
    ("weather", {"city": "Paris"}),
    ("weather", {"city": "Rome", "days": 2}),
    ("now", {}),
)
JSON_PARIS = '{"name": "weather", "parameters": {"city": "Paris"}}'
JSON_NOW = '{"name": "now", "parameters": {}}'
NAMED = {"type": "function", "function": {"name": "weather"}}
# a template with Gemma 4's or FunctionGemma's calls, as far as they matter here
TEMPLATE = """{{ bos_token }}{% for tool in tools or [] %}[tool {{ tool['function']['name'] }}]
{% endfor %}{% for message in messages %}[{{ message['role'] }}] {% if message['role'] == 'tool' -%}
{{ '<start_function_response>' }}{% endif %}{{ message['content'] -}}
{% for call in message.get('tool_calls') or [] %}OPENcall:{{ call['function']['name'] }}{
{%- for key, value in call['function']['arguments'] | dictsort %}{{ key }}:QUOTE{{ value }}QUOTE
{%- endfor %}}CLOSE{% endfor %}{% for result in message.get('tool_responses') or [] -%}
{{ '<|tool_response>' }}{{ result }}{% endfor %}
{% endfor %}{% if add_generation_prompt %}[model] {% endif %}"""
MARKS = {
    "functiongemma": ("<start_function_call>", "<end_function_call>", "<escape>"),
    "gemma4": ("<|tool_call>", "<tool_call|>", '<|"|>'),
}
RESULTS = ("<start_function_response>", "<|tool_response>")


@pytest.fixture(scope="module")
def dictation():
    return Dictation()


@pytest.fixture(scope="module")
def plain(dictation):
    """The demo model, which has no tokens for calls."""
    params = SamplingParams(logits_processors=[dictation])
    engine = Engine.from_pretrained(
        "demo", max_batch_size=4, default_params=params, generation_config="none"
    )
    with engine, serving(engine) as server:
        yield server


@pytest.fixture(scope="module", params=MARKS)
def marked(request, dictation):
    """A model with FunctionGemma's and Gemma 4's tokens, and the template of one of them."""
    tokenizer = tool_tokenizer(special=True)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024}
    template = TEMPLATE
    for name, mark in zip(("OPEN", "CLOSE", "QUOTE"), MARKS[request.param], strict=True):
        template = template.replace(name, f"{{{{ {mark!r} }}}}")
    engine = Engine(
        gemcut_twin(random_model("gemma3_text", **sizes)),
        tokenizer,
        max_batch_size=4,
        max_seq_len=1024,
        default_params=SamplingParams(logits_processors=[dictation]),
    )
    with engine, serving(engine, chat_template=template) as server:
        assert server.service.tool_format.name == request.param
        yield server


def whole(server, body):
    """Content, calls and the end of an answer."""
    response = server.post("/v1/chat/completions", {"messages": [USER], "tools": TOOLS} | body)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    message = choice["message"]
    calls = message.get("tool_calls", [])
    assert len({call["id"] for call in calls}) == len(calls)
    found = [(one["function"]["name"], json.loads(one["function"]["arguments"])) for one in calls]
    return message["content"], found, choice["finish_reason"]


def streamed(server, body):
    """The same of a stream."""
    content, calls, reasons = "", [], []
    chunks = server.events("/v1/chat/completions", {"messages": [USER], "tools": TOOLS} | body)
    for chunk in chunks:
        (choice,) = chunk["choices"]
        content += choice["delta"].get("content") or ""
        for call in choice["delta"].get("tool_calls", []):
            assert call["index"] == len(calls)
            function = call["function"]
            calls.append((function["name"], json.loads(function["arguments"])))
        reasons += [choice["finish_reason"]] * (choice["finish_reason"] is not None)
    (reason,) = reasons
    return content or (None if calls else ""), calls, reason


def of_responses(server, body):
    """Texts and calls of a response, in order."""
    tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
    asked = {"input": USER["content"], "tools": tools} | body
    response = server.post("/v1/responses", asked).json()
    *_, last = server.events("/v1/responses", asked)
    found, again = (
        [
            (one["name"], json.loads(one["arguments"]))
            if one["type"] == "function_call"
            else one["content"][0]["text"]
            for one in output
        ]
        for output in (response["output"], last["response"]["output"])
    )
    assert found == again
    return found


# what the model writes, what else is asked, content, calls, the end
CASES = {
    "json": (JSON_PARIS, {}, None, [PARIS], "tool_calls"),
    "python": ('weather(city="Paris")', {}, None, [PARIS], "tool_calls"),
    "python-order": ('weather("Rome", 2)', {}, None, [ROME], "tool_calls"),
    "json-list": (f"[{JSON_PARIS}, {JSON_NOW}]", {}, None, [PARIS, NOW], "tool_calls"),
    "json-lines": (f"{JSON_PARIS}\n{JSON_NOW}", {}, None, [PARIS, NOW], "tool_calls"),
    "python-list": ('[weather("Paris"), now()]', {}, None, [PARIS, NOW], "tool_calls"),
    "fence": ('```tool_code\nweather("Paris")\n```', {}, None, [PARIS], "tool_calls"),
    "text-before": (f"Let me see.\n{JSON_NOW}", {}, "Let me see.\n", [NOW], "tool_calls"),
    "no-call": ("It is fair.", {}, "It is fair.", [], "stop"),
    "no-tool": ('{"name": "other"}', {}, '{"name": "other"}', [], "stop"),
    "auto": (JSON_NOW, {"tool_choice": "auto"}, None, [NOW], "tool_calls"),
    "none": (JSON_NOW, {"tool_choice": "none"}, JSON_NOW, [], "stop"),
    "required": (JSON_NOW, {"tool_choice": "required"}, None, [NOW], "tool_calls"),
    "required-two": (
        f"[{JSON_PARIS}, {JSON_NOW}]",
        {"tool_choice": "required"},
        None,
        [PARIS, NOW],
        "tool_calls",
    ),
    "named": (JSON_PARIS, {"tool_choice": NAMED}, None, [PARIS], "tool_calls"),
    "half": (JSON_PARIS, {"max_tokens": 8}, ..., [], "length"),
    "half-python": ('weather(city="Paris")', {"max_tokens": 4}, ..., [], "length"),
    "half-forced": (JSON_PARIS, {"max_tokens": 8, "tool_choice": NAMED}, ..., [], "length"),
    "half-second": (f"{JSON_NOW}\n{JSON_PARIS}", {"max_tokens": 34}, ..., [NOW], "length"),
    "stop": (JSON_PARIS, {"stop": ["Pa"]}, JSON_PARIS.partition("Pa")[0], [], "stop"),
}


@pytest.mark.parametrize("name", CASES)
def test_plain_calls(plain, dictation, name):
    text, asked, content, calls, reason = CASES[name]
    dictation.set(plain.service.tokenizer, text)
    found = whole(plain, asked)
    assert found == streamed(plain, asked)
    assert found[1:] == (calls, reason)
    if content is ...:  # as far as the limit let it
        assert found[0]
        assert found[0] in text
        assert text.startswith(found[0]) or calls
    else:
        assert found[0] == content


def test_calls_of_two_choices_are_numbered_apart(plain, dictation):
    dictation.set(plain.service.tokenizer, f"{JSON_PARIS}\n{JSON_NOW}")
    body = {"messages": [USER], "tools": TOOLS, "n": 2}
    found = {0: [], 1: []}
    for chunk in plain.events("/v1/chat/completions", body):
        for choice in chunk["choices"]:
            found[choice["index"]] += [c["index"] for c in choice["delta"].get("tool_calls", [])]
    assert found == {0: [0, 1], 1: [0, 1]}


def test_a_response_has_texts_and_calls_in_order(plain, dictation):
    dictation.set(plain.service.tokenizer, f"First:\n{JSON_PARIS}\n{JSON_NOW}")
    assert of_responses(plain, {}) == ["First:\n", PARIS, NOW]


def prompt_of(server, messages):
    """The prompt of a chat; the numbers of its tokens are those of an answer to it."""
    body = {"messages": messages, "tools": TOOLS}
    ids = server.post("/tokenize", body).json()["tokens"]
    answer = server.post("/v1/chat/completions", body | {"max_tokens": 1})
    assert answer.json()["usage"]["prompt_tokens"] == len(ids)
    return server.post("/detokenize", {"tokens": ids}).json()["prompt"]


def second_turn(server, result):
    """The messages after an answer with a call."""
    body = {"messages": [USER], "tools": TOOLS}
    message = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]
    (call,) = message["tool_calls"]
    return [USER, message, {"role": "tool", "tool_call_id": call["id"], "content": result}]


def test_a_result_is_a_turn_of_the_user(plain, dictation):
    dictation.set(plain.service.tokenizer, JSON_PARIS)
    messages = second_turn(plain, '{"sky": "fair"}')
    prompt = prompt_of(plain, messages)
    assert f"<start_of_turn>model\n{JSON_PARIS}<end_of_turn>" in prompt
    result = '```tool_output\n{"name": "weather", "response": {"sky": "fair"}}\n```'
    assert f"<start_of_turn>user\n{result}<end_of_turn>" in prompt
    dictation.set(plain.service.tokenizer, "Fair.")
    assert whole(plain, {"messages": messages}) == ("Fair.", [], "stop")


def test_the_output_of_a_response_is_input_again(plain, dictation):
    """Its text and its calls are one turn of the model, as they were."""
    dictation.set(plain.service.tokenizer, f"First:\n{JSON_NOW}\n{JSON_NOW}")
    tools = [{"type": "function", **tool["function"]} for tool in TOOLS[1:]]
    body = {"tools": tools, "tool_choice": "auto"}
    user = {"role": "user", "content": USER["content"]}
    output = plain.post("/v1/responses", body | {"input": [user]}).json()["output"]
    assert [one["type"] for one in output] == ["message", "function_call", "function_call"]
    results = [
        {"type": "function_call_output", "call_id": one["call_id"], "output": "6"}
        for one in output[1:]
    ]
    dictation.set(plain.service.tokenizer, "Fair.")
    again = plain.post("/v1/responses", body | {"input": [user, *output, *results]})
    assert again.status_code == 200, again.text
    calls = [{"id": o["call_id"], "type": "function", "function": o} for o in output[1:]]
    text = output[0]["content"][0]["text"]
    chat = [
        USER,
        {"role": "assistant", "content": text, "tool_calls": calls},
        *({"role": "tool", "tool_call_id": r["call_id"], "content": r["output"]} for r in results),
    ]
    chat_prompt = plain.post("/tokenize", {"messages": chat, "tools": TOOLS[1:]}).json()
    assert again.json()["usage"]["input_tokens"] == chat_prompt["count"]
    assert again.json()["output"][0]["content"][0]["text"] == "Fair."


def spelt(server, *calls):
    """Calls as the model of this server writes them."""
    opening, closing, quote = MARKS[server.service.tool_format.name]

    def value(one):
        return f"{quote}{one}{quote}" if isinstance(one, str) else json.dumps(one)

    return "".join(
        f"{opening}call:{name}{{{','.join(f'{k}:{value(v)}' for k, v in given.items())}}}{closing}"
        for name, given in calls
    )


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_marked_calls(marked, dictation, choice):
    tokenizer, asked = marked.service.tokenizer, {"tool_choice": choice}
    dictation.set(tokenizer, spelt(marked, PARIS, ROME, NOW))
    found = whole(marked, asked)
    assert found == streamed(marked, asked) == (None, [PARIS, ROME, NOW], "tool_calls")
    dictation.set(tokenizer, spelt(marked, PARIS))
    named = {"tool_choice": NAMED}
    assert whole(marked, named) == streamed(marked, named) == (None, [PARIS], "tool_calls")
    assert of_responses(marked, asked) == [PARIS]


def test_a_marked_call_after_text_and_before_its_result(marked, dictation):
    """The model goes on with a result that it makes up: the answer ends there."""
    text = f"I look.{spelt(marked, PARIS)}"
    for mark in RESULTS:
        dictation.set(marked.service.tokenizer, f"{text}{mark}fair")
        found = whole(marked, {})
        assert found == streamed(marked, {})
        if marked.service.tokenizer.id_of(mark) in marked.service.tool_format.stop_token_ids:
            assert found == ("I look.", [PARIS], "tool_calls")


def test_half_a_marked_call_is_text(marked, dictation):
    text = spelt(marked, PARIS)
    dictation.set(marked.service.tokenizer, text)
    found = whole(marked, {"max_tokens": 5})
    assert found == streamed(marked, {"max_tokens": 5})
    assert found[1:] == ([], "length")
    assert found[0]


def test_a_marked_result_goes_where_the_template_has_it(marked, dictation):
    dictation.set(marked.service.tokenizer, spelt(marked, PARIS))
    messages = second_turn(marked, '{"sky": "fair"}')
    prompt = prompt_of(marked, messages)
    assert "[tool weather]\n[tool now]\n" in prompt
    assert spelt(marked, PARIS) in prompt
    mark = RESULTS[marked.service.tool_format.name == "gemma4"]
    assert f"{mark}{{'name': 'weather', 'response': {{'sky': 'fair'}}}}" in prompt
    dictation.set(marked.service.tokenizer, "Fair.")
    assert whole(marked, {"messages": messages}) == ("Fair.", [], "stop")
