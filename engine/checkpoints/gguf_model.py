"""A GGUF file in place of a checkpoint's folder: its config, tokenizer and weights."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemcut.engine.checkpoints.gguf_config import as_decimal, read_config
from gemcut.engine.checkpoints.gguf_header import read_header
from gemcut.engine.checkpoints.gguf_vocabulary import read_vocabulary, token_keys
from gemcut.engine.checkpoints.gguf_weights import dequantized_types, stored_weights
from gemcut.engine.checkpoints.stored_tensors import name_of, pieces
from gemcut.engine.checkpoints.stored_weights import StoredWeight, refuse_quantized
from gemcut.engine.checks import warn_caller
from gemcut.engine.config.generation_file import settings_of
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.weight_layouts import Layouts
from gemcut.engine.execution.weights import fused_layouts, made_layouts
from gemcut.tokenizer import Tokenizer

# Settings in generation_config.json, and their last names in the metadata.
_SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


def gguf_config(path: Path) -> ModelConfig:
    """The config in a file's metadata; ValueError says in one line what is wrong with it."""
    header = read_header(path)
    return read_config(header, token_keys(header))


def gguf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file's metadata."""
    try:
        return read_vocabulary(read_header(path)).tokenizer()
    except ValueError as error:
        hint = "with skip_tokenizer_init=True an engine takes token ids alone"
        raise ValueError(f"{error}; {hint}") from None


def gguf_settings(path: Path) -> dict[str, Any]:
    """What a generation_config.json would say of sampling; empty where the file says nothing.

    ValueError names a value out of range by its key in the file.
    """
    header, settings = read_header(path), {}
    for name, key in _SAMPLING.items():
        kind = int if name == "top_k" else float
        value = header.get(f"general.sampling.{key}", kind)
        if value is not None:
            settings[name] = value if kind is int else as_decimal(value)
    settings_of(settings, lambda name: f"{path}: general.sampling.{_SAMPLING[name]}")
    return {"do_sample": True} | settings if settings else {}


def write_tokenizer(path: Path, folder: Path) -> None:
    """Write the tokenizer's files to a folder, as published checkpoints have them."""
    for name, content in read_vocabulary(read_header(path)).files().items():
        (folder / name).write_bytes(content)


def gguf_weights(path: Path, config: ModelConfig, dtype: torch.dtype) -> dict[str, StoredWeight]:
    """The tensors of a model, known by their headers; what becomes floats is said in one line."""
    header = read_header(path)
    stored = stored_weights(header, config, dtype)
    if kinds := dequantized_types(header):
        warn_caller(
            f"{path.name}: {', '.join(kinds)} tensors are read as {name_of(dtype)}; only Q4_0 and "
            f"Q8_0 stay as small as they are"
        )
    return stored


def gguf_layouts(path: Path, config: ModelConfig, quantization: str | None) -> Layouts:
    """The layouts of a model's weights: its own, or those that `quantization` gives floats."""
    stored = stored_weights(read_header(path), config, torch.bfloat16)
    if quantization is not None:
        refuse_quantized(stored, quantization)
        return made_layouts(config, quantization)
    return fused_layouts(config, {name: weight.layout for name, weight in stored.items()})[0]


def nonfinite_in_gguf(path: Path) -> list[str]:
    """The names of the tensors that hold a NaN or an infinity, as scales or floats."""
    found, header = [], read_header(path)
    config = read_config(header, token_keys(header))
    for stored in stored_weights(header, config, torch.float32).values():
        weight = stored.load()
        floats = weight if isinstance(weight, Tensor) else weight.scales
        if not all(piece.isfinite().all() for piece in pieces(floats)):
            found.append(stored.place.partition(": ")[2])
    return found
