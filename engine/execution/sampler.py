"""Sampling: the choice of each row's next token, on the device, by the settings of its slot.

A choice that needs no setting beside the temperature is made while the head computes its logits,
which then are never stored.  Both ways give the same token.

`features` names the settings that a batch uses; the others are not computed.  A setting that is
left out and a neutral one give the same token, so a graph with more features than a batch needs
serves it too.
"""

from types import ModuleType

import torch
from torch import Tensor

from gemcut.engine.execution.model import Gemma
from gemcut.engine.execution.slot_state import SlotState
from gemcut.engine.requests.sequence import TokenSequence

Features = frozenset[str]
GREEDY: Features = frozenset()
RANDOM: Features = frozenset({"random"})
FILTERED: Features = RANDOM | {"top_k", "top_p", "min_p"}
FULL: Features = FILTERED | {"bias", "min_tokens", "penalties"}
KINDS = (FULL, FILTERED, RANDOM, GREEDY)  # sets that get a graph, the most features first


def choose_tokens(
    hidden: Tensor,
    slots: Tensor,
    positions: Tensor | None,
    model: Gemma,
    state: SlotState,
    features: Features,
) -> tuple[Tensor, Tensor]:
    """The next token of each row: normed hidden states [M, D], slots [M].

    positions [M] of the tokens before; None: of the newest ones of their slots.  -> ids and scores
    as `sample_tokens` gives them, or those of S ranges of the vocabulary, [S, M], to be compared.
    """
    if not features <= RANDOM:
        logits = model.logits(hidden)
        return sample_tokens(logits, slots, positions, state, features, model.ops)
    draw: tuple[Tensor, ...] = ()
    if features == RANDOM:
        draw = state.temperature, state.seeds, state.positions, slots
        if positions is not None:
            of_slots = (setting.index_select(0, slots) for setting in draw[:2])
            draw = *of_slots, positions
    scores, ids = model.ops.lm_head_argmax(
        hidden, model.weights.lm_head, model.config.final_softcap, *draw
    )
    return ids, scores


def sample_tokens(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor | None,
    state: SlotState,
    features: Features,
    ops: ModuleType,
) -> tuple[Tensor, Tensor]:
    """The next token of each row: logits [B, V], slots [B], positions [B] as `choose_tokens`.

    -> ids [B] and their logits, float32 [B]: not finite where a row has no token to choose, because
    its logits are NaN or all its tokens are banned.
    """
    if features == GREEDY:
        return _scored(ops.sample(logits), logits)
    integers = state.integers.index_select(1, slots)
    floats = state.floats.index_select(1, slots)
    _, newest, _, top_k, seeds, first_end = integers.unbind()
    if positions is None:
        positions = newest
    temperature, top_p, min_p, repetition, presence, frequency = floats.unbind()
    if "bias" in features:
        logits = logits + state.bias.index_select(0, slots)
    if "min_tokens" in features:
        early = (positions + 1 < first_end).unsqueeze(-1)
        logits = logits.masked_fill(state.is_end.index_select(0, slots) & early, -torch.inf)
    if "penalties" in features:
        logits = ops.penalize(
            logits,
            state.output_counts.index_select(0, slots),
            state.in_prompt.index_select(0, slots),
            repetition,
            presence,
            frequency,
        )

    def used(name: str, setting: Tensor) -> Tensor | None:
        return setting if name in features else None

    chosen = ops.sample(
        logits,
        used("random", temperature),
        used("top_k", top_k),
        used("top_p", top_p),
        used("min_p", min_p),
        used("random", seeds),
        positions,
    )
    return _scored(chosen, logits)


def count_tokens(token_ids: Tensor, slots: Tensor, state: SlotState) -> None:
    """Count new tokens for later penalties: token_ids [B], slots [B]."""
    cells = slots * state.vocab_size + token_ids
    ones = torch.ones_like(cells, dtype=state.output_counts.dtype)
    state.output_counts.view(-1).scatter_add_(0, cells, ones)


def _scored(chosen: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    return chosen, logits.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)


def run_processors(logits: Tensor, sequences: list[TokenSequence]) -> Tensor:
    """Logits [B, V] after each sequence's own processors; a failing one ends its sequence alone."""
    if not any(s.processors for s in sequences):
        return logits
    logits = logits.clone()
    for row, sequence in enumerate(sequences):
        try:
            for processor in sequence.processors:
                changed = processor(list(sequence.output_ids), logits[row].clone())
                if not isinstance(changed, Tensor) or changed.shape != logits[row].shape:
                    raise ValueError(
                        f"a logits processor must return a tensor of shape "
                        f"{tuple(logits[row].shape)}, not {getattr(changed, 'shape', changed)!r}"
                    )
                logits[row] = changed
        except Exception as error:
            sequence.fail(error)
    return logits
