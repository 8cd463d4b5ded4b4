"""One tool call's text as a name and arguments: Gemma's marked syntax, JSON, or Python.

Nothing is evaluated and nothing recurses with the text: sizes and depths are bounded, and time is
linear in them.
"""

import ast
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_SIZE = 1 << 20  # characters of a call
MAX_DEPTH = 64  # brackets in brackets
MAX_NUMBER = 300  # characters of a number

_SPACES = re.compile(r"\s*")
_HEAD = re.compile(r"\s*call:\s*([^\s{}<>:]+)\s*\{")
_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_BARE_KEY, _BARE_VALUE = re.compile(r'[^:,{}\[\]"]+'), re.compile(r"[^,{}\[\]]+")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_ESCAPE = re.compile(r"\\([4-7][0-7]{2}|.)", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """A call that a model asks for; `arguments` is the JSON text of an object."""

    name: str
    arguments: str


def marked_call(text: str, quote: str) -> ToolCall | None:
    """The call in `call:name{key:value,...}`, where `quote` stands around strings; None if broken.

    Strings are taken as they are, without escapes.  A value without quotes is a number, a word of
    JSON, an object, a list, or else text, as in Google's own examples of a parser.  Keys are bare.
    A string in JSON's quotes is one too.
    """
    head = _HEAD.match(text)
    if head is None or len(text) > MAX_SIZE:
        return None
    try:
        arguments, end = _object(text, head.end(), quote)
        return None if text[end:].strip() else _call(head.group(1), arguments)
    except ValueError:
        return None


def plain_calls(text: str, parameters: Mapping[str, Sequence[str]]) -> list[ToolCall] | None:
    """The calls in JSON or Python, at least one; None where the text is anything else.

    `parameters` has the names of each tool's parameters; arguments that Python gives by position
    take them in turn.  Brackets deeper than MAX_DEPTH are the caller's to refuse.
    """
    if len(text) > MAX_SIZE:
        return None
    try:
        try:
            value = _json(text)
        except ValueError:
            calls = _pythonic(text, parameters)
        else:
            calls = [_spelled_out(one) for one in (value if isinstance(value, list) else [value])]
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
    known = all(call.name in parameters for call in calls)
    return calls if calls and known else None


def _call(name: str, arguments: Any) -> ToolCall:
    """ValueError or TypeError for arguments that JSON cannot say."""
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    if not text.isascii() and re.search("[\ud800-\udfff]", text):  # no half of a pair goes out
        text = json.dumps(arguments, allow_nan=False)
    return ToolCall(name, text)


def _object(text: str, at: int, quote: str) -> tuple[dict[str, Any], int]:
    """The object behind its opening brace, and the place after its closing one."""
    arguments: dict[str, Any] = {}
    around: list[dict[str, Any] | list[Any]] = [arguments]
    while True:
        inner = around[-1]
        at = _skip(text, at)
        if not text.startswith("}" if isinstance(inner, dict) else "]", at):
            key = None
            if isinstance(inner, dict):
                key, at = _key(text, at, quote)
            value, at = _value(text, at, quote)
            if isinstance(inner, dict):
                inner[str(key)] = value
            else:
                inner.append(value)
            if isinstance(value, dict | list):
                if len(around) == MAX_DEPTH:
                    raise ValueError(f"brackets nest deeper than {MAX_DEPTH}")
                around.append(value)
                continue
        at = _closed(text, at, around)
        if not around:
            return arguments, at


def _closed(text: str, at: int, around: list[dict[str, Any] | list[Any]]) -> int:
    """The place after the brackets that close here and the comma after them."""
    while around:
        at = _skip(text, at)
        sign = text[at : at + 1]
        if sign == ",":
            return at + 1
        if sign != ("}" if isinstance(around[-1], dict) else "]"):
            raise ValueError(f"{sign!r} where a value ends")
        around.pop()
        at += 1
    return at


def _skip(text: str, at: int) -> int:
    match = _SPACES.match(text, at)
    return at if match is None else match.end()


def _key(text: str, at: int, quote: str) -> tuple[str, int]:
    string = _string(text, at, quote)
    if string is None:
        bare = _BARE_KEY.match(text, at)
        if bare is None:
            raise ValueError("no key")
        string = bare.group().strip(), bare.end()
    at = _skip(text, string[1])
    if not text.startswith(":", at):
        raise ValueError("no colon after a key")
    return string[0], at + 1


def _value(text: str, at: int, quote: str) -> tuple[Any, int]:
    """A value and the place after it; an object or list is opened and empty."""
    at = _skip(text, at)
    if text.startswith(("{", "["), at):
        return ({} if text[at] == "{" else []), at + 1
    string = _string(text, at, quote)
    if string is not None:
        return string
    bare = _BARE_VALUE.match(text, at)
    if bare is None:
        raise ValueError("no value")
    word = bare.group().strip()
    if word in _WORDS:
        return _WORDS[word], bare.end()
    if _NUMBER.fullmatch(word) is None:
        return word, bare.end()
    if len(word) > MAX_NUMBER:
        raise ValueError(f"a number of {len(word)} characters")
    return _json(word), bare.end()


def _string(text: str, at: int, quote: str) -> tuple[str, int] | None:
    """A string in quotes, and the place after it; None where none begins."""
    if text.startswith(quote, at):
        start = at + len(quote)
        end = text.find(quote, start)
        if end < 0:
            raise ValueError("a string without an end")
        return text[start:end], end + len(quote)
    match = _JSON_STRING.match(text, at)
    if match is None or text[_skip(text, match.end())] not in ":,}]":
        return None  # a bare text that begins with a quotation mark
    return _json(match.group()), match.end()


def _json(text: str) -> Any:
    """A value in JSON; newlines in strings pass, and numbers beyond a float's range end there."""
    return json.loads(text, strict=False, parse_float=_finite, parse_constant=_refuse_constant)


def _finite(text: str) -> float:
    return max(-sys.float_info.max, min(float(text), sys.float_info.max))


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _spelled_out(value: Any) -> ToolCall:
    """The call in {"name": ..., "parameters": ...}, or as OpenAI's messages have it.

    Other keys show that it is none, but a tool's declaration for instance.
    """
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not value.keys() <= {"name", "parameters", "arguments"}:
        raise ValueError("not a call")
    arguments = value.get("parameters", value.get("arguments", {}))
    if isinstance(arguments, str):
        arguments = _json(arguments)
    if not isinstance(arguments, dict) or len(value) > 2:
        raise ValueError("not a call")
    if not isinstance(value.get("name"), str):
        raise ValueError("a call without a name")
    return _call(value["name"], arguments)


def _pythonic(text: str, parameters: Mapping[str, Sequence[str]]) -> list[ToolCall]:
    """The calls of a Python expression, f(a=1) or [f(a=1), g()], or of dicts as in JSON."""
    # an escape that Python does not know would be a warning on the server's terminal
    plain = _ESCAPE.sub(
        lambda m: m[0] if m[1] in "\\'\"abfnrtvxuUN01234567\n" else f"\\{m[0]}", text
    )
    root = _JsonWords().visit(ast.parse(plain, mode="eval").body)
    nodes = root.elts if isinstance(root, ast.List | ast.Tuple) else [root]
    calls = []
    for node in nodes:
        if not isinstance(node, ast.Call):
            calls.append(_spelled_out(ast.literal_eval(node)))
            continue
        name = ast.unparse(node.func)
        order = parameters.get(name, ())
        if len(node.args) > len(order) or any(one.arg is None for one in node.keywords):
            raise ValueError("arguments that no parameter takes")
        named = dict(zip(order, node.args, strict=False))
        named.update({str(one.arg): one.value for one in node.keywords})
        calls.append(_call(name, {key: ast.literal_eval(one) for key, one in named.items()}))
    return calls


class _JsonWords(ast.NodeTransformer):
    """JSON's words in an expression of Python: f(a=true)."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id in ("true", "false", "null"):
            return ast.copy_location(ast.Constant(_WORDS[node.id]), node)
        return node
