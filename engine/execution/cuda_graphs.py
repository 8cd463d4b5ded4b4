"""CUDA graphs of steps: captured once, replayed from fixed input tensors.

A graph is a step in which everything is fixed except the contents of its inputs.  Replaying it
costs the host some microseconds, however many kernels it launches.  The device still pays for each
of them: on an H200 a kernel in a graph begins 0.4 to 0.5 us after the one before it has ended, and
a decode step of 26 layers has about 210.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from gemcut.engine.placement import is_plain_torch

Step = Callable[..., Tensor]
Key = TypeVar("Key", bound=Hashable)
ROWS = 16  # rows of one pass over the weights: a step of fewer costs hardly less


def graph_sizes(max_batch_size: int) -> list[int]:
    """Batch sizes that get a graph, the largest first: powers of two, then multiples of 16."""
    sizes = {1, 2, 4, 8, *range(ROWS, max_batch_size, ROWS), max_batch_size}
    return sorted((size for size in sizes if size <= max_batch_size), reverse=True)


class Blank(NamedTuple):
    """A graph's input with no active row: its shape and the value that fills it."""

    shape: tuple[int, ...]
    value: int


@dataclass
class Captured:
    """A step that can be replayed, and the tensors that it reads and writes."""

    inputs: Sequence[Tensor]
    output: Tensor
    replay: Callable[[], object]
    blanks: Sequence[int] = ()  # what fills each input where no row is active
    given: Sequence[Tensor] = ()  # what the inputs were last copied from; it is never written to


def can_be_captured(device: torch.device, ops: ModuleType) -> bool:
    """Whether steps can become graphs: those of kernels on a GPU; plain torch asks the host."""
    return device.type == "cuda" and not is_plain_torch(ops)


def capture(step: Step, inputs: Sequence[Tensor], pool: Any, stream: Any) -> Captured:
    """Capture a step in `stream`, beside the current one; it can be replayed in any stream.

    `inputs` must be such that running the step on them changes nothing.
    """
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*inputs)  # compiles its kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    cause: Exception | None = None
    try:
        # other threads of the process may use the device meanwhile
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                output = step(*inputs)
            except Exception as error:
                cause = error
                raise
    except Exception as error:
        # ending a broken capture fails as well, with an error that does not name the cause
        raise cause or error from None
    return Captured(inputs, output, graph.replay)


class Graphs:
    """Steps by key, captured when they are first asked for, in one pool of memory."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: Any = None  # one: the pool shares memory only among captures in one stream
        self._captured: dict[object, Captured] = {}

    def __len__(self) -> int:
        return len(self._captured)

    def run(
        self, key: Key, inputs: Sequence[Tensor], new: Callable[[Key], tuple[Step, Sequence[Blank]]]
    ) -> Tensor:
        """Replay the step of `key` on these inputs: its output, which the next replay overwrites.

        key: differs wherever steps differ in more than the contents of their inputs.  new: the step
        of a key and its blank inputs, asked for once.  Inputs may be smaller than the graph's own;
        the rest of those is blank.
        """
        captured = self._captured.get(key)
        if captured is None:
            step, blanks = new(key)
            fixed = [
                torch.full(blank.shape, blank.value, dtype=given.dtype, device=given.device)
                for given, blank in zip(inputs, blanks, strict=True)
            ]
            captured = self._captured[key] = self.capture(step, fixed)
            captured.blanks = [blank.value for blank in blanks]
        known = captured.given or (None,) * len(inputs)
        for i, given in enumerate(inputs):
            if given is not known[i]:  # the batch has changed: most steps copy nothing
                _write(captured.inputs[i], given, captured.blanks[i])
        captured.given = inputs
        captured.replay()
        return captured.output

    def capture(self, step: Step, inputs: Sequence[Tensor]) -> Captured:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(inputs[0].device)
        return capture(step, inputs, self._pool, self._stream)


def _write(fixed: Tensor, given: Tensor, blank: int) -> None:
    """Copy an input to the beginning of a graph's own, on each axis; the rest becomes blank."""
    if given.shape != fixed.shape:
        fixed.fill_(blank)
        fixed = fixed[tuple(slice(size) for size in given.shape)]
    fixed.copy_(given)
