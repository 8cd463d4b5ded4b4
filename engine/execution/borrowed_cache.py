"""Caches that another program owns, under the same model: paged, or slots of any strides.

    BorrowedCache   over the caller's tensors, one LayerCache a layer
    PagedKVCache    blocks of its own, which the caller hands out: assign(slot, blocks)

The caller decides which blocks a slot has, and when: a block allocator is not here.  A table is
read on the device when a step runs, so a graph of a step may be replayed after it has changed.
Position p of a slot is in block tables[slot, p // block_size] in every layer.  What the host knows
is checked: shapes and capacities at once, blocks when they are assigned, a prompt's room before it
is computed.  A table that a caller writes on the device is not: a step that needs a block which is
not there yields NaN, stores nothing and reads no foreign memory.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.cache import PREFILL_CHUNK, LayerCache, check_tokens, layer_capacity
from gemcut.engine.execution.slot_state import upload

NO_BLOCK = -1  # an entry of a table beyond a slot's blocks


class BorrowedCache:
    """Keys and values of up to `max_seq_len` tokens a slot, in somebody else's memory."""

    def __init__(
        self,
        config: ModelConfig,
        layers: Sequence[LayerCache],
        *,
        max_seq_len: int,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        """ValueError where a layer is missing, has another shape or too few tokens a slot."""
        if len(layers) != config.num_layers:
            raise ValueError(f"{len(layers)} layers of a cache, the model has {config.num_layers}")
        for i, layer in enumerate(layers):
            _check_layer(config, i, layer, max_seq_len, prefill_chunk)
        counts = {_count_slots(layer) for layer in layers}
        if len(counts) > 1:
            raise ValueError(f"layers have {sorted(counts)} slots, must have as many each")
        self.layers = list(layers)
        self.num_slots = counts.pop()
        self.max_seq_len, self.prefill_chunk = max_seq_len, prefill_chunk

    def check_room(self, slot: int, start: int, end: int) -> None:
        """ValueError unless a slot has room for the tokens start to end - 1."""
        check_tokens(self, slot, start, end)


class PagedKVCache(BorrowedCache):
    """Blocks of keys and values, in every layer alike, and the tables of slots over them."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_blocks: int,
        block_size: int,
        num_slots: int,
        max_seq_len: int,
        device: torch.device | str,
        dtype: torch.dtype,
        prefill_chunk: int = PREFILL_CHUNK,
        scales: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Allocate it; MemoryError names the size where the device has no room for it.

        scales: of keys and values in each layer, [HK] in float32, where the dtype is float8_e4m3fn.
        """
        sizes = {"num_blocks": num_blocks, "block_size": block_size, "num_slots": num_slots}
        for name, size in (sizes | {"max_seq_len": max_seq_len}).items():
            if size < 1:
                raise ValueError(f"{name} is {size}, must be at least 1")
        shape = (num_blocks, block_size, config.num_kv_heads, config.head_dim)
        tables_shape = (num_slots, -(-max_seq_len // block_size))
        self.nbytes = 2 * config.num_layers * torch.Size(shape).numel() * dtype.itemsize
        try:
            tables = torch.full(tables_shape, NO_BLOCK, dtype=torch.int32, device=device)
            layers = [
                LayerCache(
                    torch.zeros(shape, device=device, dtype=dtype),
                    torch.zeros(shape, device=device, dtype=dtype),
                    *((None, None) if scales is None else scales[layer]),
                    block_tables=tables,
                )
                for layer in range(config.num_layers)
            ]
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            raise MemoryError(
                f"{num_blocks} blocks of {block_size} tokens take {self.nbytes / 1e9:.2f} GB, "
                f"which {device} does not have; lower num_blocks"
            ) from error
        super().__init__(config, layers, max_seq_len=max_seq_len, prefill_chunk=prefill_chunk)
        self.num_blocks, self.block_size = num_blocks, block_size
        self.block_tables = tables
        self.blocks: list[list[int]] = [[] for _ in range(num_slots)]

    def assign(self, slot: int, blocks: Sequence[int]) -> None:
        """Give a slot these blocks, from its first token on, in place of those that it had.

        Slots may share blocks, as long as neither writes into them.  ValueError for a slot or a
        block that is not there, or more blocks than a sequence of max_seq_len needs.
        """
        if not 0 <= slot < self.num_slots:
            raise ValueError(f"slot {slot} is not in 0 to {self.num_slots - 1}")
        wrong = [block for block in blocks if not 0 <= block < self.num_blocks]
        if wrong:
            raise ValueError(f"block {wrong[0]} is not in 0 to {self.num_blocks - 1}")
        most = self.block_tables.shape[1]
        if len(blocks) > most:
            raise ValueError(f"{len(blocks)} blocks are more than the {most} of a slot")
        row = [*blocks, *[NO_BLOCK] * (most - len(blocks))]
        self.block_tables[slot] = upload(row, self.block_tables.device, torch.int32)
        self.blocks[slot] = list(blocks)

    def check_room(self, slot: int, start: int, end: int) -> None:
        """ValueError unless a slot has blocks for the tokens start to end - 1."""
        super().check_room(slot, start, end)
        held = len(self.blocks[slot]) * self.block_size
        if end > held:
            raise ValueError(
                f"tokens {start} to {end - 1} in slot {slot}, whose blocks hold {held}; assign more"
            )


def _count_slots(layer: LayerCache) -> int:
    return len(layer.k if layer.block_tables is None else layer.block_tables)


def _check_layer(
    config: ModelConfig, i: int, layer: LayerCache, max_seq_len: int, prefill_chunk: int
) -> None:
    """ValueError unless a layer holds what the model stores, for all that its queries see."""
    of_model, shape = [config.num_kv_heads, config.head_dim], list(layer.k.shape)
    in_slots = layer.block_tables is None
    if len(shape) != 4 or [shape[1 if in_slots else 2], shape[3]] != of_model:
        form = "slots, HK, C, K" if in_slots else "blocks, block_size, HK, K"
        raise ValueError(
            f"layer {i} of the cache is {shape}, must be [{form}] with HK, K = {of_model}"
        )
    if layer.block_tables is None:
        capacity, needed = shape[2], layer_capacity(config, i, max_seq_len, prefill_chunk)
    else:
        capacity, needed = layer.block_tables.shape[1] * shape[1], max_seq_len
    if capacity < needed:
        raise ValueError(f"layer {i} of the cache holds {capacity} tokens a slot, needs {needed}")
