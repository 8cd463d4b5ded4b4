"""Prefix reuse: tokens that a slot still holds are not computed again; lost ones are."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from engines import save_random_model
from hypothesis import given
from hypothesis import strategies as st
from twins import poison

from gemcut.engine import Engine, SamplingParams
from gemcut.engine.requests.prefix_reuse import Held, Ring, common_length

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
TURN = "Tell me of the moor, and of the hound that was seen there by the old doctor. "


@pytest.fixture
def engine(folder):
    """Window 5 and chunks of 8: a ring of 13 tokens."""
    with Engine.from_pretrained(
        folder, max_batch_size=3, prefill_chunk=8, dtype="float32"
    ) as engine:
        poison(engine.cache)
        yield engine


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_length(a, b):
    expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    assert common_length(a, b) == (min(len(a), len(b)) if expected is None else expected)


@given(
    held=st.integers(0, 60), garbage=st.integers(0, 8), asked=st.integers(1, 60),
    window=st.integers(1, 9), chunk=st.integers(8, 12),
)  # fmt: skip
def test_reusable_by_writing_a_ring_token_by_token(held, garbage, asked, window, chunk):
    """The ring is filled as the cache is; every key that the next query sees must be there."""
    capacity = window + chunk
    ring: dict[int, int] = {}
    for position in range(held + garbage):
        ring[position % capacity] = position
    reused = Held(list(range(held)), held + garbage).reusable(
        list(range(asked)), Ring(window, capacity)
    )
    longest = min(held, asked - 1)
    seen = range(max(0, longest - window + 1), longest)
    is_there = all(ring[position % capacity] == position for position in seen)
    if seen:  # an empty one has nothing to lose
        assert reused == (longest if is_there else 0)
    assert reused in (0, longest)


def turns(engine: Engine, count: int) -> list:
    """A conversation of so many turns of the user, and the outputs."""
    messages, outputs = [], []
    for i in range(count):
        messages.append({"role": "user", "content": f"{i} {TURN[:30]}"})
        outputs.append(engine.chat(messages, GREEDY))
        messages.append({"role": "model", "content": outputs[-1].text})
    return outputs


def test_a_second_turn_prefills_the_new_turn_alone(tmp_path, tokenizer_file):
    """Except tokens of the answer that its text does not give back, from the first of them on."""
    save_random_model(tmp_path, tokenizer_file, max_position_embeddings=512)
    with (
        Engine.from_pretrained(tmp_path, prefill_chunk=64, dtype="float32") as engine,
        Engine.from_pretrained(
            tmp_path, prefill_chunk=64, reuse_prefixes=False, dtype="float32"
        ) as anew,
    ):
        outputs, expected = turns(engine, 4), turns(anew, 4)
        assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
        for before, after in pairwise(outputs):
            known = before.prompt_token_ids + before.token_ids[:-1]
            assert after.metrics.reused_prefix_tokens == common_length(
                known, after.prompt_token_ids
            )
            assert after.metrics.reused_prefix_tokens >= len(before.prompt_token_ids)
        assert engine.metrics()["prefill_tokens"] < anew.metrics()["prefill_tokens"] / 2
        assert {o.metrics.reused_prefix_tokens for o in expected} == {0}


def test_completions_share_one_prefill(engine):
    prompt = [2, *range(30, 70)]
    params = SamplingParams(n=3, seed=1, max_tokens=9, ignore_eos=True)
    shared = engine.generate(prompt, params)
    assert engine.metrics()["prefill_tokens"] == len(prompt) + 2
    assert engine.metrics()["reused_tokens"] == 2 * (len(prompt) - 1)
    alone = [
        engine.generate([2, 9, *prompt[2:]], SamplingParams(seed=s, max_tokens=9)) for s in (1, 2)
    ]
    assert alone[0].token_ids != alone[1].token_ids
    with Engine(engine.model, engine.tokenizer, reuse_prefixes=False) as anew:
        expected = anew.generate(prompt, params)
    assert [c.token_ids for c in shared.outputs] == [c.token_ids for c in expected.outputs]


def test_a_slot_that_goes_on_is_taken_and_another_is_copied(engine):
    """A conversation goes on in its slot; a prompt that only begins like it gets its own."""
    first = engine.generate([2, *range(30, 42)], GREEDY)
    history = first.prompt_token_ids + first.token_ids
    branch = engine.generate([*history[:12], 7, 8], GREEDY)
    goes_on = engine.generate([*history, 9], GREEDY)
    assert goes_on.metrics.reused_prefix_tokens == len(history) - 1
    with Engine(engine.model, engine.tokenizer, reuse_prefixes=False) as anew:
        for output in (branch, goes_on):
            assert anew.generate(output.prompt_token_ids, GREEDY).token_ids == output.token_ids


def test_what_a_ring_has_lost_is_computed_again(engine):
    long = engine.generate([2, *range(30, 90)], GREEDY)
    assert long.metrics.reused_prefix_tokens == 0
    short = engine.generate([2, *range(30, 60), 7], GREEDY)
    assert short.metrics.reused_prefix_tokens == 0
    with Engine(engine.model, engine.tokenizer, reuse_prefixes=False) as anew:
        expected = anew.generate(short.prompt_token_ids, GREEDY)
    assert short.token_ids == expected.token_ids


def test_nothing_is_reused_where_keys_depend_on_the_length(tmp_path, tokenizer_file):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    save_random_model(tmp_path, tokenizer_file, "gemma", rope_parameters=rope)
    with Engine.from_pretrained(tmp_path, dtype="float32") as engine:
        for _ in range(2):
            assert engine.generate("Once upon", GREEDY).metrics.reused_prefix_tokens == 0


def test_what_must_see_the_whole_prompt_reuses_nothing(engine):
    prompt = [2, *range(30, 60)]
    engine.generate(prompt, GREEDY)
    scored = engine.score(prompt)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    output = engine.generate(prompt, params)
    assert output.metrics.reused_prefix_tokens == 0
    logprobs = [entry[id_].logprob for entry, id_ in zip(
        output.prompt_logprobs[1:], prompt[1:], strict=True
    )]  # fmt: skip
    assert logprobs == pytest.approx(scored.logprobs, abs=1e-5)
    assert torch.tensor(logprobs).isfinite().all()


def test_the_context_of_a_score_is_reused(engine):
    context = [2, *range(30, 50)]
    endings = [[7], [8], [7, 9], [11, 12, 13]]
    before = engine.metrics()["reused_tokens"]
    scored = engine.score([context + ending for ending in endings], start=len(context))
    reused = engine.metrics()["reused_tokens"] - before
    # the state of the context's last token is computed anew, for what follows it
    assert reused == 3 * (len(context) - 1)
    with Engine(engine.model, engine.tokenizer, reuse_prefixes=False) as anew:
        for one, ending in zip(scored, endings, strict=True):
            expected = anew.score(context + ending)
            assert one.logprobs == pytest.approx(expected.logprobs[-len(ending) :], abs=1e-5)
            assert one.is_greedy == expected.is_greedy[-len(ending) :]


def test_of_a_prompt_that_failed_whole_chunks_are_of_use(engine, monkeypatch):
    """Chunks of 8: the third fails in its last layer."""
    prompt = [2, *range(30, 60)]
    expected = engine.generate(prompt, GREEDY).token_ids
    engine.generate([2, *range(100, 140)], replace(GREEDY, n=3))  # in every slot
    geglu, calls = engine.model.ops.geglu, iter(range(10**6))

    def fails(*args, **kwargs):
        if next(calls) == 3 * engine.config.num_layers - 1:
            raise RuntimeError("half done")
        return geglu(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(engine.model.ops, "geglu", fails)
        with pytest.raises(RuntimeError, match="half done"):
            engine.generate(prompt, GREEDY)
    again = engine.generate(prompt, GREEDY)
    assert again.metrics.reused_prefix_tokens == 16
    assert again.token_ids == expected
