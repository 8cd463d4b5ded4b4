"""The one thread that touches the device, and how others ask something of it.

Everything is asked through a queue: new requests, cancellations, a single step.  While a caller
waits for a request the thread makes steps, and looks at the queue before each.  So no lock is held
during a step, Ctrl-C never falls into one, and a consumer may leave at any time, even from within a
destructor.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch

from gemcut.engine.core import Core
from gemcut.engine.sequence import Request

T = TypeVar("T")
CLOSED = "the engine is closed"


class QueueFullError(RuntimeError):
    """More completions wait for a slot than the engine was told to let wait."""


class Worker:
    """Owns a core.  Its thread begins with the first request and ends with `stop`."""

    def __init__(self, core: Core, max_waiting: int | None = None) -> None:
        self._core, self._max_waiting = core, max_waiting
        self._commands: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        # Held for moments, and never by the thread.  Reentrant: the garbage collector may end an
        # abandoned stream, which cancels its request, wherever it likes.
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._submitted = 0  # completions
        self.stopped = False

    @property
    def waiting(self) -> int:
        """Completions that have no slot yet."""
        return self._submitted - self._core.scheduler.admitted

    def check_open(self) -> None:
        """Nothing, or RuntimeError where nobody answers any more."""
        if self.stopped:
            raise RuntimeError(CLOSED)

    def add(self, requests: Sequence[Request]) -> None:
        """Queue all of these, or none: QueueFullError where they do not fit."""
        count = sum(len(request.sequences) for request in requests)
        with self._lock:
            room = self._core.scheduler.free_slots - self.waiting
            if self._max_waiting is not None and count > room + self._max_waiting:
                raise QueueFullError(
                    f"{self.waiting} completions wait for a slot, and {count} more would pass "
                    f"max_waiting {self._max_waiting}"
                )
            for request in requests:
                self._put(partial(self._core.add, request))
            self._submitted += count

    def cancel(self, requests: Sequence[Request]) -> None:
        """End these where they stand; a slot is free before the next step."""
        for request in requests:
            self._commands.put(partial(self._core.cancel, request))

    def call(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises, done by the thread between two steps."""
        answer: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

        def answered() -> None:
            try:
                answer.put((work(), None))
            except BaseException as error:
                answer.put((None, error))

        self._put(answered)
        result, error = answer.get()
        if error is not None:
            raise error
        return result  # pyright: ignore[reportReturnType]  # None only where T is

    def stop(self) -> None:
        """End every request and the thread; whoever calls afterwards is refused."""
        with self._lock:
            self.stopped = True
            self._commands.put(None)
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def step(self) -> None:
        """One step, counted."""
        started = time.perf_counter()
        self._core.step()
        self._core.metrics.busy_seconds += time.perf_counter() - started

    def _put(self, command: Callable[[], object]) -> None:
        with self._lock:
            self.check_open()
            if self._thread is threading.current_thread():
                raise RuntimeError("a logits processor must not call its own engine")
            if self._thread is None or not self._thread.is_alive():  # the latter after a fork
                self._thread = threading.Thread(target=self._run, name="gemcut", daemon=True)
                self._thread.start()
            self._commands.put(command)

    @torch.inference_mode()
    def _run(self) -> None:
        # the device on which Triton launches
        with torch.accelerator.device_index(self._core.runner.device.index):
            while True:
                try:
                    command = self._commands.get(block=not self._core.attended)
                except queue.Empty:
                    command = self.step
                if command is None:
                    self._core.close()
                    return
                try:
                    command()
                except Exception as error:  # a mistake of ours: nobody may wait for ever
                    self._core.die(error)
