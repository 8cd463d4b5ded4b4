"""Gemma's vocabularies, read from tokenizer.model or from tokenizer.json, with one interface.

Both yield the same ids, except for text that has a run of five spaces or more or "▁" itself: the
tokenizers package cuts that otherwise than SentencePiece (tests/tokenizer/test_codec.py has the
cases).
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from gemcut.tokenizer import Tokenizer
from gemcut.tokenizer.codec import END_OF_TURN, MARK_EACH_BYTE, START_OF_TURN, check_text

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Segment(NamedTuple):
    """The ids of one text, and the range of characters of each, as (start, end)."""

    ids: list[int]
    offsets: list[tuple[int, int]]


class Vocabulary(Protocol):
    """Pieces and ids; `parse_special` turns the literals of `special_ids` into their ids.

    Without `parse_special` no text yields a special id: a chat relies on that.
    """

    file_name: str
    pieces: list[str]
    base_size: int  # without the tokens that a tokenizer.json adds after the others
    special_ids: frozenset[int]
    bos_id: int
    start_of_turn_id: int | None
    end_of_turn_id: int | None

    def id_of(self, piece: str) -> int | None: ...

    def encode(self, text: str, *, add_bos: bool, parse_special: bool = False) -> list[int]: ...

    def encode_with_offsets(self, text: str, *, parse_special: bool) -> Segment: ...

    def save(self, path: Path, before: Sequence[str], after: Sequence[str]) -> None: ...


class SentencePieceVocabulary:
    """A tokenizer.model, read by gemcut's own codec."""

    file_name = "tokenizer.model"

    def __init__(self, path: str | os.PathLike[str], dropout: float = 0.0):
        self.codec = Tokenizer.from_file(path, dropout=dropout)
        self.base_size = len(self.codec)
        self.pieces = [self.codec.piece(i) for i in range(self.base_size)]
        self.special_ids = self.codec.special_ids
        self.added_ids = self.special_ids | user_defined(self.codec.serialized())
        self.bos_id = self.codec.bos_id
        self.start_of_turn_id = self.codec.start_of_turn_id
        self.end_of_turn_id = self.codec.end_of_turn_id

    def id_of(self, piece: str) -> int | None:
        return self.codec.id_of(piece)

    def encode(self, text: str, *, add_bos: bool, parse_special: bool = False) -> list[int]:
        return self.codec.encode(text, add_bos=add_bos, parse_special=parse_special)

    def encode_with_offsets(self, text: str, *, parse_special: bool) -> Segment:
        ids = self.encode(text, add_bos=False, parse_special=parse_special)
        return Segment(ids, _offsets(text, [self.pieces[i] for i in ids]))

    def save(self, path: Path, before: Sequence[str], after: Sequence[str]) -> None:
        # tokenizer_config.json says which tokens are put around a text
        path.write_bytes(self.codec.serialized())


