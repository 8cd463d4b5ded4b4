"""The original format of Gemma 1, 2 and 3: torch pickles, as google/gemma_pytorch reads them.

A pickle is `{"model_state_dict": {name: tensor}}` in one file, or plain `{name: tensor}` in
shards with an index.  q, k and v are one matrix, rows of q, then k, then v; the embedding is
`embedder.weight`, in multimodal files `text_token_embedder.weight`, and is always the head too.
Quantised files hold int8 matrices, each with a `weight_scaler` for its rows.

A pickle can run any code when it is read.  Here torch reads it with `weights_only=True`, which
builds tensors and plain containers and refuses everything else.
"""

import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from gemcut.engine.checkpoints.stored_tensors import (
    FLOATS,
    StoredTensor,
    TensorSpec,
    check_stored,
    name_of,
)
from gemcut.engine.checkpoints.weight_files import check_file, read_shards
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.weights import CheckpointTensor, checkpoint_tensors

SINGLE, INDEX = "model.ckpt", "pytorch_model.bin.index.json"
SHARD = "pytorch_model-{:05d}-of-{:05d}.bin"
SUFFIXES = (".ckpt", ".pth", ".pt", ".bin")
STATE = "model_state_dict"

# Rotary tables, and the sampler's second view of the embedding: computed, not learnt.
_COMPUTED = re.compile(r"^(model\.)?((local_|global_)?freqs_cis$|sampler\.)")
_VISION = re.compile(r"^(siglip_vision_model|mm_soft_embedding_norm|mm_input_projection)\.")
_MULTIMODAL = re.compile(r"^text_token_embedder\.")
_BARE = re.compile(r"^(?=(layers|norm)\.)")
_SCALER = ".weight_scaler"
_GLOBAL = re.compile(r"(?:GLOBAL|class) ([\w.]+)")  # the name in the error of a refused pickle


def find_files(path: Path) -> list[Path]:
    """The pickle that `path` is, or the pickles or the index in that folder; perhaps none."""
    if not path.is_dir():
        return [path] if path.suffix in SUFFIXES else []
    found = [path / INDEX] if (path / INDEX).exists() else []
    found += sorted(path.glob("*.ckpt"))
    return found or [file for file in [path / "pytorch_model.bin"] if file.exists()]


def open_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor in file or folder `path`, those of the language model by their names here."""
    files = find_files(path)
    if not files:
        raise ValueError(f"{path}: holds neither {INDEX} nor a .ckpt file")
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{path}: holds several original checkpoints ({names}); give one file")
    is_index = files[0].name == INDEX
    found = read_shards(files[0], "bin", _read_tensors) if is_index else _read_tensors(files[0])
    stored: dict[str, StoredTensor] = {}
    for key, tensor in found.items():
        name = _BARE.sub("model.", _MULTIMODAL.sub("embedder.", key))
        if name in stored:
            raise ValueError(f"{stored[name].place} and {tensor.place} are the same weight")
        stored[name] = tensor
    return stored


def match_tensors(
    path: Path, opened: dict[str, StoredTensor], config: ModelConfig
) -> dict[str, StoredTensor]:
    """The tensors of `config` by name: exactly those, or ValueError.

    Left aside are tables that are computed anyway and, of Gemma 3, the vision part.
    """
    expected = list(tensor_specs(config))
    if "model.embed_tokens.weight" in opened:
        raise ValueError(
            f"{path}: a pickle of transformers, not the original's: its names are Hugging Face's"
        )
    multimodal = config.model_type == "gemma3_text"
    stored = {
        name: tensor
        for name, tensor in opened.items()
        if not (_COMPUTED.match(name) or (multimodal and _VISION.match(name)))
    }
    stored = _with_scalers(path, stored)
    check_stored(path, stored, expected)
    return stored


def tensor_specs(config: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor of the original format; ValueError for a model that it cannot hold."""
    if config.model_type == "vaultgemma":
        raise ValueError("vaultgemma has no original (gemma_pytorch) format")
    if config.classifier is not None:
        raise ValueError(f"{config.architectures[0]} has no original (gemma_pytorch) format")
    if config.attention_bias:
        raise ValueError("attention_bias is true, but the original format holds no biases")
    if not config.tie_word_embeddings:
        raise ValueError(
            "tie_word_embeddings is false, but in the original format the embedding is the head"
        )
    fused: list[CheckpointTensor] = []
    for tensor in checkpoint_tensors(config):
        if tensor.field != "qkv":
            yield TensorSpec(_name(tensor), tensor.shape, (tensor,))
            continue
        fused.append(tensor)
        if len(fused) == 3:
            rows = sum(each.shape[0] for each in fused)
            name = f"model.layers.{tensor.layer}.self_attn.qkv_proj.weight"
            yield TensorSpec(name, (rows, *tensor.shape[1:]), tuple(fused))
            fused = []


