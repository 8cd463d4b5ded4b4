"""The gemcut-bench command: its options, what it refuses, and how it exits."""

import json

import pytest
import torch
from planted_engines import SIZES, skip_ceilings
from synthetic_reports import decode_record, report

from gemcut.bench import cli
from gemcut.bench.engines.peers import PEERS


@pytest.fixture(autouse=True)
def ceilings(monkeypatch):
    skip_ceilings(monkeypatch)


def assert_refused(arguments, message, capsys):
    assert cli.main(arguments) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no-such-model"], "'no-such-model'"),
        (["--random", "gemma-9-9t"], "'gemma-9-9t' is unknown; there are gemma-2b, gemma-7b"),
        (["--random", "gemma-2-2b", "--model", "demo"], "'gemma-2-2b' and --model exclude"),
        (["--random", "gemma-2-2b", "--layers", "0"], "layers 0 is outside 1..26"),
        (["--random", "gemma-2-2b", "--layers", "27"], "layers 27 is outside 1..26"),
        (["--layers", "2"], "--layers 2 cuts a model of --random"),
        (["--peer", "llama"], "peer 'llama' is unknown; there are transformers"),
        (["--repeats", "0"], "repeats 0 is outside 1.."),
        (["--batch", "1", "0"], "batch 0 is outside 1.."),
        (["--context", "5", "-1"], "prompt tokens -1 is outside 1.."),
        (["--prompt-tokens", "0"], "prompt tokens 0 is outside 1.."),
        (["--new-tokens", "1"], "new tokens 1 is outside 2.."),
        (["--threads", "0"], "threads 0 is outside 1.."),
        (["--context", "5", "500", "--new-tokens", "13"], "are 513, but a slot"),
        (["--random", "vaultgemma-1b", "--context", "1024"], "holds at most 1024"),
        (["--dtype", "float16"], "float16 is refused"),
        (["--device", "tpu"], "device 'tpu'"),
        (["--json", "no-such-folder/file.json"], "no such folder"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert_refused(["decode", "--device", "cpu", *arguments], message, capsys)


@pytest.mark.parametrize("command", ["decode", "prefill", "serve-sim"])
def test_every_benchmark_refuses_a_bad_model(command, capsys):
    assert_refused([command, "--random", "gemma"], "--random 'gemma' is unknown", capsys)
    assert_refused([command, "--device", "tpu"], "device 'tpu'", capsys)
    assert_refused([command, "--json", "no/such.json"], "there is no such folder", capsys)


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["decode", "--repeats", "many"], ["compare", "a.json"], ["report"]],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2


@pytest.mark.parametrize("command", ["kernels", "decode", "prefill", "serve-sim"])
def test_benchmarks_share_their_options(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for option in ("--threads", "--device", "--dtype", "--json"):
        assert option in text


def test_threads_are_set_before_anything_is_measured(capsys):
    before = torch.get_num_threads()
    try:
        assert cli.main(["decode", *SIZES, "--repeats", "1", "--threads", str(before + 1)]) == 0
        report = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert report["machine"]["threads"] == torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_a_peer_that_is_not_installed_is_refused_where_it_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr("gemcut.bench.engines.peers._installed", lambda package: False)
    command = ["decode", "--device", "cpu", "--peer", "transformers"]
    assert_refused(command, "'transformers' needs the package transformers", capsys)


def test_peers_that_are_not_installed_are_listed_once(monkeypatch, capsys):
    monkeypatch.setattr("gemcut.bench.engines.peers._installed", lambda package: False)
    command = ["decode", *SIZES, "--context", "5", "6", "--repeats", "1"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    lacking = [f"{name} (" for name in PEERS if name != "gpt-fast"]
    assert out.count("not installed: ") == 1
    assert all(out.count(name) == 1 for name in lacking)
    records = json.loads(out.splitlines()[-1])["rows"]
    assert [record["contestant"] for record in records] == ["gemcut", "gemcut"]


def test_an_interruption_before_anything_is_measured_is_one_line(monkeypatch, capsys):
    def interrupt(device, dtype):
        raise KeyboardInterrupt

    monkeypatch.setattr("gemcut.bench.engines.case_runner.measure_ceilings", interrupt)
    assert cli.main(["decode", *SIZES]) == 130
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def files(tmp_path):
    """A report, and one of an engine that is slower by half."""
    paths = []
    for name, rate in (("a", 100.0), ("b", 50.0)):
        records = [
            decode_record("gemma-2-2b", rate=[rate + i / 10 for i in range(10)]),
            decode_record("gemma-2-2b", "transformers", rate=[40 + i / 10 for i in range(10)]),
        ]
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(report("decode", records)))
        paths.append(str(path))
    return paths


def test_compare(files, capsys):
    a, b = files
    assert cli.main(["compare", a, a]) == 0
    assert cli.main(["compare", a, b]) == 1
    assert "slower" in capsys.readouterr().out
    assert cli.main(["compare", a, b, "--threshold", "0.9"]) == 0
    capsys.readouterr()
    assert_refused(["compare", a, "no-such.json"], "no-such.json", capsys)


def test_report(files, tmp_path, capsys):
    assert cli.main(["report", *files[:1], "--out", str(tmp_path / "page")]) == 0
    assert (tmp_path / "page" / "report.md").exists()
    capsys.readouterr()
    assert_refused(["report", *files], "nothing to write", capsys)
