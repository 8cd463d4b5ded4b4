"""Added tokens are found in a text as transformers finds them; which tokens are markers."""

import copy
import json
import re
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizer_texts import transformers_differs
from tokenizers import AddedToken as TheirToken
from transformers import AutoTokenizer
from vocabulary import hugging_face_twin, texts

from gemcut.tokenizer import AddedToken, Tokenizer
from gemcut.tokenizer.added_tokens import OPTIONS, any_of, inside, markers

# they overlap, begin alike, touch words and spaces, and have words of the vocabulary in them
TOKENS = (
    AddedToken("<|im_end|>", special=True, normalized=False),
    AddedToken("<|im", normalized=False),
    AddedToken("wal"),
    AddedToken("walked"),
    AddedToken("new york"),
    AddedToken("<l>", lstrip=True, normalized=False),
    AddedToken("<r>", rstrip=True, special=True, normalized=False),
    AddedToken("<both>", lstrip=True, rstrip=True, normalized=False),
    AddedToken("user", single_word=True),
    AddedToken("東"),
)
literals = st.sampled_from([token.content for token in TOKENS])
mixed = st.lists(st.one_of(literals, texts, st.sampled_from(" \n\tax")), max_size=8).map("".join)


@pytest.fixture(scope="module")
def ours(tokenizer_file):
    tokenizer = Tokenizer.from_file(tokenizer_file)
    pieces = {token.content for token in TOKENS} & set(tokenizer.pieces)
    assert pieces  # some name an ordinary piece
    new = len(TOKENS) - len(pieces)
    assert tokenizer.add_tokens(TOKENS) == new
    assert len(tokenizer) == 520 + new
    return tokenizer


@pytest.fixture(scope="module")
def theirs(tokenizer_file):
    twin = copy.deepcopy(hugging_face_twin(tokenizer_file))
    for token in TOKENS:
        options = {name: getattr(token, name) for name in OPTIONS}
        twin.add_tokens([TheirToken(token.content, **options)])
    return twin


def test_a_single_word_ends_where_theirs_does(ours, theirs):
    """At every character that this Python knows: "user" with an accent is another word."""
    known = [
        c for c in map(chr, range(0x20000)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")
    ]
    user = theirs.convert_tokens_to_ids("user")
    differing = [
        c
        for c, found in zip(known, theirs(["user" + c for c in known]).input_ids, strict=True)
        if (user in found) != (user in ours.encode("user" + c, parse_special=True))
    ]
    assert differing == []


@given(mixed)
@example("<|imuser")  # a normalised token beside one that is not
@example("user<|im_end|>user walkeduser")
def test_ids_offsets_and_text_are_transformers(ours, theirs, text):
    if transformers_differs(text):
        return
    expected = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = ours.encode_with_offsets(text, parse_special=True)
    assert ids == expected.input_ids == ours.encode(text, add_bos=False, parse_special=True)
    assert offsets == expected.offset_mapping
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
            ids, skip_special_tokens=skip
        )


@given(mixed)
def test_plain_text_has_no_marker(ours, text):
    ids = ours.encode(text, add_bos=False)
    assert ours.marker_ids.isdisjoint(ids)
    names = {ours.piece(i) for i in ours.marker_ids}
    assert names >= {"<|im_end|>", "<l>", "<r>", "<both>"}
    assert names.isdisjoint({"walked", "user", "<|im"})


def test_a_piece_gets_options(tokenizer_file):
    tokenizer = Tokenizer.from_file(tokenizer_file)
    table = tokenizer.id_of("<table>")
    assert tokenizer.add_tokens([AddedToken("<table>", special=True)]) == 0
    assert table in tokenizer.special_ids
    assert table not in tokenizer.encode("a<table>")
    assert table in tokenizer.encode("a<table>", parse_special=True)
    assert tokenizer.decode([table]) == ""


def test_an_ordinary_piece_becomes_a_whole(tokenizer_file):
    tokenizer = Tokenizer.from_file(tokenizer_file)
    piece = next(p for p in tokenizer.pieces if len(p) == 2 and p.isalpha())
    text = f"{piece}x{piece}"
    tokenizer.add_tokens([AddedToken(piece)])
    token_id = tokenizer.id_of(piece)
    assert tokenizer.encode(text, add_bos=False).count(token_id) == 2


@given(st.lists(st.text("ab<|>", min_size=1, max_size=5), max_size=8), st.text("ab<|>"))
def test_any_of_is_the_longest_that_begins_first(words, text):
    longest_first = sorted(words, key=len, reverse=True)
    expected = re.findall("|".join(map(re.escape, longest_first)) or "(?!)", text)
    assert re.findall(any_of(words), text) == expected


@given(st.lists(st.text("ab<|>", min_size=2, max_size=5), max_size=8), st.text("ab<|>"))
def test_inside_cuts_every_literal(words, text):
    for part in inside(words).split(text):
        assert not any(word in part for word in words)


def test_markers():
    names = ["<a>", "</a>", "<b>", "<c d>", "[x]", "[x y]", "<|y|>", "word", "<>", "</e>"]
    names += ["<special>", "</special>"]
    vocabulary = {name: i for i, name in enumerate(names)}
    found = markers(vocabulary, {vocabulary["word"], vocabulary["<special>"]})
    assert set(found) == {"<b>", "[x]", "<|y|>", "word", "</e>", "<special>"}


def test_runs_of_spaces_are_sentencepieces_own(ours, tokenizer_file):
    """With and without added tokens."""
    for text in (" " * 5, "▁▁ ", "a▁▁▁ b", "\n▁ "):
        assert ours.encode(text) == Tokenizer.from_file(tokenizer_file).encode(text)
        assert ours.encode(text) == Tokenizer.from_file(tokenizer_file.parent).encode(text)


@pytest.mark.parametrize("listed", [True, False])
def test_options_of_a_tokenizer_json_stay(theirs, tmp_path, listed):
    """added_tokens.json and a name in the settings say nothing of them."""
    theirs.save_pretrained(tmp_path)
    if listed:
        ids = {token.content: theirs.convert_tokens_to_ids(token.content) for token in TOKENS}
        (tmp_path / "added_tokens.json").write_text(json.dumps(ids))
    settings = {"eos_token": "<l>", "extra_special_tokens": ["<r>"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, other = Tokenizer.from_file(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a \n<l>b", "a<r> \n b", "a <both> b", "user users", "new york <|im_end|>"):
        ids = other.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_bos=False, parse_special=True) == ids
        for skip in (True, False):
            shown = other.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == shown
