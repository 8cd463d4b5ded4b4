"""Pending tokens: those of steps under way, which go to their sequences once the host reads them.

A GPU copies the tokens of a step to pinned memory after the step.  The host may start the next step
before it reads them, so the device never waits for the host.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gemcut.engine.requests.outputs import TokenLogprobs
from gemcut.engine.requests.sequence import TokenSequence


@dataclass
class PendingTokens:
    """The tokens of one step: one or more for each of its sequences."""

    sequences: list[TokenSequence]
    ids: Tensor  # [B] or [B, T], on the host when `event` has happened
    event: torch.cuda.Event | None
    drafts: list[list[int]] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)

    def read(self) -> list[list[int]]:
        """The tokens of each sequence, at least one; -1 where none could be sampled."""
        if self.event is not None:
            self.event.synchronize()
        rows = self.ids.tolist()
        if not self.drafts:
            return [[token_id] for token_id in rows]
        return [
            row[: 1 + count_accepted(row, draft)]
            for row, draft in zip(rows, self.drafts, strict=True)
        ]

    def hand_out(self) -> tuple[int, int]:
        """Give each sequence its tokens -> how many were taken, and how many were accepted drafts.

        A sequence that has ended takes none: the step was started before its end was known.
        """
        rows, taken = self.read(), 0
        accepted = sum(len(row) - 1 for row in rows)
        for row, (sequence, token_ids) in enumerate(zip(self.sequences, rows, strict=True)):
            sequence.in_flight -= 1
            if not sequence.finished:
                logprobs = self.logprobs[row] if self.logprobs else None
                taken += sequence.take(token_ids, logprobs)
        return taken, accepted


class TokenCollector:
    """Steps whose tokens the host has not read, the oldest first."""

    def __init__(self) -> None:
        self._pending: deque[PendingTokens] = deque()

    def add(self, pending: PendingTokens) -> None:
        self._pending.append(pending)

    def collect(self, keep: int, hand_out: Callable[[PendingTokens], object]) -> None:
        """Hand out all tokens except those of the latest `keep` steps.

        `hand_out` is not stored: a method of the collector's owner would make a reference cycle,
        and keep an engine's memory until the garbage collector runs.
        """
        while len(self._pending) > keep:
            hand_out(self._pending.popleft())

    def clear(self) -> None:
        """Forget all steps; their tokens are dropped."""
        self._pending.clear()


def count_accepted(sampled: Sequence[int], draft: Sequence[int]) -> int:
    """How many tokens of a draft the model sampled itself, up to the first that it did not."""
    count = 0
    while count < len(draft) and sampled[count] == draft[count]:
        count += 1
    return count
