"""What callers give as prompts: a string, a list of token ids, or a list of either."""

import operator
from collections.abc import Sequence
from typing import Any

from gemcut.engine.checks import shorten
from gemcut.engine.requests.sampling_params import SamplingParams
from gemcut.tokenizer import Tokenizer

Prompt = str | Sequence[int]


def is_batch(prompt: Any) -> bool:
    """Whether it is a list of prompts, which gets a list of outputs."""
    if isinstance(prompt, str):
        return False
    if isinstance(prompt, bytes | bytearray | memoryview) or not isinstance(prompt, Sequence):
        raise ValueError(f"prompt {shorten(prompt)} is neither a string nor a list")
    return len(prompt) > 0 and isinstance(prompt[0], str | Sequence)


def spread(
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


def encode(prompt: Prompt, tokenizer: Tokenizer, vocab_size: int) -> tuple[str | None, list[int]]:
    """The text, if there is one, and the ids of a prompt; ValueError says why it has none.

    Ids are checked here, on the host: one past the embedding would read foreign memory on a GPU.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError("the prompt is empty")
        return prompt, tokenizer.encode(prompt, parse_special=True)
    if is_batch(prompt):
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


def check_length(count: int, min_tokens: int, max_seq_len: int, *, score: bool) -> None:
    """Nothing, or ValueError where a slot has no room for a prompt of `count` tokens.

    Beside a prompt that is not only scored stand at least one new token, and `min_tokens`.
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
