"""From what a caller gives to a request; ValueError says in one line why there is none."""

import itertools
import secrets
from collections.abc import Iterable
from typing import Any

from gemcut.engine.checks import shorten
from gemcut.engine.requests import prompts
from gemcut.engine.requests.prompts import Prompt
from gemcut.engine.requests.sampling_params import INT64_MAX, SamplingParams
from gemcut.engine.requests.sequence import Request, TokenSequence
from gemcut.tokenizer import Tokenizer, render_chat


class RequestBuilder:
    """Checks prompts and settings against one model and the length of its slots."""

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Iterable[int], max_seq_len: int
    ) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self.eos_ids, self._max_seq_len = frozenset(eos_ids), max_seq_len
        self._numbers = itertools.count()

    def batch(self, prompt: Any, params: Any, *, score: bool = False) -> tuple[list[Request], bool]:
        """The requests of a prompt or of a list of prompts, and whether it was a list."""
        if not prompts.is_batch(prompt):
            return [self.one(prompt, params, score=score)], False
        each = zip(prompt, prompts.spread(params, len(prompt)), strict=True)
        return [self.one(text, settings, score=score) for text, settings in each], True

    def chat(self, messages: Any, params: Any, merge_system: bool) -> Request:
        """A request for the answer to a conversation, which ends at the end of the turn."""
        ids = render_chat(self._tokenizer, messages, merge_system=merge_system)
        end_of_turn = self._tokenizer.end_of_turn_id
        assert end_of_turn is not None  # render_chat refuses such a vocabulary
        return self.one(ids, params, eos_ids=self.eos_ids | {end_of_turn})

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
        params.check_token_ids(len(self._tokenizer))
        text, ids = prompts.encode(prompt, self._tokenizer, self._vocab_size)
        prompts.check_length(len(ids), params.min_tokens, self._max_seq_len, score=score)
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
