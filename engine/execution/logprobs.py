"""Log-probabilities of tokens, from blocks of logits: never those of a long text all at once."""

from collections.abc import Iterator

import torch
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
    top = logits.shape[-1] if top == -1 else top
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, token_ids.unsqueeze(-1))
    ranks = (logprobs > chosen).sum(-1) + 1
    best = logprobs.topk(top, -1)
    entries = []
    for token_id, logprob, rank, best_ids, best_logprobs in zip(
        token_ids.tolist(),
        chosen.squeeze(-1).tolist(),
        ranks.tolist(),
        best.indices.tolist(),
        best.values.tolist(),
        strict=True,
    ):
        ranked = zip(best_ids, best_logprobs, range(1, top + 1), strict=True)
        entry = {token_id: Logprob(logprob, rank, _show(tokenizer, token_id))}
        entry |= {id_: Logprob(value, place, _show(tokenizer, id_)) for id_, value, place in ranked}
        entries.append(entry)
    return entries


def _show(tokenizer: Tokenizer | None, token_id: int) -> str | None:
    if tokenizer is None:
        return None
    # ids of an embedding padded past the vocabulary have no text
    shown = token_id < len(tokenizer)
    return tokenizer.decode([token_id], skip_special_tokens=False) if shown else ""


def prompt_scores(model: Gemma, hidden: Tensor, following: Tensor) -> list[float]:
    """The log-probability of the token after each state: hidden [T, D], following [T or T - 1]."""
    scores = [token_logprobs(logits, ids) for logits, ids in _blocks(model, hidden, following)]
    return torch.cat(scores).tolist() if scores else []


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
