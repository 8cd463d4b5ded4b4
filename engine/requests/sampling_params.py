"""SamplingParams: the settings that choose the tokens of one request, and end it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from gemcut.engine.checks import check_bool, check_int, check_number, check_text, shorten
from gemcut.engine.requests.structured_outputs import StructuredOutputsParams

# token ids generated so far, float32 logits [V] -> float32 logits [V]
LogitsProcessor = Callable[[list[int], Tensor], Tensor]

INT64_MAX = 2**63 - 1
MAX_N = 1024
MAX_MIN_TOKENS = 2**31
MAX_DRAFT = 7  # with the newest token, the most that decode attention takes of one row
LIMIT = 1e30  # of numbers that are multiplied with logits in float32
LISTS = list | tuple | set | frozenset | None
COLLECTIONS = {
    "stop": LISTS | str,
    "stop_token_ids": LISTS,
    "bad_words": LISTS,
    "allowed_token_ids": LISTS,
    "logit_bias": Mapping | None,
    "logits_processors": LISTS,
}
TEXTS_AND_IDS = ("stop", "stop_token_ids", "bad_words")  # lists, empty where None is given
FLAGS = (
    "ignore_eos",
    "include_stop_str_in_output",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
)


@dataclass(kw_only=True, slots=True)
class SamplingParams:
    """The settings of a request, by the names that vLLM gave them.

    ValueError names a value out of range.  Attributes may be assigned: a call of the engine checks
    them once more, and takes a copy.  Token ids are checked against the vocabulary by the engine,
    which knows it.  A SamplingParams is taken as it is; a call that gives none has the settings
    that the model publishes (`Engine.get_default_sampling_params`).
    """

    n: int = 1  # completions of the prompt; completion i draws with seed + i
    temperature: float = 1.0  # 0 takes the likeliest token
    top_k: int = 0  # the k likeliest tokens; 0 or -1: all
    top_p: float = 1.0  # the fewest tokens that hold this much probability, of what top_k left
    min_p: float = 0.0  # tokens at least this likely, as a share of the likeliest
    max_tokens: int | None = None  # None: up to the end of the slot (vLLM's default is 16)
    min_tokens: int = 0  # before them no EOS and no stop token; no stop string ends in them
    stop: str | Sequence[str] | None = None  # not shown in the text
    stop_token_ids: Sequence[int] | None = None  # in token_ids, not in the text
    include_stop_str_in_output: bool = False  # the text ends with the stop string or stop token
    ignore_eos: bool = False
    seed: int | None = None  # the same seed gives the same text, whatever else runs; -1: None
    logprobs: int | None = None  # that many likeliest tokens at each place, and the chosen; -1: all
    prompt_logprobs: int | None = None  # the same for the prompt's tokens
    repetition_penalty: float = 1.0  # > 1 discourages tokens of prompt and output
    presence_penalty: float = 0.0  # > 0 discourages tokens of the output
    frequency_penalty: float = 0.0  # the same, for each time they occur
    logit_bias: Mapping[int, float] | None = None  # added to logits; -inf bans a token
    allowed_token_ids: Sequence[int] | None = None  # no others are chosen
    bad_words: Sequence[str] | None = None  # the last token of a word is not chosen after the rest
    detokenize: bool = True  # without it there is no text, and no stop string
    skip_special_tokens: bool = True  # no <bos>, <end_of_turn>, ... in the text
    spaces_between_special_tokens: bool = True  # changes nothing: Gemma's tokens need no spaces
    logits_processors: Sequence[LogitsProcessor] | None = None
    prompt_lookup_num_tokens: int = 0  # guess so many from the text, verify them in one step
    structured_outputs: StructuredOutputsParams | None = None  # the form that the text must have

    def __post_init__(self) -> None:
        check_int("n", self.n, 1, MAX_N)
        check_number("temperature", self.temperature, at_least=0, below=LIMIT)
        check_int("top_k", self.top_k, -1, INT64_MAX)
        check_number("top_p", self.top_p, above=0)
        check_number("min_p", self.min_p, at_least=0)
        for name in ("top_p", "min_p"):
            if (value := getattr(self, name)) > 1:
                raise ValueError(f"{name} {value} must be at most 1")
        if self.max_tokens is not None:
            check_int("max_tokens", self.max_tokens, 1, INT64_MAX)
        check_int("min_tokens", self.min_tokens, 0, MAX_MIN_TOKENS)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        for name in FLAGS:
            check_bool(name, getattr(self, name))
        if self.seed is not None:
            check_int("seed", self.seed, -INT64_MAX - 1, INT64_MAX)
            self.seed = None if self.seed == -1 else self.seed
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is True:  # as the chats of OpenAI's API ask for one
                setattr(self, name, 1)
            if (value := getattr(self, name)) is not None:
                check_int(name, value, -1, INT64_MAX)
        check_number("repetition_penalty", self.repetition_penalty, above=0, below=LIMIT)
        for name in ("presence_penalty", "frequency_penalty"):
            check_number(name, getattr(self, name), above=-LIMIT, below=LIMIT)
        check_int("prompt_lookup_num_tokens", self.prompt_lookup_num_tokens, 0, MAX_DRAFT)
        self._check_collections()
        if self.structured_outputs is not None:
            if not isinstance(self.structured_outputs, StructuredOutputsParams):
                found = shorten(self.structured_outputs)
                raise ValueError(f"structured_outputs {found} is no StructuredOutputsParams")
            self.structured_outputs = replace(self.structured_outputs)  # checked, and a copy
        if self.prompt_lookup_num_tokens and (
            self.penalizes or self.logits_processors or self.bad_words or self.structured_outputs
        ):
            raise ValueError(
                f"prompt_lookup_num_tokens {self.prompt_lookup_num_tokens} cannot be combined with "
                f"penalties, bad_words, logits_processors or structured_outputs: they need each "
                f"token before the next"
            )

    @classmethod
    def from_optional(cls, **settings: Any) -> "SamplingParams":
        """The settings that are not None; the others have their defaults."""
        return cls(**{name: value for name, value in settings.items() if value is not None})

    def clone(self) -> "SamplingParams":
        """A checked copy: later changes of the one do not change the other."""
        return replace(self)

    def _check_collections(self) -> None:
        for name, kind in COLLECTIONS.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                what = "mapping" if name == "logit_bias" else "list"
                raise ValueError(f"{name} {shorten(value)} is not a {what}")
            if name in TEXTS_AND_IDS and not isinstance(value, list):  # as in vLLM
                value = [value] if isinstance(value, str) else list(value or ())
            if value is not None:  # a copy: its owner may change it later
                setattr(self, name, dict(value) if isinstance(value, Mapping) else list(value))
        for stop in self.stop_strings:
            check_text("stop", stop)
        if self.stop_strings and not self.detokenize:
            raise ValueError(f"stop {shorten(self.stop)} needs detokenize=True: there is no text")
        for word in self.bad_words or ():
            check_text("bad_words", word)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids is empty: no token is left; None allows all")
        if self.logit_bias is not None:
            self.logit_bias = _by_id(self.logit_bias)
        for token_id, bias in (self.logit_bias or {}).items():
            if not (isinstance(bias, float) and bias == -math.inf):
                name = f"logit_bias of token {shorten(token_id)}"
                check_number(name, bias, above=-LIMIT, below=LIMIT)
        for processor in self.logits_processors or ():
            if not callable(processor):
                raise ValueError(f"logits_processors: {shorten(processor)} cannot be called")

    def features(self) -> frozenset[str]:
        """The features of the choice of a token that these settings need (sampler.py)."""
        used = {
            "random": self.temperature > 0,
            "top_k": self.temperature > 0 and self.top_k > 0,
            "top_p": self.temperature > 0 and self.top_p < 1,
            "min_p": self.temperature > 0 and self.min_p > 0,
            "bias": bool(self.logit_bias) or self.allowed_token_ids is not None,
            "min_tokens": self.min_tokens > 0,
            "penalties": self.penalizes,
        }
        return frozenset(name for name, is_used in used.items() if is_used)

    @property
    def penalizes(self) -> bool:
        """Whether tokens are penalised for having come before."""
        presence, frequency = self.presence_penalty, self.frequency_penalty
        return self.repetition_penalty != 1 or presence != 0 or frequency != 0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def check_token_ids(self, vocab_size: int) -> None:
        """Nothing, or ValueError where a token id or a count is past the vocabulary."""
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token_id in getattr(self, name) or ():
                check_int(f"{name}: id", token_id, 0, vocab_size - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None:
                check_int(name, value, -1, vocab_size)


def _by_id(bias: Mapping[Any, float]) -> dict[int, float]:
    """The mapping with the integers that its keys may spell, as JSON has them: {"5": 1.0}."""
    by_id = {int(key) if _spells_int(key) else key: value for key, value in bias.items()}
    if len(by_id) < len(bias):
        raise ValueError(f"logit_bias {shorten(bias)} holds a token id twice")
    return by_id


def _spells_int(key: Any) -> bool:
    return isinstance(key, str) and key.isascii() and key.isdigit()
