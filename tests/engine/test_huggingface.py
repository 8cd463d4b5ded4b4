"""Checkpoints: exact weights from and to transformers, and every way in which files go wrong."""

import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from random_models import MODEL_TYPES, random_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    SiglipVisionConfig,
)

from gemcut.engine.checkpoints import hub, stored_tensors
from gemcut.engine.checkpoints import load as load_module
from gemcut.engine.checkpoints import save as save_module
from gemcut.engine.checkpoints.hub import resolve_checkpoint
from gemcut.engine.checkpoints.load import find_nonfinite, load_checkpoint
from gemcut.engine.checkpoints.save import save_checkpoint
from gemcut.engine.config.generation_file import read_generation_config, stop_token_ids
from gemcut.engine.config.model_config import PUBLISHED, ModelConfig
from gemcut.engine.execution.weights import Weights, checkpoint_tensors, empty_weights


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Weights:
    return load_checkpoint(folder, ModelConfig.from_file(folder), device="cpu", dtype=dtype)


def all_weights(config: ModelConfig, weights: Weights) -> dict[str, torch.Tensor]:
    return {tensor.name: tensor.of(weights) for tensor in checkpoint_tensors(config)}


def assert_equal(weights: Weights, config: ModelConfig, state: dict[str, torch.Tensor]) -> None:
    ours = all_weights(config, weights)
    assert ours.keys() | {"lm_head.weight"} == state.keys() | {"lm_head.weight"}
    for name, tensor in ours.items():
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(weights.lm_head, state["lm_head.weight"])


@pytest.fixture
def saved(tmp_path) -> Path:
    """A small Gemma 2 in one file."""
    random_model("gemma2", num_hidden_layers=2).save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, change) -> None:
    """Apply `change` to the dictionary of tensors in the folder's file."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


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
    monkeypatch.setattr(stored_tensors, "PIECE", 7)
    config = ModelConfig.from_file(saved)
    assert_equal(
        load(saved), config, all_weights(config, whole) | {"lm_head.weight": whole.lm_head}
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8, torch.bool])
def test_target_dtype_is_refused(saved, dtype):
    with pytest.raises(ValueError, match=r"float16 is refused: .*overflow|is refused: weights are"):
        load(saved, dtype)


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
    monkeypatch.setattr(load_module, "empty_weights", lambda *a, **k: pytest.fail("allocated"))
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


@pytest.fixture
def sharded(tmp_path) -> Path:
    random_model("gemma2", num_hidden_layers=2).save_pretrained(tmp_path, max_shard_size="40KB")
    return tmp_path


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


def test_stop_tokens_are_the_union(saved):
    config = ModelConfig.from_file(saved)
    (saved / "generation_config.json").unlink(missing_ok=True)
    assert read_generation_config(saved) == {}
    assert stop_token_ids(saved, config) == (1,)
    for value, expected in ((5, (1, 5)), ([7, 1, 5], (1, 7, 5)), (None, (1,))):
        (saved / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        assert stop_token_ids(saved, config) == expected
    for value in (97, -1, "1", [True]):
        (saved / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id"):
            stop_token_ids(saved, config)
    (saved / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config.json: not JSON"):
        stop_token_ids(saved, config)


def test_demo_and_folders_are_found(tmp_path, monkeypatch):
    assert resolve_checkpoint("demo").name == "demo"
    assert resolve_checkpoint("demo").parent.name == "engine"
    assert resolve_checkpoint(tmp_path) == resolve_checkpoint(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "gemma").mkdir()
    assert resolve_checkpoint("~/gemma") == tmp_path / "gemma"


@pytest.mark.parametrize(
    "model",
    ["./nowhere", "/no/such/folder", "gemma", "", "a/b/c", "../x", "a" * 999, Path("owner/name")],
)
def test_no_such_folder_asks_no_network(monkeypatch, tmp_path, model):
    monkeypatch.chdir(tmp_path)  # where "../x" is surely nothing
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(
        ValueError, match="neither 'demo', an existing folder, nor a Hugging Face id"
    ):
        resolve_checkpoint(model)


def test_a_file_is_no_checkpoint(saved):
    with pytest.raises(ValueError, match="is a file; give the folder that holds it"):
        resolve_checkpoint(saved / "model.safetensors")


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_offline_reads_the_cache(offline):
    repository = offline / "models--google--gemma-test"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert resolve_checkpoint("google/gemma-test") == snapshot


def test_offline_without_cache(offline):
    with pytest.raises(ValueError, match=r"'google/gemma-test' .*not in the cache") as error:
        resolve_checkpoint("google/gemma-test")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        pytest.param(GatedRepoError, "is gated: accept its terms at https://", id="gated"),
        pytest.param(RepositoryNotFoundError, "unknown to the Hugging Face Hub", id="unknown"),
        pytest.param(ConnectionError, "cannot be fetched: first line$", id="network"),
    ],
)
def test_hub_failures(monkeypatch, failure, message):
    def fail(model, allow_patterns):
        assert "*.safetensors" in allow_patterns
        assert not any("bin" in pattern or "py" in pattern for pattern in allow_patterns)
        text = "first line\nsecond line"
        raise failure(text) if failure is ConnectionError else failure.__new__(failure, text)

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=message) as error:
        resolve_checkpoint("google/gemma-test")
    assert "\n" not in str(error.value)
