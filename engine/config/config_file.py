"""config.json: its keys, its defaults and its two generations, translated to ModelConfig's fields.

Defaults are those of the transformers classes (5.23), since a file may leave out any key.  A key
that would change the computation and is not supported is refused by name.  Any other key that is
not read here is kept in `extra` and written back: transformers adds bookkeeping keys in every
release, and refusing them would refuse tomorrow's files for nothing.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemcut.engine.checks import check_int, shorten
from gemcut.engine.config.quantization_config import read_quantization
from gemcut.engine.config.rope_parameters import RopeParameters, pop_rope, pop_rope_by_layer_type

LOCAL, GLOBAL = "sliding_attention", "full_attention"
LFS_POINTER = b"version https://git-lfs"
MAX_LAYERS = 1000

# Field -> key, where they differ.  Messages use the key.
_KEYS = {
    "num_layers": "num_hidden_layers",
    "num_q_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "attn_softcap": "attn_logit_softcapping",
    "final_softcap": "final_logit_softcapping",
    "eos_token_ids": "eos_token_id",
}

_COMMON: dict[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_layers": 26,
    "num_q_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "use_cache": True,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_ids": 1,
}
_GEMMA2 = _COMMON | {
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_softcap": 50.0,
    "final_softcap": 30.0,
}
# Model type -> the fields that its files set, with their defaults.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": _COMMON
    | {
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_layers": 28,
        "num_q_heads": 16,
        "num_kv_heads": 16,
    },
    "gemma2": _GEMMA2,
    "vaultgemma": _GEMMA2,
    "gemma3_text": _COMMON
    | {
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        # no attn_softcap: Gemma 3 never applies one, even where its file sets it
        "final_softcap": None,
    },
}
ARCHITECTURES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "vaultgemma": "VaultGemmaForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
# One function, the tanh approximation of GELU, under the names it has in files.
TANH_GELUS = ("gelu_pytorch_tanh", "gelu_python_tanh", "gelu_new", "gelu_fast", "gelu_accurate")


def key_of(field: str) -> str:
    """The key of config.json that holds `field` of ModelConfig."""
    return _KEYS.get(field, field)


def check_model_type(model_type: Any) -> None:
    """Nothing, or ValueError that lists the supported model types."""
    if not isinstance(model_type, str) or model_type not in DEFAULTS:
        raise ValueError(
            f"model_type {shorten(model_type)} is not supported; "
            f"supported are {', '.join(DEFAULTS)}, and of gemma3 the text part"
        )


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError where the file is missing or holds none."""
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # a pipe, or without an end
            raise ValueError(f"{path}: neither a file nor a folder")
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if content.startswith(LFS_POINTER):
        raise ValueError(f"{path}: a git-lfs pointer, not the file itself; run `git lfs pull`")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds {shorten(values)}, not a JSON object")
    return values


def read_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ModelConfig that a parsed config.json describes, their ranges unchecked."""
    if not isinstance(values, Mapping):
        raise ValueError(f"a config is a JSON object, not {shorten(values)}")
    left = _text_part(values)  # keys are removed as they are read; the rest goes to `extra`
    model_type = left.pop("model_type", None)
    check_model_type(model_type)
    _refuse_unsupported(left)

    activation = _pop_activation(model_type, left)
    fields = {name: left.pop(key_of(name), value) for name, value in DEFAULTS[model_type].items()}
    fields["hidden_activation"] = activation
    # both size a tuple here; __post_init__ checks everything else
    check_int(key_of("num_layers"), fields["num_layers"], 1, MAX_LAYERS)
    if model_type == "gemma":
        fields |= {"sliding_window": None, "attn_softcap": None, "final_softcap": None}
        fields["query_pre_attn_scalar"] = fields["head_dim"]
        fields["layer_types"] = (GLOBAL,) * fields["num_layers"]
    else:
        fields["layer_types"] = _pop_layer_types(model_type, fields["num_layers"], left)
    fields.setdefault("attn_softcap", None)
    if fields["attention_dropout"] is None:
        fields["attention_dropout"] = 0.0
    fields["eos_token_ids"] = as_token_ids(fields["eos_token_ids"])

    max_length = fields["max_position_embeddings"]
    if model_type == "gemma3_text":
        fields["rope"], fields["rope_local"] = pop_rope_by_layer_type(left, max_length)
    else:
        fields["rope"] = fields["rope_local"] = pop_rope(left, max_length)
    fields["quantization"] = read_quantization(left.pop("quantization_config", None))
    fields["dtype"] = _pop_dtype(left)
    fields["id2label"] = _pop_labels(left)
    fields["architectures"] = _pop_architectures(left)
    return fields | {"model_type": model_type, "extra": left}


def write_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json in the new spelling; read_fields and transformers read the same model."""
    model_type = fields["model_type"]
    values = dict(fields["extra"])
    values |= {"model_type": model_type, "architectures": list(fields["architectures"])}
    values |= {key_of(name): fields[name] for name in DEFAULTS[model_type]}
    ids = fields["eos_token_ids"]
    values["eos_token_id"] = ids[0] if len(ids) == 1 else list(ids) or None
    if model_type == "gemma":
        values["hidden_act"] = fields["hidden_activation"]  # the only one that transformers 5 reads
    else:
        values["layer_types"] = list(fields["layer_types"])
        scalar = fields["query_pre_attn_scalar"]  # transformers requires an int
        values["query_pre_attn_scalar"] = int(scalar) if int(scalar) == scalar else scalar
    rope, rope_local = fields["rope"], fields["rope_local"]
    values["rope_parameters"] = (
        _nested_rope(rope, rope_local) if model_type == "gemma3_text" else rope.to_dict()
    )
    if fields["dtype"] is not None:
        values["dtype"] = fields["dtype"]
    if fields["quantization"] is not None:
        values["quantization_config"] = dict(fields["quantization"].values)
    if fields["id2label"] is not None:
        values["id2label"] = {str(index): label for index, label in fields["id2label"].items()}
    return values


