"""Engines of tensors in memory: the same as of a folder, and what is refused."""

import gc
import json
import weakref
from unittest import mock

import pytest
import torch
from allocations import peak_bytes, tensor_bytes
from engines import logits_of, one_line, save_random_model
from random_models import MODEL_TYPES, random_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from gemcut.engine import AutoTokenizer, Engine, ModelConfig, SamplingParams, loading
from gemcut.engine.execution.weights import checkpoint_tensors
from gemcut.tokenizer import Tokenizer

PROMPT = [2, 5, 9, 11, 30]
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
SMALL = {"device": "cpu", "max_batch_size": 2, "reuse_prefixes": False}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_it_is_the_engine_of_the_saved_model(model_type, tied, tmp_path):
    model = random_model(model_type, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    options = SMALL | {"dtype": "float32"}
    with Engine.from_pretrained(tmp_path, skip_tokenizer_init=True, **options) as engine:
        expected = logits_of(engine, PROMPT)
    state = model.state_dict()
    assert "lm_head.weight" in state
    with Engine.from_state_dict(model.config, state, **options) as engine:
        assert torch.equal(logits_of(engine, PROMPT), expected)
    # parameters have no second name for a tied head; a stream of pairs; what config.json holds
    values = json.loads((tmp_path / "config.json").read_text())
    pairs = ((name, parameter) for name, parameter in model.named_parameters())
    with Engine.from_state_dict(values, pairs, **options) as engine:
        assert torch.equal(logits_of(engine, PROMPT), expected)
    with Engine.from_state_dict(ModelConfig.from_file(tmp_path), state, **options) as engine:
        assert torch.equal(logits_of(engine, PROMPT), expected)


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_quantises_as_a_folder_is_quantised(quantization, dtype, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "vocab_size": 128}
    model = random_model("gemma3_text", **sizes)
    model.save_pretrained(tmp_path)
    options = SMALL | {"dtype": dtype, "quantization": quantization, "kv_cache_dtype": "fp8"}
    with Engine.from_pretrained(tmp_path, skip_tokenizer_init=True, **options) as engine:
        expected = logits_of(engine, PROMPT)
    with Engine.from_state_dict(model.config, model.state_dict(), **options) as engine:
        assert torch.equal(logits_of(engine, PROMPT), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_floats_of_any_dtype_are_taken(dtype):
    model = random_model("gemma2").to(dtype)
    options = SMALL | {"dtype": "float32"}
    with Engine.from_state_dict(model.config, model.state_dict(), **options) as engine:
        found = logits_of(engine, PROMPT)
    with Engine.from_state_dict(model.config, model.float().state_dict(), **options) as engine:
        assert torch.equal(found, logits_of(engine, PROMPT))


def test_tensors_may_lie_in_any_order():
    model = random_model("gemma2", hidden_size=64)
    state = model.state_dict()
    other = {name: x.mT.contiguous().mT if x.dim() == 2 else x for name, x in state.items()}
    assert not other[EMBEDDING].is_contiguous()
    for quantization in (None, "int8"):
        options = SMALL | {"dtype": "float32", "quantization": quantization}
        with Engine.from_state_dict(model.config, state, **options) as engine:
            expected = logits_of(engine, PROMPT)
        with Engine.from_state_dict(model.config, other, **options) as engine:
            assert torch.equal(logits_of(engine, PROMPT), expected)


def test_names_are_those_that_files_may_have():
    model = random_model("gemma3_text")
    state, options = model.state_dict(), SMALL | {"dtype": "float32"}
    with Engine.from_state_dict(model.config, state, **options) as engine:
        expected = logits_of(engine, PROMPT)
    named = model.named_parameters()
    bare = {name.removeprefix("model."): x for name, x in named}
    multimodal = {f"model.language_model.{name}": x for name, x in bare.items()}
    multimodal["model.vision_tower.patch.weight"] = torch.ones(3, dtype=torch.int8)
    for tensors in (bare, multimodal):
        with Engine.from_state_dict(model.config, tensors, **options) as engine:
            assert torch.equal(logits_of(engine, PROMPT), expected)


def test_the_callers_tensors_are_neither_kept_nor_shared():
    model = random_model("gemma2")
    # memory of numpy's, as it says when it goes
    arrays = {name: x.detach().numpy().copy() for name, x in model.named_parameters()}
    state = {name: torch.from_numpy(x) for name, x in arrays.items()}
    watched = [weakref.ref(x) for x in arrays.values()]
    with Engine.from_state_dict(model.config, state, dtype="float32", **SMALL) as engine:
        expected = logits_of(engine, PROMPT)
        for x in state.values():
            x.fill_(torch.nan)
        assert torch.equal(logits_of(engine, PROMPT), expected)
        del state, x, arrays
        gc.collect()
        assert not any(each() is not None for each in watched)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_beside_model_and_tensors_there_is_less_than_a_layer(quantization):
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 64, "vocab_size": 2048}
    model = random_model("gemma2", **sizes)
    state, made = model.state_dict(), []
    options = SMALL | {"dtype": "float32", "quantization": quantization}

    def make() -> None:
        made.append(Engine.from_state_dict(model.config, state, **options))

    make()  # what is measured once in a process
    config = made[0].config
    of_layer = [x.shape for x in checkpoint_tensors(config) if x.layer == 0]
    layer = 4 * sum(torch.Size(shape).numel() for shape in of_layer)
    with mock.patch("gemcut.engine.loading.in_temporary_thread", lambda load: load()):
        peak = peak_bytes(make)
    assert peak < tensor_bytes(made[1]) + layer
    for engine in made:
        engine.close()


# Tokenizers


def test_a_tokenizer_is_one_a_folder_or_what_saves_itself(tmp_path, tokenizer_file):
    model = save_random_model(tmp_path, tokenizer_file)
    with Engine.from_pretrained(tmp_path, dtype="float32", **SMALL) as engine:
        expected = engine.generate("It was", GREEDY).text
    own = Tokenizer.from_file(tmp_path)
    for tokenizer in (own, tmp_path, str(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        with Engine.from_state_dict(
            model.config, model.state_dict(), tokenizer, dtype="float32", **SMALL
        ) as engine:
            assert engine.generate("It was", GREEDY).text == expected
    with (
        Engine.from_state_dict(model.config, model.state_dict(), **SMALL) as engine,
        pytest.raises(ValueError, match="token"),
    ):
        engine.generate("It was", GREEDY)
    with pytest.raises(ValueError, match="tokenizer is a int, not a Tokenizer, a folder"):
        Engine.from_state_dict(model.config, model.state_dict(), 3, **SMALL)


def test_eos_ids_and_default_settings_are_the_callers():
    model = random_model("gemma2")
    with Engine.from_state_dict(
        model.config,
        model.state_dict(),
        default_params=SamplingParams(temperature=0.0, max_tokens=6),
        eos_ids=[],
        **SMALL,
    ) as engine:
        output = engine.generate(PROMPT)
        assert len(output.token_ids) == 6
    with Engine.from_state_dict(
        model.config,
        model.state_dict(),
        default_params=SamplingParams(temperature=0.0, max_tokens=6),
        eos_ids=[output.token_ids[2]],
        **SMALL,
    ) as engine:
        assert engine.generate(PROMPT).finish_reason == "stop"


# Bad input


def sparse(x: Tensor) -> Tensor:
    return torch.eye(len(x)).to_sparse()


class Sharded(Tensor):
    """What a DTensor is to us."""


BAD = {
    "missing": (lambda s: s.pop(NORM), f"tensors: {NORM} is missing"),
    "all missing": (lambda s: s.clear(), "model.embed_tokens.weight and \\d+ more are missing"),
    "extra": (lambda s: s.update(extra=s[NORM]), "tensors: extra is not part of the model"),
    "shape": (lambda s: s.update({NORM: torch.ones(3)}), f"{NORM} is \\[3\\], the config says"),
    "scalar": (lambda s: s.update({NORM: torch.tensor(1.0)}), f"{NORM} is \\[\\], the config says"),
    "integer": (lambda s: s.update({NORM: s[NORM].int()}), f"{NORM} is int32; supported are BF16"),
    "complex": (lambda s: s.update({NORM: s[NORM].cfloat()}), f"{NORM} is complex64"),
    "meta": (lambda s: s.update({NORM: s[NORM].to("meta")}), f"{NORM} is on the meta device"),
    "sparse": (lambda s: s.update({NORM: sparse(s[NORM])}), f"{NORM} has the layout sparse_coo"),
    "subclass": (
        lambda s: s.update({NORM: s[NORM].as_subclass(Sharded)}),
        f"{NORM} is a Sharded, not a torch.Tensor; give full tensors",
    ),
    "array": (lambda s: s.update({NORM: s[NORM].numpy()}), f"{NORM} is a ndarray, not a torch"),
    "name": (lambda s: s.update({7: s[NORM]}), "the name 7 is not a string"),
    "head": (
        lambda s: s.update({"lm_head.weight": 1 + s[EMBEDDING]}),
        "lm_head.weight differs from the embedding, but tie_word_embeddings is true",
    ),
    "twice": (
        lambda s: s.update({"embed_tokens.weight": s[EMBEDDING]}),
        "model.embed_tokens.weight and embed_tokens.weight are the same weight",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_tensor_is_named(kind):
    change, message = BAD[kind]
    model = random_model("gemma2")
    state = model.state_dict()
    change(state)
    with pytest.raises(ValueError, match=message) as error:
        Engine.from_state_dict(model.config, state, **SMALL)
    one_line(error)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (3, "tensors are a int, not a mapping or pairs"),
        ("abc", "tensors are a str"),
        (torch.ones(3), "tensors are a Tensor"),
        ([torch.ones(3)], "a Tensor is no pair"),
        ([("a", 1, 2)], "is no pair"),
        ([(NORM, torch.ones(48))] * 2, f"tensors: {NORM} is there twice"),
    ],
    ids=["number", "text", "tensor", "tensors", "triples", "twice"],
)
def test_what_is_no_state_dict_is_refused(tensors, message):
    with pytest.raises(ValueError, match=message) as error:
        Engine.from_state_dict(random_model("gemma2").config, tensors, **SMALL)
    one_line(error)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "config is a NoneType, not a ModelConfig"),
        (ModelConfig, "config is a type, not a ModelConfig"),
        ({"model_type": "llama"}, "config: model_type 'llama' is not supported"),
        (
            {"model_type": "gemma", "quantization_config": {"quant_method": "gptq"}},
            "config: .*GPTQ",
        ),
        (
            {"model_type": "gemma", "architectures": ["GemmaForSequenceClassification"]},
            "config holds a GemmaForSequenceClassification, which generates no text",
        ),
    ],
    ids=["none", "class", "family", "quantised", "classifier"],
)
def test_a_bad_config_is_named(config, message):
    with pytest.raises(ValueError, match=message) as error:
        Engine.from_state_dict(config, {}, **SMALL)
    one_line(error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eos_ids": "ab"}, "eos_ids 'ab' are no list of token ids"),
        ({"eos_ids": 1}, "eos_ids 1 are no list of token ids"),
        ({"eos_ids": [97]}, "eos_ids: the token id 97 is outside 0..96"),
        ({"eos_ids": [1.0]}, "eos_ids: the token id 1.0 is not an integer"),
        ({"default_params": {"top_k": 1}}, "default_params must be a SamplingParams, got dict"),
        ({"max_waiting": -1}, "max_waiting -1 is outside"),
    ],
    ids=lambda x: str(next(iter(x.items()))) if isinstance(x, dict) else "",
)
def test_what_no_request_could_use_is_named_before_weights_are_read(options, message, monkeypatch):
    monkeypatch.setattr(loading, "fill_weights", lambda *_, **__: pytest.fail("read"))
    monkeypatch.setattr(loading, "load_checkpoint", lambda *_, **__: pytest.fail("read"))
    model = random_model("gemma2")
    with pytest.raises(ValueError, match=message) as error:
        Engine.from_state_dict(model.config, model.state_dict(), **SMALL, **options)
    one_line(error)
    if "eos_ids" not in options:
        with pytest.raises(ValueError, match=message):
            Engine.from_pretrained("demo", device="cpu", **options)


