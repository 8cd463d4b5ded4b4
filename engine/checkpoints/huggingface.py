"""Hugging Face's format: safetensors files, their headers, and the names of their tensors.

A file is judged by its header before a byte is allocated: transformers fills a missing weight with
random numbers and drops one that it does not know; here both are errors.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from gemcut.engine.checkpoints.compressed_tensors import QuantizedHeader, gather
from gemcut.engine.checkpoints.safetensor_headers import FLOATS, TensorHeader, open_headers
from gemcut.engine.checkpoints.stored_tensors import (
    StoredTensor,
    TensorSpec,
    first_of,
    pieces,
)
from gemcut.engine.checkpoints.stored_weights import StoredWeight
from gemcut.engine.checkpoints.weight_files import check_index, read_weight_map
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.weights import CheckpointTensor, checkpoint_tensors
from gemcut.kernels.quantized_weight import dequantized

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-{:05d}-of-{:05d}.safetensors"

# Multimodal Gemma 3: `language_model.model.layers` on the Hub, `model.language_model.layers` as
# transformers 5 saves it.
_TEXT_PREFIX = re.compile(r"^(model\.)?language_model\.(model\.)?")
_VISION = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")
_BARE = re.compile(r"^(?=(embed_tokens|layers|norm)\.)")  # what is saved without a head
_BUFFER = re.compile(r"rotary_emb\.inv_freq$")  # old files; rope.py computes it


def find_files(path: Path) -> list[Path]:
    """The single file or the index in folder `path`, in a list; a single file comes first."""
    return [path / name for name in (SINGLE, INDEX) if (path / name).exists()][:1]


def open_tensors(path: Path) -> list[TensorHeader]:
    """Every tensor in the folder's weight files; an index must agree with the files it names."""
    found: dict[str, TensorHeader] = {}
    for file in require_files(path):
        for header in open_headers(file):
            if (key := header.key) in found:
                raise ValueError(f"{path}: {key} is in {found[key].file.name} and {file.name}")
            found[key] = header
    if not (path / SINGLE).exists():
        held = {key: tensor.file.name for key, tensor in found.items()}
        check_index(path / INDEX, read_weight_map(path / INDEX), held)
    return list(found.values())


def open_named(path: Path, config: ModelConfig) -> dict[str, TensorHeader]:
    """The tensors of the language model in the folder's files, by the names of this package."""
    return _by_model_name(open_tensors(path), config)


def match_tensors(
    path: Path, opened: list[TensorHeader], config: ModelConfig
) -> dict[str, StoredTensor]:
    """The tensors of `config` by name: exactly those, or ValueError; quantised ones as floats."""
    return {name: _as_floats(header) for name, header in _match(path, opened, config).items()}


def match_weights(
    folder: Path | str,
    headers: Sequence[TensorHeader],
    config: ModelConfig,
    any_head: bool = False,
    may_lack_head: bool = False,
    may_lack_any: bool = False,
) -> dict[str, StoredWeight]:
    """The same as they are; see `_match`."""
    return {
        name: StoredWeight(
            str(header),
            header.shape,
            header.layout if isinstance(header, QuantizedHeader) else None,
            header.load,
        )
        for name, header in _match(
            folder, headers, config, any_head, may_lack_head, may_lack_any
        ).items()
    }


def _as_floats(header: TensorHeader | QuantizedHeader) -> StoredTensor:
    if isinstance(header, TensorHeader):
        return StoredTensor(str(header), header.shape, FLOATS[header.dtype], header.load)

    def load() -> Tensor:
        return dequantized(header.load(), torch.float32)

    dtype = FLOATS[header.scales.dtype]
    return StoredTensor(str(header), header.shape, dtype, load, count=header.count)


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


def _match(
    folder: Path | str,
    headers: Sequence[TensorHeader],
    config: ModelConfig,
    any_head: bool = False,
    may_lack_head: bool = False,
    may_lack_any: bool = False,
) -> dict[str, TensorHeader | QuantizedHeader]:
    """The headers of the tensors of `config` by name: exactly those, or ValueError.

    With `any_head` the files may hold other heads too; with `may_lack_head` the model's own may be
    missing, and with `may_lack_any` whatever they have not.
    """
    expected = {tensor.name: tensor for tensor in checkpoint_tensors(config)}
    stored: dict[str, TensorHeader | QuantizedHeader] = dict(_by_model_name(headers, config))
    if config.quantization is not None:
        stored = gather(_by_model_name(headers, config), config, expected)
    if any_head:
        stored = {name: x for name, x in stored.items() if name in expected or not is_head(name)}
    elif config.tie_word_embeddings:
        _drop_tied_head(stored)
    if may_lack_head:
        expected = {n: tensor for n, tensor in expected.items() if n in stored or not is_head(n)}
    if may_lack_any:
        expected = {name: tensor for name, tensor in expected.items() if name in stored}
    _check(folder, stored, expected)
    return stored


def is_head(name: str) -> bool:
    """Whether a tensor of a checkpoint is applied after the last norm."""
    return name.startswith(("lm_head.", "score."))


def _by_model_name(headers: Sequence[TensorHeader], config: ModelConfig) -> dict[str, TensorHeader]:
    """The tensors of the language model by the names that `checkpoint_tensors` gives them."""
    stored: dict[str, TensorHeader] = {}
    for header in headers:
        if (name := model_name(header.key, config)) is None:
            continue
        if name in stored:
            raise ValueError(f"{stored[name]} and {header} are the same weight")
        stored[name] = header
    return stored


def model_name(key: str, config: ModelConfig) -> str | None:
    """The name that this package has for a tensor or module; None where it needs none of it."""
    if _BUFFER.search(key):
        return None
    if config.model_type == "gemma3_text":
        if _VISION.match(key):
            return None
        key = _TEXT_PREFIX.sub("", key)
    return _BARE.sub("model.", key)


def _drop_tied_head(stored: dict[str, TensorHeader | QuantizedHeader]) -> None:
    """Drop a head that repeats the tied embedding (some trainers write it out)."""
    head, embedding = stored.get("lm_head.weight"), stored.get("model.embed_tokens.weight")
    if not isinstance(head, TensorHeader) or not isinstance(embedding, TensorHeader):
        return
    if (head.shape, head.dtype) == (embedding.shape, embedding.dtype):
        both = zip(pieces(head.load()), pieces(embedding.load()), strict=True)
        if all(torch.equal(a, b.to(a.device)) for a, b in both):
            del stored["lm_head.weight"]
            return
    raise ValueError(f"{head} differs from the embedding, but tie_word_embeddings is true")


def _check(
    folder: Path | str,
    stored: Mapping[str, TensorHeader | QuantizedHeader],
    expected: Mapping[str, CheckpointTensor],
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
        if isinstance(header, TensorHeader) and header.dtype not in FLOATS:
            raise ValueError(
                f"{folder}: {header} is {header.dtype}; supported are {', '.join(FLOATS)}"
            )
