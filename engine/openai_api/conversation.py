"""A conversation with tools: from messages to the engine's request, and from its text to calls."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gemcut.engine.openai_api.errors import ApiError
from gemcut.engine.openai_api.service import Service
from gemcut.engine.openai_api.tool_calls import ToolCall, ToolCallParser
from gemcut.engine.requests.sampling_params import SamplingParams
from gemcut.engine.serving.output_queues import AsyncStream

MAX_TOOLS = 128
CHOICES = ("none", "auto", "required")


@dataclass(frozen=True)
class Tools:
    """The tools of a request, as chats have them, and whether they must be called."""

    functions: Sequence[Mapping[str, Any]]  # {"type": "function", "function": {"name": ...}}
    choice: str | Mapping[str, Any]  # "auto", "required", or {"name": the only one to be called}
    parallel: bool  # whether one answer may call several

    @property
    def is_forced(self) -> bool:
        return self.choice != "auto"


def read_tools(
    tools: Sequence[Mapping[str, Any]] | None,
    choice: str | Mapping[str, Any] | None,
    parallel: bool | None,
) -> Tools | None:
    """The tools that an answer may call; None where there are none, or none may be called."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice needs tools", param="tool_choice")
        return None
    if len(tools) > MAX_TOOLS:
        raise ApiError(400, f"{len(tools)} tools are more than {MAX_TOOLS}", param="tools")
    names = [_name(index, tool) for index, tool in enumerate(tools)]
    if len(set(names)) < len(names):
        raise ApiError(400, "two tools have one name", param="tools")
    chosen: str | Mapping[str, Any] = "auto" if choice is None else choice
    if isinstance(chosen, Mapping):
        function = chosen.get("function", chosen)
        name = function.get("name") if isinstance(function, Mapping) else None
        if name not in names:
            raise ApiError(400, "tool_choice names none of the tools", param="tool_choice")
        chosen = {"name": name}
    elif chosen not in CHOICES:
        message = "tool_choice is neither none, auto, required nor a function"
        raise ApiError(400, message, param="tool_choice")
    return None if chosen == "none" else Tools(tools, chosen, parallel is not False)


def _name(index: int, tool: Mapping[str, Any]) -> str:
    """The name of a tool; ApiError where it is no function with one."""
    where = f"tools.{index}"
    if tool.get("type") != "function" or not isinstance(function := tool.get("function"), dict):
        raise ApiError(400, f"{where} is no function: no other tools are run here", param=where)
    name = function.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name):
        what = "a function's name is 1 to 64 letters, digits, dots, - and _"
        raise ApiError(400, f"{where}: {what}", param=where)
    if not isinstance(function.get("parameters"), dict | None):
        raise ApiError(400, f"{where}: parameters is no JSON schema", param=where)
    return name


class Conversation:
    """How one request's messages become a prompt, and the text of its choices their parts."""

    def __init__(self, service: Service, tools: Tools | None) -> None:
        self._service, self._tools = service, tools
        self._parsers: dict[int, ToolCallParser] = {}

    def prepare(
        self, messages: Sequence[Mapping[str, Any]], **template: Any
    ) -> tuple[Sequence[Mapping[str, Any]], dict[str, Any]]:
        """The messages with their tools and what else makes a prompt of them, as engines take it.

        ValueError says what is wrong with them.
        """
        if "developer" not in (self._service.template or ""):  # FunctionGemma's knows that role
            messages = [
                {**one, "role": "system"} if one.get("role") == "developer" else one
                for one in messages
            ]
        form, tools = self._service.tool_format, self._tools
        functions = () if tools is None else tools.functions
        if tools is not None or any("tool_calls" in m or m.get("role") == "tool" for m in messages):
            messages = form.prepare(messages, functions, "none" if tools is None else tools.choice)
        if tools is not None and self._service.template is not None:
            template["tools"] = functions
        settings = self._service.settings
        given = {name: value for name, value in template.items() if value is not None}
        if given.get("continue_final_message"):
            given.setdefault("add_generation_prompt", False)
        given["chat_template"] = settings.chat_template
        given["merge_system"] = settings.merge_system
        return messages, given

    def stream(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams, **template: Any
    ) -> AsyncStream:
        """The engine's request; ValueError says what is wrong with the messages."""
        messages, given = self.prepare(messages, **template)
        if self._tools is not None:
            params = self._with_tools(params, self._tools)
        return self._service.engine.achat_stream(messages, params, **given)

    def _with_tools(self, params: SamplingParams, tools: Tools) -> SamplingParams:
        """Settings that show calls as they are written, and force them where they must be."""
        form = self._service.tool_format
        if tools.is_forced:
            if params.structured_outputs is not None:
                raise ApiError(400, "an answer that must call a tool has no other form")
            constraint = form.constraint(tools.functions, tools.choice, tools.parallel)
            params = replace(params, structured_outputs=constraint)
        return replace(
            params,
            skip_special_tokens=params.skip_special_tokens and not form.shows_special_tokens,
            stop_token_ids=[*(params.stop_token_ids or ()), *form.stop_token_ids],
        )

    def push(self, choice: int, text: str, *, is_last: bool) -> list[str | ToolCall]:
        """The pieces of content and the calls that more of a choice's text completes, in order."""
        if self._tools is None:
            return [text] if text else []
        parser = self._parsers.get(choice)
        if parser is None:
            parser = self._service.tool_format.parser(self._tools.functions)
            self._parsers[choice] = parser
        pieces = parser.push(text)
        return pieces + parser.end() if is_last else pieces
