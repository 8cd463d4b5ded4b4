"""Log-probabilities as the two kinds of answers have them."""

import math
from collections.abc import Iterable, Sequence

from openai.types.chat.chat_completion_token_logprob import ChatCompletionTokenLogprob, TopLogprob
from openai.types.completion_choice import Logprobs

from gemcut.engine.openai_api.errors import ApiError
from gemcut.engine.requests.outputs import TokenLogprobs
from gemcut.tokenizer import Tokenizer

LOWEST = -9999.0  # JSON has no infinity
MAX_TOP_LOGPROBS = 20  # OpenAI's limit in chats and responses


def completion_logprobs(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    entries: Iterable[TokenLogprobs | None],
    top: int,
    start: int,
) -> tuple[Logprobs, int]:
    """Of tokens whose text begins at character `start`, and where it ends.

    A prompt's first token has no log-probability.
    """
    tokens, own, likeliest, offsets = [], [], [], []
    for token_id, entry in zip(token_ids, entries, strict=True):
        tokens.append(_named(tokenizer.token_bytes(token_id)))
        offsets.append(start)
        start += len(_named(tokenizer.token_bytes(token_id, skip_special_tokens=True)))
        own.append(None if entry is None else _finite(entry[token_id].logprob))
        if entry is None:
            likeliest.append(None)
            continue
        shown = [*reversed(_likeliest(entry, top)), token_id]  # of two with one text, the likelier
        texts = ((_named(tokenizer.token_bytes(one)), entry[one].logprob) for one in shown)
        likeliest.append({text: _finite(logprob) for text, logprob in texts})
    # `construct`: the types of the openai package have no None, which its API gives a first token
    named = Logprobs.construct(
        tokens=tokens, token_logprobs=own, top_logprobs=likeliest, text_offset=offsets
    )
    return named, start


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], entries: Iterable[TokenLogprobs], top: int
) -> list[ChatCompletionTokenLogprob]:
    """Of tokens of an answer, with the `top` likeliest in the place of each."""

    def fields(token_id: int, entry: TokenLogprobs) -> dict:
        spelt = tokenizer.token_bytes(token_id)
        return {
            "token": spelt.decode(errors="replace"),
            "bytes": list(spelt),
            "logprob": _finite(entry[token_id].logprob),
        }

    return [
        ChatCompletionTokenLogprob(
            **fields(token_id, entry),
            top_logprobs=[TopLogprob(**fields(one, entry)) for one in _likeliest(entry, top)],
        )
        for token_id, entry in zip(token_ids, entries, strict=True)
    ]


def check_top_logprobs(top: int | None) -> None:
    """Nothing, or ApiError where a chat asks for more than it may."""
    if top is not None and not 0 <= top <= MAX_TOP_LOGPROBS:
        message = f"top_logprobs {top} is outside 0..{MAX_TOP_LOGPROBS}"
        raise ApiError(400, message, param="top_logprobs")


def _likeliest(entry: TokenLogprobs, top: int) -> list[int]:
    """The ids of the `top` likeliest tokens, the likeliest first."""
    return sorted(
        (id_ for id_, one in entry.items() if one.rank <= top), key=lambda i: entry[i].rank
    )


def _named(spelt: bytes) -> str:
    """A token's text; of bytes that are no whole characters, their numbers, as OpenAI has them."""
    try:
        return spelt.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt)


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LOWEST