def _text_part(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that describe the language model: all, or a multimodal file's text_config."""
    if values.get("model_type") != "gemma3":
        return dict(values)
    text = values.get("text_config")
    if not isinstance(text, Mapping):
        raise ValueError(f"text_config {shorten(text)} of a gemma3 config is not an object")
    # These may be beside text_config; text_config's own values win.
    shared = ("dtype", "torch_dtype", "eos_token_id", "bos_token_id", "pad_token_id")
    shared += ("quantization_config",)
    outer = {key: values[key] for key in shared if values.get(key) is not None}
    tied = values.get("tie_word_embeddings", True)  # transformers reads this one only
    return {"model_type": "gemma3_text"} | outer | dict(text) | {"tie_word_embeddings": tied}


def _refuse_unsupported(values: Mapping[str, Any]) -> None:
    for key, reason in (
        ("use_bidirectional_attention", "attention is causal"),
        ("is_encoder_decoder", "the model is a decoder"),
        ("add_cross_attention", "the model is a decoder"),
        ("per_layer_config", "all layers have one shape"),
        ("pruned_heads", "all layers have one shape"),
    ):
        if values.get(key):
            raise ValueError(f"{key} {shorten(values[key])} is not supported: {reason}")
    if values.get("partial_rotary_factor") not in (None, 1):
        raise ValueError(
            f"partial_rotary_factor {shorten(values['partial_rotary_factor'])} is not supported: "
            f"Gemma rotates whole heads"
        )


def _pop_activation(model_type: str, values: dict[str, Any]) -> Any:
    activation = values.pop("hidden_activation", None)
    if model_type == "gemma":
        # The published files say `hidden_act: gelu` and mean the approximation.  In
        # `hidden_activation`, a later key that wins where it is set, gelu is the exact one.
        legacy = values.pop("hidden_act", None)
        activation = activation or ("gelu_pytorch_tanh" if legacy == "gelu" else legacy)
    if activation is None or activation in TANH_GELUS:
        return "gelu_pytorch_tanh"
    return activation  # refused by ModelConfig


def _pop_layer_types(model_type: str, num_layers: int, values: dict[str, Any]) -> Any:
    pattern = 2  # every second layer is global
    if model_type == "gemma3_text":
        pattern = values.pop("sliding_window_pattern", 6)  # the old spelling
        check_int("sliding_window_pattern", pattern, 1, 2**31 - 1)
    layer_types = values.pop("layer_types", None)
    if layer_types is None:
        return tuple(GLOBAL if i % pattern == 0 else LOCAL for i in range(1, num_layers + 1))
    return tuple(layer_types) if isinstance(layer_types, list | tuple) else layer_types


def as_token_ids(value: Any) -> Any:
    """A tuple of ids, from an id, a list of ids or null; the ids themselves are not checked."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _pop_dtype(values: dict[str, Any]) -> Any:
    old = values.pop("torch_dtype", None)
    dtype = values.pop("dtype", None) or old
    return dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype


def _pop_architectures(values: dict[str, Any]) -> Any:
    names = values.pop("architectures", None) or ()
    return tuple(names) if isinstance(names, list | tuple) else names


def _pop_labels(values: dict[str, Any]) -> Any:
    count, labels = values.pop("num_labels", None), values.pop("id2label", None)
    if count is not None:
        check_int("num_labels", count, 1, 2**20)
        if labels is None:
            return {index: f"LABEL_{index}" for index in range(count)}
        if len(labels) != count:
            raise ValueError(f"num_labels {count} contradicts id2label of {len(labels)} entries")
    if not isinstance(labels, Mapping):
        return labels
    try:
        return {int(index): label for index, label in labels.items()}
    except ValueError:
        raise ValueError(f"id2label {shorten(labels)} must have the keys 0, 1, 2, ...") from None


def _nested_rope(rope: RopeParameters, rope_local: RopeParameters) -> dict[str, Any]:
    nested: dict[str, Any] = {GLOBAL: rope.to_dict(), LOCAL: rope_local.to_dict()}
    if "yarn" in (rope.rope_type, rope_local.rope_type):  # transformers reads it here
        nested["truncate"] = rope.truncate and rope_local.truncate
    return nested
