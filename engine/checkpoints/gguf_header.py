"""The header of a GGUF file: its metadata and the places of its tensors, checked; no data is read.

    "GGUF", version u32, number of tensors u64, number of keys u64
    of each key:      name, type u32, value; an array is the type of its items u32, their number u64
    of each tensor:   name, number of dimensions u32, dimensions u64, type u32, offset u64
    data, from the next multiple of general.alignment on; offsets count from there

All is little-endian, and a string is its length u64 and so many bytes of UTF-8.  Versions 2 and 3
are the same, except that 3 may be big-endian.

The gguf package's own reader makes several objects of each word of a vocabulary (8 seconds for
Gemma 3's), and counts up to 2**60 where a damaged file says so.  Here a count is held against the
bytes that are left, before anything is made of it.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from gemcut.engine.checkpoints.weight_files import check_file
from gemcut.engine.checks import shorten

MAGIC, VERSIONS = b"GGUF", (2, 3)
# Those before GGUF, as their files begin.
_OLDER = (b"ggml", b"lmgg", b"ggmf", b"fmgg", b"ggjt", b"tjgg")
MAX_TENSORS, MAX_KEYS, MAX_ITEMS, MAX_DIMS = 2**16, 2**16, 2**24, 4
ALIGNMENT, ALIGNMENTS = 32, tuple(2**i for i in range(3, 21))
STRING, ARRAY = 8, 9
# The other types of values by their numbers, as struct and numpy name them.
_NUMBERS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))
_ANEW = "make it anew from the model with llama.cpp's convert_hf_to_gguf.py"


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the header describes it."""

    name: str
    shape: tuple[int, ...]  # rows first, as torch has it
    type: Any  # gguf.GGMLQuantizationType
    start: int  # its first byte in the file
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says before its data."""

    path: Path
    values: Mapping[str, Any]  # metadata; arrays of numbers are numpy's, of strings lists
    tensors: Mapping[str, GgufTensor]

    def __len__(self) -> int:
        """The number of tensors."""
        return len(self.tensors)

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A value of the metadata, or `default`; ValueError where it is of another kind."""
        value = self.values.get(key, default)
        is_bool = isinstance(value, bool) and kind is not bool
        if value is not default and (is_bool or not isinstance(value, kind)):
            raise ValueError(f"{self.path}: {key} is {shorten(value)}, a {type(value).__name__}")
        return value

    def bytes_of(self, tensor: GgufTensor) -> np.ndarray:
        """The bytes of a tensor in the memory-mapped file: [rows, bytes of a row] uint8."""
        # copy on write: torch warns of memory that cannot be written
        data = np.memmap(self.path, np.uint8, "c", tensor.start, (tensor.nbytes,))
        return data.reshape(math.prod(tensor.shape[:-1]), -1)


def gguf_package() -> ModuleType:
    """The gguf package, which knows the types of tensors."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files need the gguf package: pip install gguf") from error
    return gguf


def read_header(path: Path) -> GgufHeader:
    """The header of a file; ValueError says in one line what is wrong with it."""
    check_file(path)
    package = gguf_package()
    size = path.stat().st_size
    with path.open("rb") as file:
        _check_start(path, file.read(8))
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _read(path, _Cursor(data, size, 8), package)
            except _DamagedError as error:
                raise ValueError(f"{path}: {error}") from None


def _check_start(path: Path, start: bytes) -> None:
    if start[:4] in _OLDER:
        raise ValueError(f"{path}: of the time before GGUF, which is not read; {_ANEW}")
    if start[:4] != MAGIC:
        raise ValueError(f"{path}: no GGUF file; it begins with {shorten(start[:4])}")
    if len(start) < 8:
        raise ValueError(f"{path}: cut short within its header")
    version = int.from_bytes(start[4:], "little")
    if version not in VERSIONS:
        if int.from_bytes(start[4:], "big") in range(1, 256):
            hint = "big-endian, which is not read; llama.cpp's gguf_convert_endian.py turns it"
        else:
            hint = f"GGUF version {version}, but 2 and 3 are read; {_ANEW}"
        raise ValueError(f"{path}: {hint}")


class _DamagedError(ValueError):
    """What is wrong with a header, without the file's name."""


