"""Flax's format as transformers 4 wrote it: nested dictionaries of arrays in msgpack.

    model/embed_tokens/embedding [V, D]     model/layers/0/self_attn/q_proj/kernel [in, out]
    model/norm/weight [D]                   lm_head/kernel [D, V], where it is not tied

An array is msgpack's extension type 1, whose data is again msgpack: [shape, dtype name, bytes].
From a gibibyte on, flax cuts it into a dictionary of flat chunks.

The files are indexed here rather than unpacked: a general reader copies every array before the one
that is asked for.  Only the types of such a file are read (maps with string keys, arrays as above);
any other type is refused, as is a size that passes the end of the file.
"""

import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import torch
from torch import Tensor

from gemcut.engine.checkpoints.stored_tensors import (
    StoredTensor,
    TensorSpec,
    check_stored,
    name_of,
    same_bits,
)
from gemcut.engine.checkpoints.weight_files import check_file, read_shards
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.weights import checkpoint_tensors

SINGLE, INDEX = "flax_model.msgpack", "flax_model.msgpack.index.json"
SHARD = "flax_model-{:05d}-of-{:05d}.msgpack"
CHUNK = 2**30  # bytes; flax's own limit
CHUNKED = "__msgpack_chunked_array__"
MAX_DEPTH, MAX_ENTRIES, MAX_DIMS = 16, 2**17, 8
ARRAY = 1  # flax's extension types 2 and 3, for scalars, have no place among weights

_DTYPES = {
    name: getattr(torch, name)
    for name in ("bfloat16", "float16", "float32", "float64", "int8", "uint8", "int32", "int64")
}
# First byte -> kind, and how many bytes of length follow it
_SIZED = {
    0xC4: ("bin", 1), 0xC5: ("bin", 2), 0xC6: ("bin", 4),
    0xC7: ("ext", 1), 0xC8: ("ext", 2), 0xC9: ("ext", 4),
    0xD9: ("str", 1), 0xDA: ("str", 2), 0xDB: ("str", 4),
    0xDC: ("array", 2), 0xDD: ("array", 4), 0xDE: ("map", 2), 0xDF: ("map", 4),
}  # fmt: skip
_FIXED_EXT = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_INTS = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}  # of sizes, which have no sign


def find_files(path: Path) -> list[Path]:
    """The file that `path` is, or the file or the index in that folder; perhaps none."""
    if not path.is_dir():
        return [path] if path.suffix == ".msgpack" else []
    return [file for file in (path / SINGLE, path / INDEX) if file.exists()][:1]


def open_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every array in file or folder `path`, by its path with `model` at the front."""
    files = find_files(path)
    if not files:
        raise ValueError(f"{path}: holds neither {SINGLE} nor {INDEX}")
    is_index = files[0].name == INDEX
    found = read_shards(files[0], "msgpack", _read_arrays) if is_index else _read_arrays(files[0])
    # FlaxGemmaModel, which has no head, saves only what is under `model`.
    bare = not any(name.startswith("model/") for name in found)
    return {f"model/{name}" if bare else name: tensor for name, tensor in found.items()}


def match_tensors(
    path: Path, opened: dict[str, StoredTensor], config: ModelConfig
) -> dict[str, StoredTensor]:
    """The tensors of `config` by name: exactly those, or ValueError.

    A head that repeats the tied embedding is left out.
    """
    head, embedding = opened.get("lm_head/kernel"), opened.get("model/embed_tokens/embedding")
    if config.tie_word_embeddings and head is not None and embedding is not None:
        if head.shape != embedding.shape[::-1] or not same_bits(head.load().T, embedding.load()):
            raise ValueError(
                f"{path}: {head.place} differs from the embedding, but tie_word_embeddings is true"
            )
        opened = {name: tensor for name, tensor in opened.items() if tensor is not head}
    check_stored(path, opened, tensor_specs(config))
    return opened


def tensor_specs(config: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor of the model, under its path in the tree."""
    for tensor in checkpoint_tensors(config):
        path, _, kind = tensor.name.rpartition(".")
        matrix = path.endswith("_proj") or path == "lm_head"
        if path.endswith("embed_tokens"):
            kind = "embedding"
        elif matrix and kind == "weight":
            kind = "kernel"
        transposed = kind == "kernel"
        shape = tensor.shape[::-1] if transposed else tensor.shape
        yield TensorSpec(f"{path}.{kind}".replace(".", "/"), shape, (tensor,), transposed)


def write_file(file: Path, tensors: Mapping[str, Callable[[], Tensor]]) -> None:
    """Write one file, a tensor at a time; a name is a path in the tree."""
    tree: dict[str, Any] = {}
    for name, make in tensors.items():
        *branch, leaf = name.split("/")
        node = tree
        for step in branch:
            node = node.setdefault(step, {})
        node[leaf] = make
    with file.open("wb") as out:
        _write_tree(out, tree)


