"""What /openapi.json says of messages, tools, items and numbers, which other files check."""

from collections.abc import Callable
from itertools import islice
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, WithJsonSchema, WrapValidator

T = TypeVar("T")

_TEXT: dict[str, Any] = {"type": "string"}


def _object(required: list[str], /, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required}


def _content(*part_types: str) -> dict[str, Any]:
    part = _object(["type", "text"], type={"enum": part_types}, text=_TEXT)
    return {"anyOf": [_TEXT, {"type": "array", "items": part}]}


_CALLED = {
    "type": "object",
    "properties": {"name": _TEXT, "arguments": {"type": "string", "description": "A JSON object."}},
    "required": ["name", "arguments"],
}
_CALL = {
    "type": "object",
    "properties": {"id": _TEXT, "type": {"const": "function"}, "function": _CALLED},
    "required": ["id", "type", "function"],
}
_ROLES = ["system", "developer", "user", "assistant", "tool"]
_FUNCTION = {
    "name": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"},
    "description": _TEXT,
    "parameters": {"type": "object", "description": "A JSON schema."},
}

Message = Annotated[
    dict[str, Any],
    WithJsonSchema(
        _object(
            ["role"],
            role={"enum": _ROLES},
            content={"anyOf": [_content("text"), {"type": "null"}]},
            tool_calls={"type": "array", "items": _CALL},
            tool_call_id={"type": "string", "description": "The call that a tool's message ends."},
        )
    ),
]
ChatTool = Annotated[
    dict[str, Any],
    WithJsonSchema(
        _object(
            ["type", "function"],
            type={"const": "function"},
            function=_object(["name"], **_FUNCTION),
        )
    ),
]
ResponseTool = Annotated[
    dict[str, Any],
    WithJsonSchema(_object(["type", "name"], type={"const": "function"}, **_FUNCTION)),
]
Item = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "anyOf": [
                _object(
                    ["role", "content"],
                    type={"const": "message"},
                    role={"enum": _ROLES[:-1]},
                    content=_content("input_text", "output_text"),
                ),
                _object(
                    ["type", "call_id", "name", "arguments"],
                    type={"const": "function_call"},
                    call_id=_TEXT,
                    name=_TEXT,
                    arguments=_TEXT,
                ),
                _object(
                    ["type", "call_id", "output"],
                    type={"const": "function_call_output"},
                    call_id=_TEXT,
                    output=_content("input_text"),
                ),
            ]
        }
    ),
]
StructuredOutputs = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "oneOf": [
                _object([name], **{name: kind})
                for name, kind in {
                    "json": {"anyOf": [{"type": "object"}, _TEXT]},
                    "regex": _TEXT,
                    "choice": {"type": "array", "items": _TEXT, "minItems": 1},
                    "grammar": _TEXT,
                    "json_object": {"const": True},
                }.items()
            ]
        }
    ),
]


def _by_pieces(given: Any, validate: Callable[[Any], Any]) -> Any:
    if not isinstance(given, dict):
        return validate(given)
    members, whole = iter(given.items()), {}
    while piece := dict(islice(members, 64)):
        whole.update(validate(piece))
    return whole


# Checked up to the first error: a body has room for millions, each a kilobyte and 10 us
ArrayOf = Annotated[list[T], Field(fail_fast=True)]
MapOf = Annotated[dict[str, T], WrapValidator(_by_pieces)]


def within(minimum: float, maximum: float) -> Any:
    """The range of a number, said and not checked."""
    return Field(json_schema_extra={"minimum": minimum, "maximum": maximum})


class ErrorInfo(BaseModel):
    """What was wrong, in one line."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The answer of every request that is refused or fails."""

    error: ErrorInfo
