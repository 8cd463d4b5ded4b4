"""Bad input to the documented classes: one line that says what to do, and the model goes on."""

import re

import numpy as np
import pytest
import torch
from documented_twins import BATCH, LENGTH, VOCAB, random_ids, twins

from gemcut.engine import Engine, transformers_api
from gemcut.engine.transformers_api import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    Gemma2Config,
    GemmaConfig,
    GemmaForCausalLM,
    GenerationConfig,
    StaticCache,
)

IDS = random_ids()
ONES = torch.ones(BATCH, LENGTH, dtype=torch.int64)
WIDTH = 48


@pytest.fixture
def model():
    return twins("AutoModelForCausalLM", "gemma2")[1]


def refused(call, kind, message) -> None:
    """The call raises exactly this error, in one line."""
    with pytest.raises(kind, match=message) as caught:
        call()
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


FORWARD = {
    "neither": ({}, "neither of them came"),
    "both": ({"input_ids": IDS, "inputs_embeds": torch.zeros(3, 20, WIDTH)}, "both of them came"),
    "one-axis": ({"input_ids": IDS[0]}, r"input_ids is torch.int64 \[20\], must be integers"),
    "float-ids": ({"input_ids": IDS.float()}, "input_ids is torch.float32"),
    "bool-ids": ({"input_ids": IDS.bool()}, "input_ids is torch.bool"),
    "no-rows": ({"input_ids": IDS[:0]}, "the batch is empty: 0 rows"),
    "no-columns": ({"input_ids": IDS[:, :0]}, "the batch is empty: 3 rows of 0 columns"),
    "id-too-large": ({"input_ids": IDS + VOCAB}, r"input_ids: 1\d\d is outside 0..96"),
    "id-negative": ({"input_ids": IDS - 90}, r"input_ids: -\d+ is outside 0..96"),
    "a-list": ({"input_ids": IDS.tolist()}, "is a list; give a torch.Tensor, a NumPy array or"),
    "text": ({"input_ids": "It was"}, "is a str; give"),
    "objects": ({"input_ids": np.array([["a"]])}, "is an array of <U1, not of numbers"),
    "another-device": (
        {"input_ids": IDS.to("meta")},
        r"input_ids is on meta, the model on cpu; move one of them: input_ids.to\('cpu'\)",
    ),
    "mask-elsewhere": (
        {"input_ids": IDS, "attention_mask": ONES.to("meta")},
        "attention_mask is on meta, the model on cpu",
    ),
    "embeds-narrow": (
        {"inputs_embeds": torch.zeros(3, 20, WIDTH - 1)},
        r"inputs_embeds is torch.float32 \[3, 20, 47\], must be of floats \[batch, length, 48\]",
    ),
    "embeds-integer": ({"inputs_embeds": torch.ones(3, 20, WIDTH).long()}, "must be of floats"),
    "mask-short": (
        {"input_ids": IDS, "attention_mask": ONES[:, 1:]},
        r"attention_mask is \[3, 19\], must be \[3, 20\]: the input's",
    ),
    "mask-of-other-rows": ({"input_ids": IDS, "attention_mask": ONES[:1]}, r"is \[1, 20\]"),
    "mask-additive": (
        {"input_ids": IDS, "attention_mask": (1.0 - ONES) - 1e9},
        r"other values than 0 \(padding\) and 1 \(token\)",
    ),
    "positions-negative": (
        {"input_ids": IDS, "position_ids": -ONES},
        "position_ids: -1 is outside",
    ),
    "positions-huge": (
        {"input_ids": IDS, "position_ids": ONES << 40},
        "position_ids: 1099511627776",
    ),
    "positions-short": ({"input_ids": IDS, "position_ids": ONES[:, 1:]}, r"\[3, 19\], must be"),
    "positions-float": ({"input_ids": IDS, "position_ids": ONES.float()}, "torch.float32"),
    "foreign-cache": (
        {"input_ids": IDS, "past_key_values": [(1, 2)]},
        r"past_key_values is a list; give .* init_cache\(batch_size, max_length\)",
    ),
    "cache-position": (
        {"input_ids": IDS, "cache_position": torch.arange(1, 21)},
        "is not 0 to 19, where the cache goes on",
    ),
    "labels-short": ({"input_ids": IDS, "labels": IDS[:, 1:]}, r"labels are \[3, 19\], must be"),
    "labels-large": (
        {"input_ids": IDS, "labels": IDS + VOCAB},
        r"labels: 1\d\d is outside -100 or 0",
    ),
    "labels-negative": ({"input_ids": IDS, "labels": -ONES}, "labels: -1 is outside -100 or 0..96"),
    "labels-float": ({"input_ids": IDS, "labels": IDS.float()}, "labels are torch.float32"),
    "labels-behind-padding": (
        {"input_ids": IDS, "labels": IDS, "attention_mask": (torch.arange(20) > 3).expand(3, -1)},
        "labels: the next one is predicted from column 0 of row 0, which attention_mask hides "
        "with all that it sees; set that label to -100",
    ),
    "kept-labels-behind-padding": (
        {
            "input_ids": IDS,
            "labels": IDS[:, :3],
            "logits_to_keep": torch.tensor([7, 2, 9]),
            "attention_mask": (torch.arange(20) > 3).expand(3, -1),
        },
        "labels: the next one is predicted from column 2 of row 0, which attention_mask hides",
    ),
    "keep-negative": ({"input_ids": IDS, "logits_to_keep": -1}, "logits_to_keep -1 is negative"),
    "keep-outside": (
        {"input_ids": IDS, "logits_to_keep": torch.tensor([20])},
        "names a column outside -20..19",
    ),
    "keep-float": ({"input_ids": IDS, "logits_to_keep": torch.tensor([0.5])}, "must be a number"),
    "keep-of-other-rows": (
        {"input_ids": IDS, "logits_to_keep": torch.ones(2, 1).long()},
        "has 2 rows, the batch 3",
    ),
    "labels-of-a-flat-choice": (
        {"input_ids": IDS, "labels": IDS, "logits_to_keep": ONES.bool()},
        "labels need rows",
    ),
}


