"""A CUDA graph of one's own: a layer of `torch.ops.gemcut.*_out`, over memory of the caller.

As a serving stack of somebody else would hold it: weights, cache and every result are allocated
once, the layer is captured, and then inputs are written in place and the graph is replayed.  Each
replay must leave the bits that the launchers give eagerly, and the capture must allocate only what
kernels/contracts.py calls scratch: the three partial results of decode attention.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gemcut import kernels
from gemcut.bench.ops.cases import Shapes
from gemcut.engine.info import find_config
from gemcut.kernels.registration import empty_results
from gemcut.tools.launches import Launch, recorded
from gemcut.tools.visit.block import Visit
from gemcut.tools.visit.ops import bits

MODEL, CPU_MODEL = "gemma-2-2b", "demo"
BATCH, SLOTS = 3, 4
CAPACITY, CPU_CAPACITY = 1024, 32
ROUNDS = 20
SCRATCH = {"attention_decode": 3}  # tensors that an op allocates in a call
Call = Callable[[], object]


class Layer:
    """One layer of a decode step and the head, in memory that is allocated once."""

    def __init__(self, shapes: Shapes, capacity: int) -> None:
        s, self.shapes, self.capacity = shapes, shapes, capacity
        self.residual, self.normed = s.values(BATCH, s.D), s.values(BATCH, s.D)
        self.positions = s.index(*range(1, BATCH + 1))
        self.slots = s.index(*range(SLOTS - 1, SLOTS - 1 - BATCH, -1))
        self.k_cache, self.v_cache = s.values(2, SLOTS, s.HK, capacity, s.K).unbind()
        self.qkv, self.o = s.weight(s.qkv, s.D), s.weight(s.D, s.HQ * s.K)
        self.gate_up, self.down = s.weight(2 * s.F, s.D), s.weight(s.D, s.F)
        self.table, self.norm = s.weight(s.V, s.D), s.norm(s.D)
        self.softcaps = s.config.attn_softcap, s.config.final_softcap
        self.inv_freq = 1e4 ** -torch.arange(0, 1, 2 / s.K, device=s.device)
        self.outs: dict[int, Tensor | tuple[Tensor, ...]] = {}

    def ops(self) -> Iterator[tuple[str, tuple[object, ...]]]:
        """The ops in their order; the results of one are in `outs` before the next is asked for."""
        outs, cache = self.outs, (self.k_cache, self.v_cache)
        at = (self.slots, self.positions)
        yield "rope_tables", (self.positions, self.inv_freq, 1.0, self.shapes.dtype)
        cos, sin = outs[0]
        yield "linear_rope_and_store_", (self.normed, self.qkv, None, *cache, *at, cos, sin)
        q = self._out(1).unsqueeze(1)
        yield "attention_decode", (q, *cache, *at, self.shapes.config.scale, self.softcaps[0], None)
        yield "skinny_linear", (self._out(2).view(BATCH, -1), self.o)
        yield "add_rmsnorm_", (self.residual, self._out(3), self.norm, self.norm, 1e-6)
        yield "linear_geglu", (self._out(4), self.gate_up)
        yield "skinny_linear", (self._out(5), self.down)
        yield "add_rmsnorm_", (self.residual, self._out(6), self.norm, self.norm, 1e-6)
        yield "lm_head_argmax", (self._out(7), self.table, self.softcaps[1])

    def _out(self, number: int) -> Tensor:
        found = self.outs[number]
        assert isinstance(found, Tensor)
        return found

    def allocate(self) -> None:
        """Memory for all results: sizes of partial sums and ranges are asked for, not guessed."""
        for number, (name, arguments) in enumerate(self.ops()):
            self.outs[number] = empty_results(name, *arguments)

    def call(self) -> None:
        """The launchers, whose results are new tensors."""
        for number, (name, arguments) in enumerate(self.ops()):
            self.outs[number] = getattr(kernels, name)(*arguments)

    def write(self, count: Callable[[], int] = int) -> dict[str, int]:
        """The registered ops, which write into `outs`; by how much `count` rises in each."""
        counted: dict[str, int] = {}
        for number, (name, arguments) in enumerate(self.ops()):
            op, out = getattr(torch.ops.gemcut, f"{name.rstrip('_')}_out"), self.outs[number]
            names = [a.name for a in op.default._schema.arguments if a.name.startswith("out")]
            given = (out,) if isinstance(out, Tensor) else out
            before = count()
            op(*arguments, **dict(zip(names, given, strict=True)))
            counted[name] = counted.get(name, 0) + count() - before
        return counted

    def state(self) -> list[Tensor]:
        """What inputs and the cache hold, which a step changes."""
        return [self.residual, self.normed, self.positions, self.k_cache, self.v_cache]

    def results(self) -> list[Tensor]:
        """What a step has left: all results, the residual and the cache."""
        several = [(x,) if isinstance(x, Tensor) else x for x in self.outs.values()]
        return [*self.state(), *(x for found in several for x in found)]


@torch.inference_mode()
def run(visit: Visit) -> None:
    """Keep records of replays that differ from launchers, and of what the capture allocates."""
    model = MODEL if visit.on_gpu else CPU_MODEL
    shapes = Shapes(model, find_config(model), visit.device, torch.bfloat16)
    with visit.attempt("a graph of one's own"):
        layer = Layer(shapes, CAPACITY if visit.on_gpu else CPU_CAPACITY)
        layer.allocate()
        replay: Call = layer.write
        if visit.on_gpu:
            replay = captured(visit, layer)
        else:
            visit.skip("allocations of a capture", "a CPU captures nothing")
        compare(visit, layer, replay, ROUNDS if visit.on_gpu else 2)


def captured(visit: Visit, layer: Layer) -> Call:
    """The replay of a graph of the layer; keeps a record of what the capture allocated."""
    layer.write()  # compiles, and lets cuBLAS and Triton load what they load once
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        allocated = layer.write(lambda: torch.cuda.memory_stats()["allocation.all.allocated"])
    check_allocations(visit, allocated)
    return graph.replay


def check_allocations(visit: Visit, allocated: dict[str, int]) -> None:
    """Keep a record: by op, how many tensors were allocated while it was captured."""
    wrong = {name: n for name, n in allocated.items() if n != SCRATCH.get(name, 0)}
    told = ", ".join(f"{n} by {name}" for name, n in wrong.items())
    line = "a captured layer of _out ops allocates the scratch of attention_decode alone"
    visit.check("allocations of a capture", not wrong, told, line=line)


def compare(visit: Visit, layer: Layer, replay: Call, rounds: int) -> None:
    """Keep a record of rounds with new inputs whose replay gives other bits than launchers."""
    differing, held, s = 0, layer.outs, layer.shapes
    for number in range(rounds):
        for x in (layer.residual, layer.normed):
            x.copy_(s.values(*x.shape))
        layer.positions.copy_((layer.positions + number) % layer.capacity)
        before = [x.clone() for x in layer.state()]
        replay()
        replayed = [bits(x).clone() for x in layer.results()]
        for x, old in zip(layer.state(), before, strict=True):
            x.copy_(old)
        layer.outs = {}  # the launchers allocate their own
        layer.call()
        expected = [bits(x) for x in layer.results()]
        layer.outs = held
        pairs = zip(replayed, expected, strict=True)
        differing += not all(torch.equal(x, y) for x, y in pairs)
    told = f"{differing} of {rounds} replays differ from launchers"
    line = f"a graph of one's own over the caller's memory: {rounds} replays equal launchers"
    visit.check("replays with new inputs", not differing, told, line=line)


def record(arch: str) -> set[Launch]:
    """What the layer launches: recorded, not made."""
    with recorded(arch) as found:
        device = torch.device("cuda", 0)
        Layer(Shapes(MODEL, find_config(MODEL), device, torch.bfloat16), CAPACITY).call()
    return found
