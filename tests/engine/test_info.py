"""What `gemcut info` says of an engine that is not made yet."""

import inspect
import json
import re

import pytest

from gemcut.engine import Engine, cli, memory


@pytest.fixture
def run(capsys):
    """Run `gemcut` in this process: exit code, standard output, standard error."""

    def run(*args: str) -> tuple[int, str, str]:
        code = cli.main(args)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        pytest.param([], (8, 512), id="the-engine's-defaults"),
        pytest.param(["--max-batch-size", "3", "--max-seq-len", "100"], (3, 100), id="given"),
        pytest.param(["--max-batch-size", "auto", "--max-seq-len", "auto"], (16, 512), id="auto"),
    ],
)
def test_info_shows_the_engine_that_would_be_made(run, arguments, sizes):
    code, out, err = run("info", "demo", "--json", "--device", "cpu", *arguments)
    assert (code, err) == (0, "")
    planned = json.loads(out)["engine"]
    assert (planned["max_batch_size"], planned["max_seq_len"]) == sizes
    assert planned["problem"] is None
    kinds = planned["bytes"]
    assert kinds["total"] == sum(size for kind, size in kinds.items() if kind != "total")
    values = (a if a == "auto" else int(a) for a in arguments[1::2])
    keywords = dict(zip(("max_batch_size", "max_seq_len"), values, strict=False))
    with Engine.from_pretrained("demo", device="cpu", **keywords) as engine:
        assert (engine.cache.num_slots, engine.max_seq_len) == sizes
        assert engine.cache.nbytes + engine.cache.counters.nbytes == kinds["kv_cache"]
    shown = run("info", "demo", "--device", "cpu", *arguments)[1]
    assert f"an engine     {sizes[0]} x {sizes[1]} tokens take " in shown


def test_info_of_an_engine_that_does_not_fit_names_what_would(run, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 40 * 10**9)
    arguments = ["gemma-2-2b", "--device", "cpu", "--max-batch-size", "64"]
    code, out, err = run("info", *arguments, "--max-seq-len", "8192")
    assert (code, err) == (0, "")
    assert "an engine     64 slots of 8192 tokens need 1" in out
    assert re.search(r"but cpu has 40.00 GB free; \d+ slots of 8192 tokens or 64 slots of", out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-seq-len", "0"], "max_seq_len 0 is outside 2..512"),
        (["--max-seq-len", "-3"], "max_seq_len -3 is outside 2..512"),
        (["--max-seq-len", "513"], "max_seq_len 513 is outside 2..512"),
        (["--max-batch-size", "0"], "max_batch_size 0 is outside 1..4096"),
        (["--max-batch-size", "4097"], "max_batch_size 4097 is outside 1..4096"),
    ],
)
def test_info_refuses_a_size_out_of_range(run, arguments, message):
    assert run("info", *arguments) == (1, "", f"gemcut: error: {message}\n")


def test_info_and_the_engine_have_the_same_defaults():
    parameters = inspect.signature(Engine.from_pretrained).parameters
    assert parameters["max_batch_size"].default == memory.DEFAULT_BATCH_SIZE
    assert cli._parser().parse_args(["info"]).max_batch_size == memory.DEFAULT_BATCH_SIZE
    assert parameters["max_seq_len"].default is None


@pytest.mark.parametrize("slots", ["many", "", None])
def test_slots_that_are_no_number(slots):
    with pytest.raises(ValueError, match=f"max_batch_size {slots!r} is n"):
        Engine.from_pretrained("demo", max_batch_size=slots)
