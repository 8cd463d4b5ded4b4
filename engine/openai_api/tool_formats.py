"""How a checkpoint is told of tools, how its calls look, and the grammar that forces one.

FunctionGemma and Gemma 4 write calls between tokens of their own, and their chat templates declare
the tools.  Older Gemmas know none: they are told in the first user's turn, as Google's page on
function calling with Gemma does it, and answer in JSON or Python.  Tools, choices and messages are
those of OpenAI's chat completions; a choice may be a function's bare name too.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gemcut.engine.openai_api.tool_calls import (
    MarkedCallParser,
    PlainCallParser,
    ToolCallParser,
)
from gemcut.engine.openai_api.tool_grammars import ArgumentGrammar
from gemcut.engine.openai_api.tool_messages import (
    add_turn,
    instructions,
    joined,
    output,
    told,
    tool_message,
    with_results,
)
from gemcut.engine.requests.structured_outputs import StructuredOutputsParams
from gemcut.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]
Choice = str | Mapping[str, Any]

# "essential" by Google's page on FunctionGemma: it turns function calling on
_FUNCTION_GEMMA_SYSTEM = "You are a model that can do function calling with the following functions"

# llguidance's options: spaces as in instructions and earlier calls
_SPACING = {"item_separator": ", ", "key_separator": ": "}


class ToolFormat(ABC):
    """One way of calling tools.

    shows_special_tokens: the parser must see them, so generate with skip_special_tokens=False.
    stop_token_ids: tokens after calls where the tools' results would begin: end there.
    """

    name: str
    shows_special_tokens = False
    stop_token_ids: tuple[int, ...] = ()

    @abstractmethod
    def prepare(self, messages: Messages, tools: Tools, choice: Choice) -> list[dict[str, Any]]:
        """The messages as the chat template takes them; ValueError for calls that are no calls."""

    @abstractmethod
    def parser(self, tools: Tools) -> ToolCallParser:
        """A new parser of one answer."""

    def constraint(
        self, tools: Tools, choice: Choice, parallel: bool = True
    ) -> StructuredOutputsParams | None:
        """A grammar of one or more calls; None where the model may choose to make none.

        With `parallel` "required" is at least one call, else one; a function named is called once.
        ValueError for a choice that names no tool, and for parameters that nothing satisfies.
        """
        functions, named = _functions(tools), _named(choice)
        if named is None and choice != "required":
            return None
        if named is not None:
            if named not in functions:
                raise ValueError(f"tool_choice names {named!r}, which is none of the tools")
            functions = {named: functions[named]}
        if not functions:
            raise ValueError("tool_choice 'required' needs tools")
        try:
            fields = self._forced(functions, several=parallel and named is None)
        except RecursionError as error:
            raise ValueError("the tools' parameters nest too deep") from error
        return StructuredOutputsParams(**fields)

    @abstractmethod
    def _forced(self, functions: dict[str, Any], *, several: bool) -> dict[str, Any]:
        """The fields of the StructuredOutputsParams that force a call."""


class MarkedFormat(ToolFormat):
    """Calls between tokens, by a template that declares tools: FunctionGemma's, Gemma 4's.

    The grammar enforces the parts of the tools' schemas that tool_grammars.py lists.
    """

    opening: str
    closing: str
    quote: str
    response: str

    def __init__(self, tokenizer: Tokenizer) -> None:
        ids = {literal: tokenizer.id_of(literal) for literal in self._literals()}
        self._tokens = {literal: f"<[{token_id}]>" for literal, token_id in ids.items()}
        self.shows_special_tokens = not tokenizer.special_ids.isdisjoint(ids.values())
        response = tokenizer.id_of(self.response)
        self.stop_token_ids = () if response is None else (response,)
        self._hidden = {tokenizer.piece(i) for i in tokenizer.special_ids}

    @classmethod
    def suits(cls, tokenizer: Tokenizer, template: str) -> bool:
        """Whether the template writes these calls and the vocabulary has their tokens."""
        has_tokens = all(tokenizer.id_of(literal) is not None for literal in cls._literals())
        return cls.opening in template and has_tokens

    @classmethod
    def _literals(cls) -> tuple[str, str, str]:
        return cls.opening, cls.closing, cls.quote

    def parser(self, tools: Tools) -> ToolCallParser:
        hidden = self._hidden if self.shows_special_tokens else ()
        return MarkedCallParser(self.opening, self.closing, self.quote, hidden)

    def _forced(self, functions: dict[str, Any], *, several: bool) -> dict[str, Any]:
        grammar = ArgumentGrammar(self.quote, self._tokens[self.quote])
        calls = []
        for name, function in functions.items():
            try:
                arguments = grammar.arguments(_parameters(function))
            except ValueError as error:
                raise ValueError(f"tool {name!r}: {error}") from error
            calls.append(f"{json.dumps(f'call:{name}')} {arguments}")
        opening, closing = self._tokens[self.opening], self._tokens[self.closing]
        start = f"start: call{'+' if several else ''}"
        call = f"call: {opening} ({' | '.join(calls)}) {closing}"
        return {"grammar": f"%llguidance {{}}\n{start}\n{call}\n{grammar}"}


class FunctionGemmaFormat(MarkedFormat):
    """<start_function_call>call:name{key:<escape>text<escape>,n:3}<end_function_call>"""

    name = "functiongemma"
    opening, closing = "<start_function_call>", "<end_function_call>"
    quote, response = "<escape>", "<start_function_response>"

    def prepare(self, messages: Messages, tools: Tools, choice: Choice) -> list[dict[str, Any]]:
        """Results as `name` and `response`; a system message, which the model's calls depend on."""
        prepared: list[dict[str, Any]] = []
        for message, results in with_results(messages):
            if message is not None:
                prepared.append(message)
            if results:
                content = results[0] if len(results) == 1 else results
                prepared.append({"role": "tool", "name": results[0]["name"], "content": content})
        is_told = prepared and prepared[0].get("role") in ("system", "developer")
        if not tools or choice == "none" or is_told:
            return prepared
        return [{"role": "developer", "content": _FUNCTION_GEMMA_SYSTEM}, *prepared]


