"""`past_key_values`: the static cache of a batch, from one call of a model to the next.

The cache holds tokens and no padding: the n-th real token of a row is at position n of its slot,
which is called its rank.  The columns of a batch are what users see: `get_seq_length` counts them,
and masks have one entry for each.  The cache remembers which column a token came from.

A row that ends before the others in `generate` leaves late tokens: those of its last columns, its
EOS and padding, which no step has computed.  The next call computes those that its mask shows.
"""

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemcut.engine.checks import check_int
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.cache import PREFILL_CHUNK, KVCache

GROWTH = 256  # tokens: caches without a given length are rounded up to a multiple of it


@dataclass(frozen=True)
class LateTokens:
    """Tokens of a row's last columns that are not in the cache: ids and positions, int64 [n]."""

    token_ids: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.token_ids)

    def without(self, count: int) -> "LateTokens":
        """All but the last `count` of them."""
        kept = max(0, len(self) - count)
        return LateTokens(self.token_ids[:kept], self.positions[:kept])


class StaticCache:
    """Keys and values of a batch, in memory that is allocated once.

    `max_cache_len` is the most columns it holds; a call that needs more is refused.  Memory is
    taken when the first call shows the batch's size.  One cache serves one batch, one model and one
    call at a time.  A copy has memory of its own; `pickle` leaves a GPU's graphs behind.
    """

    def __init__(
        self,
        config: Any = None,
        max_cache_len: int | None = None,
        max_batch_size: int | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        offloading: bool = False,
    ) -> None:
        if offloading:
            raise NotImplementedError("offloading=True is not supported; leave it out")
        for name, size in (("max_cache_len", max_cache_len), ("max_batch_size", max_batch_size)):
            if size is not None:
                check_int(name, size, 1, 2**31 - 1)
        self.max_cache_len, self.max_batch_size = max_cache_len, max_batch_size
        self.config = config  # a documented argument; the model's own is what counts
        self._place = None if device is None else torch.device(device), dtype  # as was asked
        self.kv: KVCache | None = None
        self.runner: Any = None  # generate's Runner, with the graphs captured over these tensors
        self._owner: Any = None  # config, device and dtype of the model whose keys these are
        self._lock = threading.Lock()  # held by the call that uses the cache
        self._forget()

    def reset(self) -> None:
        """Forget every token; the memory is kept."""
        with self.in_use():
            self._forget()

    def _forget(self) -> None:
        self._columns = 0
        self._column_of: list[Tensor] = []  # of each row: the column of each of its tokens
        self._late: list[LateTokens] = []  # of each row, where any has them
        self._written = 0  # the most tokens of any row that were ever stored since

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that were computed so far."""
        return self._columns

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """The most columns that it holds; -1 where it grows as needed."""
        return -1 if self.max_cache_len is None else self.max_cache_len

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The same, by its newer name."""
        return self.get_max_cache_shape()

    @property
    def batch_size(self) -> int:
        """The rows of its batch; -1 before the first call."""
        return -1 if self.kv is None else self.kv.num_slots

    @property
    def is_initialized(self) -> bool:
        """Whether its memory is taken."""
        return self.kv is not None

    @property
    def is_compileable(self) -> bool:
        """False: nothing that computes over it is compiled by torch."""
        return False

    def __len__(self) -> int:
        """The number of layers, 0 before the first call."""
        return 0 if self.kv is None else len(self.kv.layers)

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` columns; a negative number is how many of the last to drop.

        ValueError where a sliding window would need tokens that were overwritten since.
        """
        check_int("max_length", max_length, -(2**31), 2**31 - 1)
        with self.in_use():
            keep = max(0, self._columns + max_length) if max_length < 0 else max_length
            if keep >= self._columns:
                return
            cropped = [columns[columns < keep] for columns in self._column_of]
            self._check_window(min(map(len, cropped)))
            self.leave_late([late.without(self._columns - keep) for late in self._late])
            self._column_of, self._columns = cropped, keep

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put row beam_idx[i] in the place of row i: beam_idx [rows], or of another number."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row, side by side."""
        check_int("repeats", repeats, 1, 2**20)
        rows = torch.arange(max(0, self.batch_size), device="cpu")
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order: indices [n], or a bool for each row."""
        with self.in_use():
            if self.kv is None:
                return
            rows = torch.as_tensor(indices, device="cpu")
            if rows.dtype == torch.bool:
                rows = rows.nonzero().flatten()
            rows, count = rows.tolist(), self.kv.num_slots
            for row in rows:
                check_int("a row of the cache", row, -count, count - 1)
            if not rows:
                raise ValueError("no row of the cache is left; use reset() to empty it")
            chosen = self._allocate(len(rows), self.kv.max_seq_len)
            _copy_rows(self.kv, chosen, rows)
            self.kv, self.runner = chosen, None
            self._column_of = [self._column_of[row] for row in rows if self._columns]
            self._late = [self._late[row] for row in rows if self._late]
            if self.max_batch_size is not None:
                self.max_batch_size = len(rows)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within it the cache is one call's alone; ValueError where it is another's."""
        if not self._lock.acquire(blocking=False):
            raise ValueError(
                "the cache is in use by another call; give each call a cache of its own"
            )
        try:
            yield
        finally:
            self._lock.release()

    def __getstate__(self) -> dict[str, Any]:
        return {k: x for k, x in vars(self).items() if k not in ("_lock", "runner")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock(), runner=None)

    def __deepcopy__(self, memo: dict[int, Any]) -> "StaticCache":
        copied = type(self).__new__(type(self))
        with torch.inference_mode(False):
            copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __copy__(self) -> "StaticCache":
        return copy.deepcopy(self)  # two caches over one memory would overwrite each other

    def __repr__(self) -> str:
        limit = "growing" if self.max_cache_len is None else f"of {self.max_cache_len} columns"
        rows = 0 if self.kv is None else self.kv.num_slots
        return f"<{type(self).__name__} {limit}: {rows} rows, {self._columns} columns used>"

    # For the models

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row holds."""
        return [len(columns) for columns in self._column_of]

    @property
    def has_holes(self) -> bool:
        """Whether a column is padding in some row."""
        return any(
            len(self.shown_columns(row)) != self._columns for row in range(len(self._column_of))
        )

    @property
    def late(self) -> list[LateTokens]:
        """The late tokens of each row; empty where no row has any."""
        return self._late

    def columns_of(self, row: int) -> Tensor:
        """The column of each token of a row, in order: int64 [n], on the host."""
        return self._column_of[row]

    def shown_columns(self, row: int) -> Tensor:
        """The columns of a row that a mask may show: those of its tokens, the late ones too."""
        columns = self._column_of[row]
        if not self._late:
            return columns
        late = torch.arange(self._columns - len(self._late[row]), self._columns, device="cpu")
        return torch.cat([columns, late])

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
        asked_device, asked_dtype = self._place
        if asked_device not in (None, device) or asked_dtype not in (None, dtype):
            raise ValueError(
                f"the cache was made for {asked_device} and {asked_dtype}, but the model is on "
                f"{device} in {dtype}; leave device and dtype out"
            )
        kv = self.kv
        expected = kv.num_slots if kv is not None and self._columns else self.max_batch_size
        if expected is not None and rows != expected:
            raise ValueError(f"the batch has {rows} rows, but the cache is for {expected}")
        owner = config, device, dtype
        if self._columns == 0:
            self._column_of = [torch.empty(0, dtype=torch.int64, device="cpu")] * rows
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
        self._owner = owner
        grown = self._allocate(rows, length)
        if kv is not None:
            grown.copy_from(kv)
        self.kv, self.runner = grown, None
        return grown

    def _allocate(self, rows: int, length: int) -> KVCache:
        config, device, dtype = self._owner
        with torch.inference_mode(False):  # a later call may write to it outside that mode
            return KVCache(
                config,
                num_slots=rows,
                max_seq_len=length,
                prefill_chunk=PREFILL_CHUNK,
                device=device,
                dtype=dtype,
            )

    def take(self, other: "StaticCache", times: int) -> None:
        """Copy another cache, each of its rows `times` times, into memory from `prepare`."""
        assert self.kv is not None
        assert other.kv is not None
        rows = [row for row in range(other.kv.num_slots) for _ in range(times)]
        _copy_rows(other.kv, self.kv, rows)
        self._columns, self._written = other._columns, other._written
        self._column_of = [other._column_of[row] for row in rows]

    def extend(self, columns: int, new: list[Tensor]) -> None:
        """Record `columns` new columns, and which of them hold a token, for each row.

        They begin with those of late tokens, where there are any.
        """
        self._columns -= max(map(len, self._late), default=0)
        self._column_of = [
            torch.cat([of_row, more + self._columns])
            for of_row, more in zip(self._column_of, new, strict=True)
        ]
        self._columns += columns
        self._late = []
        self._written = max(self._written, *self.lengths)

    def leave_late(self, late: list[LateTokens]) -> None:
        """Record what each row's last columns should hold, and do not."""
        self._late = late if any(map(len, late)) else []

    def _check_window(self, length: int) -> None:
        """Nothing, or ValueError where a row of `length` tokens misses some that it would see."""
        ring = None if self.kv is None else self.kv.ring
        if ring is None:
            return
        # a step that was started when its row had ended has stored one more
        overwritten = self._written + 1 - ring.capacity
        if max(0, length - ring.window + 1) < overwritten:
            raise ValueError(
                f"the cache cannot be cropped to {length} tokens: with sliding_window "
                f"{ring.window}, {overwritten} older ones are overwritten; compute them again"
            )


class DynamicCache(StaticCache):
    """A cache that grows: `StaticCache` without a given length, by its documented name."""

    def __init__(self, config: Any = None, *, offloading: bool = False) -> None:
        super().__init__(config, offloading=offloading)


def _copy_rows(source: KVCache, target: KVCache, rows: list[int]) -> None:
    """Copy row rows[i] of one cache to row i of another, as far as both have room."""
    for old, new in zip(source.layers, target.layers, strict=True):
        for x, y in ((old.k, new.k), (old.v, new.v)):
            count = min(x.shape[2], y.shape[2])
            y[:, :, :count].copy_(x[rows, :, :count])


def one_cache(past_key_values: Any, cache: Any) -> StaticCache | None:
    """The cache of a call, which has an older and a newer keyword; ValueError for what is none."""
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("past_key_values and cache are two names of one argument: give one")
    name = "past_key_values" if cache is None else "cache"
    given = past_key_values if cache is None else cache
    if given is None or isinstance(given, StaticCache):
        return given
    raise ValueError(
        f"{name} is a {type(given).__name__}; give what an earlier call returned, "
        f"init_cache(batch_size, max_length), or gemcut.engine.DynamicCache()"
    )
