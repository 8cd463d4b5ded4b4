"""The config in GGUF metadata: the published sizes, and what llama.cpp takes for granted."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from gguf_files import metadata_of
from transformers import Gemma2Config, Gemma3TextConfig, GemmaConfig

from gemcut.engine.checkpoints.gguf_config import read_config
from gemcut.engine.checkpoints.gguf_header import GgufHeader, GgufTensor
from gemcut.engine.checkpoints.source import BOOKKEEPING
from gemcut.engine.config.model_config import PUBLISHED, ModelConfig

CLASSES = {"gemma": GemmaConfig, "gemma2": Gemma2Config, "gemma3_text": Gemma3TextConfig}
LINEAR = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
# text_config of the multimodal sizes, as published; other keys have the class's defaults
LARGER = {
    "gemma-3-4b": LINEAR
    | {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "sliding_window": 1024,
    },
    "gemma-3-12b": LINEAR
    | {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "sliding_window": 1024,
    },
    "gemma-3-27b": LINEAR
    | {
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 168,
        "sliding_window": 1024,
    },
}
CONFIGS = {name: x for name, x in PUBLISHED.items() if x.model_type in CLASSES} | {
    name: ModelConfig.from_dict({"model_type": "gemma3_text"} | values)
    for name, values in LARGER.items()
}
TOKENS = {"bos_token_id": 2, "pad_token_id": 0}


def header(config: ModelConfig, **changes) -> GgufHeader:
    """What llama.cpp makes of a config; `changes` of the metadata, None to leave one out."""
    theirs = CLASSES[config.model_type](**config.to_dict())
    values = {"general.architecture": config.model_type.removesuffix("_text")}
    values |= metadata_of(theirs)
    values = {key: np.float32(x).item() if isinstance(x, float) else x for key, x in values.items()}
    values = {key: x for key, x in (values | changes).items() if x is not None}
    embedding = GgufTensor("token_embd.weight", (config.vocab_size, config.hidden_size), None, 0, 0)
    return GgufHeader(Path("model.gguf"), values, {embedding.name: embedding})


def differing(one: ModelConfig, other: ModelConfig) -> dict:
    a, b = asdict(one), asdict(other)
    return {
        name: (a[name], b[name]) for name in a if a[name] != b[name] and name not in BOOKKEEPING
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_published_sizes(name):
    config = CONFIGS[name]
    read = read_config(header(config), TOKENS | {"eos_token_id": list(config.eos_token_ids)})
    assert differing(read, config) == {}


def read(name: str, **changes) -> ModelConfig:
    return read_config(header(CONFIGS[name], **changes), TOKENS)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        pytest.param(
            "gemma-2-2b",
            {"gemma2.attn_logit_softcapping": None, "gemma2.final_logit_softcapping": None},
            {"attn_softcap": 50.0, "final_softcap": 30.0},
            id="softcaps of Gemma 2",
        ),
        pytest.param(
            "gemma-2-2b", {"gemma2.attention.sliding_window": None}, {"sliding_window": 4096},
            id="window of Gemma 2",
        ),
        pytest.param(
            "gemma-2b", {"gemma.attention.head_count_kv": None}, {"num_kv_heads": 8},
            id="as many KV heads as heads",
        ),
        pytest.param(
            "gemma-2b", {"gemma.attention.key_length": None, "gemma.attention.value_length": None},
            {"head_dim": 256}, id="width over heads",
        ),
        pytest.param(
            "gemma-2b", {"gemma.attention.head_count": np.full(18, 8)}, {"num_q_heads": 8},
            id="a number for each layer",
        ),
        pytest.param(
            "gemma-3-1b", {"gemma3.attention.sliding_window": None},
            {"sliding_window": None, "layer_types": ("full_attention",) * 26}, id="no window",
        ),
        pytest.param(
            "gemma-3-270m", {"gemma3.attention.sliding_window_pattern": 3},
            {"layer_types": ("sliding_attention", "sliding_attention", "full_attention") * 6},
            id="another pattern",
        ),
        pytest.param(
            "gemma-3-270m",
            {"gemma3.attention.sliding_window_pattern": np.array([True, False] * 9)},
            {"layer_types": ("sliding_attention", "full_attention") * 9}, id="a listed pattern",
        ),
    ],
)  # fmt: skip
def test_what_a_file_leaves_out(name, changes, expected):
    config = read(name, **changes)
    assert {field: getattr(config, field) for field in expected} == expected


def test_bases_and_scaling():
    assert read("gemma-3-1b").rope_local.rope_theta == 10_000
    config = read("gemma-3-1b", **{"gemma3.rope.freq_base_swa": 20_000.0})
    assert (config.rope.rope_theta, config.rope_local.rope_theta) == (1e6, 20_000)
    names = {"gemma3.rope.global.freq_base": 2e6, "gemma3.rope.local.freq_base": 30_000.0}
    config = read("gemma-3-1b", **names)
    assert (config.rope.rope_theta, config.rope_local.rope_theta) == (2e6, 30_000)
    config = read("gemma-3-4b")
    assert (config.rope.factor, config.rope_local.factor) == (8.0, None)
    config = read("gemma-2-2b", **{"gemma2.rope.scale_linear": 2.0})
    assert (config.rope.rope_type, config.rope.factor) == ("linear", 2.0)
    assert read("gemma-3-4b", **{"gemma3.rope.scaling.type": "none"}).rope.rope_type == "default"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "llama"}, "architecture is 'llama', supported are gemma, gemma2"),
        ({"general.architecture": None}, "architecture is None, supported are"),
        ({"general.architecture": "clip"}, "architecture is 'clip', the images' part of a model"),
        ({"general.architecture": 3}, "general.architecture is 3, a int"),
        ({"split.count": 3}, "one of several files; join them"),
        ({"gemma3.block_count": None}, "gemma3.block_count is missing"),
        ({"gemma3.block_count": 2**31}, "gemma3.block_count 2147483648 is outside 1..1000"),
        ({"gemma3.block_count": 1.5}, "gemma3.block_count is 1.5, a float"),
        ({"gemma3.attention.head_count": 0}, "head_count 0 is outside"),
        ({"gemma3.attention.head_count": True}, "head_count is True, a bool"),
        ({"gemma3.attention.head_count": np.array([4, 2])}, r"head_count is \[4, 2\]; all layers"),
        ({"gemma3.attention.head_count_kv": 3}, "num_attention_heads 4 is not a multiple of"),
        ({"gemma3.attention.value_length": 128}, "value_length is 128, but heads have 256"),
        ({"gemma3.rope.dimension_count": 64}, "dimension_count is 64, but heads have 256"),
        ({"gemma3.embedding_length": 2**40}, "hidden_size 1099511627776 is outside"),
        ({"gemma3.attention.layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps nan is not fin"),
        ({"gemma3.rope.freq_base": None}, "gemma3.rope.freq_base is missing"),
        ({"gemma3.rope.scaling.type": "yarn"}, "scaling.type is 'yarn'; supported is 'linear'"),
        ({"gemma3.attention.sliding_window_pattern": np.ones(3)}, "3 entries for 18 layers"),
        ({"gemma3.attention.sliding_window_pattern": -1}, "sliding_window_pattern -1 is outside"),
    ],
)
def test_bad_metadata(changes, message):
    with pytest.raises(ValueError, match=rf"^model.gguf: .*{message}") as error:
        read("gemma-3-270m", **changes)
    assert "\n" not in str(error.value)


def test_no_embedding():
    whole = header(CONFIGS["gemma-2b"])
    with pytest.raises(ValueError, match=r"token_embd\.weight is missing"):
        read_config(GgufHeader(whole.path, whole.values, {}), TOKENS)