@pytest.mark.parametrize("case", FORWARD)
def test_forward(model, case):
    given, message = FORWARD[case]
    cache = model.init_cache(BATCH, 40)
    with_cache = {"past_key_values": cache} | given
    refused(lambda: model(**with_cache), ValueError, message)
    assert cache.get_seq_length() == 0  # nothing was computed
    assert model(IDS, past_key_values=cache).logits.isfinite().all()


def test_a_mask_of_four_axes(model):
    mask = torch.ones(3, 1, 20, 20)
    refused(lambda: model(IDS, attention_mask=mask), NotImplementedError, "has 4 axes; give one")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("input_id", "did you mean 'input_ids'"), ("head_mask", "it takes attention_mask, ")],
)
def test_an_unknown_keyword(model, name, hint):
    message = f"Gemma2ForCausalLM.forward takes no '{name}'; {hint}"
    refused(lambda: model(IDS, **{name: None}), TypeError, message)
    refused(lambda: GemmaConfig(hidden_sice=3), TypeError, "did you mean 'hidden_size'")
    refused(lambda: model.generate(IDS, max_tokens=3), TypeError, "generate takes no 'max_tokens'")
    refused(
        lambda: type(model).from_pretrained("demo", device="cpu"),
        TypeError,
        r"Gemma2ForCausalLM.from_pretrained takes no 'device'; did you mean 'device_map'",
    )


def test_a_cache_that_is_full(model):
    cache = model.init_cache(BATCH, LENGTH + 2)
    model(IDS, past_key_values=cache)
    message = (
        "the cache is full: it holds 22 columns, of which 20 are used, and 3 more are asked for; "
        r"make one with init_cache\(batch_size, 23\) or more"
    )
    refused(lambda: model(IDS[:, :3], past_key_values=cache), ValueError, message)
    model(IDS[:, :2], past_key_values=cache)
    assert cache.get_seq_length() == 22
    refused(lambda: model.generate(IDS, past_key_values=cache), ValueError, "give all of them")
    with pytest.raises(ValueError, match="the cache is full"):
        model.generate(IDS, past_key_values=model.init_cache(BATCH, 25), max_new_tokens=6)


def test_a_cache_of_another_batch(model):
    cache = model.init_cache(2, 40)
    refused(lambda: model(IDS, past_key_values=cache), ValueError, "3 rows, but the cache is for 2")
    cache = model(IDS).past_key_values
    refused(lambda: model(IDS[:1], past_key_values=cache), ValueError, "1 rows, .* is for 3")
    _, other = twins("AutoModelForCausalLM", "vaultgemma")
    refused(lambda: other(IDS, past_key_values=cache), ValueError, "holds keys of another model")
    refused(lambda: model.init_cache(2, 0), ValueError, "max_cache_len 0 is outside")
    refused(lambda: StaticCache(None, max_cache_len="9"), ValueError, "is not an integer")


