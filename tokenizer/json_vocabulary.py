"""A vocabulary in a tokenizer.json, merged by the tokenizers package."""

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from reprlib import repr as shorten

from gemcut.tokenizer.added_tokens import OPTIONS, AddedToken
from gemcut.tokenizer.vocabularies import NAMED, Segment, Vocabulary, read_file, text_of

# with it the tokenizers package cuts pieces within a character, and ends the whole process
_PREFIX = re.compile(r'"continuing_subword_prefix"\s*:\s*"[^"]')
_ADDED = re.compile(r'"added_tokens"\s*:\s*(?=\[)')


class JsonVocabulary(Vocabulary):
    """A tokenizer.json, read by the tokenizers package; its special tokens are those it marks."""

    file_name = "tokenizer.json"

    def __init__(self, content: str, source: str = "vocabulary", *, dropout: float = 0.0) -> None:
        """From the text of a tokenizer.json; `source` names it in errors."""
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(
                f"{source} is read by the tokenizers package: pip install tokenizers"
            ) from error
        if _PREFIX.search(content):
            raise ValueError(
                f"{source} has a continuing_subword_prefix, as WordPiece models do, not Gemma's"
            )
        try:
            self._backend = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # it raises no narrower type
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{source} is not a tokenizer.json: {reason}") from error
        kind = type(self._backend.model).__name__
        if kind != "BPE":
            raise ValueError(f"{source} holds a {kind} model; Gemma's are BPE")
        self._backend.no_truncation()
        self._backend.no_padding()
        base_size = self._backend.get_vocab_size(with_added_tokens=False)
        super().__init__(source, self._backend.get_vocab(with_added_tokens=True), base_size)
        self._check_added(content)
        if self._alters_text():
            raise ValueError(f"{source} alters text before encoding it; Gemma's do not")
        self.named = {name: piece for name, piece in NAMED.items() if piece in self._ids}
        super().add(
            AddedToken(token.content, i, **{name: getattr(token, name) for name in OPTIONS})
            for i, token in self._backend.get_added_tokens_decoder().items()
        )
        if dropout:
            self._backend.model.dropout = dropout

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, dropout: float = 0.0) -> "JsonVocabulary":
        """The vocabulary in a tokenizer.json file."""
        source = f"vocabulary {path}"
        try:
            content = read_file(path).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{source} is not a tokenizer.json: {error}") from error
        return cls(content, source, dropout=dropout)

    def _check_added(self, content: str) -> None:
        """ValueError where the file places an added token at an id that tokenizers did not take."""
        found = _ADDED.search(content)
        tokens = json.JSONDecoder().raw_decode(content, found.end())[0] if found else []
        for token in tokens:
            piece, token_id = token["content"], self.id_of(token["content"])
            if not piece:
                raise ValueError(f"{self.source}: the added token of id {token['id']} is empty")
            if token_id != token["id"]:
                raise ValueError(
                    f"{self.source} adds {shorten(piece)} at id {token['id']}, "
                    f"but by its other tokens the id is {token_id}"
                )

    def _alters_text(self) -> bool:
        probe, normalizer = "  A  b ", self._backend.normalizer
        if normalizer is not None and normalizer.normalize_str("ﬁA") != "ﬁA":
            return True
        ids = self._backend.encode(probe, add_special_tokens=False).ids
        return text_of([self.pieces[i] for i in ids]) != probe

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> Segment:
        encoding = self._backend.encode(text, add_special_tokens=False)
        return Segment(encoding.ids, encoding.offsets)

    def add(self, tokens: Iterable[AddedToken]) -> None:
        """Add tokens after the others, or give pieces the options of a token."""
        from tokenizers import AddedToken as BackendToken

        before = dict(self.added)
        super().add(tokens)
        self._backend.add_tokens(
            [
                BackendToken(token.content, **{name: getattr(token, name) for name in OPTIONS})
                for i, token in self.added.items()
                if before.get(i) != token
            ]
        )

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
