"""Who makes the steps, and how others ask something of it.

One thread at a time drives the engine, as a rule one of the engine's own.  On a CPU the main thread
drives it itself while it waits, as long as nobody else does: every thread that computes there keeps
a team of OpenMP threads, and where the teams outnumber the cores, steps take twice as long.

Everything is asked through a queue: new requests, cancellations, a single step.  Whoever drives
looks at it before each step.  So nobody needs a lock during a step, and a consumer may leave at any
time, even from within a destructor.  A step that Ctrl-C has interrupted is made again.

On a GPU whoever drives does so in the engine's own CUDA stream (cuda_stream.py), entered once for
all the steps of a turn.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch

from gemcut.engine.execution.cuda_stream import StepStream
from gemcut.engine.requests.sequence import Request
from gemcut.engine.serving.step_loop import StepLoop

T = TypeVar("T")
CLOSED = "the engine is closed"


class QueueFullError(RuntimeError):
    """More completions wait for a slot than the engine was told to let wait."""


class Worker:
    """Owns a core.  Its thread begins when it is first needed and ends with `stop`."""

    def __init__(self, step_loop: StepLoop, max_waiting: int | None = None) -> None:
        self._loop, self._max_waiting = step_loop, max_waiting
        self.inline = step_loop.runner.device.type == "cpu"  # the main thread may drive
        self.stream = StepStream(step_loop.runner.device)
        self.stream.wait_for_caller()  # weights, cache and state were made in the caller's stream
        self._commands: deque[Callable[[], object]] = deque()
        # Held for moments.  Reentrant: the garbage collector may end an abandoned stream, which
        # cancels its request, wherever it likes.
        self._lock = threading.RLock()
        self._turn = threading.Lock()  # of whoever drives
        self._driver: threading.Thread | None = None
        self._blocked = 0  # callers that wait while another drives
        self._interrupted = False  # the last step was not finished
        self._thread: threading.Thread | None = None
        self._wake_ups: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._submitted = 0  # completions
        self.stopped = False

    # What is asked

    @property
    def waiting(self) -> int:
        """Completions that have no slot yet."""
        return self._submitted - self._loop.scheduler.admitted

    @property
    def drives_here(self) -> bool:
        """Whether this thread makes the steps that it waits for."""
        return self.inline and threading.current_thread() is threading.main_thread()

    def check_open(self) -> None:
        """Nothing, or RuntimeError where nobody answers any more."""
        if self.stopped:
            raise RuntimeError(CLOSED)

    def add(self, requests: Sequence[Request]) -> None:
        """Queue all of these, or none: QueueFullError where they do not fit."""
        count = sum(len(request.sequences) for request in requests)
        with self._lock:
            room = self._loop.scheduler.free_slots - self.waiting
            if self._max_waiting is not None and count > room + self._max_waiting:
                raise QueueFullError(
                    f"{self.waiting} completions wait for a slot, and {count} more would pass "
                    f"max_waiting {self._max_waiting}"
                )
            for request in requests:
                self._put(partial(self._loop.add, request))
            self._submitted += count
        if any(request.attended for request in requests):
            self._wake_thread()

    def cancel(self, requests: Sequence[Request]) -> None:
        """End these where they stand; their slots are free before the next step."""
        self._commands.extend(partial(self._loop.cancel, request) for request in requests)
        if requests and not self.drives_here:
            self._wake_ups.put(True)

    def call(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises, done between two steps."""
        answer: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

        def answered() -> None:
            try:
                answer.put((work(), None))
            except Exception as error:
                answer.put((None, error))

        self._put(answered)
        result, error = self.wait(answer)
        self.stream.make_caller_wait()
        if error is not None:
            raise error
        return result  # pyright: ignore[reportReturnType]  # None only where T is

    def wait(self, answer: "queue.SimpleQueue[T]") -> T:
        """The next thing put there; until it comes, steps are made here or elsewhere."""
        with self._lock:
            may_drive = self.drives_here or self._thread is None
            drives = may_drive and self._turn.acquire(blocking=False)
            self._blocked += not drives
        try:
            return self._drive_for_caller(answer) if drives else answer.get()
        finally:
            with self._lock:
                if not drives:
                    self._blocked -= 1
                else:
                    self._driver = None
                    self._turn.release()
                    if self._wants_steps:
                        self._wake_thread()

    def stop(self) -> None:
        """End every request and the thread; whoever calls afterwards is refused."""
        closed: queue.SimpleQueue[bool] = queue.SimpleQueue()
        with self._lock:
            is_first, self.stopped = not self.stopped, True
            if is_first:
                self._commands.append(self._loop.close)
                self._commands.append(self.stream.synchronize)  # then memory may go back
                self._commands.append(partial(closed.put, True))
        if not is_first or self._driver is threading.current_thread():
            return  # in the midst of a step: its driver will find it
        self._wake_ups.put(True)
        self.wait(closed)
        self._wake_ups.put(False)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    # What is done; by the driver alone

    def step(self) -> None:
        """One step, counted; whatever breaks the core itself ends every request."""
        started = time.perf_counter()
        try:
            self._interrupted = True
            self._loop.step()
        except Exception as error:  # a mistake of ours: nobody may wait for ever
            self._loop.die(error)
        self._interrupted = False
        self._loop.metrics.busy_seconds += time.perf_counter() - started

    def _drain(self) -> None:
        """Do what was asked for; what Ctrl-C has interrupted, a step or this, is mended first."""
        if self._interrupted:
            self._loop.recover()
            self._interrupted = False
        while self._commands:
            try:
                self._commands[0]()
            except Exception as error:  # a mistake of ours, as in `step`
                self._loop.die(error)
            self._commands.popleft()

    def _drive_for_caller(self, answer: "queue.SimpleQueue[T]") -> T:
        """Drive between what the caller's stream holds now and what it will hold."""
        self.stream.wait_for_caller()
        try:
            with self.stream.entered():
                return self._drive_until(answer)
        finally:
            self.stream.make_caller_wait()

    @torch.inference_mode()
    def _drive_until(self, answer: "queue.SimpleQueue[T]") -> T:
        self._driver = threading.current_thread()
        while True:
            self._drain()
            try:
                return answer.get_nowait()
            except queue.Empty:
                self.step()

    @torch.inference_mode()
    def _run(self) -> None:
        # the device on which Triton launches
        with torch.accelerator.device_index(self._loop.runner.device.index):
            while self._wake_ups.get():
                self._turn.acquire()
                self._driver = threading.current_thread()
                with self.stream.entered():
                    self._drive_while_wanted()

    def _drive_while_wanted(self) -> None:
        while not self._leaves():
            self._drain()
            if self._wants_steps and self._loop.is_busy:
                self.step()
            else:  # somebody has an answer and has not seen it yet
                time.sleep(0)

    @property
    def _wants_steps(self) -> bool:
        """Whether someone waits for the thread: not whoever makes the steps of `Engine.step`."""
        return bool(self._loop.attended) or (self.inline and self._blocked > 0)

    def _leaves(self) -> bool:
        """Give the turn back where nobody waits for another step."""
        with self._lock:
            if self._wants_steps or self._commands:
                return False
            self._driver = None
            self._turn.release()
            return True

    # Both sides

    def _put(self, command: Callable[[], object]) -> None:
        with self._lock:
            self.check_open()
            if self._driver is threading.current_thread():
                raise RuntimeError("a logits processor must not call its own engine")
            self.stream.wait_for_caller()
            self._commands.append(command)
        if not self.drives_here:
            self._wake_thread()

    def _wake_thread(self) -> None:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():  # the latter after a fork
                self._thread = threading.Thread(target=self._run, name="gemcut", daemon=True)
                self._thread.start()
        self._wake_ups.put(True)
