"""/v1/responses: the answer as output items, whole or as typed events.  Nothing is kept."""

import secrets
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from openai.types import responses as types
from openai.types.responses import response_output_text, response_usage
from openai.types.responses.response import IncompleteDetails
from pydantic import BaseModel, ValidationError

from gemcut.engine.openai_api.answer import Answer
from gemcut.engine.openai_api.conversation import Conversation, read_tools
from gemcut.engine.openai_api.errors import ApiError, of_validation
from gemcut.engine.openai_api.events import wire
from gemcut.engine.openai_api.logprobs import chat_logprobs, check_top_logprobs
from gemcut.engine.openai_api.response_input import ResponseRequest
from gemcut.engine.openai_api.service import Service
from gemcut.engine.openai_api.tool_calls import ToolCall
from gemcut.engine.serving.output_queues import AsyncStream

Item = types.ResponseOutputMessage | types.ResponseFunctionToolCall
LOGPROBS = "message.output_text.logprobs"  # what `include` names


class _Response(types.Response):
    """A response whose times are integers: the type has floats, and the API does not."""

    created_at: int  # type: ignore[assignment]
    completed_at: int | None = None  # type: ignore[assignment]


class ResponseAnswer(Answer):
    """One request for a response."""

    end = ""  # the last event says that it is

    def __init__(self, service: Service, request: ResponseRequest, log: dict[str, Any]) -> None:
        super().__init__(service, log)
        self._request = request
        self._model = service.model_name(request.model)
        self._created = int(time.time())
        log["ignored"] = request.check(service.settings.max_n)
        check_top_logprobs(top := request.top_logprobs)
        self._wants_logprobs = LOGPROBS in (request.include or []) or bool(top)
        tools = read_tools(request.chat_tools(), request.tool_choice, request.parallel_tool_calls)
        self._conversation = Conversation(service, tools)
        self.compiles = request.has_form or (tools is not None and tools.is_forced)
        self._output: list[Item] = []  # complete items
        self._numbers = 0  # events so far
        try:
            self._response(None)
        except ValidationError as error:  # in what it repeats of the request
            raise of_validation(error.errors()) from None

    def build(self) -> AsyncStream:
        request = self._request
        params = request.sampling_params(
            self.service.defaults,
            n=1,
            max_tokens=request.max_output_tokens,
            logprobs=(request.top_logprobs or 0) if self._wants_logprobs else None,
        )
        template = {"chat_template_kwargs": request.chat_template_kwargs}
        return self._conversation.stream(request.messages(), params, **template)

    def body(self) -> types.Response:
        ((index, one),) = self.generation.outputs()
        for piece in self._conversation.push(index, one.text, is_last=True):
            self._take(piece)
        if not self._output:
            self._take("")
        for item in self._output:
            if isinstance(item, types.ResponseOutputMessage):
                item.status = "completed"
                _text_of(item).logprobs = self._logprobs(one.token_ids, one.logprobs)
        last = self._output[-1]
        if one.finish_reason != "stop" and isinstance(last, types.ResponseOutputMessage):
            last.status = "incomplete"
        return self._response(one.finish_reason)

    async def events(self) -> AsyncIterator[str]:
        started = self._response(None)
        yield self._event(types.ResponseCreatedEvent, "created", response=started)
        yield self._event(types.ResponseInProgressEvent, "in_progress", response=started)
        reason = None
        async for index, delta in self.generation.deltas():
            reason = delta.finish_reason
            logprobs = self._logprobs(delta.token_ids, delta.logprobs)
            pieces = self._conversation.push(index, delta.text, is_last=reason is not None)
            if reason is not None and not pieces and not self._output:
                pieces = [""]
            for piece in pieces:
                is_new = self._take(piece)
                item = self._output[-1]
                if isinstance(item, types.ResponseOutputMessage):
                    for one in self._text_events(item, str(piece), logprobs, is_new):
                        yield one
                    logprobs = []
                else:
                    for one in [*self._close_message(-2), *self._call_events(item)]:
                        yield one
        status = "completed" if reason == "stop" else "incomplete"
        for one in self._close_message(-1, status):
            yield one
        ended = self._response(reason)
        kind = types.ResponseCompletedEvent
        if ended.status == "incomplete":
            kind = types.ResponseIncompleteEvent
        yield self._event(kind, str(ended.status), response=ended)

    def _take(self, piece: str | ToolCall) -> bool:
        """Add a piece to the output; whether it has begun a new item."""
        last = self._output[-1] if self._output else None
        if isinstance(piece, ToolCall):
            self._output.append(_call_item(piece))
        elif isinstance(last, types.ResponseOutputMessage):
            _text_of(last).text += piece
            return False
        else:
            self._output.append(_message_item(piece))
        return True

    def _text_events(
        self, item: types.ResponseOutputMessage, text: str, logprobs: list[Any], is_new: bool
    ) -> Iterator[str]:
        where = {"output_index": len(self._output) - 1}
        part = {**where, "item_id": item.id, "content_index": 0}
        if is_new:
            empty = item.model_copy(update={"content": []})
            yield self._event(
                types.ResponseOutputItemAddedEvent, "output_item.added", item=empty, **where
            )
            nothing = _text_of(_message_item(""))
            yield self._event(
                types.ResponseContentPartAddedEvent, "content_part.added", part=nothing, **part
            )
        given = [one.model_dump(exclude={"bytes"}) for one in logprobs]
        yield self._event(
            types.ResponseTextDeltaEvent, "output_text.delta", delta=text, logprobs=given, **part
        )

    def _close_message(self, place: int, status: Any = "completed") -> Iterator[str]:
        """The events that end a message, if that is what the item at this place is."""
        if len(self._output) < -place or not isinstance(
            item := self._output[place], types.ResponseOutputMessage
        ):
            return
        item.status = status
        where = {"output_index": len(self._output) + place}
        part, text = {**where, "item_id": item.id, "content_index": 0}, _text_of(item)
        yield self._event(
            types.ResponseTextDoneEvent, "output_text.done", text=text.text, logprobs=[], **part
        )
        yield self._event(
            types.ResponseContentPartDoneEvent, "content_part.done", part=text, **part
        )
        yield self._event(types.ResponseOutputItemDoneEvent, "output_item.done", item=item, **where)

    def _call_events(self, item: types.ResponseFunctionToolCall) -> Iterator[str]:
        where = {"output_index": len(self._output) - 1}
        part = {**where, "item_id": item.id}
        begun = item.model_copy(update={"arguments": "", "status": "in_progress"})
        yield self._event(
            types.ResponseOutputItemAddedEvent, "output_item.added", item=begun, **where
        )
        arguments, name = item.arguments, "function_call_arguments"
        yield self._event(
            types.ResponseFunctionCallArgumentsDeltaEvent, f"{name}.delta", delta=arguments, **part
        )
        yield self._event(
            types.ResponseFunctionCallArgumentsDoneEvent,
            f"{name}.done",
            arguments=arguments,
            name=item.name,
            **part,
        )
        yield self._event(types.ResponseOutputItemDoneEvent, "output_item.done", item=item, **where)

    def _event(self, kind: type[BaseModel], name: str, /, **fields: Any) -> str:
        """A typed event, with the number that orders it."""
        number, self._numbers = self._numbers, self._numbers + 1
        named = kind(type=f"response.{name}", sequence_number=number, **fields)
        return f"event: response.{name}\ndata: {wire(named)}\n\n"

    def error_event(self, error: ApiError) -> str:
        named = types.ResponseErrorEvent(
            type="error",
            code=error.code,
            message=error.message,
            param=error.param,
            sequence_number=self._numbers,
        )
        return f"event: error\ndata: {named.model_dump_json()}\n\n"

    def _response(self, finish_reason: str | None) -> types.Response:
        """The response so far; without a reason it has not ended."""
        request, defaults = self._request, self.service.defaults
        status = {None: "in_progress", "stop": "completed"}.get(finish_reason, "incomplete")
        ended: dict[str, Any] = {}
        if finish_reason is not None:
            ended["usage"] = self._usage()
            ended["completed_at"] = int(time.time())
        if status == "incomplete":
            ended["incomplete_details"] = IncompleteDetails(reason="max_output_tokens")
        fields = {
            "id": f"resp_{self.log['id']}",
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "background": False,
            "instructions": request.instructions,
            "metadata": request.metadata or {},
            "model": self._model,
            "output": [item.model_dump(exclude_unset=True, by_alias=True) for item in self._output],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "temperature": _or(request.temperature, defaults.temperature),
            "tool_choice": self._tool_choice(),
            "tools": [{"parameters": None, "strict": None} | tool for tool in request.tools or []],
            "top_p": _or(request.top_p, defaults.top_p),
            "max_output_tokens": request.max_output_tokens,
            "previous_response_id": None,
            "store": False,
            "text": {"format": request.form()},
            "truncation": "disabled",
        }
        return _Response.model_validate(fields | ended)

    def _tool_choice(self) -> Any:
        """The choice in OpenAI's one form: `read_tools` takes that of chats too."""
        choice = self._request.tool_choice
        if isinstance(choice, dict):
            return {"type": "function", "name": choice.get("function", choice)["name"]}
        return _or(choice, "auto")

    def _usage(self) -> response_usage.ResponseUsage:
        usage = self.generation.usage()
        cached = usage.prompt_tokens_details.cached_tokens  # type: ignore[union-attr]
        return response_usage.ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=response_usage.InputTokensDetails(
                cached_tokens=cached or 0, cache_write_tokens=0
            ),
            output_tokens=usage.completion_tokens,
            output_tokens_details=response_usage.OutputTokensDetails(reasoning_tokens=0),
            total_tokens=usage.total_tokens,
        )

    def _logprobs(self, token_ids: list[int], entries: Any) -> list[Any]:
        if not entries or not self._wants_logprobs:
            return []
        top = self._request.top_logprobs or 0
        found = chat_logprobs(self.service.tokenizer, token_ids, entries, top)
        return [response_output_text.Logprob.model_validate(one.model_dump()) for one in found]


def _message_item(text: str) -> types.ResponseOutputMessage:
    part = types.ResponseOutputText(type="output_text", text=text, annotations=[], logprobs=[])
    id_ = f"msg_{secrets.token_hex(12)}"
    return types.ResponseOutputMessage(
        id=id_, type="message", role="assistant", status="in_progress", content=[part]
    )


def _text_of(item: types.ResponseOutputMessage) -> types.ResponseOutputText:
    part = item.content[0]
    assert isinstance(part, types.ResponseOutputText)
    return part


def _call_item(call: ToolCall) -> types.ResponseFunctionToolCall:
    return types.ResponseFunctionToolCall(
        id=f"fc_{secrets.token_hex(12)}",
        call_id=f"call_{secrets.token_hex(12)}",
        type="function_call",
        name=call.name,
        arguments=call.arguments,
        status="completed",
    )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
