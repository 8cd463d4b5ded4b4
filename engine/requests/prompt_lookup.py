"""Prompt-lookup drafts: the tokens that followed the newest ones where the text had them before.

Saxena, 2023, "Prompt Lookup Decoding".  Summaries, edits and answers about a document repeat it, so
its next tokens are a guess for the next tokens here, and cost no second model.
"""

from collections.abc import Sequence

LENGTHS = (3, 2, 1)  # of the newest tokens that must match; the longest match wins


class Lookup:
    """The tokens of one text, indexed by the tokens before them."""

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids: list[int] = []
        self._following: dict[tuple[int, ...], int] = {}  # tokens -> index of the one after them
        self.extend(token_ids)

    def __len__(self) -> int:
        return len(self._token_ids)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Add tokens to the end of the text."""
        known = self._token_ids
        for token_id in token_ids:
            for length in LENGTHS:
                if len(known) >= length:
                    self._following[tuple(known[-length:])] = len(known)
            known.append(token_id)

    def draft(self, count: int) -> list[int]:
        """A guess of the next `count` tokens; none where the newest one never occurred before.

        A guess that reaches the end of the text repeats itself.
        """
        for length in LENGTHS:
            start = self._following.get(tuple(self._token_ids[-length:]))
            if start is not None:
                text = self._token_ids[start:]
                return [text[i % len(text)] for i in range(count)]
        return []
