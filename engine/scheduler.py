"""Which sequence runs next: slots of the cache, given out in the order of arrival.

No tensors here.  A sequence waits until a slot is free, is prefilled in the next step, then takes
part in every decode step until it ends.
"""

from collections import deque

from gemcut.engine.sequence import TokenSequence


class Scheduler:
    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots - 1, -1, -1))  # the lowest slot is given out first
        self._waiting: deque[TokenSequence] = deque()
        self._running: dict[int, TokenSequence] = {}  # by slot, in the order of admission

    @property
    def running(self) -> list[TokenSequence]:
        return list(self._running.values())

    def all(self) -> list[TokenSequence]:
        """Those that run and those that wait."""
        return [*self._running.values(), *self._waiting]

    def add(self, sequence: TokenSequence) -> None:
        self._waiting.append(sequence)

    def admit(self) -> None:
        """Give a free slot to the sequence that has waited longest.

        One at a time: whoever runs already waits for one prefill at most between two tokens.
        """
        if self._waiting and self._free:
            sequence = self._waiting.popleft()
            sequence.slot = self._free.pop()
            self._running[sequence.slot] = sequence

    def remove(self, sequence: TokenSequence) -> None:
        """Forget a sequence that has ended or was cancelled; its slot is free again."""
        if sequence.slot is None:
            if sequence in self._waiting:
                self._waiting.remove(sequence)
        elif self._running.get(sequence.slot) is sequence:
            del self._running[sequence.slot]
            self._free.append(sequence.slot)
