"""Small GGUF files, written by the gguf package as llama.cpp's converter writes them; and by hand.

The package's own table names the tensors, so gemcut's is held against it.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from random_models import random_model
from torch import Tensor
from transformers import PreTrainedModel
from vocabulary import CONTROL, MARKERS, USER_DEFINED

gguf = pytest.importorskip("gguf")

ARCHS = {"gemma": "GEMMA", "gemma2": "GEMMA2", "gemma3_text": "GEMMA3"}
# Columns are multiples of 32 here, and those of `down` are an odd one.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 520,
    "max_position_embeddings": 128,
}


def model_for_gguf(model_type: str, **overrides: Any) -> PreTrainedModel:
    """A small random model whose scale and layers are those that llama.cpp assumes."""
    if model_type != "gemma":
        overrides = {"query_pre_attn_scalar": 16} | overrides
    if model_type == "gemma3_text":
        overrides = {"num_hidden_layers": 7, "layer_types": None, "rope_scaling": None} | overrides
    return random_model(model_type, **(SIZES | overrides))


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    kind: str,
    vocabulary: Path | None = None,
    tensors: Mapping[str, Tensor | None] | None = None,
    **values: Any,
) -> Path:
    """Write a model with its matrices in type `kind`, norms in float32, and a vocabulary.

    `values` are keys of the metadata: added, changed, or left out where they are None; so are
    `tensors`, by GGUF's names and in float32.
    """
    config: Any = model.config
    arch = gguf.MODEL_ARCH[ARCHS[config.model_type]]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    metadata = metadata_of(config) | ({} if vocabulary is None else vocabulary_of(vocabulary))
    for key, value in (metadata | values).items():
        if value is not None:
            _add(writer, key, value)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tensors = tensors or {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy() + (1 if name.endswith("norm.weight") else 0)
        stored = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        quantised = gguf.quants.quantize(array, stored)
        place = names.get_name(name, try_suffixes=(".weight",)) or "output.weight"
        if place not in tensors:
            writer.add_tensor(place, quantised, raw_dtype=stored)
    for name, tensor in tensors.items():
        if tensor is not None:
            writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def metadata_of(config: Any) -> dict[str, Any]:
    """A config's keys, as the converter writes them for its family."""
    arch = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[ARCHS[config.model_type]]]
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    if arch == "gemma2":
        values["attn_logit_softcapping"] = config.attn_logit_softcapping
    if arch != "gemma":
        values["final_logit_softcapping"] = config.final_logit_softcapping
        values["attention.sliding_window"] = config.sliding_window
    if arch == "gemma3":
        rope = config.rope_parameters["full_attention"]
        values["rope.freq_base"] = float(rope["rope_theta"])
        if rope["rope_type"] == "linear":
            values["rope.scaling.type"] = "linear"
            values["rope.scaling.factor"] = float(rope["factor"])
    return {f"{arch}.{key}": value for key, value in values.items()}


def vocabulary_of(path: Path) -> dict[str, Any]:
    """A tokenizer.model's keys: special tokens are control ones, and spaces of others spaces."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokens, scores, types = [], [], []
    for i in range(len(processor)):
        piece, kind = processor.id_to_piece(i), 1
        if processor.is_byte(i):
            kind = 6
        elif piece in (*CONTROL, *MARKERS):
            kind = 3
        elif piece in USER_DEFINED:
            piece, kind = piece.replace("▁", " "), 4
        tokens.append(piece)
        scores.append(processor.get_score(i) if kind in (1, 6) else -1000.0)
        types.append(kind)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def dequantised_state(path: Path, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A file's tensors by the names in `model`, read and dequantised by the gguf package."""
    config: Any = model.config
    arch = gguf.MODEL_ARCH[ARCHS[config.model_type]]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    state = {}
    for name in model.state_dict():
        place = names.get_name(name, try_suffixes=(".weight",)) or "output.weight"
        if place not in held and name == "lm_head.weight":
            place = "token_embd.weight"
        array = gguf.dequantize(held[place].data, held[place].tensor_type)
        state[name] = torch.tensor(array) - (1 if name.endswith("norm.weight") else 0)
    return state


# By hand, for what the package does not write


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    """The description of a tensor; `shape` is torch's."""
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return string(name) + dims + struct.pack("<IQ", kind, offset)


def file_of(
    keys: list[bytes],
    tensors: list[bytes],
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A whole file; `counts` are those that it claims, of tensors and of keys."""
    start = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(keys))))
    header = start + b"".join(keys) + b"".join(tensors)
    return header + b"\0" * (-len(header) % 32) + data
