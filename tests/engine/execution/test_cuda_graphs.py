"""CUDA graphs of steps: padded, replayed from fixed tensors, equal to plain steps."""

from contextlib import nullcontext

import pytest
import torch
from engines import PlainGraphs, replay, save_random_model
from random_models import MODEL_TYPES
from twins import poison

from gemcut.engine import Engine, SamplingParams
from gemcut.engine.execution import cuda_graphs, graphed_steps
from gemcut.engine.execution.cuda_graphs import Graphs, graph_sizes
from gemcut.engine.execution.graphed_steps import choose_steps
from gemcut.engine.execution.steps import PLACE

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
        steps = replay(engine)
        replayed = [output.token_ids for output in engine.generate(PROMPTS, params)]
        assert replayed == expected
        captured = steps.captures
        assert captured > 0
        assert [output.token_ids for output in engine.generate(PROMPTS, params)] == expected
        assert steps.captures == captured


def test_kinds_of_steps_have_graphs_of_their_own(folder):
    """One engine, all kinds one after the other and beside each other."""
    params = [SamplingParams(max_tokens=9, ignore_eos=True, **kind) for kind in KINDS.values()]
    options = {"max_batch_size": 3, "reuse_prefixes": False, "dtype": "float32"}
    with Engine.from_pretrained(folder, **options) as engine:
        alone = [engine.generate(PROMPTS[0], one).token_ids for one in params]
        replay(engine)
        assert [engine.generate(PROMPTS[0], one).token_ids for one in params] == alone
        together = engine.generate([PROMPTS[0]] * len(params), params)
        assert [output.token_ids for output in together] == alone


def test_after_a_warm_up_nothing_is_captured(folder):
    with Engine.from_pretrained(folder, max_batch_size=3, dtype="float32") as engine:
        replay(engine)
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
    """The text goes on where it was, and prefixes are still reused."""
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


@pytest.fixture(scope="module", params=MODEL_TYPES)
def family(request, tmp_path_factory, tokenizer_file):
    """A folder of each family."""
    path = tmp_path_factory.mktemp("model")
    save_random_model(path, tokenizer_file, request.param)
    return path


@pytest.mark.parametrize("chunk", [512, 8], ids=["one-chunk", "a-ring-that-turns"])
def test_replayed_prefills_give_what_plain_ones_give(family, chunk):
    """Prompts of many lengths, in all slots; then the same and longer ones, by prefix reuse."""
    prompts = [[2, *range(30, 30 + n)] for n in (1, 2, 6, 7, 8, 15, 40, 62, 63, 64, 65, 99)]
    longer = [[*prompt, 7, 9, 11] for prompt in prompts[3:-1]]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    shown = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, prompt_logprobs=2)

    def run(engine: Engine) -> tuple:
        poison(engine.cache)
        outputs = engine.generate(prompts, params) + engine.generate(longer, params)
        scores = [x for output in engine.score(prompts[1:]) for x in output.logprobs]
        entries = [engine.generate(prompt, shown).prompt_logprobs for prompt in prompts[5:8]]
        flat = [
            entry.logprob
            for of_prompt in entries
            for of_token in of_prompt[1:]
            for entry in of_token.values()
        ]
        return [o.token_ids for o in outputs], scores, flat

    options = {"max_batch_size": 3, "prefill_chunk": chunk, "dtype": "float32", "device": "cpu"}
    with Engine.from_pretrained(family, **options) as plain:
        expected = run(plain)
    with Engine.from_pretrained(family, **options) as engine:
        graphs = replay(engine)._graphs
        engine.warmup()
        sizes = {key[2] - PLACE for key in graphs._captured if key[0] == "prefill_padded"}
        assert sizes == ({64, 128} if chunk == 512 else {8})
        tokens, *numbers = run(engine)
        assert tokens == expected[0]
        assert engine.metrics()["reused_tokens"] > 100
        for mine, theirs in zip(numbers, expected[1:], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)
        assert engine.metrics()["captures_after_warmup"] == 0


