"""Streamed text: nothing is lost and nothing is shown too early, whatever the cuts."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from vocabulary import texts

from gemcut.tokenizer import StopStrings, StreamDecoder


def streamed(tokenizer, ids, **options) -> list[str]:
    decoder = StreamDecoder(tokenizer, **options)
    return [*(decoder.push(i) for i in ids), decoder.flush()]


class TestStreamDecoder:
    @given(st.data())
    def test_joins_to_decode(self, tokenizer, data):
        first_byte = tokenizer.id_of("<0x00>")
        some_byte = st.integers(first_byte, first_byte + 255)
        ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1) | some_byte, max_size=30))
        skip = data.draw(st.booleans())
        joined = "".join(streamed(tokenizer, ids, skip_special_tokens=skip))
        assert joined == tokenizer.decode(ids, skip_special_tokens=skip)

    @given(texts)
    @example("e\u0301")
    @example("👩\u200d👩\u200d👧 👍🏽 🇩🇪")
    @example("\ufffd")
    def test_shows_whole_characters_at_once(self, tokenizer, text):
        """Each prefix of the ids shows all that its bytes complete, and no replacement."""
        ids = tokenizer.encode(text)
        shown = ""
        for count, piece in enumerate(streamed(tokenizer, ids)[:-1], start=1):
            shown += piece
            joined = b"".join(
                tokenizer.token_bytes(i, skip_special_tokens=True) for i in ids[:count]
            )
            assert shown == joined.decode(errors="ignore")

    def test_bytes_wait_for_their_character(self, tokenizer):
        ids = tokenizer.encode("🙂a", add_bos=False)
        assert streamed(tokenizer, ids) == ["", "", "", "🙂", "a", ""]

    def test_broken_character(self, tokenizer):
        ids = tokenizer.encode("🙂", add_bos=False)
        a = tokenizer.id_of("a")
        assert streamed(tokenizer, [*ids[:3], a, *ids[:2]]) == [
            "", "", "", "\ufffd" * 3 + "a", "", "", "\ufffd" * 2,
        ]  # fmt: skip

    def test_skipped_special_tokens(self, tokenizer):
        ids = [tokenizer.bos_id, tokenizer.id_of("a"), tokenizer.end_of_turn_id]
        assert streamed(tokenizer, ids) == ["", "a", "", ""]
        kept = streamed(tokenizer, ids, skip_special_tokens=False)
        assert kept == ["<bos>", "a", "<end_of_turn>", ""]

    def test_an_id_past_the_vocabulary_has_no_text(self, tokenizer):
        """An embedding may have more rows than the vocabulary has pieces."""
        assert StreamDecoder(tokenizer).push(520) == ""
        with pytest.raises(ValueError, match="token id -1"):
            StreamDecoder(tokenizer).push(-1)


def stopped(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    stream = StopStrings(stops)
    shown, matched = "", None
    for piece in pieces:
        text, matched = stream.push(piece)
        shown += text
    return shown + stream.flush(), matched


def first_complete(stops: list[str], text: str) -> tuple[str, str | None]:
    """The oracle: the shortest prefix that ends in a stop string, without the longest such."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


# two letters make overlaps and repeats common
words = st.text("ab", min_size=1, max_size=5)


class TestStopStrings:
    @given(st.lists(words, max_size=4), st.lists(st.text("abc", max_size=4)))
    def test_does_not_depend_on_cuts(self, stops, pieces):
        text = "".join(pieces)
        expected = first_complete(stops, text)
        assert stopped(stops, pieces) == stopped(stops, [text]) == expected
        assert stopped(stops, list(text)) == expected

    @given(st.lists(words, max_size=4), st.text("abc", max_size=20))
    def test_holds_back_no_more_than_needed(self, stops, text):
        stream = StopStrings(stops)
        shown = ""
        for end, letter in enumerate(text, start=1):
            piece, matched = stream.push(letter)
            shown += piece
            if matched:
                break
            held = text[len(shown) : end]
            assert not held or any(stop.startswith(held) for stop in stops)
            assert not any(
                stop.startswith(text[start:end]) for stop in stops for start in range(len(shown))
            )

    @pytest.mark.parametrize(
        ("stops", "text", "shown", "matched"),
        [
            pytest.param(["aab"], "aaab", "a", "aab", id="restart-inside-a-prefix"),
            pytest.param(["abcd", "bc"], "abcd", "a", "bc", id="complete-first-wins"),
            pytest.param(["b", "ab"], "ab", "", "ab", id="longest-of-one-ending"),
            pytest.param(["ab", "abc"], "abc", "", "ab", id="does-not-wait-for-a-longer-one"),
            pytest.param(["\n\n"], "x\ny\n\nz", "x\ny", "\n\n", id="newlines"),
            pytest.param(["\u0301"], "e\u0301", "e", "\u0301", id="combining-mark"),
            pytest.param(["🙂"], "👍🏽🙂", "👍🏽", "🙂", id="emoji"),
            pytest.param([], "ab", "ab", None, id="no-stops"),
        ],
    )
    def test_match(self, stops, text, shown, matched):
        assert stopped(stops, list(text)) == (shown, matched)

    def test_held_text_is_flushed(self):
        stream = StopStrings(["STOP"])
        assert stream.push("go ST") == ("go ", None)
        assert stream.push("AY STO") == ("STAY ", None)
        assert stream.flush() == "STO"
        assert stream.flush() == ""

    def test_nothing_follows_a_match(self):
        stream = StopStrings(["."])
        assert stream.push("a. b") == ("a", ".")
        assert stream.push("c") == ("", ".")
        assert stream.flush() == ""

    @pytest.mark.parametrize("stops", [[""], ["a", ""], "ab", [1]])
    def test_refuses(self, stops):
        with pytest.raises(ValueError, match="stop must be a list"):
            StopStrings(stops)
