"""Encoding and decoding of GemmaTokenizer beside transformers' own."""

import copy
import os
import re

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_texts import MANY, PAIR, same
from vocabulary import EURO

from gemcut.engine.transformers_api.tokenizers.batch_encoding import BatchEncoding
from gemcut.engine.transformers_api.tokenizers.tokenizer import GemmaTokenizer


class TestEncode:
    @settings(max_examples=1000)
    @given(same)
    def test_is_transformers(self, shared, theirs, text):
        """Literals in the text become tokens; BOS still comes before them."""
        assert shared.encode(text) == theirs.encode(text)

    @settings(max_examples=200)
    @given(same, same)
    def test_everything_returned_is_transformers(self, shared, theirs, text, pair):
        wanted = dict.fromkeys(
            (
                "return_token_type_ids",
                "return_special_tokens_mask",
                "return_offsets_mapping",
                "return_length",
            ),
            True,
        )
        encoding, other = shared(text, pair, **wanted), theirs(text, pair, **wanted)
        assert encoding.data == other.data
        assert list(encoding) == list(other)
        assert encoding.tokens() == other.tokens()
        assert encoding.sequence_ids() == other.sequence_ids(0)

    @settings(max_examples=100)
    @given(same)
    def test_tokenizer_json_is_tokenizer_model(self, shared, from_json, text):
        one, other = (t(text, return_offsets_mapping=True) for t in (shared, from_json))
        assert one == other
        assert shared.decode(one.input_ids) == from_json.decode(one.input_ids)

    def test_documented_example(self, ours, theirs):
        text = "Hello this is a test"
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text)[0] == ours.bos_token_id == 2

    @pytest.mark.skipif(
        "GEMCUT_GEMMA_TOKENIZER" not in os.environ,
        reason="GEMCUT_GEMMA_TOKENIZER names no published tokenizer.model",
    )
    def test_documented_example_with_the_published_vocabulary(self):
        tokenizer = GemmaTokenizer(os.environ["GEMCUT_GEMMA_TOKENIZER"])
        assert tokenizer.encode("Hello this is a test") == [2, 4521, 736, 603, 476, 2121]

    def test_a_lone_surrogate_in_the_json(self, from_json):
        with pytest.raises(ValueError, match="surrogate"):
            from_json.encode("\ud800")

    def test_two_bos_as_transformers_has_them(self, ours, theirs):
        assert ours.encode("<bos>a") == theirs.encode("<bos>a")
        assert ours.encode("<bos>a").count(2) == 2
        assert ours.encode("<bos>a", add_special_tokens=False).count(2) == 1

    def test_split_special_tokens(self, tokenizer_file, ours, tokenizer, from_json):
        text = "a<bos>b<start_of_turn>"
        ids = tokenizer.encode(text)
        assert ours.encode(text, split_special_tokens=True) == ids
        assert GemmaTokenizer(tokenizer_file, split_special_tokens=True).encode(text) == ids
        as_text = from_json.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert set(as_text).isdisjoint(tokenizer.special_ids)
        assert from_json.decode(as_text) == text

    def test_tokenize(self, ours, theirs):
        for text in ("The children", f"{EURO} <bos>", ""):
            assert ours.tokenize(text) == theirs.tokenize(text)
        arguments = ("a b", "c", True)
        assert ours.tokenize(*arguments) == theirs.tokenize(*arguments)

    def test_pairs(self, ours, theirs):
        theirs = copy.deepcopy(theirs)
        for add_eos in (False, True):
            ours.add_eos_token = theirs.add_eos_token = add_eos
            assert ours(*PAIR).data == theirs(*PAIR).data
            assert ours([PAIR, PAIR]).data == theirs([PAIR, PAIR]).data
            assert ours(["a", "b"], ["c", "d"]).data == theirs(["a", "b"], ["c", "d"]).data
            ids = (ours.encode(PAIR[0], add_special_tokens=False), [5, 6])
            built = ours.build_inputs_with_special_tokens(*ids)
            assert len(built) - len(ids[0]) - 2 == ours.num_special_tokens_to_add(pair=True)
            assert ours.num_special_tokens_to_add() == theirs.num_special_tokens_to_add()
            mask = ours.get_special_tokens_mask(*ids)
            assert [i for i, flag in zip(built, mask, strict=True) if not flag] == [*ids[0], 5, 6]
            types = ours.create_token_type_ids_from_sequences(*ids)
            assert types == ours(*PAIR, return_token_type_ids=True).token_type_ids[
                : len(types)
            ] or (len(types) == len(built))
        assert ours.encode("a", "") == ours.encode("a")

    def test_former_names(self, ours):
        assert ours.encode_plus("a", "b") == ours("a", "b")
        assert ours.batch_encode_plus(MANY, padding=True) == ours(MANY, padding=True)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            pytest.param({"text": 5}, ValueError, "got int and NoneType", id="number"),
            pytest.param({"text": None}, ValueError, "got NoneType", id="none"),
            pytest.param({"text": []}, ValueError, "empty list", id="no-rows"),
            pytest.param({"text": ["a", 5]}, ValueError, "got 5", id="row"),
            pytest.param({"text": [("a", "b", "c")]}, ValueError, "pair of strings", id="triple"),
            pytest.param({"text": ["a"], "text_pair": "b"}, ValueError, "got list and str", id="x"),
            pytest.param(
                {"text": ["a"], "text_pair": ["b", "c"]}, ValueError, "1 rows .* has 2", id="pairs"
            ),
            pytest.param({"text": "\ud800"}, ValueError, "lone surrogate", id="surrogate"),
            pytest.param({"stride": -1}, ValueError, "stride -1", id="stride"),
            pytest.param(
                {"truncation": True, "max_length": 3, "stride": 5},
                ValueError,
                "stride 5 does not fit: max_length 3 leaves 2",
                id="long-stride",
            ),
            pytest.param({"is_split_into_words": True}, ValueError, "list of words", id="words"),
            pytest.param(
                {"text": [["a"], "b"], "is_split_into_words": True},
                ValueError,
                "got 'b'",
                id="row2",
            ),
            pytest.param({"no_such": 1}, TypeError, "no_such", id="unknown"),
            pytest.param({"return_tensors": "tf"}, ValueError, "'tf' is not supported", id="tf"),
            pytest.param({"padding": "most"}, ValueError, "padding 'most' is unknown", id="pad"),
            pytest.param({"truncation": "x"}, ValueError, "truncation 'x' is unknown", id="cut"),
            pytest.param({"max_length": 0}, ValueError, "max_length 0", id="max-length"),
            pytest.param({"max_length": True}, ValueError, "max_length True", id="bool"),
            pytest.param({"padding_side": "up"}, ValueError, "padding_side is 'up'", id="side"),
            pytest.param({"pad_to_multiple_of": 0}, ValueError, "multiple_of 0", id="multiple"),
            pytest.param(
                {
                    "padding": True,
                    "truncation": True,
                    "max_length": 6,
                    "pad_to_multiple_of": 4,
                },
                ValueError,
                "no multiple of",
                id="cut-and-pad",
            ),
        ],
    )
    def test_refuses(self, ours, arguments, error, message):
        with pytest.raises(error, match=message):
            ours(**({"text": "a"} | arguments))


