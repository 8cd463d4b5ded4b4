"""Tokenizer: text to token ids and back, by a Gemma vocabulary.

SentencePiece or the tokenizers package finds the ids.  Two rules are added to them:

    Plain text never becomes a marker (added_tokens.py says which tokens are): its literal is cut in
    two and its halves are encoded apart.  In Gemma's vocabularies the turn markers are ordinary
    pieces, which would be matched in a user's text.

    Ids become text through bytes.  A character that the vocabulary lacks is spelled as byte pieces
    (<0xE2> <0x82> <0xAC>), so bytes are joined first, and the whole is then read as UTF-8.
"""

import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from re import Pattern
from reprlib import repr as shorten

import numpy as np

from gemcut.tokenizer import chat_templates
from gemcut.tokenizer.added_tokens import AddedToken, inside, markers
from gemcut.tokenizer.json_vocabulary import JsonVocabulary
from gemcut.tokenizer.sentencepiece_vocabulary import SentencePieceVocabulary
from gemcut.tokenizer.tokenizer_files import JSON_FILE, MODEL_FILE, TokenizerFiles
from gemcut.tokenizer.vocabularies import (
    END_OF_TURN,
    MARK_EACH_BYTE,
    NAMED,
    START_OF_TURN,
    Segment,
    Vocabulary,
    bytes_of,
)


