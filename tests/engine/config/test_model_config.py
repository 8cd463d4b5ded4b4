"""config.json in both generations: its meaning, and the values that are refused."""

import dataclasses
import json
import math

import pytest
import torch
from random_models import CONFIG_CLASSES, MODEL_TYPES, random_config
from transformers import AutoConfig, AutoModelForCausalLM

from gemcut.engine.config.model_config import PUBLISHED, ModelConfig, RopeParameters

LOCAL, GLOBAL = "sliding_attention", "full_attention"


def read(model_type: str = "gemma2", **values) -> ModelConfig:
    return ModelConfig.from_dict({"model_type": model_type, **values})


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_defaults_are_those_of_transformers(model_type):
    assert read(model_type) == dataclasses.replace(
        ModelConfig.from_dict(CONFIG_CLASSES[model_type]().to_dict()),
        extra={},
        id2label=None,
    )


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_is_written_reads_as_the_same_model(model_type):
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
    theirs = random_config(
        model_type,
        eos_token_id=[1, 5],
        attention_bias=True,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
        dtype="bfloat16",
        id2label={0: "no", 1: "maybe", 2: "yes"},
        rope_parameters={GLOBAL: {"rope_theta": 5e5} | rope, LOCAL: {"rope_theta": 1e3}}
        if model_type == "gemma3_text"
        else {"rope_theta": 5e5} | rope,
    )
    ours = ModelConfig.from_dict(theirs.to_dict())
    assert ModelConfig.from_dict(json.loads(json.dumps(ours.to_dict()))) == ours
    again = CONFIG_CLASSES[model_type].from_dict(ours.to_dict())
    for key, value in theirs.to_dict().items():
        if key in ("rope_parameters", "architectures"):
            continue  # ours writes defaults out; their meaning is compared below
        assert again.to_dict()[key] == value, key
    assert ModelConfig.from_dict(again.to_dict()).rope == ours.rope


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    config = PUBLISHED[name]
    assert ModelConfig.from_dict(config.to_dict()) == config
    theirs = AutoConfig.for_model(**config.to_dict())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs)
    assert config.num_parameters() == sum(p.numel() for p in model.parameters())
    if config.model_type != "gemma":
        assert theirs.layer_types == list(config.layer_types)
    attention = model.model.layers[0].self_attn
    assert config.scale == attention.scaling
    assert config.group_size == attention.num_key_value_groups


@pytest.mark.parametrize(
    ("name", "billions", "kib"),
    [
        ("gemma-2b", 2.506, 18),
        ("gemma-7b", 8.538, 448),
        ("gemma-2-2b", 2.614, 104),
        ("gemma-2-9b", 9.242, 336),
        ("gemma-2-27b", 27.227, 368),
        ("vaultgemma-1b", 1.039, 104),
    ],
)
def test_published_parameters_and_cache(name, billions, kib):
    config = PUBLISHED[name]
    assert round(config.num_parameters() / 1e9, 3) == billions
    assert config.kv_bytes_per_token(itemsize=2) == kib * 1024


def test_biases_and_an_untied_head_count():
    ours = read("gemma2", num_hidden_layers=2, attention_bias=True, tie_word_embeddings=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**ours.to_dict()))
    assert ours.num_parameters() == sum(p.numel() for p in model.parameters())


def test_27b_scales_scores_by_its_own_scalar():
    assert PUBLISHED["gemma-2-27b"].scale == 144**-0.5  # not 128**-0.5
    assert read("gemma", query_pre_attn_scalar=144).scale == 256**-0.5  # Gemma 1 has no such key


@pytest.mark.parametrize(
    ("values", "activation"),
    [
        pytest.param({}, "gelu_pytorch_tanh", id="none"),
        pytest.param({"hidden_act": "gelu"}, "gelu_pytorch_tanh", id="published-gemma-1"),
        pytest.param(
            {"hidden_act": "gelu", "hidden_activation": None}, "gelu_pytorch_tanh", id="null"
        ),
        pytest.param(
            {"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh"},
            "gelu_pytorch_tanh",
            id="the-newer-key-decides",
        ),
    ],
)
def test_activation_of_gemma_1(values, activation):
    assert read("gemma", **values).hidden_activation == activation


