"""Engines with quantised weights on a CPU: against the definitions, in company, in chunks."""

from typing import Any

import pytest
import torch

from gemcut.engine import Engine, SamplingParams
from gemcut.engine.checkpoints.load import expected_layouts
from gemcut.engine.execution.weights import Weights
from gemcut.engine.memory import Build
from gemcut.kernels import cpu
from gemcut.kernels.cpu_products import PackedHead, has_bfloat16
from gemcut.kernels.cpu_quantized import PackedInt4, int4_is_known, integers_are_exact
from gemcut.kernels.quantized_weight import QuantizedWeight

PROMPTS = ["It was a bright cold morning", "Alice", "The adventure of the speckled band was"]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0)
FORMATS = pytest.mark.parametrize("format", ["int8", "int4", "fp8"])
by_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def demo(format: Any, **settings) -> Engine:
    return Engine.from_pretrained("demo", quantization=format, max_seq_len=128, **settings)


def logprobs(engine: Engine, text: str) -> torch.Tensor:
    return torch.tensor(engine.score(text).logprobs[1:])


@FORMATS
def test_probabilities_are_those_of_the_definitions(format):
    """In bfloat16 they err at most twice as much, and two units in the last place."""
    text = PROMPTS[0] + " when " + PROMPTS[2]
    found = []
    for ops, dtype in (("reference", "float32"), ("reference", "bfloat16"), ("auto", "bfloat16")):
        with demo(format, ops=ops, dtype=dtype) as engine:
            found.append(logprobs(engine, text))
    exact, eager, actual = found
    ulp = torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (actual - exact).abs().max() <= 2 * (eager - exact).abs().max() + 2 * ulp


@FORMATS
def test_greedy_text_is_that_of_the_definitions(format):
    texts = []
    for ops in ("auto", "reference"):
        with demo(format, ops=ops, dtype="float32") as engine:
            texts.append([engine.generate(prompt, GREEDY).token_ids for prompt in PROMPTS])
    assert texts[0] == texts[1]


@FORMATS
@by_dtype
def test_company_does_not_change_a_choice(format, dtype):
    with demo(format, dtype=dtype, max_batch_size=4) as engine:
        together = [output.token_ids for output in engine.generate(PROMPTS, GREEDY)]
        alone = [engine.generate(prompt, GREEDY).token_ids for prompt in PROMPTS]
    assert together == alone


@FORMATS
def test_chunks_of_a_prompt_do_not_change_a_choice(format):
    """Long chunks go through dequantised rows, short ones through integer kernels."""
    found = []
    for chunk in (128, 4):
        with demo(format, dtype="float32", prefill_chunk=chunk) as engine:
            found.append(engine.generate(PROMPTS[2] * 3, GREEDY).token_ids)
    assert found[0] == found[1]


@pytest.mark.skipif(not has_bfloat16(), reason="no bfloat16 in oneDNN here")
@FORMATS
def test_auto_takes_the_dtype_that_integer_kernels_read(format):
    with demo(format) as engine:
        assert engine.model.dtype == torch.bfloat16
    with demo(format, dtype="float32") as engine:
        assert engine.model.dtype == torch.float32
    with Engine.from_pretrained("demo", max_seq_len=128) as engine:
        assert engine.model.dtype == torch.float32


@pytest.mark.skipif(
    not (has_bfloat16() and int4_is_known() and integers_are_exact()), reason="kernels lack here"
)
def test_an_engine_reads_what_its_kernels_read():
    def read(weights: Weights) -> tuple[type, type]:
        head = weights.lm_head
        return type(weights.layers[0].qkv), type(
            head.blocks if isinstance(head, PackedHead) else head
        )

    expected = {"int8": QuantizedWeight, "int4": PackedInt4, "fp8": torch.Tensor}
    for format, kind in expected.items():
        with demo(format) as engine:
            matrix, head = read(engine.model.weights)
            assert matrix is kind
            assert head is QuantizedWeight


@FORMATS
@by_dtype
def test_memory_counts_what_is_read(format, dtype):
    """Matrices of layers as they are packed, and a head beside what it is read by."""
    with demo(format, dtype=dtype) as engine:
        weights, config = engine.model.weights, engine.model.config
        head = weights.lm_head
        parts = [x for layer in weights.layers for x in vars(layer).values() if x is not None]
        parts += [weights.norm, weights.embedding]
        if isinstance(head, PackedHead) and head.blocks is not head.plain:
            parts.append(head.blocks)
        held = sum(x.nbytes for x in parts)
        layouts = expected_layouts(config, format)
    build = Build(config, torch.device("cpu"), engine.model.dtype, cpu, layouts=layouts)
    assert build.estimate(1, 128).weights == pytest.approx(held, rel=0.01)
