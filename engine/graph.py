"""Captured steps: one CUDA graph for each kind of step and number of rows.

A graph is a step with everything in it decided but the contents of its input tensors.  Replaying it
costs the host some microseconds, however many kernels it launches.  Batches are padded to the next
size that has a graph, with rows that are inactive.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Step = Callable[..., Tensor]
ROWS = 16  # of one pass over the weights: a step of fewer rows costs hardly less


def graph_sizes(max_batch_size: int) -> list[int]:
    """Batch sizes that get a graph, the largest first: powers of two, then multiples of 16."""
    sizes = {1, 2, 4, 8, *range(ROWS, max_batch_size, ROWS), max_batch_size}
    return sorted((size for size in sizes if size <= max_batch_size), reverse=True)


@dataclass
class Captured:
    """A step that can be replayed, and the tensors that it reads and writes."""

    inputs: Sequence[Tensor]
    output: Tensor
    replay: Callable[[], object]
    given: Sequence[Tensor] = ()  # what the inputs were copied from, and is never written to


def capture(step: Step, inputs: Sequence[Tensor], pool: Any) -> Captured:
    """The graph of a step; `inputs` must be such that running it once changes nothing."""
    stream = torch.cuda.Stream(inputs[0].device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*inputs)  # compiles its kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # other threads of the process may use the device meanwhile
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        output = step(*inputs)
    return Captured(inputs, output, graph.replay)


class Graphs:
    """Steps by key, captured when they are first asked for, in one pool of memory."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._captured: dict[object, Captured] = {}

    def __len__(self) -> int:
        return len(self._captured)

    def run(self, key: object, step: Step, inputs: Sequence[Tensor], blank: Step) -> Tensor:
        """What the step gives for these inputs; it is overwritten when the next one runs.

        key tells apart steps that differ in anything but the contents of their inputs.  blank makes
        inputs like these of which all rows are inactive.
        """
        captured = self._captured.get(key)
        if captured is None:
            captured = self._captured[key] = self.capture(step, [blank(x) for x in inputs])
        known = captured.given or (None,) * len(inputs)
        for fixed, given, last in zip(captured.inputs, inputs, known, strict=True):
            if given is not last:  # the batch has changed: most steps copy nothing
                fixed.copy_(given)
        captured.given = inputs
        captured.replay()
        return captured.output

    def capture(self, step: Step, inputs: Sequence[Tensor]) -> Captured:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return capture(step, inputs, self._pool)