def test_layer_types_alternate_from_a_local_layer():
    for model_type in ("gemma2", "vaultgemma"):
        config = read(model_type, num_hidden_layers=3)
        assert [config.is_local(i) for i in range(3)] == [True, False, True]
    assert set(read("gemma").layer_types) == {GLOBAL}
    assert [read("gemma3_text").is_local(i) for i in range(7)] == 5 * [True] + [False, True]


def test_old_spelling_of_gemma_3():
    config = read(
        "gemma3_text",
        num_hidden_layers=4,
        sliding_window_pattern=2,
        rope_theta=5e5,
        rope_local_base_freq=2e3,
        rope_scaling={"type": "linear", "factor": 8},
        torch_dtype="bfloat16",
        num_labels=3,
    )
    assert config.layer_types == (LOCAL, GLOBAL, LOCAL, GLOBAL)
    assert config.rope == RopeParameters(rope_type="linear", rope_theta=5e5, factor=8)
    assert config.rope_local == RopeParameters(rope_theta=2e3)
    assert config.dtype == "bfloat16"
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert "rope_theta" not in config.to_dict()


def test_old_spelling_of_gemma_2():
    config = read("gemma2", rope_theta=2e4, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    assert config.rope == RopeParameters(rope_type="dynamic", rope_theta=2e4, factor=2.0)
    assert config.rope_local == config.rope
    assert read("gemma2", rope_theta=2e4, rope_scaling=None).rope == RopeParameters(rope_theta=2e4)


@pytest.mark.parametrize("nested", [False, True], ids=["beside", "within"])
def test_gemma_3_reads_truncate_where_transformers_does(nested):
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    rope = {GLOBAL: yarn | {"truncate": False}} if nested else {GLOBAL: yarn, "truncate": False}
    config = read("gemma3_text", rope_parameters=rope)
    assert config.rope.truncate is nested
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_multimodal_gemma_3_is_read_as_its_text_part():
    config = ModelConfig.from_dict(
        {
            "model_type": "gemma3",
            "architectures": ["Gemma3ForConditionalGeneration"],
            "eos_token_id": [1, 106],
            "torch_dtype": "bfloat16",
            "vision_config": {"hidden_size": 1152},
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
        }
    )  # gemma-3-4b-it, as on the Hub
    assert (config.model_type, config.vocab_size) == ("gemma3_text", 262208)
    assert (config.eos_token_ids, config.dtype) == ((1, 106), "bfloat16")
    assert config.architectures == ("Gemma3ForCausalLM",)
    assert (config.rope.factor, config.rope.rope_theta) == (8.0, 1e6)
    assert config.rope_local == RopeParameters()
    assert (config.num_layers, config.is_local(33), config.is_local(29)) == (34, True, False)


def test_softcaps_are_absent_where_none_is_applied():
    capped = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    assert (read("gemma", **capped).attn_softcap, read("gemma", **capped).final_softcap) == (
        None,
        None,
    )
    gemma3 = read("gemma3_text", **capped)
    assert (gemma3.attn_softcap, gemma3.final_softcap) == (None, 30.0)
    assert gemma3.to_dict()["attn_logit_softcapping"] == 50.0  # kept in `extra`
    assert read("gemma2", attn_logit_softcapping=None).attn_softcap is None


def test_unknown_keys_are_carried_along():
    config = read("gemma2", cache_implementation="hybrid", some_future_key=[1])
    assert config.extra == {"cache_implementation": "hybrid", "some_future_key": [1]}
    assert config.to_dict()["some_future_key"] == [1]
    assert hash(config) == hash(read("gemma2"))
    assert config != read("gemma2")


def test_end_of_sequence_ids():
    assert read(eos_token_id=5).eos_token_ids == (5,)
    assert read(eos_token_id=[1, 107]).eos_token_ids == (1, 107)
    assert read(eos_token_id=None).eos_token_ids == ()
    for ids in (5, [1, 107], None):
        assert read(eos_token_id=ids).to_dict()["eos_token_id"] == ids


YARN = {"rope_type": "yarn", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 128, "long_factor": [2.0] * 128}
BAD = [
    ({"model_type": "llama"}, "model_type 'llama' is not supported; supported are gemma, gemma2"),
    ({"model_type": None}, "model_type None is not supported"),
    ({"model_type": ["gemma"]}, "model_type .* is not supported"),
    ({"model_type": "gemma3"}, "text_config None of a gemma3 config is not an object"),
    ({"hidden_size": "2304"}, "hidden_size '2304' is not an integer"),
    ({"hidden_size": True}, "hidden_size True is not an integer"),
    ({"hidden_size": 2304.0}, "hidden_size 2304.0 is not an integer"),
    ({"hidden_size": None}, "hidden_size None is not an integer"),
    ({"hidden_size": 0}, "hidden_size 0 is outside 1"),
    ({"hidden_size": 10**12}, "hidden_size 1000000000000 is outside"),
    ({"vocab_size": -1}, "vocab_size -1 is outside"),
    ({"intermediate_size": 2**23}, "intermediate_size 8388608 is outside"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000 is outside 1..1000"),
    ({"num_hidden_layers": 0}, "num_hidden_layers 0 is outside"),
    ({"num_hidden_layers": "2"}, "num_hidden_layers '2' is not an integer"),
    ({"num_attention_heads": 0}, "num_attention_heads 0 is outside"),
    (
        {"num_key_value_heads": 3},
        "num_attention_heads 8 is not a multiple of num_key_value_heads 3",
    ),
    ({"num_key_value_heads": 16}, "is not a multiple of num_key_value_heads 16"),
    ({"head_dim": 255}, "head_dim 255 is odd"),
    ({"head_dim": -2}, "head_dim -2 is outside"),
    ({"max_position_embeddings": 0}, "max_position_embeddings 0 is outside"),
    ({"max_position_embeddings": 2**24 + 1}, "max_position_embeddings 16777217 is outside"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps nan is not finite"),
    ({"rms_norm_eps": math.inf}, "rms_norm_eps inf is not finite"),
    ({"rms_norm_eps": 0.0}, "rms_norm_eps 0.0 must be above 0"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps '1e-6' is not a number"),
    ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar 0 must be above 0"),
    ({"query_pre_attn_scalar": 10**400}, "query_pre_attn_scalar .* is not finite"),
    ({"attn_logit_softcapping": 0.0}, "attn_logit_softcapping 0.0 must be above 0"),
    ({"final_logit_softcapping": -30}, "final_logit_softcapping -30 must be above 0"),
    ({"final_logit_softcapping": False}, "final_logit_softcapping False is not a number"),
    ({"sliding_window": 0}, "sliding_window 0 is outside"),
    ({"sliding_window": None}, "sliding_window is null, but layer_types has sliding_attention"),
    ({"layer_types": [GLOBAL]}, "layer_types has 1 entries; num_hidden_layers is 26"),
    ({"layer_types": [GLOBAL] * 25 + ["chunked"]}, r"layer_types\[25\] 'chunked' is not supported"),
    ({"layer_types": GLOBAL}, "layer_types 'full_attention' is not a list"),
    ({"pad_token_id": -1}, "pad_token_id -1 is outside 0..255999"),
    ({"bos_token_id": 256000}, "bos_token_id 256000 is outside 0..255999"),
    ({"eos_token_id": -1}, "eos_token_id -1 is outside"),
    ({"eos_token_id": [1, 10**6]}, "eos_token_id 1000000 is outside"),
    ({"eos_token_id": "1"}, "eos_token_id '1' is not an integer"),
    ({"attention_bias": 1}, "attention_bias 1 is neither true nor false"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings 'yes' is neither true nor false"),
    ({"attention_dropout": 1.0}, "attention_dropout 1.0 must be below 1"),
    ({"initializer_range": -0.1}, "initializer_range -0.1 must be at least 0"),
    ({"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not supported"),  # exact
    ({"hidden_activation": "silu"}, "hidden_activation 'silu' is not supported"),
    ({"hidden_activation": ["gelu"]}, "hidden_activation .* is not supported"),
    ({"model_type": "gemma", "hidden_act": "silu"}, "hidden_activation 'silu' is not supported"),
    ({"model_type": "gemma", "hidden_activation": "gelu"}, "hidden_activation 'gelu' is not"),
    ({"dtype": "int8"}, "dtype 'int8' is not supported; supported are bfloat16"),
    ({"torch_dtype": 16}, "dtype 16 is not supported"),
    ({"architectures": "Gemma"}, "architectures 'Gemma' is not a list"),
    ({"id2label": {"a": "b"}}, "id2label .* must have the keys 0, 1, 2"),
    ({"id2label": {"1": "b"}}, "id2label .* must have the keys 0, 1, 2"),
    ({"id2label": ["a"]}, "id2label .* must have the keys 0, 1, 2"),
    ({"num_labels": 3, "id2label": {"0": "b"}}, "num_labels 3 contradicts id2label of 1 entries"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention True is not supported"),
    (
        {"quantization_config": {"bits": 4}},
        "quantization_config is of no method, which",
    ),
    ({"is_encoder_decoder": True}, "is_encoder_decoder True is not supported"),
    ({"per_layer_config": {"0": {}}}, "per_layer_config .* is not supported"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "sliding_window_pattern 0 is"),
    ({"rope_theta": 0}, "rope_theta 0 must be above 1"),
    ({"rope_theta": math.inf}, "rope_theta inf is not finite"),
    ({"rope_theta": "10000"}, "rope_theta '10000' is not a number"),
    ({"rope_parameters": [1]}, r"rope_parameters \[1\] is not an object"),
    ({"rope_scaling": 8}, "rope_scaling 8 is not an object"),
    ({"rope_parameters": {"rope_type": "mrope"}}, "rope_type 'mrope' is not supported; supported"),
    ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type .* is not supported"),
    ({"rope_parameters": {"rope_type": "linear"}}, "rope_type linear needs factor"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "factor 0.5 must be at least 1"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": -1}}, "factor -1 must be at least 1"),
    ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor 0.25 is not"),
    ({"rope_parameters": {GLOBAL: {}}}, "only gemma3_text rotates by layer type"),
    ({"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1e4}}, "must hold full_att"),
    ({"rope_parameters": YARN | {"attention_factor": -1.0}}, "attention_factor -1.0 must be above"),
    ({"rope_parameters": YARN | {"truncate": "no"}}, "truncate 'no' is not true or false"),
    (
        {"rope_parameters": YARN | {"original_max_position_embeddings": 1}},
        "embeddings 1 is outside",
    ),
    ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "high_freq_factor 4.0 must be above"),
    ({"rope_parameters": LLAMA3 | {"low_freq_factor": None}}, "llama3 needs low_freq_factor"),
    ({"rope_parameters": LONGROPE | {"long_factor": [1.0]}}, "long_factor has 1 entries; head_dim"),
    ({"rope_parameters": LONGROPE | {"short_factor": 1.0}}, "short_factor 1.0 is not a list"),
    ({"rope_parameters": LONGROPE | {"short_factor": [0] * 128}}, r"short_factor\[0\] 0 must be"),
    (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2}, "head_dim": 2},
        "at least 4, not 2",
    ),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_value_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message) as error:
        ModelConfig.from_dict({"model_type": "gemma2"} | values)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_pre_attn_scalar": 144.0}, "query_pre_attn_scalar 144.0 differs from head_dim 256"),
        ({"attn_softcap": 50.0}, "attn_logit_softcapping is 50.0, but gemma applies none"),
        ({"sliding_window": 8}, "sliding_window is 8, but gemma has none"),
        ({"rope_local": RopeParameters(rope_theta=5.0)}, "gemma has one rotation"),
        ({"rope": {"rope_theta": 1e4}}, "is not a RopeParameters"),
        ({"eos_token_ids": 1}, "eos_token_id 1 is not a tuple"),
        ({"model_type": "gemma4"}, "model_type 'gemma4' is not supported"),
    ],
)
def test_contradiction_in_code_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PUBLISHED["gemma-7b"], **changes)


def test_parameters_of_another_rope_type_are_refused():
    with pytest.raises(ValueError, match="rope_type default has no factor"):
        RopeParameters(factor=8.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "no such file", id="missing"),
        pytest.param(b"{", "not JSON", id="cut-short"),
        pytest.param(b"[" * 100_000, "not JSON", id="nested-too-deep"),
        pytest.param(b"\xff\xfe{", "not JSON", id="not-text"),
        pytest.param(b'{"a": ' + b"9" * 5000 + b"}", "not JSON", id="number-too-long"),
        pytest.param(b"[1]", "not a JSON object", id="list"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer", id="lfs"),
        pytest.param(b'{"model_type": "gpt2"}', "config.json: model_type 'gpt2'", id="names-file"),
        pytest.param(b'{"model_type": "gemma", "rope_theta": NaN}', "nan is not finite", id="nan"),
    ],
)
def test_bad_file(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_file(tmp_path)


def test_reads_a_file_or_its_folder(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(PUBLISHED["gemma-3-1b"].to_dict()))
    assert ModelConfig.from_file(file) == ModelConfig.from_file(str(tmp_path))
    assert ModelConfig.from_file(file) == PUBLISHED["gemma-3-1b"]
