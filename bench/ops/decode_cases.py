"""The cases of a decode step, op by op."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

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


def decode_cases(shapes: Shapes, grid: Grid) -> Iterator[Case]:
    """The ops of a decode step, at every batch and context of the grid."""
    for batch in grid.batches:
        yield from _small_cases(shapes, batch)
        yield from _product_cases(shapes, batch)
        yield from _choice_cases(shapes, batch)
        for context in grid.contexts:
            if context <= shapes.config.context_length:
                yield from _decode_attention_cases(shapes, batch, context)


def quantized_cases(shapes: Shapes, grid: Grid) -> Iterator[Case]:
    """The products of a decode step by quantised weights, those of these shapes."""
    for batch in grid.batches:
        yield from _product_cases(shapes, batch)
        yield _argmax_case(shapes, batch)


def _facts(s: Shapes, B: int) -> dict[str, Any]:
    return {"batch": B} | ({"quantization": s.quantization} if s.quantization else {})


def _small_cases(s: Shapes, B: int) -> Iterator[Case]:
    row = B * s.D * s.itemsize
    yield Case(
        "embed",
        s.model,
        "decode",
        {"batch": B},
        Cost(row + 8 * B, row, B * s.D),
        lambda: {
            "token_ids": torch.randint(s.V, (B,), device=s.device),
            "table": s.values(s.V, s.D),
            "scale": s.config.embedding_scale,
        },
    )
    half = s.K // 2
    yield Case(
        "rope_tables",
        s.model,
        "decode",
        {"batch": B},
        # an angle, its cos and sin, both scaled, and the negated half of sin
        Cost(8 * B + 4 * half, 2 * B * s.K * s.itemsize, 6 * B * half),
        lambda: {
            "positions": torch.randint(s.config.context_length, (B,), device=s.device),
            "inv_freq": 1e4 ** -torch.arange(0, 1, 2 / s.K, device=s.device),
            "attention_scaling": 1.0,
            "dtype": s.dtype,
        },
    )
    ropes = [s.config.rope, s.config.rope_local]
    bases = [rope.rope_theta for rope in ropes[: 1 if ropes[0] == ropes[1] else 2]]
    tables = len(bases) * B * s.K
    yield Case(
        "begin_step",
        s.model,
        "decode",
        {"batch": B},
        # what embed, rmsnorm and rope_tables compute
        Cost(
            row + s.D * s.itemsize + 16 * B,
            2 * row + 2 * tables * s.itemsize,
            6 * B * s.D + 3 * tables,
        ),
        lambda: {
            "token_ids": torch.randint(s.V, (B,), device=s.device),
            "positions": torch.randint(s.config.context_length, (B,), device=s.device),
            "rows": None,
            "table": s.values(s.V, s.D),
            "scale": s.config.embedding_scale,
            "norm_weight": s.norm(s.D),
            "eps": s.config.rms_norm_eps,
            "inv_freqs": [base ** -torch.arange(0, 1, 2 / s.K, device=s.device) for base in bases],
            "attention_scalings": [1.0] * len(bases),
        },
    )
    yield add_norm_case(s, B, "decode")


def _product_cases(s: Shapes, B: int) -> Iterator[Case]:
    """The four products of a layer."""
    for name, columns in (("o", s.HQ * s.K), ("down", s.F)):

        def make(columns: int = columns) -> Arguments:
            return {"x": s.values(B, columns), "weight": s.weight(s.D, columns)}

        yield Case(
            "skinny_linear",
            s.model,
            "decode",
            {**_facts(s, B), "weight": name},
            # one sum in float32; further partial sums of a kernel do not count
            Cost(
                B * columns * s.itemsize + s.weight_bytes(name, s.D, columns),
                4 * B * s.D,
                2 * B * s.D * columns,
                True,
            ),
            make,
            s.quantizer(name),
        )
    row = B * s.D * s.itemsize
    yield Case(
        "linear_geglu",
        s.model,
        "decode",
        _facts(s, B),
        Cost(
            row + s.weight_bytes("gate_up", 2 * s.F, s.D),
            B * s.F * s.itemsize,
            4 * B * s.F * s.D,
            True,
        ),
        lambda: {"x": s.values(B, s.D), "gate_up_weight": s.weight(2 * s.F, s.D)},
        s.quantizer("gate_up", "gate_up_weight"),
    )
    rope = rope_cost(s, B)

    def make_qkv() -> Arguments:
        positions = torch.randint(512, (B,), device=s.device)
        return {
            "x": s.values(B, s.D),
            "weight": s.weight(s.qkv, s.D),
            "bias": None,
            **s.cache(0, B, 512),
            "slots": torch.arange(B, device=s.device),
            **s.rotation(positions),
            **qk_norms(s),
        }

    yield Case(
        "linear_rope_and_store_",
        s.model,
        "decode",
        _facts(s, B),
        Cost(
            row + s.weight_bytes("qkv", s.qkv, s.D) + rope.read_bytes,
            rope.written_bytes,
            2 * B * s.qkv * s.D,
            True,
        ),
        make_qkv,
        s.quantizer("qkv"),
    )


def _choice_cases(s: Shapes, B: int) -> Iterator[Case]:
    """From the last hidden state to a token."""
    facts: dict[str, Any] = {"batch": B}
    argmax = _argmax_case(s, B)
    yield replace(argmax, op="lm_head", cost=replace(argmax.cost, written_bytes=4 * B * s.V))
    yield argmax

    def logits() -> Tensor:
        return 3 * torch.randn(B, s.V, device=s.device)

    def setting(value: float) -> Tensor:
        return torch.full((B,), value, device=s.device)

    yield Case(
        "penalize",
        s.model,
        "decode",
        facts,
        # counts and logits of 4 bytes, a mask of 1; three settings a row
        Cost(9 * B * s.V + 12 * B, 4 * B * s.V, 11 * B * s.V),
        lambda: {
            "logits": logits(),
            "output_counts": torch.randint(3, (B, s.V), device=s.device, dtype=torch.int32),
            "in_prompt": torch.rand(B, s.V, device=s.device) < 0.1,
            "repetition": setting(1.2),
            "presence": setting(0.5),
            "frequency": setting(0.1),
        },
    )
    yield Case(
        "sample",
        s.model,
        "decode",
        {**facts, "variant": "greedy"},
        Cost(4 * B * s.V, 8 * B, B * s.V),
        lambda: {"logits": logits()},
    )
    yield Case(
        "sample",
        s.model,
        "decode",
        {**facts, "variant": "top-k top-p"},
        Cost(4 * B * s.V + 32 * B, 8 * B, (37 * B + 1) * s.V),
        lambda: {
            "logits": logits(),
            "temperature": setting(0.8),
            "top_k": torch.full((B,), 64, device=s.device),
            "top_p": setting(0.95),
            "min_p": None,
            "seeds": torch.randint(2**31, (B,), device=s.device),
            "positions": torch.randint(512, (B,), device=s.device),
        },
    )


def _argmax_case(s: Shapes, B: int) -> Case:
    """The head and the greatest logit of each row."""
    read = B * s.D * s.itemsize + s.weight_bytes("embedding", s.V, s.D)
    return Case(
        "lm_head_argmax",
        s.model,
        "decode",
        _facts(s, B),
        Cost(read, 12 * B, 2 * B * s.V * s.D, True),
        lambda: {
            "x": s.values(B, s.D),
            "weight": s.weight(s.V, s.D),
            "softcap": s.config.final_softcap,
        },
        s.quantizer("embedding"),
    )


def _decode_attention_cases(s: Shapes, B: int, context: int) -> Iterator[Case]:
    for kind, layer in s.layers().items():
        for variant, softcap in s.softcaps().items():
            settings = s.attention(layer, softcap)
            seen = min(context, settings["sliding_window"] or context)
            rows = B * s.HQ * s.K * s.itemsize
            keys = 2 * B * seen * s.HK * s.K * s.itemsize

            def make(layer: int = layer, settings: Arguments = settings) -> Arguments:
                return {
                    "q": s.values(B, 1, s.HQ, s.K),
                    **s.cache(layer, B, context),
                    "slots": torch.arange(B, device=s.device),
                    "positions": torch.full((B,), context - 1, device=s.device),
                    **settings,
                }

            yield Case(
                "attention_decode",
                s.model,
                "decode",
                attention_facts(settings, batch=B, context=context, layer=kind, variant=variant),
                Cost(rows + keys + 16 * B, rows, 4 * B * s.HQ * s.K * seen, True),
                make,
            )
