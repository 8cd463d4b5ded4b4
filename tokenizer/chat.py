"""Chat messages as ids: by a checkpoint's own template, or else as Gemma's turns.

    <bos><start_of_turn>user
    {content}<end_of_turn>
    <start_of_turn>model
    {content}<end_of_turn>
    <start_of_turn>model

Markers are ids from the start and contents are encoded as plain text, so a user who types
"<start_of_turn>" opens no turn. Everything else follows the chat template published with the
checkpoints: contents are stripped, roles alternate, and the turn markers are the only tokens that a
role's name and content cannot merge across.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from gemcut.tokenizer import chat_templates
from gemcut.tokenizer.codec import Tokenizer
from gemcut.tokenizer.vocabularies import END_OF_TURN, START_OF_TURN

ROLES = {"user": "user", "model": "model", "assistant": "model"}


def encode_chat(
    tokenizer: Tokenizer,
    messages: Iterable[Mapping[str, Any]],
    *,
    template: str | None = None,
    variables: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    merge_system: bool = False,
) -> list[int]:
    """The ids of a conversation by a template, or by `render_chat` where there is none.

    `template` is the tokenizer's own unless given, and `variables` are others that it may read.

    Roles are those that the template knows; "model" is another name of "assistant".  With
    `merge_system` a first system message that the template refuses goes before the first user
    content.  `continue_final_message` leaves the last turn open.
    """
    if template is None:
        template = default_template(tokenizer)
    if template is None:
        if variables:
            raise ValueError(f"{', '.join(variables)}: the checkpoint has no chat template to read")
        ids = render_chat(
            tokenizer,
            messages,
            add_generation_prompt=add_generation_prompt,
            merge_system=merge_system,
        )
        while continue_final_message and ids.pop() != tokenizer.end_of_turn_id:
            pass  # the newline after it
        return ids

    def render(given: list[dict[str, Any]]) -> list[str]:
        return chat_templates.render(
            template,
            given,
            inside_literal=tokenizer.inside_marker,
            continue_final="content" if continue_final_message else None,
            tokens=tokenizer.named_tokens,
            add_generation_prompt=add_generation_prompt,
            **(variables or {}),
        )

    given = _messages(messages)
    try:
        parts = render(given)
    except ValueError:
        merged = _merged(given) if merge_system else None
        if merged is None:
            raise
        parts = render(merged)
    return [
        token_id
        for part in parts
        for token_id in tokenizer.encode(part, add_bos=False, add_eos=False, parse_special=True)
    ]


def end_of_turn_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end the model's turn in a chat."""
    template, end = default_template(tokenizer), tokenizer.end_of_turn_id
    ids = set() if template is None else {tokenizer.eos_id}
    if end is not None and (template is None or END_OF_TURN in template):
        ids.add(end)
    return frozenset(ids)


def check_template(tokenizer: Tokenizer) -> None:
    """Nothing, or ValueError where the chat template cannot be used."""
    template = default_template(tokenizer)
    if template is not None:
        chat_templates.check(template)


def default_template(tokenizer: Tokenizer) -> str | None:
    """The jinja template of a plain chat; None for Gemma's own turns."""
    templates = tokenizer.chat_template
    if templates is None or isinstance(templates, str):
        return templates
    if "default" not in templates:
        raise ValueError(f"none of the chat templates is the default: {sorted(templates)}")
    return templates["default"]


def reads_parts(template: str) -> bool:
    """Whether a template goes through the parts of a content; others take a string alone."""
    return re.search(r"\bin\s+\w+(\.content\b|\[['\"]content['\"]\])", template) is not None


