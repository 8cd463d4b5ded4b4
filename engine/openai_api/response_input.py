"""The body of a /v1/responses request, and the messages of a chat that its input stands for."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict

from gemcut.engine.openai_api.described import ArrayOf, Item, MapOf, ResponseTool, within
from gemcut.engine.openai_api.errors import ApiError
from gemcut.engine.openai_api.fields import (
    SamplingFields,
    json_object_constraint,
    read_structured_outputs,
    schema_constraint,
)
from gemcut.engine.openai_api.logprobs import MAX_TOP_LOGPROBS
from gemcut.engine.requests.sampling_params import INT64_MAX
from gemcut.engine.requests.structured_outputs import StructuredOutputsParams

# what would change the answer and is not there
REFUSED = {
    "previous_response_id": "no response is kept: send the conversation as input",
    "conversation": "no conversation is kept: send it as input",
    "background": "an answer is given at once",
    "prompt": "no prompt is kept: send it as input",
}


class TextFormat(BaseModel):
    """The form of the answer's text."""

    model_config = ConfigDict(extra="allow")
    format: dict[str, Any] | None = None


class ResponseRequest(SamplingFields):
    """The body of a request; None is the model's own setting."""

    input: str | ArrayOf[Item]
    instructions: str | None = None
    max_output_tokens: Annotated[int | None, within(1, INT64_MAX)] = None
    top_logprobs: Annotated[int | None, within(0, MAX_TOP_LOGPROBS)] = None
    include: ArrayOf[str] | None = None
    text: TextFormat | None = None
    tools: ArrayOf[ResponseTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    metadata: MapOf[str] | None = None
    truncation: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self, max_n: int) -> list[str]:
        """The names of fields that are not known; ApiError for one that is refused."""
        unknown = dict(self.model_extra or {})
        if self.n not in (None, 1):
            raise ApiError(400, "n: a response is one answer", param="n")
        if self.response_format is not None:
            raise ApiError(400, "response_format: use text.format", param="response_format")
        for name, reason in REFUSED.items():
            if unknown.get(name) not in (None, False):
                raise ApiError(400, f"{name} is not supported: {reason}", param=name)
        if self.truncation not in (None, "disabled"):
            raise ApiError(400, "truncation: a prompt is never cut", param="truncation")
        return super().check(max_n)

    def form(self) -> dict[str, Any]:
        """The form of the text, as the request says it."""
        form = None if self.text is None else self.text.format
        return {"type": "text"} if form is None else form

    @property
    def has_form(self) -> bool:
        return self.structured_outputs is not None or self.form().get("type") != "text"

    def constraint(self) -> StructuredOutputsParams | None:
        """What the answer's text must be, of the two ways to say it."""
        form = self.form()
        kind = form.get("type")
        if kind == "text":
            given = self.structured_outputs
            return None if given is None else read_structured_outputs(given)
        if self.structured_outputs is not None:
            raise ApiError(400, "text.format and structured_outputs are two forms of an answer")
        if kind == "json_object":
            return json_object_constraint()
        schema = form.get("schema")
        if kind != "json_schema" or not isinstance(schema, dict | bool):
            message = "text.format is neither text, json_object nor json_schema with a schema"
            raise ApiError(400, message, param="text.format")
        return schema_constraint(schema)

    def messages(self) -> list[dict[str, Any]]:
        """The conversation as a chat has it."""
        system = [] if self.instructions is None else [_turn("system", self.instructions)]
        if isinstance(self.input, str):
            return [*system, _turn("user", self.input)]
        messages = system
        for index, item in enumerate(self.input):
            message = _message(index, item)
            before = messages[-1] if messages else {}
            if message.get("tool_calls") and before.get("role") == "assistant":  # of one answer
                before["tool_calls"] = before.get("tool_calls", []) + message["tool_calls"]
            else:
                messages.append(message)
        return messages

    def chat_tools(self) -> list[dict[str, Any]] | None:
        """The tools as a chat has them."""
        if self.tools is None:
            return None
        return [
            {"type": tool.get("type"), "function": {k: v for k, v in tool.items() if k != "type"}}
            for tool in self.tools
        ]


def _turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _message(index: int, item: dict[str, Any]) -> dict[str, Any]:
    """A chat's message of an item of the input; ApiError for one that no chat has."""
    kind = item.get("type", "message")
    if kind == "message":
        content = item.get("content")
        if isinstance(content, list):
            content = [_part(part) for part in content]
        return _turn(item.get("role"), content)  # type: ignore[arg-type]  # the chat checks it
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return {**_turn("assistant", ""), "tool_calls": [call]}
    if kind == "function_call_output":
        result = item.get("output")
        return {**_turn("tool", result), "tool_call_id": item.get("call_id")}
    where = f"input.{index}"
    raise ApiError(
        400, f"{where} is of type {str(kind)[:40]!r}: text and calls are read", param=where
    )


def _part(part: Any) -> Any:
    """A part of content as chats have it."""
    if isinstance(part, dict) and part.get("type") in ("input_text", "output_text"):
        return {"type": "text", "text": part.get("text")}
    return part
