"""Benchmark cases: every op at the shapes that a model launches it with, and its least cost.

Bytes are those that must be moved at least: every input that matters read once, every output
written once.  Operations are two for each multiply-and-add of a product; where an op has none, one
for each elementwise operation of its oracle.  A test counts both in another way.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gemcut.bench.measure.ceilings import Cost
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.cache import PREFILL_CHUNK, layer_capacity
from gemcut.engine.execution.weight_layouts import Layout
from gemcut.engine.execution.weights import made_layouts
from gemcut.kernels import reference

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """The sizes to measure."""

    batches: tuple[int, ...]  # rows of a decode step
    contexts: tuple[int, ...]  # tokens in the cache, the newest included
    tokens: tuple[int, ...]  # of a prompt
    large_bytes: int  # of an input that no cache holds
    chunk: int  # tokens that a prefill computes at a time


GPU_GRID = Grid((1, 16), (1024, 4096, 8192), (512, 4096, 8192), 64 << 20, PREFILL_CHUNK)
CPU_GRID = Grid((1, 4), (64, 256), (128,), 4 << 20, 64)


@dataclass(frozen=True)
class Case:
    """One op at one size: `make` yields fresh random arguments, by name.

    `own` makes of them what gemcut's op takes; peers quantise weights in their own way.
    """

    op: str
    model: str
    phase: str  # "decode" | "prefill"
    facts: dict[str, Any]  # what tells it from the op's other cases, in the order of its name
    cost: Cost
    make: Callable[[], Arguments] = field(compare=False)
    own: Callable[[Arguments], Arguments] = field(default=lambda a: a, compare=False)

    @property
    def name(self) -> str:
        values = [
            f"{key}={value}" if isinstance(value, int) else str(value)
            for key, value in self.facts.items()
            if key not in ("softcap", "sliding_window") and value not in ("", None)
        ]
        return "/".join([self.op, self.model, *values])


class Shapes:
    """A model's sizes, and random tensors of these on its device."""

    def __init__(
        self,
        model: str,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        quantization: str | None = None,  # of weights
    ) -> None:
        self.model, self.config, self.device, self.dtype = model, config, device, dtype
        self.quantization = quantization
        self.D, self.F, self.V = config.hidden_size, config.intermediate_size, config.vocab_size
        self.HQ, self.HK, self.K = config.num_q_heads, config.num_kv_heads, config.head_dim
        self.qkv = (self.HQ + 2 * self.HK) * self.K
        self.itemsize = dtype.itemsize

    def values(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def norm(self, width: int) -> Tensor:
        return 0.1 * self.values(width)

    def weight(self, rows: int, columns: int) -> Tensor:
        """A random weight [rows, columns] that keeps the variance of what it multiplies."""
        return self.values(rows, columns).mul_(columns**-0.5)

    def quantizer(self, field: str, name: str = "weight") -> Callable[[Arguments], Arguments]:
        """Arguments with weight `name` as an engine holds it in this field of its weights."""

        def own(a: Arguments) -> Arguments:
            layout, weight = self._layout(field), a[name]
            if layout is None or not isinstance(weight, Tensor):
                return a
            return a | {name: layout.quantize(weight)}

        return own

    def weight_bytes(self, field: str, rows: int, columns: int) -> int:
        """Bytes of such a weight, scales included."""
        layout = self._layout(field)
        return rows * columns * self.itemsize if layout is None else layout.nbytes((rows, columns))

    def _layout(self, field: str) -> Layout | None:
        if self.quantization is None:
            return None
        layer = None if field == "embedding" else 0  # which the head is, where they are tied
        return made_layouts(self.config, self.quantization)[layer, field]

    def index(self, *values: int) -> Tensor:
        return torch.tensor(values, device=self.device)

    def cache(self, layer: int, slots: int, context: int) -> dict[str, Tensor]:
        capacity = layer_capacity(self.config, layer, context, PREFILL_CHUNK)
        shape = (slots, self.HK, capacity, self.K)
        return {"k_cache": self.values(*shape), "v_cache": self.values(*shape)}

    def rotation(self, positions: Tensor) -> dict[str, Tensor]:
        inv_freq = 1e4 ** -torch.arange(0, 1, 2 / self.K, device=self.device)
        cos, sin = reference.rope_tables(positions, inv_freq, 1.0, self.dtype)
        return {"positions": positions, "cos": cos, "sin": sin}

    def attention(self, layer: int, softcap: float | None) -> Arguments:
        local = self.config.is_local(layer)
        return {
            "scale": self.config.scale,
            "softcap": softcap,
            "sliding_window": self.config.sliding_window if local else None,
        }

    def layers(self) -> dict[str, int]:
        """The index of one layer of each kind that the model has, "local" or "global"."""
        layers = range(self.config.num_layers)
        return {"local" if self.config.is_local(i) else "global": i for i in reversed(layers)}

    def softcaps(self) -> dict[str, float | None]:
        """The model's softcap of scores, and a variant without it: what the cap costs."""
        own = self.config.attn_softcap
        return {"": own} if own is None else {"": own, "no softcap": None}


# Shared by decode and prefill


def add_norm_case(s: Shapes, M: int, phase: str) -> Case:
    norms = 2 if s.config.has_post_norms else 1
    row = M * s.D * s.itemsize
    return Case(
        "add_rmsnorm_",
        s.model,
        phase,
        {"tokens": M} if phase == "prefill" else {"batch": M},
        Cost(2 * row + norms * s.D * s.itemsize, 2 * row, (5 * norms + 1) * M * s.D),
        lambda: {
            "residual": s.values(M, s.D),
            "x": s.values(M, s.D),
            "post_weight": s.norm(s.D) if norms == 2 else None,
            "next_weight": s.norm(s.D),
            "eps": 1e-6,
        },
    )


def qk_norms(s: Shapes) -> dict[str, Tensor | None]:
    has = s.config.has_qk_norm
    return {name: s.norm(s.K) if has else None for name in ("q_norm_weight", "k_norm_weight")}


def rope_cost(s: Shapes, M: int) -> Cost:
    """The cost of the rotation and the cache write, without reading q, k and v."""
    rotated = (s.HQ + s.HK) * M * s.K
    norms = 2 * s.K * s.itemsize if s.config.has_qk_norm else 0
    tables = 2 * M * s.K * s.itemsize + 2 * 8 * M  # cos, sin; slots, positions
    per_element = 8 if s.config.has_qk_norm else 3
    return Cost(tables + norms, s.qkv * M * s.itemsize, per_element * rotated)


def attention_facts(arguments: Arguments, **facts: Any) -> dict[str, Any]:
    return {
        **facts,
        "softcap": arguments["softcap"],
        "sliding_window": arguments["sliding_window"],
    }
