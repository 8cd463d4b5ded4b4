"""Padding and truncation of GemmaTokenizer beside transformers' own."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_texts import MANY, PAIR


class TestLengths:
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize(
        "options",
        [
            {"padding": True},
            {"padding": "longest", "pad_to_multiple_of": 8},
            {"padding": "max_length", "max_length": 20},
            {"padding": "max_length", "max_length": 3},
            {"padding": "max_length", "max_length": 5, "pad_to_multiple_of": 4},
            {"padding": "max_length", "max_length": 8, "truncation": True},
            {"padding": "max_length"},
            {"padding": False},
        ],
        ids=str,
    )
    def test_padding_is_transformers(self, ours, theirs, side, options):
        options = options | {"padding_side": side}
        options |= {"return_special_tokens_mask": True, "return_offsets_mapping": True}
        options |= {"return_token_type_ids": True, "return_length": True}
        for text in (MANY, PAIR[0], [PAIR, ("a", "b")]):
            assert ours(text, **options).data == theirs(text, **options).data

    def test_default_side_is_left(self, ours):
        assert ours(MANY, padding=True).attention_mask[1][0] == 0
        ours.padding_side = "right"
        assert ours(MANY, padding=True).attention_mask[1][0] == 1

    @settings(max_examples=300)
    @given(st.data())
    def test_truncation_is_transformers(self, shared, theirs, data):
        cuts = st.sampled_from([True, "longest_first", "only_first", "only_second", False, None])
        options = {"truncation": data.draw(cuts), "max_length": data.draw(st.integers(2, 12))}
        options["return_offsets_mapping"] = True
        pair = data.draw(st.sampled_from([None, "a b", "The children walked to the river"]))
        text = data.draw(st.sampled_from(["a", "The children walked to the river of 1984"]))
        for side in ("left", "right"):  # the default last: these tokenizers are shared
            shared.truncation_side = theirs.truncation_side = side
            try:
                expected = theirs(text, pair, **options).data
            except Exception:  # the tokenizers package raises no narrower type
                with pytest.raises(ValueError, match="truncation"):
                    shared(text, pair, **options)
            else:
                assert shared(text, pair, **options).data == expected

    def test_model_max_length(self, ours, theirs):
        theirs = copy.deepcopy(theirs)
        ours.model_max_length = theirs.model_max_length = 6
        for options in ({"truncation": True}, {"padding": "max_length"}):
            assert ours(MANY, **options).data == theirs(MANY, **options).data

    def test_refuses_a_length_below_the_special_tokens(self, ours):
        """Transformers returns the whole pair there."""
        with pytest.raises(ValueError, match="special tokens alone pass it by 1"):
            ours(*PAIR, max_length=1)

    def test_a_length_that_does_nothing_is_said(self, ours):
        with pytest.warns(UserWarning, match="max_length=5 does nothing"):
            ours(MANY, padding=True, max_length=5)

    def test_no_pad_token(self, ours):
        ours.pad_token = None
        with pytest.raises(ValueError, match="needs a pad_token"):
            ours(MANY, padding=True)

    @pytest.mark.parametrize("kind", ["lists", "np", "pt", "one", "many"])
    def test_pad(self, ours, theirs, kind):
        def encodings(tokenizer):
            if kind == "one":
                return tokenizer("The children")
            if kind == "many":
                return [tokenizer(text) for text in MANY]
            if kind == "lists":
                return tokenizer(MANY)
            return [{k: v[0] for k, v in tokenizer(t, return_tensors=kind).items()} for t in MANY]

        for options in (
            {},
            {"padding": "max_length", "max_length": 20, "padding_side": "right"},
            {"pad_to_multiple_of": 4},
        ):
            mine, other = (t.pad(encodings(t), **options) for t in (ours, theirs))
            assert list(mine) == list(other)
            for name, value in other.items():
                assert type(mine[name]) is type(value)
                assert np.array_equal(np.asarray(mine[name]), np.asarray(value))

    def test_pad_refuses(self, ours):
        with pytest.raises(ValueError, match="has input_ids"):
            ours.pad({"attention_mask": [1]})
        with pytest.raises(ValueError, match="differ in their number of rows"):
            ours.pad({"input_ids": [[1], [2]], "labels": [1]})
