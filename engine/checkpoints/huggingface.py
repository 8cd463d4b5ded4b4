"""Hugging Face's format: safetensors files, their headers, and the names of their tensors.

A file is judged by its header before a byte is allocated: transformers fills a missing weight with
random numbers and drops one that it does not know; here both are errors.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gemcut.engine.checkpoints.stored_tensors import (
    StoredTensor,
    TensorSpec,
    first_of,
    pieces,
)
from gemcut.engine.checkpoints.weight_files import check_file, check_index, read_weight_map
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.weights import CheckpointTensor, checkpoint_tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-{:05d}-of-{:05d}.safetensors"
FLOATS = {  # by the names in safetensors' headers
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F16": torch.float16,
    "F64": torch.float64,
}

# Multimodal Gemma 3: `language_model.model.layers` on the Hub, `model.language_model.layers` as
# transformers 5 saves it.
_TEXT_PREFIX = re.compile(r"^(model\.)?language_model\.(model\.)?")
_VISION = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")
_BARE = re.compile(r"^(?=(embed_tokens|layers|norm)\.)")  # what is saved without a head
_BUFFER = re.compile(r"rotary_emb\.inv_freq$")  # old files; rope.py computes it


@dataclass(frozen=True)
class TensorHeader:
    """A tensor as the header of its safetensors file describes it."""

    file: Path
    key: str  # its name there
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.file.name}: {self.key}"

    def load(self) -> Tensor:
        """The tensor itself, from the memory-mapped file."""
        with open_file(self.file) as shard:
            return shard.get_tensor(self.key)


def find_files(path: Path) -> list[Path]:
    """The single file or the index in folder `path`, in a list; a single file comes first."""
    return [path / name for name in (SINGLE, INDEX) if (path / name).exists()][:1]


def open_tensors(path: Path) -> list[TensorHeader]:
    """Every tensor in the folder's weight files; an index must agree with the files it names."""
    found: dict[str, TensorHeader] = {}
    for file in require_files(path):
        with open_file(file) as shard:
            for key in sorted(shard.keys()):
                if key in found:
                    raise ValueError(f"{path}: {key} is in {found[key].file.name} and {file.name}")
                header = shard.get_slice(key)
                found[key] = TensorHeader(
                    file, key, tuple(header.get_shape()), str(header.get_dtype())
                )
    if not (path / SINGLE).exists():
        held = {key: tensor.file.name for key, tensor in found.items()}
        check_index(path / INDEX, read_weight_map(path / INDEX), held)
    return list(found.values())


def match_tensors(
    path: Path, opened: list[TensorHeader], config: ModelConfig
) -> dict[str, StoredTensor]:
    """The tensors of `config` by name: exactly those, or ValueError."""
    return {
        name: StoredTensor(str(header), header.shape, FLOATS[header.dtype], header.load)
        for name, header in match_headers(path, opened, config).items()
    }


def tensor_specs(config: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor of the model, none of them joined with another."""
    return (TensorSpec(each.name, each.shape, (each,)) for each in checkpoint_tensors(config))


def write_file(file: Path, tensors: Mapping[str, Callable[[], Tensor]]) -> None:
    """Write one safetensors file."""
    made = {name: make() for name, make in tensors.items()}
    save_file(made, file, metadata={"format": "pt"})


def require_files(folder: Path) -> list[Path]:
    """The files that hold the weights; a single file comes first, as in transformers."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    files = find_files(folder)
    if not files:
        hint = ""
        if any(any(folder.glob(f"*.{kind}")) for kind in ("bin", "ckpt", "pth", "msgpack")):
            hint = "; pickles and Flax's msgpack are read by `gemcut convert` alone"
        raise ValueError(f"{folder}: holds neither {SINGLE} nor {INDEX}{hint}")
    if files[0].name == SINGLE:
        return files
    return sorted({folder / name for name in read_weight_map(files[0]).values()})


def open_file(file: Path) -> Any:
    """An open safetensors file, memory-mapped; ValueError where it is damaged."""
    check_file(file)
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file}: damaged or cut short ({error})") from None


def match_headers(
    folder: Path,
    headers: list[TensorHeader],
    config: ModelConfig,
    any_head: bool = False,
    may_lack_head: bool = False,
) -> dict[str, TensorHeader]:
    """The headers of the tensors of `config` by name: exactly those, or ValueError.

    With `any_head` the files may hold other heads too; with `may_lack_head` the model's own may be
    missing.
    """
    stored = _by_model_name(headers, config)
    expected = {tensor.name: tensor for tensor in checkpoint_tensors(config)}
    if any_head:
        stored = {name: x for name, x in stored.items() if name in expected or not is_head(name)}
    elif config.tie_word_embeddings:
        _drop_tied_head(stored)
    if may_lack_head:
        expected = {n: tensor for n, tensor in expected.items() if n in stored or not is_head(n)}
    _check(folder, stored, expected)
    return stored


def is_head(name: str) -> bool:
    """Whether a tensor of a checkpoint is applied after the last norm."""
    return name.startswith(("lm_head.", "score."))


def _by_model_name(headers: list[TensorHeader], config: ModelConfig) -> dict[str, TensorHeader]:
    """The tensors of the language model by the names that `checkpoint_tensors` gives them."""
    stored: dict[str, TensorHeader] = {}
    for header in headers:
        if _BUFFER.search(header.key):
            continue
        name = header.key
        if config.model_type == "gemma3_text":
            if _VISION.match(name):
                continue
            name = _TEXT_PREFIX.sub("", name)
        name = _BARE.sub("model.", name)
        if name in stored:
            raise ValueError(f"{stored[name]} and {header} are the same weight")
        stored[name] = header
    return stored


def _drop_tied_head(stored: dict[str, TensorHeader]) -> None:
    """Drop a head that repeats the tied embedding (some trainers write it out)."""
    head, embedding = stored.get("lm_head.weight"), stored.get("model.embed_tokens.weight")
    if head is None or embedding is None:
        return
    if (head.shape, head.dtype) == (embedding.shape, embedding.dtype):
        both = zip(pieces(head.load()), pieces(embedding.load()), strict=True)
        if all(torch.equal(a, b) for a, b in both):
            del stored["lm_head.weight"]
            return
    raise ValueError(f"{head} differs from the embedding, but tie_word_embeddings is true")


def _check(
    folder: Path, stored: dict[str, TensorHeader], expected: dict[str, CheckpointTensor]
) -> None:
    if missing := [name for name in expected if name not in stored]:
        raise ValueError(f"{folder}: {first_of(missing)} missing")
    if extra := [str(stored[name]) for name in stored if name not in expected]:
        raise ValueError(f"{folder}: {first_of(extra)} not part of the model")
    for name, header in stored.items():
        if header.shape != expected[name].shape:
            raise ValueError(
                f"{folder}: {header} is {list(header.shape)}, "
                f"the config says {list(expected[name].shape)}"
            )
        if header.dtype not in FLOATS:
            raise ValueError(
                f"{folder}: {header} is {header.dtype}; supported are {', '.join(FLOATS)}"
            )
