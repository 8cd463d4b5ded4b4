"""Loading: every tensor of a transformers checkpoint where the model reads it, and NaN found."""

import pytest
import torch
from random_models import MODEL_TYPES, random_model
from saved_models import all_weights, assert_equal, load, rewrite
from transformers import AutoModelForCausalLM

from gemcut.engine.checkpoints import stored_weights
from gemcut.engine.checkpoints.load import find_nonfinite
from gemcut.engine.checkpoints.save import save_checkpoint
from gemcut.engine.config.model_config import PUBLISHED, ModelConfig
from gemcut.engine.execution.weights import checkpoint_tensors, empty_weights


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize(
    ("overrides", "shard"),
    [
        pytest.param({}, "1GB", id="one-file"),
        pytest.param({}, "40KB", id="shards"),
        pytest.param({"attention_bias": True, "tie_word_embeddings": False}, "40KB", id="biased"),
    ],
)
def test_transformers_to_here_and_back(tmp_path, model_type, overrides, shard):
    model = random_model(model_type, **overrides)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    assert (tmp_path / "theirs" / "model.safetensors").exists() is (shard == "1GB")
    config = ModelConfig.from_file(tmp_path / "theirs")
    weights = load(tmp_path / "theirs")
    assert_equal(weights, config, model.state_dict())
    assert (weights.lm_head is weights.embedding) is config.tie_word_embeddings
    size = sum(tensor.of(weights).numel() for tensor in checkpoint_tensors(config))
    assert size == config.num_parameters() == model.num_parameters()

    limit = 10**9 if shard == "1GB" else 40_000
    save_checkpoint(tmp_path / "ours", config, weights, max_shard_bytes=limit)
    assert_equal(load(tmp_path / "ours"), config, model.state_dict())
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_tensor_is_where_the_model_reads_it(tmp_path, model_type):
    model = random_model(model_type, attention_bias=True)
    model.save_pretrained(tmp_path)
    weights = load(tmp_path)
    for ours, theirs in zip(weights.layers, model.model.layers, strict=True):
        attention, mlp = theirs.self_attn, theirs.mlp
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        assert torch.equal(ours.qkv, torch.cat([q.weight, k.weight, v.weight]))
        assert torch.equal(ours.qkv_bias, torch.cat([q.bias, k.bias, v.bias]))
        assert torch.equal(ours.o, attention.o_proj.weight)
        assert torch.equal(ours.o_bias, attention.o_proj.bias)
        assert torch.equal(ours.gate_up, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        assert torch.equal(ours.down, mlp.down_proj.weight)
        assert torch.equal(ours.input_norm, theirs.input_layernorm.weight)
        if model_type == "gemma":
            # the pre-MLP norm, despite its name
            assert torch.equal(ours.pre_mlp_norm, theirs.post_attention_layernorm.weight)
        else:
            assert torch.equal(ours.pre_mlp_norm, theirs.pre_feedforward_layernorm.weight)
        if model_type in ("gemma", "vaultgemma"):
            assert ours.post_attention_norm is None
            assert ours.post_mlp_norm is None
        else:
            assert torch.equal(ours.post_attention_norm, theirs.post_attention_layernorm.weight)
            assert torch.equal(ours.post_mlp_norm, theirs.post_feedforward_layernorm.weight)
        if model_type == "gemma3_text":
            assert torch.equal(ours.q_norm, attention.q_norm.weight)
            assert torch.equal(ours.k_norm, attention.k_norm.weight)
        else:
            assert ours.q_norm is None
            assert ours.k_norm is None
    assert torch.equal(weights.norm, model.model.norm.weight)


def test_without_bias_there_is_none(saved):
    layer = load(saved).layers[0]
    assert layer.qkv_bias is None
    assert layer.o_bias is None


@pytest.mark.parametrize("name", PUBLISHED)
def test_parts_of_the_published_models(name):
    config = PUBLISHED[name]
    weights = empty_weights(config, device="meta", dtype=torch.bfloat16)
    for tensor in checkpoint_tensors(config):
        assert tensor.of(weights).shape == tensor.shape
    assert sum(p.of(weights).numel() for p in checkpoint_tensors(config)) == config.num_parameters()


def test_dtype_is_converted_on_the_way(saved):
    exact, rounded = load(saved), load(saved, torch.bfloat16)
    assert torch.equal(rounded.layers[1].qkv, exact.layers[1].qkv.bfloat16())
    assert rounded.embedding.dtype == torch.bfloat16


def test_a_large_tensor_is_copied_in_pieces(saved, monkeypatch):
    whole = load(saved)
    monkeypatch.setattr(stored_weights, "PIECE", 7)
    config = ModelConfig.from_file(saved)
    assert_equal(
        load(saved), config, all_weights(config, whole) | {"lm_head.weight": whole.lm_head}
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8, torch.bool])
def test_target_dtype_is_refused(saved, dtype):
    with pytest.raises(ValueError, match=r"float16 is refused: .*overflow|is refused: weights are"):
        load(saved, dtype)


def test_nonfinite_weights_are_found(saved):
    assert find_nonfinite(saved) == []

    def spoil(tensors):
        tensors["model.norm.weight"][-1] = float("nan")
        tensors["model.layers.0.mlp.down_proj.weight"][3, 5] = float("-inf")
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16()
        tensors["model.embed_tokens.weight"][96, 47] = float("inf")

    rewrite(saved, spoil)
    assert find_nonfinite(saved) == [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.norm.weight",
    ]
