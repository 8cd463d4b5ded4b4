"""Chat messages rendered as the ids of Gemma's turns.

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

from collections.abc import Iterable, Mapping
from typing import Protocol

from gemcut.tokenizer.vocabularies import END_OF_TURN, START_OF_TURN

ROLES = {"user": "user", "model": "model", "assistant": "model"}


class TurnVocabulary(Protocol):
    """The vocabulary of a chat; `encode` yields no special token for a literal in text."""

    bos_id: int
    start_of_turn_id: int | None
    end_of_turn_id: int | None

    def encode(self, text: str, *, add_bos: bool) -> list[int]: ...


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

    newline = tokenizer.encode("\n", add_bos=False)
    ids = [tokenizer.bos_id]
    for role, content in _turns(messages, merge_system):
        # one text, as the template has it: a merged system text may begin with a newline
        ids += [start, *tokenizer.encode(f"{role}\n{content}", add_bos=False), end, *newline]
    if add_generation_prompt:
        ids += [start, *tokenizer.encode("model\n", add_bos=False)]
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
