"""Requests made from a caller's prompts and settings; ValueError says in one line what is wrong."""

import itertools
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from gemcut.engine.checks import check_int, refuse_unknown, shorten
from gemcut.engine.requests.bad_words import bad_word_ids
from gemcut.engine.requests.grammars import GrammarCompiler
from gemcut.engine.requests.prompts import (
    NO_TOKENIZER,
    ChatTemplate,
    Prompt,
    TokensPrompt,
    encode_conversation,
    encode_prompt,
    split_conversations,
    split_prompts,
)
from gemcut.engine.requests.sampling_params import INT64_MAX, SamplingParams
from gemcut.engine.requests.sequence import Request, TokenSequence
from gemcut.tokenizer import Tokenizer, end_of_turn_ids


class PromptTooLongError(ValueError):
    """A slot has no room for a prompt and what is to come after it."""


class RequestBuilder:
    """Checks prompts and settings against one model and the length of its slots.

    `defaults` are the settings of a request that names none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        eos_ids: Iterable[int],
        max_seq_len: int,
        defaults: SamplingParams,
    ) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self.eos_ids, self._max_seq_len = frozenset(eos_ids), max_seq_len
        self.defaults = defaults
        self._grammars = GrammarCompiler(tokenizer, vocab_size, self.eos_ids)
        self._numbers = itertools.count()

    def batch(self, prompt: Any, params: Any) -> tuple[list[Request], bool]:
        """The requests of a prompt or of a list of prompts, and whether it was a list."""
        prompts, is_batch = split_prompts(prompt)
        each = zip(prompts, _spread(params, len(prompts), "prompts"), strict=True)
        return [self.one(one, settings) for one, settings in each], is_batch

    def scores(self, texts: Any, start: Any) -> tuple[list[Request], bool]:
        """Requests for the log-probabilities of a text, or of texts, each from `start` on."""
        prompts, is_batch = split_prompts(texts)
        starts = start if isinstance(start, list | tuple) else [start] * len(prompts)
        if len(starts) != len(prompts):
            raise ValueError(f"{len(starts)} starts for {len(prompts)} texts")
        for first in starts:
            check_int("start", first, 1, INT64_MAX)
        each = zip(prompts, starts, strict=True)
        return [self.one(one, SamplingParams(), score_from=first) for one, first in each], is_batch

    def chats(self, messages: Any, params: Any, **template: Any) -> tuple[list[Request], bool]:
        """Requests for the answers to a conversation or a list of them, and whether it was a list.

        An answer ends at the end of the turn.
        """
        chats, is_batch = split_conversations(messages)
        each = zip(chats, _spread(params, len(chats), "conversations"), strict=True)
        return [self.chat(chat, settings, **template) for chat, settings in each], is_batch

    def chat(self, messages: Any, params: SamplingParams | None, **template: Any) -> Request:
        """A request for the answer to one conversation."""
        refuse_unknown("chat", template, ChatTemplate.__annotations__)
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise ValueError(f"{NO_TOKENIZER}, so no chat: give token ids")
        ids = encode_conversation(tokenizer, messages, **template)
        text = tokenizer.decode(ids, skip_special_tokens=False)
        prompt = TokensPrompt(prompt_token_ids=ids, prompt=text)
        return self.one(prompt, params, eos_ids=self.eos_ids | end_of_turn_ids(tokenizer))

    def one(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        *,
        eos_ids: frozenset[int] | None = None,
        score_from: int | None = None,
        request_id: str | None = None,
    ) -> Request:
        """The request of a single prompt, with its n sequences.

        score_from: no token is wanted, but the log-probabilities from this one on.
        """
        params = self.defaults if params is None else params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params must be a SamplingParams, got {type(params).__name__}")
        params = params.clone()  # checked once more, as its attributes may have been assigned
        params.check_token_ids(self._vocab_size)
        bad_words = self._bad_words(params)
        text, ids = encode_prompt(prompt, self._tokenizer, self._vocab_size)
        next_id = -1
        if score_from is None:
            _check_length(len(ids), params.min_tokens, self._max_seq_len)
        else:
            _check_scored(len(ids), score_from, self._max_seq_len)
            *ids, next_id = ids
        structure = params.structured_outputs if score_from is None else None
        grammar = None if structure is None else self._grammars.compile(structure)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        if request_id is not None and not isinstance(request_id, str):
            raise ValueError(f"request_id {shorten(request_id)} is not a string")
        request_id = f"request-{next(self._numbers)}" if request_id is None else request_id
        sequences = [
            TokenSequence(
                prompt_ids=ids,
                params=params,
                tokenizer=self._tokenizer,
                eos_ids=self.eos_ids if eos_ids is None else eos_ids,
                max_seq_len=self._max_seq_len,
                seed=(int(seed) + index) & INT64_MAX,
                index=index,
                request_id=request_id,
                score_from=score_from,
                next_id=next_id,
                bad_words=bad_words,
                grammar=None if grammar is None else grammar.copy(),
            )
            for index in range(params.n)
        ]
        return Request(request_id, text, sequences)

    def _bad_words(self, params: SamplingParams) -> list[list[int]]:
        """The ids of the bad words; ValueError where there is text and no tokenizer."""
        if not (params.stop_strings or params.bad_words):
            return []
        if self._tokenizer is None:
            raise ValueError(
                f"{NO_TOKENIZER}: stop_token_ids take the place of stop strings, and a logit_bias "
                f"that of bad_words"
            )
        return [
            ids for word in params.bad_words or () for ids in bad_word_ids(word, self._tokenizer)
        ]


def _spread(params: Any, count: int, what: str) -> list[SamplingParams | None]:
    """One SamplingParams for each of `count` prompts or conversations."""
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, Sequence):
        raise ValueError(f"params must be a SamplingParams or a list, got {type(params).__name__}")
    if len(params) != count:
        raise ValueError(f"{len(params)} SamplingParams for {count} {what}")
    return list(params)


def _check_length(count: int, min_tokens: int, max_seq_len: int) -> None:
    """Nothing, or PromptTooLongError where a slot has no room for a prompt of `count` tokens.

    Room is needed for `min_tokens` too, and for one new token.
    """
    if count > max_seq_len - 1:
        raise PromptTooLongError(
            f"the prompt has {count} tokens and one to generate, but a slot holds {max_seq_len}"
        )
    if count + min_tokens > max_seq_len:
        raise PromptTooLongError(
            f"min_tokens {min_tokens} is more than a slot of {max_seq_len} tokens "
            f"has room for after a prompt of {count}"
        )


def _check_scored(count: int, start: int, max_seq_len: int) -> None:
    """Nothing, or ValueError where a text of `count` tokens cannot be scored from `start` on.

    The last one is only looked up among what follows the others, which a slot must hold.
    """
    if count > max_seq_len + 1:
        raise PromptTooLongError(
            f"the text has {count} tokens, but a slot of {max_seq_len} scores {max_seq_len + 1}"
        )
    if count < 2:
        raise ValueError("a score needs at least two tokens: the first has none before it")
    check_int("start", start, 1, count - 1)
