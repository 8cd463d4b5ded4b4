"""The static KV cache: allocated once, a ring for each local layer.

    k, v: [slots, HK, capacity, K] for each layer, in the model's dtype
                                   or in float8_e4m3fn with scales [HK] (cache_scales.py)

A slot holds one sequence.  Position p is stored at index p % capacity.  A global layer's capacity
is that of the longest sequence, so that p % capacity is p.  A local layer keeps its window and one
prefill chunk: a chunk is written before its queries attend, and with that much room it overwrites
no key that they still see.  The drafts of one decode step are such a chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.requests.prefix_reuse import Ring
from gemcut.engine.requests.sampling_params import MAX_DRAFT
from gemcut.kernels.checks import FP8
from gemcut.kernels.cpu_rows import holds_nan

PREFILL_CHUNK = 512  # tokens; the default


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer: k, v [slots, HK, capacity, K], scales [HK] of those in fp8.

    Or in blocks: k, v [blocks, block_size, HK, K], which block_tables [slots, N] in int32 names.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    block_tables: Tensor | None = None

    @property
    def arguments(self) -> dict[str, Tensor | None]:
        """How k and v are read, as keyword arguments of an op."""
        scales = {"k_scale": self.k_scale, "v_scale": self.v_scale}
        return scales if self.block_tables is None else scales | {"block_tables": self.block_tables}


class Cache(Protocol):
    """What `Gemma` takes of a cache; borrowed_cache.py has those of other programs."""

    @property
    def layers(self) -> Sequence[LayerCache]: ...

    num_slots: int
    max_seq_len: int
    prefill_chunk: int

    def check_room(self, slot: int, start: int, end: int) -> None:
        """ValueError unless a slot has room for the tokens start to end - 1."""
        ...


class KVCache:
    """Keys and values of `num_slots` sequences of up to `max_seq_len` tokens, in every layer."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_slots: int,
        max_seq_len: int,
        prefill_chunk: int,
        device: torch.device | str,
        dtype: torch.dtype,
        scales: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Allocate it; MemoryError names the size where the device has no room for it.

        scales: of keys and values in each layer, [HK] in float32, where the dtype is float8_e4m3fn.
        """
        self.num_slots = num_slots
        self.max_seq_len = max_seq_len
        self.prefill_chunk = prefill_chunk
        self.nbytes = cache_bytes(config, num_slots, max_seq_len, prefill_chunk, dtype)
        layers = []
        try:
            for layer in range(config.num_layers):
                capacity = layer_capacity(config, layer, max_seq_len, prefill_chunk)
                shape = (num_slots, config.num_kv_heads, capacity, config.head_dim)
                k = torch.zeros(shape, device=device, dtype=dtype)
                of_layer = (None, None) if scales is None else scales[layer]
                layers.append(LayerCache(k, torch.zeros_like(k), *of_layer))
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            raise MemoryError(
                f"the KV cache of {num_slots} slots of {max_seq_len} tokens takes "
                f"{self.nbytes / 1e9:.2f} GB, which {device} does not have; "
                f"lower max_batch_size or max_seq_len"
            ) from error
        self.layers = layers
        self.ring = ring_of(config, max_seq_len, prefill_chunk)

    def check_room(self, slot: int, start: int, end: int) -> None:
        """ValueError unless a slot has room for the tokens start to end - 1."""
        check_tokens(self, slot, start, end)

    def holds_nan(self, slot: int, written: int) -> bool:
        """Whether a value at the first `written` positions of a slot is NaN; waits for the device.

        The positions of a ring that has turned are all of it.
        """
        return any(holds_nan(layer.v[slot, :, :written]) for layer in self.layers)

    def clear(self, slot: int) -> None:
        """Zero a slot: a step with drafts looks at values that no token has written yet.

        It multiplies them by 0, which does not hide a NaN.
        """
        for layer in self.layers:
            layer.k[slot].zero_()
            layer.v[slot].zero_()

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot to another, as far as the source has them.

        Of a ring that is all it holds, and all that the window needs (prefix_reuse.py checks it).
        """
        for layer in self.layers:
            for x in (layer.k, layer.v):
                count = min(length, x.shape[2])
                x[target, :, :count].copy_(x[source, :, :count])

    def copy_from(self, smaller: "KVCache") -> None:
        """Copy a cache of as many but shorter slots, each token to the same index.

        A ring that has turned has the same capacity in both; one that has not begins at index 0.
        """
        for new, old in zip(self.layers, smaller.layers, strict=True):
            new.k[:, :, : old.k.shape[2]].copy_(old.k)
            new.v[:, :, : old.v.shape[2]].copy_(old.v)


def check_tokens(cache: Cache, slot: int, start: int, end: int) -> None:
    """ValueError unless a cache has the slot and, in it, the tokens start to end - 1."""
    if not (0 <= slot < cache.num_slots and 0 <= start < end <= cache.max_seq_len):
        raise ValueError(
            f"tokens {start} to {end - 1} in slot {slot} do not fit a cache of "
            f"{cache.num_slots} slots of {cache.max_seq_len} tokens"
        )


def layer_capacity(config: ModelConfig, layer: int, max_seq_len: int, prefill_chunk: int) -> int:
    """Tokens that a slot holds in `layer`.

    A ring has room for its window and the longest chunk: of a prefill, or of a decode step's drafts
    where the prefill's chunks are shorter than those.
    """
    if config.sliding_window is None or not config.is_local(layer):
        return max_seq_len
    return min(max_seq_len, config.sliding_window + max(prefill_chunk, 1 + MAX_DRAFT))


def ring_of(config: ModelConfig, max_seq_len: int, prefill_chunk: int) -> Ring | None:
    """The ring of local layers; None where every layer holds whole sequences."""
    capacity = min(
        layer_capacity(config, layer, max_seq_len, prefill_chunk)
        for layer in range(config.num_layers)
    )
    if config.sliding_window is None or capacity == max_seq_len:
        return None
    return Ring(config.sliding_window, capacity)


def cache_bytes(
    config: ModelConfig, num_slots: int, max_seq_len: int, prefill_chunk: int, dtype: torch.dtype
) -> int:
    """Bytes of a cache: of its slots, and of the scales of one in fp8."""
    scales = 2 * config.num_layers * config.num_kv_heads * 4 if dtype == FP8 else 0
    return num_slots * slot_bytes(config, max_seq_len, prefill_chunk, dtype) + scales


def slot_bytes(
    config: ModelConfig, max_seq_len: int, prefill_chunk: int, dtype: torch.dtype
) -> int:
    """Bytes of one slot over all layers."""
    tokens = sum(
        layer_capacity(config, layer, max_seq_len, prefill_chunk)
        for layer in range(config.num_layers)
    )
    return 2 * tokens * config.num_kv_heads * config.head_dim * dtype.itemsize
