"""`gemcut convert`: what it reads and writes, what it verifies, and what it refuses."""

import fcntl
import json
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import termios
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from foreign_files import (
    Harmful,
    assert_same_model,
    flax_state,
    original_state,
    save_ckpt,
    save_msgpack,
    save_shards,
    small_model,
)
from processes import COMMAND, ENVIRONMENT
from random_models import MODEL_TYPES
from safetensors.torch import load_file, save_file

from gemcut.engine import cli, commands
from gemcut.engine.checkpoints import convert as driver
from gemcut.engine.checkpoints import hub
from gemcut.engine.checkpoints import source as source_module
from gemcut.engine.checkpoints import target as target_module
from gemcut.engine.checkpoints.convert import convert
from gemcut.engine.checkpoints.formats import FORMATS
from gemcut.engine.cli import main
from gemcut.engine.config.model_config import ModelConfig
from gemcut.engine.execution.weights import checkpoint_tensors


@pytest.fixture
def source(tmp_path, tokenizer_file) -> Path:
    """A small Gemma 2 with its tokenizer, as transformers saves it."""
    folder = tmp_path / "source"
    small_model("gemma2").save_pretrained(folder)
    shutil.copy(tokenizer_file, folder / "tokenizer.model")
    return folder


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "target"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.rglob("*")}


def gemcut(*arguments: object, command: Sequence[str] = COMMAND) -> tuple[int, str, str]:
    """A real process: exit code, standard output and standard error."""
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT
    )
    return done.returncode, done.stdout, done.stderr


# What comes out


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


def test_files_are_as_readable_as_any(source, target):
    convert(source, target)
    assert len({file.stat().st_mode for file in target.iterdir()}) == 1


def test_nonfinite_values_are_reported(source, target, capsys):
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    tensors["model.layers.0.self_attn.v_proj.weight"][1, 2] = float("-inf")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert main(["convert", str(source), str(target), "--to", "original"]) == 0
    notes = capsys.readouterr().err.splitlines()
    assert notes == [
        f"gemcut: {name} holds a NaN or an infinity"
        for name in ("model.layers.0.self_attn.v_proj.weight", "model.norm.weight")
    ]


# Verification


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


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
def test_what_fails_leaves_the_target_as_it_was(source, target, monkeypatch, failure):
    convert(source, target)
    before = snapshot(target)

    def fail(*args):
        raise failure

    monkeypatch.setattr(driver, "verify", fail)
    with pytest.raises(type(failure)):
        convert(source, target, to="flax", overwrite=True)
    assert snapshot(target) == before


# Which format


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
    def download(model, allow_patterns):
        assert {"*.safetensors", "tokenizer.json"} <= set(allow_patterns)
        assert not any(re.search(r"bin|ckpt|pth|py|\*$", each) for each in allow_patterns)
        return source

    monkeypatch.setattr(hub, "snapshot_download", download)
    convert("owner/name", target)
    assert_same_model(target, small_model("gemma2"))


# The config


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


# The target


def test_a_target_that_is_not_empty(source, target):
    target.mkdir()
    convert(source, target)  # an empty one is fine
    before = snapshot(target)
    with pytest.raises(ValueError, match="not empty; --overwrite replaces the model in it"):
        convert(source, target)
    assert snapshot(target) == before


def test_overwriting_leaves_one_model(source, target):
    for to, limit in [
        ("huggingface", 40_000),
        ("original", 40_000),
        ("flax", 40_000),
        ("original", 10**9),
        ("flax", 10**9),
        ("huggingface", 10**9),
    ]:
        target.mkdir(exist_ok=True)
        (target / "notes.txt").write_text("mine")
        done = convert(source, target, to=to, max_shard_bytes=limit, overwrite=True)
        index = {FORMATS[to].INDEX} if limit == 40_000 else set()
        names = {*done.files, *index, "config.json", "notes.txt", "tokenizer.model"}
        assert {file.name for file in target.iterdir()} - {"generation_config.json"} == names
    assert_same_model(target, small_model("gemma2"))


def test_source_and_target_may_not_be_one(source, tmp_path):
    before = snapshot(source)
    (tmp_path / "link").symlink_to(source)
    for same in (source, tmp_path / "link", source / ".." / "source"):
        with pytest.raises(ValueError, match="the source is there; give another folder"):
            convert(source, same, overwrite=True)
    file = save_ckpt(source / "m.ckpt", original_state(small_model("gemma2")))
    with pytest.raises(ValueError, match="the source is there"):
        convert(file, source, overwrite=True)
    file.unlink()
    assert snapshot(source) == before


def test_a_target_that_cannot_be(source, target, tmp_path):
    target.write_text("a file")
    with pytest.raises(ValueError, match="target: a file; the target is a folder"):
        convert(source, target, overwrite=True)
    with pytest.raises(OSError, match="Not a directory"):
        convert(source, target / "below")


def test_too_little_space(source, target, monkeypatch):
    usage = shutil.disk_usage(source)._replace(free=1000)
    monkeypatch.setattr(target_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"target: the result takes 0.00 GB, 0.00 GB are free"):
        convert(source, target)
    assert not target.exists()


