"""Tile constants that were measured, by arch, kernel and shape; a kernel's rule holds for the rest.

tools/tune.py writes MEASURED: what won in one of its runs, on which card, when, with which versions
and at which commit.  An empty tile says that nothing beat the rule there.

A shape is the model's, never a number of rows, of sequences or of tokens in a cache: so a row's
bits do not depend on its company, see skinny_product.py.  Constants are measured for elements of 16
bits, and are taken for these alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from gemcut.kernels.gpu_arch import arch_of

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


MEASURED: tuple[Measured, ...] = ()


def tiles_by_arch(measured: Sequence[Measured]) -> dict[str, dict[Key, Tile]]:
    """The tiles of each arch; of two at one shape, the later in the list counts."""
    found: dict[str, dict[Key, Tile]] = {}
    for block in measured:
        tiles = found.setdefault(block.arch, {})
        for kernel, shapes in block.tiles.items():
            tiles |= {(kernel, shape): tile for shape, tile in shapes.items()}
    return found


TUNED = tiles_by_arch(MEASURED)


def tuned(kernel: str, x: Tensor, *shape: int) -> Tile:
    """The constants to lay over a kernel's rule where x is: {} where the rule holds."""
    if x.itemsize != 2:
        return {}
    return TUNED.get(arch_of(x.device), {}).get((kernel, shape), {})
