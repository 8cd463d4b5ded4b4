"""GGUF as a format to convert from: every tensor as floats, under Hugging Face's names.

They are bfloat16, which is what Gemma was trained in, unless all matrices of the file are wider.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gemcut.engine.checkpoints.gguf_choice import is_gguf
from gemcut.engine.checkpoints.gguf_header import GgufHeader, read_header
from gemcut.engine.checkpoints.gguf_weights import stored_weights
from gemcut.engine.checkpoints.stored_tensors import StoredTensor, TensorSpec, pieces
from gemcut.engine.checkpoints.stored_weights import StoredWeight
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.weights import checkpoint_tensors
from gemcut.kernels.quantized_weight import QuantizedWeight, dequantized

WIDE = {"F32", "F64"}


def find_files(path: Path) -> list[Path]:
    """The file that `path` is."""
    return [path] if is_gguf(path) else []


def open_tensors(path: Path) -> GgufHeader:
    """The file's header."""
    return read_header(path)


def match_tensors(path: Path, opened: GgufHeader, config: ModelConfig) -> dict[str, StoredTensor]:
    """The tensors of `config` by name: exactly those, or ValueError."""
    kinds = {x.type.name for x in opened.tensors.values() if len(x.shape) == 2}
    dtype = torch.float32 if kinds <= WIDE else torch.bfloat16
    return {
        name: StoredTensor(weight.place, weight.shape, dtype, partial(_load_floats, weight, dtype))
        for name, weight in stored_weights(opened, config, dtype).items()
    }


def tensor_specs(config: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor of the model."""
    return (TensorSpec(each.name, each.shape, (each,)) for each in checkpoint_tensors(config))


def _load_floats(weight: StoredWeight, dtype: torch.dtype) -> Tensor:
    """A tensor as floats, dequantised into `dtype`, some rows at a time."""
    found = weight.load()
    if not isinstance(found, QuantizedWeight):
        return found
    target, start = torch.empty(weight.shape, dtype=dtype, device="cpu"), 0
    for piece in pieces(target):
        rows = slice(start, start + len(piece))
        piece.copy_(dequantized(found[rows], dtype))
        start = rows.stop
    return target
