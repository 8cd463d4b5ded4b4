"""Tokenizer: text to token ids and back, by a Gemma vocabulary.

SentencePiece finds the ids. Two rules are added to it:

    Plain text never becomes a special token. In Gemma's vocabularies the turn markers are ordinary
    user-defined pieces, which SentencePiece would match in a user's text; such a literal is cut in
    two and its halves are encoded apart.

    Ids become text through bytes. A character that the vocabulary lacks is spelled as byte pieces
    (<0xE2> <0x82> <0xAC>), so bytes are joined first, and the whole is then read as UTF-8.
"""

import codecs
import operator
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceProcessor

START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"

# Python's "replace" puts one U+FFFD for a whole truncated character; SentencePiece puts one a byte
MARK_EACH_BYTE = "gemcut.mark_each_byte"


def _mark_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(MARK_EACH_BYTE, _mark_each_byte)


class Tokenizer:
    """A vocabulary: `encode` yields ids, `decode` yields text.

    Attributes: `vocab_size`; `pad_id`, `eos_id`, `bos_id`, `unk_id`; `start_of_turn_id` and
    `end_of_turn_id`, None where the vocabulary has no such piece; `special_ids`, the control and
    unknown pieces with the turn markers. Safe to share between threads, and can be pickled.
    """

    def __init__(self, model: bytes, source: str = "vocabulary", *, dropout: float = 0.0):
        """From the bytes of a tokenizer.model; `source` names them in errors.

        `dropout` is the share of BPE's merges that each encoding skips at random (Provilkov et al.,
        2020): the ids of a text then differ from call to call, and all of them decode to it.
        """
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout {dropout!r} is no share from 0 to 1")
        # nbest_size -1: SentencePiece requires it, though BPE has no list of the best
        sampling = {"enable_sampling": True, "nbest_size": -1, "alpha": dropout}
        self._options = sampling if dropout else {}
        try:
            self._processor = SentencePieceProcessor(model_proto=model)
            ids = list(range(self._processor.get_piece_size()))
            self._pieces: list[str] = self._processor.id_to_piece(ids)
        except (RuntimeError, UnicodeDecodeError) as error:
            raise ValueError(f"{source} is not a SentencePiece model, or is damaged") from error
        self.vocab_size = len(self._pieces)

        self.pad_id = self._processor.pad_id()
        self.eos_id = self._processor.eos_id()
        self.bos_id = self._processor.bos_id()
        self.unk_id = self._processor.unk_id()
        for name in ("pad", "eos", "bos", "unk"):
            if getattr(self, f"{name}_id") < 0:
                raise ValueError(f"{source} has no {name} piece; Gemma's have one")
        # Anything else (Llama's vocabulary puts a space in front) would break the cutting of text
        # into parts, and decode would not give the text back.
        if self._processor.normalize("  ﬁ  a ") != "▁▁ﬁ▁▁a▁":
            raise ValueError(f"{source} alters text before encoding it; Gemma's do not")

        self.start_of_turn_id = self.id_of(START_OF_TURN)
        self.end_of_turn_id = self.id_of(END_OF_TURN)
        turn_ids = (self.start_of_turn_id, self.end_of_turn_id)
        markers = [i for i in turn_ids if i is not None]
        is_control = self._processor.is_control(ids)
        self.special_ids = frozenset({self.unk_id, *markers, *(i for i in ids if is_control[i])})

        is_byte = self._processor.is_byte(ids)
        self._bytes = [
            bytes([int(piece[1:-1], 16)]) if byte else piece.replace("▁", " ").encode()
            for piece, byte in zip(self._pieces, is_byte, strict=True)
        ]
        self._bytes_without_specials = list(self._bytes)
        for i in self.special_ids:
            self._bytes_without_specials[i] = b""

        self._id_of_literal = {self._pieces[i]: i for i in self.special_ids}
        longest_first = sorted(self._id_of_literal, key=len, reverse=True)
        self._literal = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        # SentencePiece never matches a control piece in text: only the others need a cut, in the
        # empty place after their first letter. (?!) matches nowhere.
        matched = [self._pieces[i] for i in markers if not is_control[i]]
        inside = [f"(?<={marker[0]})(?={marker[1:]})" for marker in matched]
        self._inside_marker = re.compile("|".join(inside) or "(?!)")

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, dropout: float = 0.0) -> "Tokenizer":
        """The vocabulary in a tokenizer.model file, or in a directory that holds one."""
        file = Path(path)
        if file.is_dir():
            file = file / "tokenizer.model"
        try:
            model = file.read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read vocabulary {file}: {error.strerror}") from error
        if not model:
            raise ValueError(f"vocabulary {file} is empty")
        if model.startswith(b"version https://git-lfs"):
            raise ValueError(f"vocabulary {file} is a git-lfs pointer; `git lfs pull` fetches it")
        return cls(model, source=f"vocabulary {file}", dropout=dropout)

    def __len__(self) -> int:
        return self.vocab_size

    def serialized(self) -> bytes:
        """The vocabulary as a tokenizer.model holds it."""
        return self._processor.serialized_model_proto()

    def piece(self, token_id: int) -> str:
        """The piece as the vocabulary spells it: "▁the", "<0xE2>", "<bos>"."""
        return self._pieces[self._checked(token_id)]

    def id_of(self, piece: str) -> int | None:
        """The id of a piece, spelled as in the vocabulary; None where there is none."""
        token_id = self._processor.piece_to_id(piece)  # unknown pieces give unk_id
        return token_id if self._pieces[token_id] == piece else None

    def encode(
        self,
        text: str,
        *,
        add_bos: bool = True,
        add_eos: bool = False,
        parse_special: bool = False,
    ) -> list[int]:
        """The ids of text.

        A literal "<bos>" or "<start_of_turn>" in it stays text, unless `parse_special` turns every
        literal of `special_ids` into its id. A text that then begins with BOS gets no second one:
        two hurt the model as much as none. "▁" (U+2581) encodes as a space does, by SentencePiece's
        definition; every other text decodes to itself where the vocabulary has byte pieces.
        """
        check_text(text)
        ids: list[int] = []
        if parse_special:
            for i, part in enumerate(self._literal.split(text)):
                is_literal = i % 2 == 1  # plain parts and captured literals alternate
                ids += [self._id_of_literal[part]] if is_literal else self._merged(part)
        else:
            for part in self._inside_marker.split(text):
                ids += self._merged(part)
        if add_bos and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        if add_eos:
            ids.append(self.eos_id)
        return ids

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        padding_side: str = "left",
        add_bos: bool = True,
        add_eos: bool = False,
        parse_special: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids [B, T] int64, padded with `pad_id`, and mask [B, T] bool, true at tokens.

        Left padding, the default, puts every row's next token in the same column. An empty list is
        refused: no model takes a batch of no rows.
        """
        if isinstance(texts, str) or not texts:
            raise ValueError(f"texts must be a list of one or more strings, got {texts!r}")
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side is {padding_side!r}; 'left' and 'right' are supported")
        rows = [
            self.encode(text, add_bos=add_bos, add_eos=add_eos, parse_special=parse_special)
            for text in texts
        ]
        width = max(map(len, rows))
        ids = np.full((len(rows), width), self.pad_id, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=bool)
        for i, row in enumerate(rows):
            first = width - len(row) if padding_side == "left" else 0
            ids[i, first : first + len(row)] = row
            mask[i, first : first + len(row)] = True
        return ids, mask

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool = False) -> bytes:
        """The bytes that a token adds to the text; a special token's are its literal, or none."""
        table = self._bytes_without_specials if skip_special_tokens else self._bytes
        return table[self._checked(token_id)]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids, with one U+FFFD for each byte that is no part of valid UTF-8."""
        table = self._bytes_without_specials if skip_special_tokens else self._bytes
        joined = b"".join([table[self._checked(i)] for i in ids])
        return joined.decode("utf-8", MARK_EACH_BYTE)

    def _merged(self, text: str) -> list[int]:
        return self._processor.encode(text, **self._options)

    def _checked(self, token_id: int) -> int:
        try:
            index = operator.index(token_id)  # also takes numpy's integers
        except TypeError:
            index = -1
        if not 0 <= index < self.vocab_size:
            raise ValueError(f"token id {token_id!r} is no integer from 0 to {self.vocab_size - 1}")
        return index


def check_text(text: str) -> None:
    """Nothing, or ValueError where text is no string that UTF-8 can spell."""
    if not isinstance(text, str):
        raise ValueError(f"text must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code_point = f"U+{ord(text[error.start]):04X}"
        raise ValueError(
            f"text has the lone surrogate {code_point} at position {error.start}, "
            "which no UTF-8 can spell"
        ) from None