class TestDecode:
    @settings(max_examples=400)
    @given(same, st.booleans())
    def test_is_transformers(self, shared, theirs, text, skip):
        ids = theirs.encode(text)
        assert shared.decode(ids, skip_special_tokens=skip) == theirs.decode(
            ids, skip_special_tokens=skip
        )
        assert shared.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
        pieces = theirs.convert_ids_to_tokens(ids)
        assert shared.convert_tokens_to_ids(pieces) == ids
        assert shared.convert_tokens_to_string(pieces) == theirs.convert_tokens_to_string(pieces)

    def test_skipped(self, ours, theirs):
        ids = ours.encode("<start_of_turn>user\nThe<end_of_turn><pad><eos><unk><unused0>")
        options = {"skip_special_tokens": True}
        assert ours.decode(ids, **options) == theirs.decode(ids, **options)
        assert ours.convert_ids_to_tokens(ids, **options) == theirs.convert_ids_to_tokens(
            ids, **options
        )
        mask = theirs.get_special_tokens_mask(ids, already_has_special_tokens=True)
        assert ours.get_special_tokens_mask(ids, already_has_special_tokens=True) == mask

    def test_forms(self, ours, theirs):
        ids = ours.encode("The children")
        for form in (
            ids, tuple(ids), ids[2], np.array(ids), torch.tensor(ids), [ids, ids[:2]],
            torch.tensor([ids, ids]), [torch.tensor(ids)], [], ours("The children"),
        ):  # fmt: skip
            assert ours.decode(form) == theirs.decode(form)
            if not isinstance(form, BatchEncoding | int):  # transformers 5.24 refuses a single id
                assert ours.batch_decode(form) == theirs.batch_decode(form)
        assert ours.batch_decode(ids[2]) == [theirs.decode(ids[2])]
        assert ours.decode(jax.numpy.array(ids)) == "<bos>The children"

    def test_clean_up(self, tokenizer_file, ours, theirs):
        text = "Is it ? It does n't , it 's ' a ' b ! we 've 'm 're ."
        assert ours.clean_up_tokenization(text) == theirs.clean_up_tokenization(text) != text
        ids = ours.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == text
        clean = theirs.clean_up_tokenization(text)
        assert ours.decode(ids, clean_up_tokenization_spaces=True) == clean
        always = GemmaTokenizer(tokenizer_file, clean_up_tokenization_spaces=True)
        assert always.decode(ids) == clean
        assert always.decode(ids, clean_up_tokenization_spaces=False) == text

    def test_spaces_between_special_tokens(self, tokenizer_file, ours):
        ids = ours.encode("a<eos><eos>The children")
        assert ours.decode(ids) == "<bos>a<eos><eos>The children"
        spaced = "<bos> a <eos> <eos> The children"
        assert ours.decode(ids, spaces_between_special_tokens=True) == spaced
        always = GemmaTokenizer(tokenizer_file, spaces_between_special_tokens=True)
        assert always.decode(ids) == spaced
        assert always.decode(ids, skip_special_tokens=True) == "aThe children"

    def test_unknown_pieces(self, ours, theirs):
        for tokens in ("The", "zzzz", ["The", "zzzz"], []):
            assert ours.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)

    @pytest.mark.parametrize("token_id", [-1, 520, 1.5, "a", True])
    def test_refuses(self, ours, token_id):
        message = re.escape(f"token id {token_id!r} is no integer from 0 to 519")
        with pytest.raises(ValueError, match=message):
            ours.decode([token_id], skip_special_tokens=True)
