"""Gemma's vocabularies, in tokenizer.model or in tokenizer.json, with one interface.

Both yield the same ids, except for text that has a run of five spaces or more or "▁" itself: the
tokenizers package cuts that otherwise than SentencePiece (tests/tokenizer/test_codec.py has the
cases).
"""

import codecs
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from reprlib import repr as shorten
from typing import NamedTuple

from gemcut.tokenizer.added_tokens import AddedToken

# Python's "replace" puts one U+FFFD for a whole truncated character; SentencePiece puts one a byte
MARK_EACH_BYTE = "gemcut.mark_each_byte"


def _mark_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(MARK_EACH_BYTE, _mark_each_byte)

START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"
NAMED = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Segment(NamedTuple):
    """The ids of one text, and the range of characters of each, as (start, end)."""

    ids: list[int]
    offsets: list[tuple[int, int]]

    def add(self, ids: list[int], offsets: list[tuple[int, int]], start: int) -> None:
        """Append the tokens of the text that begins at the character `start`."""
        self.ids.extend(ids)
        self.offsets.extend([(start + a, start + b) for a, b in offsets] if start else offsets)


class Vocabulary(ABC):
    """Pieces and ids; `encode` makes a token of each literal in a text, whoever wrote it.

    Attributes: `source`, as errors name it; `pieces` by id; `base_size`, their number without
    tokens added after the others; `named`, the file's "bos_token" and the like; `special_ids`,
    which skip_special_tokens hides; `literals`, the tokens that a text spells as wholes and that
    may be markers; `added`, those that were added, with their options.
    """

    file_name: str

    def __init__(self, source: str, ids: dict[str, int], base_size: int) -> None:
        self.source, self._ids, self.base_size = source, ids, base_size
        self.pieces = _by_id(ids, source)
        self.named: dict[str, str] = {}
        self.special_ids: set[int] = set()
        self.literals: dict[str, int] = {}
        self.added: dict[int, AddedToken] = {}

    def id_of(self, piece: str) -> int | None:
        """The id of a piece, None where there is none."""
        return self._ids.get(piece)

    @property
    def added_tokens(self) -> dict[int, AddedToken]:
        """All tokens that a text spells as wholes, those of the file too."""
        return self.added

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text."""

    @abstractmethod
    def encode_with_offsets(self, text: str) -> Segment:
        """The ids of a text, and the characters of each."""

    def added_around(self) -> tuple[bool, bool]:
        """Whether the file puts BOS before a text, and EOS after it."""
        return True, False

    @abstractmethod
    def save(self, path: Path, before: Sequence[str], after: Sequence[str]) -> None:
        """Write the file; these pieces are put around a text."""

    def add(self, tokens: Iterable[AddedToken]) -> None:
        """Add tokens after the others, or give pieces the options of a token."""
        for token in tokens:
            token_id = self._place(token)
            self.literals[token.content] = token_id
            self.added[token_id] = replace(token, id=token_id)
            (self.special_ids.add if token.special else self.special_ids.discard)(token_id)

    def _place(self, token: AddedToken) -> int:
        """The id of a token, appended to the pieces if it is new; ValueError where files clash."""
        if token.special and len(token.content) == 1:
            raise ValueError(
                f"special token {shorten(token.content)} has one letter, as any text may"
            )
        there, size = self.id_of(token.content), len(self.pieces)
        added = f"token {shorten(token.content)} is added at id {token.id}"
        if there is not None:
            if token.id not in (None, there):
                raise ValueError(f"{added}, but {self.source} has it at {there}")
            return there
        if token.id is not None and token.id < size:
            raise ValueError(f"{added}, where {self.source} has {shorten(self.pieces[token.id])}")
        if token.id is not None and token.id > size:
            raise ValueError(
                f"{added}, which leaves a gap after {size - 1}, the last of {self.source}"
            )
        self.pieces.append(token.content)
        self._ids[token.content] = size
        return size


def text_of(pieces: Iterable[str]) -> str:
    """The text that pieces spell: bytes are joined first, and each bad one becomes U+FFFD."""
    return b"".join(map(bytes_of, pieces)).decode("utf-8", MARK_EACH_BYTE)


def bytes_of(piece: str) -> bytes:
    """The bytes that a piece adds to a text."""
    if piece[:1] == "<" and (byte := BYTE.fullmatch(piece)):
        return bytes.fromhex(byte[1])
    return piece.replace("▁", " ").encode()


def _by_id(ids: Mapping[str, int], source: str) -> list[str]:
    """The pieces in the order of their ids, which must be 0, 1, 2 and so on."""
    pieces = [""] * len(ids)
    if set(ids.values()) == set(range(len(ids))):
        for piece, i in ids.items():
            pieces[i] = piece
        return pieces
    pieces = sorted(ids, key=ids.__getitem__)
    for i, piece in enumerate(pieces):
        if ids[piece] < i:
            twins = f"{shorten(pieces[i - 1])} and {shorten(piece)}"
            raise ValueError(f"{source} has id {ids[piece]} twice: for {twins}")
        if ids[piece] > i:
            raise ValueError(
                f"{source} has no token of id {i}, but {shorten(piece)} at {ids[piece]}"
            )
    return pieces


def read_file(path: str | os.PathLike[str]) -> bytes:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read vocabulary {path}: {error.strerror}") from error
    if not content:
        raise ValueError(f"vocabulary {path} is empty")
    if content.startswith(b"version https://git-lfs"):
        raise ValueError(f"vocabulary {path} is a git-lfs pointer; `git lfs pull` fetches it")
    return content
