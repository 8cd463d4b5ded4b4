"""The list of measured tiles in kernels/tiles.py, read and rewritten by tools/tune.py.

The list is data: it is read without running the file, and written as `ruff format` would have it.
"""

import ast
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

from gemcut.kernels import tiles
from gemcut.kernels.tiles import Key, Measured, Shape, Tile, tiles_by_arch

TILES_FILE = Path(tiles.__file__)
WIDTH = 100  # of a line
HEAD = '''"""What tools/tune.py found; its --merge lays this over kernels/tiles.py."""

from gemcut.kernels.tiles import Measured

'''


def read_measured(file: Path) -> tuple[Measured, ...]:
    """The list in a file; ValueError where there is none."""
    try:
        listed = _assignment(file.read_text()).value
        if not isinstance(listed, ast.Tuple):
            raise ValueError("MEASURED is no tuple")
        return tuple(_block(element) for element in listed.elts)
    except (OSError, SyntaxError, ValueError) as error:
        reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), "")
        raise ValueError(f"{file} holds no list of measured tiles: {reason}") from None


def write_measured(file: Path, measured: Sequence[Measured]) -> None:
    """Put the list in place of the one in `file`, or into a new file of its own."""
    text = render(measured)
    if file.exists():
        source = file.read_text()
        old = _assignment(source)
        lines = source.splitlines(keepends=True)
        text = "".join([*lines[: old.lineno - 1], text, *lines[old.end_lineno :]])
    else:
        text = HEAD + text
    new = file.with_name(f"{file.name}.part")  # replaced as a whole: a kill leaves what was there
    new.write_text(text)
    new.replace(file)


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


def render(measured: Sequence[Measured]) -> str:
    """The assignment of MEASURED."""
    if not measured:
        return "MEASURED: tuple[Measured, ...] = ()\n"
    lines = ["MEASURED: tuple[Measured, ...] = ("]
    for block in measured:
        lines += ["    Measured(", *_lines(block), "    ),"]
    return "\n".join([*lines, ")", ""])


def _lines(block: Measured) -> Iterator[str]:
    for name, value in asdict(block).items():
        if name != "tiles":
            yield f"        {name}={json.dumps(value, ensure_ascii=False)},"
    yield "        tiles={"
    for kernel, shapes in block.tiles.items():
        yield f'            "{kernel}": {{'
        for shape, tile in shapes.items():
            yield from _entry(shape, [f'"{name}": {value}' for name, value in tile.items()])
        yield "            },"
    yield "        },"


def _entry(shape: Shape, constants: Sequence[str]) -> Iterator[str]:
    """One shape on one line, or a constant a line where that is too long."""
    indent = " " * 16
    line = f"{indent}{shape}: {{{', '.join(constants)}}},"
    if len(line) <= WIDTH:
        yield line
        return
    yield f"{indent}{shape}: {{"
    yield from (f"{indent}    {constant}," for constant in constants)
    yield f"{indent}}},"


def _assignment(source: str) -> ast.AnnAssign:
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "MEASURED":
            return node
    raise ValueError("MEASURED is not assigned")


def _block(node: ast.expr) -> Measured:
    """A block from its literals; ValueError unless it is as `render` writes it."""
    if not isinstance(node, ast.Call):
        raise ValueError(f"line {node.lineno} is no Measured(...)")
    values = {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
    if list(values) != [field.name for field in fields(Measured)]:
        raise ValueError(f"line {node.lineno} gives {', '.join(values)}")
    block = Measured(**values)
    for (_, shape), tile in tiles_by_arch([block])[block.arch].items():
        if not all(type(value) is int for value in (*shape, *tile.values())):
            raise ValueError(f"line {node.lineno}: {shape}: {tile} are no whole numbers")
    return block