@dataclass(frozen=True)
class _Array:
    """The place of an array's bytes in a file; several pieces where flax has cut it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[tuple[mmap.mmap, int, int], ...]  # file, first byte, bytes

    def load(self) -> Tensor:
        target = torch.empty(math.prod(self.shape), dtype=self.dtype, device="cpu")
        raw, at = target.view(torch.uint8), 0
        for data, start, size in self.pieces:
            if size:
                raw[at : at + size] = torch.frombuffer(
                    data, dtype=torch.uint8, offset=start, count=size
                )
            at += size
        return target.view(self.shape)


def _read_arrays(file: Path) -> dict[str, StoredTensor]:
    """Every array of one file, by its path in the tree."""
    check_file(file)
    with file.open("rb") as raw:
        if not raw.seek(0, 2):
            raise ValueError(f"{file}: damaged (it is empty)")
        data = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        reader = _Reader(data, 0, len(data))
        tree = reader.tree(MAX_DEPTH)
        if not isinstance(tree, dict):
            raise ValueError("no dictionary")
        if reader.at != reader.end:
            raise ValueError(f"{reader.end - reader.at} bytes behind its end")
        arrays = dict(_flatten(tree, ()))
    except ValueError as error:
        raise ValueError(f"{file}: damaged, or no Flax checkpoint ({error})") from None
    return {
        "/".join(path): StoredTensor(
            f"{file.name}: {'/'.join(path)}", array.shape, array.dtype, array.load
        )
        for path, array in arrays.items()
    }


def _flatten(
    tree: dict[str, Any], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], _Array]]:
    for key, value in tree.items():
        here = (*path, key)
        if isinstance(value, dict):
            if CHUNKED in value:
                yield here, _join(value, "/".join(here))
            else:
                yield from _flatten(value, here)
        elif isinstance(value, _Array):
            yield here, value
        else:
            raise ValueError(f"{'/'.join(here)} is {value!r}, not an array")


def _join(tree: dict[str, Any], name: str) -> _Array:
    """The array that flax has cut into flat chunks, numbered from 0."""
    shape, chunks = tree.get("shape"), tree.get("chunks")
    if not isinstance(shape, dict) or not isinstance(chunks, dict) or len(shape) > MAX_DIMS:
        raise ValueError(f"{name} has chunks without a shape, or a shape without chunks")
    sizes = tuple(size for size in map(shape.get, map(str, range(len(shape)))) if _is_size(size))
    arrays = [
        array
        for array in map(chunks.get, map(str, range(len(chunks))))
        if isinstance(array, _Array)
    ]
    if len(sizes) < len(shape) or not arrays or len(arrays) < len(chunks):
        raise ValueError(f"{name} has a shape or chunks that are not numbered from 0")
    if len({array.dtype for array in arrays}) > 1:
        raise ValueError(f"{name} has chunks of several dtypes")
    if sum(math.prod(array.shape) for array in arrays) != math.prod(sizes):
        raise ValueError(f"{name} has chunks that do not make up its shape {list(sizes)}")
    pieces = tuple(piece for array in arrays for piece in array.pieces)
    return _Array(sizes, arrays[0].dtype, pieces)


def _is_size(value: Any) -> TypeGuard[int]:
    return type(value) is int  # and no bool


@dataclass
class _Reader:
    """Reads msgpack between two offsets of a file; ValueError for anything unexpected."""

    data: mmap.mmap
    at: int
    end: int
    entries: int = 0

    def tree(self, depth: int) -> Any:
        """A dictionary, an array, or a number or bool that may accompany the chunks of one."""
        kind, value = self.head()
        if kind == "map":
            if depth == 0:
                raise ValueError(f"dictionaries more than {MAX_DEPTH} deep")
            return self.dictionary(value, depth)
        if kind == "ext":
            return self.array(value)
        if kind in ("int", "bool"):
            return value
        raise ValueError(f"a value of kind {kind} at byte {self.at}")

    def dictionary(self, count: int, depth: int) -> dict[str, Any]:
        self.entries += count
        if self.entries > MAX_ENTRIES:
            raise ValueError(f"more than {MAX_ENTRIES} entries")
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self.text()
            if key in found or "/" in key:
                raise ValueError(f"the key {key!r} twice" if key in found else f"the key {key!r}")
            found[key] = self.tree(depth - 1)
        return found

    def array(self, size: int) -> _Array:
        code = self.data[self.take(1)]
        if code != ARRAY:
            raise ValueError(f"extension type {code}, where only arrays (type {ARRAY}) are read")
        start = self.take(size)
        inner = _Reader(self.data, start, start + size)
        if inner.expect("array") != 3:
            raise ValueError(f"an array without shape, dtype and bytes at byte {start}")
        dims = inner.expect("array")
        if dims > MAX_DIMS:
            raise ValueError(f"an array of {dims} dimensions")
        shape = tuple(inner.expect("int") for _ in range(dims))
        name = inner.text()
        dtype = _DTYPES.get(name)
        if dtype is None:
            raise ValueError(f"an array of dtype {name!r}")
        nbytes = inner.expect("bin")
        first = inner.take(nbytes)
        if math.prod(shape) * dtype.itemsize != nbytes:
            raise ValueError(f"an array {list(shape)} of {name} with {nbytes} bytes")
        if inner.at != inner.end:
            raise ValueError(f"an array with bytes behind its end at byte {inner.at}")
        return _Array(shape, dtype, ((self.data, first, nbytes),))

    def text(self) -> str:
        kind, size = self.head()
        if kind not in ("str", "bin") or size > 256:
            raise ValueError(f"no name, but {kind} {size} at byte {self.at}")
        start = self.take(size)
        return self.data[start : start + size].decode()  # UnicodeDecodeError is a ValueError

    def expect(self, kind: str) -> int:
        found, value = self.head()
        if found != kind:
            raise ValueError(f"{found} instead of {kind} at byte {self.at}")
        return value

    def head(self) -> tuple[str, int]:
        """The kind of the next object, and its length or, for a number, its value."""
        byte = self.data[self.take(1)]
        if byte < 0x80:
            return "int", byte
        if byte < 0xC0:
            kind, bits = ("map", 4) if byte < 0x90 else ("array", 4) if byte < 0xA0 else ("str", 5)
            return kind, byte & ((1 << bits) - 1)
        if byte in _SIZED:
            kind, width = _SIZED[byte]
            start = self.take(width)
            return kind, int.from_bytes(self.data[start : self.at], "big")
        if byte in _FIXED_EXT:
            return "ext", _FIXED_EXT[byte]
        if byte in _INTS:
            start = self.take(_INTS[byte])
            return "int", int.from_bytes(self.data[start : self.at], "big")
        if byte in (0xC2, 0xC3):
            return "bool", byte == 0xC3
        raise ValueError(f"byte 0x{byte:02x} at {self.at - 1}")

    def take(self, size: int) -> int:
        """The offset of the next `size` bytes, after which reading goes on."""
        if size > self.end - self.at:
            raise ValueError(f"{size} bytes at byte {self.at}, of which {self.end - self.at} exist")
        start = self.at
        self.at += size
        return start


def _write_tree(out: BinaryIO, tree: dict[str, Any]) -> None:
    out.write(_head("map", len(tree)))
    for key, value in tree.items():
        out.write(_text(key))
        if isinstance(value, dict):
            _write_tree(out, value)
        else:
            _write_leaf(out, value())


def _write_leaf(out: BinaryIO, tensor: Tensor) -> None:
    if tensor.nbytes <= CHUNK:
        _write_array(out, tensor)
        return
    chunks = tensor.view(-1).split(max(1, CHUNK // tensor.itemsize))
    out.write(_head("map", 3) + _text(CHUNKED) + b"\xc3")
    out.write(_text("shape") + _head("map", tensor.dim()))
    for axis, size in enumerate(tensor.shape):
        out.write(_text(str(axis)) + _int(size))
    out.write(_text("chunks") + _head("map", len(chunks)))
    for number, chunk in enumerate(chunks):
        out.write(_text(str(number)))
        _write_array(out, chunk)


def _write_array(out: BinaryIO, tensor: Tensor) -> None:
    start = _head("array", 3) + _head("array", tensor.dim()) + b"".join(map(_int, tensor.shape))
    start += _text(name_of(tensor.dtype)) + _head("bin", tensor.nbytes)
    size = len(start) + tensor.nbytes
    fixed = {length: byte for byte, length in _FIXED_EXT.items()}
    out.write(bytes([fixed[size]]) if size in fixed else _head("ext", size))
    out.write(bytes([ARRAY]) + start)
    out.write(tensor.view(-1).view(torch.uint8).numpy().data)


def _head(kind: str, size: int) -> bytes:
    """The shortest beginning of an object of this kind and length."""
    first, limit = {"map": (0x80, 16), "array": (0x90, 16), "str": (0xA0, 32)}.get(kind, (0, 0))
    if size < limit:
        return bytes([first + size])
    byte, width = next(
        (byte, width)
        for byte, (name, width) in _SIZED.items()
        if name == kind and size < 1 << 8 * width
    )
    return bytes([byte]) + size.to_bytes(width, "big")


def _int(value: int) -> bytes:
    if value < 0x80:
        return bytes([value])
    byte, width = next((b, width) for b, width in _INTS.items() if value < 1 << 8 * width)
    return bytes([byte]) + value.to_bytes(width, "big")


def _text(text: str) -> bytes:
    return _head("str", len(text.encode())) + text.encode()
