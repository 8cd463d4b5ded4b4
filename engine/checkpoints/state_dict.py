"""Tensors in memory as a checkpoint: a state dict of transformers' Gemma, or what a trainer sends.

They have the names of Hugging Face's files, are checked as the tensors of a file are, by what their
headers would say, and are read as those are: each is copied, none is kept.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from gemcut.engine.checkpoints.hub import resolve_checkpoint
from gemcut.engine.checkpoints.huggingface import match_weights, model_name
from gemcut.engine.checkpoints.load import load_tokenizer
from gemcut.engine.checkpoints.safetensor_headers import FLOATS, TensorHeader
from gemcut.engine.checkpoints.stored_tensors import name_of
from gemcut.engine.checkpoints.stored_weights import StoredWeight
from gemcut.engine.checks import printable, shorten
from gemcut.engine.config.model_config import ModelConfig
from gemcut.tokenizer import Tokenizer
from gemcut.tokenizer.tokenizer_files import FILES as TOKENIZER_FILES

Tensors = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]  # by Hugging Face's names

_NAMES = {dtype: name for name, dtype in FLOATS.items()}
_PLACE = "tensors"  # in messages, where a folder's name would be


@dataclass(frozen=True, eq=False)
class GivenTensor(TensorHeader):
    """A tensor in memory, with what the header of a file would say of it."""

    tensor: Tensor

    def __str__(self) -> str:
        return printable(self.key)

    def load(self) -> Tensor:
        """The tensor itself."""
        return self.tensor


def match_tensors(
    tensors: Tensors, config: ModelConfig, *, partial: bool = False
) -> dict[str, StoredWeight]:
    """The weights of `config` by name: exactly those, with `partial` some; or ValueError.

    An iterable of pairs is read to its end, and held until the weights are read.
    """
    given = [_given(name, tensor) for name, tensor in _pairs(tensors)]
    names = Counter(each.key for each in given)
    if len(names) < len(given):
        twice = next(name for name, count in names.items() if count > 1)
        raise ValueError(f"{_PLACE}: {printable(twice)} is there twice")
    plain = replace(config, quantization=None)
    if partial and config.tie_word_embeddings:
        _check_tied(given, plain)
    return match_weights(_PLACE, given, plain, may_lack_any=partial)


def _check_tied(given: Sequence[GivenTensor], config: ModelConfig) -> None:
    """Nothing, or ValueError where a head that is the embedding comes without it."""
    by_name = {model_name(each.key, config): each for each in given}
    head = by_name.get("lm_head.weight")
    if head is not None and "model.embed_tokens.weight" not in by_name:
        raise ValueError(f"{_PLACE}: {head} is the embedding here: leave it out, or give both")


def _pairs(tensors: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(tensors, Mapping):
        return tensors.items()
    if isinstance(tensors, Tensor | str) or not isinstance(tensors, Iterable):
        kind = type(tensors).__name__
        raise ValueError(f"{_PLACE} are a {kind}, not a mapping or pairs (name, tensor)")
    pairs = []
    for pair in tensors:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(f"{_PLACE}: {_kind(pair)} is no pair (name, tensor)")
        pairs.append(tuple(pair))
    return pairs


def _given(name: Any, tensor: Any) -> GivenTensor:
    """A tensor with its header; ValueError where it has no plain values of its own."""
    if not isinstance(name, str):
        raise ValueError(f"{_PLACE}: the name {shorten(name)} is not a string")
    shown = f"{_PLACE}: {printable(name)}"
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        hint = "; give full tensors (full_tensor() of a DTensor)"
        hint = hint if isinstance(tensor, Tensor) else ""
        raise ValueError(f"{shown} is a {type(tensor).__name__}, not a torch.Tensor{hint}")
    if tensor.is_meta:
        raise ValueError(f"{shown} is on the meta device: it has no values")
    if tensor.layout != torch.strided:
        raise ValueError(f"{shown} has the layout {name_of(tensor.layout)}, not strided")
    if not _has_values(tensor):
        raise ValueError(f"{shown} has no memory of its own: freed (by FSDP?), nested or traced")
    dtype = _NAMES.get(tensor.dtype, name_of(tensor.dtype))
    return GivenTensor(Path(_PLACE), name, tuple(tensor.shape), dtype, tensor.detach())


def _has_values(tensor: Tensor) -> bool:
    """Whether the memory of a tensor holds all of it."""
    try:
        extent = sum(
            (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        last = (tensor.storage_offset() + extent + 1) * tensor.dtype.itemsize
        return not tensor.numel() or tensor.untyped_storage().nbytes() >= last
    except RuntimeError:  # NotImplementedError is one: within torch.func, and of nested ones
        return False


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, Tensor) else shorten(value)


def read_config(config: Any) -> ModelConfig:
    """A ModelConfig, from one, from what a config.json holds, or from a config of transformers."""
    if not isinstance(config, ModelConfig):
        as_dict = getattr(config, "to_dict", None)
        is_known = isinstance(config, Mapping) or callable(as_dict)
        if not is_known or isinstance(config, type):
            raise ValueError(
                f"config is a {type(config).__name__}, not a ModelConfig, a dictionary or a config "
                f"of transformers"
            )
        values: Any = config if isinstance(config, Mapping) else as_dict()  # pyright: ignore
        try:
            config = ModelConfig.from_dict(values)
        except ValueError as error:
            raise ValueError(f"config: {error}") from None
    if config.quantization is not None:
        raise ValueError(
            "config has a quantization_config, but tensors in memory are plain: take it out and "
            "give quantization=, or give the model's folder to from_pretrained"
        )
    return config


def read_tokenizer(tokenizer: Any, config: ModelConfig) -> Tokenizer | None:
    """A Tokenizer, from one, a folder, a Hugging Face id, or what writes its files by itself."""
    if tokenizer is None or isinstance(tokenizer, Tokenizer):
        return tokenizer
    if isinstance(tokenizer, str | Path):
        try:
            return load_tokenizer(resolve_checkpoint(tokenizer, files=TOKENIZER_FILES), config)
        except ValueError as error:
            raise ValueError(f"tokenizer: {error}") from None
    save = getattr(tokenizer, "save_pretrained", None)
    decodes = callable(getattr(tokenizer, "decode", None))  # a model would save its weights
    if isinstance(tokenizer, type) or not callable(save) or not decodes:
        raise ValueError(
            f"tokenizer is a {type(tokenizer).__name__}, not a Tokenizer, a folder, a Hugging Face "
            f"id or a tokenizer of transformers"
        )
    with TemporaryDirectory() as folder:
        save(folder)
        return load_tokenizer(Path(folder), config)