class _Cursor:
    """A place in the bytes of a header; whatever it reads is there."""

    def __init__(self, data: mmap.mmap, size: int, at: int) -> None:
        self.data, self.size, self.at = data, size, at

    def take(self, count: int, what: str) -> int:
        """The place of so many bytes, which it passes."""
        start, self.at = self.at, self.at + count
        if self.at > self.size:
            raise _DamagedError(f"cut short, or damaged: {what} goes past its end")
        return start

    def number(self, letter: str, what: str) -> Any:
        """A number of a type of struct's."""
        start = self.take(struct.calcsize(f"<{letter}"), what)
        return struct.unpack_from(f"<{letter}", self.data, start)[0]

    def count(self, what: str, limit: int, item_size: int) -> int:
        """A number of items, each of so many bytes or more, which the file can hold."""
        count = self.number("Q", what)
        if count > limit or count * item_size > self.size - self.at:
            raise _DamagedError(f"cut short, or damaged: {what} is {count}")
        return count

    def string(self, what: str) -> str:
        """A string."""
        start = self.take(self.count(f"length of {what}", self.size, 1), what)
        return self._decoded(self.data[start : self.at], what)

    def strings(self, count: int, what: str) -> list[str]:
        """So many strings, without a call for each."""
        data, size, at, length_at = self.data, self.size, self.at, struct.Struct("<Q").unpack_from
        found = []
        for _ in range(count):
            start = at + 8
            at = start + length_at(data, at)[0] if start <= size else size + 1
            if at > size:
                raise _DamagedError(f"cut short, or damaged: {what} goes past its end")
            found.append(data[start:at])
        self.at = at
        try:
            return [one.decode() for one in found]
        except UnicodeDecodeError:
            return [self._decoded(one, f"{what}[{i}]") for i, one in enumerate(found)]

    def numbers(self, letter: str, count: int, what: str) -> np.ndarray:
        """So many numbers of one type."""
        start = self.take(count * struct.calcsize(f"<{letter}"), what)
        return np.frombuffer(self.data[start : self.at], f"<{letter}")

    def _decoded(self, text: bytes, what: str) -> str:
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise _DamagedError(f"{what} is not UTF-8: {shorten(text)}") from None


def _read(path: Path, cursor: _Cursor, package: ModuleType) -> GgufHeader:
    num_tensors = cursor.count("the number of tensors", MAX_TENSORS, 24)
    num_keys = cursor.count("the number of keys", MAX_KEYS, 13)
    values: dict[str, Any] = {}
    for i in range(num_keys):
        key = cursor.string(f"key {i}")
        if key in values or not key:
            raise _DamagedError(f"key {i} {shorten(key)} is empty, or there twice")
        values[key] = _read_value(cursor, key)
    alignment = values.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment not in ALIGNMENTS:
        raise _DamagedError(f"general.alignment {shorten(alignment)} is no power of 2 from 8 on")
    found = [_read_tensor(cursor, i, package) for i in range(num_tensors)]
    first = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for tensor in found:
        if tensor.name in tensors or not tensor.name:
            raise _DamagedError(f"the name {shorten(tensor.name)} is empty, or there twice")
        if tensor.start % alignment:
            raise _DamagedError(
                f"{tensor.name} begins at {tensor.start}, no multiple of {alignment}"
            )
        placed = GgufTensor(
            tensor.name, tensor.shape, tensor.type, first + tensor.start, tensor.nbytes
        )
        if placed.start + placed.nbytes > cursor.size:
            raise _DamagedError(
                f"cut short, or damaged: {placed.name} ends at {placed.start + placed.nbytes}, "
                f"and the file at {cursor.size}"
            )
        tensors[placed.name] = placed
    _check_overlaps(list(tensors.values()))
    return GgufHeader(path, values, tensors)


def _read_value(cursor: _Cursor, key: str) -> Any:
    kind = cursor.number("I", key)
    if kind in _NUMBERS:
        return cursor.number(_NUMBERS[kind], key)
    if kind == STRING:
        return cursor.string(key)
    if kind != ARRAY:
        raise _DamagedError(f"{shorten(key)} is of type {kind}, which is unknown")
    items = cursor.number("I", key)
    what = f"the number of items of {shorten(key)}"
    if items in _NUMBERS:
        letter = _NUMBERS[items]
        return cursor.numbers(
            letter, cursor.count(what, MAX_ITEMS, struct.calcsize(f"<{letter}")), key
        )
    if items == STRING:
        return cursor.strings(cursor.count(what, MAX_ITEMS, 8), key)
    raise _DamagedError(f"{shorten(key)} is an array of type {items}, which is unknown")


def _read_tensor(cursor: _Cursor, number: int, package: ModuleType) -> GgufTensor:
    """A tensor whose `start` is counted from the data's."""
    name = cursor.string(f"name of tensor {number}")
    place = f"tensor {shorten(name)}"
    num_dims = cursor.number("I", place)
    if not 1 <= num_dims <= MAX_DIMS:
        raise _DamagedError(f"{place} has {num_dims} dimensions")
    shape = tuple(cursor.number("Q", place) for _ in range(num_dims))[::-1]
    number, start = cursor.number("I", place), cursor.number("Q", place)
    try:
        kind = package.GGMLQuantizationType(number)
    except ValueError:
        raise _DamagedError(f"{place} is of type {number}, unknown to the gguf package") from None
    block, block_bytes = package.GGML_QUANT_SIZES[kind]
    if not all(shape) or shape[-1] % block:
        raise _DamagedError(f"{place} is {list(shape)}, in blocks of {block} columns")
    return GgufTensor(name, shape, kind, start, math.prod(shape) // block * block_bytes)


def _check_overlaps(tensors: list[GgufTensor]) -> None:
    in_order = sorted(tensors, key=lambda tensor: tensor.start)
    for one, other in pairwise(in_order):
        if one.start + one.nbytes > other.start:
            raise _DamagedError(f"{one.name} and {other.name} overlap")
