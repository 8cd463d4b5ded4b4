"""A vocabulary in a tokenizer.model, merged by SentencePiece."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from gemcut.tokenizer.added_tokens import AddedToken, Literals
from gemcut.tokenizer.vocabularies import (
    BYTE,
    END_OF_TURN,
    NAMED,
    START_OF_TURN,
    Segment,
    Vocabulary,
    read_file,
)


class SentencePieceVocabulary(Vocabulary):
    """A tokenizer.model, read by SentencePiece, and tokens added to it.

    `dropout` is the share of BPE's merges that each encoding skips at random (Provilkov et al.,
    2020): the ids of a text then differ from call to call, and all of them decode to it.
    """

    file_name = "tokenizer.model"

    def __init__(self, model: bytes, source: str = "vocabulary", *, dropout: float = 0.0) -> None:
        """From the bytes of a tokenizer.model; `source` names them in errors."""
        self._options = _sampling(dropout) if dropout else {}
        try:
            self._processor = SentencePieceProcessor(model_proto=model)
            ids = list(range(self._processor.get_piece_size()))
            pieces: list[str] = self._processor.id_to_piece(ids)
        except (RuntimeError, UnicodeDecodeError) as error:
            raise ValueError(f"{source} is not a SentencePiece model, or is damaged") from error
        super().__init__(source, dict(zip(pieces, ids, strict=True)), len(ids))
        for name in NAMED:
            token_id = getattr(self._processor, name.replace("token", "id"))()
            if token_id < 0:
                raise ValueError(f"{source} has no {name[:3]} piece; Gemma's have one")
            self.named[name] = pieces[token_id]
        # Anything else (Llama's vocabulary puts a space in front) would break the cutting of text
        # into parts, and decode would not give the text back.
        if self._processor.normalize("  ﬁ  a ") != "▁▁ﬁ▁▁a▁":
            raise ValueError(f"{source} alters text before encoding it; Gemma's do not")

        hidden = (*self.named.values(), START_OF_TURN, END_OF_TURN)
        self.special_ids = {self._ids[piece] for piece in hidden if piece in self._ids}
        is_control = self._processor.is_control(ids)
        self._control = {*(i for i in ids if is_control[i]), self._processor.unk_id()}
        self._whole = self._control | _user_defined(model)
        self.literals = {pieces[i]: i for i in sorted(self._whole)}
        self._finder: Literals | None = None

    @classmethod
    def from_file(
        cls, path: str | os.PathLike[str], *, dropout: float = 0.0
    ) -> "SentencePieceVocabulary":
        """The vocabulary in a tokenizer.model file."""
        return cls(read_file(path), f"vocabulary {path}", dropout=dropout)

    @property
    def added_tokens(self) -> dict[int, AddedToken]:
        """All tokens that a text spells as wholes, those of the file too."""
        special = self.special_ids
        in_file = {
            i: AddedToken(self.pieces[i], i, special=i in special, normalized=False)
            for i in sorted(self._whole)
        }
        return in_file | self.added

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        begin = 0
        for start, end, token_id in self._literals().find(text):
            if begin < start:
                ids += self._processor.encode(text[begin:start], **self._options)
            ids.append(token_id)
            begin = end
        return ids + self._processor.encode(text[begin:], **self._options)

    def encode_with_offsets(self, text: str) -> Segment:
        segment = Segment([], [])
        begin = 0
        for start, end, token_id in self._literals().find(text):
            self._merge_with_offsets(segment, text[begin:start], begin)
            segment.ids.append(token_id)
            segment.offsets.append((start, end))
            begin = end
        self._merge_with_offsets(segment, text[begin:], begin)
        return segment

    def _merge_with_offsets(self, segment: Segment, text: str, begin: int) -> None:
        ids = self._processor.encode(text, **self._options)
        segment.add(ids, _spans(text, [self.pieces[i] for i in ids]), begin)

    def _literals(self) -> Literals:
        if self._finder is None:  # made when first needed: Gemma 3 has 6 000 control pieces
            # SentencePiece never finds control pieces in a text; user-defined ones it finds itself,
            # but these may overlap with tokens that it does not know
            found = self.added_tokens
            if not self.added:
                found = {i: found[i] for i in self._control}
            self._finder = Literals(found)
        return self._finder

    def add(self, tokens: Iterable[AddedToken]) -> None:
        """Add tokens after the others, or give pieces the options of a token."""
        super().add(tokens)
        self._finder = None

    def save(self, path: Path, before: Sequence[str], after: Sequence[str]) -> None:
        """Write the file; tokenizer_config.json has the added tokens, and those around a text."""
        path.write_bytes(self._processor.serialized_model_proto())


def _sampling(dropout: float) -> dict[str, Any]:
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout {dropout!r} is no share from 0 to 1")
    # nbest_size -1: SentencePiece requires it, though BPE has no list of the best
    return {"enable_sampling": True, "nbest_size": -1, "alpha": dropout}


def _spans(text: str, pieces: Sequence[str]) -> list[tuple[int, int]]:
    """The range of characters of each piece; every byte piece of a character has that character."""
    spans: list[tuple[int, int]] = []
    start = bytes_left = 0
    for piece in pieces:
        if BYTE.fullmatch(piece):
            bytes_left = (bytes_left or len(text[start].encode())) - 1
            spans.append((start, start + 1))
            start += bytes_left == 0
            continue
        end = start + len(piece)
        if text[start:end].replace(" ", "▁") != piece.replace(" ", "▁"):
            raise NotImplementedError(
                "return_offsets_mapping needs a vocabulary that has byte pieces: "
                f"a character near {start} is unknown to this one"
            )
        spans.append((start, end))
        start = end
    return spans


def _user_defined(model: bytes) -> set[int]:
    """The ids of the user-defined pieces in the bytes of a tokenizer.model."""
    found: set[int] = set()
    at = number = 0
    while at < len(model) and model[at] == 0x0A:  # field 1 of the file: a piece
        size, at = (model[at + 1], at + 2) if model[at + 1] < 0x80 else _varint(model, at + 1)
        # its last field, 3, is its type: 4
        if model[at + size - 1] == 4 and model[at + size - 2] == 0x18:
            found.add(number)
        at, number = at + size, number + 1
    return found


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of protobuf's, and the place after it."""
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            return value, at
