"""Conversion: the tensors written, their verification, and the memory used."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from foreign_files import assert_same_model, small_model
from random_models import MODEL_TYPES
from safetensors.torch import load_file, save_file

from gemcut.engine.checkpoints import convert as driver
from gemcut.engine.checkpoints import source as source_module
from gemcut.engine.checkpoints import target as target_module
from gemcut.engine.checkpoints.convert import convert
from gemcut.engine.checkpoints.formats import FORMATS
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.weights import checkpoint_tensors


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("limit", [10**9, 40_000], ids=["whole", "shards"])
def test_hugging_face_to_itself(tmp_path, target, model_type, limit):
    model = small_model(model_type)
    model.save_pretrained(tmp_path / "source", max_shard_size="60KB")
    done = convert(tmp_path / "source", target, max_shard_bytes=limit)
    assert (done.tensors, done.left_aside, done.nonfinite) == (
        len(list(checkpoint_tensors(done.config))),
        0,
        (),
    )
    assert (len(done.files) == 1) is (limit == 10**9)
    assert all((target / file).stat().st_size < max(limit, 40_000) + 10**4 for file in done.files)
    assert_same_model(target, model)


def test_a_dtype_can_be_asked_for(source, target, tmp_path):
    done = convert(source, target, dtype=torch.bfloat16)
    exact, rounded = load_file(source / "model.safetensors"), load_file(target / done.files[0])
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in exact)
    assert ModelConfig.from_file(target).dtype == "bfloat16"
    for dtype in (torch.float16, torch.int8):
        with pytest.raises(ValueError, match=r"is refused: give bfloat16 or float32"):
            convert(source, tmp_path / "other", dtype=dtype)


def test_tensors_keep_their_own_dtypes(source, target, tmp_path):
    file = source / "model.safetensors"
    tensors = {
        name: tensor.bfloat16() if "norm" in name else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    convert(source, target, to="flax")
    convert(target, tmp_path / "back")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert {n: t.dtype for n, t in after.items()} == {n: t.dtype for n, t in tensors.items()}

    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(32, 48, dtype=torch.bfloat16)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"qkv_proj.weight would join bfloat16 and float32; give"):
        convert(source, tmp_path / "fused", to="original")


def test_companions_are_copied(source, target, tokenizer_file, tmp_path):
    (source / "chat_template.jinja").write_text("template")
    (source / "optimizer.pt").write_bytes(b"large")
    (source / "generation_config.json").write_text('{"eos_token_id": 7}')
    convert(source, target)
    assert {file.name for file in target.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.model",
        "chat_template.jinja",
        "generation_config.json",
    }
    for name in ("tokenizer.model", "chat_template.jinja", "generation_config.json"):
        assert (target / name).read_bytes() == (source / name).read_bytes()

    shutil.copy(tokenizer_file, tmp_path / "pieces")
    (source / "tokenizer.model").write_bytes(b"another")
    convert(source, tmp_path / "given", tokenizer=tmp_path / "pieces")
    assert (tmp_path / "given" / "tokenizer.model").read_bytes() == tokenizer_file.read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "cannot be read .No such file", id="missing"),
        pytest.param(b"not a vocabulary", ".", id="no-vocabulary"),
        pytest.param(b"version https://git-lfs.github.com/spec", "git-lfs pointer", id="lfs"),
    ],
)
def test_bad_tokenizer(source, target, tmp_path, content, message):
    if content is not None:
        (tmp_path / "pieces").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        convert(source, target, tokenizer=tmp_path / "pieces")
    assert "\n" not in str(error.value)
    assert not target.exists()


def spoil(file: Path) -> None:
    """Flip a bit near the end, where the tensors are."""
    data = bytearray(file.read_bytes())
    at = {".ckpt": data.rfind(b"data/serialization_id") - 6000}.get(file.suffix, len(data) - 50)
    data[at] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("limit", [10**9, 40_000], ids=["whole", "shards"])
@pytest.mark.parametrize("to", FORMATS)
def test_a_write_gone_wrong_is_noticed(source, target, monkeypatch, to, limit):
    write_file = FORMATS[to].write_file
    spoilt = []

    def write(file, tensors):
        write_file(file, tensors)
        if not spoilt:
            spoil(file)
            spoilt.append(file)

    monkeypatch.setattr(FORMATS[to], "write_file", write)
    kept = "nothing was kept"
    with pytest.raises(ValueError, match=f"reads back otherwise .*{kept}|read back; {kept}"):
        convert(source, target, to=to, max_shard_bytes=limit)
    assert not target.exists()
    convert(source, target, to=to, max_shard_bytes=limit)  # spoils nothing more


def test_a_config_gone_wrong_is_noticed(source, target, monkeypatch):
    def write_json(file, values):
        if file.name == "config.json":
            values = values | {"rms_norm_eps": 1e-5}
        file.write_text(json.dumps(values))

    monkeypatch.setattr(target_module, "write_json", write_json)
    with pytest.raises(ValueError, match=r"config.json reads back as another config"):
        convert(source, target)
    assert not target.exists()


def test_memory_is_bounded_by_a_shard(source, target, monkeypatch):
    """Tensors are made when their file is written, and let go before the next one."""
    alive, most = 0, 0
    read_rows = source_module.read_rows

    class Counted(torch.Tensor):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def counting(*args, **kwargs):
        nonlocal alive, most
        alive += 1
        most = max(most, alive)
        return read_rows(*args, **kwargs).as_subclass(Counted)

    monkeypatch.setattr(source_module, "read_rows", counting)
    monkeypatch.setattr(driver, "verify", lambda *args: None)
    done = convert(source, target, max_shard_bytes=40_000)
    per_file = max(len(load_file(target / file)) for file in done.files)
    assert most <= per_file < done.tensors / 3