def write_file(file: Path, tensors: Mapping[str, Callable[[], Tensor]]) -> None:
    """Write one pickle: a shard, or the whole checkpoint where `file` has that name."""
    state = {name: make() for name, make in tensors.items()}
    torch.save({STATE: state} if file.name == SINGLE else state, file)


def _name(tensor: CheckpointTensor) -> str:
    if tensor.field == "embedding":
        return "embedder.weight"
    return tensor.name.replace(".q_norm.", ".query_norm.").replace(".k_norm.", ".key_norm.")


def _read_tensors(file: Path) -> dict[str, StoredTensor]:
    state, record_sizes = _unpickle(file)
    if isinstance(state, dict) and STATE in state:
        state = state[STATE]
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{file}: holds {type(state).__name__}, not named tensors")
    stored = {name: _stored(file, name, value) for name, value in state.items()}
    # A memory-mapped tensor reaches as far as the pickle says: past the end of a record that is
    # too short, into the next one.
    storages = [tensor.load().untyped_storage() for tensor in stored.values()]
    sizes = Counter({each.data_ptr(): each.nbytes() for each in storages if each.nbytes()}.values())
    if sizes - record_sizes:
        raise ValueError(f"{file}: damaged (tensors and the bytes stored for them differ)")
    return stored


def _stored(file: Path, name: Any, value: Any) -> StoredTensor:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        raise ValueError(f"{file}: {name!r} is {type(value).__name__}, not a tensor")
    if value.layout != torch.strided or value.device.type != "cpu":
        raise ValueError(f"{file}: {name} is not a plain tensor with data")
    tensor = value.detach()
    return StoredTensor(f"{file.name}: {name}", tuple(tensor.shape), tensor.dtype, lambda: tensor)


def _unpickle(file: Path) -> tuple[Any, Counter[int]]:
    """The content of the pickle, and the number of its tensors' records of each size."""
    check_file(file)
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise ValueError(
            f"{file}: damaged or cut short, or no file that torch.save wrote"
        ) from None
    if packed := [record.filename for record in records if record.compress_type]:
        # a memory-mapped tensor would be its compressed bytes
        raise ValueError(f"{file}: {packed[0]} is compressed, which torch.save never does")
    sizes = Counter(record.file_size for record in records if "/data/" in record.filename)
    try:
        return torch.load(file, weights_only=True, mmap=True, map_location="cpu"), sizes
    except UnpicklingError as error:
        wanted = _GLOBAL.search(str(error))
        asks = f" ({wanted[1]})" if wanted else ""
        raise ValueError(
            f"{file}: refused: the pickle asks for more than plain tensors{asks}"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle can raise any error in the reader
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{file}: damaged ({reason})") from None


def _with_scalers(path: Path, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors with each scaler joined to the int8 matrix whose rows it scales."""
    joined = {name: tensor for name, tensor in stored.items() if not name.endswith(_SCALER)}
    for name in stored.keys() - joined.keys():
        scaler, owner = stored[name], name.removesuffix(_SCALER) + ".weight"
        if owner not in joined:
            raise ValueError(f"{path}: {scaler.place} scales no weight")
        weight = joined[owner]
        if weight.dtype != torch.int8 or len(weight.shape) != 2:
            raise ValueError(
                f"{path}: {weight.place} has a scaler, but is {name_of(weight.dtype)} "
                f"{list(weight.shape)}, not an int8 matrix"
            )
        if scaler.shape != weight.shape[:1] or scaler.dtype not in FLOATS:
            raise ValueError(
                f"{path}: {scaler.place} is {name_of(scaler.dtype)} {list(scaler.shape)}, "
                f"not a float for each of {weight.shape[0]} rows"
            )
        joined[owner] = StoredTensor(weight.place, weight.shape, weight.dtype, weight.load, scaler)
    for name, tensor in joined.items():
        if tensor.dtype == torch.int8 and tensor.scaler is None:
            scaler_name = name.removesuffix(".weight") + _SCALER
            raise ValueError(f"{path}: {tensor.place} is int8, but {scaler_name} is missing")
    return joined
