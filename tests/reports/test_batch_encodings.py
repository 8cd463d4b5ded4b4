"""What training scripts do with a batch: words and labels, long texts in rows, characters."""

import copy
import warnings

import pytest
import torch
from real_models import real_tokenizer
from transformers import AddedToken
from transformers import AutoTokenizer as TheirAutoTokenizer
from vocabulary import EURO, TURN_MARKERS, hugging_face_twin

from gemcut.engine.transformers_api.tokenizers.tokenizer import GemmaTokenizer

WORDS = [["The", "children", "walked", "", "<table>", EURO], ["Москва"]]
LABELS = [[3, 4, 5, 6, 7, 8], [9]]
LONG = "The children walked to the river and sang of the summer in 1984."
TEXTS = [LONG, "a\n\nb<table>c <bos>d", f"{EURO}  x", ""]


@pytest.fixture(scope="module")
def theirs(tokenizer_file):
    twin = hugging_face_twin(tokenizer_file)
    twin.extra_special_tokens = list(TURN_MARKERS)
    twin.add_bos_token = True
    return twin


@pytest.fixture(scope="module", params=["tokenizer.model", "tokenizer.json"])
def ours(request, theirs, tokenizer_file, tmp_path_factory):
    if request.param == "tokenizer.model":
        return GemmaTokenizer(tokenizer_file, mask_token=None)
    folder = tmp_path_factory.mktemp("json")
    theirs.save_pretrained(folder)
    return GemmaTokenizer.from_pretrained(folder)


def aligned(tokenizer, words, labels):
    """Labels of words as labels of tokens, as the documents of token classification do it."""
    encoding = tokenizer(words, truncation=True, max_length=9, is_split_into_words=True)
    rows = []
    for i, row in enumerate(labels):
        previous, of_tokens = None, []
        for word in encoding.word_ids(batch_index=i):
            is_first = word is not None and word != previous
            of_tokens.append(row[word] if is_first else -100)
            previous = word
        rows.append(of_tokens)
    return encoding.data, rows


class TestWords:
    def test_labels_of_words_become_labels_of_tokens(self, ours, theirs):
        expected = aligned(theirs, WORDS, LABELS)
        assert aligned(ours, WORDS, LABELS) == expected
        assert expected[1][1][1:2] == [9]

    def test_a_pair_of_split_texts(self, ours, theirs):
        for arguments in ((WORDS[0], WORDS[1]), (WORDS, WORDS), ([tuple(WORDS)],)):
            mine, other = (t(*arguments, is_split_into_words=True) for t in (ours, theirs))
            assert mine.data == other.data
            for one, two in zip(mine.encodings, other.encodings, strict=True):
                assert (one.word_ids, one.offsets) == (two.word_ids, two.offsets)

    def test_words_of_a_text_lie_between_its_added_tokens(self, ours, theirs):
        mine, other = ours(TEXTS), theirs(TEXTS)
        for i in range(len(TEXTS)):
            assert mine.word_ids(i) == other.word_ids(i)
        assert set(mine.word_ids(1)) == {None, 0, 1, 2, 3, 4, 5, 6}

    def test_a_token_with_a_space_of_its_own(self, theirs, tokenizer_file):
        mine, other = GemmaTokenizer(tokenizer_file, mask_token=None), copy.deepcopy(theirs)
        for tokenizer in (mine, other):
            tokenizer.add_tokens(AddedToken(" sp", lstrip=True))
        assert mine("a  sp b").word_ids() == other("a  sp b").word_ids()


class TestPlaces:
    def test_an_answer_is_found_by_its_characters(self, ours, theirs):
        """As question answering does it: the tokens that hold the answer's characters."""
        question, context, answer = "where to?", LONG, "river"
        start = context.index(answer)
        found = []
        for tokenizer in (ours, theirs):
            encoding = tokenizer(question, context)
            first = encoding.char_to_token(0, start, sequence_index=1)
            last = encoding.char_to_token(0, start + len(answer) - 1, sequence_index=1)
            chars = encoding.token_to_chars(first), encoding.token_to_chars(0, last)
            found.append((first, last, *map(tuple, chars), encoding.sequence_ids()))
            assert encoding.token_to_sequence(0, first) == 1
        assert found[0] == found[1]

    def test_a_row_is_a_record(self, ours, theirs):
        mine, other = ours(TEXTS, padding=True), theirs(TEXTS, padding=True)
        assert (mine.is_fast, mine.n_sequences, len(mine.encodings)) == (True, 1, len(TEXTS))
        for i in range(len(TEXTS)):
            for name in ("tokens", "ids", "offsets", "word_ids", "type_ids", "attention_mask"):
                assert getattr(mine[i], name) == getattr(other[i], name), name
            assert mine[i].special_tokens_mask == other[i].special_tokens_mask

    def test_a_row_outlives_new_tokens(self, tokenizer_file):
        """Places are found late: by other tokens they would be others."""
        tokenizer = GemmaTokenizer(tokenizer_file)
        early, late = tokenizer(LONG, return_offsets_mapping=True), tokenizer([LONG, "a"])
        offsets = list(early[0].offsets)
        tokenizer.add_tokens("river")
        assert early[0].offsets == early.offset_mapping == offsets
        assert early.tokens() == late.tokens(0)
        assert late.word_ids(1) == [None, 0]
        with pytest.raises(ValueError, match="before tokens were added"):
            late.word_ids(0)


