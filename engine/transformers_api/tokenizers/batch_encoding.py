"""BatchEncoding, a tokenizer's result: named rows of integers, as lists or as tensors."""

from collections import UserDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gemcut.engine.transformers_api.tokenizers.rows import (
    CharSpan,
    Encoding,
    TokenSpan,
)

TENSORS = ("pt", "np", "jax")


class BatchEncoding(UserDict):
    """A mapping of input_ids, attention_mask and other rows asked for: `model(**encoding)`.

    `encoding.input_ids` is `encoding["input_ids"]`, a slice takes these rows of all entries, and
    `data` is the plain dict.  From a tokenizer's call, `encoding[0]` is the `Encoding` of the first
    row, and the methods below find tokens, words and characters.  They take the row's number
    first, which may be left out: `char_to_token(5)` is `char_to_token(0, 5)`.
    """

    def __init__(
        self,
        data: Mapping[str, Any] | None = None,
        encoding: Encoding | Sequence[Encoding] | None = None,
        tensor_type: str | None = None,
        prepend_batch_axis: bool = False,
        n_sequences: int | None = None,
    ):
        super().__init__(data)
        encodings = [encoding] if isinstance(encoding, Encoding) else encoding
        self._encodings = None if encodings is None else list(encodings)
        self._n_sequences = n_sequences
        self.convert_to_tensors(tensor_type, prepend_batch_axis)

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            return self.data[key]
        if isinstance(key, slice):
            return {name: value[key] for name, value in self.data.items()}
        if isinstance(key, int) and self._encodings is not None:
            return self._encodings[key]
        raise KeyError(f"{key!r} is no name, slice or row; names are {sorted(self.data)}")

    def __getattr__(self, name: str) -> Any:
        # not self.data: during a copy or an unpickling there is none yet, and this would recurse
        data = self.__dict__.get("data", {})
        if name in data:
            return data[name]
        raise AttributeError(f"BatchEncoding has no {name!r}; it holds {sorted(data)}")

    @property
    def encodings(self) -> list[Encoding] | None:
        """The record of each row; None where this is no tokenizer's call's."""
        return self._encodings

    @property
    def is_fast(self) -> bool:
        """Whether there are records of rows."""
        return self._encodings is not None

    @property
    def n_sequences(self) -> int | None:
        """1 where each row has one text, 2 where it has a pair; None where it is not known."""
        if self._n_sequences is None and self._encodings:
            return self._encodings[0].n_sequences
        return self._n_sequences

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The pieces of one row, padding included."""
        return self._row("tokens", batch_index).tokens

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token of one row, 0 or 1 for the first text or its pair; None where added."""
        return self._row("sequence_ids", batch_index).sequence_ids

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token of one row, the number of its word in its text; None where added.

        Words are the caller's under `is_split_into_words`.  Otherwise Gemma's tokenizers have none
        but what stands between two added tokens, such as a newline, and those tokens themselves.
        """
        return self._row("word_ids", batch_index).word_ids

    def token_to_sequence(
        self, batch_or_token_index: int, token_index: int | None = None
    ) -> int | None:
        """0 or 1, the text that a token is from; None where it was added."""
        row, token = self._place("token_to_sequence", batch_or_token_index, token_index)
        return row.token_to_sequence(token)

    def token_to_word(
        self, batch_or_token_index: int, token_index: int | None = None
    ) -> int | None:
        """The word that a token is from; None where it was added."""
        row, token = self._place("token_to_word", batch_or_token_index, token_index)
        return row.token_to_word(token)

    def token_to_chars(
        self, batch_or_token_index: int, token_index: int | None = None
    ) -> CharSpan | None:
        """The characters of a token, as (start, end); None where it was added."""
        row, token = self._place("token_to_chars", batch_or_token_index, token_index)
        return row.token_to_chars(token)

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The first token that holds a character; None where no token does."""
        row, char = self._place("char_to_token", batch_or_char_index, char_index)
        return row.char_to_token(char, sequence_index)

    def char_to_word(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The word that holds a character; None where no token does."""
        row, char = self._place("char_to_word", batch_or_char_index, char_index)
        return row.char_to_word(char, sequence_index)

    def word_to_tokens(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> TokenSpan | None:
        """The tokens of a word, as (start, end); None where it has none."""
        row, word = self._place("word_to_tokens", batch_or_word_index, word_index)
        return row.word_to_tokens(word, sequence_index)

    def word_to_chars(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> CharSpan | None:
        """The characters of a word, as (start, end); None where it has no token."""
        row, word = self._place("word_to_chars", batch_or_word_index, word_index)
        return row.word_to_chars(word, sequence_index)

    def _place(self, name: str, batch_or_index: int, index: int | None) -> tuple[Encoding, int]:
        if index is None:
            return self._row(name, 0), batch_or_index
        return self._row(name, batch_or_index), index

    def _row(self, name: str, batch_index: int) -> Encoding:
        if self._encodings is None:
            raise ValueError(f"{name}() needs an encoding that came from a tokenizer's call")
        return self._encodings[batch_index]

    def convert_to_tensors(
        self, tensor_type: str | None = None, prepend_batch_axis: bool = False
    ) -> "BatchEncoding":
        """Itself, its lists turned into tensors in place: "pt", "np" or "jax"; None leaves them."""
        if tensor_type is None:
            return self
        check_tensor_type(tensor_type)
        for name, value in self.data.items():
            if not isinstance(value, list | tuple):
                continue
            rows = [value] if prepend_batch_axis else value
            try:
                array = np.array(_with_lists(rows))
            except ValueError:
                array = np.array(None)
            if array.dtype == object:
                raise ValueError(
                    f"the rows of {name!r} differ in length, so they are no tensor: "
                    "use padding=True, and truncation=True with max_length"
                )
            # an empty list has no dtype of its own: numpy would say float64
            array = array.astype(np.int64) if array.size == 0 else array
            self.data[name] = _tensor(array, tensor_type)
        return self

    def to(self, device: Any, *, non_blocking: bool = False) -> "BatchEncoding":
        """Itself, its torch tensors moved to a device in place.

        A torch.dtype is accepted too, and changes floating tensors only, as in transformers'
        feature extractors: ids stay integers.
        """
        for name, value in self.data.items():
            if not isinstance(value, torch.Tensor):
                kind = type(value).__name__
                raise ValueError(
                    f"to({device!r}) moves torch tensors, and {name!r} is a {kind}: "
                    'encode with return_tensors="pt"'
                )
            if not isinstance(device, torch.dtype):
                self.data[name] = value.to(device=device, non_blocking=non_blocking)
            elif value.is_floating_point():
                self.data[name] = value.to(dtype=device)
        return self


def check_tensor_type(tensor_type: Any) -> None:
    """Nothing, or ValueError where no tensor of that name can be made."""
    if tensor_type not in TENSORS:
        known = ", ".join(map(repr, TENSORS))
        raise ValueError(f"return_tensors {tensor_type!r} is not supported; known are {known}")


def _with_lists(rows: Any) -> Any:
    """The same rows, with tensors in them as lists."""
    if isinstance(rows, list | tuple):
        return [_with_lists(row) for row in rows]
    return rows.tolist() if hasattr(rows, "tolist") else rows


def _tensor(array: np.ndarray, tensor_type: str) -> Any:
    if tensor_type == "np":
        return array
    if tensor_type == "pt":
        return torch.from_numpy(array)
    try:
        import jax.numpy as jnp
    except ImportError as error:
        raise ImportError('return_tensors="jax" needs jax: pip install jax') from error
    return jnp.asarray(array.astype(np.int32))  # jax's own default: its int64 must be switched on
