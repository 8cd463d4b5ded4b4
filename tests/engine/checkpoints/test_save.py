"""Saving: files that replace an earlier save whole, or not at all."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from saved_models import all_weights, assert_equal, load
from transformers import AutoModelForCausalLM

from gemcut.engine.checkpoints import save as save_module
from gemcut.engine.checkpoints.save import save_checkpoint
from gemcut.engine.config.model_config import ModelConfig


def test_saving_replaces_what_was_there(sharded):
    config, weights = ModelConfig.from_file(sharded), load(sharded)
    tokenizer = sharded / "spiece"
    tokenizer.write_bytes(b"pieces")
    save_checkpoint(sharded, config, weights, tokenizer_file=tokenizer)
    names = {file.name for file in sharded.iterdir()} - {"generation_config.json", "spiece"}
    assert names == {"config.json", "model.safetensors", "tokenizer.model"}
    assert (sharded / "tokenizer.model").read_bytes() == b"pieces"
    save_checkpoint(sharded, config, weights, max_shard_bytes=40_000)
    assert not (sharded / "model.safetensors").exists()
    assert_equal(
        load(sharded),
        config,
        all_weights(config, weights) | {"lm_head.weight": weights.lm_head},
    )


def test_a_tensor_above_the_limit_has_a_file_of_its_own(saved):
    config, weights = ModelConfig.from_file(saved), load(saved)
    save_checkpoint(saved, config, weights, max_shard_bytes=1)
    for file in saved.glob("model-*.safetensors"):
        assert len(load_file(file)) == 1
    assert torch.equal(load(saved).embedding, weights.embedding)


def test_a_failed_save_leaves_the_old_one(saved, monkeypatch):
    config, weights = ModelConfig.from_file(saved), load(saved)
    before = {file.name: file.read_bytes() for file in saved.iterdir()}

    def fail(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(save_module, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(saved, config, weights)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


def test_saved_dtype_is_that_of_the_weights(saved, tmp_path):
    config = ModelConfig.from_file(saved)
    save_checkpoint(tmp_path / "half", config, load(saved, torch.bfloat16))
    assert ModelConfig.from_file(tmp_path / "half").dtype == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert model.dtype == torch.bfloat16


def test_weights_of_another_config_are_not_saved(saved, tmp_path):
    weights = load(saved)
    weights.norm = weights.norm[:-1]
    with pytest.raises(ValueError, match=r"model.norm.weight is \(47,\), the config says \(48,\)"):
        save_checkpoint(tmp_path / "ours", ModelConfig.from_file(saved), weights)
    assert not (tmp_path / "ours" / "config.json").exists()
