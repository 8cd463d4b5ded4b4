"""The scheduler: gives the slots of the cache to sequences in the order of arrival.

It holds no tensors.  A sequence waits until a slot is free.  It takes over what a slot holds of its
prompt, is prefilled chunk by chunk, then takes part in every decode step until it ends.  A sequence
that decodes waits for one chunk at most between two tokens (prefill_chunks.py).
"""

from dataclasses import dataclass

from gemcut.engine.execution.prefill_chunks import next_chunk
from gemcut.engine.requests.prefix_reuse import Held, Ring
from gemcut.engine.requests.sequence import TokenSequence


@dataclass(frozen=True)
class Admission:
    """A sequence that got a slot, and where the beginning of its prompt comes from."""

    sequence: TokenSequence
    slot: int
    reused: int = 0  # tokens at the beginning of its prompt that are in the cache already
    source: int | None = None  # the slot to copy them from; None: they are in place


class Scheduler:
    """The waiting and the running sequences, and the free slots with the tokens they still hold."""

    def __init__(
        self,
        num_slots: int,
        prefill_chunk: int,
        *,
        ring: Ring | None = None,  # of local layers
        reuse_prefixes: bool = True,
        long_chunks: bool = False,
    ) -> None:
        self.num_slots, self.prefill_chunk = num_slots, prefill_chunk
        self._ring, self._reuse_prefixes, self._long_chunks = ring, reuse_prefixes, long_chunks
        self._free = {slot: Held() for slot in range(num_slots)}  # the longest unused first
        self._waiting: dict[TokenSequence, None] = {}  # in the order of arrival
        self._running: dict[int, TokenSequence] = {}  # by slot, in the order of admission
        self.admitted = 0  # sequences that ever left the queue, cancelled ones too

    @property
    def running(self) -> list[TokenSequence]:
        """The sequences that have a slot."""
        return list(self._running.values())

    @property
    def decoding(self) -> list[TokenSequence]:
        """The prefilled sequences whose next token is due."""
        return [s for s in self._running.values() if s.is_prefilled and s.wants_token]

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def free_slots(self) -> int:
        return len(self._free)

    @property
    def held_tokens(self) -> int:
        """Tokens in the cache, of running sequences and of those that have ended."""
        # copies: other threads read this too, while slots change hands
        running, free = list(self._running.values()), list(self._free.values())
        return sum(s.length for s in running) + sum(len(held.token_ids) for held in free)

    def all(self) -> list[TokenSequence]:
        """The running and the waiting sequences."""
        return [*self._running.values(), *self._waiting]

    def add(self, sequence: TokenSequence) -> None:
        self._waiting[sequence] = None

    def prefilling(self) -> TokenSequence | None:
        """The sequence whose next chunk is due: one at a time, in order of admission."""
        return next((s for s in self._running.values() if not s.is_prefilled), None)

    def chunk_at(self, start: int, end: int, *, others_decode: bool) -> int:
        """The number of tokens of the chunk at position `start` of a prompt that ends at `end`."""
        may_be_long = self._long_chunks and not others_decode
        return next_chunk(self.prefill_chunk, self._ring, start, end, may_be_long=may_be_long)

    def admit(self) -> Admission | None:
        """Give a free slot to the sequence that has waited longest; None where either is missing.

        The longest prefix that any slot holds is reused.  A free slot that holds it is taken over
        if the prefix is at least half of what it holds.  Otherwise, and from a running slot, the
        prefix is copied to the slot that was unused longest, and both can be reused later.
        """
        if not (self._waiting and self._free):
            return None
        sequence = next(iter(self._waiting))
        slot, source, reused, written = next(iter(self._free)), None, 0, 0
        if self._reuse_prefixes and sequence.may_reuse:
            held = self._free | {number: s.held() for number, s in self._running.items()}
            lengths = {
                number: one.reusable(sequence.prompt_ids[: sequence.score_from], self._ring)
                for number, one in held.items()
            }
            best = max(lengths, key=lambda number: lengths[number])  # a free one, if equal
            if lengths[best]:
                reused, written = lengths[best], held[best].written
                goes_on = 2 * reused >= len(held[best].token_ids)
                if best in self._free and (goes_on or best == slot):
                    slot = best
                else:
                    source = best
        del self._free[slot]
        sequence.place(slot, reused, written)
        self._running[slot] = sequence
        del self._waiting[sequence]
        self.admitted += 1
        return Admission(sequence, slot, reused, source)

    def empty_slot(self) -> int | None:
        """A free slot, whose tokens are forgotten; None where all slots run."""
        if not self._free:
            return None
        slot = next(iter(self._free))
        self._free[slot] = Held()
        return slot

    def forget_prefixes(self) -> None:
        """Let no sequence take over what a slot holds now: the model has other weights."""
        self._free = dict.fromkeys(self._free, Held())
        for sequence in self._running.values():
            sequence.is_stale = True

    def remove(self, sequence: TokenSequence) -> None:
        """Forget a sequence that has ended or was cancelled; its slot is free again."""
        if sequence in self._waiting:
            del self._waiting[sequence]
            self.admitted += 1
        if sequence.slot is not None and self._running.get(sequence.slot) is sequence:
            del self._running[sequence.slot]
            self._free[sequence.slot] = Held() if sequence.is_spoiled else sequence.held()

    def recover(self) -> None:
        """Repair what an interrupted call left half done: no slot and no sequence is lost."""
        for sequence in list(self._waiting):
            if sequence.slot is not None:  # it had been placed
                self._running.pop(sequence.slot, None)
                sequence.slot = None
        for slot in range(self.num_slots):
            if slot not in self._free and slot not in self._running:
                self._free[slot] = Held()
