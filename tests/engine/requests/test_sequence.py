"""Sequences: their text as it streams, stop strings, and how they end."""

from dataclasses import replace

import pytest
from engines import dictate
from hypothesis import given, settings
from hypothesis import strategies as st

from gemcut.engine import SamplingParams

PROMPTS = ["Once upon a time", "It was", "The quick brown fox jumps over the lazy dog. " * 2]
TEXTS = {
    "ascii": "plain words, and 12 numbers",
    "emoji": "family 👩‍👩‍👧‍👦 flags 🇩🇪🏴‍☠️ skin 👍🏽",
    "combining": "e\u0301a\u0308 Z\u0351\u036b\u0343 क्षि",
    "bytes": "汉字 ﷽ 𝔘𝔫𝔦 \x00 \u200b",
    "replacement": "a real \ufffd character",
}


@pytest.mark.parametrize("name", TEXTS)
def test_stream_joins_to_the_text_of_generate(engine, tokenizer, name):
    ids = tokenizer.encode(TEXTS[name], add_bos=False)
    params = SamplingParams(max_tokens=len(ids), logits_processors=dictate(ids))
    deltas = list(engine.stream("x", params))
    assert "".join(delta.text for delta in deltas) == engine.generate("x", params).text
    assert "".join(delta.text for delta in deltas) == TEXTS[name]
    assert [id_ for delta in deltas for id_ in delta.token_ids] == ids
    if name != "replacement":
        assert not any("\ufffd" in delta.text for delta in deltas)
    assert [d.finish_reason for d in deltas] == [None] * (len(ids) - 1) + ["length"]


@settings(max_examples=40)
@given(ids=st.lists(st.integers(4, 500), min_size=1, max_size=30))
def test_stream_of_any_tokens_joins_to_the_text_of_generate(engine, ids):
    """Broken UTF-8 included."""
    params = SamplingParams(max_tokens=len(ids), logits_processors=dictate(ids))
    streamed = "".join(delta.text for delta in engine.stream("x", params))
    assert streamed == engine.generate("x", params).text == engine.tokenizer.decode(ids)


@pytest.mark.parametrize("stop", ["STOP", ["Q", "STOP HERE", "TOP"], "👩‍👧", ["S", "P"]], ids=str)
def test_stop_strings_that_span_tokens_are_never_shown_in_part(engine, tokenizer, stop):
    text = "before S ST STO 👩 STOP HERE 👩‍👧 after"
    stops = [stop] if isinstance(stop, str) else stop
    # cut at the place where the first of them is complete
    shortest = min((text.index(s) + len(s), text.index(s)) for s in stops if s in text)
    expected = text[: shortest[1]]
    ids = tokenizer.encode(text, add_bos=False)
    params = SamplingParams(stop=stop, logits_processors=dictate(ids))
    shown = ""
    for delta in engine.stream("x", params):
        shown += delta.text
        assert expected.startswith(shown)
    assert shown == expected
    output = engine.generate("x", params).outputs[0]
    assert (output.text, output.finish_reason) == (expected, "stop")
    assert output.stop_reason in stops


def test_text_held_back_for_a_stop_string_is_shown_at_the_end(engine, tokenizer):
    ids = tokenizer.encode("almost STO", add_bos=False)
    params = SamplingParams(stop="STOP", max_tokens=len(ids), logits_processors=dictate(ids))
    assert engine.generate("x", params).text == "almost STO"


# How a sequence ends


def test_eos_ends_the_text_unless_ignored(engine, tokenizer):
    ids = [*tokenizer.encode("end", add_bos=False), tokenizer.eos_id]
    ids += tokenizer.encode("more", add_bos=False)
    output = engine.generate("x", SamplingParams(logits_processors=dictate(ids))).outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("end", "stop", None)
    assert output.token_ids[-1] == tokenizer.eos_id
    params = SamplingParams(ignore_eos=True, max_tokens=len(ids), logits_processors=dictate(ids))
    output = engine.generate("x", params).outputs[0]
    assert (output.text, output.finish_reason) == ("endmore", "length")
    with_specials = replace(params, skip_special_tokens=False)
    assert engine.generate("x", with_specials).text == "end<eos>more"


def test_stop_token_ids(engine, tokenizer):
    ids = tokenizer.encode("one two three", add_bos=False)
    params = SamplingParams(stop_token_ids=[ids[2]], logits_processors=dictate(ids))
    output = engine.generate("x", params).outputs[0]
    assert output.token_ids == ids[:3]
    assert output.text == tokenizer.decode(ids[:2])
    assert (output.finish_reason, output.stop_reason) == ("stop", ids[2])


def test_generation_runs_to_the_end_of_the_slot(engine, tokenizer):
    prompt = tokenizer.encode(PROMPTS[2])
    output = engine.generate(prompt, SamplingParams(ignore_eos=True, seed=0))
    assert len(prompt) + len(output.token_ids) == engine.max_seq_len == 128
    assert output.finish_reason == "length"


def test_min_tokens_puts_off_eos_and_stop_tokens(engine, tokenizer):
    likely = {tokenizer.eos_id: 100.0, 50: 90.0}
    params = {"logit_bias": likely, "stop_token_ids": [50], "max_tokens": 9, "temperature": 0}
    assert len(engine.generate("x", SamplingParams(**params)).token_ids) == 1
    output = engine.generate("x", SamplingParams(min_tokens=6, **params))
    assert len(output.token_ids) == 7
    assert set(output.token_ids[:6]).isdisjoint(likely)
