"""Logits processors: the settings of `generate` that the sampler of slots does not have.

A processor is a function of ids [B, T], the prompts and what came so far, and scores [B, V] ->
scores [B, V], for the whole batch at once, as those of transformers are.  Each setting has the name
of transformers' class, because an object of that class takes the setting's place.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemcut.engine.transformers_api.models.generation_config import DEFAULTS, GenerationConfig
from gemcut.engine.transformers_api.models.generation_settings import fewest_tokens
from gemcut.engine.transformers_api.models.setting_checks import bias_pairs, token_ids_of

Processor = Callable[[Tensor, Tensor], Tensor]
INF = float("inf")
TOP_H_TOKENS = 100  # the likeliest tokens, among which top_h chooses

OFF_DEVICE = ("top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size")
OFF_DEVICE += ("bad_words_ids", "sequence_bias", "forced_bos_token_id", "forced_eos_token_id")
OFF_DEVICE += ("exponential_decay_length_penalty", "remove_invalid_values", "renormalize_logits")
OFF_DEVICE += ("output_scores", "output_logits")


@dataclass(frozen=True)
class Shape:
    """What processors must know of a batch of prompts."""

    columns: int  # of the prompts, whether ids or embeddings
    id_columns: int  # of the prompts' ids; 0 where embeddings are given
    new_tokens: int  # the most that may follow
    times: int  # rows of each prompt
    mask: Tensor | None  # [B, columns] bool: which of them hold tokens


def runs_on_device(config: GenerationConfig, shape: Shape) -> bool:
    """Whether the sampler of slots does all that these settings ask."""
    if config.suppress_tokens or config.begin_suppress_tokens:
        return False
    if config.repetition_penalty != 1 and not shape.id_columns:
        return False  # it takes a prompt of ids
    if config.do_sample and config.top_p == 0:
        return False
    return all(getattr(config, name) in (None, DEFAULTS[name]) for name in OFF_DEVICE)


def make_processors(
    config: GenerationConfig,
    shape: Shape,
    custom: Sequence[Processor],
    prefix_allowed_tokens_fn: Callable[[int, Tensor], Any] | None,
) -> list[Processor]:
    """All processors of a call, in transformers' order: rules, the caller's, filters of sampling.

    A processor of the caller's takes the place of the rule that has its class' name.
    """
    rules = _rules(config, shape, prefix_allowed_tokens_fn)
    of_name = {type(processor).__name__: processor for processor in reversed(custom)}
    chosen = [of_name.get(name, rule) for name, rule in rules.items()]
    chosen += [processor for processor in custom if processor not in chosen]
    if config.do_sample:
        chosen += _filters(config)
    if config.renormalize_logits:
        chosen.append(lambda ids, scores: scores.log_softmax(-1))
    return chosen


def _rules(
    config: GenerationConfig, shape: Shape, allowed: Callable[[int, Tensor], Any] | None
) -> dict[str, Processor]:
    """The rules that hold whether tokens are drawn or not, by transformers' names and order."""
    ends = [token_id for token_id in config.eos_token_id if token_id >= 0]
    begin, fewest = shape.id_columns, fewest_tokens(config, shape.columns)
    rules: dict[str, Processor] = {}
    if pairs := bias_pairs(config.sequence_bias):
        rules["SequenceBiasLogitsProcessor"] = _bias(pairs)
    if config.repetition_penalty != 1:
        rules["RepetitionPenaltyLogitsProcessor"] = _penalize(
            config.repetition_penalty, shape.mask if begin else None
        )
    if config.no_repeat_ngram_size:
        rules["NoRepeatNGramLogitsProcessor"] = _ban_repeats(config.no_repeat_ngram_size)
    if config.bad_words_ids:
        banned = [
            tuple(ids) for ids in config.bad_words_ids if list(ids) not in [[e] for e in ends]
        ]
        rules["NoBadWordsLogitsProcessor"] = _bias([(ids, -INF) for ids in banned])
    if fewest and ends:
        early = _ban(ends, lambda length: length - begin < fewest)
        rules["MinLengthLogitsProcessor"] = early
        if config.min_new_tokens is not None:
            rules["MinNewTokensLengthLogitsProcessor"] = early
    if allowed is not None:
        rules["PrefixConstrainedLogitsProcessor"] = _allow(allowed, shape.times)
    if config.forced_bos_token_id is not None:
        forced = token_ids_of(config.forced_bos_token_id)
        rules["ForcedBOSTokenLogitsProcessor"] = _force(forced, 1)
    if config.forced_eos_token_id is not None:
        forced, last = token_ids_of(config.forced_eos_token_id), begin + shape.new_tokens - 1
        rules["ForcedEOSTokenLogitsProcessor"] = _force(forced, last)
    if config.remove_invalid_values:
        rules["InfNanRemoveLogitsProcessor"] = lambda ids, scores: scores.nan_to_num(0.0)
    if config.exponential_decay_length_penalty is not None and ends:
        start, factor = config.exponential_decay_length_penalty
        rules["ExponentialDecayLengthPenalty"] = _favour_ends(ends, start + begin, factor)
    if config.suppress_tokens:
        rules["SuppressTokensLogitsProcessor"] = _ban(config.suppress_tokens, lambda length: True)
    if config.begin_suppress_tokens:
        first = begin + (begin <= 1 and config.forced_bos_token_id is not None)
        rules["SuppressTokensAtBeginLogitsProcessor"] = _ban(
            config.begin_suppress_tokens, lambda length: length == first
        )
    return rules


