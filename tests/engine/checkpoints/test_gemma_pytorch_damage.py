"""The original pickles: hostile, damaged and misfitting ones, each refused in one line."""

import json
import os
import re
import zipfile
from pathlib import Path

import pytest
import torch
from foreign_files import (
    Harmful,
    original_state,
    refused,
    save_ckpt,
    save_shards,
    small_model,
    write_config,
)


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


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
    """Its tensor would reach into the bytes after it; torch checks only the file's end."""
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
