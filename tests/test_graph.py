"""Decode steps by batch size: padded, replayed from fixed tensors, equal to plain calls."""

import pytest
import torch
from engines import PlainGraphs

from gemcut.engine import Engine, SamplingParams
from gemcut.engine.graph import graph_sizes

PROMPTS = ["It was a bright cold morning", "x", "Once upon a time there was", "The dog"]
KINDS = {
    "greedy": {"temperature": 0},
    "random": {"seed": 3},
    "filtered": {"seed": 3, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "temperature": 1.3},
    "full": {"seed": 3, "repetition_penalty": 1.3, "min_tokens": 3, "logit_bias": {9: 2.0}},
    "logits": {"seed": 3, "logprobs": 2},
    "drafts": {"temperature": 0, "prompt_lookup_num_tokens": 7},
}


@pytest.mark.parametrize(
    ("slots", "sizes"),
    [(1, [1]), (3, [3, 2, 1]), (8, [8, 4, 2, 1]), (40, [40, 32, 16, 8, 4, 2, 1])],
)
def test_sizes_reach_every_slot_and_no_further(slots, sizes):
    assert graph_sizes(slots) == sizes


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_give_what_plain_ones_give(folder, kind):
    params = [SamplingParams(max_tokens=n, ignore_eos=True, **KINDS[kind]) for n in (3, 9, 14, 20)]
    with Engine.from_pretrained(
        folder, max_batch_size=3, reuse_prefixes=False, dtype="float32"
    ) as engine:
        expected = [output.token_ids for output in engine.generate(PROMPTS, params)]
        engine._core.runner.graphs = graphs = PlainGraphs()
        replayed = [output.token_ids for output in engine.generate(PROMPTS, params)]
        assert replayed == expected
        captured = len(graphs)
        assert captured > 0
        assert [output.token_ids for output in engine.generate(PROMPTS, params)] == expected
        assert len(graphs) == captured


def test_kinds_of_steps_have_graphs_of_their_own(folder):
    """One engine, all kinds one after the other and beside each other."""
    params = [SamplingParams(max_tokens=9, ignore_eos=True, **kind) for kind in KINDS.values()]
    options = {"max_batch_size": 3, "reuse_prefixes": False, "dtype": "float32"}
    with Engine.from_pretrained(folder, **options) as engine:
        alone = [engine.generate(PROMPTS[0], one).token_ids for one in params]
        engine._core.runner.graphs = PlainGraphs()
        assert [engine.generate(PROMPTS[0], one).token_ids for one in params] == alone
        together = engine.generate([PROMPTS[0]] * len(params), params)
        assert [output.token_ids for output in together] == alone


def test_after_a_warm_up_nothing_is_captured(folder):
    with Engine.from_pretrained(folder, max_batch_size=3, dtype="float32") as engine:
        engine._core.runner.graphs = PlainGraphs()
        engine.warmup()
        captured = engine.metrics()["graph_captures"]
        assert captured > 0
        for kind in KINDS.values():
            params = SamplingParams(max_tokens=12, ignore_eos=True, **kind)
            engine.generate(PROMPTS, params)
            engine.generate(PROMPTS[0], params)
        metrics = engine.metrics()
        assert metrics["graph_captures"] == captured
        assert metrics["captures_after_warmup"] == 0


def test_a_warm_up_changes_no_slot_in_use(folder):
    """The text goes on where it was, and what is reused was there."""
    with Engine.from_pretrained(folder, max_batch_size=2, dtype="float32") as engine:
        params = SamplingParams(max_tokens=20, seed=1, ignore_eos=True)
        alone = engine.generate(PROMPTS[0], params)
        stream = engine.stream(PROMPTS[0], params)
        text = next(stream).text
        engine.warmup()
        assert text + "".join(delta.text for delta in stream) == alone.text
        assert engine.generate(PROMPTS[0], params).token_ids == alone.token_ids
        engine.warmup()
        assert engine.generate(PROMPTS[0], params).token_ids == alone.token_ids


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_graph_gives_the_bits_of_the_eager_step(folder, kind):
    params = [SamplingParams(max_tokens=n, ignore_eos=True, **KINDS[kind]) for n in (3, 9, 14, 20)]
    options = {"device": "cuda", "max_batch_size": 3, "reuse_prefixes": False}
    with Engine.from_pretrained(folder, **options) as engine:
        replayed = [output.token_ids for output in engine.generate(PROMPTS, params)]
        cache = [layer.k.clone() for layer in engine.cache.layers]
        engine._core.runner.graphs = None
        eager = [output.token_ids for output in engine.generate(PROMPTS, params)]
        assert eager == replayed
        for layer, k in zip(engine.cache.layers, cache, strict=True):
            assert layer.k.equal(k)
