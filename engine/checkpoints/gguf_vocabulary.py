"""The tokenizer that a GGUF file's metadata holds, as the files of a checkpoint's folder.

Gemma's is SentencePiece's BPE: `tokenizer.ggml.tokens` are its pieces, with a score and a type
each.  llama.cpp's converter alters three things of a tokenizer.model, which are undone here:

    Spaces of user-defined pieces are spaces, in place of "▁".
    Special tokens are control pieces, turn markers and <unused...> too, where Gemma's own file has
    user-defined ones, which SentencePiece finds in a text.  So has the one made here; of the file's
    control pieces the special ones are kept as such.
    Rows of the embedding that have no piece are named [PAD...].
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from gemcut.engine.checkpoints.gguf_header import GgufHeader
from gemcut.engine.checks import shorten
from gemcut.tokenizer import AddedToken, Tokenizer
from gemcut.tokenizer.added_tokens import OPTIONS
from gemcut.tokenizer.sentencepiece_model import (
    BYTE_PIECE,
    CONTROL,
    TYPES,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    sentencepiece_model,
)
from gemcut.tokenizer.sentencepiece_vocabulary import SentencePieceVocabulary
from gemcut.tokenizer.tokenizer_files import CONFIG_FILE, MODEL_FILE, TokenizerFiles
from gemcut.tokenizer.vocabularies import BYTE, END_OF_TURN, NAMED

KEY = "tokenizer.ggml."
_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
GREATEST_SCORE = float(np.finfo(np.float32).max)
_FILLER = re.compile(r"\[PAD\d+\]")


@dataclass(frozen=True)
class GgufVocabulary:
    """A vocabulary of a GGUF file, whole: `read_vocabulary` makes one."""

    path: Path
    pieces: list[str]  # as SentencePiece spells them
    scores: list[float]
    types: list[int]
    ids: dict[str, int]  # of "bos_token" and the like
    special: frozenset[int]
    settings: Mapping[str, Any]  # of tokenizer_config.json, names apart
    add_dummy_prefix: bool

    @cached_property
    def named(self) -> dict[str, str]:
        """The pieces of "bos_token" and the like."""
        return {name: self.pieces[i] for name, i in self.ids.items()}

    def model(self) -> bytes:
        """The tokenizer.model."""
        return sentencepiece_model(
            self.pieces,
            self.scores,
            self.types,
            self.named,
            add_dummy_prefix=self.add_dummy_prefix,
        )

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, ready for use; ValueError where SentencePiece refuses it."""
        vocabulary = SentencePieceVocabulary(self.model(), f"vocabulary {self.path}")
        return Tokenizer.of_vocabulary(vocabulary, self._files())

    def files(self) -> dict[str, bytes]:
        """tokenizer.model and tokenizer_config.json, as published checkpoints have them."""
        added = {
            str(i): {"content": token.content} | {name: getattr(token, name) for name in OPTIONS}
            for i, token in self._added().items()
        }
        values = {"tokenizer_class": "GemmaTokenizer", "added_tokens_decoder": added}
        config = json.dumps({**self.settings, **self.named, **values}, indent=2, sort_keys=True)
        return {MODEL_FILE: self.model(), CONFIG_FILE: f"{config}\n".encode()}

    def _files(self) -> TokenizerFiles:
        settings = {**self.settings, **self.named}
        return TokenizerFiles(self.path, settings, self._added(), frozenset())

    def _added(self) -> dict[int, AddedToken]:
        whole = (UNKNOWN, CONTROL, USER_DEFINED)
        return {
            i: AddedToken(self.pieces[i], i, special=i in self.special, normalized=False)
            for i, kind in enumerate(self.types)
            if kind in whole
        }


def read_vocabulary(header: GgufHeader) -> GgufVocabulary:
    """The vocabulary of a file; ValueError says in one line what is wrong with it."""
    try:
        return _read(header)
    except _DamagedError as error:
        raise ValueError(f"{header.path}: {error}") from None


def token_keys(header: GgufHeader) -> dict[str, Any]:
    """The ids that config.json holds; none where the file has no vocabulary.

    The ends of a text are its own and, as in llama.cpp, that of a turn.
    """
    pieces = header.get(f"{KEY}tokens", list)
    if not pieces:
        return {}
    try:
        ids = _ids(header, pieces)
        of_turn = _id(header, "eot_token_id", pieces)
    except _DamagedError as error:
        raise ValueError(f"{header.path}: {error}") from None
    named = [pieces.index(piece) for piece in (NAMED["eos_token"], END_OF_TURN) if piece in pieces]
    ends = [ids["eos_token"], *([] if of_turn is None else [of_turn]), *named]
    return {
        "bos_token_id": ids["bos_token"],
        "pad_token_id": ids["pad_token"],
        "eos_token_id": list(dict.fromkeys(ends)),
    }


