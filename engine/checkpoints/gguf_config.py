"""ModelConfig from a GGUF file's metadata, by llama.cpp's rules for what the metadata leave out.

    attention's scale       head_dim ** -0.5, except in the 27b sizes, which are known by their
                            number of layers: (width / query heads) ** -0.5
    gemma2                  every second layer is global; window 4096 and softcaps 50 and 30 where
                            the file does not say
    gemma3                  every sixth layer is global, and all are where there is no window; local
                            layers rotate by base 10 000 without scaling
    the head                output.weight, or the embedding where there is none

Floats are float32 there: 1e-6 is 9.99999997e-07, and becomes 1e-6 again.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gemcut.engine.checkpoints.gguf_header import GgufHeader
from gemcut.engine.checks import check_int, shorten
from gemcut.engine.config.config_file import GLOBAL, LOCAL, MAX_LAYERS
from gemcut.engine.config.model_config import ModelConfig

MODEL_TYPES = {"gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text"}
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
_PATTERNS = {"gemma2": 2, "gemma3": 6}  # layers up to a global one
_REFUSED = {
    "clip": "the images' part of a model; give the language model's file",
    "gemma3n": "which is not supported",
    "gemma4": "which is not supported",
    "gemma-embedding": "which generates no text",
}


def read_config(header: GgufHeader, tokens: Mapping[str, Any]) -> ModelConfig:
    """The config of a file; `tokens` are the keys of config.json that its vocabulary gives.

    ValueError names another architecture, and a key that is missing or out of range.
    """
    try:
        return ModelConfig.from_dict({**_values(header), **tokens})
    except ValueError as error:
        at = "" if str(error).startswith(f"{header.path}: ") else f"{header.path}: "
        raise ValueError(f"{at}{error}") from None


def _values(header: GgufHeader) -> dict[str, Any]:
    """The keys of config.json."""
    arch = header.get("general.architecture", str)
    if arch not in MODEL_TYPES:
        hint = _REFUSED.get(arch or "", f"supported are {', '.join(MODEL_TYPES)}")
        raise ValueError(f"general.architecture is {shorten(arch)}, {hint}")
    if header.get("split.count", int, 1) > 1:
        raise ValueError("one of several files; join them with llama.cpp's llama-gguf-split")
    layers = _uniform(header, f"{arch}.block_count")
    check_int(f"{arch}.block_count", layers, 1, MAX_LAYERS)
    width, heads = (
        _uniform(header, f"{arch}.{key}") for key in ("embedding_length", "attention.head_count")
    )
    check_int(f"{arch}.attention.head_count", heads, 1, 2**16)
    head_dim = _uniform(header, f"{arch}.attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if _uniform(header, f"{arch}.{key}", head_dim) != head_dim:
            raise ValueError(
                f"{arch}.{key} is {header.values[f'{arch}.{key}']}, but heads have {head_dim}"
            )
    if EMBEDDING not in header.tensors:
        raise ValueError(f"{EMBEDDING} is missing")
    values: dict[str, Any] = {
        "model_type": MODEL_TYPES[arch],
        "vocab_size": header.tensors[EMBEDDING].shape[0],
        "hidden_size": width,
        "intermediate_size": _uniform(header, f"{arch}.feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": _uniform(header, f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": _uniform(header, f"{arch}.context_length"),
        "rms_norm_eps": _float(header, f"{arch}.attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": HEAD not in header.tensors,
        "dtype": "bfloat16",
    }
    if arch != "gemma":
        is_27b = layers == _LAYERS_OF_27B[arch]
        values["query_pre_attn_scalar"] = width // heads if is_27b else head_dim
        values |= _softcaps(header, arch) | _window(header, arch, layers)
    return values | _rope(header, arch)


def _softcaps(header: GgufHeader, arch: str) -> dict[str, Any]:
    is_2 = arch == "gemma2"
    caps = {
        "final_logit_softcapping": _float(
            header, f"{arch}.final_logit_softcapping", 30.0 if is_2 else 0.0
        )
    }
    if is_2:
        caps["attn_logit_softcapping"] = _float(header, f"{arch}.attn_logit_softcapping", 50.0)
    return {name: cap or None for name, cap in caps.items()}


def _window(header: GgufHeader, arch: str, layers: int) -> dict[str, Any]:
    window = _uniform(header, f"{arch}.attention.sliding_window", 4096 if arch == "gemma2" else 0)
    if not window:
        return {"sliding_window": None, "layer_types": [GLOBAL] * layers}
    key = f"{arch}.attention.sliding_window_pattern"
    pattern = header.get(key, (int, np.ndarray), _PATTERNS[arch])
    if isinstance(pattern, int):
        check_int(key, pattern, 0, 2**31 - 1)
        local = [pattern == 0 or i % pattern < pattern - 1 for i in range(layers)]
    elif len(pattern) == layers:
        local = pattern.astype(bool).tolist()
    else:
        raise ValueError(f"{key} has {len(pattern)} entries for {layers} layers")
    return {"sliding_window": window, "layer_types": [LOCAL if x else GLOBAL for x in local]}


def _rope(header: GgufHeader, arch: str) -> dict[str, Any]:
    """The rotations; bases under other names are those of Ollama's files."""
    kind = header.get(f"{arch}.rope.scaling.type", str, "linear")
    factor = _float(header, f"{arch}.rope.scaling.factor", 0.0)
    factor = factor or _float(header, f"{arch}.rope.scale_linear", 0.0)
    if kind not in ("linear", "none"):
        raise ValueError(f"{arch}.rope.scaling.type is {shorten(kind)}; supported is 'linear'")
    values: dict[str, Any] = {}
    if kind == "linear" and factor not in (0, 1):
        values["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    if arch != "gemma3":
        return values | {"rope_theta": _float(header, f"{arch}.rope.freq_base", 10_000.0)}
    named = f"{arch}.rope.global.freq_base"
    base = named if named in header.values else f"{arch}.rope.freq_base"
    local = _float(header, f"{arch}.rope.local.freq_base", 10_000.0)
    return values | {
        "rope_theta": _float(header, base),
        "rope_local_base_freq": _float(header, f"{arch}.rope.freq_base_swa", local),
    }


def _uniform(header: GgufHeader, key: str, default: int | None = None) -> int:
    """An integer, or the one that a list of a number for each layer repeats."""
    value = header.get(key, (int, np.ndarray), default)
    if value is None:
        raise ValueError(f"{key} is missing")
    if isinstance(value, np.ndarray):
        found = set(value.tolist())
        if len(found) != 1:
            raise ValueError(f"{key} is {shorten(value.tolist())}; all layers have one shape")
        value = found.pop()
    return value


def _float(header: GgufHeader, key: str, default: float | None = None) -> float:
    value = header.get(key, float, default)
    if value is None:
        raise ValueError(f"{key} is missing")
    return as_decimal(value)


def as_decimal(value: float) -> float:
    """The shortest number that is this one in float32: 1e-6, not 9.99999997e-07."""
    return float(str(np.float32(value)))