def _filters(config: GenerationConfig) -> list[Processor]:
    """What sampling leaves of the scores, in transformers' order."""
    chosen: list[Processor] = []
    if config.temperature != 1:
        chosen.append(lambda ids, scores: scores / config.temperature)
    if config.top_h is not None:
        chosen.append(lambda ids, scores: _top_h(scores, config.top_h))
    if config.top_k:
        chosen.append(lambda ids, scores: _top_k(scores, config.top_k))
    if config.top_p < 1:
        chosen.append(lambda ids, scores: _top_p(scores, config.top_p))
    if config.min_p is not None:
        chosen.append(lambda ids, scores: _at_least(scores, config.min_p * _best(scores)))
    if config.typical_p < 1:
        chosen.append(lambda ids, scores: _typical(scores, config.typical_p))
    if 0 < config.epsilon_cutoff < 1:
        chosen.append(lambda ids, scores: _at_least(scores, config.epsilon_cutoff))
    if 0 < config.eta_cutoff < 1:
        chosen.append(lambda ids, scores: _at_least(scores, _eta(scores, config.eta_cutoff)))
    return chosen


def _ids(values: Sequence[int], scores: Tensor) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64, device=scores.device)


def _ban(token_ids: Sequence[int], applies: Callable[[int], bool]) -> Processor:
    """Ban tokens at the lengths of ids for which `applies` holds."""

    def ban(ids: Tensor, scores: Tensor) -> Tensor:
        if not applies(ids.shape[1]):
            return scores
        return scores.index_fill(1, _ids(token_ids, scores), -INF)

    return ban


def _force(token_ids: Sequence[int], length: int) -> Processor:
    """Ban all other tokens where there are `length` ids."""

    def force(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] != length:
            return scores
        return torch.full_like(scores, -INF).index_fill_(1, _ids(token_ids, scores), 0.0)

    return force


def _bias(pairs: Sequence[tuple[tuple[int, ...], float]]) -> Processor:
    """Add each bias to the last token of its sequence, in rows that end with the others."""

    def add(ids: Tensor, scores: Tensor) -> Tensor:
        bias = torch.zeros_like(scores)
        for sequence, value in pairs:
            before = _ids(sequence[:-1], scores)
            if len(before) <= ids.shape[1]:
                tail = ids[:, ids.shape[1] - len(before) :]
                bias[(tail == before).all(1), sequence[-1]] += value
        return scores + bias

    return add


def _penalize(penalty: float, mask: Tensor | None) -> Processor:
    """Lower the scores of tokens that have come; mask [B, columns] tells padding of the prompt."""

    def penalize(ids: Tensor, scores: Tensor) -> Tensor:
        nothing = scores.shape[1]  # a column that is dropped again
        if mask is not None:
            new = ids.shape[1] - mask.shape[1]
            ids = ids.masked_fill(~F.pad(mask, (0, new), value=True).to(ids.device), nothing)
        came = torch.zeros(scores.shape[0], nothing + 1, dtype=torch.bool, device=scores.device)
        came = came.scatter_(1, ids, True)[:, :nothing]
        lowered = torch.where(scores < 0, scores * penalty, scores / penalty)
        return torch.where(came, lowered, scores)

    return penalize


def _ban_repeats(size: int) -> Processor:
    """Ban tokens that would end a run of `size` tokens which the row holds already."""

    def ban(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] < size:
            return scores
        runs = ids.unfold(1, size, 1)  # [B, runs, size]
        begun = ids[:, ids.shape[1] - size + 1 :].unsqueeze(1)
        repeats = (runs[..., :-1] == begun).all(-1)
        nothing = scores.shape[1]
        banned = torch.zeros(scores.shape[0], nothing + 1, dtype=torch.bool, device=scores.device)
        banned.scatter_(1, runs[..., -1].masked_fill(~repeats, nothing), True)
        return scores.masked_fill(banned[:, :nothing], -INF)

    return ban


