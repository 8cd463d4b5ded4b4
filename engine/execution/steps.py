"""The steps that the device computes: tensors in, tensors out; the state of slots is found by slot.

    prefill  a chunk of a prompt goes through the model
    decode   the newest token of each slot goes through the model, and the next one is sampled
    verify   the same with a draft after it: the slot keeps what the model would have sampled itself
    logits   the first half of decode, for a host that must see logits before the next token
    sample   the second half of decode, from those logits
    choose   the end of a prefill: the first token, from the state of the last of its prompt; where
             the host must see logits, first_logits, then sample

`Steps` launches them kernel by kernel.  `GraphedSteps` (graphed_steps.py) has the same methods, and
replays CUDA graphs of them.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from gemcut.engine.execution.cache import Cache
from gemcut.engine.execution.cuda_graphs import ROWS
from gemcut.engine.execution.model import Gemma
from gemcut.engine.execution.sampler import (
    KINDS,
    Features,
    choose_tokens,
    count_tokens,
    sample_tokens,
)
from gemcut.engine.execution.slot_state import INACTIVE, SlotState, upload
from gemcut.engine.requests.sampling_params import MAX_DRAFT
from gemcut.kernels.reference import best_of_ranges

PLACE = 4  # numbers that say where a chunk is: slot, first position, tokens, length of the prompt
NO_DRAFT = -1  # pads a draft


class Steps:
    """Steps over a model, a cache and the state of its slots.

    Chunks of prompts are padded to the least of `prefill_sizes` that holds them, if one does.
    """

    captures = 0  # CUDA graphs
    batch_sizes: Sequence[int] = (1,)  # that a warm-up runs, the largest first

    def __init__(
        self, model: Gemma, cache: Cache, state: SlotState, prefill_sizes: Sequence[int] = ()
    ) -> None:
        self.model, self.cache, self.state = model, cache, state
        self.prefill_sizes = sorted(prefill_sizes)

    def batch_size(self, rows: int) -> int:
        """Rows that a step for `rows` sequences computes, padding included."""
        return rows

    def draft_width(self, rows: int) -> int:
        """Tokens of each row that one pass over the weights verifies, in a step of `rows` rows.

        The newest one is among them: 1 where there is no room for a draft.
        """
        return max(1, min(1 + MAX_DRAFT, ROWS // self.batch_size(rows)))

    def prefill(self, token_ids: list[int], slot: int, start: int, length: int) -> Tensor:
        """Normed hidden states of a chunk: T token ids -> [T, D].

        Its first token has position `start`; `length` is that of the whole prompt.
        """
        count = len(token_ids)
        size = next((size for size in self.prefill_sizes if size >= count), None)
        if size is None:
            chunk = upload(token_ids, self.model.device)
            return self.model.prefill_chunk(chunk, self.cache, slot, start, length)
        padded = [*token_ids, *[0] * (size - count), slot, start, count, length]
        return self.prefill_padded(upload(padded, self.model.device))[:count]

    def prefill_padded(self, chunk: Tensor) -> Tensor:
        """Normed hidden states of a chunk and its padding: chunk [T + 4] -> [T, D].

        T token ids, then the `place` of Gemma.prefill_padded: one tensor, for one upload.  A chunk
        of zeros has no token.
        """
        token_ids, place = chunk.split([chunk.shape[0] - PLACE, PLACE])
        return self.model.prefill_padded(token_ids, self.cache, place)

    def decode(self, slots: Tensor, features: Features) -> Tensor:
        """One more token in each slot: slots [B] -> ids [B]; -1 where none could be sampled."""
        return self._choose(self._states(slots), slots, features)

    def first_logits(self, hidden: Tensor) -> Tensor:
        """Logits of first tokens, from the states of their prompts' ends: [B, D] -> [B, V]."""
        return self.model.logits(hidden)

    def choose(self, hidden: Tensor, slots: Tensor, features: Features) -> Tensor:
        """Sample the next token of slots after states [B, D] -> ids [B]; -1 where none is."""
        return self._choose(hidden, slots, features)

    def verify(self, slots: Tensor, drafts: Tensor, features: Features) -> Tensor:
        """What the model samples after each draft: slots [B], drafts [B, T - 1] -> ids [B, T].

        Drafts are guesses of the next tokens, NO_DRAFT where there are none.  Column t is sampled
        after the newest token and t drafts; it is valid if all drafts before it were sampled.  The
        slot goes on from the last valid column.
        """
        state, (B, T) = self.state, (drafts.shape[0], drafts.shape[1] + 1)
        newest, positions = state.newest.index_select(1, slots).unbind()
        tokens = torch.cat([newest.unsqueeze(-1), drafts], dim=1)  # [B, T]
        hidden = self.model.decode(tokens, self.cache, slots, positions)
        token_positions = positions.unsqueeze(-1) + torch.arange(T, device=slots.device)
        token_slots = slots.repeat_interleave(T, output_size=B * T)
        sampled, scores = choose_tokens(
            hidden, token_slots, token_positions.flatten(), self.model, state, features
        )
        if sampled.dim() == 2:
            sampled, scores = best_of_ranges(sampled, scores)
        sampled, scores = sampled.view(B, T), scores.view(B, T)
        accepted = (sampled.narrow(1, 0, T - 1) == drafts).cumprod(1).sum(1, keepdim=True)  # [B, 1]
        state.positions.index_copy_(
            0, slots, torch.where(positions < 0, INACTIVE, positions + accepted.squeeze(1))
        )
        last = sampled.gather(1, accepted).squeeze(1), scores.gather(1, accepted).squeeze(1)
        self._advance(*last, slots, features)
        is_valid = (scores.abs() < torch.inf) & (positions >= 0).unsqueeze(-1)
        return torch.where(is_valid, sampled, -1)

    def logits(self, slots: Tensor) -> Tensor:
        """Logits of each slot's next token: slots [B] -> [B, V] float32."""
        return self.model.logits(self._states(slots))

    def sample(self, logits: Tensor, slots: Tensor, features: Features) -> Tensor:
        """Sample from logits [B, V] the next token of slots [B] -> ids [B]; -1 where none is."""
        chosen = sample_tokens(logits, slots, None, self.state, features, self.model.ops)
        return self._advance(*chosen, slots, features)

    def warm_up_calls(self) -> Iterator[Callable[[], Tensor]]:
        """Calls that run every kind of step once, with no active row.

        The largest come first: the others fit the memory that they have taken.
        """
        device, vocab_size = self.model.device, self.state.vocab_size
        for size in reversed(self.prefill_sizes):
            chunk = torch.zeros(size + PLACE, dtype=torch.int64, device=device)
            yield partial(self.prefill_padded, chunk)
        for size in self.batch_sizes:
            slots = torch.full((size,), self.state.num_slots, device=device)
            logits = torch.zeros(size, vocab_size, device=device)
            width = self.draft_width(size)
            drafts = torch.full((size, width - 1), NO_DRAFT, device=device)
            yield partial(self.logits, slots)
            for features in KINDS:
                yield partial(self.decode, slots, features)
                yield partial(self.sample, logits, slots, features)
                if width > 1:
                    yield partial(self.verify, slots, drafts, features)

    def _states(self, slots: Tensor) -> Tensor:
        """Normed hidden states of the newest token of each slot: slots [B] -> [B, D]."""
        state = self.state
        return self.model.decode(state.tokens, self.cache, slots, state.positions, by_slot=True)

    def _choose(self, hidden: Tensor, slots: Tensor, features: Features) -> Tensor:
        chosen = choose_tokens(hidden, slots, None, self.model, self.state, features)
        return self._advance(*chosen, slots, features)

    def _advance(
        self, sampled: Tensor, scores: Tensor, slots: Tensor, features: Features
    ) -> Tensor:
        """Go on from the last token of each slot: slots [B], what `choose_tokens` gives -> ids."""
        state = self.state
        if "penalties" in features:  # requests with penalties have no drafts: it is their only one
            count_tokens(sampled, slots, state)
        return self.model.ops.advance_(
            sampled, scores, slots, state.tokens, state.positions, state.limits, state.is_end
        )