class _DamagedError(ValueError):
    """What is wrong with a vocabulary, without the file's name."""


def _read(header: GgufHeader) -> GgufVocabulary:
    kind = header.get(f"{KEY}model", str)
    if kind != "llama":
        raise _DamagedError(
            f"{KEY}model is {shorten(kind)}, but Gemma's is 'llama', which is SentencePiece"
        )
    pieces = header.get(f"{KEY}tokens", list)
    if not pieces:
        raise _DamagedError(f"{KEY}tokens is missing")
    scores, types = (_column(header, name, len(pieces)) for name in ("scores", "token_type"))
    count = len(pieces)
    while types[count - 1] == UNUSED and _FILLER.fullmatch(pieces[count - 1]) and count > 1:
        count -= 1
    pieces, scores, types = pieces[:count], scores[:count], types[:count]
    ids = _ids(header, pieces)
    special = {
        i for i, kind in enumerate(types) if kind == CONTROL and pieces[i][:7] != "<unused"
    } | set(ids.values())
    types = [USER_DEFINED if kind == CONTROL else kind for kind in types]
    for name, i in ids.items():
        types[i] = UNKNOWN if name == "unk_token" else CONTROL
    pieces = [
        piece.replace(" ", "▁") if kind == USER_DEFINED else piece
        for piece, kind in zip(pieces, types, strict=True)
    ]
    _check(pieces, scores, types)
    return GgufVocabulary(
        path=header.path,
        pieces=pieces,
        scores=scores,
        types=types,
        ids=ids,
        special=frozenset(special),
        settings=_settings(header),
        add_dummy_prefix=header.get(f"{KEY}add_space_prefix", bool, False),
    )


def _column(header: GgufHeader, name: str, count: int) -> list[Any]:
    """The numbers of `name`, one for each piece."""
    column = header.get(f"{KEY}{name}", np.ndarray)
    if column is None:
        raise _DamagedError(f"{KEY}{name} is missing")
    if len(column) != count:
        raise _DamagedError(f"{KEY}{name} has {len(column)} entries for {count} tokens")
    return column.tolist()


def _ids(header: GgufHeader, pieces: list[str]) -> dict[str, int]:
    """The ids of "bos_token" and the like: by their keys, or else by Gemma's names of them."""
    ids = {name: _id(header, key, pieces) for name, key in _IDS.items()}
    for name, piece in NAMED.items():
        if ids[name] is None and piece not in pieces:
            raise _DamagedError(f"{KEY}{_IDS[name]} is missing, and there is no token {piece}")
    return {name: pieces.index(NAMED[name]) if i is None else i for name, i in ids.items()}


def _id(header: GgufHeader, key: str, pieces: list[str]) -> int | None:
    token_id = header.get(f"{KEY}{key}", int)
    if token_id is not None and not 0 <= token_id < len(pieces):
        raise _DamagedError(f"{KEY}{key} is {token_id}, but there are {len(pieces)} tokens")
    return token_id


def _check(pieces: list[str], scores: list[float], types: list[int]) -> None:
    places: dict[str, int] = {}
    for i, (piece, score, kind) in enumerate(zip(pieces, scores, types, strict=True)):
        place = f"{KEY}tokens[{i}] {shorten(piece)}"
        if not piece:
            raise _DamagedError(f"{KEY}tokens[{i}] is empty")
        if places.setdefault(piece, i) != i:
            raise _DamagedError(f"{place} is there twice, at {places[piece]} too")
        if not abs(score) <= GREATEST_SCORE:  # NaN neither
            raise _DamagedError(f"{place} has the score {score}")
        if kind not in TYPES:
            raise _DamagedError(f"{place} is of type {kind}, which is unknown")
        if kind == BYTE_PIECE and not BYTE.fullmatch(piece):
            raise _DamagedError(f"{place} is a byte by its type, but not by its name")
    if (count := types.count(BYTE_PIECE)) not in (0, 256):
        raise _DamagedError(f"{KEY}token_type has {count} bytes, not 256")
    if types.count(UNKNOWN) > 1:
        raise _DamagedError(f"{KEY}token_type has {types.count(UNKNOWN)} unknown tokens, not one")


def _settings(header: GgufHeader) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "add_bos_token": header.get(f"{KEY}add_bos_token", bool, True),
        "add_eos_token": header.get(f"{KEY}add_eos_token", bool, False),
    }
    template = header.get("tokenizer.chat_template", str)
    return settings if template is None else settings | {"chat_template": template}
