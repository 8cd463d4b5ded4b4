"""The original pickles: every layout that was published, and the models that fit it."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from foreign_files import (
    ORIGINAL_TYPES,
    assert_same_model,
    dequantised,
    original_state,
    quantised,
    refused,
    save_ckpt,
    save_shards,
    small_model,
    write_config,
)
from safetensors.torch import load_file

from gemcut.engine.checkpoints import gemma_pytorch
from gemcut.engine.checkpoints.convert import convert
from gemcut.engine.checkpoints.formats import FORMATS
from gemcut.engine.checkpoints.source import open_source
from gemcut.engine.config.model_config import PUBLISHED, ModelConfig


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def bare(state):
    """Names without `model.`, as some descriptions of the format have them."""
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


LAYOUTS = {
    "ckpt": lambda folder, state: save_ckpt(folder / "gemma.ckpt", state),
    "plain-state-in-a-pth": lambda folder, state: torch.save(state, folder / "gemma.pth"),
    "names-without-model": lambda folder, state: save_ckpt(folder / "gemma.ckpt", bare(state)),
    "shards": lambda folder, state: save_shards(folder, state, torch.save),
}


@pytest.mark.parametrize("model_type", ORIGINAL_TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_to_hugging_face(source, target, model_type, layout):
    model = small_model(model_type)
    LAYOUTS[layout](source, original_state(model))
    write_config(source, model)
    path = next(source.glob("*.pth"), source)  # many kinds of files have that ending
    done = convert(path, target)
    assert (done.source_format, done.config.dtype) == ("original", "float32")
    assert done.nbytes == sum(p.nbytes for p in model.parameters())
    assert_same_model(target, model)


@pytest.mark.parametrize("model_type", ORIGINAL_TYPES)
def test_int8_becomes_what_it_stands_for(source, target, tmp_path, model_type):
    model = small_model(model_type)
    save_ckpt(source / "gemma.ckpt", quantised(original_state(model)))
    write_config(source, model)
    convert(source, target, dtype=torch.float32)
    exact = dequantised(model)
    assert_same_model(target, exact)
    assert not torch.equal(exact.model.embed_tokens.weight, model.model.embed_tokens.weight)

    assert convert(source, tmp_path / "kept").config.dtype == "bfloat16"
    kept = load_file(tmp_path / "kept" / "model.safetensors")
    for name, tensor in kept.items():
        assert torch.equal(tensor, exact.state_dict()[name].bfloat16()), name


def test_int8_with_scalers_in_bfloat16_is_the_product_that_google_computes(source, target):
    """int8 * scaler in bfloat16, rounded once."""
    model = small_model("gemma")
    state = quantised(original_state(model))
    state = {n: t.bfloat16() if t.is_floating_point() else t for n, t in state.items()}
    save_shards(source, state, torch.save)
    write_config(source, model)
    convert(source, target)
    written = load_file(target / "model.safetensors")
    name = "layers.2.mlp.down_proj.weight"
    theirs = state[f"model.{name}"] * state[f"model.{name}_scaler"].unsqueeze(-1)
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(written[f"model.{name}"], theirs)


@pytest.mark.parametrize("shard", ["whole", "shards"])
@pytest.mark.parametrize("model_type", ORIGINAL_TYPES)
def test_there_and_back(source, target, tmp_path, model_type, shard):
    model = small_model(model_type)
    model.save_pretrained(source)
    limit = 10**9 if shard == "whole" else 40_000
    convert(source, target, to="original", max_shard_bytes=limit)
    # as google/gemma_pytorch reads it
    if shard == "whole":
        theirs = torch.load(target / "model.ckpt", weights_only=True)["model_state_dict"]
    else:
        weight_map = json.loads((target / "pytorch_model.bin.index.json").read_text())["weight_map"]
        theirs = {}
        for file in set(weight_map.values()):
            state = torch.load(target / file, weights_only=True)
            assert {weight_map[name] for name in state} == {file}
            assert not theirs.keys() & state.keys()
            theirs |= state
        assert len(set(weight_map.values())) > 3
    ours = original_state(model)
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        assert torch.equal(theirs[name], tensor), name

    convert(target, tmp_path / "back")
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = ModelConfig.from_file(source)
    assert ModelConfig.from_file(tmp_path / "back") == config


def test_what_is_computed_or_sees_images_is_left_aside(source, target):
    model = small_model("gemma3_text")
    state = original_state(model)
    state["text_token_embedder.weight"] = state.pop("embedder.weight")
    for name in ("local_freqs_cis", "global_freqs_cis"):
        state[name] = torch.zeros(4, 8, dtype=torch.complex64)
    state["siglip_vision_model.encoder_blocks.0.fc1.weight"] = torch.zeros(3, 3)
    state["mm_soft_embedding_norm.weight"] = torch.zeros(3)
    state["mm_input_projection.weight"] = torch.zeros(3, 3, dtype=torch.int8)
    state["mm_input_projection.weight_scaler"] = torch.zeros(3)
    save_ckpt(source / "model.ckpt", state)
    write_config(source, model)
    assert convert(source, target).left_aside == 6
    assert_same_model(target, model)


def test_computed_tables_of_gemma_1_and_the_samplers_embedding(source, target):
    model = small_model("gemma")
    state = original_state(model)
    state |= {"freqs_cis": torch.zeros(4, 8), "sampler.embedding": state["embedder.weight"]}
    save_ckpt(source / "model.ckpt", state)
    write_config(source, model)
    assert convert(source, target).left_aside == 2
    assert_same_model(target, model)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "vaultgemma-1b"])
def test_a_published_size_is_known_by_its_shapes(source, name):
    file = source / "model.ckpt"
    one = torch.zeros(1, dtype=torch.bfloat16)  # a single stored element, whatever the shape
    specs = list(gemma_pytorch.tensor_specs(PUBLISHED[name]))
    save_ckpt(file, {spec.name: one.expand(spec.shape) for spec in specs})
    opened = open_source(source, FORMATS["original"], None)
    assert (opened.inferred, opened.config) == (name, PUBLISHED[name])
    again = open_source(source, FORMATS["original"], name)
    assert (again.inferred, again.config) == (None, opened.config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        pytest.param(None, "those of no published size; give --config, .*gemma-2b, ", id="none"),
        pytest.param("gemma-2b", r"layers\.4\..* and \d+ more are missing", id="other"),
        pytest.param("gemma-2-2b", r"pre_feedforward_layernorm.*missing", id="family"),
        pytest.param("gemma-5", "'gemma-5' is neither a file nor a published size", id="unknown"),
        pytest.param("vaultgemma-1b", "vaultgemma has no original", id="vaultgemma"),
    ],
)
def test_config_must_fit(source, target, config, message):
    save_ckpt(source / "model.ckpt", original_state(small_model("gemma")))
    refused(source, target, message, config=config)


@pytest.mark.parametrize(
    ("model_type", "overrides", "message"),
    [
        pytest.param("vaultgemma", {}, "vaultgemma has no original", id="vaultgemma"),
        pytest.param("gemma", {"attention_bias": True}, "holds no biases", id="biases"),
        pytest.param("gemma2", {"tie_word_embeddings": False}, "embedding is the head", id="head"),
    ],
)
def test_models_that_the_format_cannot_hold(source, target, model_type, overrides, message):
    small_model(model_type, **overrides).save_pretrained(source)
    refused(source, target, message, to="original")


def test_a_classifier_has_no_original(source, target):
    auto_class = transformers.AutoModelForSequenceClassification
    small_model("gemma", auto_class=auto_class, num_labels=3).save_pretrained(source)
    message = "GemmaForSequenceClassification has no original"
    refused(source, target, message, to="original")


def test_float16_can_be_widened(source, target):
    model = small_model("gemma")
    save_ckpt(source / "m.ckpt", {n: t.half() for n, t in original_state(model).items()})
    write_config(source, model)
    convert(source, target, dtype=torch.float32)
    embedding = load_file(target / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(embedding, model.model.embed_tokens.weight.half().float())
