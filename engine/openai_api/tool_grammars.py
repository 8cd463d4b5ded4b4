"""A JSON schema as a grammar of arguments in Gemma's marked syntax, for llguidance.

    {key:<escape>text<escape>,count:3,list:[true,{...}]}

Keys are bare and in alphabetical order, as the chat templates write them.  Covered are type, enum,
const, properties, required, additionalProperties, items, minItems, maxItems, minLength, maxLength,
bounds of numbers, nullable, anyOf, oneOf (as anyOf), allOf of one, and $ref within the schema.
What else a schema says (pattern, format, uniqueItems, not, ...) is not enforced.  An object has the
properties that are named, others only where additionalProperties says so, and any where nothing is
said of them.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

MAX_DEPTH = 64
_NUMERIC = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


class ArgumentGrammar:
    """The rules of a grammar in llguidance's variant of Lark, which schemas add to.

    quote: the text of the marker around strings, quote_token: how a rule refers to its token.
    """

    def __init__(self, quote: str, quote_token: str) -> None:
        self._quote, self._token = quote, quote_token
        self._not_quote = f"~/(?s:.*){_escaped(quote)}(?s:.*)/"
        self._named: dict[str, str] = {}
        self._rules = {
            "any": 'string | NUMBER | "true" | "false" | "null" | any_object | any_array',
            "any_object": '"{" (any_pair ("," any_pair)*)? "}"',
            "any_pair": 'KEY ":" any',
            "any_array": '"[" (any ("," any)*)? "]"',
            "string": f"{quote_token} TEXT? {quote_token}",
            "TEXT": f"/(?s:.+)/ & {self._not_quote}",
            "KEY": "/[A-Za-z_][A-Za-z0-9_]{0,63}/",
            "NUMBER": r"/-?(0|[1-9][0-9]{0,15})(\.[0-9]{1,15})?/",
        }

    def __str__(self) -> str:
        return "\n".join(f"{name}: {body}" for name, body in self._rules.items())

    def arguments(self, schema: dict[str, Any]) -> str:
        """The rule for a tool's arguments; ValueError where no arguments satisfy the schema."""
        return _Schema(self, schema).object_rule()

    def add(self, body: str, kind: str = "r") -> str:
        """The name of a rule, or of a terminal where `kind` is upper case; alike ones are one."""
        if body in self._named:
            return self._named[body]
        name = f"{kind}{len(self._rules)}"
        self._rules[name] = body
        if body:
            self._named[body] = name
        return name

    def define(self, name: str, body: str) -> None:
        self._rules[name] = body

    def literal(self, value: Any) -> str | None:
        """The one way to write a JSON value; None for a string that cannot stand in quotes."""
        if isinstance(value, str):
            if self._quote in value or re.search("[\ud800-\udfff]", value):
                return None
            return " ".join([self._token, *([_quoted(value)] if value else []), self._token])
        if isinstance(value, dict):
            pairs = [(_key(key), self.literal(value[key])) for key in _ordered(value)]
            return self._enclosed("{", [part and f"{key} {part}" for key, part in pairs], "}")
        if isinstance(value, list):
            return self._enclosed("[", [self.literal(one) for one in value], "]")
        return _quoted(json.dumps(value))

    def _enclosed(self, opening: str, parts: list[str | None], closing: str) -> str | None:
        if None in parts:
            return None
        inside = ' "," '.join(map(str, parts))
        return f'"{opening}" {inside} "{closing}"'

    def text(self, least: int, most: int | None) -> str:
        """A string of so many characters."""
        if least == 0 and most is None:
            return "string"
        if most == 0:
            return f"{self._token} {self._token}"
        size = f"{max(least, 1)},{'' if most is None else most}"
        terminal = self.add(f"/(?s:.){{{size}}}/ & {self._not_quote}", "T")
        return f"{self._token} {terminal}{'' if least else '?'} {self._token}"

    def other_key(self, names: Iterable[str]) -> str:
        """A key that is none of these."""
        taken = "|".join(map(_escaped, names))
        return self.add(f"KEY & ~/{taken}/", "K") if taken else "KEY"


