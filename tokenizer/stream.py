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

    def hidden(self, token_id: int) -> str:
        """The literal of a special token that is not shown; nothing for other tokens."""
        if not self._skip_special_tokens or token_id not in self._tokenizer.special_ids:
            return ""
        return self._tokenizer.token_bytes(token_id).decode("utf-8", MARK_EACH_BYTE)

    def flush(self) -> str:
        """The rest: one U+FFFD for each byte of a character that was never finished."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Text up to the first stop string, which is not shown unless `include` says so.

    The stop string that is complete first wins; of several that end on the same character, the
    first in the list.  So a match is known at its last character, without looking further.

    A special token that is not shown is part of the text in which stop strings are looked for where
    one of them names it: "<end_of_turn>" ends a text in which special tokens are left out.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False):
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise ValueError(f"stop must be a list of strings that are not empty, got {stops!r}")
        self._stops, self._include = tuple(stops), include
        self._held = ""
        self._shown: list[str] = []  # each character of `_held`, or nothing where it is hidden
        self._matched: str | None = None

    def push(self, text: str, *, hidden: str = "", search: bool = True) -> tuple[str, str | None]:
        """The text that can be shown, and the stop string once one has matched.

        `hidden` is the literal of a special token that is not shown, and comes after `text`.  With
        `search` False no stop string ends here, though one may begin.  Only the longest ending that
        may grow into a stop string is held back.  Text after the match is dropped.
        """
        if self._matched is not None:
            return "", self._matched
        if not self._stops:
            return text, None
        searched = len(self._held)
        if hidden and not any(hidden in stop for stop in self._stops):
            hidden = ""
        self._held += text + hidden
        self._shown += [*text, *[""] * len(hidden)]
        found = self._first_since(searched) if search else None
        if found is None:
            return self._release(len(self._held) - self._unfinished()), None
        start, self._matched = found
        shown = self._release(start) + (self._matched if self._include else "")
        self._release(len(self._held))
        return shown, self._matched

    def flush(self) -> str:
        """The text held back, once no more will come."""
        return self._release(len(self._held))

    def _release(self, count: int) -> str:
        """The shown part of the first `count` characters, which are no longer held."""
        shown = "".join(self._shown[:count])
        self._held, self._shown = self._held[count:], self._shown[count:]
        return shown

    def _first_since(self, searched: int) -> tuple[int, str] | None:
        """Where the first stop string that ends after `searched` characters begins, and itself."""
        found = []
        for order, stop in enumerate(self._stops):
            start = self._held.find(stop, max(0, searched - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), order, start))
        if not found:
            return None
        _, order, start = min(found)
        return start, self._stops[order]

    def _unfinished(self) -> int:
        """The length of the longest ending of the held text that a stop string begins with."""
        longest = max(map(len, self._stops)) - 1
        for length in range(min(len(self._held), longest), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
