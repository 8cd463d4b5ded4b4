"""`gemcut convert`: its options, its output and its errors."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios

import pytest
import torch
from foreign_files import Harmful, save_ckpt, small_model
from processes import COMMAND, ENVIRONMENT, gemcut
from safetensors.torch import load_file, save_file

from gemcut.engine import cli, cli_options, commands
from gemcut.engine.checkpoints import hub
from gemcut.engine.cli import main


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
        --quantization fp8 --tokenizer t --max-shard-size 2MB --overwrite --lora l"""
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
        "quantization": "fp8",
        "tokenizer": "t",
        "max_shard_bytes": 2_000_000,
        "overwrite": True,
        "lora": "l",
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
    assert cli_options._size(text) == size


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
