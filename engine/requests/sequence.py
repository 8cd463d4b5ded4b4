"""Requests and their sequences on the host: ids and text so far, and the reason of their end."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gemcut.engine.requests.bad_words import BadWords
from gemcut.engine.requests.grammars import Grammar
from gemcut.engine.requests.outputs import (
    CompletionOutput,
    Delta,
    RequestMetrics,
    RequestOutput,
    ScoreOutput,
    TokenLogprobs,
)
from gemcut.engine.requests.prefix_reuse import Held
from gemcut.engine.requests.prompt_lookup import Lookup
from gemcut.engine.requests.sampling_params import SamplingParams
from gemcut.tokenizer import StopStrings, StreamDecoder, Tokenizer


def _drop(_: object) -> None:
    """Ignore a delta or an end: the caller waits for the whole output."""


@dataclass(eq=False)
class TokenSequence:
    """One completion of a prompt, while it is generated."""

    prompt_ids: list[int]
    params: SamplingParams
    tokenizer: Tokenizer | None  # None: only ids are wanted
    eos_ids: frozenset[int]  # tokens that end it, unless ignore_eos
    max_seq_len: int  # tokens of prompt and output together
    seed: int
    index: int = 0
    request_id: str = ""
    # only the log-probabilities from this token on are wanted, up to `next_id` after the prompt
    score_from: int | None = None
    next_id: int = -1
    bad_words: Sequence[list[int]] = ()  # the ids of params.bad_words
    grammar: Grammar | None = None  # of params.structured_outputs, after the tokens so far
    deliver: Callable[[Delta], object] = _drop  # called with each token's text

    slot: int | None = None
    reused: int = 0  # tokens of the prompt that the slot held already
    prefilled: int = 0  # tokens of the prompt in the cache
    in_flight: int = 0  # tokens sampled on the device that the host has not read
    is_taking: bool = False  # it is taking a token; if that was interrupted, it cannot go on
    written: int = 0  # positions of the slot that were ever written
    output_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    scores: list[tuple[float, bool]] = field(default_factory=list)  # and whether it is likeliest
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: Exception | None = None
    is_spoiled: bool = False  # its slot holds NaN: nobody else must see that
    is_stale: bool = False  # its slot holds keys of other weights than the model's
    lookup: Lookup | None = None  # of its text so far, once drafts were asked for
    first_token_at: float | None = None
    last_token_at: float | None = None

    def __post_init__(self) -> None:
        self._text: list[str] = []
        self._decoder = None
        if self.tokenizer is not None and self.params.detokenize:
            skip = self.params.skip_special_tokens
            self._decoder = StreamDecoder(self.tokenizer, skip_special_tokens=skip)
        self._includes_stop = self.params.include_stop_str_in_output
        self._stops = StopStrings(self.params.stop_strings, include=self._includes_stop)
        self._stop_token_ids = frozenset(self.params.stop_token_ids or ())
        eos_ids = frozenset() if self.params.ignore_eos else self.eos_ids
        if self.grammar is not None:  # what it allows at an end is an end
            eos_ids |= self.grammar.end_ids
        # tokens that end the sequence, and must not come before min_tokens
        self.end_ids = eos_ids | self._stop_token_ids
        room = self.max_seq_len - len(self.prompt_ids)
        self.max_tokens = min(room, self.params.max_tokens or room)
        # words of one token are a bias, of which the device needs no history
        self.bias = dict(self.params.logit_bias or {})
        self.bias |= {word[0]: -math.inf for word in self.bad_words if len(word) == 1}
        self.processors = list(self.params.logits_processors or ())
        if long_words := [word for word in self.bad_words if len(word) > 1]:
            self.processors.append(BadWords(long_words))
        # the features that sampler.py must compute for it
        self.uses = self.params.features() | ({"bias"} if self.bias else frozenset())

    @property
    def is_prefilled(self) -> bool:
        return self.prefilled == len(self.prompt_ids)

    @property
    def wants_token(self) -> bool:
        """Whether a step should choose one more token, beside those in flight."""
        return not self.finished and len(self.output_ids) + self.in_flight < self.max_tokens

    @property
    def may_reuse(self) -> bool:
        """Whether a prefix of the prompt may be skipped: not if its logprobs are wanted."""
        return self.params.prompt_logprobs is None

    @property
    def score_only(self) -> bool:
        """Whether log-probabilities are wanted, and no token."""
        return self.score_from is not None

    @property
    def needs_logits(self) -> bool:
        """Whether the host must see logits before, or along with, the choice."""
        wants = self.params.logprobs is not None or bool(self.processors)
        return wants or self.grammar is not None

    def draft(self, most: int) -> list[int]:
        """Tokens guessed to come next, `most` or fewer: what was asked, and there is room for."""
        wanted = self.params.prompt_lookup_num_tokens
        count = min(most, wanted, self.max_tokens - len(self.output_ids) - 1)
        if count < 1:
            return []
        if self.lookup is None:
            self.lookup = Lookup(self.prompt_ids)
        self.lookup.extend(self.output_ids[len(self.lookup) - len(self.prompt_ids) :])
        return self.lookup.draft(count)

    def place(self, slot: int, reused: int, written: int) -> None:
        """Take a slot that holds the first `reused` tokens of the prompt, and perhaps others."""
        self.slot, self.reused = slot, reused
        self.prefilled, self.written = reused, written

    def held(self) -> Held:
        """The tokens of its slot that others can reuse: all except the newest, not yet computed."""
        if self.is_stale:
            return Held()
        return Held(self.prompt_ids[: self.prefilled] + self.output_ids[:-1], self.written)

    @property
    def length(self) -> int:
        """Tokens of prompt and output: the position of the next one."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def text(self) -> str:
        return "".join(self._text)

    @property
    def is_proven(self) -> bool:
        """Whether its last token was sampled from finite logits: then all that it saw is finite."""
        is_sampled = self.finish_reason in ("stop", "length") and not self.score_only
        return self.error is None and is_sampled and not self.processors

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    def take(self, token_ids: Sequence[int], logprobs: TokenLogprobs | None) -> int:
        """Append the sampled tokens, up to the one that ends the sequence; returns how many.

        -1 stands for a token that could not be sampled: it ends the sequence with an error.
        """
        self.is_taking = True
        count = 0
        for token_id in token_ids:
            if self.finished:
                break
            if token_id < 0:
                self.fail(ValueError("no token is left: logits are NaN, or all are banned"))
                break
            self.append(token_id, logprobs)
            count += 1
        self.is_taking = False
        return count

    def append(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """Append the sampled token, which may end the sequence, and deliver its text."""
        self.last_token_at = time.perf_counter()
        if self.first_token_at is None:
            self.first_token_at = self.last_token_at
        self.output_ids.append(token_id)
        if logprobs is not None:
            self.logprobs.append(logprobs)

        text = ""
        if token_id in self.end_ids:
            self.finish_reason = "stop"
            self.stop_reason = token_id if token_id in self._stop_token_ids else None
            if self._includes_stop:
                text, _ = self._push(token_id, search=False)
        else:
            # as in vLLM, a stop string must end after the first min_tokens
            is_late = len(self.output_ids) > self.params.min_tokens
            text, self.stop_reason = self._push(token_id, search=is_late)
            is_complete = self.grammar is not None and self.grammar.take(token_id)
            if self.stop_reason is not None or is_complete:
                self.finish_reason = "stop"
            elif len(self.output_ids) >= self.max_tokens:
                self.finish_reason = "length"
        if self.finish_reason is not None:
            text += self._rest()
        self._emit(text, [token_id], None if logprobs is None else [logprobs])

    def _push(self, token_id: int, *, search: bool) -> tuple[str, str | None]:
        """The text that a token lets be shown, and the stop string that it completes."""
        if self._decoder is None:
            return "", None
        text, hidden = self._decoder.push(token_id), self._decoder.hidden(token_id)
        return self._stops.push(text, hidden=hidden, search=search)

    def finish_scored(self) -> None:
        """End a sequence of which only the prompt's log-probabilities are wanted."""
        self.finish_reason = "length"

    def abort(self) -> None:
        """End it at once, for instance because its consumer left."""
        if not self.finished:
            self.finish_reason = "abort"
            self._emit(self._rest(), [], None)

    def fail(self, error: Exception) -> None:
        """End it with an exception for its consumer alone."""
        if not self.finished:
            self.error = error

    def fail_if_interrupted(self) -> None:
        """End it if it was taking a token: how much of it was delivered is unknown."""
        if self.is_taking:
            self.finish_reason = None
            self.error = RuntimeError("interrupted in the midst of a token")

    def _rest(self) -> str:
        """The text held back, which can no longer become a character or a stop string."""
        if isinstance(self.stop_reason, str):
            return ""
        late = len(self.output_ids) > self.params.min_tokens
        last = "" if self._decoder is None else self._decoder.flush()
        text, matched = self._stops.push(last, search=late)
        if matched is not None:
            self.finish_reason, self.stop_reason = "stop", matched
            return text
        return text + self._stops.flush()

    def _emit(self, text: str, token_ids: list[int], logprobs: list[TokenLogprobs] | None) -> None:
        self._text.append(text)
        reasons = (self.finish_reason, self.stop_reason)
        self.deliver(Delta(text, token_ids, self.index, logprobs, *reasons, self.request_id))

    def output(self) -> CompletionOutput:
        wanted = self.params.logprobs is not None
        chosen = zip(self.logprobs, self.output_ids, strict=False)
        return CompletionOutput(
            index=self.index,
            text=self.text,
            token_ids=list(self.output_ids),
            cumulative_logprob=sum(of[id_].logprob for of, id_ in chosen) if wanted else None,
            logprobs=list(self.logprobs) if wanted else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


@dataclass(eq=False)
class Request:
    """One prompt and its n sequences."""

    request_id: str
    prompt: str | None
    sequences: list[TokenSequence]
    ended: Callable[["Request"], object] = _drop  # called once, when all sequences have ended
    in_background: bool = True  # the engine's own thread makes its steps; else its caller does
    arrived_at: float = field(default_factory=time.perf_counter)

    @property
    def finished(self) -> bool:
        return all(sequence.finished for sequence in self.sequences)

    @property
    def error(self) -> Exception | None:
        return next((s.error for s in self.sequences if s.error is not None), None)

    def output(self) -> RequestOutput:
        first = self.sequences[0]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=list(first.prompt_ids),
            prompt_logprobs=first.prompt_logprobs,
            outputs=[sequence.output() for sequence in self.sequences],
            metrics=self._metrics(),
        )

    def score(self) -> ScoreOutput:
        """The output of a request that is scored."""
        (sequence,) = self.sequences
        if sequence.finish_reason == "abort":  # by new weights: there is no half of a score
            raise RuntimeError("the text is not scored: its request was aborted")
        logprobs, is_greedy = ([*each] for each in zip(*sequence.scores, strict=True))
        ids = [*sequence.prompt_ids, sequence.next_id]
        return ScoreOutput(self.prompt, ids, logprobs, is_greedy)

    def _metrics(self) -> RequestMetrics:
        begun = [s for s in self.sequences if s.first_token_at is not None]
        firsts = [s.first_token_at for s in begun if s.first_token_at is not None]
        lasts = [s.last_token_at for s in begun if s.last_token_at is not None]
        generated = sum(len(s.output_ids) for s in begun)
        later = generated - len(begun)
        spans = sum(last - first for first, last in zip(firsts, lasts, strict=True))
        return RequestMetrics(
            prompt_tokens=len(self.sequences[0].prompt_ids),
            generated_tokens=generated,
            reused_prefix_tokens=self.sequences[0].reused,
            time_to_first_token=min(firsts) - self.arrived_at if firsts else 0.0,
            time_between_tokens=spans / later if later else 0.0,
            tokens_per_second=generated / (max(lasts) - self.arrived_at) if lasts else 0.0,
        )
