"""/v1/chat/completions: the answer to a conversation, which may be calls of tools."""

import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Annotated, Any

from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    ChatCompletionMessageToolCallUnion,
)
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import (
    ChoiceDelta,
    ChoiceDeltaToolCall,
    ChoiceDeltaToolCallFunction,
)
from openai.types.chat.chat_completion_message_function_tool_call import (
    ChatCompletionMessageFunctionToolCall,
    Function,
)

from gemcut.engine.openai_api.answer import Answer
from gemcut.engine.openai_api.conversation import Conversation, read_tools
from gemcut.engine.openai_api.described import ArrayOf, ChatTool, Message, within
from gemcut.engine.openai_api.errors import ApiError
from gemcut.engine.openai_api.events import TextEvents, event
from gemcut.engine.openai_api.fields import SamplingFields
from gemcut.engine.openai_api.logprobs import MAX_TOP_LOGPROBS, chat_logprobs, check_top_logprobs
from gemcut.engine.openai_api.service import Service
from gemcut.engine.openai_api.tool_calls import ToolCall
from gemcut.engine.requests.outputs import Delta, TokenLogprobs
from gemcut.engine.requests.sampling_params import INT64_MAX
from gemcut.engine.serving.output_queues import AsyncStream


class ChatRequest(SamplingFields):
    """The body of a request."""

    messages: ArrayOf[Message]
    max_tokens: Annotated[int | None, within(1, INT64_MAX)] = None
    max_completion_tokens: Annotated[int | None, within(1, INT64_MAX)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, within(0, MAX_TOP_LOGPROBS)] = None
    tools: ArrayOf[ChatTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: ArrayOf[str] | None = None


class ChatAnswer(Answer):
    """One request for the answers to a conversation."""

    def __init__(self, service: Service, request: ChatRequest, log: dict[str, Any]) -> None:
        super().__init__(service, log)
        self._request = request
        self._id, self._created = f"chatcmpl-{log['id']}", int(time.time())
        self._model = service.model_name(request.model)
        log["ignored"] = request.check(service.settings.max_n)
        others = request.model_extra or {}
        for name in ("echo", "add_special_tokens"):
            if others.get(name):
                raise ApiError(400, f"{name}: the template alone makes the prompt", param=name)
        if request.modalities not in (None, ["text"]):
            raise ApiError(400, "modalities: the model answers in text", param="modalities")
        if request.top_logprobs is not None and not request.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs", param="top_logprobs")
        check_top_logprobs(request.top_logprobs)
        tools = read_tools(request.tools, request.tool_choice, request.parallel_tool_calls)
        self._conversation = Conversation(service, tools)
        self.compiles = request.has_form or (tools is not None and tools.is_forced)
        self._calls: Counter[int] = Counter()  # of each choice so far
        self._write = TextEvents(
            lambda choice, text: self._chunk(choice, ChoiceDelta(content=text))
        )

    def build(self) -> AsyncStream:
        request = self._request
        most = request.max_completion_tokens
        top = (request.top_logprobs or 0) if request.logprobs else None
        params = request.sampling_params(
            self.service.defaults,
            max_tokens=request.max_tokens if most is None else most,
            logprobs=top,
        )
        return self._conversation.stream(
            request.messages,
            params,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            chat_template_kwargs=request.chat_template_kwargs,
        )

    def body(self) -> ChatCompletion:
        choices = []
        for index, one in self.generation.outputs():
            pieces = self._conversation.push(index, one.text, is_last=True)
            calls = [_call(piece) for piece in pieces if isinstance(piece, ToolCall)]
            content = "".join(piece for piece in pieces if isinstance(piece, str))
            if calls and not content.strip():
                content = None
            message = ChatCompletionMessage(role="assistant", content=content, refusal=None)
            if calls:
                message.tool_calls = calls
            choices.append(
                Choice(
                    index=index,
                    message=message,
                    logprobs=self._logprobs(one.token_ids, one.logprobs),
                    finish_reason=_reason(one.finish_reason, bool(calls)),
                )
            )
        return ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._model,
            choices=choices,
            usage=self.generation.usage(),
        )

    async def events(self) -> AsyncIterator[str]:
        begun: set[int] = set()
        async for index, delta in self.generation.deltas():
            if index not in begun:
                begun.add(index)
                yield self._chunk(index, ChoiceDelta(role="assistant", content=""))
            for chunk in self._chunks(index, delta):
                yield chunk
        if self._request.wants_usage:
            yield self._event([], usage=self.generation.usage())

    def _chunks(self, index: int, delta: Delta) -> Iterator[str]:
        """The events of one token: none where it completes nothing that can be shown."""
        running = self._request.wants_running_usage
        is_last = delta.finish_reason is not None
        pieces = self._conversation.push(index, delta.text, is_last=is_last)
        logprobs = self._logprobs(delta.token_ids, delta.logprobs)
        for piece in pieces:
            if logprobs is None and isinstance(piece, str) and not running:
                yield self._write(index, piece)
                continue
            yield self._chunk(index, self._delta(index, piece), logprobs=logprobs)
            logprobs = None  # they are those of the token, and stand once
        if is_last or logprobs is not None:
            reason = _reason(delta.finish_reason, index in self._calls)
            yield self._chunk(index, ChoiceDelta(), logprobs=logprobs, finish_reason=reason)

    def _delta(self, index: int, piece: str | ToolCall) -> ChoiceDelta:
        if isinstance(piece, str):
            return ChoiceDelta(content=piece)
        place, self._calls[index] = self._calls[index], self._calls[index] + 1
        function = ChoiceDeltaToolCallFunction(name=piece.name, arguments=piece.arguments)
        call = ChoiceDeltaToolCall(index=place, id=_call_id(), type="function", function=function)
        return ChoiceDelta(tool_calls=[call])

    def _chunk(
        self,
        index: int,
        delta: ChoiceDelta,
        *,
        logprobs: Any = None,
        finish_reason: Any = None,
    ) -> str:
        choice = ChunkChoice(
            index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason
        )
        running = self._request.wants_running_usage
        return self._event([choice], **({"usage": self.generation.usage()} if running else {}))

    def _event(self, choices: list[ChunkChoice], **usage: Any) -> str:
        chunk = ChatCompletionChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model,
            choices=choices,
            **usage,
        )
        return event(chunk)

    def _logprobs(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs] | None) -> Any:
        """The fields of the ChoiceLogprobs that answers and chunks each have of their own."""
        if not entries:
            return None
        top = self._request.top_logprobs or 0
        content = chat_logprobs(self.service.tokenizer, token_ids, entries, top)
        return {"content": content, "refusal": None}


def _call(call: ToolCall) -> ChatCompletionMessageToolCallUnion:
    function = Function(name=call.name, arguments=call.arguments)
    return ChatCompletionMessageFunctionToolCall(id=_call_id(), type="function", function=function)


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _reason(finish_reason: str | None, called: bool) -> Any:
    """OpenAI's word for the end of a choice."""
    return "tool_calls" if called and finish_reason == "stop" else finish_reason
