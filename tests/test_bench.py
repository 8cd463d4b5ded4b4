"""gemcut-bench: what it prints and refuses; it times nobody who computes something else."""

import json
import statistics
from dataclasses import replace

import pytest
import torch

from gemcut.bench import cli
from gemcut.bench.decode import (
    Workload,
    compare,
    make_prompts,
    print_decode,
    report_decode,
    setup_decode,
)
from gemcut.bench.peers import PEERS, Gemcut, Transformers, load_peers
from gemcut.bench.timing import Spread, take_turns

TINY = Workload(prompt_tokens=5, new_tokens=4, batch=2, repeats=2)


@pytest.fixture(scope="module")
def setup():
    return setup_decode("demo", "cpu", "float32", TINY)


@pytest.fixture(scope="module")
def gemcut(setup):
    return Gemcut(setup)


@pytest.fixture(scope="module")
def prompts(gemcut):
    return make_prompts(gemcut.engine.tokenizer, TINY)


@pytest.fixture(scope="module")
def peer(setup):
    (loaded,) = load_peers(["transformers"], setup)
    assert isinstance(loaded, Transformers)
    return loaded


class Planted:
    """Another peer's answers, changed before they are given."""

    version, settings = "0", "planted"

    def __init__(self, peer, change, name="planted"):
        self.peer, self.change, self.name = peer, change, name

    def generate(self, prompts, new_tokens):
        generation = self.peer.generate(prompts, new_tokens)
        return replace(generation, token_ids=self.change(generation.token_ids))


def one_token_off(rows):
    return [rows[0], [*rows[1][:2], rows[1][2] ^ 1, *rows[1][3:]]]


def test_command_prints_a_table_and_one_json_object(capfd, tmp_path):
    file = tmp_path / "decode.json"
    command = ["decode", "--prompt-tokens", "5", "--new-tokens", "4", "--batch", "2"]
    command += ["--repeats", "3", "--device", "cpu", "--json", str(file)]
    assert cli.main(command) == 0
    lines = capfd.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert json.loads(file.read_text()) == report

    assert {"device", "cpu", "threads", "versions", "commit"} <= report.keys()
    assert {"python", "torch", "gemcut"} <= report["versions"].keys()
    assert (report["model"], report["batch"], report["interrupted"]) == ("demo", 2, False)
    own, *peers = report["rows"]
    assert [row["contestant"] for row in report["rows"]] == ["gemcut", *PEERS]
    for row in report["rows"]:
        assert any(line.startswith(row["contestant"]) for line in lines)
        assert row["version"]
        for column in ("tokens_per_second", "first_token_ms"):
            measured = row[column]
            assert len(measured["all"]) == 3
            assert 0 < measured["low"] <= measured["median"] <= measured["high"]
    for row in peers:
        rates = zip(own["tokens_per_second"]["all"], row["tokens_per_second"]["all"], strict=True)
        ratios = [a / b for a, b in rates]
        assert row["ratio"]["all"] == pytest.approx(ratios)
        assert row["ratio"]["median"] == pytest.approx(statistics.median(ratios))
        assert row["tokens"]["status"] in ("same", "near tie")
    fastest = max(peers, key=lambda row: row["tokens_per_second"]["median"])
    assert report["headline"]["peer"] == fastest["contestant"]
    assert report["headline"]["median"] == fastest["ratio"]["median"]


def test_report_names_no_folder(gemcut, tmp_path, setup):
    folder = tmp_path / "somewhere" / "mine"
    folder.parent.mkdir()
    folder.symlink_to(setup.folder)
    linked = setup_decode(str(folder), "cpu", "float32", TINY)
    result = compare([gemcut], [[2]], replace(TINY, repeats=1), torch.float32)
    report = report_decode(linked, TINY, result)
    assert report["model"] == "mine"
    assert str(tmp_path) not in json.dumps(report)


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        pytest.param(one_token_off, "row 1, new token 2", id="one-token-off"),
        pytest.param(lambda rows: [row[:-1] for row in rows], "2 rows of [3]", id="too-few"),
        pytest.param(lambda rows: rows[:1], "1 rows", id="a-row-missing"),
    ],
)
def test_a_peer_with_other_tokens_is_reported_and_not_timed(
    gemcut, peer, prompts, setup, change, detail, capsys
):
    contestants = [gemcut, peer, Planted(peer, change)]
    result = compare(contestants, prompts, TINY, torch.float32)
    assert result.verdicts["transformers"].status == "same"
    assert result.verdicts["planted"].status == "wrong"
    assert detail in result.verdicts["planted"].detail
    assert result.timed == ["gemcut", "transformers"]
    print_decode(setup, TINY, result)
    assert f"wrong, {result.verdicts['planted'].detail}" in capsys.readouterr().out
    row = report_decode(setup, TINY, result)["rows"][2]
    assert row["tokens"]["status"] == "wrong"
    assert "tokens_per_second" not in row