class Gemma4Format(MarkedFormat):
    """<|tool_call>call:name{key:<|"|>text<|"|>,n:3}<tool_call|>"""

    name = "gemma4"
    opening, closing = "<|tool_call>", "<tool_call|>"
    quote, response = '<|"|>', "<|tool_response>"

    def prepare(self, messages: Messages, tools: Tools, choice: Choice) -> list[dict[str, Any]]:
        """Results in the message that asked for them, where every version of the template looks."""
        return [
            {
                **(message or {"role": "assistant"}),
                **({"tool_responses": results} if results else {}),
            }
            for message, results in with_results(messages)
        ]


class JsonFormat(ToolFormat):
    """{"name": "f", "parameters": {...}} or a list of such, or Python's f(a=1), without tokens.

    declares: the chat template reads `tools` itself, so messages hold no instructions.
    """

    name = "json"

    def __init__(self, *, declares: bool = False) -> None:
        self._declares = declares

    def prepare(self, messages: Messages, tools: Tools, choice: Choice) -> list[dict[str, Any]]:
        """Instructions in the system message, else before the first user's text, where Gemma 3's
        template puts a system message; earlier calls and results as turns of model and user.
        """
        if self._declares:
            return [
                one
                for message, results in with_results(messages)
                for one in (message, *(tool_message(result) for result in results))
                if one is not None
            ]
        turns: list[dict[str, Any]] = []
        for message, results in with_results(messages):
            if message is not None:
                add_turn(turns, told(message))
            if results:
                add_turn(turns, {"role": "user", "content": "\n".join(map(output, results))})
        if not tools or choice == "none":
            return turns
        text = instructions(_functions(tools), named=_named(choice), required=choice == "required")
        if turns and turns[0].get("role") in ("system", "developer"):
            turns[0] = {**turns[0], "content": joined(turns[0].get("content"), text)}
            return turns
        for index, turn in enumerate(turns):
            if turn.get("role") == "user":
                turns[index] = {**turn, "content": joined(text, turn.get("content"))}
                return turns
        return [{"role": "user", "content": text}, *turns]

    def parser(self, tools: Tools) -> ToolCallParser:
        parameters: dict[str, list[str]] = {}
        for name, function in _functions(tools).items():
            properties = _parameters(function).get("properties")
            parameters[name] = list(properties) if isinstance(properties, dict) else []
        return PlainCallParser(parameters)

    def _forced(self, functions: dict[str, Any], *, several: bool) -> dict[str, Any]:
        definitions, calls = {}, []
        for index, (name, function) in enumerate(functions.items()):
            at = f"tool{index}"
            definitions[at] = _moved(_parameters(function), f"#/$defs/{at}")
            calls.append(
                {
                    "type": "object",
                    "properties": {
                        "name": {"const": name},
                        "parameters": {"$ref": f"#/$defs/{at}"},
                    },
                    "required": ["name", "parameters"],
                    "additionalProperties": False,
                }
            )
        schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
        if several:
            definitions["call"] = schema
            one = {"$ref": "#/$defs/call"}
            schema = {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]}
        schema = {**schema, "$defs": definitions, "x-guidance": _SPACING}
        return {"json": schema, "disable_any_whitespace": True}


def choose_tool_format(tokenizer: Tokenizer, template: str | None) -> ToolFormat:
    """The format of a checkpoint: that of the tokens which its chat template writes, else JSON."""
    for marked in (FunctionGemmaFormat, Gemma4Format):
        if template is not None and marked.suits(tokenizer, template):
            return marked(tokenizer)
    return JsonFormat(declares=template is not None and bool(re.search(r"\btools\b", template)))


def _functions(tools: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The tools' functions by name."""
    return {one["name"]: one for one in (tool.get("function", tool) for tool in tools)}


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments: without one it takes none.

    Properties that it does not name are excluded, unless it says something of them.
    """
    given = function.get("parameters")
    if given is None:
        given = {"properties": {}}
    if not isinstance(given, dict):
        raise ValueError(f"tool {function['name']!r} has parameters that are no JSON schema")
    is_whole = not given.keys() & {"$ref", "anyOf", "oneOf", "allOf", "patternProperties"}
    closed = {"additionalProperties": False} if is_whole and "properties" in given else {}
    return {"type": "object", **closed, **given}


def _named(choice: Choice) -> str | None:
    """The function that a choice names."""
    if isinstance(choice, str):
        return None if choice in ("none", "auto", "required") else choice
    name = choice.get("function", choice)
    name = name.get("name") if isinstance(name, Mapping) else None
    if not isinstance(name, str):
        raise ValueError(f"tool_choice {dict(choice)!r} names no function")
    return name


def _moved(schema: Any, to: str) -> Any:
    """A schema whose references to itself hold after it has moved within another."""
    if isinstance(schema, list):
        return [_moved(one, to) for one in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[key] = f"{to}{value[1:].rstrip('/')}"
        else:
            is_data = key in ("const", "enum", "default", "examples")
            moved[key] = value if is_data else _moved(value, to)
    return moved
