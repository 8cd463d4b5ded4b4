"""Measured tile constants by arch, kernel and shape; a kernel's rule holds for the rest.

measured_tiles.json holds them, as tools/tune.py writes them: what won in one of its runs, on which
card, when, with which versions and at which commit.  An empty tile says that nothing beat the rule
there.  A shape is written "2304x9216".

A shape is the model's, never a number of rows, of sequences or of tokens in a cache: so a row's
bits do not depend on its company, see skinny_product.py.  Constants are measured for elements of 16
bits, and are taken for these alone.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from gemcut.kernels.gpu_arch import arch_of

TILES_FILE = Path(__file__).with_name("measured_tiles.json")

Shape = tuple[int, ...]
Key = tuple[str, Shape]  # kernel, shape
Tile = dict[str, int]


@dataclass(frozen=True)
class Measured:
    """What won in runs of tools/tune.py at one place: tiles by kernel and shape."""

    arch: str
    card: str
    date: str
    triton: str
    torch: str
    commit: str
    tiles: dict[str, dict[Shape, Tile]]


def read_measured(file: Path) -> tuple[Measured, ...]:
    """The blocks in a file of measured tiles; ValueError, of one line, where it holds none."""
    try:
        blocks = json.loads(file.read_text())
        if not isinstance(blocks, list):
            raise ValueError("it is no list")
        return tuple(_block(number, block) for number, block in enumerate(blocks, 1))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), "")
        raise ValueError(f"{file} holds no list of measured tiles: {reason}") from None


def _block(number: int, block: Any) -> Measured:
    if not isinstance(block, dict):
        raise ValueError(f"block {number} is no object")
    names = [field.name for field in fields(Measured)]
    if set(block) != set(names):
        raise ValueError(f"block {number} gives {', '.join(block)}, not {', '.join(names)}")
    *place, tiles = (block[name] for name in names)
    levels = [tiles, *tiles.values()] if isinstance(tiles, dict) else [None]
    if not all(isinstance(text, str) for text in place) or not all(
        isinstance(level, dict) for level in levels
    ):
        raise ValueError(f"block {number} is malformed")
    return Measured(
        *place,
        tiles={
            kernel: {_shape(number, shape): _tile(number, tile) for shape, tile in found.items()}
            for kernel, found in tiles.items()
        },
    )


def _shape(number: int, text: str) -> Shape:
    sizes = text.split("x")
    if not all(size.isdecimal() for size in sizes):
        raise ValueError(f"block {number}: shape {text!r} is no whole numbers")
    return tuple(map(int, sizes))


def _tile(number: int, tile: Any) -> Tile:
    if not isinstance(tile, dict) or not all(type(value) is int for value in tile.values()):
        raise ValueError(f"block {number}: tile {tile!r} is no whole numbers")
    return tile


def tiles_by_arch(measured: Sequence[Measured]) -> dict[str, dict[Key, Tile]]:
    """The tiles of each arch; of two at one shape, the later in the list counts."""
    found: dict[str, dict[Key, Tile]] = {}
    for block in measured:
        tiles = found.setdefault(block.arch, {})
        for kernel, shapes in block.tiles.items():
            tiles |= {(kernel, shape): tile for shape, tile in shapes.items()}
    return found


MEASURED = read_measured(TILES_FILE)
TUNED = tiles_by_arch(MEASURED)


def tuned(kernel: str, x: Tensor, *shape: int) -> Tile:
    """The constants to lay over a kernel's rule where x is: {} where the rule holds."""
    if x.itemsize != 2:
        return {}
    return TUNED.get(arch_of(x.device), {}).get((kernel, shape), {})
