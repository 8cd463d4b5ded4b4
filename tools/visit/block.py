"""A block's view of its GPU visit: the device, the time left, and where its records go.

torch is imported where a block first asks for its device: the visit itself, which outlives its
blocks, never loads it.
"""

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemcut.tools.visit import report
from gemcut.tools.visit.report import FAILED, NO_MEMORY, OK, SKIPPED, WRONG

if TYPE_CHECKING:
    import torch

OUT_OF_MEMORY = ("MemoryError", "OutOfMemoryError")  # the latter is torch's


class Impossible(ValueError):
    """Nothing of a visit can run here."""


class Visit:
    """A block's view of its visit; on a CPU everything is small."""

    def __init__(self, out: Path, block: str, device: str, seconds: float) -> None:
        self.out, self.block = out, block
        self.on_gpu = device == "cuda"
        self._ends = time.monotonic() + seconds

    @cached_property
    def device(self) -> "torch.device":
        """Where the block runs; ValueError where there is no such device."""
        from gemcut.engine.placement import choose_device

        return choose_device("cuda" if self.on_gpu else "cpu")

    def check_device(self) -> None:
        """Impossible, where a GPU is asked for and none is here."""
        if self.on_gpu:
            try:
                _ = self.device
            except ValueError as error:
                raise Impossible(str(error)) from None

    @property
    def left(self) -> float:
        """Seconds until the block is killed."""
        return self._ends - time.monotonic()

    def add(self, case: str, status: str = OK, **facts: Any) -> None:
        """Keep a record: `line` is its line of the table, `detail` what is wrong."""
        record = {"case": case, "status": status, **facts}
        report.append(self.out / "rows" / f"{self.block}.jsonl", record)
        print(f"{case} {status} {facts.get('line', '')} {facts.get('detail', '')}", flush=True)

    def check(self, case: str, passed: bool, detail: str, **facts: Any) -> None:
        """Keep the record of a check: right, or wrong with `detail`."""
        wrong = {} if passed else {"detail": detail}
        self.add(case, OK if passed else WRONG, **facts, **wrong)

    def skip(self, case: str, why: str) -> None:
        """Keep a record that says why the case was not run."""
        self.add(case, SKIPPED, detail=why)

    @contextmanager
    def attempt(self, case: str) -> Iterator[None]:
        """Keep what a case raises as its record; the block goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            reason = next(iter(str(error).splitlines()), "")
            if type(error).__name__ in OUT_OF_MEMORY:
                self.add(case, NO_MEMORY, detail=reason)
            else:
                self.add(case, FAILED, detail=f"{type(error).__name__}: {reason}")

    @property
    def read_gbps(self) -> float | None:
        """The bandwidth of reading that the visit measured first."""
        return report.ceilings_of(self.out).get("read_gbps")