class JsonVocabulary:
    """A tokenizer.json, read by the tokenizers package; its special tokens are those it marks."""

    file_name = "tokenizer.json"

    def __init__(self, path: str | os.PathLike[str], dropout: float = 0.0):
        self._backend = _read_json(path)
        self._backend.no_truncation()
        self._backend.no_padding()
        size = self._backend.get_vocab_size(with_added_tokens=True)
        self.base_size = self._backend.get_vocab_size(with_added_tokens=False)
        self.pieces = [self._backend.id_to_token(i) or "" for i in range(size)]
        probe = "  a  b "
        if self.text_of(self._backend.encode(probe, add_special_tokens=False).ids) != probe:
            raise ValueError(f"{path} alters spaces; Gemma's vocabularies keep them")
        added = self._backend.get_added_tokens_decoder()
        self.added_ids = frozenset(added)
        markers = (self.id_of(START_OF_TURN), self.id_of(END_OF_TURN))
        special = {i for i, token in added.items() if token.special}
        special |= {i for i in markers if i is not None}
        self.special_ids = frozenset(special)
        bos_id = self.id_of("<bos>")
        if bos_id is None:
            raise ValueError(f"{path} has no '<bos>'; Gemma's vocabularies have one")
        self.bos_id = bos_id
        self.start_of_turn_id, self.end_of_turn_id = markers
        # Its merges may spell a special token from plain text, so every literal is cut in two.
        inside = [_inside(self.pieces[i]) for i in sorted(special)]
        self._inside_literal = re.compile("|".join(inside) or "(?!)")
        if dropout:
            self._backend.model.dropout = dropout

    def id_of(self, piece: str) -> int | None:
        return self._backend.token_to_id(piece)

    def encode(self, text: str, *, add_bos: bool, parse_special: bool = False) -> list[int]:
        ids = self.encode_with_offsets(text, parse_special=parse_special).ids
        return [self.bos_id, *ids] if add_bos else ids

    def encode_with_offsets(self, text: str, *, parse_special: bool) -> Segment:
        check_text(text)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        start = 0
        for part in [text] if parse_special else self._inside_literal.split(text):
            encoding = self._backend.encode(part, add_special_tokens=False)
            ids += encoding.ids
            offsets += [(start + begin, start + end) for begin, end in encoding.offsets]
            start += len(part)
        return Segment(ids, offsets)

    def text_of(self, ids: Sequence[int]) -> str:
        return text_of([self.pieces[i] for i in ids])

    def added_around(self) -> tuple[bool, bool]:
        """Whether the file's own post-processor puts a token before a text, and one after it."""
        ids = self._backend.encode("a", add_special_tokens=True).ids
        inner = self._backend.encode("a", add_special_tokens=False).ids
        return ids[: len(inner)] != inner, ids[-len(inner) :] != inner

    def save(self, path: Path, before: Sequence[str], after: Sequence[str]) -> None:
        """Write the file, with a post-processor that puts these pieces around each text."""
        first, second = (
            [
                *({"SpecialToken": {"id": piece, "type_id": i}} for piece in before),
                {"Sequence": {"id": "AB"[i], "type_id": i}},
                *({"SpecialToken": {"id": piece, "type_id": i}} for piece in after),
            ]
            for i in range(2)
        )
        content = json.loads(self._backend.to_str())
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": first,
            "pair": first + second,
            "special_tokens": {
                piece: {"id": piece, "ids": [self.id_of(piece)], "tokens": [piece]}
                for piece in (*before, *after)
            },
        }
        text = json.dumps(content, indent=2, ensure_ascii=False)
        path.write_text(text, encoding="utf-8")


def text_of(pieces: Sequence[str]) -> str:
    """The text that pieces spell: bytes are joined first, and each bad one becomes U+FFFD."""
    found = [(piece, _BYTE.fullmatch(piece)) for piece in pieces]
    data = [
        bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()
        for piece, byte in found
    ]
    return b"".join(data).decode("utf-8", MARK_EACH_BYTE)


def _inside(literal: str) -> str:
    """A pattern of the empty place after a literal's first letter."""
    return f"(?<={re.escape(literal[0])})(?={re.escape(literal[1:])})"


def inside_special_literals(vocabulary: Vocabulary) -> re.Pattern[str]:
    """A pattern of the empty places in a text where a special token's literal must be cut."""
    literals = [vocabulary.pieces[i] for i in sorted(vocabulary.special_ids)]
    return re.compile("|".join(map(_inside, literals)) or "(?!)")


def _offsets(text: str, pieces: Sequence[str]) -> list[tuple[int, int]]:
    """The range of characters of each piece; every byte piece of a character has that character."""
    offsets: list[tuple[int, int]] = []
    start = bytes_left = 0
    for piece in pieces:
        if _BYTE.fullmatch(piece):
            bytes_left = (bytes_left or len(text[start].encode())) - 1
            offsets.append((start, start + 1))
            start += bytes_left == 0
            continue
        end = start + len(piece)
        if text[start:end].replace(" ", "▁") != piece.replace(" ", "▁"):
            raise NotImplementedError(
                "return_offsets_mapping needs a vocabulary that has byte pieces: "
                f"a character near {start} is unknown to this one"
            )
        offsets.append((start, end))
        start = end
    return offsets


def _read_json(path: str | os.PathLike[str]) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            f"{path} is read by the tokenizers package: pip install tokenizers"
        ) from error
    if not os.path.isfile(path):
        raise ValueError(f"cannot read vocabulary {path}: no such file")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # it raises no narrower type
        raise ValueError(f"vocabulary {path} is not a tokenizer.json: {error}") from error


def user_defined(model: bytes) -> frozenset[int]:
    """The ids of the user-defined pieces in the bytes of a tokenizer.model."""
    found, at, number = set(), 0, 0
    while at < len(model) and model[at] == 0x0A:  # field 1 of the file: a piece
        size, at = _varint(model, at + 1)
        # its last field, 3, is its type: 4
        if model[at + size - 2 : at + size] == b"\x18\x04":
            found.add(number)
        at, number = at + size, number + 1
    return frozenset(found)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of protobuf's, and the place after it."""
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            return value, at