class Tokenizer:
    """A vocabulary with its tokens by name: `encode` yields ids, `decode` yields text.

    Attributes: `pad_id`, `eos_id`, `bos_id`, `unk_id`; `start_of_turn_id` and `end_of_turn_id`,
    None where the vocabulary has no such piece; `special_ids`, which `skip_special_tokens` hides;
    `marker_ids`, which plain text never becomes; `chat_template`, the checkpoint's own, or None;
    `add_bos` and `add_eos`, whether its files put them around a text.
    Safe to share between threads while nobody adds tokens, and can be pickled.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        named: Mapping[str, str] | None = None,
        placeholders: Iterable[str] = (),
        chat_template: str | Mapping[str, str] | None = None,
        add_bos: bool | None = None,
        add_eos: bool | None = None,
    ) -> None:
        """Over a vocabulary, with the checkpoint's names where they differ from the vocabulary's.

        named: pieces by "bos_token" and the like.  placeholders: pieces that stand for images or
        sounds, which a language model's embedding may lack.  chat_template: the checkpoint's, or
        several by name.  add_bos, add_eos: where they differ from the vocabulary's.
        """
        self.vocabulary, self.chat_template = vocabulary, chat_template
        self.named_tokens = {**vocabulary.named, **(named or {})}
        for name in NAMED:
            if self.named_tokens.get(name) is None:
                raise ValueError(f"{vocabulary.source} has no {NAMED[name]!r}; Gemma's have one")
        self.pad_id, self.eos_id, self.bos_id, self.unk_id = (
            self._named(name, self.named_tokens[name]) for name in NAMED
        )
        self.placeholder_ids = {self._named("placeholder", piece) for piece in placeholders}
        self.start_of_turn_id = self.id_of(START_OF_TURN)
        self.end_of_turn_id = self.id_of(END_OF_TURN)
        bos, eos = vocabulary.added_around()
        self.add_bos = bos if add_bos is None else add_bos
        self.add_eos = eos if add_eos is None else add_eos
        self._bytes: list[bytes] = []
        self._update()

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, dropout: float = 0.0) -> "Tokenizer":
        """The tokenizer of a checkpoint's folder with all its files, or of a vocabulary's file.

        Of tokenizer.model and tokenizer.json the first is preferred, unless the folder adds tokens
        that it lacks.  `dropout` is that of the vocabularies.
        """
        path = Path(path)
        if path.is_dir():
            return cls.from_files(TokenizerFiles.read(path), dropout=dropout)
        kind = JsonVocabulary if path.suffix == ".json" else SentencePieceVocabulary
        return cls(kind.from_file(path, dropout=dropout))

    @classmethod
    def from_files(cls, files: TokenizerFiles, *, dropout: float = 0.0) -> "Tokenizer":
        """The tokenizer that a checkpoint's files describe; ValueError where they clash."""
        return cls.of_vocabulary(_choose(files, dropout), files)

    @classmethod
    def of_vocabulary(cls, vocabulary: Vocabulary, files: TokenizerFiles) -> "Tokenizer":
        """The tokenizer of a vocabulary to which `files` add their tokens and names."""
        vocabulary.add(files.tokens(vocabulary.added_tokens.values()))
        # a tokenizer.json has its own rule of what is put around a text
        around = files.around if vocabulary.file_name == MODEL_FILE else {}
        return cls(
            vocabulary,
            **around,
            named=files.named,
            placeholders=files.placeholders(vocabulary.literals),
            chat_template=chat_templates.by_name(files.settings.get("chat_template")),
        )

    def __len__(self) -> int:
        return len(self.vocabulary.pieces)

    @property
    def vocab_size(self) -> int:
        """The number of pieces, added ones too."""
        return len(self)

    @property
    def pieces(self) -> list[str]:
        """The pieces by id, as the vocabulary spells them."""
        return self.vocabulary.pieces

    @property
    def added_tokens(self) -> dict[int, AddedToken]:
        """All tokens that a text spells as wholes, by id."""
        return self.vocabulary.added_tokens

    def add_tokens(self, tokens: Iterable[AddedToken]) -> int:
        """The number of new tokens: others are pieces already, and get the options given."""
        before = len(self)
        self.vocabulary.add(tokens)
        self._update()
        return len(self) - before

    def check_embedding(self, num_rows: int) -> None:
        """Nothing, or ValueError where a token has no row in an embedding of so many.

        A placeholder needs none: no text becomes an image or a sound.
        """
        for i in range(num_rows, len(self)):
            if i not in self.placeholder_ids:
                raise ValueError(
                    f"the vocabulary has {len(self)} pieces, but the embedding only {num_rows} "
                    f"rows: none for {shorten(self.pieces[i])}"
                )

    def _update(self) -> None:
        pieces, self.special_ids = self.pieces, frozenset(self.vocabulary.special_ids)
        self._bytes += map(bytes_of, pieces[len(self._bytes) :])
        self._bytes_without_specials = list(self._bytes)
        for i in self.special_ids:
            self._bytes_without_specials[i] = b""
        self._markers = markers(self.vocabulary.literals, self.special_ids)
        self.marker_ids = frozenset(self._markers.values())
        self._inside_marker: Pattern[str] | None = None
        self._texts: list[str] | None = None

    @property
    def texts(self) -> list[str]:
        """What each token is alone, by id; special tokens are their literals."""
        if self._texts is None:  # made when first needed: only log-probabilities show them
            self._texts = [piece.decode("utf-8", MARK_EACH_BYTE) for piece in self._bytes]
        return self._texts

    def _named(self, name: str, piece: str) -> int:
        token_id = self.id_of(piece)
        if token_id is None:
            raise ValueError(f"{name} {shorten(piece)} is no token of {self.vocabulary.source}")
        return token_id

    def save_vocabulary(self, path: Path, before: Sequence[str], after: Sequence[str]) -> None:
        """Write tokenizer.model or tokenizer.json; these pieces are put around a text."""
        self.vocabulary.save(path, before, after)

    def piece(self, token_id: int) -> str:
        """The piece as the vocabulary spells it: "▁the", "<0xE2>", "<bos>"."""
        return self.pieces[self._checked(token_id)]

    def id_of(self, piece: str) -> int | None:
        """The id of a piece, spelled as in the vocabulary; None where there is none."""
        return self.vocabulary.id_of(piece)

    @property
    def inside_marker(self) -> Pattern[str]:
        """The empty places of a text where a marker's literal must be cut."""
        if self._inside_marker is None:  # made when first needed: Gemma 3 has 6 000 markers
            self._inside_marker = inside(self._markers)
        return self._inside_marker

    def encode(
        self,
        text: str,
        *,
        add_bos: bool | None = None,
        add_eos: bool | None = None,
        parse_special: bool = False,
    ) -> list[int]:
        """The ids of text, with BOS and EOS as the checkpoint's files say, or as asked for.

        Who says whether BOS is added gets no EOS unasked.

        A literal "<bos>" or "<start_of_turn>" in it stays text, unless `parse_special` turns every
        literal of `marker_ids` into its id.  A text that then begins with BOS gets no second one:
        two hurt the model as much as none.  "▁" (U+2581) encodes as a space does, by definition of
        SentencePiece; every other text decodes to itself where the vocabulary has byte pieces.
        """
        check_text(text)
        if parse_special:
            ids = self.vocabulary.encode(text)
        else:
            parts = self.inside_marker.split(text)
            ids = [i for part in parts for i in self.vocabulary.encode(part)]
        if add_eos is None:
            add_eos = self.add_eos and add_bos is None
        if (self.add_bos if add_bos is None else add_bos) and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        if add_eos:
            ids.append(self.eos_id)
        return ids

    def encode_with_offsets(self, text: str, *, parse_special: bool = False) -> Segment:
        """The ids of text, without BOS, and the characters of each."""
        check_text(text)
        whole = Segment([], [])
        start = 0
        for part in [text] if parse_special else self.inside_marker.split(text):
            whole.add(*self.vocabulary.encode_with_offsets(part), start)
            start += len(part)
        return whole

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        padding_side: str = "left",
        add_bos: bool | None = None,
        add_eos: bool | None = None,
        parse_special: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids [B, T] int64, padded with `pad_id`, and mask [B, T] bool, true at tokens.

        Left padding, the default, puts every row's next token in the same column.  An empty list is
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
        ids = list(ids)
        try:  # many ids at once: a call for each takes four times as long
            joined = b"".join(map(table.__getitem__, ids))
            if ids and min(ids) < 0:
                raise IndexError
        except (IndexError, TypeError):
            joined = b"".join([table[self._checked(i)] for i in ids])
        return joined.decode("utf-8", MARK_EACH_BYTE)

    def _checked(self, token_id: int) -> int:
        try:
            index = operator.index(token_id)  # also takes numpy's integers
        except TypeError:
            index = -1
        if not 0 <= index < len(self):
            raise ValueError(f"token id {token_id!r} is no integer from 0 to {len(self) - 1}")
        return index


def _choose(files: TokenizerFiles, dropout: float) -> Vocabulary:
    """The vocabulary of a folder: tokenizer.model, unless tokenizer.json alone has its tokens."""
    model, other = files.folder / MODEL_FILE, files.folder / JSON_FILE
    if model.is_file():
        vocabulary = SentencePieceVocabulary.from_file(model, dropout=dropout)
        added = (token.content for token in files.added.values())
        if not other.is_file() or all(vocabulary.id_of(piece) is not None for piece in added):
            return vocabulary
    elif not other.is_file():
        raise ValueError(f"{files.folder} holds neither {MODEL_FILE} nor {JSON_FILE}")
    return JsonVocabulary.from_file(other, dropout=dropout)


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
