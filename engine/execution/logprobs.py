"""Log-probabilities of tokens, from blocks of logits: never those of a long text all at once."""

from collections.abc import Iterator, Sequence
from itertools import count

from torch import Tensor

from gemcut.engine.execution.model import Gemma
from gemcut.engine.requests.outputs import Logprob, TokenLogprobs
from gemcut.tokenizer import Tokenizer

LOGITS_ROWS = 64  # 64 rows of 256 000 float32 are 66 MB


def token_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """The log-probability of each row's token: logits [M, V], token_ids [M] -> [M] float32."""
    chosen = logits.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def describe_tokens(
    logits: Tensor, token_ids: Tensor, top: int, tokenizer: Tokenizer | None
) -> list[TokenLogprobs]:
    """Each row's token, and after it the `top` likeliest ones, or all of them where it is -1.

    logits [M, V], token_ids [M] -> M entries.
    """
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, token_ids.unsqueeze(-1))
    ranks = (logprobs > chosen).sum(-1) + 1
    best = logprobs.sort(-1, descending=True) if top == -1 else logprobs.topk(top, -1)
    entries = []
    for token_id, logprob, rank, best_ids, best_logprobs in zip(
        token_ids.tolist(),
        chosen.squeeze(-1).tolist(),
        ranks.tolist(),
        best.indices,
        best.values,
        strict=True,
    ):
        ids = best_ids.tolist()  # a row at a time: each may be the whole vocabulary
        (text,), texts = _texts(tokenizer, [token_id]), _texts(tokenizer, ids)
        ranked = zip(ids, map(Logprob, best_logprobs.tolist(), count(1), texts), strict=True)
        entries.append({token_id: Logprob(logprob, rank, text)} | dict(ranked))
    return entries


def _texts(tokenizer: Tokenizer | None, token_ids: Sequence[int]) -> Sequence[str | None]:
    """What each token is shown as; None without a tokenizer."""
    if tokenizer is None:
        return [None] * len(token_ids)
    # ids of an embedding padded past the vocabulary have no text
    texts, size = tokenizer.texts, len(tokenizer)
    return [texts[i] if i < size else "" for i in token_ids]


def prompt_scores(model: Gemma, hidden: Tensor, following: Tensor) -> list[tuple[float, bool]]:
    """The log-probability of the token after each state, and whether it is the likeliest.

    hidden [T, D], following [T].
    """
    scores: list[tuple[float, bool]] = []
    for logits, ids in _blocks(model, hidden, following):
        is_likeliest = (logits.argmax(-1) == ids).tolist()
        scores += zip(token_logprobs(logits, ids).tolist(), is_likeliest, strict=True)
    return scores


def prompt_logprobs(
    model: Gemma, hidden: Tensor, following: Tensor, top: int, tokenizer: Tokenizer | None
) -> list[TokenLogprobs]:
    """The same with the `top` likeliest tokens: one entry for each of `following`."""
    blocks = _blocks(model, hidden, following)
    return [entry for block in blocks for entry in describe_tokens(*block, top, tokenizer)]


def _blocks(model: Gemma, hidden: Tensor, following: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    states = hidden[: following.shape[0]].split(LOGITS_ROWS)
    for few, ids in zip(states, following.split(LOGITS_ROWS), strict=True):
        if ids.numel():
            yield model.logits(few), ids