def test_the_margin_of_a_wrong_token_is_weighed_by_transformers(gemcut, peer, prompts):
    result = compare([gemcut, peer, Planted(peer, one_token_off)], prompts, TINY, torch.float32)
    assert "transformers' logits favour gemcut by" in result.verdicts["planted"].detail


def test_a_near_tie_is_told_and_timed(gemcut, peer, prompts, monkeypatch):
    # equal logits: either token is a correct choice
    monkeypatch.setattr(peer, "next_logits", lambda ids: torch.ones(3072))
    result = compare([gemcut, peer, Planted(peer, one_token_off)], prompts, TINY, torch.float32)
    assert result.verdicts["planted"].status == "near tie"
    assert "by 0.0e+00" in result.verdicts["planted"].detail
    assert "planted" in result.timed


def test_a_wrong_peer_fails_the_command(monkeypatch, peer, capsys):
    monkeypatch.setattr(
        "gemcut.bench.decode.load_peers", lambda names, setup: [Planted(peer, one_token_off)]
    )
    command = ["decode", "--prompt-tokens", "5", "--new-tokens", "4", "--batch", "2"]
    assert cli.main([*command, "--repeats", "1", "--device", "cpu"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["headline"] is None


def test_a_peer_that_does_not_run_is_told(gemcut, prompts):
    def refuse(rows):
        raise NotImplementedError("no such cache\nsecond line")

    result = compare([gemcut, Planted(gemcut, refuse)], prompts, TINY, torch.float32)
    assert result.verdicts["planted"].status == "failed"
    assert result.verdicts["planted"].detail == "NotImplementedError: no such cache"
    assert result.timed == ["gemcut"]


def test_an_interrupted_run_keeps_whole_rounds(monkeypatch, gemcut, capsys):
    calls = 0

    def interrupt(rows):
        nonlocal calls
        calls += 1
        if calls == 4:  # the check, two rounds, then Ctrl-C
            raise KeyboardInterrupt
        return rows

    monkeypatch.setattr(
        "gemcut.bench.decode.load_peers", lambda names, setup: [Planted(gemcut, interrupt)]
    )
    command = ["decode", "--prompt-tokens", "5", "--new-tokens", "4", "--batch", "2"]
    assert cli.main([*command, "--repeats", "5", "--device", "cpu"]) == 130
    out = capsys.readouterr().out
    assert "interrupted: 2 whole rounds are kept" in out
    report = json.loads(out.splitlines()[-1])
    assert report["interrupted"]
    assert [len(row["tokens_per_second"]["all"]) for row in report["rows"]] == [2, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no-such-model"], "'no-such-model'"),
        (["--peer", "llama"], "peer 'llama' is unknown; there are transformers"),
        (["--repeats", "0"], "repeats 0 is outside 1.."),
        (["--batch", "0"], "batch 0 is outside 1.."),
        (["--prompt-tokens", "-1"], "prompt tokens -1 is outside 1.."),
        (["--new-tokens", "1"], "new tokens 1 is outside 2.."),
        (["--threads", "0"], "threads 0 is outside 1.."),
        (["--prompt-tokens", "500", "--new-tokens", "13"], "are 513, but a slot"),
        (["--dtype", "float16"], "float16 is refused"),
        (["--device", "tpu"], "device 'tpu'"),
        (["--json", "no-such-folder/file.json"], "no such folder"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert cli.main(["decode", *arguments]) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize("arguments", [[], ["decode", "--repeats", "many"], ["fly"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2


def test_a_peer_that_is_not_installed_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("gemcut.bench.peers._installed", lambda package: False)
    assert cli.main(["decode", "--peer", "transformers"]) == 1
    assert "needs the package transformers" in capsys.readouterr().err


def test_prompts_are_distinct_rows_of_the_asked_length(gemcut):
    for length in (1, 5, 400):  # 400: longer than the passage
        rows = make_prompts(gemcut.engine.tokenizer, replace(TINY, prompt_tokens=length))
        assert [len(row) for row in rows] == [length, length]
        assert all(row[0] == gemcut.engine.tokenizer.bos_id for row in rows)
        assert (rows[0] != rows[1]) == (length > 1)


def test_first_token_comes_before_the_rest(gemcut, peer, prompts):
    for one in (gemcut, peer):
        generation = one.generate(prompts, 4)
        assert 0 < generation.first_token_seconds < generation.seconds
        spent = generation.seconds - generation.first_token_seconds
        assert generation.tokens_per_second == pytest.approx(2 * 3 / spent)


def test_contestants_take_turns():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    assert len(list(take_turns(calls, 2))) == 2
    assert order == ["a", "b", "a", "b"]
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(median=2.0, low=1.0, high=3.0)
