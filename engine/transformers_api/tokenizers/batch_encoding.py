"""BatchEncoding, a tokenizer's result: named rows of integers, as lists or as tensors."""

from collections import UserDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

TENSORS = ("pt", "np", "jax")


class BatchEncoding(UserDict):
    """A mapping of input_ids, attention_mask and other rows asked for: `model(**encoding)`.

    `encoding.input_ids` is `encoding["input_ids"]`, a slice takes these rows of all entries, and
    `data` is the plain dict.  It holds no record of words and characters: `word_ids` and its like
    are refused, and `return_offsets_mapping` gives the characters of each token.
    """

    def __init__(
        self,
        data: Mapping[str, Any] | None = None,
        *,
        tensor_type: str | None = None,
        prepend_batch_axis: bool = False,
        tokens: Sequence[list[str]] | None = None,
        sequence_ids: Sequence[list[int | None]] | None = None,
    ):
        super().__init__(data)
        self._tokens = tokens
        self._sequence_ids = sequence_ids
        self.convert_to_tensors(tensor_type, prepend_batch_axis)

    def __getitem__(self, key: str | slice) -> Any:
        if isinstance(key, str):
            return self.data[key]
        if isinstance(key, slice):
            return {name: value[key] for name, value in self.data.items()}
        raise KeyError(f"{key!r} is neither a name nor a slice; names are {sorted(self.data)}")

    def __getattr__(self, name: str) -> Any:
        # not self.data: during a copy or an unpickling there is none yet, and this would recurse
        data = self.__dict__.get("data", {})
        if name in data:
            return data[name]
        raise AttributeError(f"BatchEncoding has no {name!r}; it holds {sorted(data)}")

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The pieces of one row, padding included."""
        if self._tokens is None:
            raise ValueError("tokens() needs an encoding that came from a tokenizer's call")
        return self._tokens[batch_index]

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token of one row, 0 or 1 for the first text or its pair; None where added."""
        if self._sequence_ids is None:
            raise ValueError("sequence_ids() needs an encoding that came from a tokenizer's call")
        return self._sequence_ids[batch_index]

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """Refused: Gemma's vocabulary has pieces and no words."""
        raise NotImplementedError(
            f"word_ids({batch_index}) is not supported; return_offsets_mapping=True gives each "
            "token's characters"
        )

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
