"""Streamed text, as soon as it is certain, and the stop strings that end it.

Both classes hold back only what the next piece can still change, and what they yield does not
depend on how their input was cut.
"""

import codecs
from collections.abc import Sequence

from gemcut.tokenizer.codec import Tokenizer
from gemcut.tokenizer.vocabularies import MARK_EACH_BYTE


class StreamDecoder:
    """Ids to text: what `push` yields, then `flush`, joins to `tokenizer.decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(MARK_EACH_BYTE)

    def push(self, token_id: int) -> str:
        """The text that became certain; bytes of an unfinished character wait for the rest.

        An id past the vocabulary has no text: an embedding may have more rows than that.
        """
        if token_id >= len(self._tokenizer):
            return ""
        return self._decoder.decode(
            self._tokenizer.token_bytes(token_id, skip_special_tokens=self._skip_special_tokens)
        )

    def flush(self) -> str:
        """The rest: one U+FFFD for each byte of a character that was never finished."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Text up to the first stop string, which is not shown.

    The stop string that is complete first wins; of several that end on the same character, the
    longest. So a match is known at its last character, without looking further.
    """

    def __init__(self, stops: Sequence[str]):
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise ValueError(f"stop must be a list of strings that are not empty, got {stops!r}")
        self._stops = tuple(stops)
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that can be shown, and the stop string once one has matched.

        Only the longest ending that may grow into a stop string is held back. Text after the match
        is dropped.
        """
        if self._matched is not None:
            return "", self._matched
        text = self._held + text
        found = [(text.index(s) + len(s), -len(s), s) for s in self._stops if s in text]
        if found:
            end, _, self._matched = min(found)
            self._held = ""
            return text[: end - len(self._matched)], self._matched
        shown = len(text) - self._unfinished(text)
        self._held = text[shown:]
        return text[:shown], None

    def flush(self) -> str:
        """The text held back, once no more will come."""
        rest, self._held = self._held, ""
        return rest

    def _unfinished(self, text: str) -> int:
        """The length of the longest ending of text that a stop string begins with."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(len(text), longest), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
