"""The cases of a prefill, op by op."""

import math
from collections.abc import Iterator
from typing import Any

import torch

from gemcut.bench.measure.ceilings import Cost
from gemcut.bench.ops.cases import (
    Arguments,
    Case,
    Grid,
    Shapes,
    add_norm_case,
    attention_facts,
    qk_norms,
    rope_cost,
)
from gemcut.engine.execution.cache import layer_capacity


def prefill_cases(shapes: Shapes, grid: Grid) -> Iterator[Case]:
    """The ops of a prefill, at every length of the grid."""
    s = shapes
    for tokens in grid.tokens:
        if tokens > s.config.context_length:
            continue
        yield from _row_cases(s, tokens, "")
        yield add_norm_case(s, tokens, "prefill")
        yield _rope_case(s, tokens)
        for name, (rows, columns) in {
            "qkv": (s.qkv, s.D),
            "o": (s.D, s.HQ * s.K),
            "gate_up": (2 * s.F, s.D),
            "down": (s.D, s.F),
        }.items():
            yield _linear_case(s, tokens, name, rows, columns)
        yield from _prefill_attention_cases(s, tokens)
    for context in grid.contexts:
        if grid.chunk < context <= s.config.context_length:
            yield from _chunk_cases(s, grid.chunk, context)
    large = math.ceil(grid.large_bytes / (min(s.D, s.F) * s.itemsize))
    yield from _row_cases(s, large, "large")


def _row_cases(s: Shapes, M: int, variant: str) -> Iterator[Case]:
    facts = {"tokens": M, "variant": variant}
    row = M * s.D * s.itemsize
    yield Case(
        "rmsnorm",
        s.model,
        "prefill",
        facts,
        Cost(row + s.D * s.itemsize, row, 5 * M * s.D),
        lambda: {"x": s.values(M, s.D), "weight": s.norm(s.D), "eps": 1e-6},
    )
    row = M * s.F * s.itemsize
    yield Case(
        "geglu",
        s.model,
        "prefill",
        facts,
        Cost(2 * row, row, 2 * M * s.F),
        lambda: {"gate_up": s.values(M, 2 * s.F)},
    )


def _rope_case(s: Shapes, M: int) -> Case:
    cost = rope_cost(s, M)
    rows = M * s.qkv * s.itemsize

    def make() -> Arguments:
        positions = torch.arange(M, device=s.device)
        return {
            "qkv": s.values(M, s.qkv),
            **s.cache(s.layers().get("global", 0), 1, M),
            "slots": torch.zeros_like(positions),
            **s.rotation(positions),
            **qk_norms(s),
            "eps": 1e-6,
        }

    total = Cost(cost.read_bytes + rows, cost.written_bytes, cost.flops)
    return Case("rope_and_store_", s.model, "prefill", {"tokens": M}, total, make)


def _linear_case(s: Shapes, M: int, name: str, N: int, D: int) -> Case:
    return Case(
        "linear",
        s.model,
        "prefill",
        {"tokens": M, "weight": name},
        Cost((M + N) * D * s.itemsize, M * N * s.itemsize, 2 * M * N * D, True),
        lambda: {"x": s.values(M, D), "weight": s.weight(N, D)},
    )


def _prefill_attention_cases(s: Shapes, tokens: int) -> Iterator[Case]:
    """Whole prompts, each in one call."""
    for kind, layer in s.layers().items():
        for variant, softcap in s.softcaps().items():
            yield _prefill_attention_case(
                s, layer, tokens, tokens, softcap, tokens=tokens, layer=kind, variant=variant
            )


def _chunk_cases(s: Shapes, chunk: int, context: int) -> Iterator[Case]:
    """The last chunk of a prompt."""
    softcap = s.config.attn_softcap
    for kind, layer in s.layers().items():
        yield _prefill_attention_case(
            s, layer, chunk, context, softcap, context=context, layer=kind, variant="chunk"
        )


def _prefill_attention_case(
    s: Shapes, layer_index: int, T: int, S: int, softcap: float | None, **facts: Any
) -> Case:
    """T queries, the newest of S tokens."""
    settings = s.attention(layer_index, softcap)
    window = settings["sliding_window"] or S
    start = S - T
    first = max(0, start - window + 1)
    rows = T * s.HQ * s.K * s.itemsize
    keys = 2 * (S - first) * s.HK * s.K * s.itemsize

    def make() -> Arguments:
        # a chunk of the whole prompt: a ring would have no room for it
        capacity = layer_capacity(s.config, layer_index, S, T)
        shape = (1, s.HK, capacity, s.K)
        return {
            "q": s.values(T, s.HQ, s.K),
            "k_cache": s.values(*shape),
            "v_cache": s.values(*shape),
            "slots": s.index(0),
            "starts": s.index(start),
            "cu_seqlens": s.index(0, T),
            **settings,
        }

    return Case(
        "attention_prefill",
        s.model,
        "prefill",
        attention_facts(settings, **facts),
        Cost(rows + keys + 32, rows, 4 * s.HQ * s.K * visible_pairs(start, T, window), True),
        make,
    )


def visible_pairs(start: int, T: int, window: int) -> int:
    """Pairs of a query and a key that it sees, over queries start to start + T - 1."""
    growing = max(0, min(start + T, window) - start)  # queries that see all before them
    first, last = start + 1, start + growing
    return (first + last) * growing // 2 + (T - growing) * window
