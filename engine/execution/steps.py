"""The steps of the device: each begins and ends in tensors, and what it needs of them is by slot.

    prefill  a chunk of a prompt, padded, goes through the model
    decode   the newest token of each slot goes through the model, and the next one is chosen
    verify   the same with drafts behind it: as many are kept as the model would have chosen itself
    logits   the first half of decode, for whoever must see logits on the host before the choice
    choose   the second half; and the end of a prefill

On a GPU graph.py captures prefill, decode, verify and logits; on a CPU they are called plainly.
"""

import torch
from torch import Tensor

from gemcut.engine.execution.cache import KVCache
from gemcut.engine.execution.model import Gemma
from gemcut.engine.execution.sampler import GREEDY, Features, choose
from gemcut.engine.execution.slot_state import INACTIVE, SlotState

PLACE = 4  # numbers that say where a chunk stands


class Steps:
    """A model, a cache and the state of its slots."""

    def __init__(self, model: Gemma, cache: KVCache, state: SlotState) -> None:
        self.model, self.cache, self.state = model, cache, state
        # an embedding may have more rows than the vocabulary has pieces: those are never chosen
        self._head = model.weights.lm_head.narrow(0, 0, state.vocab_size)

    def prefill(self, chunk: Tensor) -> Tensor:
        """Normed hidden states of a chunk and its padding: chunk [T + 4] -> [T, D].

        T token ids, then the `place` of Gemma.prefill_padded: one tensor, for one upload.
        """
        token_ids, place = chunk.split([chunk.shape[0] - PLACE, PLACE])
        return self.model.prefill_padded(token_ids, self.cache, place)

    def decode(self, slots: Tensor, features: Features) -> Tensor:
        """One more token in each slot: slots [B] -> ids [B]; -1 where none could be chosen."""
        tokens, positions = self._newest(slots)
        hidden = self.model.decode_hidden(tokens, self.cache, slots, positions)
        if features == GREEDY:
            scores, chosen = self.model.ops.lm_head_argmax(
                hidden, self._head, self.model.config.final_softcap, counters=self.cache.counters
            )
            return self._advance(chosen, scores, slots)
        return self._choose(self._logits(hidden), slots, positions + 1, features)

    def verify(self, slots: Tensor, drafts: Tensor, features: Features) -> Tensor:
        """What the model chooses after each draft: slots [B], drafts [B, T - 1] -> ids [B, T].

        Drafts are guesses of the next tokens, -1 where there are none.  Column t is the choice
        after the newest token and t drafts; it holds as long as all drafts before it were chosen.
        The slot goes on from the last choice that holds.
        """
        state, (B, T) = self.state, (drafts.shape[0], drafts.shape[1] + 1)
        newest, positions = self._newest(slots)
        tokens = torch.cat([newest.unsqueeze(-1), drafts], dim=1)  # [B, T]
        hidden = self.model.decode_hidden(tokens, self.cache, slots, positions)
        following = positions.unsqueeze(-1) + torch.arange(1, T + 1, device=slots.device)
        chosen, scores = choose(
            self._logits(hidden),
            slots.repeat_interleave(T, output_size=B * T),
            following.flatten(),
            state,
            features,
            self.model.ops,
        )
        chosen, scores = chosen.view(B, T), scores.view(B, T)
        accepted = (chosen.narrow(1, 0, T - 1) == drafts).cumprod(1).sum(1, keepdim=True)  # [B, 1]
        state.positions.index_copy_(
            0, slots, torch.where(positions < 0, INACTIVE, positions + accepted.squeeze(1))
        )
        last = chosen.gather(1, accepted).squeeze(1), scores.gather(1, accepted).squeeze(1)
        self._advance(*last, slots)
        holds = (scores.abs() < torch.inf) & (positions >= 0).unsqueeze(-1)
        return torch.where(holds, chosen, -1)

    def logits(self, slots: Tensor) -> Tensor:
        """Logits of each slot's next token: slots [B] -> [B, V] float32."""
        tokens, positions = self._newest(slots)
        return self._logits(self.model.decode_hidden(tokens, self.cache, slots, positions))

    def choose(self, logits: Tensor, slots: Tensor, features: Features) -> Tensor:
        """The choice from logits [B, V] of slots [B] -> ids [B]; -1 where there is none."""
        positions = self.state.positions.index_select(0, slots)
        return self._choose(logits, slots, positions + 1, features)

    def _newest(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        tokens, positions = self.state.newest.index_select(1, slots).unbind()
        return tokens, positions

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden).narrow(1, 0, self.state.vocab_size)

    def _choose(
        self, logits: Tensor, slots: Tensor, positions: Tensor, features: Features
    ) -> Tensor:
        chosen, scores = choose(logits, slots, positions, self.state, features, self.model.ops)
        return self._advance(chosen, scores, slots)

    def _advance(self, chosen: Tensor, scores: Tensor, slots: Tensor) -> Tensor:
        state = self.state
        return self.model.ops.advance_(
            chosen, scores, slots, state.tokens, state.positions, state.limits, state.is_end
        )
