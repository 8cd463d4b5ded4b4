"""Prompt chunks: none overwrites a key that it sees, and they are long while nothing decodes."""

import pytest
from engines import run_as_on_a_gpu, save_random_model
from hypothesis import given
from hypothesis import strategies as st

from gemcut.engine import PUBLISHED, Engine, SamplingParams
from gemcut.engine.execution.cache import ring_of
from gemcut.engine.execution.prefill_chunks import LONG, LONGEST, next_chunk, padded_sizes
from gemcut.engine.requests.prefix_reuse import Ring

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def cut(chunk: int, ring: Ring | None, end: int, start: int = 0, *, alone: bool = True):
    """The chunks of a prompt of `end` tokens, of which `start` are there already."""
    chunks = []
    while start < end:
        chunks.append(next_chunk(chunk, ring, start, end, may_be_long=alone))
        start += chunks[-1]
    return chunks


@given(
    window=st.integers(1, 40), chunk=st.integers(1, 24), start=st.integers(0, 150),
    more=st.integers(1, 150), alone=st.booleans(),
)  # fmt: skip
def test_no_chunk_overwrites_a_key_that_it_sees(window, chunk, start, more, alone):
    """A ring is filled token by token, a chunk before its queries look."""
    ring = Ring(window, window + max(chunk, 8))  # as layer_capacity makes it
    held = {position % ring.capacity: position for position in range(start)}
    end = start + more
    chunks = cut(chunk, ring, end, start, alone=alone)
    for count in chunks:
        assert 0 < count <= max(chunk, LONG * chunk if alone else 0)
        new = range(start, start + count)
        held |= {position % ring.capacity: position for position in new}
        for query in new:
            for key in range(max(0, query - window + 1), query + 1):
                assert held[key % ring.capacity] == key
        start += count
    assert start == end


@pytest.mark.parametrize(
    ("name", "prompt", "chunks"),
    [
        ("gemma-2b", 5000, [2048, 2048, 904]),
        ("gemma-2-9b", 6000, [2048, 2048, 512, 512, 512, 368]),
        ("gemma-3-1b", 2000, [1024, 512, 464]),
        ("vaultgemma-1b", 1000, [1000]),
    ],
)
def test_what_published_models_get_while_nobody_decodes(name, prompt, chunks):
    config = PUBLISHED[name]
    ring = ring_of(config, config.context_length, 512)
    assert cut(512, ring, prompt) == chunks
    usual = cut(512, ring, prompt, alone=False)
    assert set(usual[:-1]) == {512}
    assert max(chunks) <= LONGEST


def test_a_chunk_longer_than_the_longest_stays_as_it_is():
    assert cut(4096, None, 10000) == [4096, 4096, 1808]
    assert cut(600, None, 5000) == [2048, 2048, 904]


def test_sizes_grow_with_the_host_s_share():
    """Small models are padded up to a whole chunk; those whose products last are not."""
    most = {
        name: (padded_sizes(config, 512, 8192) or [0])[-1] for name, config in PUBLISHED.items()
    }
    assert most["gemma-3-1b"] == most["vaultgemma-1b"] == 512
    assert 128 <= most["gemma-2-9b"] < most["gemma-2-2b"] <= 512
    assert most["gemma-2-27b"] <= 64
    assert padded_sizes(PUBLISHED["gemma-3-1b"], 512, 8192) == list(range(64, 513, 64))
    assert padded_sizes(PUBLISHED["gemma-3-1b"], 100, 8192) == [64, 100]
    assert padded_sizes(PUBLISHED["gemma-3-1b"], 512, 20) == [20]


@pytest.fixture(scope="module", params=["gemma", "gemma2"])
def roomy(request, tmp_path_factory, tokenizer_file):
    """Models without a window, and with one of 50 tokens: a ring of 58."""
    path = tmp_path_factory.mktemp("model")
    windowed = {} if request.param == "gemma" else {"sliding_window": 50}
    save_random_model(path, tokenizer_file, request.param, **windowed)
    return path


def make(folder, **options) -> Engine:
    options = {"max_batch_size": 2, "prefill_chunk": 8, "dtype": "float32"} | options
    return Engine.from_pretrained(folder, **options)


PROMPT = [2, *range(30, 119)]  # 90 tokens


def test_chunks_are_long_while_nobody_decodes_and_the_text_is_the_same(roomy):
    with make(roomy) as plain, make(roomy) as engine:
        run_as_on_a_gpu(engine)
        expected = plain.generate(PROMPT, GREEDY).token_ids
        assert engine.generate(PROMPT, GREEDY).token_ids == expected
        assert plain.metrics()["prefill_chunks"] == 12
        local = engine.cache.ring is not None
        # 32, 26 before the ring of 58 turns, and 8 at a time
        assert engine.metrics()["prefill_chunks"] == (6 if local else 3)


def test_who_decodes_waits_for_a_usual_chunk_at_most(roomy):
    with make(roomy) as engine:
        run_as_on_a_gpu(engine)
        engine.add([2, 5], SamplingParams(max_tokens=30, ignore_eos=True))
        engine.step()
        engine.add(PROMPT, GREEDY)
        before = engine.metrics()["prefill_tokens"]
        for step in range(1, 10):
            engine.step()
            assert engine.metrics()["prefill_tokens"] == before + 8 * step


def test_without_reuse_chunks_never_depend_on_the_company(roomy):
    with make(roomy, reuse_prefixes=False) as engine:
        run_as_on_a_gpu(engine)
        engine.generate(PROMPT, GREEDY)
        assert engine.metrics()["prefill_chunks"] == 12


def test_several_short_prompts_take_a_usual_chunk_s_time(roomy):
    """So that the first of them decodes soon."""
    with make(roomy, max_batch_size=5) as engine:
        run_as_on_a_gpu(engine)
        for i in range(5):
            engine.add([40 + i, 50 + i, 60 + i], SamplingParams(max_tokens=9, ignore_eos=True))
        engine.step()
        assert engine.metrics()["prefill_tokens"] == 6
