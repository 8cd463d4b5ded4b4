"""The results that the engine returns: outputs, deltas of a stream, log-probabilities, metrics."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Logprob:
    """The log-probability of one token, before temperature, filters and penalties."""

    logprob: float  # natural logarithm
    rank: int  # 1 is the likeliest
    decoded_token: str | None  # None where no text is wanted


TokenLogprobs = dict[int, Logprob]  # by token id: the token itself, then the likeliest by rank


@dataclass
class CompletionOutput:
    """One completion of a prompt."""

    index: int  # 0 to n - 1
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None  # of token_ids; None unless logprobs were asked for
    logprobs: list[TokenLogprobs] | None  # one entry for each of token_ids
    finish_reason: str | None  # "stop" | "length" | "abort"; None while it runs
    stop_reason: int | str | None  # the stop token id or stop string; None for EOS and otherwise

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """Counts, and times in seconds, of one request (all its completions together)."""

    prompt_tokens: int
    generated_tokens: int
    reused_prefix_tokens: int
    time_to_first_token: float  # from the call to the first token
    time_between_tokens: float  # mean over the completions' later tokens; 0 where there are none
    tokens_per_second: float  # generated tokens over the time from the call to the last


@dataclass
class RequestOutput:
    """A prompt with its completions; `text`, `token_ids`, `finish_reason` are the first one's.

    Where vLLM returns a list for a single prompt, the engine returns the output; for programs
    written so, it can be read as a list of itself: `output[0]`, `for one in output`.
    """

    request_id: str
    prompt: str | None  # None where the prompt was given as ids
    prompt_token_ids: list[int]
    prompt_logprobs: list[TokenLogprobs | None] | None  # the first token has none
    outputs: list[CompletionOutput]
    metrics: RequestMetrics

    def __getitem__(self, index: int) -> "RequestOutput":
        return (self,)[index]

    def __iter__(self) -> Iterator["RequestOutput"]:
        yield self

    @property
    def finished(self) -> bool:
        return all(completion.finished() for completion in self.outputs)

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompt that a slot held already (`metrics.reused_prefix_tokens`)."""
        return self.metrics.reused_prefix_tokens

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[0].finish_reason


@dataclass
class Delta:
    """The text that one more token added to a stream; joined, they are the completion's text.

    A token may add no text: its bytes begin a character, or its text may begin a stop string.
    """

    text: str
    token_ids: list[int]
    index: int = 0  # which of the n completions
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None  # set in a completion's last delta
    stop_reason: int | str | None = None
    request_id: str = ""
    error: Exception | None = None  # from Engine.step, where finish_reason is "error"


@dataclass
class ScoreOutput:
    """The log-probabilities of a text."""

    prompt: str | None
    token_ids: list[int]
    # of the last tokens, from `start` on: each given all before it; natural
    logprobs: list[float] = field(repr=False)
    is_greedy: list[bool] = field(repr=False)  # whether each is the likeliest there

    @property
    def total(self) -> float:
        """The log-probability of the scored tokens together."""
        return math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        return math.exp(-self.total / len(self.logprobs))
