"""`past_key_values`: the static cache of a batch, from one call of a model to the next.

The cache holds tokens and no padding: the n-th real token of a row is at position n of its slot,
which is called its rank.  The columns of a batch are what users see: `get_seq_length` counts them,
and masks have one entry for each.  The cache remembers which column a token came from.
"""

from typing import Any

import torch
from torch import Tensor

from gemcut.engine.checks import check_int
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.cache import PREFILL_CHUNK, KVCache

GROWTH = 256  # tokens: caches without a given length are rounded up to a multiple of it


class StaticCache:
    """Keys and values of a batch, in memory that is allocated once.

    `max_cache_len` is the most columns it holds; a call that needs more is refused.  Memory is
    taken when the first call shows the batch's size.  One cache serves one batch and one model.
    """

    def __init__(
        self,
        config: Any = None,
        max_cache_len: int | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        for name, size in (("max_cache_len", max_cache_len), ("max_batch_size", max_batch_size)):
            if size is not None:
                check_int(name, size, 1, 2**31 - 1)
        self.max_cache_len, self.max_batch_size = max_cache_len, max_batch_size
        self.config = config  # a documented argument; the model's own is what counts
        self.kv: KVCache | None = None
        self.runner: Any = None  # generate's Runner, with the graphs captured over these tensors
        self._owner: Any = None  # config, device and dtype of the model whose keys these are
        self.reset()

    def reset(self) -> None:
        """Forget every token; the memory is kept."""
        self._columns = 0
        self._column_of: list[Tensor] = []  # of each row: the column of each of its tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that were computed so far."""
        return self._columns

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """The most columns that it holds; -1 where it grows as needed."""
        return -1 if self.max_cache_len is None else self.max_cache_len

    def __repr__(self) -> str:
        limit = "growing" if self.max_cache_len is None else f"of {self.max_cache_len} columns"
        rows = 0 if self.kv is None else self.kv.num_slots
        return f"<{type(self).__name__} {limit}: {rows} rows, {self._columns} columns used>"

    # For the models

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row holds."""
        return [len(columns) for columns in self._column_of]

    def columns_of(self, row: int) -> Tensor:
        """The column of each token of a row, in order: int64 [n], on the host."""
        return self._column_of[row]

    def prepare(
        self, config: ModelConfig, rows: int, columns: int, device: torch.device, dtype: torch.dtype
    ) -> KVCache:
        """The memory for `rows` and `columns` in all; ValueError where these do not fit."""
        if self.max_cache_len is not None and columns > self.max_cache_len:
            raise ValueError(
                f"the cache is full: it holds {self.max_cache_len} columns, of which "
                f"{self._columns} are used, and {columns - self._columns} more are asked for; "
                f"make one with init_cache(batch_size, {columns}) or more"
            )
        kv = self.kv
        expected = kv.num_slots if kv is not None and self._columns else self.max_batch_size
        if expected is not None and rows != expected:
            raise ValueError(f"the batch has {rows} rows, but the cache is for {expected}")
        owner = config, device, dtype
        if self._columns == 0:
            self._column_of = [torch.empty(0, dtype=torch.int64)] * rows
        elif owner != self._owner:
            raise ValueError(
                "the cache holds keys of another model, or of this one in another place or dtype; "
                "make a new one"
            )
        fits = kv is not None and kv.num_slots == rows and kv.max_seq_len >= columns
        if kv is not None and fits and owner == self._owner:
            return kv
        length = self.max_cache_len or -(-columns // GROWTH) * GROWTH
        if self._columns and self.max_cache_len is None:
            length = max(length, 2 * self._columns)  # so that growing does not copy every time
        if not self._columns:
            self.kv = self.runner = kv = None  # before it is replaced: not twice in memory
        grown = KVCache(
            config,
            num_slots=rows,
            max_seq_len=length,
            prefill_chunk=PREFILL_CHUNK,
            device=device,
            dtype=dtype,
        )
        if kv is not None:
            grown.copy_from(kv)
        self.kv, self.runner, self._owner = grown, None, owner
        return grown

    def take(self, other: "StaticCache", times: int) -> None:
        """Copy another cache, each of its rows `times` times, into memory from `prepare`."""
        assert self.kv is not None
        assert other.kv is not None
        for to, source in zip(self.kv.layers, other.kv.layers, strict=True):
            for x, y in ((to.k, source.k), (to.v, source.v)):
                count = min(x.shape[2], y.shape[2])
                x[:, :, :count].copy_(y[:, :, :count].repeat_interleave(times, dim=0))
        self._columns = other._columns
        self._column_of = [of_row for of_row in other._column_of for _ in range(times)]

    def extend(self, columns: int, new: list[Tensor]) -> None:
        """Record `columns` new columns, and which of them hold a token, for each row."""
        self._column_of = [
            torch.cat([of_row, more + self._columns])
            for of_row, more in zip(self._column_of, new, strict=True)
        ]
        self._columns += columns


class DynamicCache(StaticCache):
    """A cache that grows: `StaticCache` without a given length, by its documented name."""

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
