"""`convert --quantization`: what it writes is read by transformers, with the same logits."""

import json
from pathlib import Path

import pytest
import torch
from accuracy import assert_within_budget
from compressed_checkpoints import their_logits
from random_models import random_model
from safetensors.torch import load_file
from saved_models import all_weights, load, rewrite
from transformers import AutoModelForCausalLM
from twins import all_logits, assert_same_logits, load_model, random_ids

from gemcut.engine.checkpoints import target as target_module
from gemcut.engine.checkpoints.convert import convert
from gemcut.engine.cli import main
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.weights import QUANTIZATIONS
from gemcut.kernels import reference
from gemcut.kernels.quantized_weight import QuantizedWeight, dequantized, quantize

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
IDS = random_ids(24, 97)
SIZES = {"hidden_size": 96, "intermediate_size": 160}
ODD = {"hidden_size": 52, "intermediate_size": 75, "head_dim": 18}
MATRICES = ("qkv", "o", "gate_up", "down")
every_format = pytest.mark.parametrize("quantization", QUANTIZATIONS)


@pytest.fixture
def source(tmp_path) -> Path:
    random_model("gemma3_text", **SIZES).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def ours(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    return all_logits(load_model(folder, reference, dtype, "cpu"), IDS)


@every_format
def test_matrices_of_layers_are_quantised_and_the_rest_is_as_it_was(source, target, quantization):
    done = convert(source, target, quantization=quantization)
    assert done.left_aside == 0
    assert done.nbytes == sum(x.nbytes for x in load_file(target / done.files[0]).values())
    exact, weights = load(source, torch.bfloat16), load(target, torch.bfloat16)
    assert torch.equal(weights.embedding, exact.embedding)
    assert weights.lm_head is weights.embedding
    group = 32 if quantization == "int4" else None
    for layer, meant in zip(weights.layers, exact.layers, strict=True):
        assert torch.equal(layer.pre_mlp_norm, meant.pre_mlp_norm)
        for name in MATRICES:
            found = getattr(layer, name)
            made = quantize(getattr(meant, name), quantization, group, torch.bfloat16)
            assert isinstance(found, QuantizedWeight)
            assert torch.equal(found.values.view(torch.uint8), made.values.view(torch.uint8))
            assert torch.equal(found.scales, made.scales.to(found.scales.dtype))


@every_format
@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize("dequantize", [False, True], ids=["as-stored", "dequantised"])
def test_transformers_reads_the_same_logits(tmp_path, target, model_type, quantization, dequantize):
    pytest.importorskip("compressed_tensors")
    random_model(model_type, **SIZES).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", target, quantization=quantization, max_shard_bytes=200_000)
    assert (target / "model.safetensors.index.json").exists()
    if dequantize:
        expected = their_logits(target, IDS)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            target, attn_implementation="eager", dtype=torch.float32
        )
        with torch.inference_mode():
            expected = model.eval()(input_ids=IDS[None]).logits[0]
    assert_same_logits(ours(target, torch.float32), expected)


@every_format
def test_in_bfloat16_logits_err_no_more_than_those_of_transformers(source, target, quantization):
    pytest.importorskip("compressed_tensors")
    convert(source, target, quantization=quantization)
    eager = their_logits(target, IDS, torch.bfloat16)
    exact = ours(target, torch.float64)
    assert_within_budget("logits", ours(target, torch.bfloat16), eager, exact)


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_odd_sizes_and_a_head_of_its_own(tmp_path, target, quantization):
    pytest.importorskip("compressed_tensors")
    overrides = ODD | {"attention_bias": True, "tie_word_embeddings": False}
    random_model("gemma2", **overrides).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", target, quantization=quantization)
    weights = load(target)
    assert isinstance(weights.lm_head, torch.Tensor)
    assert isinstance(weights.layers[0].down, QuantizedWeight)
    assert_same_logits(ours(target, torch.float32), their_logits(target, IDS))


@every_format
def test_a_row_of_zeros_keeps_a_scale_that_is_read(source, target, quantization):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(source, lambda tensors: tensors[name][2].zero_())
    convert(source, target, quantization=quantization)
    part = name if quantization == "fp8" else f"{name}_packed"
    tensors = load_file(target / "model.safetensors")
    assert (tensors[f"{name}_scale"][2] == 1).all()
    assert part in tensors
    up = load(target).layers[1].gate_up[160 + 2 : 160 + 3]
    assert not dequantized(up).any()


@every_format
def test_the_way_back_gives_what_the_numbers_stand_for(source, target, tmp_path, quantization):
    convert(source, target, quantization=quantization)
    done = convert(target, tmp_path / "plain")
    assert (done.left_aside, done.config.quantization, done.config.dtype) == (0, None, "bfloat16")
    config = json.loads((tmp_path / "plain/config.json").read_text())
    assert "quantization_config" not in config
    plain, weights = load(tmp_path / "plain", torch.bfloat16), load(target, torch.bfloat16)
    for layer, stored in zip(plain.layers, weights.layers, strict=True):
        assert torch.equal(layer.down, dequantized(stored.down, torch.bfloat16))
    model_config = ModelConfig.from_file(tmp_path / "plain")
    assert all(torch.isfinite(x).all() for x in all_weights(model_config, plain).values())


# What is refused


def test_only_hugging_face_s_format_is_quantised(source, target):
    with pytest.raises(ValueError, match="quantization 'int8' has no place in format 'flax'"):
        convert(source, target, to="flax", quantization="int8")


def test_what_is_quantised_is_not_quantised_again(source, target, tmp_path):
    convert(source, target, quantization="int4")
    with pytest.raises(ValueError, match="'int8' is for plain checkpoints, and this one is quant"):
        convert(target, tmp_path / "again", quantization="int8")


def test_columns_that_groups_do_not_divide(tmp_path, target):
    random_model("gemma2").save_pretrained(tmp_path / "source")
    with pytest.raises(ValueError, match="groups of 32 columns, but qkv has 48"):
        convert(tmp_path / "source", target, quantization="int4")
    assert not target.exists()


def test_a_nan_cannot_be_quantised(source, target):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(source, lambda tensors: tensors[name][2].fill_(float("nan")))
    with pytest.raises(ValueError, match=f"{name} holds a NaN or an infinity"):
        convert(source, target, quantization="fp8")
    assert not target.exists()


@pytest.mark.parametrize("part", ["_packed", "_scale"])
def test_what_is_written_otherwise_is_seen(source, target, monkeypatch, part):
    parts_of = target_module.parts_of

    def damaged(name, weight):
        parts = parts_of(name, weight)
        if "layers.3.self_attn.o_proj" in name:
            parts[name + part] = parts[name + part].clone()
            parts[name + part][0, 0] += 1
        return parts

    monkeypatch.setattr(target_module, "parts_of", damaged)
    with pytest.raises(ValueError, match=r"layers.3.self_attn.o_proj.weight reads back otherwise"):
        convert(source, target, quantization="int4")
    assert not target.exists()


def test_the_command_says_what_it_wrote(source, target, capsys):
    assert main(["convert", str(source), str(target), "--quantization", "int4"]) == 0
    size = (target / "model.safetensors").stat().st_size
    out = capsys.readouterr().out
    assert out.startswith(f"{target}: huggingface to huggingface, bfloat16, matrices in int4, 1 f")
    assert out.endswith("read back and equal\n")
    assert size < 0.6 * (source / "model.safetensors").stat().st_size
