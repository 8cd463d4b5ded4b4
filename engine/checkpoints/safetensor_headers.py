"""Tensors of safetensors files, known by their headers and read from the memory-mapped file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gemcut.engine.checkpoints.weight_files import check_file
from gemcut.engine.checks import printable

FLOATS = {  # by the names in safetensors' headers
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F16": torch.float16,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class TensorHeader:
    """A tensor as the header of its safetensors file describes it."""

    file: Path
    key: str  # its name there
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.file.name}: {printable(self.key)}"

    def load(self) -> Tensor:
        """The tensor itself, from the memory-mapped file."""
        with open_file(self.file) as shard:
            return shard.get_tensor(self.key)


def open_file(file: Path) -> Any:
    """An open safetensors file, memory-mapped; ValueError where it is damaged."""
    check_file(file)
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file}: damaged or cut short ({error})") from None


def open_headers(file: Path) -> list[TensorHeader]:
    """Every tensor of one file, by name."""
    found = []
    with open_file(file) as shard:
        for key in sorted(shard.keys()):
            header = shard.get_slice(key)
            shape, dtype = tuple(header.get_shape()), str(header.get_dtype())
            found.append(TensorHeader(file, key, shape, dtype))
    return found