@pytest.mark.parametrize("to", FORMATS)
def test_a_disk_that_fills_up(source, target, to):
    """A limit on a file's size stands for it: the write comes back short."""
    limited = ["sh", "-c", 'ulimit -f 150; exec "$@"', "sh", *COMMAND]
    code, out, err = gemcut("convert", source, target, "--to", to, command=limited)
    assert (code, out) == (1, "")
    assert err.startswith("gemcut: error: ")
    assert err.count("\n") == 1
    assert not target.exists()


# The command


def test_the_command_says_what_it_verified(source, target):
    code, out, err = gemcut("convert", source, target, "--to", "original", "--dtype", "bfloat16")
    model = small_model("gemma2")
    count = len(model.state_dict()) - 1  # the head is the embedding
    assert (code, err) == (0, "")
    assert out == (
        f"{target}: huggingface to original, bfloat16, 1 file; verified: {count} tensors, "
        f"{2 * model.num_parameters()} bytes, read back and equal\n"
    )


def test_a_progress_bar_on_a_terminal_alone(source, target):
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    arguments = [*COMMAND, "convert", str(source), str(target), "--max-shard-size", "40KB"]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=slave, env=ENVIRONMENT)
    shown = b""
    while select.select([master], [], [], 0.2)[0]:
        shown += os.read(master, 4096)
    os.close(slave)
    os.close(master)
    assert done.returncode == 0
    assert b"converting" in shown
    assert b"verifying" in shown
    assert b"converting" not in done.stdout


def test_every_option_reaches_the_conversion(monkeypatch):
    arguments = """convert a b --to flax --from original --config gemma-2b --dtype float32
        --tokenizer t --max-shard-size 2MB --overwrite"""
    asked = cli._parser().parse_args(arguments.split())
    seen = {}

    def record(source, target, **options):
        seen.update(options, source=source, target=target)
        raise ValueError("seen")

    monkeypatch.setattr(commands, "convert_checkpoint", record)
    with pytest.raises(ValueError, match="seen"):
        commands.convert(asked)
    assert seen == {
        "source": "a",
        "target": "b",
        "to": "flax",
        "source_format": "original",
        "config": "gemma-2b",
        "dtype": torch.float32,
        "tokenizer": "t",
        "max_shard_bytes": 2_000_000,
        "overwrite": True,
    }
    plain = cli._parser().parse_args(["convert", "a", "b"])
    with pytest.raises(ValueError, match="seen"):
        commands.convert(plain)
    assert seen["dtype"] is seen["source_format"] is seen["config"] is seen["tokenizer"] is None
    assert (seen["to"], seen["max_shard_bytes"]) == ("huggingface", 5 * 10**9)
    assert seen["overwrite"] is False


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("300", 300), ("2k", 2000)]
)
def test_sizes(text, size):
    assert cli._size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "GB", "5XB", "1e9", "9" * 99, "0.0001KB", "nan"])
def test_what_is_no_size(text, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["convert", "a", "b", f"--max-shard-size={text}"])
    assert exit.value.code == 2
    assert "is no size such as" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        pytest.param("model.ckpt", b"PK\3\4" + bytes(99), "damaged or cut short", id="pickle"),
        pytest.param("flax_model.msgpack", b"\xdf\xff\xff\xff\xff", "damaged", id="msgpack-bomb"),
        pytest.param("model.safetensors", b"\xff" * 99, "damaged or cut short", id="safetensors"),
        pytest.param("model.ckpt", b"version https://git-lfs", "a git-lfs pointer", id="lfs"),
        pytest.param("x.txt", b"", "holds no weights", id="nothing"),
    ],
)
def test_a_damaged_source_is_one_line(tmp_path, target, name, data, message, capsys):
    small_model("gemma2").config.save_pretrained(tmp_path / "source")
    (tmp_path / "source" / name).write_bytes(data)
    assert main(["convert", str(tmp_path / "source"), str(target)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(f"gemcut: error: .*{message}.*\n", shown.err)
    assert not target.exists()


def test_a_hostile_pickle_in_a_real_process(tmp_path, target):
    folder, victim = tmp_path / "source", tmp_path / "victim"
    folder.mkdir()
    save_ckpt(folder / "gemma.ckpt", {"x": Harmful(victim)})
    code, out, err = gemcut("convert", folder, target, "--config", "gemma-2b")
    assert (code, out) == (1, "")
    assert re.fullmatch(r"gemcut: error: .*gemma.ckpt: refused: the pickle asks for .*\n", err)
    assert not victim.exists()
    assert not target.exists()


@pytest.mark.parametrize("to", ["original", "flax"])
def test_the_demo_there_and_back(tmp_path, to):
    assert main(["convert", "demo", str(tmp_path / "there"), "--to", to]) == 0
    assert main(["convert", str(tmp_path / "there"), str(tmp_path / "back")]) == 0
    before = load_file(hub.DEMO / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


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
