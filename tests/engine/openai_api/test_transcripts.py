"""What goes over the wire, as transcripts/*.json have it: requests, and answers without their ids.

A change of the wire shows in these files.  After one that is meant, write them anew:

    GEMCUT_WRITE_TRANSCRIPTS=1 pytest tests/engine/openai_api/test_transcripts.py

The engine is dictated what it writes, so they hold for every device; log-probabilities, times and
numbers of cached tokens are masked.
"""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from engines import Dictation
from servers import serving

from gemcut.engine import Engine, SamplingParams

pytest.importorskip("llguidance")

FOLDER = Path(__file__).parent / "transcripts"
USER = {"role": "user", "content": "How is the weather in Paris?"}
WEATHER = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
    },
}
CALL = '{"name": "weather", "parameters": {"city": "Paris"}}'
TOOLS = {"messages": [USER], "tools": [{"type": "function", "function": WEATHER}]}
NAMED = {"tool_choice": {"type": "function", "function": {"name": "weather"}}}
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
LOGPROBS = {"logprobs": True, "top_logprobs": 0}
# what the model writes, the path, the body
EXCHANGES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "completion": (" was late.", "completions", {"prompt": "It", "max_tokens": 9, "user": "me"}),
    "completion_stream": (" was late.", "completions", {"prompt": "It", "max_tokens": 2} | USAGE),
    "completion_echo": (
        " was",
        "completions",
        {"prompt": "It rained.", "echo": True, "logprobs": 0, "max_tokens": 1},
    ),
    "completion_batch": (" was late.", "completions", {"prompt": ["It", "She"], "n": 2}),
    "chat": ("Fair, I hear.", "chat/completions", {"messages": [USER]}),
    "chat_stream": (
        "Fair é.",
        "chat/completions",
        {"messages": [USER], "stop": ["."]} | LOGPROBS | USAGE,
    ),
    "chat_choices": ("Fair.", "chat/completions", {"messages": [USER], "n": 2} | LOGPROBS),
    "chat_choices_stream": ("Fair.", "chat/completions", {"messages": [USER], "n": 2} | USAGE),
    "tools_forced": (CALL, "chat/completions", TOOLS | NAMED),
    "tools_forced_stream": (CALL, "chat/completions", TOOLS | NAMED | USAGE),
    "tools_chosen_stream": (
        f"Let me see.\n{CALL}\n{CALL}",
        "chat/completions",
        TOOLS | {"tool_choice": "auto", "stream": True},
    ),
    "json_schema": (
        '{"city": "Paris"}',
        "chat/completions",
        {
            "messages": [USER],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "city", "schema": CITY, "strict": True},
            },
        },
    ),
    "response": (
        "Fair.",
        "responses",
        {"input": "How is it?", "instructions": "Be brief.", "metadata": {"a": "b"}},
    ),
    "response_schema": (
        '{"city": "Paris"}',
        "responses",
        {
            "input": "Where?",
            "text": {"format": {"type": "json_schema", "name": "city", "schema": CITY}},
        },
    ),
    "response_stream": ("Fair, I hear.", "responses", {"input": [USER], "max_output_tokens": 2}),
    "response_tool_stream": (
        f"So:\n{CALL}",
        "responses",
        {"input": "How is it?", "tools": [{"type": "function", **WEATHER}]},
    ),
    "error_value": ("", "completions", {"prompt": "It", "temperature": -1}),
    "error_model": ("", "chat/completions", {"messages": [USER], "model": "gpt"}),
    "error_length": ("", "chat/completions", {"messages": [USER | {"content": "x " * 600}]}),
}
for name in ("response_stream", "response_tool_stream"):
    EXCHANGES[name][2]["stream"] = True

