"""Where a cache holds the token at position p of slot s.

    k, v [slots, HK, C, K]               at [s, :, p % C]: a slot is a ring
    k, v [blocks, block_size, HK, K]     at [block_tables[s, p // block_size], p % block_size]

With block_tables [slots, N] the capacity C is N * block_size, and nothing is a ring: a window only
hides.  An entry of a block that no query sees is never read.
"""

import torch
from torch import Tensor


def cache_shape(cache: Tensor, block_tables: Tensor | None) -> tuple[int, int]:
    """KV heads and the capacity of a slot."""
    if block_tables is None:
        return cache.shape[1], cache.shape[2]
    return cache.shape[2], block_tables.shape[1] * cache.shape[1]


def place_of(
    cache: Tensor, slots: Tensor, positions: Tensor, block_tables: Tensor
) -> tuple[Tensor, Tensor]:
    """Blocks, and indices in them, of positions of slots, which broadcast.

    ValueError where a position is beyond its table, or an entry is no block.
    """
    (num_blocks, block_size), capacity = cache.shape[:2], cache_shape(cache, block_tables)[1]
    if positions.numel() and (last := int(positions.max())) >= capacity:
        raise ValueError(f"position {last} is beyond the {capacity} tokens of a block table")
    blocks = block_tables[slots, positions // block_size]
    if blocks.numel():
        least, greatest = (int(x) for x in blocks.aminmax())
        if least < 0 or greatest >= num_blocks:
            wrong = least if least < 0 else greatest
            raise ValueError(f"block_tables holds {wrong}, must be in 0 to {num_blocks - 1}")
    return blocks, positions % block_size


def store_(
    cache: Tensor, x: Tensor, slots: Tensor, positions: Tensor, block_tables: Tensor | None
) -> None:
    """Write keys or values x [M, HK, K] of tokens at slots and positions [M]."""
    if block_tables is None:
        cache[slots, :, positions % cache.shape[2]] = x
    else:
        cache[place_of(cache, slots, positions, block_tables)] = x


def held(cache: Tensor, slot: int, first: int, end: int, block_tables: Tensor | None) -> Tensor:
    """Keys or values of a slot's positions first to end - 1, in order: [HK, S, K]."""
    positions = torch.arange(first, end, device=cache.device)
    if block_tables is None:
        return cache[slot][:, positions % cache.shape[2]]
    slots = torch.full_like(positions, slot)
    return cache[place_of(cache, slots, positions, block_tables)].transpose(0, 1)
