"""The original pickles: every layout that was published, and every way in which one goes wrong."""

import json
import os
import re
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from foreign_files import (
    ORIGINAL_TYPES,
    Harmful,
    assert_same_model,
    dequantised,
    original_state,
    quantised,
    save_ckpt,
    save_shards,
    small_model,
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


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "target"


def write_config(folder: Path, model) -> Path:
    model.config.save_pretrained(folder)
    return folder / "config.json"


def refused(source: Path, target: Path, message: str, **options) -> str:
    with pytest.raises(ValueError, match=message) as error:
        convert(source, target, **options)
    assert "\n" not in str(error.value)
    assert not target.exists()
    return str(error.value)


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
    path = next(source.glob("*.pth"), source)  # of files with that ending there are many kinds
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


QKV = "model.layers.1.self_attn.qkv_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda s: s.pop("model.layers.3.mlp.up_proj.weight"),
            r"model\.layers\.3\.mlp\.up_proj\.weight is missing",
            id="missing",
        ),
        pytest.param(
            lambda s: [s.pop(name) for name in list(s) if ".layers.3." in name],
            r"model\.layers\.3\..* and \d+ more are missing",
            id="layer-missing",
        ),
        pytest.param(
            lambda s: s.update({"model.layers.4.mlp.up_proj.weight": torch.zeros(2)}),
            "model.ckpt: model.layers.4.mlp.up_proj.weight is not part",
            id="layer-too-many",
        ),
        pytest.param(
            lambda s: s.update({QKV: s[QKV][:-1]}),
            r"qkv_proj.weight is \[127, 48\], the config says \[128, 48\]",
            id="misshapen",
        ),
        pytest.param(
            lambda s: s.update({QKV: s[QKV].T.contiguous()}),
            r"qkv_proj.weight is \[48, 128\], the config says \[128, 48\]",
            id="transposed",
        ),
        pytest.param(
            lambda s: s.update({"siglip_vision_model.x": torch.zeros(2)}),
            "siglip_vision_model.x is not part of the model",
            id="vision-in-a-text-family",
        ),
        pytest.param(
            lambda s: s.update({"norm.weight": s["model.norm.weight"]}),
            "norm.weight are the same weight",
            id="twice",
        ),
        pytest.param(
            lambda s: s.update({QKV: s[QKV].to(torch.int8)}),
            r"qkv_proj.weight is int8, but model\..*qkv_proj.weight_scaler is missing",
            id="int8-without-scaler",
        ),
        pytest.param(
            lambda s: s.update({QKV: s[QKV].to(torch.int32)}),
            "qkv_proj.weight is int32; supported are bfloat16",
            id="integers",
        ),
        pytest.param(
            lambda s: s.update({QKV + "_scaler": torch.ones(128)}),
            r"has a scaler, but is float32 \[128, 48\], not an int8 matrix",
            id="scaler-of-floats",
        ),
        pytest.param(
            lambda s: s.update({QKV: s[QKV].to(torch.int8), QKV + "_scaler": torch.ones(127)}),
            r"qkv_proj.weight_scaler is float32 \[127\], not a float for each of 128 rows",
            id="scaler-too-short",
        ),
        pytest.param(
            lambda s: s.update({"model.x.weight_scaler": torch.ones(3)}),
            "model.x.weight_scaler scales no weight",
            id="scaler-alone",
        ),
        pytest.param(
            lambda s: s.update({QKV: torch.empty(128, 48, device="meta")}),
            "is not a plain tensor with data",
            id="no-data",
        ),
        pytest.param(
            lambda s: s.update({QKV: s[QKV].to_sparse()}), "is not a plain tensor", id="sparse"
        ),
        pytest.param(lambda s: s.update({QKV: [1.0]}), "is list, not a tensor", id="list"),
        pytest.param(lambda s: s.update({3: torch.ones(3)}), "3 is Tensor, not a", id="no-name"),
        pytest.param(lambda s: s.clear(), "holds dict, not named tensors", id="empty"),
        pytest.param(
            lambda s: s.update({n: t.half() for n, t in s.items()}),
            "is float16, which Gemma's activations overflow; give --dtype",
            id="float16",
        ),
    ],
)
def test_bad_tensors(source, target, change, message):
    model = small_model("gemma")
    state = original_state(model)
    change(state)
    save_ckpt(source / "model.ckpt", state)
    write_config(source, model)
    refused(source, target, message)


def test_a_pickle_of_transformers_is_told_apart(source, target):
    model = small_model("gemma")
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    write_config(source, model)
    refused(source, target, "a pickle of transformers, not the original's")


