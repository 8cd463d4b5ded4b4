"""Decode steps by dependent launches, after kernels that end late: the bits of plain launches.

A kernel that does not wait reads what those before it have not written yet, or lets the next one do
so.  Each step is made in four ways:

    plain       a kernel begins when the one before it has ended
    dependent   as the engine launches them
    late        the same, and before each of them stands a kernel that waits, then lasts DELAY_NS
    unwaiting   the same, where one kernel does not wait: it shows how much this check sees

Replays of a graph take turns with two sets of tokens and positions, so what the replay before left
in a buffer is always wrong.  Compared are the ids or logits, what the step leaves in the state, and
keys and values of the last layer, on the device: nothing waits for the host.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from gemcut import kernels
from gemcut.bench.engines.random_model import published_config, random_weights
from gemcut.bench.measure.timing import capture
from gemcut.engine.checkpoints.hub import DEMO
from gemcut.engine.checkpoints.load import load_checkpoint
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.model import Gemma
from gemcut.engine.execution.sampler import FULL, GREEDY
from gemcut.engine.execution.weights import empty_weights
from gemcut.kernels.launch_switch import dependent_launches
from gemcut.tools.launches import Launch, recorded
from gemcut.tools.profile_step import DecodeStep
from gemcut.tools.visit.block import Visit
from gemcut.tools.visit.dependent_launch import late_store, late_store_kernel
from gemcut.tools.visit.ops import bits

MODELS, CPU_MODELS = ("gemma-2-2b", "gemma-3-1b"), ("demo",)
LAYERS = 6  # Gemma 3 has a global one in six
ROWS, CONTEXT, CPU_CONTEXT = 3, 200, 24
REPLAYS, CPU_REPLAYS = 200, 2
DELAY_NS = 30_000  # a kernel that does not wait has long ended by then
UNWAITING = "add_rmsnorm_kernel"  # it counts nothing that a wrong order could leave behind
STEPS = ("greedy", "sampled", "logits")
DTYPE = torch.bfloat16
# temperature, top-p, min-p, and the three penalties of a row; its top-k
FLOATS, TOP_K = (0.8, 0.9, 0.01, 1.1, 0.1, 0.1), 50


@torch.inference_mode()
def run(visit: Visit) -> None:
    """Keep a record for each model, step and way: how many replays gave other bits."""
    for model in MODELS if visit.on_gpu else CPU_MODELS:
        with visit.attempt(model):
            if visit.on_gpu:
                config = published_config(model, LAYERS)
                weights = random_weights(config, device=visit.device, dtype=DTYPE)
            else:
                config = ModelConfig.from_file(DEMO)
                weights = load_checkpoint(DEMO, config, device=visit.device, dtype=DTYPE)
            context = CONTEXT if visit.on_gpu else CPU_CONTEXT
            steps = TwoSteps(Gemma(config, weights, kernels), context)
            for name in STEPS if visit.on_gpu else STEPS[:1]:
                with visit.attempt(f"{model}, {name}"):
                    compare(visit, f"{model}, {name}", steps, name)


def record(arch: str) -> set[Launch]:
    """What these steps launch, dependently and plainly: recorded, not made."""
    found: set[Launch] = set()
    for model in MODELS:
        config = published_config(model, LAYERS)
        for dependent in (True, False):
            with recorded(arch) as launches, dependent_launches(dependent):
                device = torch.device("cuda", 0)
                weights = empty_weights(config, device=device, dtype=DTYPE)
                steps = TwoSteps(Gemma(config, weights, kernels), CONTEXT)
                for name in STEPS:
                    steps.run(name)
                _late(torch.empty(2, dtype=torch.int32, device=device))
                found |= launches
    return found


class TwoSteps:
    """A decode step that begins with either of two sets of tokens and positions."""

    def __init__(self, model: Gemma, context: int) -> None:
        self.step = step = DecodeStep(model, ROWS, context, room=1)
        device, state = model.device, step.state
        self.begins = [torch.full((2, ROWS), context - n, device=device) for n in (1, 2)]
        for begin in self.begins:
            begin.select(0, 0).random_(4, model.config.vocab_size)
        # an inactive row, for which kernels return early
        self.begins[1].select(0, 1).narrow(0, ROWS - 1, 1).fill_(-1)
        self.given = self.begins[0].clone()
        state.integers.select(0, 3).fill_(TOP_K)
        for setting, value in zip(state.floats.unbind(), FLOATS, strict=True):
            setting.fill_(value)
        layers = [x for layer in step.cache.layers for x in (layer.k, layer.v)]
        self._changed = [(x, x.clone()) for x in (*layers, state.output_counts)]

    def run(self, name: str) -> list[Tensor]:
        """The step from the tokens and positions that are given: all that it left behind."""
        step = self.step
        for changed, kept in self._changed:
            changed.copy_(kept)
        step.state.newest.narrow(1, 0, ROWS).copy_(self.given)
        if name == "logits":
            output = step.steps.logits(step.slots)
        else:
            output = step.steps.decode(step.slots, GREEDY if name == "greedy" else FULL)
        last = step.cache.layers[-1]
        return [bits(x) for x in (output, step.state.newest, last.k, last.v)]


def compare(visit: Visit, case: str, steps: TwoSteps, name: str) -> None:
    """Keep records of a step in all ways, each beside plain launches."""
    with dependent_launches(False):
        expected = []
        for begin in steps.begins:
            steps.given.copy_(begin)
            expected.append([x.clone() for x in steps.run(name)])
    ways: dict[str, AbstractContextManager] = {"dependent": nullcontext()}
    if visit.on_gpu:
        numbers = torch.zeros(2, dtype=torch.int32, device=visit.device)
        ways |= {"late": late_kernels(numbers), "unwaiting": late_kernels(numbers, UNWAITING)}
    replays = REPLAYS if visit.on_gpu else CPU_REPLAYS
    for way, entered in ways.items():
        with entered:
            replay = replayed(visit, steps, name)
        differing = torch.zeros((), dtype=torch.int64, device=visit.device)
        for i in range(replays):
            steps.given.copy_(steps.begins[i % 2])
            pairs = zip(replay(), expected[i % 2], strict=True)
            differing.add_(torch.stack([(x != y).any() for x, y in pairs]).any())
        count = int(differing.item())
        told = f"{count} of {replays} replays differ from plain launches"
        if way == "unwaiting":
            line = f"{case}: {told} where {UNWAITING} does not wait"
            visit.add(f"{case}, {way}", line=line, differing=count)
        else:
            line = f"{case}, {way}: {replays} replays equal plain launches bit for bit"
            visit.check(f"{case}, {way}", count == 0, told, line=line, differing=count)


def replayed(visit: Visit, steps: TwoSteps, name: str) -> Callable[[], list[Tensor]]:
    """The step as a graph on a GPU, captured now; what it returns is overwritten by the next."""
    if not visit.on_gpu:
        return lambda: steps.run(name)
    outputs: list[Tensor] = []

    def kept() -> None:
        outputs[:] = steps.run(name)

    graph = capture([kept])

    def replay() -> list[Tensor]:
        graph.replay()
        return outputs

    return replay


@contextmanager
def late_kernels(numbers: Tensor, unwaiting: str | None = None) -> Iterator[None]:
    """Put a kernel that ends late before each that is launched; one named so does not wait."""
    launch = JITFunction.run

    def after_a_late_one(kernel: JITFunction, *args: Any, **arguments: Any) -> Any:
        if kernel is not late_store_kernel:
            _late(numbers)
        if kernel.fn.__name__ == unwaiting:
            arguments["DEPENDENT"] = False
        return launch(kernel, *args, **arguments)

    with mock.patch.object(JITFunction, "run", after_a_late_one):
        yield


def _late(numbers: Tensor) -> None:
    value, y = numbers.split(1)
    late_store(value, y, dependent=True, delay_ns=DELAY_NS)