VLLM = os.environ.get("GEMCUT_VLLM_PYTHON")
DIFFERENCES = {
    # OpenAI's code is a word or null, vLLM's the status
    "error.code: Input should be a valid integer",
    "error.code: Input should be a valid integer, unable to parse string as an integer",
    # OpenAI's fields beyond vLLM's
    "unknown: ChatCompletionLogProbs.refusal",
    "unknown: Response.store",
    "unknown: ResponseFunctionCallArgumentsDoneEvent.name",
    # what the request says, null as it is, and no tier
    "max_output_tokens: Input should be a valid integer",
    "response.max_output_tokens: Input should be a valid integer",
    "service_tier: Field required",
    "response.service_tier: Field required",
}
TIMES = ("created", "created_at", "completed_at")
IDS = re.compile(r"\b(chatcmpl|cmpl|call|resp|msg|fc)[-_][0-9a-f]{24}\b")


def masked(value: Any, key: str = "") -> Any:
    """A JSON value without what differs from run to run; the kind of each stays."""
    if isinstance(value, dict):  # of the likeliest tokens, by their texts
        return {n: masked(one, key if "logprob" in key else n) for n, one in value.items()}
    if isinstance(value, list):
        return [masked(one, key) for one in value]
    if isinstance(value, str):
        return IDS.sub(r"<\1>", value)
    is_number = isinstance(value, int | float)
    if is_number and key in (*TIMES, "cached_tokens"):
        return f"<{type(value).__name__}>"
    return f"<{type(value).__name__}>" if isinstance(value, float) and "logprob" in key else value


def transcript(server: Any, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """One exchange as its file has it."""
    response = server.post(f"/v1/{path}", body)
    kind = response.headers["content-type"]
    said: Any
    if kind.startswith("text/event-stream"):
        said = [
            {
                field: masked(json.loads(text)) if text.startswith("{") else text
                for field, text in (line.split(": ", 1) for line in event.split("\n"))
            }
            for event in response.text.removesuffix("\n\n").split("\n\n")
        ]
    else:
        said = masked(response.json())
    return {
        "request": {"path": f"/v1/{path}", "body": body},
        "status": response.status_code,
        "content-type": kind,
        "answer": said,
    }


def spelt(exchange: dict[str, Any]) -> str:
    """Its JSON, with an event of a stream in each line."""
    if not isinstance(events := exchange["answer"], list):
        return json.dumps(exchange, indent=1, ensure_ascii=False) + "\n"
    lines = ",\n".join(f"  {json.dumps(event, ensure_ascii=False)}" for event in events)
    text = json.dumps(exchange | {"answer": []}, indent=1, ensure_ascii=False)
    return text.replace('"answer": []', f'"answer": [\n{lines}\n ]') + "\n"


@pytest.fixture(scope="module")
def dictation():
    return Dictation()


@pytest.fixture(scope="module")
def dictated(dictation):
    params = SamplingParams(logits_processors=[dictation])
    engine = Engine.from_pretrained(
        "demo", max_batch_size=4, default_params=params, generation_config="none"
    )
    with engine, serving(engine, merge_system=True) as server:
        yield server


@pytest.mark.parametrize("name", EXCHANGES)
def test_the_wire_is_as_it_was(dictated, dictation, name):
    text, path, body = EXCHANGES[name]
    dictation.set(dictated.service.tokenizer, text)
    found = transcript(dictated, path, body)
    file = FOLDER / f"{name}.json"
    if os.environ.get("GEMCUT_WRITE_TRANSCRIPTS"):
        FOLDER.mkdir(exist_ok=True)
        file.write_text(spelt(found))
    assert found == json.loads(file.read_text())


@pytest.mark.skipif(VLLM is None, reason="GEMCUT_VLLM_PYTHON names no Python")
def test_what_differs_from_the_types_of_vllm_is_known():
    """Each request is one of vLLM's, and so is each answer, but for what the page lists."""
    script = FOLDER.parents[2] / "vllm_protocol.py"
    # not the paths and settings of this process, some of which are for the kernels' interpreter
    environment = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    command = [str(VLLM), str(script), str(FOLDER)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(json.loads(done.stdout.splitlines()[-1])) == DIFFERENCES


def test_every_transcript_is_of_an_exchange():
    assert {file.stem for file in FOLDER.iterdir()} == set(EXCHANGES)
