"""Safetensors files: names, headers and indexes that are accepted, and damage of every kind."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from random_models import random_model
from safetensors.torch import load_file, save_file
from saved_models import assert_equal, load, rewrite
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    SiglipVisionConfig,
)

from gemcut.engine.checkpoints import stored_weights
from gemcut.engine.checkpoints.load import find_nonfinite
from gemcut.engine.config.model_config import ModelConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            r"model\.layers\.1\.mlp\.up_proj\.weight is missing",
            id="missing",
        ),
        pytest.param(
            lambda t: [t.pop("model.norm.weight"), t.pop("model.embed_tokens.weight")],
            "model.embed_tokens.weight and 1 more are missing",
            id="two-missing",
        ),
        pytest.param(
            lambda t: t.update({"score.weight": torch.zeros(2, 48)}),
            "model.safetensors: score.weight is not part of the model",
            id="extra",
        ),
        pytest.param(
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(2)}),
            "up_proj.weight is not part of the model",
            id="layer-too-many",
        ),
        pytest.param(
            lambda t: t.update({"model.vision_tower.x.weight": torch.zeros(2)}),
            "vision_tower.x.weight is not part of the model",
            id="vision-in-a-text-family",
        ),
        pytest.param(
            lambda t: t.update({"model.norm.weight": torch.zeros(47)}),
            r"model.norm.weight is \[47\], the config says \[48\]",
            id="misshapen",
        ),
        pytest.param(
            lambda t: t.update({"model.layers.0.self_attn.o_proj.weight": torch.zeros(64, 48)}),
            r"o_proj.weight is \[64, 48\], the config says \[48, 64\]",
            id="transposed",
        ),
        pytest.param(
            lambda t: t.update({"model.norm.weight": torch.zeros(48, dtype=torch.int8)}),
            "model.norm.weight is I8; supported are BF16",
            id="integers",
        ),
        pytest.param(
            lambda t: t.update({"norm.weight": torch.zeros(48)}),
            "norm.weight are the same weight",
            id="twice-under-two-names",
        ),
        pytest.param(
            lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
            "lm_head.weight differs from the embedding, but tie_word_embeddings is true",
            id="tied-head-differs",
        ),
    ],
)
def test_bad_tensor_is_refused_before_allocation(saved, monkeypatch, change, message):
    rewrite(saved, change)
    monkeypatch.setattr(stored_weights, "empty_weights", lambda *a, **k: pytest.fail("allocated"))
    with pytest.raises(ValueError, match=message) as error:
        load(saved)
    assert "\n" not in str(error.value)


def test_what_is_harmless_is_left_aside(saved):
    expected = load(saved)
    rewrite(
        saved,
        lambda t: t.update(
            {
                "lm_head.weight": t["model.embed_tokens.weight"].clone(),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
            }
        ),
    )
    assert torch.equal(load(saved).layers[1].down, expected.layers[1].down)


def test_names_without_prefix_are_those_of_a_headless_model(tmp_path):
    model = random_model("gemma2", num_hidden_layers=2)
    model.model.save_pretrained(tmp_path)
    assert "norm.weight" in load_file(tmp_path / "model.safetensors")
    assert_equal(load(tmp_path), ModelConfig.from_file(tmp_path), model.state_dict())


@pytest.mark.parametrize("hub_names", [False, True], ids=["transformers-5", "hub"])
def test_text_part_of_a_multimodal_gemma_3(tmp_path, hub_names):
    text = random_model("gemma3_text", vocab_size=128)
    vision = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    vision.image_size, vision.patch_size = 28, 14
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**text.config.to_dict()),
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=100,
        boi_token_index=101,
        eoi_token_index=102,
    )
    model = Gemma3ForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert any("vision_tower" in name for name in names)
    assert any("multi_modal_projector" in name for name in names)
    to_hub = ("model.language_model.", "language_model.model.")
    to_new = ("language_model.model.", "model.language_model.")

    def rename(tensors):
        for name in list(tensors):
            tensors[name.replace(*(to_hub if hub_names else to_new))] = tensors.pop(name)

    rewrite(tmp_path, rename)
    assert_equal(load(tmp_path), ModelConfig.from_file(tmp_path), text.state_dict())


def edit_index(folder: Path, change) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "elsewhere",
    [
        "../model.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        "model.bin",
        "",
        7,
        None,
    ],
)
def test_index_may_not_name_a_file_outside_its_folder(sharded, elsewhere):
    edit_index(sharded, lambda i: i["weight_map"].update({"model.norm.weight": elsewhere}))
    with pytest.raises(ValueError, match=r"model.norm.weight is in .*no safetensors file of its"):
        load(sharded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda i: i.pop("weight_map"), "weight_map None is not an object", id="none"),
        pytest.param(
            lambda i: i.update(weight_map={}), "weight_map {} is not an object with", id="empty"
        ),
        pytest.param(
            lambda i: i["weight_map"].pop("model.norm.weight"),
            "model.norm.weight is listed in no file, but held by model-0",
            id="not-listed",
        ),
        pytest.param(
            lambda i: i["weight_map"].update({"a": i["weight_map"]["model.norm.weight"]}),
            "a is listed in model-0.*, but held by none",
            id="not-held",
        ),
    ],
)
def test_index_that_disagrees(sharded, change, message):
    edit_index(sharded, change)
    with pytest.raises(ValueError, match=message):
        load(sharded)


def test_tensor_in_two_shards(sharded):
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    one, other = load_file(first), load_file(second)
    name = next(iter(one))
    save_file(other | {name: one[name]}, second)
    with pytest.raises(ValueError, match=f"{name} is in {first.name} and {second.name}"):
        load(sharded)


def test_shards_may_be_links(sharded, tmp_path_factory):
    """The Hub's cache keeps every file elsewhere and links to it."""
    blobs = tmp_path_factory.mktemp("blobs")
    for file in sharded.glob("model-*.safetensors"):
        shutil.move(file, blobs / file.name)
        file.symlink_to(blobs / file.name)
    assert load(sharded).embedding.shape == (97, 48)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 100)


@pytest.mark.parametrize("which", ["saved", "sharded"])
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        pytest.param(cut, "damaged or cut short", id="cut-short"),
        pytest.param(lambda f: os.truncate(f, 5), "damaged or cut short", id="no-header"),
        pytest.param(lambda f: os.truncate(f, 0), "damaged or cut short", id="empty"),
        pytest.param(
            lambda f: f.write_bytes(b"\xff" * 4096), "damaged or cut short", id="no-safetensors"
        ),
        pytest.param(
            lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
            "a git-lfs pointer",
            id="git-lfs-pointer",
        ),
        pytest.param(lambda f: (f.unlink(), f.mkdir()), "cannot be read", id="folder"),
    ],
)
def test_damaged_file(request, which, harm, message):
    folder = request.getfixturevalue(which)
    file = sorted(folder.glob("model*.safetensors"))[-1]
    harm(file)
    with pytest.raises(ValueError, match=f"{file.name}: {message}"):
        load(folder)
    with pytest.raises(ValueError, match=message):
        find_nonfinite(folder)


def test_missing_files(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name}: cannot be read .No such file"):
        load(sharded)
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor"):
        load(sharded)
    (sharded / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"pickles and .* are read by `gemcut convert` alone"):
        load(sharded)
    with pytest.raises(ValueError, match="no such folder"):
        find_nonfinite(sharded / "nowhere")


def test_weights_of_another_size_are_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(
        ValueError, match=r"down_proj.weight is \[48, 80\], the config says \[48, 96"
    ):
        load(saved)
