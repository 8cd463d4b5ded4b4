"""A tokenizer's chats: conversations to ids, by a jinja template or in Gemma's own turns."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from gemcut.engine.transformers_api.tokenizers.rows import Encoding, Passage, Source
from gemcut.engine.transformers_api.tokenizers.text_coder import TextCoder
from gemcut.engine.transformers_api.tokenizers.tool_schemas import as_schemas
from gemcut.tokenizer import chat_templates, render_chat
from gemcut.tokenizer.chat_templates import Rendered


class ChatCoder(TextCoder):
    """The part of a tokenizer that encodes conversations."""

    chat_template: str | dict[str, str] | None

    def get_chat_template(
        self, chat_template: str | None = None, tools: Sequence[Any] | None = None
    ) -> str | None:
        """The jinja template that renders a chat, or None for Gemma's own turns."""
        named = self.chat_template if isinstance(self.chat_template, dict) else {}
        if chat_template is not None:
            return named.get(chat_template, chat_template)
        if not isinstance(self.chat_template, dict):
            return self.chat_template
        name = "tool_use" if tools is not None and "tool_use" in named else "default"
        if name not in named:
            raise ValueError(f"no chat template is the default; give chat_template={sorted(named)}")
        return named[name]

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        sanitize_control_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> Any:
        """The encoding of a conversation, or of a list of them, with no BOS except the chat's own.

        A conversation is a list of messages, or an object that has `messages`; a message is a
        mapping, a dataclass, or an object with `model_dump`.  Without a template the turns are
        Gemma's own (gemcut.tokenizer.render_chat, which takes `merge_system`), in which contents
        are encoded apart from markers.  A jinja template yields one string, so literals of special
        tokens are marked in the messages first and stay text (chat_templates).  Either way a user
        who types "<start_of_turn>" opens no turn; transformers needs `sanitize_control_tokens` for
        that.  Two things are not guarded: a literal that a template builds from pieces, and the
        string that `tokenize=False` yields, which must not be encoded again.

        `tools`, `documents` and `variables` are the template's; what it never reads does nothing.
        A tool is a JSON schema, or a function with type hints and a docstring that describes its
        arguments under "Args:", as transformers reads them.
        `return_assistant_tokens_mask` adds `assistant_masks`, 1 for each token that the template
        wrote between {% generation %} and {% endgeneration %}.
        """
        if not sanitize_control_tokens:
            raise ValueError("sanitize_control_tokens=False: messages never write special tokens")
        if add_generation_prompt and continue_final_message:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        template = self.get_chat_template(chat_template, tools)
        if return_assistant_tokens_mask:
            _check_mask(template, return_dict and tokenize, continue_final_message)
        chats, is_batch = _chats(conversation)
        schemas = None if tools is None else as_schemas(tools)
        variables |= {"tools": schemas, "documents": documents}
        rendered: list[Rendered] = []
        if template is None:
            own = [
                self._own_turns(chat, add_generation_prompt, continue_final_message, variables)
                for chat in chats
            ]
            passages = [Passage(ids, Source(_no_places)) for ids in own]
            texts = [self.decode(ids) for ids in own] if not tokenize else []
        else:
            field = continue_final_message
            rendered = [
                chat_templates.rendered(
                    template,
                    chat,
                    name=self._template_name(template),
                    inside_literal=self._vocabulary.inside_marker if tokenize else None,
                    continue_final="content" if field is True else field or None,
                    tokens=self.special_tokens_map,
                    **(variables | {"add_generation_prompt": add_generation_prompt}),
                )
                for chat in chats
            ]
            texts = ["".join(one.parts) for one in rendered]
            parts = [one.parts for one in rendered] if tokenize else []
            passages = [self.passage(one, is_split=False) for one in parts]
        if not tokenize:
            return texts if is_batch else texts[0]
        encoding = self.batch(
            [[passage] for passage in passages],
            is_batch,
            add_special_tokens=False,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
            **(tokenizer_kwargs or {}),
        )
        if return_assistant_tokens_mask:
            masks = [
                _generated(row, one.generated)
                for row, one in zip(encoding.encodings or (), rendered, strict=True)
            ]
            encoding["assistant_masks"] = masks if is_batch or return_tensors else masks[0]
            encoding.convert_to_tensors(return_tensors)
        return encoding if return_dict else encoding.input_ids

    def encode_message_with_chat_template(
        self,
        message: Any,
        conversation_history: Sequence[Any] | None = None,
        **options: Any,
    ) -> list[int]:
        """The ids that a message adds to a conversation: from where the two encodings differ on."""
        if "add_generation_prompt" in options:
            raise ValueError("add_generation_prompt has no place in one message: add it at the end")
        history = list(conversation_history or ())
        whole = self.apply_chat_template([*history, message], return_dict=False, **options)
        before = self.apply_chat_template(history, return_dict=False, **options) if history else []
        same = [i == j for i, j in zip(whole, before, strict=False)]
        return whole[same.index(False) if False in same else len(same) :]

    def _template_name(self, template: str) -> str | None:
        """The name of one of several templates; None of the only one, or of the caller's own."""
        named = self.chat_template if isinstance(self.chat_template, dict) else {}
        return next((name for name, text in named.items() if text == template), None)

    def _own_turns(
        self,
        chat: Any,
        add_generation_prompt: bool,
        continue_final: bool | str,
        variables: Mapping[str, Any],
    ) -> list[int]:
        given = {name for name, value in variables.items() if value is not None}
        if unread := sorted(given - {"merge_system"}):
            raise ValueError(f"without a chat template there is no use for {unread}")
        if continue_final not in (True, False, "content"):
            raise ValueError(f"continue_final_message={continue_final!r}: a turn has 'content'")
        ids = render_chat(
            self._vocabulary,
            chat_templates.plain_messages(chat),
            add_generation_prompt=add_generation_prompt,
            merge_system=bool(variables.get("merge_system")),
        )
        if continue_final:
            ends = [i for i, token in enumerate(ids) if token == self._vocabulary.end_of_turn_id]
            ids = ids[: ends[-1]]
        first = [] if self.bos_token_id is None else [self.bos_token_id]
        return [*first, *ids[1:]]