def _messages(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(messages, str) or not isinstance(messages, Iterable):
        raise ValueError(f"messages must be a list, got {type(messages).__name__}")
    given = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {index} is a {type(message).__name__}, not a mapping")
        if not isinstance(message.get("role"), str):
            raise ValueError(f"message {index} has no 'role' that is a string")
        if "content" not in message and "tool_calls" not in message:
            raise ValueError(f"message {index} has no 'content'")
        role = "assistant" if message["role"] == "model" else message["role"]
        given.append({**message, "role": role})
    if not given:
        raise ValueError("messages holds no message")
    return given


def _merged(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The messages with a first system text before the first user's; None where there is none."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return None
    system, user, *others = messages
    first, second = system.get("content"), user.get("content")
    if not (isinstance(first, str) and isinstance(second, str)):
        return None
    return [{**user, "content": f"{first}\n\n{second.strip()}"}, *others]


class TurnVocabulary(Protocol):
    """The vocabulary of a chat; `encode` yields no special token for a literal in text."""

    bos_id: int
    start_of_turn_id: int | None
    end_of_turn_id: int | None

    def encode(self, text: str, *, add_bos: bool, add_eos: bool) -> list[int]: ...


def render_chat(
    tokenizer: TurnVocabulary,
    messages: Iterable[Mapping[str, str]],
    *,
    add_generation_prompt: bool = True,
    merge_system: bool = False,
) -> list[int]:
    """The ids of a conversation, BOS included, up to the place where the model begins to answer.

    A message is a mapping with `role` ("user", or "model", also called "assistant") and `content`.
    Gemma has no system role: a first system message is refused, or with `merge_system` goes before
    the first user content with a blank line between, as in Gemma 3's template.

    `add_generation_prompt` opens a model turn whatever the last message is, as the template does:
    after a model message that is a second model turn in a row, not a continuation of the first.
    """
    start, end = tokenizer.start_of_turn_id, tokenizer.end_of_turn_id
    if start is None or end is None:
        raise ValueError(f"the vocabulary has no {START_OF_TURN} and {END_OF_TURN}: no chat turns")

    newline = tokenizer.encode("\n", add_bos=False, add_eos=False)
    ids = [tokenizer.bos_id]
    for role, content in _turns(messages, merge_system):
        # one text, as the template has it: a merged system text may begin with a newline
        ids += [
            start,
            *tokenizer.encode(f"{role}\n{content}", add_bos=False, add_eos=False),
            end,
            *newline,
        ]
    if add_generation_prompt:
        ids += [start, *tokenizer.encode("model\n", add_bos=False, add_eos=False)]
    return ids


def _turns(messages: Iterable[Mapping[str, str]], merge_system: bool) -> list[tuple[str, str]]:
    """The role, as the template writes it, and the stripped content of each turn."""
    if isinstance(messages, str) or not isinstance(messages, Iterable):
        raise ValueError(f"messages must be a list, got {type(messages).__name__}")
    turns: list[tuple[str, str]] = []
    system = ""
    for index, message in enumerate(messages):
        role, content = _fields(index, message)
        if role == "system":
            if index > 0:
                raise ValueError(f"message {index} is a system message; only the first may be one")
            if not merge_system:
                raise ValueError(
                    "message 0 has role 'system', which Gemma does not have; "
                    "merge_system=True puts it before the first user content"
                )
            system = f"{content}\n\n"
            continue
        expected = "model" if len(turns) % 2 else "user"
        if ROLES[role] != expected:
            raise ValueError(
                f"message {index} has role {role!r} where {expected!r} must stand: "
                "roles alternate, beginning with 'user'"
            )
        turns.append((expected, system + content.strip()))
        system = ""
    if not turns:
        raise ValueError("messages holds no user message")
    return turns


def _fields(index: int, message: Mapping[str, str]) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        raise ValueError(f"message {index} is a {type(message).__name__}, not a mapping")
    for key in ("role", "content"):
        if key not in message:
            raise ValueError(f"message {index} has no {key!r}")
        if not isinstance(message[key], str):
            kind = type(message[key]).__name__
            raise ValueError(f"message {index} has a {key!r} that is a {kind}, not a string")
    if message["role"] not in (*ROLES, "system"):
        known = ", ".join(map(repr, ROLES))
        raise ValueError(f"message {index} has role {message['role']!r}; known roles are {known}")
    return message["role"], message["content"]