class TestLongTexts:
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("cut", [True, "only_first", "only_second"])
    def test_overflow_becomes_rows(self, ours, theirs, cut, side):
        room = 14 if cut is True else 26  # several parts of each, or of one
        options = {"truncation": cut, "max_length": room, "stride": 2, "padding": True}
        options |= {"return_overflowing_tokens": True, "return_offsets_mapping": True}
        rows = []
        for tokenizer in (ours, theirs):
            before, tokenizer.truncation_side = tokenizer.truncation_side, side
            encoding = tokenizer(LONG, LONG, **options)
            rows.append((encoding.data, [row.word_ids for row in encoding.encodings]))
            tokenizer.truncation_side = before
        assert rows[0] == rows[1]

    def test_mapping_says_which_sample(self, ours, theirs):
        options = {"truncation": True, "max_length": 6, "return_overflowing_tokens": True}
        for kind in (None, "pt"):
            options |= {"return_tensors": kind, "padding": kind is not None}
            mine, other = ours(TEXTS, **options), theirs(TEXTS, **options)
            assert list(mine) == list(other)
            for name, value in other.items():
                assert torch.equal(mine[name], value) if kind else mine[name] == value
        assert mine.overflow_to_sample_mapping.tolist().count(0) == 4

    def test_a_text_beyond_the_model_is_said_once(self, tokenizer_file):
        tokenizer = GemmaTokenizer(tokenizer_file, model_max_length=5)
        with pytest.warns(UserWarning, match=r"a text has 20 tokens, more than .* 5"):
            tokenizer(LONG)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tokenizer(LONG, padding=True)
            fresh = GemmaTokenizer(tokenizer_file, model_max_length=5)
            fresh(LONG, truncation=True)
            fresh(LONG, verbose=False)
            fresh("a")
        with pytest.warns(UserWarning, match="more than .* 5"):
            fresh(LONG, padding=True)

    def test_multiples_without_padding_do_nothing(self, ours, theirs):
        for options in ({}, {"padding": True}, {"padding": "max_length", "max_length": 13}):
            options |= {"pad_to_multiple_of": 8}
            assert ours(TEXTS, **options).data == theirs(TEXTS, **options).data

    def test_targets_are_labels(self, ours, theirs):
        for options in ({}, {"max_length": 5, "max_target_length": 3, "truncation": True}):
            arguments = {"text": TEXTS, "text_target": TEXTS[::-1]} | options
            assert ours(**arguments).data == theirs(**arguments).data
        assert ours(text_target="a").data == theirs(text_target="a").data

    def test_targets_are_cut_where_texts_are(self, ours, theirs):
        """A max_target_length is a number alone: max_length says that anything is cut."""
        for options in (
            {"max_length": 5},
            {"max_length": 5, "padding": "max_length", "truncation": True},
            {"truncation": "only_second", "padding": True},
            {"truncation": True},
        ):
            arguments = {"text": TEXTS, "text_target": TEXTS[::-1], "max_target_length": 7}
            arguments |= options
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert ours(**arguments).data == theirs(**arguments).data
        with pytest.warns(UserWarning, match="max_target_length=7 does nothing"):
            ours(TEXTS, text_target=TEXTS, max_target_length=7)
        with pytest.raises(ValueError, match="max_target_length 0 is no positive integer"):
            ours(TEXTS, text_target=TEXTS, max_length=7, max_target_length=0)

    def test_a_stride_fits_into_no_row_without_room(self, ours, theirs):
        for tokenizer in (ours, theirs):
            with pytest.raises(ValueError, match="stride"):
                tokenizer(LONG, truncation=True, max_length=1, stride=1)

    def test_tokenizer_kwargs_come_before_arguments(self, ours, theirs):
        inner = {"max_length": 4, "truncation": True, "add_special_tokens": False}
        arguments = {"text": LONG, "max_length": 9, "tokenizer_kwargs": inner}
        assert ours(**arguments).data == theirs(**arguments).data


@pytest.mark.parametrize("name", ["gemini", "gemma3"])
def test_the_published_vocabularies(name):
    folder = real_tokenizer(name)
    mine = GemmaTokenizer.from_pretrained(folder)
    theirs = TheirAutoTokenizer.from_pretrained(folder)
    options = {"truncation": True, "max_length": 9, "stride": 3, "padding": True}
    options |= {"return_overflowing_tokens": True, "return_offsets_mapping": True}
    texts = [
        *TEXTS,
        "Überstraße 東京は日本の首都です。\n\n\n\t\t<start_of_turn>user",
        "🙂👩\u200d👩\u200d👧" * 5,
    ]
    one, other = mine(texts, **options), theirs(texts, **options)
    assert one.data == other.data
    assert [row.word_ids for row in one.encodings] == [row.word_ids for row in other.encodings]
    assert mine(WORDS, is_split_into_words=True) == theirs(WORDS, is_split_into_words=True)
