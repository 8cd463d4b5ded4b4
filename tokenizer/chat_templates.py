"""A checkpoint's jinja chat template, rendered so that no message can write a special token.

A template joins messages and turn markers into one string, in which a user's "<start_of_turn>"
looks like the template's own.  So before rendering, every special literal in a message is marked
after its first letter; the result is cut at the marks, and its parts are encoded apart.  A literal
that the template itself puts together ('<' + role + '>') escapes this.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

# Noncharacters: Unicode keeps them for a program's own use, so no message needs them.
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    inside_literal: re.Pattern[str] | None = None,
    continue_final: str | None = None,
    **variables: Any,
) -> list[str]:
    """The rendered chat, cut into parts that must be encoded apart.

    Without `inside_literal`, the pattern of places to cut, there is one part.
    `continue_final` names the field of the last message after which the text ends.
    """
    used = _used_variables(template)
    for name, value in variables.items():
        if value is not None and name not in used and name not in _ALWAYS_GIVEN:
            raise ValueError(f"the chat template reads no variable {name!r}")
    given = [_plain(message) for message in messages]
    given = [{k: v for k, v in message.items() if v is not None} for message in given]
    variables = {name: _plain(value) for name, value in variables.items()}
    spelled = json.dumps([given, variables], ensure_ascii=False) + template
    unused = [mark for mark in _NONCHARACTERS if mark not in spelled]
    if len(unused) < 2:
        raise ValueError("the messages hold all of Unicode's noncharacters U+FDD0..U+FDEF")
    cut, end = unused[:2]

    if inside_literal is not None:
        given = _with_marks(given, inside_literal, cut)
        special = {name: variables.pop(name) for name in _SPECIAL_NAMES if name in variables}
        variables = _with_marks(variables, inside_literal, cut) | special
    if continue_final is not None:
        _mark_end(given, continue_final, end)
    text = _render(template, given, variables)
    if continue_final is not None:
        text = _before_end(text, end, continue_final)
    return text.split(cut)


_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token")
_ALWAYS_GIVEN = (*_SPECIAL_NAMES, "add_generation_prompt")


def by_name(template: Any) -> str | dict[str, str] | None:
    """A template, or several by name where a checkpoint has several."""
    if template is None or isinstance(template, str):
        return template
    if isinstance(template, Mapping):
        return dict(template)
    if isinstance(template, list | tuple):
        return {one["name"]: one["template"] for one in template}
    raise ValueError(f"chat_template is a {type(template).__name__}, not a string")


def _plain(value: Any) -> Any:
    """The same value in plain JSON types: a template is untrusted code."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return str.__str__(value)
    raise ValueError(f"a chat template takes strings, numbers, lists and mappings, got {value!r}")


def _with_marks(value: Any, inside_literal: re.Pattern[str], mark: str) -> Any:
    if isinstance(value, str):
        return inside_literal.sub(mark, value)
    if isinstance(value, dict):
        return {key: _with_marks(item, inside_literal, mark) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_marks(item, inside_literal, mark) for item in value]
    return value


def _mark_end(messages: list[dict[str, Any]], name: str, mark: str) -> None:
    final = messages[-1].get(name)
    # the space shows whether the template strips the text before it
    if isinstance(final, str):
        messages[-1][name] = f"{final}{mark} "
        return
    blocks = final if isinstance(final, list) else []
    for block in reversed(blocks):
        if isinstance(block, dict) and isinstance(block.get("text"), str):
            block["text"] += f"{mark} "
            return
    raise ValueError(f"continue_final_message: the last message has no text in {name!r}")


def _before_end(text: str, mark: str, name: str) -> str:
    before, found, after = text.rpartition(mark)
    if not found:
        raise ValueError(
            f"continue_final_message: the chat template leaves out the last message's {name!r}"
        )
    return before if after.startswith(" ") else before.rstrip()


def _render(template: str, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
    compiled, error_type, _ = _compiled(template)
    try:
        return compiled.render(messages=messages, **variables)
    except error_type as error:
        raise ValueError(f"the chat template refuses the messages: {error}") from error


def _used_variables(template: str) -> frozenset[str]:
    return _compiled(template)[2]


@lru_cache(maxsize=16)
def _compiled(template: str) -> tuple[Any, type[Exception], frozenset[str]]:
    """The template in a sandbox, the type of its errors, and the names that it reads."""
    try:
        import jinja2
        import jinja2.ext
        import jinja2.meta
        import jinja2.sandbox
    except ImportError as error:
        raise ImportError("a chat template needs jinja2: pip install jinja2") from error

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks the model's own words for training; here its body is rendered."""

        tags = {"generation"}  # noqa: RUF012  jinja2's own declaration

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": _strftime_now}
    try:
        names = jinja2.meta.find_undeclared_variables(environment.parse(template))
        return environment.from_string(template), jinja2.TemplateError, frozenset(names)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template is not jinja: {error}") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own escapes <, > and & for web pages
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)
