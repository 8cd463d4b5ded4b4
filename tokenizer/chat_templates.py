"""A checkpoint's jinja chat template, rendered so that no message can write a special token.

A template joins messages and turn markers into one string, in which a user's "<start_of_turn>"
looks like the template's own.  So before rendering, every special literal in a message is marked
after its first letter; the result is cut at the marks, and its parts are encoded apart.  A literal
that the template itself puts together ('<' + role + '>') escapes this.
"""

import json
import re
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache
from itertools import chain
from reprlib import repr as shorten
from typing import Any, NamedTuple

import jinja2
import numpy as np

from gemcut.tokenizer.template_sandbox import Template, TemplateStopped

TEMPLATE_FILE, TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"
# Noncharacters: Unicode keeps them for a program's own use, so no message needs them.
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
# what a message's reasoning is called, the present name first
_REASONING = ("reasoning_content", "thinking", "reasoning")


class Rendered(NamedTuple):
    """A chat as text, in parts that must be encoded apart.

    `generated` has the characters that {% generation %} blocks wrote, as (start, end) in the whole.
    """

    parts: list[str]
    generated: list[tuple[int, int]]


def render(template: str, messages: Any, *, name: str | None = None, **options: Any) -> list[str]:
    """The parts alone of a chat's `rendered` text."""
    return rendered(template, messages, name=name, **options).parts


def rendered(
    template: str,
    messages: Any,
    *,
    name: str | None = None,
    inside_literal: re.Pattern[str] | None = None,
    continue_final: str | None = None,
    tokens: Mapping[str, str] | None = None,
    **variables: Any,
) -> Rendered:
    """The text of a chat by a jinja template, which `name` has in errors.

    Without `inside_literal`, the pattern of places to cut, there is one part.
    `continue_final` names the field of the last message after which the text ends.
    `tokens` and `variables` are the template's; those that it never reads are passed over.
    A message is a mapping, a dataclass, or an object with `model_dump`.
    """
    label = "the chat template" if name is None else f"the chat template {name!r}"
    used = _compiled(label, template).variables
    given = plain_messages(messages)
    read = {key: _plain(value) for key, value in variables.items() if key in used}
    spelled = json.dumps([given, read], ensure_ascii=False, skipkeys=True) + template
    unused = [mark for mark in _NONCHARACTERS if mark not in spelled]
    if len(unused) < 4:
        raise ValueError("the messages hold nearly all of Unicode's noncharacters U+FDD0..U+FDEF")
    cut, end, *generation = unused[:4]

    if inside_literal is not None:
        given = _with_marks(given, inside_literal, cut)
        read = _with_marks(read, inside_literal, cut)
    final = "" if continue_final is None else _mark_end(given, continue_final, end)
    text = _render(label, template, {"messages": given, **(tokens or {}), **read}, *generation)
    if continue_final is not None:
        text = _before_end(text, end, final, continue_final)
    return _parts(text, cut, *generation)


def check(template: str) -> None:
    """Nothing, or ValueError where a template is not jinja."""
    _compiled("the chat template", template)


def has_generation(template: str) -> bool:
    """Whether a template marks what the model has written."""
    return re.search(r"{%-?\s*generation\s*-?%}", template) is not None


def plain_messages(messages: Iterable[Any]) -> list[dict[str, Any]]:
    """Messages of every kind as mappings, without the keys that are None."""
    return [_message(message) for message in messages]


def _message(message: Any) -> dict[str, Any]:
    plain = _plain(message)
    if not isinstance(plain, dict):
        raise ValueError(f"a message is a mapping with role and content, got {message!r}")
    given = {key: value for key, value in plain.items() if value is not None}
    # the name that templates read, and the one that older ones do
    reasoning = next((given[key] for key in _REASONING if key in given), None)
    if reasoning is None:
        return given
    return {"thinking": reasoning, **given, "reasoning_content": reasoning}


def _parts(text: str, cut: str, begin: str, end: str) -> Rendered:
    """The text without its marks."""
    parts, generated, opened, size = [""], [], [], 0
    for piece in re.split(f"([{cut}{begin}{end}])", text):
        if piece == cut:
            parts.append("")
        elif piece == begin:
            opened.append(size)
        elif piece == end and opened:
            generated.append((opened.pop(), size))
        elif piece != end:
            parts[-1] += piece
            size += len(piece)
    return Rendered(parts, generated)


