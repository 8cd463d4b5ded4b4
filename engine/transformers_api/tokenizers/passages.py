"""A caller's texts as passages: their ids, and where each of them lies in its text."""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from gemcut.engine.transformers_api.tokenizers.rows import Passage, Places, Source
from gemcut.engine.transformers_api.tokenizers.text_decoder import TextDecoder
from gemcut.tokenizer.added_tokens import inside
from gemcut.tokenizer.vocabularies import Segment


class PassageCoder(TextDecoder):
    """The part of a tokenizer that encodes one text."""

    _is_random = False  # whether ids differ from call to call

    def passage(
        self, words: Sequence[str], *, is_split: bool, as_text: bool = False, located: bool = False
    ) -> Passage:
        """One text: its words where it `is_split`, otherwise its parts, to be encoded apart.

        `as_text` keeps literals of special tokens text.  Places are found now where they are
        `located`, otherwise by a second encoding when they are asked for.
        """
        if located or self._is_random:
            ids, places = self._located(words, is_split, as_text)
            return Passage(ids, Source(lambda: places))
        encode, ids = self._vocabulary.encode, []
        for word in words:
            for part in self._parts(word, as_text):
                ids += encode(part, add_bos=False, add_eos=False, parse_special=True)
        return Passage(ids, Source(self._places, ids, words, is_split, as_text))

    def _places(
        self, ids: list[int], words: Sequence[str], is_split: bool, as_text: bool
    ) -> Places:
        now, places = self._located(words, is_split, as_text)
        if now != ids:
            raise ValueError(
                "this text was encoded before tokens were added to the tokenizer; encode it again, "
                "or with return_offsets_mapping=True at once"
            )
        return places

    def _parts(self, word: str, as_text: bool) -> list[str]:
        if not as_text:
            return [word]
        pieces, special = self._vocabulary.pieces, self._vocabulary.special_ids
        return _inside(frozenset(pieces[i] for i in special)).split(word)

    def _located(
        self, words: Sequence[str], is_split: bool, as_text: bool
    ) -> tuple[list[int], Places]:
        whole = Segment([], [])
        numbers: list[int] = []
        start = 0
        for number, word in enumerate(words):
            start = 0 if is_split else start
            for part in self._parts(word, as_text):
                found = self._vocabulary.encode_with_offsets(part, parse_special=True)
                whole.add(*found, start)
                numbers += [number] * len(found.ids)
                start += len(part)
        if not is_split:
            numbers = self._words("".join(words), whole)
        return whole.ids, Places(whole.offsets, numbers)

    def _words(self, text: str, segment: Segment) -> list[int]:
        """The number of each token's word: added tokens, and what stands between two of them."""
        added = self._vocabulary.added_tokens
        words: list[int] = []
        number, was_added = -1, True
        for token_id, (start, end) in zip(*segment, strict=True):
            token = added.get(token_id)
            is_added = token is not None and token.is_spelled(text[start:end])
            number += is_added or was_added
            was_added = is_added
            words.append(number)
        return words


@lru_cache(maxsize=8)
def _inside(literals: frozenset[str]) -> re.Pattern[str]:
    return inside(literals)


def samples(text: Any, pair: Any, is_split: bool) -> tuple[list[list[Sequence[str]]], bool]:
    """The one or two texts of each row, as words, and whether the caller gave several rows.

    A text of the caller is a string, a single word here, or a list of words where it `is_split`.
    """
    is_text = _is_words if is_split else lambda value: isinstance(value, str)
    one, several = (
        ("a list of words", "a pair of them") if is_split else ("a string", "a pair of strings")
    )
    if is_text(text) and (pair is None or is_text(pair)):
        rows, is_batch = [(text, pair) if pair else (text,)], False
    elif not isinstance(text, list | tuple) or is_text(pair):
        raise ValueError(
            f"text must be {one} or a list of them, and text_pair alike, got "
            f"{type(text).__name__} and {type(pair).__name__}"
        )
    elif not text:
        raise ValueError("text is an empty list; a batch has at least one row")
    elif pair is None:
        rows, is_batch = [(row,) if is_text(row) else row for row in text], True
    elif len(pair) != len(text):
        raise ValueError(f"text has {len(text)} rows and text_pair has {len(pair)}")
    else:
        rows, is_batch = list(zip(text, pair, strict=True)), True
    for row in rows:
        is_row = isinstance(row, list | tuple) and 1 <= len(row) <= 2
        if not is_row or not all(is_text(one) for one in row):
            raise ValueError(f"a row of text is {one} or {several}, got {row!r}")
    return [[one if is_split else [one] for one in row] for row in rows], is_batch


def _is_words(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(word, str) for word in value)
