"""Log-probabilities of tokens, from logits in blocks of rows: never a long text's all at once."""

import torch
from torch import Tensor

from gemcut.engine.model import Gemma
from gemcut.engine.outputs import Logprob, TokenLogprobs
from gemcut.tokenizer import Tokenizer

LOGITS_ROWS = 64  # 64 rows of 256 000 float32 are 66 MB


def token_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """The log-probability of each row's token: logits [M, V], token_ids [M] -> [M] float32."""
    chosen = logits.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def describe_tokens(
    logits: Tensor, token_ids: Tensor, top: int, tokenizer: Tokenizer
) -> list[TokenLogprobs]:
    """Each row's token and the `top` likeliest ones: logits [M, V], token_ids [M] -> M entries."""
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
        entry = {id_: Logprob(value, place, _show(tokenizer, id_)) for id_, value, place in ranked}
        entry.setdefault(token_id, Logprob(logprob, rank, _show(tokenizer, token_id)))
        entries.append(entry)
    return entries


def _show(tokenizer: Tokenizer, token_id: int) -> str:
    # ids of an embedding padded past the vocabulary have no text
    if token_id >= len(tokenizer):
        return ""
    return tokenizer.decode([token_id], skip_special_tokens=False)


def prompt_scores(model: Gemma, hidden: Tensor, token_ids: Tensor) -> list[float]:
    """The log-probabilities of token_ids[1:]: hidden [T, D], token_ids [T] -> T - 1 values."""
    blocks = zip(hidden[:-1].split(LOGITS_ROWS), token_ids[1:].split(LOGITS_ROWS), strict=True)
    scores = [token_logprobs(model.logits(states), ids) for states, ids in blocks]
    return torch.cat(scores).tolist() if scores else []


def prompt_logprobs(
    model: Gemma, hidden: Tensor, token_ids: Tensor, top: int, tokenizer: Tokenizer
) -> list[TokenLogprobs | None]:
    """One entry for each prompt token; the first has none, since nothing stands before it."""
    entries: list[TokenLogprobs | None] = [None]
    blocks = zip(hidden[:-1].split(LOGITS_ROWS), token_ids[1:].split(LOGITS_ROWS), strict=True)
    for states, ids in blocks:
        entries += describe_tokens(model.logits(states), ids, top, tokenizer)
    return entries
