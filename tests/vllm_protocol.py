"""What vLLM's types find in transcripts of the wire: run by the Python of an environment with vLLM.

    python tests/vllm_protocol.py FOLDER

prints a JSON list: what is wrong in requests and answers, and fields that the types do not have.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from openai.types import responses as events
from pydantic import BaseModel, TypeAdapter, ValidationError
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatCompletionStreamResponse,
)
from vllm.entrypoints.openai.completion.protocol import (
    CompletionRequest,
    CompletionResponse,
    CompletionStreamResponse,
)
from vllm.entrypoints.openai.responses.protocol import (
    ResponsesRequest,
    ResponsesResponse,
    StreamingResponsesResponse,
)
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

KINDS: dict[str, tuple[Any, Any, Any]] = {
    "/v1/completions": (CompletionRequest, CompletionResponse, CompletionStreamResponse),
    "/v1/chat/completions": (
        ChatCompletionRequest,
        ChatCompletionResponse,
        ChatCompletionStreamResponse,
    ),
    "/v1/responses": (
        ResponsesRequest,
        ResponsesResponse,
        None,
    ),
}
# which vLLM sends as they are
OF_OPENAI = (
    events.ResponseIncompleteEvent,
    events.ResponseTextDeltaEvent,
    events.ResponseTextDoneEvent,
    events.ResponseFunctionCallArgumentsDeltaEvent,
    events.ResponseFunctionCallArgumentsDoneEvent,
)
EVENTS = {
    get_args(kind.model_fields["type"].annotation)[0]: kind
    for kind in (*get_args(StreamingResponsesResponse), *OF_OPENAI)
}


def unmasked(value: Any) -> Any:
    """A transcript's value with numbers where they are masked."""
    if isinstance(value, dict):
        return {name: unmasked(one) for name, one in value.items()}
    if isinstance(value, list):
        return [unmasked(one) for one in value]
    return {"<int>": 1, "<float>": -1.0}.get(value, value) if isinstance(value, str) else value


def unknown(value: Any) -> Iterator[str]:
    """Type and name of each field that a validated value's types do not have."""
    if isinstance(value, BaseModel):
        for name in value.model_extra or {}:
            yield f"{type(value).__name__}.{name}"
        for name in value.model_fields_set:
            yield from unknown(getattr(value, name))
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from unknown(one)


def problems(kind: Any, value: Any) -> set[str]:
    """What is wrong with a value, and what of it is unknown."""
    try:
        return {f"unknown: {one}" for one in unknown(TypeAdapter(kind).validate_python(value))}
    except ValidationError as error:
        return {
            f"{'.'.join(re.sub(r'[0-9]+', 'N', str(part)) for part in one['loc'])}: {one['msg']}"
            for one in error.errors()
        }


def look(transcript: dict[str, Any]) -> set[str]:
    """The problems of one exchange."""
    request = transcript["request"]
    of_request, whole, chunk = KINDS[request["path"]]
    answer = unmasked(transcript["answer"])
    found = {f"request: {one}" for one in problems(of_request, {"model": "demo"} | request["body"])}
    if transcript["status"] != 200:
        found |= problems(ErrorResponse, answer)
    elif isinstance(answer, dict):
        found |= problems(whole, answer)
    else:
        for event in answer:
            if event["data"] != "[DONE]":
                found |= problems(chunk or EVENTS[event["event"]], event["data"])
    return found


if __name__ == "__main__":
    files = sorted(Path(sys.argv[1]).iterdir())
    found = {problem for file in files for problem in look(json.loads(file.read_text()))}
    print(json.dumps(sorted(found)))
