"""Layouts of checkpoints: where each tensor of the model stands in a format's files.

A format names, fuses and transposes tensors in its own way, and may hold them as scaled integers.
A slot is one tensor that a format has a place for; an entry is one tensor that a file really holds,
known by its header and not yet read.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gemcut.engine.checkpoints.huggingface import check_index, first_of, pieces, read_weight_map
from gemcut.engine.execution.weights import CheckpointTensor

FLOATS = (torch.bfloat16, torch.float32, torch.float16, torch.float64)


@dataclass(frozen=True)
class Slot:
    """One tensor of a format, and the parts whose rows it holds, one after another."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[CheckpointTensor, ...]
    transposed: bool = False  # stored [in, out]; rows are those of its transpose


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    place: str  # file and name, for messages
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    scaler: "Entry | None" = None  # [rows]: the weight is int8 * scaler[:, None]


def check_entries(path: Path, entries: Mapping[str, Entry], slots: Iterable[Slot]) -> None:
    """Nothing, or ValueError that names a missing, extra, misshapen or unreadable tensor."""
    expected = {slot.name: slot for slot in slots}
    if missing := [name for name in expected if name not in entries]:
        raise ValueError(f"{path}: {first_of(missing)} missing")
    if extra := [entry.place for name, entry in entries.items() if name not in expected]:
        raise ValueError(f"{path}: {first_of(extra)} not part of the model")
    for name, entry in entries.items():
        if entry.shape != expected[name].shape:
            raise ValueError(
                f"{path}: {entry.place} is {list(entry.shape)}, "
                f"the config says {list(expected[name].shape)}"
            )
        if entry.scaler is None and entry.dtype not in FLOATS:
            raise ValueError(
                f"{path}: {entry.place} is {name_of(entry.dtype)}; "
                f"supported are {', '.join(map(name_of, FLOATS))}"
            )


def read_shards(
    index: Path, suffix: str, read: Callable[[Path], dict[str, Entry]]
) -> dict[str, Entry]:
    """Every tensor of the files that an index names, which must agree with it."""
    weight_map = read_weight_map(index, suffix)
    found: dict[str, Entry] = {}
    for name in sorted(set(weight_map.values())):
        for key, entry in read(index.parent / name).items():
            if key in found:
                raise ValueError(f"{index.parent}: {found[key].place} and {entry.place} repeat")
            found[key] = entry
    held = {key: entry.place.partition(":")[0] for key, entry in found.items()}
    check_index(index, weight_map, held)
    return found


def read_rows(
    entry: Entry, start: int, stop: int, dtype: torch.dtype, *, transposed: bool = False
) -> Tensor:
    """Rows start..stop of a tensor, in memory of their own and in `dtype`."""
    source = entry.load()
    source = (source.T if transposed else source)[start:stop]
    scaler = None if entry.scaler is None else entry.scaler.load()[start:stop].float()
    target = torch.empty(source.shape, dtype=dtype)
    at = 0
    for piece, place in zip(pieces(source), pieces(target), strict=True):
        if scaler is not None:  # the product in float32, and one rounding
            piece = piece.float() * scaler[at : at + len(piece), None]
            at += len(piece)
        place.copy_(piece)
    return target


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