def test_a_mask_behind_a_cache(model):
    mask = ONES.clone()
    mask[1, 2] = 0
    cache = model(IDS, attention_mask=mask).past_key_values
    longer = torch.cat([ONES, ONES], dim=1)
    refused(
        lambda: model(IDS, past_key_values=cache, attention_mask=longer),
        ValueError,
        "shows column 2 of row 1, but it was hidden when the cache was filled",
    )
    refused(
        lambda: model(IDS, past_key_values=cache, attention_mask=ONES),
        ValueError,
        r"is \[3, 20\], must be \[3, 40\]: 20 columns of the cache and 20 new ones",
    )
    assert cache.get_seq_length() == LENGTH
    refused(
        lambda: model.generate(torch.cat([IDS, IDS], dim=1), past_key_values=cache),
        ValueError,
        "the cache was filled with padding: give attention_mask here too",
    )


GENERATE = {
    "prompt-twice": ({"input_ids": IDS}, ValueError, "give the prompt's ids once"),
    "max-length": ({"max_length": 20}, ValueError, "leaves no room behind a prompt of 20 tokens"),
    "max-length-below": ({"max_length": 3}, ValueError, "raise it, or give max_new_tokens"),
    "no-new-tokens": ({"max_new_tokens": 0}, ValueError, "max_new_tokens 0 is outside 1"),
    "cold": ({"do_sample": True, "temperature": 0.0}, ValueError, "do_sample=False is greedy"),
    "top-p": ({"do_sample": True, "top_p": 1.5}, ValueError, "top_p 1.5 must be at most 1"),
    "several-greedy": ({"num_return_sequences": 2}, ValueError, "needs do_sample=True"),
    "beams": ({"num_beams": 4}, NotImplementedError, "num_beams=4 is not supported"),
    "guidance": ({"guidance_scale": 2.0}, NotImplementedError, "guidance_scale=2.0 is not"),
    "assistant": ({"assistant_model": "x"}, NotImplementedError, "assistant_model='x' is not"),
    "cache-kind": (
        {"cache_implementation": "quantized"},
        NotImplementedError,
        "cache_implementation='quantized' is not supported",
    ),
    "eos": ({"eos_token_id": VOCAB}, ValueError, "eos_token_id 97 is outside 0..96"),
    "pad": ({"pad_token_id": VOCAB}, ValueError, "pad_token_id 97 is outside 0..96"),
    "stop-strings": ({"stop_strings": "x"}, ValueError, "stop_strings need tokenizer="),
    "hidden-row": (
        {"attention_mask": ONES * torch.tensor([[1], [0], [1]])},
        ValueError,
        "row 1 of the prompt has no token that is not masked",
    ),
    "tuple-cache": ({"past_key_values": ((1, 2),)}, ValueError, "past_key_values is a tuple"),
    "processor": (
        {"logits_processor": [lambda ids, logits: logits[:, 1:]]},
        ValueError,
        "a logits processor must return a tensor of shape",
    ),
    "all-banned": (
        {"logits_processor": [lambda ids, logits: logits - torch.inf]},
        ValueError,
        "no token is left",
    ),
}


@pytest.mark.parametrize("case", GENERATE)
def test_generate(model, case):
    given, kind, message = GENERATE[case]
    refused(lambda: model.generate(IDS, **given), kind, message)
    assert model.generate(IDS, max_new_tokens=2).shape == (3, 22)


def test_a_files_setting_that_is_not_supported(model):
    with pytest.warns(UserWarning, match="nothing here reads 'foo'"):
        config = GenerationConfig.from_dict({"num_beams": 2, "foo": 3})
    refused(lambda: model.generate(IDS, config), NotImplementedError, "num_beams=2 is not")
    neutral = GenerationConfig.from_dict({"num_beams": 1, "early_stopping": False})
    assert model.generate(IDS, neutral, max_new_tokens=1).shape == (3, 21)


def classifier(**overrides):
    return twins("AutoModelForSequenceClassification", "gemma", **overrides)[1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1]), r"labels are \[2\], must be \[3\]"),
        (torch.tensor([0, 1, 4]), "labels: 4 is outside -100 or 0..3"),
        (torch.zeros(3, 3), r"labels are \[3, 3\], must be \[3, 4\] for multi_label"),
        (torch.zeros(3), r"labels are \[3\], must be \[3, 4\] for multi_label"),
    ],
)
def test_labels_of_texts(labels, message):
    refused(lambda: classifier(num_labels=4)(IDS, labels=labels), ValueError, message)


def test_texts_without_an_end():
    model = classifier(num_labels=4)
    model.config.pad_token_id = None
    try:
        refused(lambda: model(IDS), ValueError, "a batch of 3 rows needs config.pad_token_id")
        assert model(IDS[:1]).logits.shape == (1, 4)
    finally:
        model.config.pad_token_id = 0
    mask = ONES.clone()
    mask[2] = 0
    message = "at the last that is not pad_token_id 0, column 19 of row 2, which attention_mask hid"
    refused(lambda: model(IDS, attention_mask=mask), ValueError, message)


