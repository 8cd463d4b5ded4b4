"""Tools as JSON schemas: a Python function says what it takes by type hints and a docstring."""

import inspect
import json
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_TYPES = {
    int: "integer", float: "number", str: "string", bool: "boolean", types.NoneType: "null",
    list: "array", tuple: "array", dict: "object",
}  # fmt: skip
_HEADINGS = ("Args:", "Returns:", "Raises:")
_ARGUMENT = re.compile(r"(?P<indent>[ \t]*)(?P<name>\w+)(?:[ \t]*\([^()]*\))?:(?P<text>.*)")
_CHOICES = re.compile(r"\(choices:\s*(?P<values>.*?)\)\s*$", re.IGNORECASE)


def as_schemas(tools: Any) -> list[Any]:
    """The tools of a chat, each function as its schema; others stay as they are."""
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise ValueError(f"tools is a list of functions and JSON schemas, got {tools!r:.100}")
    return [_of_function(tool) if inspect.isroutine(tool) else tool for tool in tools]


def _of_function(function: Callable[..., Any]) -> dict[str, Any]:
    """The schema of a function, with the keys and the order that chat templates know."""
    name, doc = function.__name__, inspect.getdoc(function)
    if not doc:
        raise ValueError(f"tool {name} has no docstring, which a model would read")
    sections = _sections(doc)
    descriptions = _arguments(sections.get("Args:", []))
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError) as error:
        raise ValueError(f"tool {name}: a type hint cannot be read: {error}") from None
    returned = hints.pop("return", None)
    properties, required = {}, []
    for argument in inspect.signature(function).parameters.values():
        if argument.name not in hints:
            raise ValueError(f"tool {name}: argument {argument.name!r} has no type hint")
        if argument.default is inspect.Parameter.empty:
            required.append(argument.name)
    for argument, hint in hints.items():
        place = f"tool {name}: argument {argument!r}"
        if argument not in descriptions:
            raise ValueError(f"{place} has no description under 'Args:' in the docstring")
        properties[argument] = _described(hint, descriptions[argument], place)
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    description = "\n".join(sections[""]).strip()
    schema: dict[str, Any] = {"name": name, "description": description, "parameters": parameters}
    if returned is not None:
        schema["return"] = _schema(returned, f"tool {name}: what it returns")
        if text := "\n".join(sections.get("Returns:", [])).strip():
            schema["return"]["description"] = text
    return {"type": "function", "function": schema}


def _sections(doc: str) -> dict[str, list[str]]:
    """The lines under each heading of a docstring; those before the first are under ""."""
    heading, sections = "", {"": []}
    for line in doc.splitlines():
        if line.strip() in _HEADINGS:
            heading = line.strip()
        sections.setdefault(heading, [])
        if line.strip() != heading or not heading:
            sections[heading].append(line)
    return sections


def _arguments(lines: Sequence[str]) -> dict[str, str]:
    """The description of each argument, in one line."""
    found: dict[str, list[str]] = {}
    words, indent = [], 0
    for line in lines:
        start = _ARGUMENT.fullmatch(line)
        if start and (not found or len(start["indent"]) <= indent):
            indent, words = len(start["indent"]), [start["text"].strip()]
            found[start["name"]] = words
        elif line.strip():
            words.append(line.strip())
    return {name: " ".join(filter(None, words)) for name, words in found.items()}


def _described(hint: Any, text: str, place: str) -> dict[str, Any]:
    schema = _schema(hint, place)
    if choices := _CHOICES.search(text):
        try:
            schema["enum"] = json.loads(choices["values"])
        except ValueError:
            raise ValueError(f"{place}: choices {choices['values']!r} are no JSON list") from None
        text = text[: choices.start()].strip()
    return schema | {"description": text}


def _schema(hint: Any, place: str) -> dict[str, Any]:
    """The JSON schema of a type hint."""
    origin, inner = get_origin(hint), get_args(hint)
    kind = None if origin is tuple and not _has_places(inner) else _TYPES.get(origin or hint)
    if hint is Any:
        return {}
    if origin in (Union, types.UnionType):
        return _union(inner, place)
    if origin is Literal and all(type(value) in _TYPES for value in inner):
        kinds = list(dict.fromkeys(_TYPES[type(value)] for value in inner))
        return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": list(inner)}
    if kind is None:
        raise ValueError(f"{place} is a {hint!r}, which has no JSON schema")
    schema: dict[str, Any] = {"type": kind}
    if origin is list and inner:
        schema["items"] = _schema(inner[0], place)
    elif origin is dict and inner:
        schema["additionalProperties"] = _schema(inner[1], place)
    elif origin is tuple and inner:
        schema["prefixItems"] = [_schema(one, place) for one in inner]
    return schema


def _has_places(inner: Sequence[Any]) -> bool:
    """Whether a tuple says what is at each place of it, and is no list of one or of many."""
    return len(inner) != 1 and ... not in inner


def _union(inner: Sequence[Any], place: str) -> dict[str, Any]:
    schemas = [_schema(one, place) for one in inner if one is not types.NoneType]
    if len(schemas) == 1:
        schema = schemas[0]
    elif all(list(one) == ["type"] and isinstance(one["type"], str) for one in schemas):
        schema = {"type": sorted(one["type"] for one in schemas)}
    else:
        schema = {"anyOf": schemas}
    return schema | ({"nullable": True} if types.NoneType in inner else {})
