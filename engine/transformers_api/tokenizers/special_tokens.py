"""Special tokens by name, pieces by id, and the tokens put around an encoded text."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

from gemcut.engine.transformers_api.tokenizers.added_tokens import as_added_token
from gemcut.tokenizer import Tokenizer
from gemcut.tokenizer.added_tokens import AddedToken
from gemcut.tokenizer.tokenizer_files import token_content

NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class _NamedToken:
    """The piece of a special token, None where there is none; can be set to another piece."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, tokens: None, owner: type) -> "_NamedToken": ...

    @overload
    def __get__(self, tokens: "SpecialTokens", owner: type) -> str | None: ...

    def __get__(self, tokens: "SpecialTokens | None", owner: type) -> "str | _NamedToken | None":
        return self if tokens is None else tokens.named[self.name]

    def __set__(self, tokens: "SpecialTokens", token: Any) -> None:
        tokens.set_token(self.name, token)


class _NamedId:
    """The id of a special token, None where there is none; can be set to another piece's id."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, tokens: None, owner: type) -> "_NamedId": ...

    @overload
    def __get__(self, tokens: "SpecialTokens", owner: type) -> int | None: ...

    def __get__(self, tokens: "SpecialTokens | None", owner: type) -> "int | _NamedId | None":
        return self if tokens is None else tokens.token_id(self.name)

    def __set__(self, tokens: "SpecialTokens", token_id: int | None) -> None:
        tokens.set_token_id(self.name, token_id)


class SpecialTokens:
    """The part of a tokenizer that knows pieces and ids, but no text.

    `bos_token` and its like can be set to pieces of the vocabulary, as can `bos_token_id`; so can
    the tokens that a checkpoint names beside them, as Gemma 3 does `image_token`.  New tokens come
    by `add_tokens` and `add_special_tokens`, and have ids behind the vocabulary, for which a model
    has no embedding.  The tokens put around a text change when `update_post_processor()` is
    called, as in transformers' fast tokenizers.
    """

    bos_token, bos_token_id = _NamedToken(), _NamedId()
    eos_token, eos_token_id = _NamedToken(), _NamedId()
    unk_token, unk_token_id = _NamedToken(), _NamedId()
    sep_token, sep_token_id = _NamedToken(), _NamedId()
    pad_token, pad_token_id = _NamedToken(), _NamedId()
    cls_token, cls_token_id = _NamedToken(), _NamedId()
    mask_token, mask_token_id = _NamedToken(), _NamedId()

    def __init__(
        self,
        vocabulary: Tokenizer,
        named: Mapping[str, Any],
        extra: Sequence[Any] | Mapping[str, Any] | None,
        *,
        add_bos_token: bool,
        add_eos_token: bool,
    ):
        self._vocabulary = vocabulary
        if extra is not None and not isinstance(extra, list | tuple | Mapping):
            raise ValueError(
                f"extra_special_tokens is a list or a mapping of tokens, got {extra!r}"
            )
        by_name = dict.fromkeys(NAMES) | dict(named)
        by_name |= extra if isinstance(extra, Mapping) else {}
        tokens = {
            name: None if token is None else as_added_token(name, token, special=True)
            for name, token in by_name.items()
        }
        self.named = {name: None if t is None else t.content for name, t in tokens.items()}
        if extra is None:
            pieces = [vocabulary.pieces[i] for i in sorted(vocabulary.special_ids)]
            extra = [piece for piece in pieces if piece not in self.named.values()]
        elif isinstance(extra, Mapping):
            extra = []
        others = [as_added_token("extra_special_tokens", token, special=True) for token in extra]
        self._extra = [token.content for token in others]
        added = {token.content: token for token in vocabulary.added_tokens.values()}
        given = [token for token in tokens.values() if token is not None]
        special = [replace(added.get(t.content, t), id=None, special=True) for t in given]
        self._add([*special, *(token for token in others if token.content not in added)])
        self._add_bos_token, self._add_eos_token = bool(add_bos_token), bool(add_eos_token)
        self.update_post_processor()

    def __getattr__(self, name: str) -> Any:
        # only for names that are no attributes: those of a checkpoint's own tokens
        named = self.__dict__.get("named", {})
        if name in named:
            return named[name]
        if name.endswith("_id") and name.removesuffix("_id") in named:
            return self.token_id(name)
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(type(self), name) or name.removesuffix("_id") not in self.__dict__.get(
            "named", ()
        ):
            super().__setattr__(name, value)
        elif name.endswith("_id"):
            self.set_token_id(name, value)
        else:
            self.set_token(name, value)

    def set_token(self, name: str, token: Any) -> None:
        """Give a named token another piece, or none."""
        self.named[name] = None if token is None else self._known(name, token)

    def set_token_id(self, name: str, token_id: int | None) -> None:
        """Give a named token the piece of an id; the name ends in "_id"."""
        piece = None if token_id is None else self.piece_of(token_id)
        self.named[name.removesuffix("_id")] = piece

    def token_id(self, name: str) -> int | None:
        """The id of a named token; the name ends in "_id"."""
        piece = self.named[name.removesuffix("_id")]
        return None if piece is None else self.id_of(piece)

    @property
    def SPECIAL_TOKENS_ATTRIBUTES(self) -> list[str]:
        """The names of tokens, a checkpoint's own last."""
        return list(self.named)

    @property
    def vocab_size(self) -> int:
        """The number of pieces, without tokens that a tokenizer.json adds after them."""
        return self._vocabulary.vocabulary.base_size

    def __len__(self) -> int:
        return len(self._vocabulary.pieces)

    def get_vocab(self) -> dict[str, int]:
        """Each piece and its id."""
        return {piece: i for i, piece in enumerate(self._vocabulary.pieces)}

    @property
    def vocab(self) -> dict[str, int]:
        return self.get_vocab()

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """By id, the tokens that a text spells as wholes."""
        return dict(sorted(self._vocabulary.added_tokens.items()))

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """The ids of the tokens that a text spells as wholes."""
        return {token.content: i for i, token in self.added_tokens_decoder.items()}

    def get_added_vocab(self) -> dict[str, int]:
        """The ids of the tokens that a text spells as wholes."""
        return self.added_tokens_encoder

    def _known(self, name: str, token: Any) -> str:
        """The piece of a token, or ValueError where the vocabulary has none."""
        piece = token_content(name, token)
        if self._vocabulary.id_of(piece) is None:
            raise ValueError(
                f"{name} {piece!r} is no piece of the vocabulary; "
                f"add_special_tokens({{{name!r}: {piece!r}}}) adds it"
            )
        return piece

    def id_of(self, piece: str) -> int | None:
        """The id of a piece, that of `unk_token` where the vocabulary has no such piece."""
        found = self._vocabulary.id_of(piece)
        return self.unk_token_id if found is None else found

    def piece_of(self, token_id: Any) -> str:
        """The piece of an id, or ValueError where the vocabulary has no such id."""
        return self._vocabulary.pieces[self.checked_id(token_id)]

    def checked_id(self, token_id: Any) -> int:
        """An id as an int, or ValueError where the vocabulary has no such id."""
        size = len(self)
        index = token_id.item() if hasattr(token_id, "item") else token_id
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < size:
            raise ValueError(f"token id {index!r} is no integer from 0 to {size - 1}")
        return index

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """The id of a piece, or the list of ids of a list; an unknown piece has that of unk."""
        if isinstance(tokens, str):
            return self.id_of(tokens)
        return [self.id_of(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The piece of an id, or the list of pieces of a list of ids."""
        if isinstance(ids, int):
            return self.piece_of(ids)
        pieces = [self.piece_of(i) for i in ids]
        if not skip_special_tokens:
            return pieces
        skipped = set(self.all_special_tokens)
        return [piece for piece in pieces if piece not in skipped]

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The named tokens that are set: {"bos_token": "<bos>", ...}."""
        return {name: piece for name, piece in self.named.items() if piece is not None}

    @property
    def extra_special_tokens(self) -> list[str]:
        """Special tokens without a name; Gemma's turn markers where none were given."""
        return list(self._extra)

    @extra_special_tokens.setter
    def extra_special_tokens(self, tokens: Sequence[Any] | None) -> None:
        self._extra = [self._known("extra_special_tokens", token) for token in tokens or ()]

    # the former name
    additional_special_tokens = extra_special_tokens

    @property
    def extra_special_tokens_ids(self) -> list[int]:
        """The ids of `extra_special_tokens`."""
        return self.convert_tokens_to_ids(self._extra)

    @extra_special_tokens_ids.setter
    def extra_special_tokens_ids(self, ids: Sequence[int] | None) -> None:
        self._extra = [self.piece_of(token_id) for token_id in ids or ()]

    @property
    def all_special_tokens(self) -> list[str]:
        """Each special token once, the named ones first."""
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self._extra]))

    @property
    def all_special_ids(self) -> list[int]:
        return self.convert_tokens_to_ids(self.all_special_tokens)

    def add_special_tokens(
        self, special_tokens_dict: Mapping[str, Any], replace_extra_special_tokens: bool = True
    ) -> int:
        """Name special tokens, new ones too; the number of tokens that were none, or others."""
        by_name = dict(special_tokens_dict)
        if "additional_special_tokens" in by_name:
            by_name.setdefault("extra_special_tokens", by_name.pop("additional_special_tokens"))
        extra = by_name.pop("extra_special_tokens", ())
        if not isinstance(extra, list | tuple):
            raise ValueError(f"extra_special_tokens is a list of tokens, got {extra!r}")
        if unknown := sorted(set(by_name) - set(self.named)):
            raise ValueError(f"{unknown} name no special token; known are {', '.join(self.named)}")
        tokens = {n: as_added_token(n, token, special=True) for n, token in by_name.items()}
        others = [as_added_token("extra_special_tokens", t, special=True) for t in extra]
        if not replace_extra_special_tokens:
            others = [token for token in others if token.content not in self._extra]
        added = self._add([*tokens.values(), *others])
        self.named |= {name: token.content for name, token in tokens.items()}
        if others:
            kept = [] if replace_extra_special_tokens else self._extra
            self._extra = [*kept, *(token.content for token in others)]
        return added

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Add tokens behind the vocabulary; the number of those that were none, or others.

        A piece of the vocabulary becomes an added token, which a text spells as a whole.
        """
        is_one = isinstance(new_tokens, str | Mapping) or not isinstance(new_tokens, Iterable)
        given = [new_tokens] if is_one else new_tokens
        return self._add(
            [
                as_added_token("token", token, special=special_tokens)
                for token in given
                if token != ""
            ]
        )

    def _add(self, tokens: Sequence[AddedToken]) -> int:
        """Add what the vocabulary does not have in this form; how many these are."""
        known = {
            token.content: replace(token, id=None)
            for token in self._vocabulary.added_tokens.values()
        }
        changed = []
        for token in tokens:
            if known.get(token.content) != token:
                changed.append(token)
                known[token.content] = token
        self._vocabulary.add_tokens(changed)
        return len(changed)

    @property
    def add_bos_token(self) -> bool:
        """Whether `bos_token` is put before each text; setting it takes effect at once."""
        return self._add_bos_token

    @add_bos_token.setter
    def add_bos_token(self, value: bool) -> None:
        self._add_bos_token = bool(value)
        self.update_post_processor()

    @property
    def add_eos_token(self) -> bool:
        """Whether `eos_token` is put after each text; setting it takes effect at once."""
        return self._add_eos_token

    @add_eos_token.setter
    def add_eos_token(self, value: bool) -> None:
        self._add_eos_token = bool(value)
        self.update_post_processor()

    def update_post_processor(self) -> None:
        """Make encodings begin and end with the present `bos_token` and `eos_token` from now on."""
        bos, eos = self.bos_token_id, self.eos_token_id
        for name, wanted, token in (
            ("bos", self.add_bos_token, bos),
            ("eos", self.add_eos_token, eos),
        ):
            if wanted and token is None:
                raise ValueError(f"add_{name}_token is True, but {name}_token is None")
        self._prefix = [bos] if self.add_bos_token and bos is not None else []
        self._suffix = [eos] if self.add_eos_token and eos is not None else []

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """The number of tokens around one text, or around a pair."""
        return (len(self._prefix) + len(self._suffix)) * (2 if pair else 1)

    def build_inputs_with_special_tokens(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """The ids of one text, or of a pair, with the tokens around each."""
        texts = [token_ids_0] if token_ids_1 is None else [token_ids_0, token_ids_1]
        return [i for ids in texts for i in [*self._prefix, *ids, *self._suffix]]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """0 for each token of the first text, 1 for each of its pair; those around are included."""
        around = self.num_special_tokens_to_add()
        second = [] if token_ids_1 is None else [1] * (len(token_ids_1) + around)
        return [0] * (len(token_ids_0) + around) + second

    def get_special_tokens_mask(
        self,
        token_ids_0: Sequence[int],
        token_ids_1: Sequence[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for each special token, 0 for others: of these ids, or of the text built of them."""
        if already_has_special_tokens:
            if token_ids_1 is not None:
                raise ValueError("token_ids_1 has no place where already_has_special_tokens is set")
            special = set(self.all_special_ids)
            return [int(int(i) in special) for i in token_ids_0]
        before, after = [1] * len(self._prefix), [1] * len(self._suffix)
        texts = [token_ids_0] if token_ids_1 is None else [token_ids_0, token_ids_1]
        return [flag for ids in texts for flag in [*before, *[0] * len(ids), *after]]
