"""What of a prompt a slot of the cache holds already, and need not be computed again.

A slot that is free keeps the tokens of its last sequence, and one that runs holds those that it has
computed.  A global layer holds every token.  A local layer's ring of C tokens holds the last C that
were written, and the next query at position n sees the W - 1 before it.  So of a slot in which
`written` positions have been written, the first n tokens are of use if

    max(0, n - W + 1) >= written - C

that is all of them and any part of them before the ring has turned, and afterwards only what ends
near its newest token.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ring:
    """A local layer: its window and the tokens that a slot holds of it."""

    window: int
    capacity: int

    def room(self, start: int) -> int:
        """Tokens from position `start` on that overwrite no key which one of them sees."""
        return self.capacity - min(start, self.window - 1)


@dataclass(frozen=True)
class Held:
    """The tokens of a slot, from position 0, and how many positions were ever written since."""

    token_ids: Sequence[int] = ()
    written: int = 0

    def reusable(self, prompt_ids: Sequence[int], ring: Ring | None) -> int:
        """How many of the prompt's first tokens need not be computed; the last one always must."""
        length = min(common_length(self.token_ids, prompt_ids), len(prompt_ids) - 1)
        if ring is not None and max(0, length - ring.window + 1) < self.written - ring.capacity:
            return 0
        return length


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many elements two lists begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # the first `low` are alike; bisection, as slices compare at the speed of C
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
