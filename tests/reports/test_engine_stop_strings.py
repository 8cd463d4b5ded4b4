"""Stop strings of an engine: special tokens in them, ties, min_tokens, and what the text shows."""

import pytest
from engines import assert_serves, dictate
from hypothesis import given, settings
from hypothesis import strategies as st
from real_models import real_tokenizer

from gemcut.engine import Engine, SamplingParams
from gemcut.tokenizer import StopStrings, StreamDecoder, Tokenizer


@pytest.fixture(scope="module")
def engine(folder):
    with Engine.from_pretrained(folder, max_batch_size=3, dtype="float32") as engine:
        yield engine


def said(engine, ids, **options):
    """The completion of a model that says these tokens; a stream must say the same text."""
    params = SamplingParams(
        max_tokens=len(ids), logits_processors=dictate(ids), **({"ignore_eos": True} | options)
    )
    streamed = "".join(delta.text for delta in engine.stream("x", params))
    completion = engine.generate("x", params).outputs[0]
    assert streamed == completion.text
    return completion


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(
    ("stop", "shown", "matched"),
    [
        ("<end_of_turn>", "one two", "<end_of_turn>"),
        (["three", "<end_of_turn>"], "one two", "<end_of_turn>"),
        ("two<end_of_turn>", "one ", "two<end_of_turn>"),
        ("<end_of_turn>\n", "one two", "<end_of_turn>\n"),
        ("<end_of_turn>\n<start_of_turn>", "one two", "<end_of_turn>\n<start_of_turn>"),
        ("two<end_of_turn>three", None, None),
    ],
    ids=str,
)
def test_a_stop_string_may_hold_special_tokens(engine, tokenizer, skip, stop, shown, matched):
    text = "one two<end_of_turn>\n<start_of_turn>three"
    ids = tokenizer.encode(text, add_bos=False, parse_special=True)
    completion = said(engine, ids, stop=stop, skip_special_tokens=skip)
    if shown is None:
        shown = tokenizer.decode(ids, skip_special_tokens=skip)
    assert (completion.text, completion.stop_reason) == (shown, matched)
    assert completion.finish_reason == ("length" if matched is None else "stop")


def test_a_literal_that_is_no_token_stops_too(engine, tokenizer):
    ids = tokenizer.encode("one<end_of_turn>two", add_bos=False)
    assert tokenizer.end_of_turn_id not in ids
    assert said(engine, ids, stop="<end_of_turn>").text == "one"


def test_hidden_tokens_that_no_stop_string_names_do_not_part_a_text(engine, tokenizer):
    ids = tokenizer.encode("st<start_of_turn>op it", add_bos=False, parse_special=True)
    assert said(engine, ids, stop="stop").text == ""
    assert said(engine, ids, stop=["<start_of_turn>op", "stop"]).text == "st"


@pytest.mark.parametrize(
    ("stops", "text", "matched"),
    [(["ab", "b"], "x", "ab"), (["b", "ab"], "xa", "b"), (["abc", "b"], "xa", "b")],
)
def test_the_first_complete_wins_then_the_first_of_the_list(
    engine, tokenizer, stops, text, matched
):
    completion = said(engine, tokenizer.encode("xabc", add_bos=False), stop=stops)
    assert (completion.text, completion.stop_reason) == (text, matched)


def test_the_stop_string_or_stop_token_may_be_included(engine, tokenizer):
    ids = tokenizer.encode("one two<end_of_turn>\nthree", add_bos=False, parse_special=True)
    include = {"include_stop_str_in_output": True}
    assert said(engine, ids, stop="ne t", **include).text == "one t"
    assert said(engine, ids, stop="<end_of_turn>\n", **include).text == "one two<end_of_turn>\n"
    two = ids[ids.index(tokenizer.end_of_turn_id) - 1]
    through_two = tokenizer.decode(ids[: ids.index(two) + 1])
    completion = said(engine, ids, stop_token_ids=[two], **include)
    assert (completion.text, completion.stop_reason) == (through_two, two)
    # a special token is shown where special tokens are
    stop_token = {"stop_token_ids": [tokenizer.end_of_turn_id], **include}
    assert said(engine, ids, **stop_token).text == "one two"
    shown = said(engine, ids, skip_special_tokens=False, **stop_token)
    assert shown.text == "one two<end_of_turn>"


