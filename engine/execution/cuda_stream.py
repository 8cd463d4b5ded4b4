"""The CUDA stream of an engine's own, in which all its steps run, whichever thread makes them.

Work in one stream runs in order, and work in two streams in no order at all.  Steps follow each
other through the cache and the tokens on the device, and callers drive an engine from streams of
their own, so every driver enters this one.  What a caller does on the device is ordered with it by
waits of the device, and the host goes on:

    a caller asks       the steps wait for what the caller's stream holds (weights just loaded,
                        tensors of a logits processor)
    a caller is given   the caller's stream waits for the steps that were launched
    the engine closes   the host waits: memory that a step reads must not be given to others

On a CPU there is no stream, and all of it does nothing.  A device that has failed has no order to
keep: the waits pass over it, and the core tells every caller why (EngineFault).
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch


class StepStream:
    """The stream of one engine on `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = new_stream(device)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Launch into it, and not into the thread's stream, within a `with`."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield

    def wait_for_caller(self) -> None:
        """Steps launched from now on run behind what the calling thread's stream holds."""
        if self._stream is not None:
            with suppress(RuntimeError):
                self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def make_caller_wait(self) -> None:
        """What the calling thread launches from now on runs behind all steps launched so far."""
        if self._stream is not None:
            with suppress(RuntimeError):
                torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def synchronize(self) -> None:
        """Wait on the host until the device has made every step."""
        if self._stream is not None:
            with suppress(RuntimeError):
                self._stream.synchronize()


def new_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream beside all others; None on a CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None
