"""Queues from the stepping thread to callers: threads, asyncio tasks and `Engine.step`.

A consumer that pauses lets its queue grow and delays no other; one that leaves cancels its request.
"""

import asyncio
import queue
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from tqdm import tqdm

from gemcut.engine.requests.outputs import Delta
from gemcut.engine.requests.sequence import Request
from gemcut.engine.serving.worker import Worker

T = TypeVar("T")
Pending = deque[tuple["asyncio.Queue[Any]", Any]]


def submit_and_wait(worker: Worker, requests: Sequence[Request], show: bool) -> None:
    """Run requests together until all have ended; the first error ends them all and is raised."""
    ended: queue.SimpleQueue[Request] = queue.SimpleQueue()
    for request in requests:
        request.ended, request.in_background = ended.put, not worker.caller_steps
    waiting = set(requests)
    progress = tqdm(total=len(requests), unit="prompt") if show else None  # it starts a thread
    try:
        worker.add(requests)
        while waiting:
            request = worker.wait(ended)
            if request.error is not None:
                raise request.error
            waiting.discard(request)
            if progress is not None:
                progress.update(len(requests) - len(waiting) - progress.n)
        worker.stream.make_caller_wait()
    finally:
        if progress is not None:
            progress.close()
        _leave(worker, requests)


def stream(worker: Worker, request: Request) -> Iterator[Delta]:
    """A request's deltas as they come; closing the iterator cancels it."""
    arrived: queue.SimpleQueue[Delta | None] = queue.SimpleQueue()
    for sequence in request.sequences:
        sequence.deliver = arrived.put
    request.ended, request.in_background = lambda _: arrived.put(None), not worker.caller_steps
    try:
        worker.add([request])
        while (delta := worker.wait(arrived)) is not None:
            yield delta
        if request.error is not None:
            raise request.error
    finally:
        _leave(worker, [request])


async def asubmit_and_wait(
    worker: Worker, sender: "AsyncioSender", requests: Sequence[Request]
) -> None:
    """`submit_and_wait` without blocking the event loop."""
    ended: asyncio.Queue[Request] = asyncio.Queue()
    put = sender.putter(ended)
    for request in requests:
        request.ended = put
    waiting = set(requests)
    try:
        worker.add(requests)
        while waiting:
            request = await ended.get()
            if request.error is not None:
                raise request.error
            waiting.discard(request)
        worker.stream.make_caller_wait()
    finally:
        _leave(worker, requests)


class AsyncStream:
    """The deltas of requests for `async for`, without blocking the event loop.

    It queues them when the first delta is asked for, or at `start`.  Closing it, dropping it, or
    cancelling the task that waits for a delta cancels them.
    """

    def __init__(
        self, worker: Worker, sender: "AsyncioSender", requests: Sequence[Request]
    ) -> None:
        self.requests = requests
        self._worker, self._sender = worker, sender
        self._arrived: asyncio.Queue[Delta | Request] | None = None
        self._running = set(requests)

    def start(self) -> None:
        """Queue the requests, all or none; QueueFullError where they do not fit."""
        if self._arrived is not None:
            return
        self._arrived = asyncio.Queue()
        put = self._sender.putter(self._arrived)
        for request in self.requests:
            request.ended = put
            for sequence in request.sequences:
                sequence.deliver = put
        self._worker.add(self.requests)
        weakref.finalize(self, _leave, self._worker, self.requests).atexit = False

    def __aiter__(self) -> "AsyncStream":
        return self

    async def __anext__(self) -> Delta:
        """The next delta of any of the requests; the first error ends them all and is raised."""
        self.start()
        assert self._arrived is not None
        try:
            while self._running:
                arrived = await self._arrived.get()
                if isinstance(arrived, Delta):
                    return arrived
                if arrived.error is not None:
                    raise arrived.error
                self._running.discard(arrived)
            raise StopAsyncIteration
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """End the requests that run; their slots are free before the next step."""
        self._running.clear()
        if self._arrived is not None:
            _leave(self._worker, self.requests)


class StepInterface:
    """Requests whose steps the caller makes by `Engine.step`, and their deltas since the last."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._requests: dict[str, Request] = {}
        self._deltas: list[Delta] = []

    @property
    def has_work(self) -> bool:
        return bool(self._requests or self._deltas)

    def add(self, request: Request) -> None:
        """Queue a request; ValueError where its id is in use."""
        if self._requests.setdefault(request.request_id, request) is not request:
            raise ValueError(f"request id {request.request_id!r} is in use")
        request.in_background = False
        for sequence in request.sequences:
            sequence.deliver = self._deltas.append
        request.ended = self._end
        try:
            self._worker.add([request])
        except RuntimeError:
            del self._requests[request.request_id]
            raise

    def step(self) -> list[Delta]:
        """Make a step, and return every delta since the last one."""
        return self._worker.call(self._step)

    def cancel(self, request_id: str) -> None:
        """End a request, if it runs."""
        request = self._requests.get(request_id)
        if request is None:
            return  # its end may be among deltas that the caller has not read yet
        self._worker.cancel([request])
        self._worker.call(lambda: None)  # returns once the cancellation is done

    def _step(self) -> list[Delta]:
        self._worker.step()
        deltas = self._deltas.copy()
        self._deltas.clear()
        return deltas

    def _end(self, request: Request) -> None:
        self._requests.pop(request.request_id, None)  # an interrupted end is told again
        for sequence in request.sequences:
            if sequence.error is not None:
                where = {"index": sequence.index, "request_id": request.request_id}
                self._deltas.append(
                    Delta("", [], finish_reason="error", error=sequence.error, **where)
                )


def _leave(worker: Worker, requests: Sequence[Request]) -> None:
    worker.cancel([request for request in requests if not request.finished])


class AsyncioSender:
    """Puts items into asyncio queues from another thread.

    An event loop is woken once for all items put before it runs: a step of 16 streams costs the
    worker one system call, not 16.
    """

    def __init__(self) -> None:
        self._pending: WeakKeyDictionary[asyncio.AbstractEventLoop, Pending] = WeakKeyDictionary()

    def putter(self, queue: "asyncio.Queue[T]") -> Callable[[T], None]:
        """A function for the other thread that puts into a queue of the running event loop."""
        loop = asyncio.get_running_loop()
        pending = self._pending.setdefault(loop, deque())

        def deliver() -> None:
            while pending:
                to, item = pending.popleft()
                to.put_nowait(item)

        def put(item: T) -> None:
            pending.append((queue, item))
            if len(pending) == 1:
                with suppress(RuntimeError):  # the loop was closed: no task waits any more
                    loop.call_soon_threadsafe(deliver)

        return put