def test_a_tokenizer_that_is_none_writes_nothing(monkeypatch):
    model = random_model("gemma2")
    monkeypatch.setattr(type(model), "save_pretrained", lambda *_: pytest.fail("written"))
    for given, kind in ((model, "Gemma2ForCausalLM"), (PreTrainedTokenizerFast, "type")):
        with pytest.raises(ValueError, match=f"tokenizer is a {kind}, not a Tokenizer") as error:
            Engine.from_state_dict(model.config, model.state_dict(), given, **SMALL)
        one_line(error)
    with pytest.raises(ValueError, match="tokenizer: model 'nowhere' is neither"):
        Engine.from_state_dict(model.config, model.state_dict(), "nowhere", **SMALL)


def test_what_cannot_be_quantised_is_named():
    model = random_model("gemma2", hidden_size=64)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.inf
    with pytest.raises(ValueError, match=r"up_proj\.weight holds a NaN or an inf"):
        Engine.from_state_dict(model.config, state, quantization="int8", **SMALL)


def test_a_model_of_transformers_needs_no_more_than_its_own(tmp_path, tokenizer_file):
    save_random_model(tmp_path, tokenizer_file, "gemma3_text")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with Engine.from_state_dict(
        model.config, model.state_dict(), tmp_path, dtype="float32", **SMALL
    ) as engine:
        ids = engine.generate(PROMPT, GREEDY).token_ids
    theirs = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    assert ids == theirs[0, len(PROMPT) :].tolist()
