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


class Passage:
    """The ids of one text, or of a part of it; `locate` finds the places of the whole text's."""

    def __init__(self, ids: Sequence[int], locate: Callable[[], Places], start: int = 0):
        self.ids = list(ids)
        self._locate = locate
        self._start = start

    def part(self, start: int, end: int) -> "Passage":
        """The tokens from `start` to `end`."""
        return Passage(self.ids[start:end], self._locate, self._start + start)

    @property
    def places(self) -> Places:
        here = slice(self._start, self._start + len(self.ids))
        offsets, words = self._locate()
        return Places(offsets[here], words[here])


class Encoding:
    """One row: aligned lists of its tokens, padding included, with the names of `tokenizers`.

    `sequence_ids` has 0 or 1, the text that a token is from, and None where it was added.  A word
    is what stands between two added tokens of a text; where the caller split the text, it is one
    of the caller's words, and `offsets` begin anew in each.
    """

    def __init__(
        self,
        passages: Sequence[Passage],
        pieces: Sequence[str],
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
    ):
        self.ids: list[int] = []
        self.type_ids: list[int] = []
        self.sequence_ids: list[int | None] = []
        self.overflowing: list[Encoding] = []
        self.n_sequences = len(passages)
        for i, passage in enumerate(passages):
            self.ids += [*prefix, *passage.ids, *suffix]
            before, after = [None] * len(prefix), [None] * len(suffix)
            self.sequence_ids += [*before, *[i] * len(passage.ids), *after]
            self.type_ids += [i] * (len(self.ids) - len(self.type_ids))
        self.attention_mask = [1] * len(self.ids)
        self._passages, self._pieces = passages, pieces

    def pad(self, width: int, side: str, pad_id: int, pad_type_id: int) -> None:
        """Lengthen the row to `width` with padding on one side."""
        for name, filler in (
            ("ids", pad_id),
            ("type_ids", pad_type_id),
            ("sequence_ids", None),
            ("attention_mask", 0),
        ):
            setattr(self, name, padded(getattr(self, name), width, side, filler))

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Encoding(tokens={self.tokens})"

    def __getstate__(self) -> dict[str, Any]:
        # found now: what they are found from is the whole vocabulary
        found = {name: getattr(self, name) for name in ("tokens", "offsets", "word_ids")}
        return self.__dict__ | found | {"_passages": (), "_pieces": ()}

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