def _check_mask(template: str | None, is_encoding: bool, continue_final: bool | str) -> None:
    name = "return_assistant_tokens_mask=True"
    if template is None:
        raise ValueError(f"{name} needs a chat template that has {{% generation %}} blocks")
    if not is_encoding:
        raise ValueError(f"{name} needs return_dict=True and tokenize=True")
    if continue_final:
        raise ValueError(f"{name} and continue_final_message exclude each other")
    if not chat_templates.has_generation(template):
        warnings.warn(
            f"{name}: the chat template has no {{% generation %}} block, so the mask is all 0",
            stacklevel=3,
        )


def _chats(conversation: Any) -> tuple[list[Any], bool]:
    """The messages of each conversation, and whether the caller gave a list of them."""
    given = getattr(conversation, "messages", conversation)
    if isinstance(given, str | Mapping) or not isinstance(given, Sequence):
        raise ValueError(f"conversation must be a list of messages, got {type(given).__name__}")
    if not given:
        raise ValueError("conversation is empty; a chat has at least one message")
    is_batch = isinstance(given[0], list | tuple) or hasattr(given[0], "messages")
    chats = [getattr(chat, "messages", chat) for chat in given] if is_batch else [given]
    if not all(chats):
        raise ValueError("a conversation is empty; a chat has at least one message")
    return chats, is_batch


def _generated(row: Encoding, spans: Sequence[tuple[int, int]]) -> list[int]:
    """1 for each token of a row that holds a character of the spans."""
    last = max((end for _, end in [*spans, *row.offsets]), default=0)
    inside = np.zeros(last + 1, dtype=bool)
    for start, end in spans:
        inside[start:end] = True
    return [int(inside[start:end].any()) for start, end in row.offsets]


def _no_places() -> NoReturn:
    raise NotImplementedError(
        "a chat without a chat template is made of ids: its tokens have no characters or words"
    )