def test_frequencies_of_a_replayed_chunk_are_those_of_its_prompt(tmp_path, tokenizer_file):
    """A prompt of 60 tokens where 32 were trained, in chunks of 8."""
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}
    short = {"rope_parameters": dynamic, "max_position_embeddings": 32}
    save_random_model(tmp_path, tokenizer_file, "gemma", **short)
    prompt, scores = [2, *range(30, 89)], []
    for chunk in (512, 8):
        with Engine.from_pretrained(tmp_path, dtype="float32", prefill_chunk=chunk) as engine:
            if chunk == 8:
                replay(engine)
            scores.append(engine.score(prompt).logprobs)
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_chunks_that_outlast_the_host_s_work_are_not_captured(folder):
    with Engine.from_pretrained(folder, max_batch_size=1, dtype="float32") as engine:
        steps = replay(engine)
        steps.prefill_sizes = [64]
        engine.generate([2] * 64, SamplingParams(max_tokens=1))
        assert steps.captures == 1
        engine.generate([3] * 65, SamplingParams(max_tokens=1))
        assert steps.captures == 1
        assert engine.metrics()["prefill_chunks"] == 2


@pytest.fixture
def claims_to_be_a_gpu(monkeypatch):
    """Engines on a CPU that make graphs, and pad chunks, as if it were a GPU."""
    monkeypatch.setattr(graphed_steps, "can_be_captured", lambda device, ops: True)
    monkeypatch.setattr(graphed_steps, "Graphs", PlainGraphs)


def test_an_engine_captures_unless_it_is_told_not_to(folder, claims_to_be_a_gpu, monkeypatch):
    """Where capturing is impossible, as under compute-sanitizer, the same steps run eagerly."""
    options = {"max_batch_size": 3, "reuse_prefixes": False, "dtype": "float32"}
    params = [SamplingParams(max_tokens=9, ignore_eos=True, **kind) for kind in KINDS.values()]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(params))]
    with Engine.from_pretrained(folder, **options) as engine:
        expected = [output.token_ids for output in engine.generate(prompts, params)]
        assert engine.metrics()["graph_captures"] > 0
        monkeypatch.setattr(PlainGraphs, "capture", lambda *_: pytest.fail("captured"))
        del options["dtype"]
        again = Engine(engine.model, engine.tokenizer, cuda_graphs=False, **options)
    options |= {"dtype": "float32", "cuda_graphs": False}
    with again, Engine.from_pretrained(folder, **options) as other:
        for eager in (again, other):
            assert eager._loop.runner.steps.prefill_sizes  # the same products as with graphs
            eager.warmup()
            assert [o.token_ids for o in eager.generate(prompts, params)] == expected
            assert eager.metrics()["graph_captures"] == 0


def test_all_captures_share_a_stream_and_a_pool(monkeypatch):
    """A pool shares the memory of captures only among those in one stream."""
    made, seen = [], []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or object())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(cuda_graphs, "capture", lambda *args: seen.append(args[2:]) or args)
    graphs = Graphs()
    for _ in range(3):
        graphs.capture(lambda x: x, [torch.zeros(1)])
    assert len(made) == 1
    assert len(set(seen)) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_graph_gives_the_bits_of_the_eager_step(folder, kind):
    params = [SamplingParams(max_tokens=n, ignore_eos=True, **KINDS[kind]) for n in (3, 9, 14, 20)]
    options = {"device": "cuda", "max_batch_size": 3, "reuse_prefixes": False}
    with Engine.from_pretrained(folder, **options) as engine:
        replayed = [output.token_ids for output in engine.generate(PROMPTS, params)]
        cache = [layer.k.clone() for layer in engine.cache.layers]
        runner = engine._loop.runner
        runner.steps = choose_steps(runner.model, runner.cache, runner.state, cuda_graphs=False)
        eager = [output.token_ids for output in engine.generate(PROMPTS, params)]
        assert eager == replayed
        for layer, k in zip(engine.cache.layers, cache, strict=True):
            assert layer.k.equal(k)


def test_what_broke_a_capture_is_told(monkeypatch):
    """Its end fails as well: "operation failed due to a previous error during capture"."""

    class Broken:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            raise RuntimeError("operation failed due to a previous error during capture")

        def wait_stream(self, _):
            pass

    monkeypatch.setattr(torch.cuda, "graph", Broken)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", Broken)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    calls = []

    def step(x):
        calls.append(x)
        if len(calls) == 2:  # the first call compiles
            raise ValueError("the step reads a tensor")

    with pytest.raises(ValueError, match="the step reads a tensor"):
        cuda_graphs.capture(step, [torch.zeros(1)], None, Broken())
