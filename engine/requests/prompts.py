"""Prompts and conversations as callers give them, here and in programs written for vLLM.

a prompt         "text", [2, 5], an array of ids, {"prompt": "text"}, {"prompt_token_ids": [2]}
prompts          a list of these, of one kind or mixed; an array of ids with two dimensions
a conversation   [{"role": "user", "content": "text"}], or content in parts of text
conversations    a list of these
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from torch import Tensor

from gemcut.engine.checks import check_bool, shorten
from gemcut.tokenizer import Tokenizer
from gemcut.tokenizer.chat import default_template, encode_chat, reads_parts


class TextPrompt(TypedDict):
    """A prompt by its text."""

    prompt: str


class _Tokens(TypedDict):
    prompt_token_ids: Sequence[int]


class TokensPrompt(_Tokens, total=False):
    """A prompt by its token ids, and perhaps the text that the output shows for them."""

    prompt: str


class ChatTemplate(TypedDict, total=False):
    """How a conversation becomes a prompt; what is not given has the first value."""

    chat_template: str | None  # None is the checkpoint's own, or Gemma's turns where it has none
    chat_template_kwargs: Mapping[str, Any] | None  # other variables that the template reads
    tools: Sequence[Any] | None  # the variable of that name
    chat_template_content_format: (
        str  # "auto" by the template; parts: "string" joined, "openai" not
    )
    merge_system: bool  # False; True puts a system message before the first user content
    add_generation_prompt: bool  # True opens the turn of the model; False ends with the last turn
    continue_final_message: bool  # False; True leaves the last turn open, for the model to go on


Prompt = str | Sequence[int] | np.ndarray | Tensor | TextPrompt | TokensPrompt
Messages = Sequence[Mapping[str, Any]]
NO_TOKENIZER = "this engine has no tokenizer"
# what a chat gives a template itself, or its renderer
OF_CHAT = {"messages", "template", "name", "tokens", "inside_literal", "continue_final"}
OF_CHAT |= {"add_generation_prompt", "continue_final_message"}
PARTS = ("text", "input_text")  # types of a content part that are text


def split_prompts(prompt: Any) -> tuple[list[Any], bool]:
    """The prompts of a batch, or the only one, and whether it was a batch."""
    plain = _plain(prompt)
    if isinstance(plain, str | Mapping):
        return [plain], False
    if isinstance(plain, bytes | bytearray | memoryview) or not isinstance(plain, Sequence):
        raise ValueError(f"prompt {shorten(prompt)} is neither a string nor a list")
    is_batch = len(plain) > 0 and isinstance(_plain(plain[0]), str | Mapping | Sequence)
    return (list(plain), True) if is_batch else ([plain], False)


def encode_prompt(
    prompt: Any, tokenizer: Tokenizer | None, vocab_size: int
) -> tuple[str | None, list[int]]:
    """The text, if there is one, and the ids of a prompt; ValueError says why it has none.

    Ids are checked here, on the host: one past the embedding would read foreign memory on a GPU.
    """
    text = None
    if isinstance(prompt, Mapping):
        text, prompt = _read_mapping(prompt)
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError("the prompt is empty")
        if tokenizer is None:
            raise ValueError(f"{NO_TOKENIZER}, so a prompt is a list of token ids")
        ids = tokenizer.encode(prompt, parse_special=True)
        if max(ids) >= vocab_size:  # a placeholder of images or sounds
            raise ValueError(
                f"the prompt holds {tokenizer.piece(max(ids))!r}, for which the model's embedding "
                "has no row: it computes text alone"
            )
        return prompt, ids
    prompts, is_batch = split_prompts(prompt)
    if is_batch:
        raise ValueError("a prompt is a string or a list of token ids, not a list of lists")
    ids = []
    for token_id in prompts[0]:
        try:
            index = operator.index(token_id)  # numpy's integers too
        except TypeError:
            index = -1
        if isinstance(token_id, bool) or not 0 <= index < vocab_size:
            raise ValueError(
                f"token id {shorten(token_id)} in the prompt is outside 0..{vocab_size - 1}"
            )
        ids.append(index)
    if not ids:
        raise ValueError("the prompt is empty")
    return text, ids


def split_conversations(messages: Any) -> tuple[list[Any], bool]:
    """The conversations of a batch, or the only one, and whether it was a batch."""
    is_batch = isinstance(messages, list | tuple) and isinstance(
        next(iter(messages), None), list | tuple
    )
    return (list(messages), True) if is_batch else ([messages], False)


def encode_conversation(
    tokenizer: Tokenizer,
    messages: Any,
    *,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tools: Sequence[Any] | None = None,
    chat_template_content_format: str = "auto",
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    merge_system: bool = False,
) -> list[int]:
    """The ids of one conversation."""
    check_bool("add_generation_prompt", add_generation_prompt)
    check_bool("continue_final_message", continue_final_message)
    if add_generation_prompt and continue_final_message:
        raise ValueError(
            "continue_final_message=True goes on with the last turn, and needs "
            "add_generation_prompt=False: a new turn would end it"
        )
    if not isinstance(chat_template, str | None):
        raise ValueError(f"chat_template {shorten(chat_template)} is no string")
    if not isinstance(chat_template_kwargs, Mapping | None):
        raise ValueError(f"chat_template_kwargs {shorten(chat_template_kwargs)} is not a mapping")
    variables = dict(chat_template_kwargs or {})
    for name in variables:
        if not isinstance(name, str) or name in OF_CHAT:
            raise ValueError(f"chat_template_kwargs: {shorten(name)} is no variable of a template")
    if tools is not None:
        variables["tools"] = tools
    template = default_template(tokenizer) if chat_template is None else chat_template
    if chat_template_content_format not in ("auto", "string", "openai"):
        raise ValueError(
            f"chat_template_content_format {shorten(chat_template_content_format)} is neither "
            f"'auto', 'string' nor 'openai'"
        )
    joined = chat_template_content_format == "string"
    if chat_template_content_format == "auto":
        joined = template is None or not reads_parts(template)
    return encode_chat(
        tokenizer,
        _with_parts_of_text(messages, joined=joined),
        template=template,
        variables=variables,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        merge_system=merge_system,
    )


def _with_parts_of_text(messages: Any, *, joined: bool) -> Any:
    """Messages whose parts of content are text, or joined to a string by newlines, as in vLLM.

    ValueError names a part that is no text.  Anything else is left for the renderer to check.
    """
    if not isinstance(messages, list | tuple):
        return messages
    given = []
    for index, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list | tuple):
            texts = [_text_of(index, part) for part in content]
            parts = [{"type": "text", "text": text} for text in texts]
            message = {**message, "content": "\n".join(texts) if joined else parts}
        given.append(message)
    return given


def _text_of(index: int, part: Any) -> str:
    """The text of a part of message `index`."""
    text = part
    if isinstance(part, Mapping):
        kind = part.get("type", "text")
        if kind not in PARTS:
            raise ValueError(
                f"message {index} has a part of type {shorten(kind)}; only text is supported"
            )
        text = part.get("text")
    if not isinstance(text, str):
        raise ValueError(f"message {index} has a part without text: {shorten(part)}")
    return text


def _plain(value: Any) -> Any:
    """An array as lists or a number; anything else as it is."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic | Tensor) else value


def _read_mapping(prompt: Mapping[str, Any]) -> tuple[str | None, Any]:
    """The text and the prompt of one of vLLM's mappings."""
    for name, value in prompt.items():
        if name not in ("prompt", "prompt_token_ids") and value is not None:
            raise ValueError(
                f"a prompt with {shorten(name)} is not supported: it has 'prompt' or "
                f"'prompt_token_ids'"
            )
    text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"'prompt' {shorten(text)} of a prompt is not a string")
    if ids is not None:
        if isinstance(ids, str | Mapping):
            raise ValueError(f"'prompt_token_ids' {shorten(ids)} is not a list of token ids")
        return text, ids
    if text is None:
        raise ValueError("a prompt has neither 'prompt' nor 'prompt_token_ids'")
    return text, text
