"""Encoding: one row of a batch, with where each of its tokens lies in the texts."""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from gemcut.engine.transformers_api.tokenizers.padding import padded

Span = tuple[int, int]
NOWHERE = (0, 0)


class CharSpan(NamedTuple):
    """Characters of a text: the first, and the one after the last."""

    start: int
    end: int


class TokenSpan(NamedTuple):
    """Tokens of a row: the first, and the one after the last."""

    start: int
    end: int


class Places(NamedTuple):
    """For each token of a text, its characters and its word."""

    offsets: list[Span]
    words: list[int]


class Source:
    """A text that was encoded; its tokens' places are found when they are first asked for."""

    __slots__ = ("_arguments", "_find", "_places")

    def __init__(self, find: Callable[..., Places], *arguments: Any):
        self._find, self._arguments = find, arguments
        self._places: Places | None = None

    @property
    def places(self) -> Places:
        if self._places is None:
            self._places = self._find(*self._arguments)
        return self._places


class Passage:
    """The ids of one text, or of a part of it that begins with the token `start`."""

    __slots__ = ("ids", "source", "start")

    def __init__(self, ids: list[int], source: Source, start: int = 0):
        self.ids, self.source, self.start = ids, source, start

    def part(self, start: int, end: int) -> "Passage":
        """The tokens from `start` to `end`."""
        return Passage(self.ids[start:end], self.source, self.start + start)

    @property
    def places(self) -> Places:
        here = slice(self.start, self.start + len(self.ids))
        offsets, words = self.source.places
        return Places(offsets[here], words[here])


