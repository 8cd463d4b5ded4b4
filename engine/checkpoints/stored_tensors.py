"""Tensors in the files of any format: the place of each, its header, its rows in memory.

A format names, fuses and transposes tensors in its own way, and may hold them as scaled integers.
A TensorSpec is a tensor that a format has a place for; a StoredTensor is a tensor that a file
holds, known by its header and not yet read.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gemcut.engine.execution.weights import CheckpointTensor

FLOATS = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
PIECE = 2**25  # elements copied or examined at a time


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a format, and the checkpoint tensors whose rows it holds, one after another."""

    name: str
    shape: tuple[int, ...]
    members: tuple[CheckpointTensor, ...]
    transposed: bool = False  # stored [in, out]; rows are those of its transpose


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file."""

    place: str  # file and name, for messages
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    scaler: "StoredTensor | None" = None  # [rows]: the weight is int8 * scaler[:, None]
    count: int = 1  # tensors of the file that it is, beside the scaler


def check_stored(
    path: Path, stored: Mapping[str, StoredTensor], specs: Iterable[TensorSpec]
) -> None:
    """Nothing, or ValueError that names a missing, extra, misshapen or unreadable tensor."""
    expected = {spec.name: spec for spec in specs}
    if missing := [name for name in expected if name not in stored]:
        raise ValueError(f"{path}: {first_of(missing)} missing")
    if extra := [tensor.place for name, tensor in stored.items() if name not in expected]:
        raise ValueError(f"{path}: {first_of(extra)} not part of the model")
    for name, tensor in stored.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{path}: {tensor.place} is {list(tensor.shape)}, "
                f"the config says {list(expected[name].shape)}"
            )
        if tensor.scaler is None and tensor.dtype not in FLOATS:
            raise ValueError(
                f"{path}: {tensor.place} is {name_of(tensor.dtype)}; "
                f"supported are {', '.join(map(name_of, FLOATS))}"
            )


def first_of(names: list[str]) -> str:
    """The first of some names, how many more there are, and the verb."""
    if len(names) == 1:
        return f"{names[0]} is"
    return f"{names[0]} and {len(names) - 1} more are"


def read_rows(
    stored: StoredTensor, start: int, stop: int, dtype: torch.dtype, *, transposed: bool = False
) -> Tensor:
    """Rows start..stop of a tensor, in memory of their own and in `dtype`."""
    source = stored.load()
    source = (source.T if transposed else source)[start:stop]
    scaler = None if stored.scaler is None else stored.scaler.load()[start:stop].float()
    target = torch.empty(source.shape, dtype=dtype, device="cpu")
    at = 0
    for piece, place in zip(pieces(source), pieces(target), strict=True):
        if scaler is not None:  # the product in float32, and one rounding
            piece = piece.float() * scaler[at : at + len(piece), None]
            at += len(piece)
        place.copy_(piece)
    return target


def pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views of some rows each: they bound the buffer of a converting copy or of a test."""
    rows = torch.atleast_1d(tensor)  # a foreign file may hold a scalar, or no rows
    row_size = max(1, rows.numel() // max(1, rows.shape[0]))
    return rows.split(max(1, PIECE // row_size))


def row_ranges(shape: tuple[int, ...], elements: int) -> Iterator[slice]:
    """Ranges of the rows of a tensor, of about so many elements each: they bound a buffer."""
    rows = max(1, elements // max(1, torch.Size(shape[1:]).numel()))
    return (slice(start, start + rows) for start in range(0, shape[0], rows))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and every bit (a NaN equals itself)."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return all(
        torch.equal(x.view(whole), y.view(whole)) for x, y in zip(pieces(a), pieces(b), strict=True)
    )


def name_of(dtype: torch.dtype) -> str:
    """A dtype as config.json spells it."""
    return str(dtype).removeprefix("torch.")
