"""StructuredOutputsParams: the form that a text must have, by vLLM's names."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemcut.engine.checks import check_bool, check_text, shorten

KINDS = ("json", "regex", "choice", "grammar", "json_object")
MAX_CHARACTERS = 100_000  # of one form; a larger one takes seconds to read


@dataclass(kw_only=True, slots=True)
class StructuredOutputsParams:
    """The form of a text: exactly one of json, regex, choice, grammar, json_object.

    ValueError names what is wrong with one.  Whether it can be met is seen where it is used, with
    the tokens of a model (grammars.py).
    """

    json: str | Mapping[str, Any] | None = None  # a JSON schema
    regex: str | None = None  # of the whole text, in the syntax of Rust's regex
    choice: Sequence[str] | None = None  # one of these texts
    grammar: str | None = None  # Lark's syntax, with llguidance's additions, or GBNF
    json_object: bool | None = None  # any JSON object
    disable_any_whitespace: bool = False  # JSON without spaces and newlines between its tokens
    whitespace_pattern: str | None = None  # or with what this regular expression matches; without
    # either, one space, or a newline and an indentation

    def __post_init__(self) -> None:
        if self.json_object is not None:
            check_bool("json_object", self.json_object)
        given = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            found = f"not {' and '.join(given)}" if given else "none is given"
            raise ValueError(f"structured_outputs takes one of {', '.join(KINDS)}; {found}")
        check_bool("disable_any_whitespace", self.disable_any_whitespace)
        for name in ("regex", "grammar", "whitespace_pattern"):
            if (text := getattr(self, name)) is not None:
                check_text(name, text)
        if self.choice is not None:
            if isinstance(self.choice, str) or not isinstance(self.choice, Sequence):
                raise ValueError(f"choice {shorten(self.choice)} is not a list")
            self.choice = list(self.choice)  # a copy: its owner may change it later
            if not self.choice:
                raise ValueError("choice is empty: no text is left")
            for text in self.choice:
                check_text("choice", text)
        if self.json is not None:
            self.json = _schema_text(self.json)
        if self.whitespace_pattern is not None and self.disable_any_whitespace:
            raise ValueError("whitespace_pattern has no place with disable_any_whitespace=True")
        characters = sum(map(len, self.choice or (self.json or self.regex or self.grammar or "",)))
        if characters > MAX_CHARACTERS:
            raise ValueError(f"{given[0]} has {characters} characters, above {MAX_CHARACTERS}")

    @property
    def kind(self) -> str:
        """The one of KINDS that is given."""
        return next(name for name in KINDS if getattr(self, name) not in (None, False))


def _schema_text(schema: Any) -> str:
    """A schema as JSON; ValueError where it is none."""
    try:
        if isinstance(schema, Mapping):
            return json.dumps(dict(schema), allow_nan=False)
        check_text("json", schema)
        read = json.loads(schema, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("json is nested too deeply") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"json {shorten(schema)} is no JSON schema: {error}") from None
    if not isinstance(read, dict | bool):
        raise ValueError(f"json {shorten(schema)} is no JSON schema: neither object nor boolean")
    # llguidance wants an object where there are options
    return schema if isinstance(read, dict) else ("{}" if read else '{"enum": []}')


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
