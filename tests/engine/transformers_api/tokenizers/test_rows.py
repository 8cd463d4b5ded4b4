"""Rows of a batch beside transformers' own: words, characters, tokens, and what was cut off."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_texts import same

words = st.lists(same, max_size=4)
RECORDS = (
    "ids", "tokens", "type_ids", "offsets", "word_ids", "sequence_ids", "attention_mask",
    "special_tokens_mask", "n_sequences",
)  # fmt: skip


def records(row) -> dict:
    return {name: getattr(row, name) for name in RECORDS}


def assert_same(mine, other):
    """All that two encodings hold, and everything that they find."""
    assert mine.data == other.data
    assert list(mine) == list(other)
    assert (mine.n_sequences, mine.is_fast) == (other.n_sequences, True)
    assert [records(row) for row in mine.encodings] == [records(row) for row in other.encodings]
    for i, row in enumerate(other.encodings):
        beside = [records(one) for one in mine[i].overflowing]
        if i == 0 or beside:
            assert beside == [records(one) for one in row.overflowing]
        for token in range(len(row) + 1):
            for name in ("token_to_sequence", "token_to_word", "token_to_chars"):
                assert getattr(mine, name)(i, token) == getattr(other, name)(i, token), name
        for sequence in range(row.n_sequences):
            for place in range(24):
                for name in ("char_to_token", "char_to_word", "word_to_tokens"):
                    found = getattr(mine, name)(i, place, sequence)
                    assert found == getattr(other, name)(i, place, sequence), name
                if mine.word_to_tokens(i, place, sequence) is not None:
                    assert mine.word_to_chars(i, place, sequence) == (
                        other.word_to_chars(i, place, sequence)
                    )


def options_of(data) -> dict:
    options = {
        "add_special_tokens": data.draw(st.booleans()),
        "return_overflowing_tokens": data.draw(st.booleans()),
        "return_special_tokens_mask": True,
        "return_offsets_mapping": data.draw(st.booleans()),
        "return_length": True,
        "padding": data.draw(st.sampled_from([False, True])),
        "padding_side": data.draw(st.sampled_from(["left", "right"])),
    }
    if data.draw(st.booleans()):
        options |= {"truncation": data.draw(st.sampled_from([True, "only_first", "only_second"]))}
        options |= {"max_length": data.draw(st.integers(4, 12)), "stride": data.draw(st.just(1))}
    return options


class TestRows:
    @settings(max_examples=300, deadline=None)
    @given(st.data())
    def test_are_transformers(self, shared, from_json, theirs, data):
        split = data.draw(st.booleans())
        text = words if split else same
        rows = data.draw(st.lists(text, min_size=1, max_size=3))
        pairs = data.draw(st.none() | st.lists(text, min_size=len(rows), max_size=len(rows)))
        options = options_of(data) | {"is_split_into_words": split}
        try:
            expected = theirs(rows, pairs, **options)
        except BaseException:  # the tokenizers package panics where a stride is too long
            for tokenizer in (shared, from_json):
                with pytest.raises(ValueError, match=r"truncation|stride"):
                    tokenizer(rows, pairs, **options)
            return
        for tokenizer in (shared, from_json):
            assert_same(tokenizer(rows, pairs, **options), expected)
