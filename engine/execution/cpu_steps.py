"""Steps on a CPU, on torch's threads, or on one thread while other programs use the cores.

torch splits each product over its threads and waits for the last of them.  Where another program
is on a core, a thread waits for its time slice, 4 to 8 ms, at each of the products of a step, 73 in
Gemma 3 270M, most of which take less than 0.2 ms.  One thread waits for nobody.  Both give the
same bits (tests/kernels/test_cpu_products.py), so it may change at any step.
"""

import resource
import time

import torch
from torch import Tensor

from gemcut.engine.execution.sampler import Features
from gemcut.engine.execution.steps import Steps

# Involuntary switches from which on a step counts as having lost its cores.  On two cores 34 to 98
# a second were counted where nothing else ran, and 232 to 248 beside two busy programs; in a step
# of Gemma 3 270M 0 or 1, and 10 or 12, in the median.
SWITCHES_PER_SECOND, LEAST_SWITCHES = 150, 6
# Seconds on one thread before the cores are tried again: twice as long after each try that fails.
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0
LATE = 1e-3  # seconds: a trivial operation takes 8 us by itself, 1.9 ms where it waits for a core
TRIED_ELEMENTS = 2**16  # of a tensor: enough for torch to split what it does with them


class CpuSteps(Steps):
    """`Steps` that run on as many threads as are free."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._threads = FreeThreads()

    def prefill(self, token_ids: list[int], slot: int, start: int, length: int) -> Tensor:
        with self._threads:
            return super().prefill(token_ids, slot, start, length)

    def decode(self, slots: Tensor, features: Features) -> Tensor:
        with self._threads:
            return super().decode(slots, features)

    def verify(self, slots: Tensor, drafts: Tensor, features: Features) -> Tensor:
        with self._threads:
            return super().verify(slots, drafts, features)

    def logits(self, slots: Tensor) -> Tensor:
        with self._threads:
            return super().logits(slots)

    def sample(self, logits: Tensor, slots: Tensor, features: Features) -> Tensor:
        with self._threads:
            return super().sample(logits, slots, features)

    def first_logits(self, hidden: Tensor) -> Tensor:
        with self._threads:
            return super().first_logits(hidden)

    def choose(self, hidden: Tensor, slots: Tensor, features: Features) -> Tensor:
        with self._threads:
            return super().choose(hidden, slots, features)


class FreeThreads:
    """A context of one step: torch's threads while they have cores of their own, else one."""

    def __init__(self) -> None:
        self._alone_until = 0.0  # by the clock: before, one thread
        self._pause = FIRST_PAUSE

    def __enter__(self) -> None:
        """Let torch compute on its threads, or on one while they are not free."""
        self._threads = torch.get_num_threads()
        self._is_alone = self._threads > 1 and not self._are_free()
        if self._is_alone:
            torch.set_num_threads(1)
        self._began, self._switches = time.perf_counter(), _switches()

    def __exit__(self, *_: object) -> None:
        if self._is_alone:
            torch.set_num_threads(self._threads)
        elif self._threads > 1:
            now = time.perf_counter()
            most = max(LEAST_SWITCHES, SWITCHES_PER_SECOND * (now - self._began))
            if _switches() - self._switches >= most:
                self._pause = FIRST_PAUSE
                self._alone_until = now + self._pause

    def _are_free(self) -> bool:
        """Whether they were when this was last tried, at most a pause ago."""
        if self._alone_until == 0.0:
            return True
        if time.perf_counter() < self._alone_until:
            return False
        tried = torch.zeros(TRIED_ELEMENTS, dtype=torch.float32, device="cpu")
        for _ in range(3):
            began = time.perf_counter()
            tried.add_(1)
            if time.perf_counter() - began > LATE:
                self._pause = min(2 * self._pause, LONGEST_PAUSE)
                self._alone_until = time.perf_counter() + self._pause
                return False
        self._alone_until = 0.0
        return True


def _switches() -> int:
    """How often the system took a core from a thread of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
