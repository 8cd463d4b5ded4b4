"""The stepping thread and its command queue.

One thread at a time makes the steps, usually the engine's own.  On a CPU the main thread makes them
itself while it waits, unless another thread does: every thread that computes there keeps a team of
OpenMP threads, and where the teams outnumber the cores, steps take twice as long.

Everything else is a command in a queue: new requests, cancellations, a single step.  The stepping
thread runs the commands before each step.  So a step needs no lock, and a consumer may leave at any
time, even from within a destructor.  A step that Ctrl-C has interrupted is made again.

On a GPU the stepping thread enters the engine's own CUDA stream (cuda_stream.py), once for all the
steps that it makes before it releases the step lock.
"""

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch

from gemcut.engine.execution.cuda_stream import StepStream
from gemcut.engine.placement import without_autocast
from gemcut.engine.requests.sequence import Request
from gemcut.engine.serving.step_loop import EngineClosedError, StepLoop

T = TypeVar("T")


class QueueFullError(RuntimeError):
    """More completions wait for a slot than the engine was told to let wait."""


class QueueTooSmallError(QueueFullError):
    """More completions are asked for at once than would fit into an engine that is idle."""


class Worker:
    """Owns a step loop.  Its thread begins when it is first needed and ends with `stop`."""

    def __init__(
        self,
        step_loop: StepLoop,
        max_waiting: int | None = None,
        *,
        dependent_launches: bool = True,
    ) -> None:
        self._loop, self._max_waiting = step_loop, max_waiting
        self.inline = step_loop.runner.device.type == "cpu"  # the main thread may make steps
        self.stream = StepStream(step_loop.runner.device, dependent_launches=dependent_launches)
        self.stream.wait_for_caller()  # weights, cache and state were made in the caller's stream
        self._commands: deque[Callable[[], object]] = deque()
        # Held for moments.  Reentrant: the garbage collector may end an abandoned stream, which
        # cancels its request, at any line.
        self._lock = threading.RLock()
        self._step_lock = threading.Lock()  # held by the stepping thread
        self._stepping_thread: threading.Thread | None = None
        self._blocked = 0  # callers that wait while another thread makes the steps
        self._interrupted = False  # the last step was not finished
        self._thread: threading.Thread | None = None
        self._wake_ups: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._submitted = 0  # completions that were ever queued
        self.stopped = False
        self._process = os.getpid()
        self._is_left_behind = False  # in a child process: without the thread that made a step

    # For callers, from any thread

    @property
    def waiting(self) -> int:
        """Completions that have no slot yet."""
        return self._submitted - self._loop.scheduler.admitted

    @property
    def caller_steps(self) -> bool:
        """Whether the calling thread makes the steps that it waits for."""
        return self.inline and threading.current_thread() is threading.main_thread()

    def check_open(self) -> None:
        """Nothing, or RuntimeError once the engine is closed, or left behind by a fork."""
        if self._process != os.getpid():
            self._enter_child_process()
        if self.stopped:
            raise EngineClosedError("the engine is closed")
        if self._is_left_behind:
            raise RuntimeError(
                "this process was forked while the engine made a step; make an engine of its own"
            )

    def add(self, requests: Sequence[Request]) -> None:
        """Queue all of these, or none.

        QueueFullError where they do not fit now, QueueTooSmallError where they never would.
        """
        self.check_open()
        count = sum(len(request.sequences) for request in requests)
        if self._max_waiting is not None:
            most = self._loop.scheduler.num_slots + self._max_waiting
            if count > most:
                raise QueueTooSmallError(
                    f"{count} completions at once are more than the {most} that have a slot or may "
                    f"wait for one (max_waiting {self._max_waiting})"
                )
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
        if any(request.in_background for request in requests):
            self._wake_thread()

    def cancel(self, requests: Sequence[Request]) -> None:
        """End these requests; their slots are free before the next step."""
        self._commands.extend(partial(self._loop.cancel, request) for request in requests)
        if requests and not self.caller_steps:
            self._wake_ups.put(True)

    def call(self, work: Callable[[], T]) -> T:
        """Run `work` between two steps, and return or raise what it does."""
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
        """The next item of this queue; until it comes, this thread or another makes steps."""
        with self._lock:
            may_step = self.caller_steps or self._thread is None
            steps = may_step and self._step_lock.acquire(blocking=False)
            self._blocked += not steps
        try:
            return self._step_for_caller(answer) if steps else answer.get()
        finally:
            with self._lock:
                if not steps:
                    self._blocked -= 1
                else:
                    self._stepping_thread = None
                    self._step_lock.release()
                    if self._thread_is_needed:
                        self._wake_thread()

    def stop(self) -> None:
        """End every request and the thread; later calls are refused."""
        if self._process != os.getpid():
            self._enter_child_process()
        if self._is_left_behind:
            self.stopped = True  # nobody is here to run commands
            return
        closed: queue.SimpleQueue[bool] = queue.SimpleQueue()
        with self._lock:
            is_first, self.stopped = not self.stopped, True
            if is_first:
                self._commands.append(self._loop.close)
                self._commands.append(self.stream.synchronize)  # then memory may go back
                self._commands.append(partial(closed.put, True))
        if not is_first or self._stepping_thread is threading.current_thread():
            return  # called within a step: this thread runs the commands before its next one
        self._wake_ups.put(True)
        self.wait(closed)
        self._wake_ups.put(False)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    # For the stepping thread alone

    def step(self) -> None:
        """One step, timed; an error of the step loop itself ends every request."""
        started = time.perf_counter()
        try:
            self._interrupted = True
            self._loop.step()
        except Exception as error:  # a bug of the engine: no caller may wait for ever
            self._loop.die(error)
        self._interrupted = False
        self._loop.metrics.busy_seconds += time.perf_counter() - started

    def _run_commands(self) -> None:
        """Run the queued commands, after repairing what Ctrl-C interrupted: a step, or this."""
        if self._interrupted:
            self._loop.recover()
            self._interrupted = False
        while self._commands:
            try:
                self._commands[0]()
            except Exception as error:  # a bug of the engine, as in `step`
                self._loop.die(error)
            self._commands.popleft()

    def _step_for_caller(self, answer: "queue.SimpleQueue[T]") -> T:
        """Make steps after what the caller's stream holds now and before what it will hold."""
        self.stream.wait_for_caller()
        try:
            with self.stream.entered(), without_autocast(self._loop.runner.device):
                return self._step_until(answer)
        finally:
            self.stream.make_caller_wait()

    @torch.inference_mode()
    def _step_until(self, answer: "queue.SimpleQueue[T]") -> T:
        self._stepping_thread = threading.current_thread()
        while True:
            self._run_commands()
            try:
                return answer.get_nowait()
            except queue.Empty:
                self.step()

    @torch.inference_mode()
    def _run(self) -> None:
        # the device on which Triton launches
        with torch.accelerator.device_index(self._loop.runner.device.index):
            while self._wake_ups.get():
                self._step_lock.acquire()
                self._stepping_thread = threading.current_thread()
                with self.stream.entered():
                    self._step_while_needed()

    def _step_while_needed(self) -> None:
        while not self._release_if_idle():
            self._run_commands()
            if self._thread_is_needed and self._loop.is_busy:
                self.step()
            else:  # a caller has its answer and has not read it yet
                time.sleep(0)

    @property
    def _thread_is_needed(self) -> bool:
        """Whether a caller waits for steps of the engine's thread; `Engine.step`'s does not."""
        return bool(self._loop.background) or (self.inline and self._blocked > 0)

    def _release_if_idle(self) -> bool:
        """Release the step lock if no caller waits for another step; whether it did."""
        with self._lock:
            if self._thread_is_needed or self._commands:
                return False
            self._stepping_thread = None
            self._step_lock.release()
            return True

    # For both

    def _enter_child_process(self) -> None:
        """Go on after a fork, which has left all other threads behind, with the locks they held."""
        self._process, self._lock = os.getpid(), threading.RLock()
        steps_here = self._stepping_thread is threading.current_thread()
        self._is_left_behind = self._step_lock.locked() and not steps_here

    def _put(self, command: Callable[[], object]) -> None:
        with self._lock:
            self.check_open()
            if self._stepping_thread is threading.current_thread():
                raise RuntimeError("a logits processor must not call its own engine")
            self.stream.wait_for_caller()
            self._commands.append(command)
        if not self.caller_steps:
            self._wake_thread()

    def _wake_thread(self) -> None:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():  # the latter after a fork
                self._thread = threading.Thread(target=self._run, name="gemcut", daemon=True)
                self._thread.start()
        self._wake_ups.put(True)
