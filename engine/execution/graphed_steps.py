"""Steps on a GPU as CUDA graphs: each is captured at its first call and replayed from then on.

A graph has one batch size, one width of drafts and one set of sampling features.  A batch is padded
with inactive rows to the next size that has a graph, drafts to its width, and the features are
rounded up to the least set that holds them: a neutral setting gives the same token as none.
"""

from collections.abc import Sequence
from functools import lru_cache, partial

from torch import Tensor

from gemcut.engine.execution.cache import Cache
from gemcut.engine.execution.cpu_steps import CpuSteps
from gemcut.engine.execution.cuda_graphs import Blank, Graphs, Step, can_be_captured, graph_sizes
from gemcut.engine.execution.model import Gemma
from gemcut.engine.execution.prefill_chunks import padded_sizes
from gemcut.engine.execution.sampler import KINDS, Features
from gemcut.engine.execution.slot_state import SlotState
from gemcut.engine.execution.steps import NO_DRAFT, Steps

Key = tuple[str, Features | None, int]  # method of Steps, features, batch size or chunk


def choose_steps(
    model: Gemma, cache: Cache, state: SlotState, *, cuda_graphs: bool = True
) -> Steps:
    """The steps that suit the model's device: graphs on a GPU, unless `cuda_graphs` is False."""
    if not can_be_captured(model.device, model.ops):
        return (CpuSteps if model.device.type == "cpu" else Steps)(model, cache, state)
    # padded without graphs too, so that cuBLAS computes the same with them and without
    sizes = padded_sizes(model.config, cache.prefill_chunk, cache.max_seq_len)
    return (GraphedSteps if cuda_graphs else Steps)(model, cache, state, sizes)


class GraphedSteps(Steps):
    """`Steps` whose calls replay graphs; what a call returns is overwritten by the next one."""

    def __init__(
        self, model: Gemma, cache: Cache, state: SlotState, prefill_sizes: Sequence[int] = ()
    ) -> None:
        super().__init__(model, cache, state, prefill_sizes)
        self.batch_sizes = graph_sizes(state.num_slots)
        self._graphs = Graphs()

    @property
    def captures(self) -> int:
        return len(self._graphs)

    def batch_size(self, rows: int) -> int:
        return next(size for size in reversed(self.batch_sizes) if size >= rows)

    def prefill_padded(self, chunk: Tensor) -> Tensor:
        return self._graphs.run(("prefill_padded", None, len(chunk)), (chunk,), self._new)

    def decode(self, slots: Tensor, features: Features) -> Tensor:
        return self._replay("decode", _rounded(features), slots)

    def verify(self, slots: Tensor, drafts: Tensor, features: Features) -> Tensor:
        return self._replay("verify", _rounded(features), slots, drafts)

    def logits(self, slots: Tensor) -> Tensor:
        return self._replay("logits", None, slots)

    def sample(self, logits: Tensor, slots: Tensor, features: Features) -> Tensor:
        """Sample without a graph: logits processors may have made the logits on the host."""
        return super().sample(logits, slots, _rounded(features))

    def choose(self, hidden: Tensor, slots: Tensor, features: Features) -> Tensor:
        """Choose first tokens without a graph: they are of as many rows as prompts end together."""
        return super().choose(hidden, slots, _rounded(features))

    def _replay(self, name: str, features: Features | None, *inputs: Tensor) -> Tensor:
        """Replay a step of slots [B], and of drafts [B, T - 1] if it verifies them -> [B, ...]."""
        rows = len(inputs[0])
        size = self.batch_size(rows)
        output = self._graphs.run((name, features, size), inputs, self._new)
        return output if size == rows else output[:rows]

    def _new(self, key: Key) -> tuple[Step, list[Blank]]:
        """The step of a key, and its blank inputs."""
        name, features, size = key
        step = partial(getattr(Steps, name), self)
        if features is not None:
            step = partial(step, features=features)
        if name == "prefill_padded":
            return step, [Blank((size,), 0)]
        slots = Blank((size,), self.state.num_slots)
        drafts = Blank((size, self.draft_width(size) - 1), NO_DRAFT)
        return step, [slots, drafts] if name == "verify" else [slots]


@lru_cache
def _rounded(features: Features) -> Features:
    """The least set of features with a graph that holds these."""
    return next(kind for kind in reversed(KINDS) if features <= kind)