def test_labels_of_tokens_that_are_hidden():
    _, model = twins("AutoModelForTokenClassification", "gemma", num_labels=5)
    mask = ONES.clone()
    mask[2, :7] = 0
    message = "labels: there is one at column 0 of row 2, which attention_mask hides"
    refused(lambda: model(IDS, attention_mask=mask, labels=ONES), ValueError, message)


CONFIGS = {
    "heads": ({"num_attention_heads": 3, "num_key_value_heads": 2}, "is not a multiple of"),
    "layer-types": ({"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
    "labels": ({"num_labels": 3, "id2label": {0: "a"}}, "num_labels 3 contradicts id2label of 1"),
    "problem": ({"problem_type": "ranking"}, "problem_type 'ranking' is unknown; there are"),
    "bidirectional": ({"use_bidirectional_attention": True}, "attention is causal"),
    "rope": ({"rope_parameters": {"rope_type": "none"}}, "rope_type 'none' is not supported"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(case):
    values, message = CONFIGS[case]
    refused(lambda: Gemma2Config(**values), ValueError, message)


def test_a_config_that_was_changed_is_checked_again():
    config = Gemma2Config(num_hidden_layers=2, hidden_size=16, intermediate_size=16, vocab_size=8)
    config.num_hidden_layers = 3
    refused(
        lambda: transformers_api.Gemma2Model(config),
        ValueError,
        "layer_types has 2 entries; num_hidden_layers is 3",
    )


def test_a_config_of_another_family(model, tmp_path):
    model.save_pretrained(tmp_path)
    message = "model_type 'gemma2' is not that of GemmaConfig, 'gemma'; AutoConfig picks the class"
    with pytest.raises(ValueError, match=message):
        GemmaConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        GemmaForCausalLM.from_pretrained(tmp_path)
    refused(lambda: GemmaForCausalLM(Gemma2Config()), ValueError, "needs a GemmaConfig, not Gemma2")
    config = AutoConfig.from_pretrained(tmp_path)
    message = "give config or hidden_size, not both"
    load = type(model).from_pretrained
    refused(lambda: load(tmp_path, config=config, hidden_size=3), ValueError, message)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type 'llama' is not supported"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


LOADING = {
    "quantized": (
        {"quantization_config": {}},
        NotImplementedError,
        "quantization_config={} is not",
    ),
    "attention": ({"attn_implementation": "paged"}, ValueError, "'paged' is unknown; 'eager'"),
    "remote": ({"use_safetensors": False}, NotImplementedError, "use_safetensors=False"),
    "half": ({"dtype": torch.float16}, ValueError, "float16 is refused: .* overflow"),
    "device": ({"device_map": "tpu"}, ValueError, "device 'tpu' is"),
    "devices": ({"device_map": {"model": 0, "lm_head": 1}}, NotImplementedError, "on one device"),
    "kernels": ({"ops": "triton", "device_map": "meta"}, ValueError, "device 'meta' is not"),
}


@pytest.mark.parametrize("case", LOADING)
def test_loading(model, tmp_path, case):
    given, kind, message = LOADING[case]
    model.save_pretrained(tmp_path)
    refused(lambda: type(model).from_pretrained(tmp_path, **given), kind, message)


def test_families_without_a_classifier(tmp_path):
    twins("AutoModelForCausalLM", "vaultgemma")[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no class for model_type 'vaultgemma'; it has them"):
        AutoModelForTokenClassification.from_pretrained(tmp_path)


def test_a_classifier_generates_no_text(tmp_path, tokenizer_file):
    classifier(num_labels=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="GemmaForSequenceClassification, which generates no text"):
        Engine.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=re.escape("model.safetensors: score.weight is not part")):
        GemmaForCausalLM.from_pretrained(tmp_path)


def test_no_training(model):
    for call in (model.train, model.requires_grad_):
        refused(call, NotImplementedError, "gemcut runs models and does not train them")
        assert call(False) is model
    refused(model.half, ValueError, "float16 is refused")
    assert not model(IDS, labels=IDS).loss.requires_grad


def test_weights_that_do_not_fit(model):
    own = model.state_dict()
    refused(lambda: model.load_state_dict({}), ValueError, "state_dict: .* is missing")
    refused(
        lambda: model.load_state_dict({**own, "x": IDS}), ValueError, "state_dict: x is not part"
    )
    wrong = {**own, "model.norm.weight": torch.zeros(3)}
    refused(lambda: model.load_state_dict(wrong), ValueError, r"model.norm.weight is \[3\], must")
