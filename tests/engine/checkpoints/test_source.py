"""The source of a conversion: its format, its files and its config are found, or refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from foreign_files import (
    assert_same_model,
    flax_state,
    original_state,
    save_ckpt,
    save_msgpack,
    save_shards,
    small_model,
)

from gemcut.engine.checkpoints import hub
from gemcut.engine.checkpoints.convert import convert
from gemcut.engine.checkpoints.formats import FORMATS
from gemcut.engine.config.model_config import ModelConfig


def fill(folder: Path, *formats: str) -> None:
    folder.mkdir(exist_ok=True)
    model = small_model("gemma2")
    model.config.save_pretrained(folder)
    if "huggingface" in formats:
        model.save_pretrained(folder)
    if "original" in formats:
        save_shards(folder, original_state(model), torch.save)
    if "flax" in formats:
        save_msgpack(flax_state(model), folder / "flax_model.msgpack")


@pytest.mark.parametrize("formats", [("huggingface", "original"), ("original", "flax")], ids=str)
def test_several_formats_in_one_folder(tmp_path, target, formats):
    fill(tmp_path / "source", *formats)
    names = r" \((\w+)\).* \((\w+)\)"
    with pytest.raises(ValueError, match=f"holds .*{names}; say with --from which") as error:
        convert(tmp_path / "source", target)
    assert set(re.findall(r"\((\w+)\)", str(error.value))) == set(formats)
    for name in formats:
        assert convert(tmp_path / "source", target, source_format=name, overwrite=True)
        assert_same_model(target, small_model("gemma2"))


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_that_is_not_there(tmp_path, target, name):
    fill(tmp_path / "source")
    with pytest.raises(ValueError, match=r"holds no weights that are known here: .*ckpt"):
        convert(tmp_path / "source", target)
    with pytest.raises(ValueError, match="holds neither"):
        convert(tmp_path / "source", target, source_format=name)
    with pytest.raises(ValueError, match="format 'gguf' is not supported; there are huggingface"):
        convert(tmp_path / "source", target, to="gguf")


def test_a_file_as_source_has_its_folder_beside_it(tmp_path, target, tokenizer_file):
    folder = tmp_path / "source"
    folder.mkdir()
    model = small_model("gemma2")
    save_ckpt(folder / "a.ckpt", original_state(model))
    save_ckpt(folder / "b.ckpt", original_state(model))
    save_msgpack(flax_state(model), folder / "flax_model.msgpack")
    model.config.save_pretrained(folder)
    shutil.copy(tokenizer_file, folder / "tokenizer.model")
    with pytest.raises(ValueError, match=r"several original checkpoints .a.ckpt, b.ckpt.; give"):
        convert(folder, target, source_format="original")
    convert(folder / "b.ckpt", target)
    assert (target / "tokenizer.model").exists()
    assert_same_model(target, model)
    assert convert(folder / "flax_model.msgpack", target, overwrite=True).source_format == "flax"
    with pytest.raises(ValueError, match="give the folder that holds it"):
        convert(target / "model.safetensors", tmp_path / "other")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("nowhere", "neither 'demo', an existing folder, nor", id="folder"),
        pytest.param("models/gemma.ckpt", "models/gemma.ckpt: no such file", id="ckpt"),
        pytest.param("./flax_model.msgpack", "no such file or folder", id="msgpack"),
    ],
)
def test_source_missing(tmp_path, target, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(ValueError, match=message):
        convert(name, target)
    assert not target.exists()


def test_from_the_hub_no_pickle_is_fetched(source, target, monkeypatch):
    def download(model, *, allow_patterns, **options):
        assert {"*.safetensors", "tokenizer.json"} <= set(allow_patterns)
        assert not any(re.search(r"bin|ckpt|pth|py|\*$", each) for each in allow_patterns)
        return source

    monkeypatch.setattr(hub, "snapshot_download", download)
    convert("owner/name", target)
    assert_same_model(target, small_model("gemma2"))


def test_a_config_given_must_agree_with_the_one_found(source, target, tmp_path):
    values = json.loads((source / "config.json").read_text())
    given = tmp_path / "given.json"
    given.write_text(json.dumps(values | {"rms_norm_eps": 1e-5, "sliding_window": 7}))
    with pytest.raises(
        ValueError,
        match=r"config.json: (sliding_window|rms_norm_eps) is \S+, but \S+ in the config given, "
        "and 1 more differ",
    ):
        convert(source, target, config=given)
    with pytest.raises(ValueError, match=r"config.json: .* is \S+, but .* in the config given"):
        convert(source, target, config="gemma-2-2b")
    given.write_text(json.dumps(values | {"dtype": "bfloat16", "note": "mine"}))
    convert(source, target, config=given)
    assert ModelConfig.from_file(target) == ModelConfig.from_file(source)


def test_a_config_given_stands_for_one_that_is_missing(source, target, tmp_path):
    shutil.move(source / "config.json", tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"no config.json beside it, .*no published size; give"):
        convert(source, target)
    convert(source, target, config=tmp_path)
    assert_same_model(target, small_model("gemma2"))
    (source / "config.json").write_text('{"variant": "2b"}')  # of another program
    convert(source, target, config=tmp_path / "config.json", overwrite=True)
    (source / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not JSON"):
        convert(source, target, config=tmp_path / "config.json", overwrite=True)


def test_an_unknown_config(source, target):
    with pytest.raises(ValueError, match="'gemma-9' is neither a file nor a published size: gemma"):
        convert(source, target, config="gemma-9")
