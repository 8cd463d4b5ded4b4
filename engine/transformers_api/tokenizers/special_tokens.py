"""Special tokens by name, pieces by id, and the tokens put around an encoded text."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

from gemcut.tokenizer import Tokenizer
from gemcut.tokenizer.tokenizer_files import token_content

NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token")


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
        tokens.named[self.name] = None if token is None else tokens.known(self.name, token)


class _NamedId:
    """The id of a special token, None where there is none; can be set to another piece's id."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name.removesuffix("_id")

    @overload
    def __get__(self, tokens: None, owner: type) -> "_NamedId": ...

    @overload
    def __get__(self, tokens: "SpecialTokens", owner: type) -> int | None: ...

    def __get__(self, tokens: "SpecialTokens | None", owner: type) -> "int | _NamedId | None":
        if tokens is None:
            return self
        piece = tokens.named[self.name]
        return None if piece is None else tokens.id_of(piece)

    def __set__(self, tokens: "SpecialTokens", token_id: int | None) -> None:
        piece = None if token_id is None else tokens.piece_of(token_id)
        tokens.named[self.name] = piece


class SpecialTokens:
    """The part of a tokenizer that knows pieces and ids, but no text.

    `bos_token` and its like can be set, as can `bos_token_id`: to pieces of the vocabulary only,
    for Gemma's embedding has no row for a new one.  The tokens put around a text change when
    `update_post_processor()` is called, as in transformers' fast tokenizers.
    """

    bos_token, bos_token_id = _NamedToken(), _NamedId()
    eos_token, eos_token_id = _NamedToken(), _NamedId()
    unk_token, unk_token_id = _NamedToken(), _NamedId()
    pad_token, pad_token_id = _NamedToken(), _NamedId()
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
        self.named: dict[str, str | None] = dict.fromkeys(NAMES)
        for name, token in named.items():
            self.named[name] = None if token is None else self.known(name, token)
        if extra is None:
            pieces = [vocabulary.pieces[i] for i in sorted(vocabulary.special_ids)]
            extra = [piece for piece in pieces if piece not in self.named.values()]
        elif isinstance(extra, str):
            raise ValueError(f"extra_special_tokens is a list of tokens, got {extra!r}")
        tokens = extra.values() if isinstance(extra, Mapping) else extra
        self._extra = [self.known("extra_special_tokens", token) for token in tokens]
        self._add_bos_token, self._add_eos_token = bool(add_bos_token), bool(add_eos_token)
        self.update_post_processor()

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

    def known(self, name: str, token: Any) -> str:
        """The piece of a token, or ValueError where the vocabulary has none."""
        piece = token_content(name, token)
        if self._vocabulary.id_of(piece) is None:
            raise ValueError(
                f"{name} {piece!r} is no piece of the vocabulary, and the model's embedding has no "
                "row for a new one; '<unused0>' and its like are there to be used"
            )
        return piece

    def id_of(self, piece: str) -> int | None:
        """The id of a piece, that of `unk_token` where the vocabulary has no such piece."""
        found = self._vocabulary.id_of(piece)
        return self.unk_token_id if found is None else found

    def piece_of(self, token_id: Any) -> str:
        """The piece of an id, or ValueError where the vocabulary has no such id."""
        size = len(self)
        index = token_id.item() if hasattr(token_id, "item") else token_id
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < size:
            raise ValueError(f"token id {index!r} is no integer from 0 to {size - 1}")
        return self._vocabulary.pieces[index]

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
        skipped = {self._vocabulary.pieces[i] for i in self._skipped()}
        return [piece for piece in pieces if piece not in skipped]

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The named tokens that are set: {"bos_token": "<bos>", ...}."""
        return {name: piece for name, piece in self.named.items() if piece is not None}

    @property
    def extra_special_tokens(self) -> list[str]:
        """Special tokens without a name; Gemma's turn markers where none were given."""
        return list(self._extra)

    @property
    def additional_special_tokens(self) -> list[str]:
        """The former name of `extra_special_tokens`."""
        return list(self._extra)

    @property
    def all_special_tokens(self) -> list[str]:
        """Each special token once, the named ones first."""
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self._extra]))

    @property
    def all_special_ids(self) -> list[int]:
        return self.convert_tokens_to_ids(self.all_special_tokens)

    def _skipped(self) -> frozenset[int]:
        return self._vocabulary.special_ids | frozenset(self.all_special_ids)

    def add_special_tokens(
        self, special_tokens_dict: Mapping[str, Any], replace_extra_special_tokens: bool = True
    ) -> int:
        """Name special tokens that the vocabulary has; 0, the number of new pieces."""
        for name, value in special_tokens_dict.items():
            if name in NAMES:
                self.named[name] = self.known(name, value)
            elif name in ("extra_special_tokens", "additional_special_tokens"):
                kept = [] if replace_extra_special_tokens else self._extra
                self._extra = [*kept, *(self.known(name, token) for token in value)]
            else:
                raise ValueError(f"{name!r} is no special token; known are {', '.join(NAMES)}")
        return 0

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """0, the number of new pieces: each must be in the vocabulary, or it is refused."""
        is_one = isinstance(new_tokens, str | Mapping) or not isinstance(new_tokens, Iterable)
        pieces = [self.known("token", t) for t in ([new_tokens] if is_one else new_tokens)]
        if special_tokens:
            self._extra += [piece for piece in pieces if piece not in self.all_special_tokens]
        return 0

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