class Encoding:
    """One row: aligned lists of its tokens, padding included, with the names of `tokenizers`.

    `sequence_ids` has 0 or 1, the text that a token is from, and None where it was added.  A word
    is what stands between two added tokens of a text; where the caller split the text, it is one
    of the caller's words, and `offsets` begin anew in each.  Most lists are made when they are
    first asked for: a batch of many texts needs few of them.
    """

    overflowing: Sequence["Encoding"] = ()

    def __init__(
        self,
        passages: Sequence[Passage],
        pieces: Sequence[str],
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
    ):
        self.ids = [i for passage in passages for i in (*prefix, *passage.ids, *suffix)]
        self._passages, self._pieces = passages, pieces
        self._around = (len(prefix), len(suffix))
        self._padding: tuple[int, str, int] = (0, "left", 0)

    def pad(self, width: int, side: str, pad_id: int, pad_type_id: int) -> None:
        """Lengthen the row to `width` with padding on one side."""
        self._padding = (max(0, width - len(self.ids)), side, pad_type_id)
        self.ids = self._padded(self.ids, pad_id)

    def _padded(self, values: list[Any], filler: Any) -> list[Any]:
        count, side, _ = self._padding
        return padded(values, len(values) + count, side, filler) if count else values

    @property
    def n_sequences(self) -> int:
        """1, or 2 for a pair."""
        return len(self._passages)

    @cached_property
    def attention_mask(self) -> list[int]:
        return self._padded([1] * (len(self.ids) - self._padding[0]), 0)

    @cached_property
    def sequence_ids(self) -> list[int | None]:
        """For each token 0 or 1, the text that it is from; None where it was added."""
        before, after = self._around
        texts: list[int | None] = []
        for i, passage in enumerate(self._passages):
            texts += [*[None] * before, *[i] * len(passage.ids), *[None] * after]
        return self._padded(texts, None)

    @cached_property
    def type_ids(self) -> list[int]:
        """0 for each token of the first text, 1 for each of its pair, those around included."""
        lengths = [len(passage.ids) + sum(self._around) for passage in self._passages]
        types = [i for i, length in enumerate(lengths) for _ in range(length)]
        return self._padded(types, self._padding[2])

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Encoding(tokens={self.tokens})"

    def __getstate__(self) -> dict[str, Any]:
        # found now: what they are found from is the whole vocabulary
        found = {name: getattr(self, name) for name in _FOUND}
        passages = [Passage(passage.ids, _NO_SOURCE) for passage in self._passages]
        return self.__dict__ | found | {"_passages": passages, "_pieces": ()}

    @property
    def special_tokens_mask(self) -> list[int]:
        return [int(sequence is None) for sequence in self.sequence_ids]

    @cached_property
    def tokens(self) -> list[str]:
        """The pieces, as the vocabulary spells them."""
        return [self._pieces[i] for i in self.ids]

    @cached_property
    def offsets(self) -> list[Span]:
        """The characters of each token in its text; (0, 0) where a token was added."""
        return self._aligned([passage.places.offsets for passage in self._passages], NOWHERE)

    @cached_property
    def word_ids(self) -> list[int | None]:
        """The word of each token in its text; None where a token was added."""
        return self._aligned([passage.places.words for passage in self._passages], None)

    def _aligned(self, by_text: Iterable[Iterable[Any]], filler: Any) -> list[Any]:
        rest = [iter(values) for values in by_text]
        return [filler if i is None else next(rest[i]) for i in self.sequence_ids]

    def token_to_sequence(self, token_index: int) -> int | None:
        """The text that a token is from; None where it was added."""
        return self.sequence_ids[token_index] if self._is_token(token_index) else None

    def token_to_word(self, token_index: int) -> int | None:
        """The word that a token is from; None where it was added."""
        return self.word_ids[token_index] if self._is_token(token_index) else None

    def token_to_chars(self, token_index: int) -> CharSpan | None:
        """The characters of a token; None where it was added."""
        if self.token_to_sequence(token_index) is None:
            return None
        return CharSpan(*self.offsets[token_index])

    def char_to_token(self, char_index: int, sequence_index: int = 0) -> int | None:
        """The first token that holds a character of a text; None where no token does."""
        for i, (sequence, (start, end)) in enumerate(
            zip(self.sequence_ids, self.offsets, strict=True)
        ):
            if sequence == sequence_index and start <= char_index < end:
                return i
        return None

    def char_to_word(self, char_index: int, sequence_index: int = 0) -> int | None:
        """The word that holds a character of a text; None where no token does."""
        token = self.char_to_token(char_index, sequence_index)
        return None if token is None else self.word_ids[token]

    def word_to_tokens(self, word_index: int, sequence_index: int = 0) -> TokenSpan | None:
        """The tokens of a word; None where it has none."""
        found = [
            i
            for i, place in enumerate(zip(self.sequence_ids, self.word_ids, strict=True))
            if place == (sequence_index, word_index)
        ]
        return TokenSpan(found[0], found[-1] + 1) if found else None

    def word_to_chars(self, word_index: int, sequence_index: int = 0) -> CharSpan | None:
        """The characters of a word; None where it has no token."""
        span = self.word_to_tokens(word_index, sequence_index)
        if span is None:
            return None
        return CharSpan(self.offsets[span.start][0], self.offsets[span.end - 1][1])

    def _is_token(self, index: int) -> bool:
        return -len(self) <= index < len(self)


def _found_before() -> Places:
    return Places([], [])


# what a copy of a row is made with
_FOUND = ("tokens", "offsets", "word_ids")
_NO_SOURCE = Source(_found_before)


def combined(parts: Sequence[Sequence[Passage]]) -> list[tuple[Passage, ...]]:
    """The texts of each row: what stays of each text, then all others, as `tokenizers` pairs them.

    Each part cut off from the first text meets all of the second, then each part cut off from the
    second meets what stays of the first.
    """
    if len(parts) == 1:
        return [(part,) for part in parts[0]]
    (first, *cut_first), seconds = parts
    return [
        (first, seconds[0]),
        *((part, second) for part in cut_first for second in seconds),
        *((first, part) for part in seconds[1:]),
    ]
