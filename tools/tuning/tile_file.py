"""Writes and merges files of measured tiles, of which kernels/measured_tiles.json is one."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from gemcut.kernels.tiles import Key, Measured, Shape, Tile, tiles_by_arch


def write_measured(file: Path, measured: Sequence[Measured]) -> None:
    """Make a list of blocks the contents of a file."""
    new = file.with_name(f"{file.name}.part")  # replaced as a whole: a kill leaves what was there
    new.write_text(render(measured))
    new.replace(file)


def render(measured: Sequence[Measured]) -> str:
    """The blocks as JSON, a constant a line."""
    blocks = [
        asdict(block)
        | {
            "tiles": {
                kernel: {"x".join(map(str, shape)): tile for shape, tile in shapes.items()}
                for kernel, shapes in block.tiles.items()
            }
        }
        for block in measured
    ]
    return json.dumps(blocks, indent=1, ensure_ascii=False) + "\n"


def merged(old: Sequence[Measured], new: Measured) -> tuple[Measured, ...]:
    """The list with one block more, whose tiles take the place of others at the same shapes."""
    replaced = tiles_by_arch([new])[new.arch]
    blocks = []
    for block in old:
        kept = tiles_by_arch([block])[block.arch]
        if block.arch == new.arch:
            kept = {key: tile for key, tile in kept.items() if key not in replaced}
        if _place(block) == _place(new):
            replaced = kept | replaced
        elif kept:
            blocks.append(replace(block, tiles=by_kernel(kept)))
    blocks.append(replace(new, tiles=by_kernel(replaced)))
    return tuple(sorted(blocks, key=_place))


def by_kernel(tiles: dict[Key, Tile]) -> dict[str, dict[Shape, Tile]]:
    """Tiles as a block holds them, in order."""
    found: dict[str, dict[Shape, Tile]] = {}
    for (kernel, shape), tile in sorted(tiles.items(), key=lambda entry: entry[0]):
        found.setdefault(kernel, {})[shape] = tile
    return found


def _place(block: Measured) -> tuple[str, ...]:
    """What tells a block from others, in the order of the list: by arch, then by date."""
    return block.arch, block.date, block.card, block.triton, block.torch, block.commit
