"""The CUDA stream of one engine, in which all its steps run, whichever thread makes them.

Work in one stream runs in order; work in two streams has no order.  Each step reads what the last
one left in the cache and in the tokens on the device, and callers have streams of their own, so
every stepping thread enters this one.  Waits of the device order it with the caller's stream, and
the host goes on:

    a caller asks       the steps wait for what the caller's stream holds (weights just loaded,
                        tensors of a logits processor)
    a caller is given   the caller's stream waits for the steps that were started
    the engine closes   the host waits: memory that a step reads must not be given to others

Whether kernels are launched dependently is the engine's choice too, so the thread takes it on with
the stream: within a stream such a kernel waits for the one before it, and events that other streams
wait for come after all of it.

On a CPU there is no stream, and these calls do nothing.  After a failure of the device the waits
are skipped, and the step loop tells every caller why (EngineFault).
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from gemcut.kernels.launch_switch import dependent_launches


class StepStream:
    """The stream of one engine on `device`."""

    def __init__(self, device: torch.device, *, dependent_launches: bool = True) -> None:
        self._device, self._dependent_launches = device, dependent_launches
        self._stream = new_stream(device)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Make it the thread's current stream within a `with`."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream), dependent_launches(self._dependent_launches):
            yield

    def wait_for_caller(self) -> None:
        """Steps started from now on run after what the calling thread's stream holds."""
        if self._stream is not None:
            with suppress(RuntimeError):
                self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def make_caller_wait(self) -> None:
        """What the calling thread launches from now on runs after all steps started so far."""
        if self._stream is not None:
            with suppress(RuntimeError):
                torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def synchronize(self) -> None:
        """Wait on the host until the device has made every step."""
        if self._stream is not None:
            with suppress(RuntimeError):
                self._stream.synchronize()


def new_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A new CUDA stream; None on a CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None
