"""Stop strings: which rows of a batch a token has just completed one in.

Matched are the bytes that all tokens of a row spell, special ones by their names and those of the
prompt too, as transformers' class of this name does.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from gemcut.engine.checks import shorten

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class StopStringCriteria:
    """A stopping criterion: ids [B, T] -> bool [B], where the last id completes a stop string.

    tokenizer: any of Gemma's that says the piece of an id, transformers' too.
    """

    def __init__(self, tokenizer: Any, stop_strings: str | Sequence[str]) -> None:
        strings = [stop_strings] if isinstance(stop_strings, str) else stop_strings
        self._stops = [stop.encode("utf-8", "surrogatepass") for stop in strings]
        for name in ("convert_ids_to_tokens", "piece"):
            if self._stops and callable(piece_of := getattr(tokenizer, name, None)):
                self._piece_of = piece_of
                break
        else:
            raise ValueError(
                f"stop_strings need tokenizer=, the model's tokenizer; {shorten(tokenizer)} is none"
            )
        self._known: dict[int, bytes | None] = {}

    def __call__(self, input_ids: Tensor, scores: Any = None, **_: Any) -> Tensor:
        longest = max(map(len, self._stops))
        rows = input_ids[:, -longest:].tolist()
        return torch.tensor([self._ends(row) for row in rows], device=input_ids.device)

    def _ends(self, token_ids: list[int]) -> bool:
        *before, last = [self._bytes_of(token_id) for token_id in token_ids]
        if last is None:
            return False
        if None in before:  # nothing goes on across an id without a piece
            before = before[len(before) - before[::-1].index(None) :]
        text = b"".join(filter(None, before))
        return any(stop in text[max(0, len(text) - len(stop) + 1) :] + last for stop in self._stops)

    def _bytes_of(self, token_id: int) -> bytes | None:
        """What a token spells; None where the tokenizer has no such id."""
        if token_id not in self._known:
            piece: Any = None
            with suppress(ValueError, IndexError):
                piece = self._piece_of(token_id)
            self._known[token_id] = None if piece is None else _spelled(piece)
        return self._known[token_id]


def _spelled(piece: str) -> bytes:
    byte = _BYTE.fullmatch(piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()
