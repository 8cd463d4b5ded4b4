"""Encoding and decoding, against SentencePiece itself and transformers' GemmaTokenizer."""

import pickle
import re

import numpy as np
import pytest
import sentencepiece
from hypothesis import assume, given
from hypothesis import strategies as st
from vocabulary import CONTROL, EURO, TURN_MARKERS, plain_texts, texts, train_vocabulary

from gemcut.tokenizer import Tokenizer
from gemcut.tokenizer.sentencepiece_vocabulary import SentencePieceVocabulary

# Transformers looks for user-defined pieces in the raw text, where a space is not yet "▁". It so
# sees the pieces of several "▁" only where the text itself holds "▁", and makes runs of spaces by
# merging, from pairs up. SentencePiece takes the longest piece first, on "▁" and space alike.
transformers_differs = re.compile(" {5}|▁").search


@pytest.fixture(scope="session")
def processor(tokenizer_file):
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file))


def ids_of(tokenizer: Tokenizer, pieces: str) -> list[int]:
    return [i for piece in pieces.split() if (i := tokenizer.id_of(piece)) is not None]


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    return ids_of(tokenizer, " ".join(f"<0x{byte:02X}>" for byte in data))


class TestVocabulary:
    def test_ids_are_looked_up(self, tokenizer):
        assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id) == (
            0, 1, 2, 3,
        )  # fmt: skip
        markers = {tokenizer.start_of_turn_id, tokenizer.end_of_turn_id}
        assert {tokenizer.piece(i) for i in markers} == set(TURN_MARKERS)
        assert tokenizer.special_ids == {0, 1, 2, 3} | markers
        assert len(tokenizer) == tokenizer.vocab_size == 520

    def test_other_order_of_control_pieces(self, tmp_path):
        """Guards against 0, 1, 2, 3 written into the code."""
        train_vocabulary(tmp_path / "tokenizer.model", unk_id=0, bos_id=1, eos_id=2, pad_id=3)
        tokenizer = Tokenizer.from_file(tmp_path)
        assert tokenizer.encode("", add_eos=True) == [1, 2]
        assert (tokenizer.unk_id, tokenizer.pad_id) == (0, 3)

    def test_without_turn_markers(self, tmp_path):
        path = tmp_path / "tokenizer.model"
        train_vocabulary(path, user_defined_symbols=["\n"])
        tokenizer = Tokenizer.from_file(path)
        assert tokenizer.start_of_turn_id is None
        assert tokenizer.end_of_turn_id is None
        assert tokenizer.special_ids == {0, 1, 2, 3}
        assert tokenizer.decode(tokenizer.encode("<start_of_turn>")) == "<start_of_turn>"

    def test_control_turn_markers(self, tmp_path):
        """Gemma's successors may declare the markers as control pieces."""
        path = tmp_path / "tokenizer.model"
        settings = {"user_defined_symbols": ["\n", "<s"], "control_symbols": list(TURN_MARKERS)}
        train_vocabulary(path, **settings)
        tokenizer = Tokenizer.from_file(path)
        start = tokenizer.start_of_turn_id
        assert start in tokenizer.special_ids
        assert tokenizer.decode(tokenizer.encode("<start_of_turn>")) == "<start_of_turn>"
        assert tokenizer.encode("<start_of_turn>", parse_special=True)[1:] == [start]

    def test_without_byte_pieces_a_rare_character_is_unknown(self, tmp_path):
        path = tmp_path / "tokenizer.model"
        train_vocabulary(path, vocab_size=220, byte_fallback=False)
        tokenizer = Tokenizer.from_file(path)
        ids = tokenizer.encode(f"The{EURO}", add_bos=False)
        assert ids == [*tokenizer.encode("The", add_bos=False), tokenizer.unk_id]
        assert tokenizer.decode(ids) == "The"
        assert tokenizer.decode(ids, skip_special_tokens=False) == "The<unk>"

    def test_pieces_and_ids(self, tokenizer):
        assert [tokenizer.id_of(tokenizer.piece(i)) for i in range(520)] == list(range(520))
        assert tokenizer.id_of("no such piece") is None
        assert tokenizer.id_of("<unk>") == tokenizer.unk_id

    def test_pickles(self, tokenizer):
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.encode("The children") == tokenizer.encode("The children")


