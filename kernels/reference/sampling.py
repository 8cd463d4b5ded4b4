"""The oracles of token choice: penalties, filters, seeded draws, and what follows a choice.

Letters in shape comments: B rows of a batch, V vocabulary.
"""

import torch
from torch import Tensor

from gemcut.kernels.outputs import takes_out


@takes_out
def penalize(
    logits: Tensor,
    output_counts: Tensor,
    in_prompt: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> Tensor:
    """Penalised logits [B, V], from how often each token was generated and whether it was prompted.

    output_counts [B, V] int, in_prompt [B, V] bool; repetition, presence, frequency [B].
    Repetition divides what speaks for a seen token (Keskar et al., 2019, CTRL, section 4.1);
    presence and frequency are subtracted for generated tokens only (OpenAI's definition).
    """
    generated = output_counts > 0
    repetition = repetition.unsqueeze(-1)
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(generated | in_prompt, repeated, logits)
    return logits - frequency.unsqueeze(-1) * output_counts - presence.unsqueeze(-1) * generated


@takes_out
def sample(
    logits: Tensor,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """One token id for each row: logits [B, V] float32 -> [B] int64.  The rest is [B] each.

    temperature 0 (or None for all rows) takes the maximum, of equal ones the lowest id.  top_k 0,
    top_p 1 and min_p 0 keep all; None means that no row uses it.  A filter keeps every token that
    ties with the last one it keeps; top_p measures what top_k left; min_p is a share of the
    greatest probability.

    The draw is exact and stateless: argmax of logits + temperature * Gumbel noise, where the noise
    is a hash of the row's seed, the position of the token before and the token id.
    """
    if temperature is None:
        return logits.argmax(-1)
    assert seeds is not None
    assert positions is not None
    temperature = temperature.unsqueeze(-1)
    noisy = logits + temperature * gumbel_noise(seeds, positions, logits.shape[-1])
    if top_k is not None or top_p is not None or min_p is not None:
        # the greatest becomes 0, so that no temperature overflows
        scaled = logits - logits.amax(-1, keepdim=True)
        scaled = scaled / temperature.masked_fill(temperature == 0, 1.0)
        is_dropped = filter_logits(scaled, top_k, top_p, min_p) == -torch.inf
        noisy = noisy.masked_fill(is_dropped, -torch.inf)
    return noisy.argmax(-1)


@takes_out
def advance_(
    chosen: Tensor,
    scores: Tensor,
    slots: Tensor,
    tokens: Tensor,
    positions: Tensor,
    limits: Tensor,
    is_end: Tensor,
) -> Tensor:
    """Write each row's choice to its slot, for the next step: the ids [B], -1 where there is none.

    chosen, scores [B], or [S, B] of which the greatest score counts; slots [B]; tokens, positions,
    limits [num_slots]; is_end [num_slots, V].  A row has none where it is inactive (its position is
    negative) or its score is not finite.  It is inactive after that, after a token that ends it,
    and after the one at its limit.
    """
    if chosen.dim() == 2:
        chosen, scores = best_of_ranges(chosen, scores)
    before = positions.index_select(0, slots)
    after = before + 1
    is_valid = (before >= 0) & (scores.abs() < torch.inf)
    goes_on = is_valid & (after < limits.index_select(0, slots)) & ~is_end[slots, chosen]
    tokens.index_copy_(0, slots, chosen)
    positions.index_copy_(0, slots, torch.where(goes_on, after, -1))
    return torch.where(is_valid, chosen, -1)


def best_of_ranges(chosen: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The choice of the greatest score, the first of equal ones: [S, B] each -> [B] each."""
    if chosen.shape[0] == 1:
        return chosen.squeeze(0), scores.squeeze(0)
    best = scores.max(0)
    return chosen.gather(0, best.indices.unsqueeze(0)).squeeze(0), best.values


def filter_logits(
    logits: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None
) -> Tensor:
    """Logits [B, V] with -inf for every token that the filters [B] drop."""
    threshold = torch.full_like(logits[:, 0], -torch.inf)  # [B]: tokens below it are dropped
    if min_p is not None:
        threshold = torch.maximum(threshold, logits.amax(-1) + min_p.log())
    if top_k is not None or top_p is not None:
        ordered = logits.sort(-1, descending=True).values
        if top_k is not None:
            last = (top_k - 1).clamp(0, logits.shape[-1] - 1)
            kth = ordered.gather(-1, last.unsqueeze(-1)).squeeze(-1)
            kth = kth.masked_fill(top_k == 0, -torch.inf)
            threshold = torch.maximum(threshold, kth)
            ordered = ordered.masked_fill(ordered < kth.unsqueeze(-1), -torch.inf)
        if top_p is not None:
            mass = ordered.softmax(-1).cumsum(-1)
            last = (mass < top_p.unsqueeze(-1)).sum(-1).clamp(max=logits.shape[-1] - 1)
            smallest = ordered.gather(-1, last.unsqueeze(-1)).squeeze(-1)
            # rounding must not drop the last token of a row that keeps all
            threshold = torch.maximum(threshold, smallest.masked_fill(top_p >= 1, -torch.inf))
    return logits.masked_fill(logits < threshold.unsqueeze(-1), -torch.inf)


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Gumbel(0, 1) noise [B, V] float32: a hash of seeds [B], positions [B] and token id."""
    token_ids = torch.arange(1, vocab_size + 1, device=seeds.device)
    streams = _mix64(seeds + (positions + 1) * GOLDEN_GAMMA)  # [B]
    bits = _mix64(streams.unsqueeze(-1) + token_ids * GOLDEN_GAMMA)  # [B, V]
    # 23 bits and a half: exact in float32, and never 0 or 1
    uniform = (_shift_right(bits, 41).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def _signed(x: int) -> int:
    return x - (1 << 64)


# SplitMix64 (Steele, Lea, Flood, 2014, "Fast splittable pseudorandom number generators")
GOLDEN_GAMMA = _signed(0x9E3779B97F4A7C15)
MIX_1 = _signed(0xBF58476D1CE4E5B9)
MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch's own shift keeps the sign


def _mix64(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * MIX_1
    x = (x ^ _shift_right(x, 27)) * MIX_2
    return x ^ _shift_right(x, 31)