def by_name(template: Any) -> str | dict[str, str] | None:
    """A template, or several by name where a checkpoint has several."""
    if template is None or isinstance(template, str):
        return template
    named = template
    if isinstance(template, list | tuple) and all(isinstance(one, Mapping) for one in template):
        named = {one.get("name"): one.get("template") for one in template}
    if isinstance(named, Mapping) and all(isinstance(one, str) for one in chain(*named.items())):
        return dict(named)
    raise ValueError(
        f"chat_template {shorten(template)} is neither a string nor a list of templates by name"
    )


def files(templates: str | Mapping[str, str] | None, prefix: str = "") -> dict[str, str]:
    """The files that hold templates, by name within a folder; ValueError for a name that is none.

    The only template or the default one has the first file, the others are in a folder below.
    """
    if templates is None:
        return {}
    if isinstance(templates, str):
        return {f"{prefix}{TEMPLATE_FILE}": templates}
    found: dict[str, str] = {}
    for name, template in templates.items():
        if name == "default":
            found[f"{prefix}{TEMPLATE_FILE}"] = template
            continue
        # the name comes with a checkpoint, and may lead out of the folder
        if not isinstance(name, str) or not name.strip(".") or re.search(r"[/\\\0]", name):
            raise ValueError(f"chat template name {name!r} is no name of a file")
        found[f"{prefix}{TEMPLATE_FOLDER}/{name}.jinja"] = template
    return found


def as_setting(templates: str | Mapping[str, str]) -> str | list[dict[str, str]]:
    """Templates as a value in tokenizer_config.json."""
    if isinstance(templates, str):
        return templates
    return [{"name": name, "template": template} for name, template in templates.items()]


def _plain(value: Any) -> Any:
    """The same value in plain JSON types: a template is untrusted code."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, str):  # an enum's, for instance, without its methods
        return str.__str__(value)
    if isinstance(value, int | float):
        return int.__int__(value) if isinstance(value, int) else float.__float__(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    dump = getattr(value, "model_dump", None)
    if callable(dump):
        return _plain(dump())
    raise ValueError(
        "a chat template takes strings, numbers, lists, mappings, dataclasses, and objects with "
        f"model_dump, got {value!r}"
    )


def _with_marks(value: Any, inside_literal: re.Pattern[str], mark: str) -> Any:
    if isinstance(value, str):
        return inside_literal.sub(mark, value)
    if isinstance(value, dict):
        return {key: _with_marks(item, inside_literal, mark) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_marks(item, inside_literal, mark) for item in value)
    return value


def _mark_end(messages: list[dict[str, Any]], name: str, mark: str) -> str:
    """The text to go on with, once the mark is put after it in the last message."""
    final = messages[-1].get(name)
    # the space shows whether the template strips the text before it
    if isinstance(final, str):
        for other in _REASONING if name in _REASONING else (name,):
            if messages[-1].get(other) == final:
                messages[-1][other] = f"{final}{mark} "
        return final
    blocks = final if isinstance(final, list | tuple) else ()
    for block in reversed(blocks):
        if isinstance(block, dict) and isinstance(block.get("text"), str):
            text = block["text"]
            block["text"] = f"{text}{mark} "
            return text
    raise ValueError(f"continue_final_message: the last message has no text in {name!r}")


def _before_end(text: str, mark: str, final: str, name: str) -> str:
    before, found, after = text.rpartition(mark)
    if not found or final.strip() not in text:
        raise ValueError(
            f"continue_final_message: the chat template leaves out the last message's {name!r}, "
            "or alters it"
        )
    return before if after.startswith(" ") else before.rstrip()


def _render(name: str, template: str, variables: dict[str, Any], begin: str, end: str) -> str:
    compiled = _compiled(name, template)
    try:
        return compiled.render(variables, begin, end)
    except jinja2.TemplateError as error:
        raise ValueError(f"{name} refuses the messages: {_one_line(error)}") from error
    except TemplateStopped as error:
        raise ValueError(f"{name} is stopped{_line(error)}: {error}") from error
    except Exception as error:  # a template is a program: it fails in any way
        kind, line = type(error).__name__, _line(error)
        raise ValueError(f"{name} fails{line} with {kind}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _line(error: Exception) -> str:
    """The place in the template, which jinja2 writes into the traceback."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == "<template>"
    ]
    return f" in line {lines[-1]}" if lines else ""


@lru_cache(maxsize=16)
def _compiled(name: str, template: str) -> Template:
    try:
        return Template(template)
    except (jinja2.TemplateError, RecursionError) as error:
        raise ValueError(f"{name} is not jinja: {_one_line(error)}") from error
