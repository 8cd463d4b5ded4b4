"""Requests made from a caller's prompts and settings; ValueError says in one line what is wrong.

A prompt is a string or a list of token ids; a batch is a list of either.
"""

import itertools
import operator
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from gemcut.engine.checks import shorten
from gemcut.engine.requests.sampling_params import INT64_MAX, SamplingParams
from gemcut.engine.requests.sequence import Request, TokenSequence
from gemcut.tokenizer import Tokenizer, encode_chat, end_of_turn_ids

Prompt = str | Sequence[int]
NO_TOKENIZER = "this engine has no tokenizer"


class RequestBuilder:
    """Checks prompts and settings against one model and the length of its slots."""

    def __init__(
        self, tokenizer: Tokenizer | None, vocab_size: int, eos_ids: Iterable[int], max_seq_len: int
    ) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self.eos_ids, self._max_seq_len = frozenset(eos_ids), max_seq_len
        self._numbers = itertools.count()

    def batch(self, prompt: Any, params: Any, *, score: bool = False) -> tuple[list[Request], bool]:
        """The requests of a prompt or of a list of prompts, and whether it was a list."""
        if not _is_batch(prompt):
            return [self.one(prompt, params, score=score)], False
        each = zip(prompt, _spread(params, len(prompt)), strict=True)
        return [self.one(text, settings, score=score) for text, settings in each], True

    def chat(self, messages: Any, params: Any, merge_system: bool) -> Request:
        """A request for the answer to a conversation, which ends at the end of the turn."""
        if self._tokenizer is None:
            raise ValueError(f"{NO_TOKENIZER}, so no chat: give token ids")
        ids = encode_chat(self._tokenizer, messages, merge_system=merge_system)
        return self.one(ids, params, eos_ids=self.eos_ids | end_of_turn_ids(self._tokenizer))

    def one(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        *,
        eos_ids: frozenset[int] | None = None,
        score: bool = False,
        request_id: str | None = None,
    ) -> Request:
        """The request of a single prompt, with its n sequences."""
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params must be a SamplingParams, got {type(params).__name__}")
        params.check_token_ids(self._vocab_size)
        if params.stop_strings and self._tokenizer is None:
            raise ValueError(f"{NO_TOKENIZER}: stop_token_ids take the place of stop strings")
        text, ids = _encode(prompt, self._tokenizer, self._vocab_size)
        _check_length(len(ids), params.min_tokens, self._max_seq_len, score=score)
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
                score_only=score,
            )
            for index in range(params.n)
        ]
        return Request(request_id, text, sequences)


def _is_batch(prompt: Any) -> bool:
    """Whether `prompt` is a list of prompts, which gets a list of outputs."""
    if isinstance(prompt, str):
        return False
    if isinstance(prompt, bytes | bytearray | memoryview) or not isinstance(prompt, Sequence):
        raise ValueError(f"prompt {shorten(prompt)} is neither a string nor a list")
    return len(prompt) > 0 and isinstance(prompt[0], str | Sequence)


def _spread(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams | None]:
    """One SamplingParams for each of `count` prompts."""
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, Sequence):
        raise ValueError(f"params must be a SamplingParams or a list, got {type(params).__name__}")
    if len(params) != count:
        raise ValueError(f"{len(params)} SamplingParams for {count} prompts")
    return list(params)


def _encode(
    prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int
) -> tuple[str | None, list[int]]:
    """The text, if there is one, and the ids of a prompt; ValueError says why it has none.

    Ids are checked here, on the host: one past the embedding would read foreign memory on a GPU.
    """
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
    if _is_batch(prompt):
        raise ValueError("a prompt is a string or a list of token ids, not a list of lists")
    ids = []
    for token_id in prompt:
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
    return None, ids


def _check_length(count: int, min_tokens: int, max_seq_len: int, *, score: bool) -> None:
    """Nothing, or ValueError where a slot has no room for a prompt of `count` tokens.

    Room is needed for `min_tokens` too and, unless the prompt is only scored, for one new token.
    """
    if count > max_seq_len - (not score):
        what = "tokens" if score else "tokens and one to generate"
        raise ValueError(f"the prompt has {count} {what}, but a slot holds {max_seq_len}")
    if count + min_tokens > max_seq_len:
        raise ValueError(
            f"min_tokens {min_tokens} is more than a slot of {max_seq_len} tokens "
            f"has room for after a prompt of {count}"
        )
    if score and count < 2:
        raise ValueError("a score needs at least two tokens: the first has none before it")