def test_float16_can_be_widened(source, target):
    model = small_model("gemma")
    save_ckpt(source / "m.ckpt", {n: t.half() for n, t in original_state(model).items()})
    write_config(source, model)
    convert(source, target, dtype=torch.float32)
    embedding = load_file(target / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(embedding, model.model.embed_tokens.weight.half().float())


def test_a_pickle_does_not_run_code(source, target, tmp_path):
    victim = tmp_path / "victim"
    state = original_state(small_model("gemma")) | {"x": Harmful(victim)}
    file = save_ckpt(source / "model.ckpt", state)
    message = refused(source, target, r"refused: the pickle asks for more than plain tensors")
    assert "mkdir" in message
    assert not victim.exists()
    torch.load(file, weights_only=False)
    assert victim.exists()  # it would have


def cut(share: float):
    return lambda file: os.truncate(file, int(file.stat().st_size * share))


def compress(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in held.items():
            archive.writestr(name, data)


def drop_storage(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in held.items():
            archive.writestr(name, data[:4] if name.endswith("data/3") else data)


def spoil_pickle(file: Path) -> None:
    data = file.read_bytes()
    at = data.index(b"model_state_dict")
    file.write_bytes(data[:at] + b"\xff" * 400 + data[at + 400 :])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        pytest.param(cut(0), "damaged or cut short", id="empty"),
        pytest.param(cut(0.5), "damaged or cut short", id="half"),
        pytest.param(cut(0.999), "damaged or cut short", id="nearly-whole"),
        pytest.param(lambda f: f.write_bytes(b"\xff" * 4096), "damaged or cut", id="noise"),
        pytest.param(
            lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
            "a git-lfs pointer",
            id="git-lfs-pointer",
        ),
        pytest.param(spoil_pickle, "damaged|refused", id="broken-pickle"),
        pytest.param(compress, "is compressed, which torch.save never does", id="compressed"),
        pytest.param(
            lambda f: torch.save({"a": 1}, f, _use_new_zipfile_serialization=False),
            "no file that torch.save wrote",
            id="before-zip",
        ),
        pytest.param(lambda f: torch.save([1, 2], f), "holds list, not named", id="list"),
        pytest.param(lambda f: (f.unlink(), f.mkdir()), "cannot be read", id="folder"),
    ],
)
def test_damaged_file(source, target, harm, message):
    model = small_model("gemma")
    file = save_ckpt(source / "model.ckpt", original_state(model))
    write_config(source, model)
    harm(file)
    refused(source, target, f"{file.name}: .*({message})")


def test_storage_that_ends_early_is_not_read_past(source, target):
    """Its tensor would reach into whatever lies behind it; torch looks at the file's end alone."""
    model = small_model("gemma")
    file = save_ckpt(source / "model.ckpt", original_state(model))
    write_config(source, model)
    drop_storage(file)
    refused(source, target, "model.ckpt: damaged .tensors and the bytes stored")


@pytest.mark.parametrize(
    "elsewhere", ["../model.bin", "/etc/passwd", "sub/x.bin", "..", "model.ckpt", "", 7, None]
)
def test_index_may_not_name_a_file_outside_its_folder(source, target, elsewhere):
    model = small_model("gemma")
    save_shards(source, original_state(model), torch.save)
    write_config(source, model)
    index = source / "pytorch_model.bin.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["embedder.weight"] = elsewhere
    index.write_text(json.dumps(values))
    refused(source, target, r"embedder.weight is in .*no bin file of its folder")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        pytest.param(
            lambda folder, index: index["weight_map"].pop(QKV),
            re.escape(QKV) + " is listed in no file, but held by pytorch_model-0",
            id="not-listed",
        ),
        pytest.param(
            lambda folder, index: index["weight_map"].update(x="pytorch_model-00001-of-00002.bin"),
            "x is listed in pytorch_model-00001-of-00002.bin, but held by none",
            id="not-held",
        ),
        pytest.param(
            lambda folder, index: (folder / "pytorch_model-00002-of-00002.bin").unlink(),
            "pytorch_model-00002-of-00002.bin: cannot be read .No such file",
            id="shard-missing",
        ),
        pytest.param(
            lambda folder, index: torch.save(
                {"embedder.weight": torch.ones(1)}, folder / "pytorch_model-00002-of-00002.bin"
            ),
            "embedder.weight and .*embedder.weight repeat",
            id="in-two-shards",
        ),
        pytest.param(
            lambda folder, index: index.update(weight_map={}), "weight_map {} is not", id="empty"
        ),
        pytest.param(
            lambda folder, index: (folder / "other.ckpt").touch(),
            "several original checkpoints .*; give one file",
            id="shards-and-a-whole",
        ),
    ],
)
def test_bad_shards(source, target, harm, message):
    model = small_model("gemma")
    save_shards(source, original_state(model), torch.save)
    write_config(source, model)
    file = source / "pytorch_model.bin.index.json"
    index = json.loads(file.read_text())
    harm(source, index)
    file.write_text(json.dumps(index))
    refused(source, target, message)