def _favour_ends(ends: Sequence[int], start: int, factor: float) -> Processor:
    """Raise the scores of ends by factor ** n - 1 of their size, n ids after `start`."""

    def favour(ids: Tensor, scores: Tensor) -> Tensor:
        if (late := ids.shape[1] - start) <= 0:
            return scores
        of_ends = scores[:, list(ends)]
        more = (of_ends.abs() * (factor**late - 1)).masked_fill(~of_ends.isfinite(), 0.0)
        return scores.index_copy(1, _ids(ends, scores), of_ends + more)

    return favour


def _allow(allowed: Callable[[int, Tensor], Any], times: int) -> Processor:
    """Ban what `allowed`, of a prompt's number and a row of ids, does not list."""

    def allow(ids: Tensor, scores: Tensor) -> Tensor:
        mask = torch.full_like(scores, -INF)
        for row, of_row in enumerate(ids):
            listed = torch.as_tensor(
                allowed(row // times, of_row), dtype=torch.int64, device=scores.device
            )
            if not listed.numel():
                raise ValueError(f"prefix_allowed_tokens_fn allows no token in row {row}")
            mask[row, listed] = 0
        left = scores + mask
        # where other rules have banned all that is allowed, it is allowed still
        none = left.amax(-1).isneginf().view(-1, times).all(-1).repeat_interleave(times)
        return torch.where(none.unsqueeze(-1), mask, left)

    return allow


def _top_k(scores: Tensor, count: int) -> Tensor:
    least = scores.topk(min(count, scores.shape[1])).values[:, -1:]
    return scores.masked_fill(scores < least, -INF)


def _top_p(scores: Tensor, share: float) -> Tensor:
    ordered, where = scores.sort()
    out = ordered.softmax(-1).cumsum(-1) <= 1 - share
    out[:, -1] = False
    return scores.masked_fill(out.scatter(1, where, out), -INF)


def _best(scores: Tensor) -> Tensor:
    return scores.softmax(-1).amax(-1, keepdim=True)


def _at_least(scores: Tensor, probability: Tensor | float) -> Tensor:
    """Scores of tokens at least this likely, and of the likeliest."""
    out = (scores.softmax(-1) < probability) & (scores < scores.amax(-1, keepdim=True))
    return scores.masked_fill(out, -INF)


def _eta(scores: Tensor, cutoff: float) -> Tensor:
    """The cutoff that falls with the entropy of the scores (Hewitt et al., 2022): [B, 1]."""
    logs = scores.log_softmax(-1)
    entropy = -(logs.exp() * logs.clamp(min=torch.finfo(logs.dtype).min)).sum(-1, keepdim=True)
    return torch.clamp(cutoff**0.5 * (-entropy).exp(), max=cutoff)


def _typical(scores: Tensor, mass: float) -> Tensor:
    """The tokens whose surprise is nearest the entropy, up to `mass` (Meister et al., 2022)."""
    logs = scores.log_softmax(-1)
    entropy = -(logs * logs.exp()).nansum(-1, keepdim=True)
    ordered, where = (-logs - entropy).abs().sort()
    reached = scores.gather(-1, where).softmax(-1).cumsum(-1) < mass
    last = reached.sum(1, keepdim=True).clamp(max=scores.shape[1] - 1)
    out = ordered > ordered.gather(1, last)
    out[:, 0] = False
    return scores.masked_fill(out.scatter(1, where, out), -INF)


def _top_h(scores: Tensor, share: float) -> Tensor:
    """The likeliest tokens that hold `share` of the entropy (Potraghloo et al., 2025)."""
    best, where = scores.topk(min(TOP_H_TOKENS, scores.shape[1]))
    logs = best.log_softmax(-1).clamp(min=torch.finfo(best.dtype).min)
    terms = -logs.exp() * logs
    keep = terms.cumsum(-1) <= share * terms.sum(-1, keepdim=True)
    keep[:, 0] = True
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(1, where, keep)
    return scores.masked_fill(~kept, -INF)


def as_list(name: str, value: Any) -> list[Any]:
    """The functions in a list of them; ValueError where one cannot be called."""
    functions = list(value) if isinstance(value, Sequence) else [] if value is None else [value]
    for function in functions:
        if not callable(function) or isinstance(function, str | Mapping):
            raise ValueError(f"{name}: {function!r} cannot be called")
    return functions
