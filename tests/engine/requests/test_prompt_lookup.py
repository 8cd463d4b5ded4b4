"""Prompt-lookup drafts, and decoding that verifies them."""

import pytest
import torch
from engines import dictate, run_as_on_a_gpu
from hypothesis import given
from hypothesis import strategies as st

from gemcut.engine import Engine, SamplingParams
from gemcut.engine.requests.prompt_lookup import Lookup


def naive(tokens: list[int], count: int) -> list[int]:
    """The same by search: the latest place of the last 3, 2 or 1 tokens that has one after them.

    Beyond the end of the text the guess repeats itself.
    """
    for length in (3, 2, 1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if len(tokens) > length and tokens[end - length : end] == tokens[-length:]:
                text = list(tokens)
                for i in range(count):
                    text.append(text[end + i])
                return text[len(tokens) :]
    return []


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(0, 30), st.integers(0, 7))
def test_a_draft_is_what_a_search_finds(tokens, cut, count):
    lookup = Lookup(tokens[:cut])
    lookup.draft(count)  # asking changes nothing
    lookup.extend(tokens[cut:])
    assert lookup.draft(count) == naive(tokens, count)
    assert len(lookup) == len(tokens)


@pytest.fixture(scope="module", params=["read-at-once", "read-late"])
def engine(request):
    with Engine.from_pretrained("demo", max_batch_size=2, dtype="float32") as engine:
        if request.param == "read-late":
            run_as_on_a_gpu(engine)
        yield engine


PROMPT = "The dog ran to the dog, and the dog ran to the cat, and the dog ran to the"


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": 0},
        {"seed": 3, "temperature": 0.7},
        {"seed": 4, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
        {"seed": 5, "min_tokens": 20, "logit_bias": {300: 3.0}},
    ],
    ids=["greedy", "random", "filtered", "biased"],
)
def test_drafts_change_no_token(engine, setting):
    """A token follows from the text before it and the noise of its position, verified or not."""
    for max_tokens in (1, 2, 3, 7, 60):
        setting["min_tokens"] = min(setting.get("min_tokens", 0), max_tokens)
        plain = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **setting)
        expected = engine.generate([PROMPT, "It was"], plain)
        for width in (1, 4, 7):
            drafted = SamplingParams(
                max_tokens=max_tokens, ignore_eos=True, prompt_lookup_num_tokens=width, **setting
            )
            outputs = engine.generate([PROMPT, "It was"], [drafted, plain])
            assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]


def test_drafts_save_steps_where_the_text_repeats(engine):
    before = engine.metrics()
    params = SamplingParams(
        temperature=0, max_tokens=60, ignore_eos=True, prompt_lookup_num_tokens=7,
        logit_bias=dict.fromkeys(range(40, 44), 80.0),
    )  # fmt: skip
    output = engine.generate(PROMPT, params)
    after = engine.metrics()
    steps = after["decode_steps"] - before["decode_steps"]
    accepted = after["accepted_tokens"] - before["accepted_tokens"]
    assert len(output.token_ids) == 60
    assert accepted == 59 - steps
    assert steps < 20
    assert after["drafted_tokens"] - before["drafted_tokens"] >= accepted


def test_a_draft_stops_at_the_end_of_the_slot(engine):
    """512 tokens: a draft that went past them would overwrite the first ones."""
    ids = [2, *[50, 51, 52] * 160]
    for params in (
        SamplingParams(temperature=0, ignore_eos=True),
        SamplingParams(temperature=0, ignore_eos=True, prompt_lookup_num_tokens=7),
    ):
        output = engine.generate(ids, params)
        assert len(output.token_ids) == 512 - len(ids)
        again = engine.generate(ids[:40], SamplingParams(temperature=0, max_tokens=5))
    with Engine(engine.model, engine.tokenizer, reuse_prefixes=False) as anew:
        expected = anew.generate(ids[:40], SamplingParams(temperature=0, max_tokens=5))
        assert again.token_ids == expected.token_ids
        assert (
            output.token_ids
            == anew.generate(ids, SamplingParams(temperature=0, ignore_eos=True)).token_ids
        )


def test_a_draft_ends_where_the_text_does(engine, tokenizer):
    """An end among accepted tokens: nothing after it counts."""
    stop = 41
    params = SamplingParams(
        temperature=0, max_tokens=60, prompt_lookup_num_tokens=7,
        logit_bias={40: 80.0}, stop_token_ids=[stop],
    )  # fmt: skip
    ids = [2, *[40] * 9, stop, *[40] * 9]
    plain = SamplingParams(
        temperature=0, max_tokens=60, logit_bias={40: 80.0}, stop_token_ids=[stop]
    )
    assert engine.generate(ids, params).token_ids == engine.generate(ids, plain).token_ids


@pytest.mark.parametrize("value", [-1, 8, 1.5, True, "7"])
def test_bad_widths(value):
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens"):
        SamplingParams(prompt_lookup_num_tokens=value)


@pytest.mark.parametrize(
    "other",
    [
        {"repetition_penalty": 1.1},
        {"presence_penalty": 1.0},
        {"bad_words": ["x"]},
        {"logits_processors": dictate([5])},
    ],
)
def test_what_needs_each_token_excludes_drafts(other):
    with pytest.raises(ValueError, match="cannot be combined with penalties, bad_words, "):
        SamplingParams(prompt_lookup_num_tokens=3, **other)


def test_seeded_draws_keep_their_distribution(engine):
    """Over 40 seeds, with drafts and without: equal token by token, so equal in law."""
    counts = []
    for width in (0, 7):
        params = [
            SamplingParams(seed=s, max_tokens=4, ignore_eos=True, prompt_lookup_num_tokens=width)
            for s in range(40)
        ]
        outputs = engine.generate([PROMPT] * 40, params)
        counts.append(torch.tensor([o.token_ids for o in outputs]))
    assert counts[0].equal(counts[1])
    assert len(set(counts[0][:, 1].tolist())) > 10
