"""Prefix reuse: the tokens of a prompt that a slot of the cache holds already.

They need not be computed again.  A free slot keeps the tokens of its last sequence, and one in use
holds those that it has computed.  A global layer holds every token.  A local layer's ring of C
tokens holds the last C that were written, and the next query at position n sees the W - 1 before
it.  So in a slot where `written` positions have been written, the first n tokens can be reused if

    max(0, n - W + 1) >= written - C

that is, any number of them before the ring has turned, and afterwards only a prefix that ends near
its newest token.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ring:
    """A local layer: its window and the tokens that a slot holds of it."""

    window: int
    capacity: int

    def room(self, start: int) -> int:
        """How many tokens from position `start` on overwrite no key that one of them sees."""
        return self.capacity - min(start, self.window - 1)


@dataclass(frozen=True)
class Held:
    """The tokens of a slot, from position 0, and how many positions were ever written since."""

    token_ids: Sequence[int] = ()
    written: int = 0

    def reusable(self, prompt_ids: Sequence[int], ring: Ring | None) -> int:
        """How many of the prompt's first tokens need not be computed; its last one always must."""
        length = min(common_length(self.token_ids, prompt_ids), len(prompt_ids) - 1)
        if ring is not None and max(0, length - ring.window + 1) < self.written - ring.capacity:
            return 0
        return length


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common beginning of two lists."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # the first `low` are equal; bisection, as slices compare at the speed of C
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