class _Schema:
    """The rules of one schema and of what it refers to."""

    def __init__(self, grammar: ArgumentGrammar, root: dict[str, Any]) -> None:
        self._grammar, self._root = grammar, root
        self._referred: dict[str, str] = {}  # rules by reference
        self._depth = 0

    def object_rule(self) -> str:
        body = self._value(self._root)
        if body is None:
            raise ValueError("no arguments satisfy its parameters")
        return self._grammar.add(body)

    def _value(self, schema: Any) -> str | None:
        """What matches a value; None where no value satisfies the schema."""
        if schema is False:
            return None
        if not isinstance(schema, dict):
            return "any"
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError(f"its parameters nest deeper than {MAX_DEPTH}")
        body = self._alternatives(schema)
        self._depth -= 1
        if body is None or not schema.get("nullable"):
            return body
        return f'({body}) | "null"'

    def _alternatives(self, schema: dict[str, Any]) -> str | None:
        if "$ref" in schema:
            return self._reference(schema["$ref"])
        if "const" in schema:
            return self._grammar.literal(schema["const"])
        if isinstance(schema.get("enum"), list):
            return _one_of(self._grammar.literal(one) for one in schema["enum"])
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), list):
                return _one_of(self._value(one) for one in schema[key])
        one = schema.get("allOf")
        if isinstance(one, list) and len(one) == 1:
            return self._value(one[0])
        types = schema.get("type", _implied(schema))
        return _one_of(
            self._typed(str(kind).lower(), schema)
            for kind in (types if isinstance(types, list) else [types])
        )

    def _typed(self, kind: str, schema: dict[str, Any]) -> str | None:
        if kind == "string":
            least, most = _sizes(schema, "Length")
            return None if most is not None and most < least else self._grammar.text(least, most)
        if kind in ("integer", "number"):
            bounds = {key: schema[key] for key in _NUMERIC if key in schema}
            if not bounds and kind == "number":
                return "NUMBER"
            if not bounds:
                return r"/-?(0|[1-9][0-9]{0,15})/"
            return f"%json {json.dumps({'type': kind, **bounds})}"
        if kind == "array":
            return self._array(schema)
        if kind == "object":
            return self._object(schema)
        return {"boolean": '"true" | "false"', "null": '"null"'}.get(kind, "any")

    def _array(self, schema: dict[str, Any]) -> str | None:
        least, most = _sizes(schema, "Items")
        item = self._value(schema.get("items", True))
        if (most is not None and most < least) or (item is None and least):
            return None
        if item is None or most == 0:
            return '"[" "]"'
        one = self._grammar.add(item)
        more = f'("," {one}){{{max(least - 1, 0)},{"" if most is None else most - 1}}}'
        return f'"[" {one} {more} "]"' if least else f'"[" ({one} {more})? "]"'

    def _object(self, schema: dict[str, Any]) -> str | None:
        properties, required = schema.get("properties"), schema.get("required")
        properties = properties if isinstance(properties, dict) else {}
        required = {str(one) for one in required} if isinstance(required, list) else set()
        others = schema.get("additionalProperties", "properties" not in schema)
        for name in required - properties.keys():
            properties = {**properties, name: others}

        # from the last property to the first: what may follow where one was written, or none
        other = self._value(others)
        other_rule = "" if other is None else self._grammar.add(other)
        if other_rule:
            pair = self._grammar.add(f'{self._grammar.other_key(properties)} ":" {other_rule}')
            after = self._grammar.add(f'("," {pair})*')
            first = self._grammar.add(f"({pair} {after})?")
        else:
            after = first = ""
        for name in reversed(_ordered(properties)):
            value = self._value(properties[name])
            if value is None and name in required:
                return None
            if value is None:
                continue
            pair = self._grammar.add(f"{_key(name)} ({value})")
            if name in required:
                first = self._grammar.add(f"{pair} {after}")
                after = self._grammar.add(f'"," {pair} {after}')
            else:
                first = self._grammar.add(
                    f"{pair} {after} | {first}" if first else f"({pair} {after})?"
                )
                after = self._grammar.add(f'("," {pair})? {after}')
        return f'"{{" {first} "}}"'

    def _reference(self, reference: Any) -> str | None:
        if not isinstance(reference, str) or not reference.startswith("#"):
            return "any"
        if reference not in self._referred:
            target = self._root
            for step in reference[1:].strip("/").split("/") if reference.strip("#/") else ():
                step = step.replace("~1", "/").replace("~0", "~")
                if not isinstance(target, dict) or step not in target:
                    raise ValueError(f"its parameters have nothing at {reference!r}")
                target = target[step]
            # named before it is read: it may refer to itself
            name = self._referred[reference] = self._grammar.add("")
            body = self._value(target)
            if body is None:
                return None
            self._grammar.define(name, body)
        return self._referred[reference]


def _one_of(bodies: Iterable[str | None]) -> str | None:
    possible = [body for body in bodies if body is not None]
    if len(possible) < 2:
        return possible[0] if possible else None
    return " | ".join(f"({body})" for body in possible)


def _implied(schema: dict[str, Any]) -> str:
    """The type of a schema that names none."""
    if schema.keys() & {"properties", "required", "additionalProperties"}:
        return "object"
    return "array" if "items" in schema else "any"


def _sizes(schema: dict[str, Any], of: str) -> tuple[int, int | None]:
    least, most = schema.get(f"min{of}", 0), schema.get(f"max{of}")
    for size in (least, 0 if most is None else most):
        if type(size) is not int or size < 0:
            raise ValueError(f"its parameters have {size!r} for a size")
    return least, most


def _ordered(properties: Iterable[str]) -> list[str]:
    """As jinja's dictsort has them."""
    return sorted(properties, key=str.lower)


def _key(name: str) -> str:
    """A key and its colon; in JSON's quotes where bare it would end early, and without markers."""
    if not re.fullmatch(r"[^\s:,{}\[\]\"'<>|]+", name):
        name = json.dumps(name, ensure_ascii=False).replace("<", "\\u003c")
    return _quoted(f"{name}:")


def _quoted(text: str) -> str:
    """What matches just this text in Lark."""
    return f'"{text}"' if re.fullmatch(r"[^\"\\\x00-\x1f\x7f]*", text) else f"/{_escaped(text)}/"


def _escaped(text: str) -> str:
    """The text as a regular expression of Rust's."""
    return re.sub(r"[^A-Za-z0-9_ ]", lambda match: f"\\x{{{ord(match[0]):x}}}", text)
