"""Typed objects on the wire: JSON and server-sent events."""

import json
from collections.abc import Callable

from pydantic import BaseModel

MARK = "\0text\0"  # in place of a text that is to come


def wire(body: BaseModel) -> str:
    """The JSON of an answer, by OpenAI's names; what was not set is not said."""
    return body.model_dump_json(exclude_unset=True, by_alias=True, serialize_as_any=True)


def event(body: BaseModel) -> str:
    """A server-sent event."""
    return f"data: {wire(body)}\n\n"


class TextEvents:
    """Events of one stream that differ in choice and text alone: what is around is written once.

    Most events are such, and building the types for each takes half the time of sending it.
    """

    def __init__(self, write: Callable[[int, str], str]) -> None:
        """`write` makes the event of a choice and a text from the types."""
        self._write = write
        self._around: dict[int, list[str]] = {}  # by choice

    def __call__(self, choice: int, text: str) -> str:
        """What `write` makes of them."""
        around = self._around.get(choice)
        if around is None:
            around = self._around[choice] = self._write(choice, MARK).split(json.dumps(MARK))
        return json.dumps(text, ensure_ascii=False).join(around)