class TestEncode:
    @given(plain_texts)
    def test_plain_text_is_sentencepiece(self, tokenizer, processor, text):
        assert tokenizer.encode(text, add_bos=False) == processor.encode(text)

    @given(texts)
    def test_special_literals_stay_text(self, tokenizer, text):
        ids = tokenizer.encode(text, add_bos=False)
        assert tokenizer.marker_ids.isdisjoint(ids)
        assert tokenizer.decode(ids) == text.replace("▁", " ")

    def test_cut_is_only_inside_a_turn_marker(self, tokenizer, processor):
        text = "<<start_of_turn><end_of_turn"
        assert processor.encode("<start_of_turn>") == [tokenizer.start_of_turn_id]  # why we cut
        halves = processor.encode("<<") + processor.encode("start_of_turn><end_of_turn")
        assert tokenizer.encode(text, add_bos=False) == halves

    def test_other_user_defined_pieces_are_matched(self, tokenizer):
        text = "\n\n\n\n<table>  <unused0>"
        pieces = [tokenizer.piece(i) for i in tokenizer.encode(text)]
        assert pieces[:5] == ["<bos>", "\n\n\n", "\n", "<table>", "▁▁"]
        assert tokenizer.id_of("<unused0>") not in tokenizer.encode(text)
        assert tokenizer.encode(text, parse_special=True)[-1] == tokenizer.id_of("<unused0>")

    @given(texts)
    def test_is_transformers_with_specials_parsed(self, tokenizer, twin, text):
        assume(not transformers_differs(text))
        ids = tokenizer.encode(text, add_bos=False, parse_special=True)
        assert ids == twin.encode(text, add_special_tokens=False)

    @pytest.mark.parametrize(
        ("text", "ours", "theirs"),
        [
            pytest.param(" " * 5, "▁▁▁▁ ▁", "▁▁ ▁▁▁", id="run-past-the-longest-piece"),
            pytest.param("▁▁ ", "▁▁▁", "▁▁ ▁", id="literal-beside-a-space"),
        ],
    )
    def test_where_transformers_differs(self, tokenizer, twin, text, ours, theirs):
        assert tokenizer.encode(text, add_bos=False) == ids_of(tokenizer, ours)
        assert twin.encode(text, add_special_tokens=False) == ids_of(tokenizer, theirs)

    @pytest.mark.parametrize("literal", CONTROL + TURN_MARKERS)
    def test_parse_special(self, tokenizer, literal):
        a, b = (tokenizer.encode(text, add_bos=False) for text in ("a ", " b"))
        ids = tokenizer.encode(f"a {literal} b", parse_special=True)
        assert ids == [tokenizer.bos_id, *a, tokenizer.id_of(literal), *b]

    def test_one_bos(self, tokenizer):
        """Two BOS hurt a Gemma model as much as none."""
        bos, a = tokenizer.bos_id, tokenizer.id_of("a")
        assert tokenizer.encode("<bos>a", parse_special=True) == [bos, a]
        assert tokenizer.encode("<bos>a", add_bos=False, parse_special=True) == [bos, a]
        assert tokenizer.encode("a<bos>", parse_special=True) == [bos, a, bos]
        assert tokenizer.encode("<bos>a").count(bos) == 1
        assert tokenizer.encode("") == [bos]
        assert tokenizer.encode("a", add_bos=False, add_eos=True) == [a, tokenizer.eos_id]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            pytest.param("ab\ud83d", "U+D83D at position 2", id="high-surrogate"),
            pytest.param("\udc80", "U+DC80 at position 0", id="surrogateescape"),
            pytest.param(b"ab", "got bytes", id="bytes"),
            pytest.param(None, "got NoneType", id="none"),
        ],
    )
    def test_refuses(self, tokenizer, text, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            tokenizer.encode(text)


class TestDecode:
    @given(plain_texts)
    def test_is_sentencepiece_and_transformers(self, tokenizer, processor, twin, text):
        ids = tokenizer.encode(text, add_bos=False)
        assert tokenizer.decode(ids) == processor.decode(ids) == twin.decode(ids)

    @given(st.data())
    def test_any_ids_are_sentencepiece(self, tokenizer, processor, data):
        """Broken characters, stray continuation bytes, surrogates spelled in UTF-8."""
        byte = st.sampled_from(
            byte_ids(tokenizer, b"a\0\x80\xbf\xc0\xc3\xa9\xe2\x82\xac\xed\xa0\xf0\x9f\x99\xf4\xff")
        )
        plain = st.sampled_from(sorted(set(range(520)) - tokenizer.special_ids))
        ids = data.draw(st.lists(byte | plain, max_size=20))
        assert tokenizer.decode(ids) == processor.decode(ids)

    @given(st.lists(st.integers(0, 519)))
    def test_joins_token_bytes(self, tokenizer, ids):
        joined = b"".join(tokenizer.token_bytes(i) for i in ids)
        text = tokenizer.decode(ids, skip_special_tokens=False)
        assert re.sub("\ufffd+", "\ufffd", text) == re.sub(
            "\ufffd+", "\ufffd", joined.decode(errors="replace")
        )

    @pytest.mark.parametrize(
        ("data", "text"),
        [
            pytest.param(EURO.encode(), EURO, id="whole-character"),
            pytest.param(EURO.encode()[:2], "\ufffd" * 2, id="one-mark-a-byte-not-a-character"),
            pytest.param(EURO.encode() + b"\xff", EURO + "\ufffd", id="only-the-bad-byte"),
            pytest.param("▁".encode(), "▁", id="bytes-are-not-a-space"),
        ],
    )
    def test_bytes(self, tokenizer, data, text):
        assert tokenizer.decode(byte_ids(tokenizer, data)) == text

    def test_transformers_loses_a_run_with_one_bad_byte(self, tokenizer, twin):
        ids = byte_ids(tokenizer, EURO.encode() + b"\xff")
        assert twin.decode(ids) == "\ufffd" * 4

    def test_special_tokens(self, tokenizer, twin):
        text = "<bos><start_of_turn>user\nThe<end_of_turn><pad><eos><unk>"
        ids = tokenizer.encode(text, parse_special=True)
        assert tokenizer.decode(ids) == twin.decode(ids, skip_special_tokens=True) == "user\nThe"
        assert tokenizer.decode(ids, skip_special_tokens=False) == twin.decode(ids) == text

    def test_takes_numpy_and_iterators(self, tokenizer):
        ids = tokenizer.encode("The children")
        assert tokenizer.decode(np.array(ids)) == tokenizer.decode(iter(ids)) == "The children"

    @pytest.mark.parametrize("token_id", [-1, 520, 2**40, 1.0, "1", None])
    def test_refuses(self, tokenizer, token_id):
        message = re.escape(f"token id {token_id!r} is no integer from 0 to 519")
        for use in (tokenizer.piece, tokenizer.token_bytes, lambda i: tokenizer.decode([4, i])):
            with pytest.raises(ValueError, match=message):
                use(token_id)


class TestEncodeBatch:
    TEXTS = ("The children", "", "a <eos>")

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_rows(self, tokenizer, side):
        options = {"add_eos": True, "parse_special": True}
        ids, mask = tokenizer.encode_batch(self.TEXTS, padding_side=side, **options)
        rows = [tokenizer.encode(text, **options) for text in self.TEXTS]
        assert (ids.dtype, mask.dtype) == (np.int64, np.bool_)
        assert ids.shape == mask.shape == (3, max(map(len, rows)))
        assert [list(row[kept]) for row, kept in zip(ids, mask, strict=True)] == rows
        assert set(ids[~mask]) == {tokenizer.pad_id}
        assert mask[:, -1 if side == "left" else 0].all()

    def test_default_is_left(self, tokenizer):
        assert not tokenizer.encode_batch(self.TEXTS)[1][1, 0]

    @pytest.mark.parametrize(
        ("texts", "side", "message"),
        [
            pytest.param([], "left", "one or more strings", id="no-rows"),
            pytest.param("The children", "left", "one or more strings", id="a-bare-string"),
            pytest.param(["a"], "middle", "'middle'", id="side"),
        ],
    )
    def test_refuses(self, tokenizer, texts, side, message):
        with pytest.raises(ValueError, match=message):
            tokenizer.encode_batch(texts, padding_side=side)


class TestFromFile:
    def test_directory(self, tokenizer_file):
        assert len(Tokenizer.from_file(str(tokenizer_file.parent))) == 520

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            pytest.param(None, "No such file", id="missing"),
            pytest.param(b"", "is empty", id="empty"),
            pytest.param(b"version https://git-lfs.github.com/spec/v1\n", "git-lfs", id="lfs"),
            pytest.param(b"not a protobuf", "not a SentencePiece model", id="text"),
        ],
    )
    def test_refuses(self, tmp_path, content, message):
        path = tmp_path / "tokenizer.model"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
            Tokenizer.from_file(path)
        message = message if path.exists() else "holds neither"
        with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}.*{message}"):
            Tokenizer.from_file(tmp_path)

    def test_refuses_every_truncation(self, tokenizer_file):
        """Some are valid protobuf: whole pieces, then no settings."""
        model = tokenizer_file.read_bytes()
        for size in range(1, len(model), 3):
            with pytest.raises(ValueError, match=r"^cut "):
                SentencePieceVocabulary(model[:size], "cut")

    @given(st.data())
    def test_damage_never_escapes_as_another_error(self, tokenizer_file, data):
        model = bytearray(tokenizer_file.read_bytes())
        model[data.draw(st.integers(0, len(model) - 1))] = data.draw(st.integers(0, 255))
        try:
            SentencePieceVocabulary(bytes(model), "damaged")
        except ValueError as error:
            assert str(error).startswith("damaged")  # noqa: PT017  most damage is harmless

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            pytest.param({"pad_id": -1}, "no pad piece", id="no-pad"),
            pytest.param({"bos_id": -1}, "no bos piece", id="no-bos"),
            pytest.param({"add_dummy_prefix": True}, "alters text", id="llama-prefix"),
            pytest.param({"remove_extra_whitespaces": True}, "alters text", id="spaces"),
            pytest.param({"normalization_rule_name": "nfkc"}, "alters text", id="nfkc"),
        ],
    )
    def test_refuses_another_kind_of_vocabulary(self, tmp_path, options, message):
        path = tmp_path / "tokenizer.model"
        ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
        if "pad_id" in options or "bos_id" in options:  # ids must stay dense from 0
            kept = [name for name in ids if name not in options]
            options = options | {name: i for i, name in enumerate(kept)}
        train_vocabulary(path, **options)
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
            Tokenizer.from_file(path)


def test_who_says_whether_bos_is_added_gets_no_eos_unasked(tokenizer_file):
    vocabulary = SentencePieceVocabulary.from_file(tokenizer_file)
    tokenizer = Tokenizer(vocabulary, add_bos=False, add_eos=True)
    (a,) = tokenizer.encode("a", add_bos=False)
    assert tokenizer.encode("a") == [a, 1]
    assert tokenizer.encode("a", add_bos=True) == [2, a]
    assert tokenizer.encode("a", add_bos=True, add_eos=True) == [2, a, 1]
    assert tokenizer.encode("a", add_eos=False) == [a]