def test_no_stop_string_ends_in_the_first_min_tokens(engine, tokenizer):
    ids = [tokenizer.id_of(letter) for letter in "ababcab"]
    assert None not in ids
    assert said(engine, ids, stop="ab").text == ""
    for count, text in ((1, ""), (2, "ab"), (3, "ab"), (4, "ababc"), (6, "ababc"), (7, "ababcab")):
        assert said(engine, ids, stop="ab", min_tokens=count).text == text
    # one that is over by then is no match later, though a longer one is held back around it
    assert said(engine, ids, stop=["b", "abcx"], min_tokens=5).text == "ababca"


def test_an_eos_is_no_stop_string(engine, tokenizer):
    """EOS is looked at first, as in vLLM."""
    ids = [*tokenizer.encode("one", add_bos=False), tokenizer.eos_id, 7]
    completion = said(engine, ids, stop="<eos>", ignore_eos=False)
    assert (completion.text, completion.stop_reason, completion.finish_reason) == (
        "one",
        None,
        "stop",
    )
    assert said(engine, ids, stop="<eos>").stop_reason == "<eos>"
    assert_serves(engine)


TOKENS = ["a", "b", "ab", "<end_of_turn>", "<start_of_turn>", "\n", "é", "<0xC3>", "<0xA9>"]


@settings(max_examples=150)
@given(
    spelled=st.lists(st.sampled_from(TOKENS), min_size=1, max_size=8),
    stops=st.lists(
        st.lists(st.sampled_from(TOKENS[:7]), min_size=1, max_size=3).map("".join),
        min_size=1,
        max_size=3,
    ),
    include=st.booleans(),
)
def test_shown_special_tokens_stop_like_any_text(tokenizer, spelled, stops, include):
    """With special tokens shown, a stop string is found where the whole text has it first."""
    ids = [id_ for piece in spelled for id_ in one_or_more(tokenizer, piece)]
    decoder, search = (
        StreamDecoder(tokenizer, skip_special_tokens=False),
        StopStrings(stops, include=include),
    )
    text, matched = "", None
    for id_ in ids:
        shown, matched = search.push(decoder.push(id_))
        text += shown
    if matched is None:
        shown, matched = search.push(decoder.flush())
        text += shown + ("" if matched else search.flush())
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    ends = [(whole.index(s) + len(s), order, s) for order, s in enumerate(stops) if s in whole]
    if not ends:
        assert (text, matched) == (whole, None)
    else:
        end, _, stop = min(ends)
        assert (text, matched) == (whole[: end if include else end - len(stop)], stop)


def one_or_more(tokenizer, piece):
    token_id = tokenizer.id_of(piece)
    return [token_id] if token_id is not None else tokenizer.encode(piece, add_bos=False)


@pytest.mark.parametrize("name", ["gemma3", "gemini"])
def test_the_idiom_stops_with_a_published_tokenizer(name):
    tokenizer = Tokenizer.from_file(real_tokenizer(name))
    ids = tokenizer.encode("It was 🙂<end_of_turn>\nmore", add_bos=False, parse_special=True)
    decoder, search = StreamDecoder(tokenizer), StopStrings(["<end_of_turn>"])
    text, matched = "", None
    for id_ in ids:
        shown, matched = search.push(decoder.push(id_), hidden=decoder.hidden(id_))
        text += shown
        if matched:
            break
    assert (text, matched) == ("It was 🙂", "<end_of_turn>")
